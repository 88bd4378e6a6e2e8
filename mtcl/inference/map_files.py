"""Write predictions as image files that other programs can read."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mtcl.atomic import write_atomically
from mtcl.metrics.boundaries.suppression import SAK, nms
from mtcl.tasks.base import Task

DEPTH_UNIT = 0.001  # metres per step of a depth file
INVERSE_DEPTH_UNIT = 1 / 65535  # of the labels' unit per step


def encode_classes(task: Task, array: np.ndarray) -> Image.Image:
    """Encode classes as indices into a palette of the task's colours."""
    image = Image.fromarray(array)
    image.putpalette(task.draw(np.arange(256, dtype=np.uint8)[None]).tobytes())
    return image


def encode_depth(_task: Task, array: np.ndarray) -> Image.Image:
    """Encode metres as 16-bit millimetres, at most 65.535 m; NaN becomes 0."""
    steps = np.nan_to_num(array / DEPTH_UNIT, nan=0, posinf=65535, neginf=0)
    return Image.fromarray(np.round(steps).clip(0, 65535).astype(np.uint16))


def encode_inverse_depth(_task: Task, array: np.ndarray) -> Image.Image:
    """Encode inverse depth 0..1 in 65,535 steps of 16 bits; NaN becomes 0."""
    steps = np.nan_to_num(array / INVERSE_DEPTH_UNIT, nan=0, posinf=65535, neginf=0)
    return Image.fromarray(np.round(steps).clip(0, 65535).astype(np.uint16))


def encode_normals(_task: Task, array: np.ndarray) -> Image.Image:
    """Encode unit vectors x as v = 255 (x + 1) / 2."""
    return Image.fromarray(np.round(255 * (np.nan_to_num(array) + 1) / 2).clip(0, 255).astype(np.uint8))


def encode_edges(_task: Task, array: np.ndarray) -> Image.Image:
    """Encode the smoothed probability times 255 after non-maximum suppression; 0 elsewhere."""
    suppressed = nms(np.nan_to_num(array), SAK.smoothing, SAK.radius)
    return Image.fromarray(np.round(255 * suppressed).clip(0, 255).astype(np.uint8))


ENCODERS: dict[str, Callable[[Task, np.ndarray], Image.Image]] = {
    "class": encode_classes,
    "metres": encode_depth,
    "inverse_depth": encode_inverse_depth,
    "direction": encode_normals,
    "probability": encode_edges,
}

VALUE_DESCRIPTIONS: dict[str, dict[str, object]] = {
    "metres": {"metres_per_step": DEPTH_UNIT},
    "inverse_depth": {"inverse_depth_per_step": INVERSE_DEPTH_UNIT},
    "direction": {"value": "2 v / 255 - 1", "axes": ["left", "up", "to the viewer"]},
    "probability": {"value": "v / 255"},
}


def describe_values(task: Task) -> dict[str, object]:
    """Describe the values in a task's files, for a JSON file beside them."""
    return (
        {"classes": list(getattr(task, "classes", ()))}
        if task.prediction_type == "class"
        else VALUE_DESCRIPTIONS[task.prediction_type]
    )


def write_map(path: Path, task: Task, array: np.ndarray) -> None:
    """Write one task's map, in label layout, as a PNG."""
    image = ENCODERS[task.prediction_type](task, array)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", compress_level=3), durable=False)


def write_jpeg(path: Path, image: np.ndarray, quality: int = 92) -> None:
    """Write an image uint8 RGB (H, W, 3)."""
    success, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not success:
        raise OSError(f"{path} could not be encoded")
    write_atomically(path, lambda temporary: temporary.write_bytes(data.tobytes()), durable=False)
