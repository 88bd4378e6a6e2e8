"""Pictures people look at: a sample's image, its labels and predictions, each with the legend of its colours."""

from collections.abc import Mapping

import cv2
import numpy as np

from mtcl.tasks.base import Task
from mtcl.training.evaluator import Shown

Colour = tuple[int, int, int]
INK: Colour = (32, 32, 36)
PAPER: Colour = (255, 255, 255)
FONT = cv2.FONT_HERSHEY_SIMPLEX
GAP = 8
ROW = 18  # height of a line of text


def draw_panel(sample: Shown, tasks: Mapping[str, Task], min_height: int = 192) -> np.ndarray:
    """uint8 RGB picture: the image, then a column per task with label above prediction and the legend below.

    Small pictures are enlarged by a whole factor, nearest, to at least ``min_height`` pixels.
    """
    zoom = max(1, -(-min_height // sample.image.shape[0]))
    image = _enlarge(sample.image, zoom)
    columns = [np.concatenate([_caption("image", image.shape[1]), image, _caption(sample.id, image.shape[1])])]
    for name, task in tasks.items():
        label, prediction = sample.labels[name], sample.predictions[name]
        columns.append(
            _column(
                _enlarge(task.draw(label), zoom),
                _enlarge(task.draw(prediction), zoom),
                task.legend([label, prediction]),
                captions=(f"{name}: label", f"{name}: prediction"),
            )
        )
    height = max(column.shape[0] for column in columns)
    padded = [
        cv2.copyMakeBorder(c, GAP, GAP + height - c.shape[0], GAP, GAP, cv2.BORDER_CONSTANT, value=PAPER)
        for c in columns
    ]
    return np.concatenate(padded, axis=1)


def _enlarge(picture: np.ndarray, zoom: int) -> np.ndarray:
    return picture.repeat(zoom, axis=0).repeat(zoom, axis=1) if zoom > 1 else picture


def _column(
    above: np.ndarray,
    below: np.ndarray,
    legend: list[tuple[str, Colour]],
    captions: tuple[str, str],
) -> np.ndarray:
    width = above.shape[1]
    parts = [_caption(captions[0], width), above, _caption(captions[1], width), below, _legend(legend, width)]
    return np.concatenate(parts)


def _caption(text: str, width: int) -> np.ndarray:
    strip = np.full((ROW + 4, width, 3), 255, np.uint8)
    cv2.putText(strip, text, (0, ROW - 4), FONT, 0.45, INK, 1, cv2.LINE_AA)
    return strip


def _legend(rows: list[tuple[str, Colour]], width: int) -> np.ndarray:
    """Colour swatches with their text, in as many columns as fit."""
    if not rows:
        return np.full((1, width, 3), 255, np.uint8)
    longest = max(cv2.getTextSize(text, FONT, 0.4, 1)[0][0] for text, _ in rows)
    per_line = max(1, width // (longest + 22))
    lines = -(-len(rows) // per_line)
    canvas = np.full((GAP + lines * ROW, width, 3), 255, np.uint8)
    for i, (text, colour) in enumerate(rows):
        x, y = (i % per_line) * (width // per_line), GAP + (i // per_line) * ROW
        cv2.rectangle(canvas, (x, y), (x + 12, y + 12), colour, -1)
        cv2.rectangle(canvas, (x, y), (x + 12, y + 12), INK, 1)
        cv2.putText(canvas, text, (x + 17, y + 10), FONT, 0.4, INK, 1, cv2.LINE_AA)
    return canvas
