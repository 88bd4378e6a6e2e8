"""What the page shows for a picture: a tile per task with its legend and what can be read off it, as HTML.

What comes from a file or a checkpoint (names of files, of classes) goes through :func:`esc`.
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

from mtcl.cli.predict import is_out_of_memory
from mtcl.data.datasets.rooms.render import render
from mtcl.errors import UserError, escape_control_characters
from mtcl.inference import Predictor
from mtcl.tasks.base import Task

WIDEST = 800  # pixels of a tile, the longer side
DEEPEST = 65535  # millimetres: that or more
EXAMPLE = 3  # the seed of the example's room
TITLES = {
    "semseg": "Classes",
    "human_parts": "Human parts",
    "sal": "Saliency",
    "edge": "Edges",
    "normals": "Surface normals",
    "depth": "Depth",
}
log = logging.getLogger(__name__)


class Named(NamedTuple):
    """A model, and what the page calls it."""

    name: str
    predictor: Predictor


def answer(models: Sequence[Named], path: Path) -> str:
    """All tasks of all models for an uploaded file, or a sentence that says why not. The file is gone afterwards."""
    try:
        picture = models[0].predictor.read_image(path)
    except UserError as error:
        if not path.exists():  # Gradio keeps equal files once
            return fault(f"{path.name} is gone: it has just been predicted for another page; choose it again")
        return fault(str(error).replace(f"{path.parent}/", ""))
    finally:
        path.unlink(missing_ok=True)
    return answer_image(models, picture, path.name)


def answer_image(models: Sequence[Named], picture: np.ndarray, name: str) -> str:
    """All tasks of all models for an image uint8 RGB (H, W, 3), or a sentence that says why not."""
    height, width = picture.shape[:2]
    began = time.perf_counter()
    try:
        found = [model.predictor(picture) for model in models]
    except UserError as error:
        return fault(str(error))
    except Exception as error:
        if is_out_of_memory(error):
            where = models[0].predictor.device
            return fault(f"{name} has too many pixels for the memory of {where}; make it smaller")
        log.exception("%s could not be predicted", escape_control_characters(name))
        return fault(f"{name} could not be predicted; the terminal that runs this page says why")
    seconds = time.perf_counter() - began
    return results(models, picture, found, f"{name}, {width} x {height} pixels, {seconds:.2f} s")


def example_image(size: tuple[int, int]) -> np.ndarray:
    """Render a room of the procedural dataset in about the frame that a model was trained in: uint8 RGB (H, W, 3)."""
    factor = min(1.0, WIDEST / max(size))
    height, width = (max(32, round(side * factor)) for side in size)
    return render(EXAMPLE, 0, height, width)["image"]


def results(models: Sequence[Named], picture: np.ndarray, found: Sequence[Mapping[str, np.ndarray]], about: str) -> str:
    """Tiles of one model flow; those of several stand in columns beside the picture, a row per task."""
    several = len(models) > 1
    parts = [tile("Picture", picture_element(picture))]
    parts += [f'<p class="model">{esc(model.name)}</p>' for model in models if several]
    for name in found[0]:
        for model, maps in zip(models, found):
            parts.append(task_tile(model.predictor.tasks[name], maps[name], model.name if several else ""))
    hint = "Point at a tile (or touch it, or use its arrow keys): every tile tells its value at that place."
    side = f' class="tiles side" style="--columns: {len(models)}; --rows: {len(found[0]) + 1}"'
    layout = side if several else ' class="tiles"'
    return f'<p class="about">{esc(about)}. <span>{hint}</span></p><div{layout}>{"".join(parts)}</div>'


def fault(message: str) -> str:
    return f'<p class="fault" role="alert">{esc(message)}</p>'


def picture_element(picture: np.ndarray) -> str:
    height, width = picture.shape[:2]
    factor = min(1.0, WIDEST / max(height, width))
    small = cv2.resize(picture, _size(picture, factor), interpolation=cv2.INTER_AREA) if factor < 1 else picture
    return image(small, "the picture", ".jpg", "image/jpeg")


def task_tile(task: Task, array: np.ndarray, model: str) -> str:
    """``array``: in label layout, of the picture's size. What is seen and what is read are the same pixels of it."""
    small = array
    if max(array.shape[:2]) > WIDEST:
        size = _size(array, WIDEST / max(array.shape[:2]))
        small = cv2.resize(array, size, interpolation=cv2.INTER_NEAREST)
    drawn = task.to_drawable(small)
    title = TITLES.get(task.name, task.name)
    alt = f"{title.lower()}, predicted" + f" by {model}" * bool(model)
    rows = "".join(
        f'<li><i style="background: rgb{colour}"></i>{esc(text)}</li>' for text, colour in task.legend([drawn])
    )
    legend = f'<ul class="key">{rows}</ul>' if rows else ""
    return tile(title, image(task.draw(drawn), alt, ".png", "image/png"), legend, reading(task, small))


def tile(title: str, element: str, legend: str = "", values: Mapping[str, Any] | None = None) -> str:
    data = f" data-values='{esc(json.dumps(values))}'" if values else ""
    return f'<figure class="tile"{data}><figcaption>{esc(title)}</figcaption>{element}{legend}</figure>'


def image(picture: np.ndarray, alt: str, suffix: str, kind: str) -> str:
    """uint8 RGB (H, W, 3), embedded. The frame keeps its proportions and may be pointed at."""
    done, data = cv2.imencode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    if not done:
        raise RuntimeError(f"OpenCV can't write {suffix}")
    height, width = picture.shape[:2]
    source = f"data:{kind};base64,{base64.b64encode(data.tobytes()).decode()}"
    return (
        f'<div class="frame" tabindex="0" style="--ratio: {width / height:.4f}"><img src="{source}" alt="{esc(alt)}" '
        f'width="{width}" height="{height}" draggable="false"><output aria-live="off"></output></div>'
    )


# What a pixel's value is, as whole numbers that the page puts into words (demo.js)


def classes(task: Task, array: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    return array, {"kind": "class", "names": list(getattr(task, "classes", ()))}


def metres(task: Task, array: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Millimetres from 1 on; 0 where it is no number."""
    steps = np.round(np.nan_to_num(1000 * array, nan=0, posinf=0, neginf=0)).clip(1, DEEPEST)
    return np.where(np.isfinite(array), steps, 0).astype("<u2"), {"kind": "metres"}


def percent(task: Task, array: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    return np.round(100 * array).clip(0, 100).astype(np.uint8), {"kind": "percent"}


def directions(task: Task, array: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Each axis in hundredths, 100 more than it is."""
    return np.round(100 * array + 100).clip(0, 200).astype(np.uint8), {"kind": "direction"}


READINGS: dict[str, Callable[[Task, np.ndarray], tuple[np.ndarray, dict[str, Any]]]] = {
    "class": classes,
    "metres": metres,
    "direction": directions,
    "probability": percent,
}


def reading(task: Task, array: np.ndarray) -> dict[str, Any]:
    """``data``: the values (H, W) or (H, W, 3), row by row, little-endian, deflated, base64."""
    values, facts = READINGS[task.prediction_type](task, array)
    data = base64.b64encode(zlib.compress(np.ascontiguousarray(values).tobytes(), 6)).decode()
    return {**facts, "size": [array.shape[1], array.shape[0]], "bytes": values.itemsize, "data": data}


def esc(text: object) -> str:
    return html.escape(str(text), quote=True)


def _size(array: np.ndarray, factor: float) -> tuple[int, int]:
    """(width, height) as OpenCV wants it."""
    height, width = (max(1, round(side * factor)) for side in array.shape[:2])
    return width, height
