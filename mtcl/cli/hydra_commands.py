"""The commands ``mtcl train`` and ``mtcl evaluate``, whose arguments Hydra reads; train.py and evaluate.py run them."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mtcl.cli.hydra_app import run_hydra_app, train_in_job_folder
from mtcl.cli.terminal import announce_loading
from mtcl.config.compose import find_configs
from mtcl.config.overrides import add_checkpoint_key, quote_paths

# Of a sweep's processes. -P: a folder of the user's that is called as a package must not take its place.
TRAIN_PROCESS = ("-P", "-m", "mtcl", "train")


def train(command: Sequence[str] = TRAIN_PROCESS) -> None:
    """Train with the overrides in ``sys.argv``; ``-m`` sweeps.

    Args:
        command: arguments of the Python whose processes run a sweep's jobs, such as a script's path.
    """
    run_hydra_app(train_in_job_folder, find_configs(), "train", command=command)


def evaluate() -> None:
    """Score a checkpoint, or saved maps, with the overrides in ``sys.argv``."""
    with announce_loading("PyTorch"):  # here, for it takes seconds
        from mtcl.cli import evaluate as scoring

    configs = find_configs()
    sys.argv[1:] = quote_paths(add_checkpoint_key(sys.argv[1:]))
    saved = scoring.read_named_model(sys.argv[1:])
    inferred = scoring.infer_dataset_override(saved, sys.argv[1:], configs)
    if inferred:
        sys.argv.append(inferred)

    def job(config: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        groups = [group for group in hydra_config.runtime.choices if not group.startswith("hydra/")]
        typed = [override for override in hydra_config.overrides.task if override != inferred]
        scoring.evaluate(config, typed, groups, Path(hydra_config.runtime.output_dir), saved)

    run_hydra_app(job, configs, "evaluate")


COMMANDS = {"train": train, "evaluate": evaluate}
