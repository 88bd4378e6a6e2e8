"""Distil frozen teachers into a student: python scripts/distill.py data.root=FOLDER [group=choice ...] [key=value ...].

The first stage of SAK (see configs/distill.yaml and docs/models.md): images without labels, and the loss of
regularizer=distillation alone. A run like those of train.py, in a folder of its own: resume=auto continues it. The
second stage is train.py with decoder=sak decoder.weights=RUN/checkpoints/last.pt regularizer=distillation.
"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mtcl.cli.hydra_app import run_hydra_app


def main(config: DictConfig) -> None:
    """Distil with the composed config, in the folder that Hydra has made."""
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    chosen_folder = any("hydra.run.dir" in override for override in job.overrides.hydra)
    from mtcl.cli.train import train  # here: it imports torch, which --help and a sweep's parent don't need

    train(config, folder, None if chosen_folder else folder.parent, overrides=list(job.overrides.task))


if __name__ == "__main__":
    script = Path(__file__).resolve()
    run_hydra_app(main, script.parents[1] / "configs", "distill", script=script)
