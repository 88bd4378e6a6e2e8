"""Train: python train.py [group=choice ...] [key=value ...]   (see configs/train.yaml)."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mtcl.cli.hydra_app import run_hydra_app


def main(config: DictConfig) -> None:
    """Train with the composed config, in the folder that Hydra has made."""
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    chosen_folder = any("hydra.run.dir" in override for override in job.overrides.hydra)
    from mtcl.cli.train import train  # here: it imports torch, which --help and a sweep's parent don't need

    train(config, folder, None if chosen_folder else folder.parent, overrides=list(job.overrides.task))


if __name__ == "__main__":
    run_hydra_app(main, Path(__file__).with_name("configs"), "train", script=Path(__file__).resolve())
