"""Train: python train.py [group=choice ...] [key=value ...]   (see configs/train.yaml)."""

from pathlib import Path

from mtcl.cli.hydra_app import run_hydra_app, train_in_job_folder

if __name__ == "__main__":
    run_hydra_app(train_in_job_folder, Path(__file__).with_name("configs"), "train", script=Path(__file__).resolve())
