"""Pictures people look at: a sample, its labels, predictions and errors, each with the legend of its colours."""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import torch

from mtcl.evaluation.evaluator import VisualSample
from mtcl.tasks.base import Task
from mtcl.tasks.palette import VOID_COLOUR

Colour = tuple[int, int, int]
TEXT_COLOUR: Colour = (32, 32, 36)
BACKGROUND_COLOUR: Colour = (255, 255, 255)
FONT = cv2.FONT_HERSHEY_SIMPLEX
GAP = 8
LINE_HEIGHT = 18  # height of a line of text
CAPTION_HEIGHT = LINE_HEIGHT + 4
MIN_HEIGHT = 192
CORRECT_COLOUR: Colour = (245, 243, 238)  # of an error map; in between, the darker the farther off
WRONG_COLOUR: Colour = (178, 40, 16)
MAX_TILE_SIDE, MIN_TILE_WIDTH, TILES_PER_ROW = 640, 128, 4  # of pictures without labels
TILE_KINDS = ("label", "prediction", "error")


def draw_panel(sample: VisualSample, tasks: Mapping[str, Task]) -> np.ndarray:
    """uint8 RGB picture: the image, then a column per task: label, prediction, error, and the legend below.

    Small pictures are enlarged by a whole factor, nearest, to at least :data:`MIN_HEIGHT` pixels.
    """
    zoom = _zoom(sample)
    image = _enlarge(sample.image, zoom)
    columns = [np.concatenate([_caption("image", image.shape[1]), image, _caption(sample.id, image.shape[1])])]
    for name, task in tasks.items():
        label, prediction = sample.labels[name], sample.predictions[name]
        pictures = (
            task.draw(label),
            task.draw(task.to_drawable(prediction)),
            draw_error(error_map(task, label, prediction)),
        )
        captioned = {f"{name}: {kind}": _enlarge(picture, zoom) for kind, picture in zip(TILE_KINDS, pictures)}
        columns.append(_column(captioned, _legend_of(sample, name, task)))
    height = max(column.shape[0] for column in columns)
    padded = [
        cv2.copyMakeBorder(c, GAP, GAP + height - c.shape[0], GAP, GAP, cv2.BORDER_CONSTANT, value=BACKGROUND_COLOUR)
        for c in columns
    ]
    return np.concatenate(padded, axis=1)


def draw_predictions(
    image: np.ndarray, predictions: Mapping[str, np.ndarray], tasks: Mapping[str, Task], legends: bool = True
) -> np.ndarray:
    """Draw the image and a tile per task (predictions in label layout), up to four a row: uint8 RGB.

    Tiles are at most :data:`MAX_TILE_SIDE` pixels wide or high.
    Without ``legends`` the size depends on the image alone.
    """
    zoom = max(1, min(-(-MIN_HEIGHT // image.shape[0]), MAX_TILE_SIDE // max(image.shape[:2])))
    factor = min(1.0, MAX_TILE_SIDE / (zoom * max(image.shape[:2])))
    shown = {name: tasks[name].to_drawable(array) for name, array in predictions.items()}
    pictures = {"image": image, **{name: tasks[name].draw(array) for name, array in shown.items()}}
    columns = []
    for name, picture in pictures.items():
        tile = _bordered(_shrunk(_enlarge(picture, zoom), factor), width=MIN_TILE_WIDTH)
        rows = tasks[name].legend([shown[name]]) if legends and name in shown else []
        columns.append(_column({name: tile}, rows))
    per_row = -(-len(columns) // -(-len(columns) // TILES_PER_ROW))  # rows of about equal length
    lines = []
    for i in range(0, len(columns), per_row):
        row = columns[i : i + per_row]
        height = max(column.shape[0] for column in row)
        equal = [_bordered(column, height=height) for column in row]
        framed = [
            cv2.copyMakeBorder(c, GAP, GAP, GAP, GAP, cv2.BORDER_CONSTANT, value=BACKGROUND_COLOUR) for c in equal
        ]
        lines.append(np.concatenate(framed, axis=1))
    return np.concatenate([_bordered(line, width=lines[0].shape[1]) for line in lines])


def panel_layout(sample: VisualSample, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Where :func:`draw_panel` puts what, for who wants to cut it out again; plain containers.

    ``zoom``; ``size``: (height, width) of each tile in the panel; ``tiles``: ``image`` or ``task/kind`` -> (top, left);
    ``legends``: task -> rows of text and colour.
    """
    zoom = _zoom(sample)
    height, width = (zoom * length for length in sample.image.shape[:2])
    tiles = {"image": (GAP + CAPTION_HEIGHT, GAP)}
    for column, name in enumerate(tasks, start=1):
        for row, kind in enumerate(TILE_KINDS):
            tiles[f"{name}/{kind}"] = (
                GAP + CAPTION_HEIGHT + row * (height + CAPTION_HEIGHT),
                GAP + column * (width + 2 * GAP),
            )
    legends = {name: _legend_of(sample, name, task) for name, task in tasks.items()}
    return {"id": sample.id, "zoom": zoom, "size": (height, width), "tiles": tiles, "legends": legends}


def error_map(task: Task, label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """How far off each pixel is: float32 (H, W), 0 as its label, 1 ``task.far`` from it or farther, NaN where void.

    Both in label layout, as in :class:`VisualSample`. The distance is the regulariser's, in ``task.place``'s space.
    """

    def points(array: np.ndarray) -> torch.Tensor:  # (H, W, 3)
        return task.embed_label(torch.from_numpy(array if array.ndim == 3 else array[..., None]))

    collated = task.collate(label.transpose(2, 0, 1)[None] if label.ndim == 3 else label[None])
    distance = (points(prediction) - points(label)).norm(dim=-1) / task.embedded_distance(task.negative_threshold)
    distance = distance.nan_to_num(nan=1.0).clamp(0, 1)  # not finite is as wrong as can be
    return torch.where(task.valid(collated)[0], distance, torch.nan).numpy()


def draw_error(error: np.ndarray) -> np.ndarray:
    """uint8 RGB (H, W, 3) of an :func:`error_map`: from :data:`CORRECT_COLOUR` to :data:`WRONG_COLOUR`."""
    right, wrong = np.array(CORRECT_COLOUR, np.float32), np.array(WRONG_COLOUR, np.float32)
    colours = right + np.nan_to_num(error)[..., None] * (wrong - right)
    return np.where(np.isnan(error)[..., None], np.array(VOID_COLOUR), np.round(colours)).astype(np.uint8)


def _legend_of(sample: VisualSample, name: str, task: Task) -> list[tuple[str, Colour]]:
    rows = task.legend([sample.labels[name], task.to_drawable(sample.predictions[name])])
    return [*rows, ("error: none", CORRECT_COLOUR), (f"error: {task.error_label}", WRONG_COLOUR)]


def _zoom(sample: VisualSample) -> int:
    return max(1, -(-MIN_HEIGHT // sample.image.shape[0]))


def _enlarge(picture: np.ndarray, zoom: int) -> np.ndarray:
    return picture.repeat(zoom, axis=0).repeat(zoom, axis=1) if zoom > 1 else picture


def _shrunk(picture: np.ndarray, factor: float) -> np.ndarray:
    height, width = (max(1, round(side * factor)) for side in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA) if factor < 1 else picture


def _bordered(picture: np.ndarray, height: int = 0, width: int = 0) -> np.ndarray:
    """Paper below and to the right of it, up to that size at least."""
    below, right = max(0, height - picture.shape[0]), max(0, width - picture.shape[1])
    return cv2.copyMakeBorder(picture, 0, below, 0, right, cv2.BORDER_CONSTANT, value=BACKGROUND_COLOUR)


def _column(captioned: Mapping[str, np.ndarray], legend: list[tuple[str, Colour]]) -> np.ndarray:
    parts = []
    for caption, picture in captioned.items():
        parts += [_caption(caption, picture.shape[1]), picture]
    return np.concatenate([*parts, _legend(legend, parts[0].shape[1])])


def _caption(text: str, width: int) -> np.ndarray:
    strip = np.full((CAPTION_HEIGHT, width, 3), 255, np.uint8)
    cv2.putText(strip, text, (0, LINE_HEIGHT - 4), FONT, 0.45, TEXT_COLOUR, 1, cv2.LINE_AA)
    return strip


def _legend(rows: list[tuple[str, Colour]], width: int) -> np.ndarray:
    """Colour swatches with their text, in as many columns as fit."""
    if not rows:
        return np.full((1, width, 3), 255, np.uint8)
    longest = max(cv2.getTextSize(text, FONT, 0.4, 1)[0][0] for text, _ in rows)
    per_line = max(1, width // (longest + 22))
    lines = -(-len(rows) // per_line)
    canvas = np.full((GAP + lines * LINE_HEIGHT, width, 3), 255, np.uint8)
    for i, (text, colour) in enumerate(rows):
        x, y = (i % per_line) * (width // per_line), GAP + (i // per_line) * LINE_HEIGHT
        cv2.rectangle(canvas, (x, y), (x + 12, y + 12), colour, -1)
        cv2.rectangle(canvas, (x, y), (x + 12, y + 12), TEXT_COLOUR, 1)
        cv2.putText(canvas, text, (x + 17, y + 10), FONT, 0.4, TEXT_COLOUR, 1, cv2.LINE_AA)
    return canvas


LAYOUT_KEY = "mtcl-layout"  # the name of a panel's text that holds its panel_layout
