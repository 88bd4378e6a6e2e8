"""Evaluate: python evaluate.py checkpoint=PATH [key=value ...]   (see configs/evaluate.yaml)."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mtcl.entry.cli import launch
from mtcl.entry.evaluate import evaluate


def main(config: DictConfig) -> None:
    job = HydraConfig.get()
    groups = [key for key in job.runtime.choices if not key.startswith("hydra/")]
    evaluate(config, list(job.overrides.task), groups, Path(job.runtime.output_dir))


if __name__ == "__main__":
    launch(main, Path(__file__).with_name("configs"), "evaluate")
