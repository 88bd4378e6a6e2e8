"""HTML tiles of the page: one per task, with its legend and the values that the page shows under the pointer.

Names of files and classes, which come from files and checkpoints, go through :func:`escape`.
"""

import base64
import html
import json
import logging
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from mtcl.data.datasets.rooms.render import render
from mtcl.errors import UserError, escape_control_characters
from mtcl.inference import Predictor
from mtcl.runtime import is_out_of_memory
from mtcl.tasks.base import Task

MAX_TILE_SIDE = 800  # of a tile's image, in pixels
MAX_MILLIMETRES = 65535  # larger depths are shown as this
EXAMPLE_SEED = 3  # of the example's room
TITLES = {
    "semseg": "Classes",
    "human_parts": "Human parts",
    "sal": "Saliency",
    "edge": "Edges",
    "normals": "Surface normals",
    "depth": "Depth",
}
log = logging.getLogger(__name__)


class NamedPredictor(NamedTuple):
    """A predictor and its name on the page."""

    name: str
    predictor: Predictor


def render_file_prediction(models: Sequence[NamedPredictor], path: Path) -> str:
    """Predict an uploaded file and delete it; return the tiles, or a sentence that says why there are none."""
    try:
        image = models[0].predictor.read_image(path)
    except UserError as error:
        if not path.exists():  # Gradio stores equal files once
            return render_error(f"{path.name} is gone: it has just been predicted for another page; choose it again")
        return render_error(str(error).replace(f"{path.parent}/", ""))
    finally:
        path.unlink(missing_ok=True)
    return render_prediction(models, image, path.name)


def render_prediction(models: Sequence[NamedPredictor], image: np.ndarray, name: str) -> str:
    """Predict an image uint8 RGB (H, W, 3); return the tiles, or a sentence that says why there are none."""
    height, width = image.shape[:2]
    began = time.perf_counter()
    try:
        predictions = [model.predictor(image) for model in models]
    except UserError as error:
        return render_error(str(error))
    except Exception as error:
        if is_out_of_memory(error):
            device = models[0].predictor.device
            return render_error(f"{name} has too many pixels for the memory of {device}; make it smaller")
        log.exception("%s could not be predicted", escape_control_characters(name))
        return render_error(f"{name} could not be predicted; the terminal that runs this page says why")
    seconds = time.perf_counter() - began
    return render_results(models, image, predictions, f"{name}, {width} x {height} pixels, {seconds:.2f} s")


def render_example(size: tuple[int, int]) -> np.ndarray:
    """Render a room of the procedural dataset at about the training size of a model: uint8 RGB (H, W, 3)."""
    factor = min(1.0, MAX_TILE_SIDE / max(size))
    height, width = (max(32, round(side * factor)) for side in size)
    return render(EXAMPLE_SEED, 0, height, width)["image"]


def render_results(
    models: Sequence[NamedPredictor], image: np.ndarray, predictions: Sequence[Mapping[str, np.ndarray]], about: str
) -> str:
    """Return the tiles: of one model in a flow, of several in columns beside the image with a row per task."""
    several = len(models) > 1
    parts = [render_tile("Image", render_image(image))]
    parts += [f'<p class="model">{escape(model.name)}</p>' for model in models if several]
    for name in predictions[0]:
        for model, maps in zip(models, predictions):
            parts.append(render_task(model.predictor.tasks[name], maps[name], model.name if several else ""))
    hint = "Point at a tile (or touch it, or use its arrow keys): every tile shows its value at that pixel."
    side = f' class="tiles side" style="--columns: {len(models)}; --rows: {len(predictions[0]) + 1}"'
    layout = side if several else ' class="tiles"'
    return f'<p class="about">{escape(about)}. <span>{hint}</span></p><div{layout}>{"".join(parts)}</div>'


def render_error(message: str) -> str:
    """Return a message as HTML."""
    return f'<p class="fault" role="alert">{escape(message)}</p>'


def render_image(image: np.ndarray) -> str:
    """Return the input image as HTML."""
    height, width = image.shape[:2]
    factor = min(1.0, MAX_TILE_SIDE / max(height, width))
    small = cv2.resize(image, _size(image, factor), interpolation=cv2.INTER_AREA) if factor < 1 else image
    return embed_image(small, "the image", ".jpg", "image/jpeg")


def render_task(task: Task, array: np.ndarray, model: str) -> str:
    """Return the tile of a task.

    Args:
        task: decides how the map is drawn and what its values are.
        array: predicted map in label layout, of the image's size. The drawing and the values are of the same pixels.
        model: name of the model, if there are several.
    """
    small = array
    if max(array.shape[:2]) > MAX_TILE_SIDE:
        size = _size(array, MAX_TILE_SIDE / max(array.shape[:2]))
        small = cv2.resize(array, size, interpolation=cv2.INTER_NEAREST)
    drawn = task.to_drawable(small)
    title = TITLES.get(task.name, task.name)
    alt = f"{title.lower()}, predicted" + f" by {model}" * bool(model)
    rows = "".join(
        f'<li><i style="background: rgb{colour}"></i>{escape(text)}</li>' for text, colour in task.legend([drawn])
    )
    legend = f'<ul class="key">{rows}</ul>' if rows else ""
    return render_tile(
        title, embed_image(task.draw(drawn), alt, ".png", "image/png"), legend, encode_values(task, small)
    )


def render_tile(title: str, element: str, legend: str = "", values: Mapping[str, Any] | None = None) -> str:
    """Return a figure with a caption, and a legend and values if there are any."""
    data = f" data-values='{escape(json.dumps(values))}'" if values else ""
    return f'<figure class="tile"{data}><figcaption>{escape(title)}</figcaption>{element}{legend}</figure>'


def embed_image(image: np.ndarray, alt: str, suffix: str, kind: str) -> str:
    """Return an image uint8 RGB (H, W, 3), embedded in an element that keeps its proportions."""
    success, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not success:
        raise RuntimeError(f"OpenCV can't write {suffix}")
    height, width = image.shape[:2]
    source = f"data:{kind};base64,{base64.b64encode(data.tobytes()).decode()}"
    return (
        f'<div class="frame" tabindex="0" style="--ratio: {width / height:.4f}"><img src="{source}" alt="{escape(alt)}"'
        f' width="{width}" height="{height}" draggable="false"><output aria-live="off"></output></div>'
    )


# Values of pixels as integers, which demo.js formats


def encode_classes(task: Task, array: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the classes and their names."""
    return array, {"kind": "class", "names": list(getattr(task, "classes", ()))}


def encode_metres(_task: Task, array: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Return millimetres, at least 1; 0 for values that are not finite."""
    steps = np.round(np.nan_to_num(1000 * array, nan=0, posinf=0, neginf=0)).clip(1, MAX_MILLIMETRES)
    return np.where(np.isfinite(array), steps, 0).astype("<u2"), {"kind": "metres"}


def encode_inverse_depth(_task: Task, array: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Return inverse depth 0..1 in ten thousandths, at least 1; 0 for values that are not finite."""
    steps = np.round(np.nan_to_num(10000 * array, nan=0, posinf=0, neginf=0)).clip(1, 10000)
    return np.where(np.isfinite(array), steps, 0).astype("<u2"), {"kind": "inverse_depth"}


def encode_probability(_task: Task, array: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Return percent."""
    return np.round(100 * array).clip(0, 100).astype(np.uint8), {"kind": "percent"}


def encode_direction(_task: Task, array: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Return each axis in hundredths, plus 100."""
    return np.round(100 * array + 100).clip(0, 200).astype(np.uint8), {"kind": "direction"}


VALUE_ENCODERS: dict[str, Callable[[Task, np.ndarray], tuple[np.ndarray, dict[str, Any]]]] = {
    "class": encode_classes,
    "metres": encode_metres,
    "inverse_depth": encode_inverse_depth,
    "direction": encode_direction,
    "probability": encode_probability,
}


def encode_values(task: Task, array: np.ndarray) -> dict[str, Any]:
    """Return the values of a map for the page; ``data`` is row by row, little-endian, deflated, base64."""
    values, description = VALUE_ENCODERS[task.prediction_type](task, array)
    data = base64.b64encode(zlib.compress(np.ascontiguousarray(values).tobytes(), 6)).decode()
    return {**description, "size": [array.shape[1], array.shape[0]], "bytes": values.itemsize, "data": data}


def escape(text: object) -> str:
    """Escape a text for HTML."""
    return html.escape(str(text), quote=True)


def _size(array: np.ndarray, factor: float) -> tuple[int, int]:
    """Return the (width, height) of a resized array, as OpenCV takes it."""
    height, width = (max(1, round(side * factor)) for side in array.shape[:2])
    return width, height
