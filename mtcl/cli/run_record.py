"""Collect the record of a run for run.json: versions, commit, device, seed and data."""

import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mtcl.data import MultiTaskDataset
from mtcl.data.partial_labels import PartiallyLabeledDataset
from mtcl.training.trainer import Trainer
from mtcl.version import __version__, read_commit

PACKAGES = ("torch", "torchvision", "timm", "torchmetrics", "numpy", "opencv-python-headless", "hydra-core")


def build_run_record(
    config: DictConfig, dataset: MultiTaskDataset, num_images: int, device: torch.device, overrides: Sequence[str]
) -> dict[str, Any]:
    """Build the record of a run: what one needs to know to trust or repeat its metrics.

    Args:
        config: the resolved config of the run or evaluation.
        dataset: what was evaluated.
        num_images: how many images were evaluated.
        device: where it ran.
        overrides: the command's overrides.

    Returns:
        What is written to the run folder's record, a JSON object.
    """
    commit, clean = read_commit()
    height, width = config.data.size
    return {
        "command": _format_command(sys.argv),
        "overrides": list(overrides),
        "commit": commit,
        "clean": clean,
        "versions": {"python": platform.python_version(), "mtcl": __version__, **_versions()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "precision": config.trainer.precision,
        "seed": config.seed,
        "split": config.data.split,
        "num_images": num_images,
        "protocol": f"un-padded images, label resolution; frames {height}x{width} or more",
        "evaluation": OmegaConf.to_container(config.evaluation, resolve=True),
        "data_fingerprint": dataset.fingerprint(),
    }


def record_labels(dataset: MultiTaskDataset) -> dict[str, Any]:
    """Record where the labels of a partly labelled training come from; return nothing where every image has all.

    Returns:
        ``labels``: the file's name and hash, or the rule and the seed that it was drawn from, the tasks among which
        labels were distributed if these are more than those in use, and the number of images that carry the label of
        each task.
    """
    if not isinstance(dataset, PartiallyLabeledDataset):
        return {}
    return {"labels": {**dataset.source, "images": dataset.count_labels()}}


def record_ending(trainer: Trainer) -> dict[str, Any]:
    """Record why a training ended, and at which step it was best.

    Returns:
        ``stop_reason``: ``max_steps``, or ``patience`` after early stopping; ``best_step``: the step of ``best.pt``,
        None where it is not known; ``validations_without_improvement``: how many there were since the best one.
    """
    return {
        "stop_reason": "patience" if trainer.is_stopped_early else "max_steps",
        "best_step": trainer.best_step,
        "validations_without_improvement": trainer.early_stopping.wait_count,
    }


def _format_command(arguments: Sequence[str]) -> str:
    """Return a command line for a shell; the name of a command of mtcl is two words.

    >>> _format_command(["mtcl train", "seed=0,1", "name=my run"])
    "mtcl train seed=0,1 'name=my run'"
    """
    is_command = arguments[0].startswith("mtcl ")
    return shlex.join([*(arguments[0].split() if is_command else arguments[:1]), *arguments[1:]])


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions
