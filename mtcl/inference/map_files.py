"""Predictions as files that other programs read."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mtcl.atomic import write_atomically
from mtcl.metrics.boundaries.suppression import SAK, nms
from mtcl.tasks.base import Task

DEPTH_UNIT = 0.001  # metres of a step of a depth file


def coloured(task: Task, array: np.ndarray) -> Image.Image:
    """Classes as numbers; a palette shows them in the task's colours."""
    image = Image.fromarray(array)
    image.putpalette(task.draw(np.arange(256, dtype=np.uint8)[None]).tobytes())
    return image


def millimetres(task: Task, array: np.ndarray) -> Image.Image:
    """16 bits; what is beyond 65.535 m is that, what is no number is 0."""
    steps = np.nan_to_num(array / DEPTH_UNIT, nan=0, posinf=65535, neginf=0)
    return Image.fromarray(np.round(steps).clip(0, 65535).astype(np.uint16))


def directions(task: Task, array: np.ndarray) -> Image.Image:
    """v stands for 2 v / 255 - 1."""
    return Image.fromarray(np.round(255 * (np.nan_to_num(array) + 1) / 2).clip(0, 255).astype(np.uint8))


def thin_lines(task: Task, array: np.ndarray) -> Image.Image:
    """255 times the smoothed probability, where it is largest across the edge's direction; 0 elsewhere."""
    thinned = nms(np.nan_to_num(array), SAK.smoothing, SAK.radius)
    return Image.fromarray(np.round(255 * thinned).clip(0, 255).astype(np.uint8))


FILES: dict[str, Callable[[Task, np.ndarray], Image.Image]] = {
    "class": coloured,
    "metres": millimetres,
    "direction": directions,
    "probability": thin_lines,
}


MEANINGS: dict[str, dict[str, object]] = {
    "metres": {"metres_per_step": DEPTH_UNIT},
    "direction": {"value": "2 v / 255 - 1", "axes": ["left", "up", "to the viewer"]},
    "probability": {"value": "v / 255"},
}


def describe_values(task: Task) -> dict[str, object]:
    """Describe what the values of a task's files stand for."""
    return (
        {"classes": list(getattr(task, "classes", ()))}
        if task.prediction_type == "class"
        else MEANINGS[task.prediction_type]
    )


def write_map(path: Path, task: Task, array: np.ndarray) -> None:
    """One task's map (label layout) as a PNG."""
    image = FILES[task.prediction_type](task, array)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", compress_level=3), durable=False)


def write_jpeg(path: Path, picture: np.ndarray, quality: int = 92) -> None:
    """uint8 RGB (H, W, 3)."""
    done, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise OSError(f"{path} could not be encoded")
    write_atomically(path, lambda temporary: temporary.write_bytes(data.tobytes()), durable=False)
