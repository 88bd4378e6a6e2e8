"""What a command tells at its end: the table, and run.json."""

import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

import mtcl
from mtcl.data import Reader
from mtcl.tasks.base import Task
from mtcl.training.evaluator import Metrics

PACKAGES = ("torch", "torchvision", "timm", "torchmetrics", "numpy", "opencv-python-headless", "hydra-core")

COUNTS = {"not_finite": "pixels", "absent_classes": "classes"}  # metrics that count


def format_table(tasks: Mapping[str, Task], columns: Mapping[str, Metrics]) -> str:
    """A row per task and metric, the headline first (marked *, said below), a column per heading; fractions in
    percent.

    Without the single classes' IoU, without counts of what was not finite where there was nothing of it, and without a
    second mIoU where every class occurs in the labels.
    """
    rows = [("task", "metric", *columns)]
    for name, task in tasks.items():
        found = {metric: None for column in reversed(list(columns.values())) for metric in column[name]}
        headline, _ = task.headline(found)
        for metric in [headline, *(m for m in found if m != headline)]:
            values = [column[name].get(metric, math.nan) for column in columns.values()]
            if metric.startswith("IoU/") or (metric in COUNTS and not any(v > 0 for v in values)):
                continue
            if metric == "mIoU_present" and not any(
                column[name].get("absent_classes", 0) > 0 for column in columns.values()
            ):
                continue
            mark = "*" if metric == headline else ""
            rows.append((name, metric + mark, *(shown(task, metric, value) for value in values)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: tuple[str, ...]) -> str:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:2], widths))
        return "  ".join([left, *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:]))])

    note = "* the task's main metric, which compare.py, runs.py and Delta_MTL take"
    return "\n".join([line(rows[0]), "-" * len(line(rows[0])), *map(line, rows[1:]), note])


def shown(task: Task, metric: str, value: float) -> str:
    """A metric's value with its unit; "-" where nothing valid was seen."""
    unit = task.units.get(metric, "%")
    if math.isnan(value):
        return "-"
    if metric in COUNTS:
        return f"{value:.0f} {COUNTS[metric]}"
    return f"{value * 100:.2f} %" if unit == "%" else f"{value:.4f} {unit}".rstrip()


def run_facts(
    config: DictConfig, reader: Reader, num_images: int, device: torch.device, overrides: Sequence[str]
) -> dict[str, Any]:
    """``run.json``: what one needs to know to trust, or repeat, the numbers in ``metrics.json``."""
    commit, clean = _commit()
    height, width = config.data.size
    return {
        "command": shlex.join(sys.argv),
        "overrides": list(overrides),
        "commit": commit,
        "clean": clean,
        "versions": {"python": platform.python_version(), "mtcl": mtcl.__version__, **_versions()},
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
            ["git", *words], cwd=Path(mtcl.__file__).parent, capture_output=True, encoding="utf-8", check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), git("status", "--porcelain") == ""
    except (OSError, subprocess.CalledProcessError):
        return None, None
