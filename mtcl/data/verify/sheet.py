"""A contact sheet: some pictures with all their labels, drawn by the tasks, for a person's eye."""

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


def write_sheet(path: Path, parts: Sequence[VerifiedList], tasks: Mapping[str, Task], title: str) -> None:
    """A PNG: a row for each of COUNT pictures, evenly from the lists; columns picture and tasks; legends below."""
    chosen = _chosen(parts)
    rows: list[np.ndarray] = []
    shown: dict[str, list[np.ndarray]] = {name: [] for name in tasks}
    for part, name in chosen:
        cells = [_cell(_read(part, IMAGE, name))]
        for task_name, task in tasks.items():
            label = _read(part, task_name, name)
            if label is not None:
                label = task.finalize_label(label)
                shown[task_name].append(label)
            cells.append(_cell(None if label is None else task.draw(label)))
        rows += [_text_row([f"{part.name} {name}"], len(tasks) + 1), np.concatenate(cells, axis=1)]
    heads = _text_row(["picture", *tasks], len(tasks) + 1, scale=0.55)
    legends = [_legend([])] + [_legend(task.legend(shown[name])) for name, task in tasks.items()]
    height = max(legend.shape[0] for legend in legends)
    foot = np.concatenate([_padded(legend, height, legend.shape[1]) for legend in legends], axis=1)
    sheet = np.concatenate([_text_row([title], len(tasks) + 1), heads, *rows, foot])
    write_image(path, cv2.copyMakeBorder(sheet, GAP, GAP, GAP, GAP, cv2.BORDER_CONSTANT, value=(PAPER,) * 3))


def _chosen(parts: Sequence[VerifiedList]) -> list[tuple[VerifiedList, str]]:
    """COUNT pictures, as many of each list, evenly spread over it; first those with every file."""
    chosen = []
    for number, part in enumerate(parts):
        whole = [name for name in part.ids if all(name in ids for ids in part.files.values() if ids)] or part.ids
        count = min(COUNT // len(parts) + (number < COUNT % len(parts)), len(whole))
        chosen += [(part, whole[(2 * i + 1) * len(whole) // (2 * count)]) for i in range(count)]
    return chosen


def _read(part: VerifiedList, kind: str, name: str) -> np.ndarray | None:
    if name not in part.files[kind]:
        return None
    try:
        return part.reader.decode(kind, name)
    except UserError:
        return None  # the table tells


def _cell(picture: np.ndarray | None) -> np.ndarray:
    """The picture in a cell: shrunk (means) or enlarged (nearest); crossed out if there is none."""
    if picture is None:
        blank = np.full((HEIGHT, WIDTH, 3), PAPER, np.uint8)
        cv2.line(blank, (0, 0), (WIDTH, HEIGHT), GREY, 1, cv2.LINE_AA)
        cv2.putText(blank, "none", (WIDTH // 2 - 20, HEIGHT // 2), FONT, 0.5, INK, 1, cv2.LINE_AA)
        return _padded(blank, HEIGHT + GAP, WIDTH + GAP)
    scale = min(WIDTH / picture.shape[1], HEIGHT / picture.shape[0])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    fitting = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    return _padded(fitting, HEIGHT + GAP, WIDTH + GAP)


def _padded(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    below, right = height - picture.shape[0], width - picture.shape[1]
    return cv2.copyMakeBorder(picture, 0, below, 0, right, cv2.BORDER_CONSTANT, value=(PAPER,) * 3)


def _text_row(texts: Sequence[str], columns: int, scale: float = 0.45) -> np.ndarray:
    strip = np.full((LINE + 6, columns * (WIDTH + GAP), 3), PAPER, np.uint8)
    for column, text in enumerate(texts):
        cv2.putText(strip, text, (column * (WIDTH + GAP), LINE), FONT, scale, INK, 1, cv2.LINE_AA)
    return strip


def _legend(rows: Sequence[tuple[str, tuple[int, int, int]]]) -> np.ndarray:
    """Swatches with their texts, two in a line."""
    lines = -(-len(rows) // 2)
    strip = np.full((GAP + lines * LINE, WIDTH + GAP, 3), PAPER, np.uint8)
    for i, (text, colour) in enumerate(rows):
        x, y = (i % 2) * WIDTH // 2, GAP + (i // 2) * LINE
        cv2.rectangle(strip, (x, y), (x + 11, y + 11), colour, -1)
        cv2.rectangle(strip, (x, y), (x + 11, y + 11), INK, 1)
        cv2.putText(strip, text, (x + 17, y + 10), FONT, 0.38, INK, 1, cv2.LINE_AA)
    return strip
