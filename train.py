"""Train: python train.py [group=choice ...] [key=value ...]   (see configs/train.yaml), as ``mtcl train`` does."""

from pathlib import Path

from mtcl.cli.hydra_commands import train

if __name__ == "__main__":
    train(command=[str(Path(__file__).resolve())])
