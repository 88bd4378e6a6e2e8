"""Evaluate: python evaluate.py [checkpoint=]PATH [save_predictions=DIR] [key=value ...]   (see configs/evaluate.yaml),
or, of maps that any code has saved: python evaluate.py predictions=DIR data=NAME [data.root=PATH] [key=value ...]."""

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mtcl.cli.evaluate import evaluate, infer_dataset_override
from mtcl.cli.hydra_app import run_hydra_app
from mtcl.config.overrides import add_checkpoint_key, quote_paths

CONFIGS = Path(__file__).with_name("configs")


def main(config: DictConfig) -> None:
    job = HydraConfig.get()
    groups = [key for key in job.runtime.choices if not key.startswith("hydra/")]
    words = [word for word in job.overrides.task if word != own_data]
    evaluate(config, words, groups, Path(job.runtime.output_dir))


if __name__ == "__main__":
    sys.argv[1:] = quote_paths(add_checkpoint_key(sys.argv[1:]))
    own_data = infer_dataset_override(sys.argv[1:], CONFIGS)
    if own_data:
        sys.argv.append(own_data)
    run_hydra_app(main, CONFIGS, "evaluate")
