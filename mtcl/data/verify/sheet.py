"""A contact sheet: some images with all their labels, drawn by the tasks, for visual inspection."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from mtcl.data.datasets.base import IMAGE
from mtcl.data.prepare.jobs import write_image
from mtcl.data.verify.lists import VerifiedList
from mtcl.errors import UserError
from mtcl.tasks.base import Task

WIDTH, HEIGHT = 240, 180  # most pixels of a cell
GAP, LINE = 8, 17
PAPER, INK, GREY = 255, (32, 32, 36), (150, 150, 150)
FONT = cv2.FONT_HERSHEY_SIMPLEX
COUNT = 6


def write_sheet(path: Path, lists: Sequence[VerifiedList], tasks: Mapping[str, Task], title: str) -> None:
    """Write a PNG: a row for each of COUNT images, evenly from the lists; columns image and tasks; legends below."""
    selection = _choose(lists)
    rows: list[np.ndarray] = []
    shown: dict[str, list[np.ndarray]] = {name: [] for name in tasks}
    for verified, name in selection:
        cells = [_cell(_read(verified, IMAGE, name))]
        for task_name, task in tasks.items():
            label = _read(verified, task_name, name)
            if label is not None:
                label = task.finalize_label(label)
                shown[task_name].append(label)
            cells.append(_cell(None if label is None else task.draw(label)))
        rows += [_text_row([f"{verified.name} {name}"], len(tasks) + 1), np.concatenate(cells, axis=1)]
    heads = _text_row(["image", *tasks], len(tasks) + 1, scale=0.55)
    legends = [_legend([])] + [_legend(task.legend(shown[name])) for name, task in tasks.items()]
    height = max(legend.shape[0] for legend in legends)
    foot = np.concatenate([_pad(legend, height, legend.shape[1]) for legend in legends], axis=1)
    sheet = np.concatenate([_text_row([title], len(tasks) + 1), heads, *rows, foot])
    write_image(path, cv2.copyMakeBorder(sheet, GAP, GAP, GAP, GAP, cv2.BORDER_CONSTANT, value=(PAPER,) * 3))


def _choose(lists: Sequence[VerifiedList]) -> list[tuple[VerifiedList, str]]:
    """Choose COUNT images, as many of each list, evenly spread over it; prefer those with every file."""
    chosen = []
    for number, verified in enumerate(lists):
        names = [
            name for name in verified.ids if all(name in ids for ids in verified.files.values() if ids)
        ] or verified.ids
        count = min(COUNT // len(lists) + (number < COUNT % len(lists)), len(names))
        chosen += [(verified, names[(2 * i + 1) * len(names) // (2 * count)]) for i in range(count)]
    return chosen


def _read(verified: VerifiedList, kind: str, name: str) -> np.ndarray | None:
    """Decode an array; None if it is missing or damaged."""
    if name not in verified.files[kind]:
        return None
    try:
        return verified.dataset.decode(kind, name)
    except UserError:
        return None  # the table says so


def _cell(image: np.ndarray | None) -> np.ndarray:
    """Draw an image in a cell: shrunk (means) or enlarged (nearest); crossed out if there is none."""
    if image is None:
        blank = np.full((HEIGHT, WIDTH, 3), PAPER, np.uint8)
        cv2.line(blank, (0, 0), (WIDTH, HEIGHT), GREY, 1, cv2.LINE_AA)
        cv2.putText(blank, "none", (WIDTH // 2 - 20, HEIGHT // 2), FONT, 0.5, INK, 1, cv2.LINE_AA)
        return _pad(blank, HEIGHT + GAP, WIDTH + GAP)
    scale = min(WIDTH / image.shape[1], HEIGHT / image.shape[0])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    fitting = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    return _pad(fitting, HEIGHT + GAP, WIDTH + GAP)


def _pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pad an image to the right and below."""
    below, right = height - image.shape[0], width - image.shape[1]
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=(PAPER,) * 3)


def _text_row(texts: Sequence[str], columns: int, scale: float = 0.45) -> np.ndarray:
    """Draw a row of texts, one per column."""
    strip = np.full((LINE + 6, columns * (WIDTH + GAP), 3), PAPER, np.uint8)
    for column, text in enumerate(texts):
        cv2.putText(strip, text, (column * (WIDTH + GAP), LINE), FONT, scale, INK, 1, cv2.LINE_AA)
    return strip


def _legend(rows: Sequence[tuple[str, tuple[int, int, int]]]) -> np.ndarray:
    """Draw swatches with their texts, two in a line."""
    lines = -(-len(rows) // 2)
    strip = np.full((GAP + lines * LINE, WIDTH + GAP, 3), PAPER, np.uint8)
    for i, (text, colour) in enumerate(rows):
        x, y = (i % 2) * WIDTH // 2, GAP + (i // 2) * LINE
        cv2.rectangle(strip, (x, y), (x + 11, y + 11), colour, -1)
        cv2.rectangle(strip, (x, y), (x + 11, y + 11), INK, 1)
        cv2.putText(strip, text, (x + 17, y + 10), FONT, 0.38, INK, 1, cv2.LINE_AA)
    return strip
