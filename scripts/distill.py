"""Distil frozen teachers into a student: python scripts/distill.py data.root=FOLDER [group=choice ...] [key=value ...].

The first stage of SAK (see configs/distill.yaml and docs/models.md): images without labels, and the loss of
regularizer=distillation alone. A run like those of train.py, in a folder of its own: resume=auto continues it. The
second stage is train.py with decoder=sak decoder.weights=RUN/checkpoints/last.pt regularizer=distillation.
"""

from pathlib import Path

from mtcl.cli.hydra_app import run_hydra_app, train_in_job_folder
from mtcl.config.compose import find_configs

if __name__ == "__main__":
    run_hydra_app(train_in_job_folder, find_configs(), "distill", command=[str(Path(__file__).resolve())])
