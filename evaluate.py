"""Evaluate a checkpoint, or maps that any code has saved; see configs/evaluate.yaml.

Usage::

    python evaluate.py [checkpoint=]PATH [save_predictions=DIR] [key=value ...]
    python evaluate.py predictions=DIR data=NAME [data.root=PATH] [key=value ...]
"""

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mtcl.cli.evaluate import evaluate, infer_dataset_override, read_named_model
from mtcl.cli.hydra_app import run_hydra_app
from mtcl.config.overrides import add_checkpoint_key, quote_paths

CONFIGS = Path(__file__).with_name("configs")


def main(config: DictConfig) -> None:
    """Evaluate with the composed config, in the folder that Hydra has made."""
    job = HydraConfig.get()
    groups = [group for group in job.runtime.choices if not group.startswith("hydra/")]
    typed = [override for override in job.overrides.task if override != inferred]
    evaluate(config, typed, groups, Path(job.runtime.output_dir), saved)


if __name__ == "__main__":
    sys.argv[1:] = quote_paths(add_checkpoint_key(sys.argv[1:]))
    saved = read_named_model(sys.argv[1:])
    inferred = infer_dataset_override(saved, sys.argv[1:], CONFIGS)
    if inferred:
        sys.argv.append(inferred)
    run_hydra_app(main, CONFIGS, "evaluate")
