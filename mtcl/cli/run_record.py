"""What a command tells at its end: the table, and run.json."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mtcl.data import MultiTaskDataset
from mtcl.version import __version__

PACKAGES = ("torch", "torchvision", "timm", "torchmetrics", "numpy", "opencv-python-headless", "hydra-core")


def build_run_record(
    config: DictConfig, reader: MultiTaskDataset, num_images: int, device: torch.device, overrides: Sequence[str]
) -> dict[str, Any]:
    """``run.json``: what one needs to know to trust, or repeat, the numbers in ``metrics.json``."""
    commit, clean = _commit()
    height, width = config.data.size
    return {
        "command": shlex.join(sys.argv),
        "overrides": list(overrides),
        "commit": commit,
        "clean": clean,
        "versions": {"python": platform.python_version(), "mtcl": __version__, **_versions()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "precision": config.trainer.precision,
        "seed": config.seed,
        "split": config.data.split,
        "num_images": num_images,
        "protocol": f"un-padded pictures, label resolution; frames {height}x{width} or more",
        "evaluation": OmegaConf.to_container(config.evaluation, resolve=True),
        "data_fingerprint": reader.fingerprint(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _commit() -> tuple[str | None, bool | None]:
    """The commit of mtcl's own checkout and whether it was clean; None where it is not a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), git("status", "--porcelain") == ""
    except (OSError, subprocess.CalledProcessError):
        return None, None
