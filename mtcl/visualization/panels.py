"""Draw a sample's image, labels, predictions and errors as tiles with legends of their colours."""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import torch

from mtcl.evaluation.evaluator import VisualSample
from mtcl.tasks.base import Task
from mtcl.tasks.palette import VOID_COLOUR
from mtcl.visualization.panel_format import TILE_KINDS

Colour = tuple[int, int, int]
TEXT_COLOUR: Colour = (32, 32, 36)
BACKGROUND_COLOUR: Colour = (255, 255, 255)
FONT = cv2.FONT_HERSHEY_SIMPLEX
GAP = 8
LINE_HEIGHT = 18  # height of a line of text
CAPTION_HEIGHT = LINE_HEIGHT + 4
MIN_HEIGHT = 192
CORRECT_COLOUR: Colour = (245, 243, 238)  # of an error map; in between, darker is worse
WRONG_COLOUR: Colour = (178, 40, 16)
MAX_TILE_SIDE, MIN_TILE_WIDTH, TILES_PER_ROW = 640, 128, 4  # without labels


def draw_panel(sample: VisualSample, tasks: Mapping[str, Task]) -> np.ndarray:
    """Draw a sample: its image, then a column per task with label, prediction, error and the legend below.

    Small images are enlarged by an integer factor, nearest, to at least :data:`MIN_HEIGHT` pixels.

    Returns:
        uint8 RGB.
    """
    zoom = _compute_zoom(sample)
    image = _enlarge(sample.image, zoom)
    columns = [
        np.concatenate([_draw_caption("image", image.shape[1]), image, _draw_caption(sample.id, image.shape[1])])
    ]
    for name, task in tasks.items():
        label, prediction = sample.labels[name], sample.predictions[name]
        tiles = (
            task.draw(label),
            task.draw(task.to_drawable(prediction)),
            draw_error(error_map(task, label, prediction)),
        )
        captioned = {f"{name}: {kind}": _enlarge(tile, zoom) for kind, tile in zip(TILE_KINDS, tiles)}
        columns.append(_draw_column(captioned, _list_legend(sample, name, task)))
    height = max(column.shape[0] for column in columns)
    padded = [
        cv2.copyMakeBorder(c, GAP, GAP + height - c.shape[0], GAP, GAP, cv2.BORDER_CONSTANT, value=BACKGROUND_COLOUR)
        for c in columns
    ]
    return np.concatenate(padded, axis=1)


def draw_predictions(
    image: np.ndarray, predictions: Mapping[str, np.ndarray], tasks: Mapping[str, Task], legends: bool = True
) -> np.ndarray:
    """Draw an image and a tile per task, without labels, in rows of up to :data:`TILES_PER_ROW`.

    Tiles are at most :data:`MAX_TILE_SIDE` pixels wide or high. Without legends, the size of the result depends only on
    the size of the image and the number of tasks.

    Args:
        image: uint8 RGB.
        predictions: in label layout.
        tasks: at least those of the predictions.
        legends: draw the legends of the tasks' colours.

    Returns:
        uint8 RGB.
    """
    zoom = max(1, min(-(-MIN_HEIGHT // image.shape[0]), MAX_TILE_SIDE // max(image.shape[:2])))
    factor = min(1.0, MAX_TILE_SIDE / (zoom * max(image.shape[:2])))
    drawable = {name: tasks[name].to_drawable(array) for name, array in predictions.items()}
    images = {"image": image, **{name: tasks[name].draw(array) for name, array in drawable.items()}}
    columns = []
    for name, full in images.items():
        tile = _pad(_shrink(_enlarge(full, zoom), factor), width=MIN_TILE_WIDTH)
        rows = tasks[name].legend([drawable[name]]) if legends and name in drawable else []
        columns.append(_draw_column({name: tile}, rows))
    per_row = -(-len(columns) // -(-len(columns) // TILES_PER_ROW))  # rows of about equal length
    lines = []
    for i in range(0, len(columns), per_row):
        row = columns[i : i + per_row]
        height = max(column.shape[0] for column in row)
        equal = [_pad(column, height=height) for column in row]
        framed = [
            cv2.copyMakeBorder(c, GAP, GAP, GAP, GAP, cv2.BORDER_CONSTANT, value=BACKGROUND_COLOUR) for c in equal
        ]
        lines.append(np.concatenate(framed, axis=1))
    return np.concatenate([_pad(line, width=lines[0].shape[1]) for line in lines])


def panel_layout(sample: VisualSample, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Return the positions of the tiles that :func:`draw_panel` draws, so that a reader can crop them.

    Returns:
        Plain containers: ``id``; ``zoom``; ``size``: (height, width) of each tile in the panel; ``tiles``: ``image`` or
        ``task/kind`` -> (top, left); ``legends``: task -> rows of text and colour.
    """
    zoom = _compute_zoom(sample)
    height, width = (zoom * length for length in sample.image.shape[:2])
    tiles = {"image": (GAP + CAPTION_HEIGHT, GAP)}
    for column, name in enumerate(tasks, start=1):
        for row, kind in enumerate(TILE_KINDS):
            tiles[f"{name}/{kind}"] = (
                GAP + CAPTION_HEIGHT + row * (height + CAPTION_HEIGHT),
                GAP + column * (width + 2 * GAP),
            )
    legends = {name: _list_legend(sample, name, task) for name, task in tasks.items()}
    return {"id": sample.id, "zoom": zoom, "size": (height, width), "tiles": tiles, "legends": legends}


def error_map(task: Task, label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Compute the error of each pixel as the regulariser's distance between prediction and label.

    Args:
        task: defines the distance, that of ``task.embed_label``.
        label: in label layout, as in :class:`VisualSample`.
        prediction: in label layout.

    Returns:
        float32 (H, W): 0 where equal, 1 at ``task.negative_threshold`` or farther, NaN where void.
    """

    def embed(array: np.ndarray) -> torch.Tensor:  # (H, W, 3)
        return task.embed_label(torch.from_numpy(array if array.ndim == 3 else array[..., None]))

    collated = task.collate(label.transpose(2, 0, 1)[None] if label.ndim == 3 else label[None])
    distance = (embed(prediction) - embed(label)).norm(dim=-1) / task.embedded_distance(task.negative_threshold)
    distance = distance.nan_to_num(nan=1.0).clamp(0, 1)  # a prediction that is not finite gets the largest error
    return torch.where(task.valid(collated)[0], distance, torch.nan).numpy()


def draw_error(error: np.ndarray) -> np.ndarray:
    """Draw an :func:`error_map` as uint8 RGB (H, W, 3): from :data:`CORRECT_COLOUR` to :data:`WRONG_COLOUR`."""
    right, wrong = np.array(CORRECT_COLOUR, np.float32), np.array(WRONG_COLOUR, np.float32)
    colours = right + np.nan_to_num(error)[..., None] * (wrong - right)
    return np.where(np.isnan(error)[..., None], np.array(VOID_COLOUR), np.round(colours)).astype(np.uint8)


def _list_legend(sample: VisualSample, name: str, task: Task) -> list[tuple[str, Colour]]:
    rows = task.legend([sample.labels[name], task.to_drawable(sample.predictions[name])])
    return [*rows, ("error: none", CORRECT_COLOUR), (f"error: {task.error_label}", WRONG_COLOUR)]


def _compute_zoom(sample: VisualSample) -> int:
    return max(1, -(-MIN_HEIGHT // sample.image.shape[0]))


def _enlarge(image: np.ndarray, zoom: int) -> np.ndarray:
    return image.repeat(zoom, axis=0).repeat(zoom, axis=1) if zoom > 1 else image


def _shrink(image: np.ndarray, factor: float) -> np.ndarray:
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA) if factor < 1 else image


def _pad(image: np.ndarray, height: int = 0, width: int = 0) -> np.ndarray:
    """Pad with the background, below and to the right, to at least this size."""
    below, right = max(0, height - image.shape[0]), max(0, width - image.shape[1])
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=BACKGROUND_COLOUR)


def _draw_column(captioned: Mapping[str, np.ndarray], legend: list[tuple[str, Colour]]) -> np.ndarray:
    parts = []
    for caption, tile in captioned.items():
        parts += [_draw_caption(caption, tile.shape[1]), tile]
    return np.concatenate([*parts, _draw_legend(legend, parts[0].shape[1])])


def _draw_caption(text: str, width: int) -> np.ndarray:
    strip = np.full((CAPTION_HEIGHT, width, 3), 255, np.uint8)
    cv2.putText(strip, text, (0, LINE_HEIGHT - 4), FONT, 0.45, TEXT_COLOUR, 1, cv2.LINE_AA)
    return strip


def _draw_legend(rows: list[tuple[str, Colour]], width: int) -> np.ndarray:
    """Draw colour swatches with their text, in as many columns as fit."""
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
