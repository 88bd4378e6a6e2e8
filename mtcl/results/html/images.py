"""Cut tiles from the runs' panels and embed them, small enough that a report of sixty runs can be mailed."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mtcl.errors import UserError, escape_control_characters
from mtcl.results.html.collect import ReportFolder, ReportRow
from mtcl.results.runs import natural_key
from mtcl.run_folder import PANELS
from mtcl.safe_files import parse_json, read_bytes
from mtcl.visualization.panel_format import LAYOUT_KEY, TILE_KINDS

MAX_ROWS = 24  # of the image grid
MAX_IMAGES = 6
MAX_CHARACTERS = 9 * 2**20  # of all embedded images together
SIDES = ((4, 640), (12, 448), (MAX_ROWS, 320))  # (up to so many rows, pixels of a tile's longer side)
LOSSLESS_COLORS = 64  # maps of at most so many colours are compressed without loss
MAX_PIXELS = 2**26  # of a panel
QUALITY = 80

MALFORMED = (
    UserError,
    AttributeError,
    OverflowError,
    MemoryError,
    Image.DecompressionBombError,
)  # raised by bad panels

Tiles = dict[str, np.ndarray]  # "image" or "task/kind" -> uint8 (H, W, 3)


@dataclass
class ImageGrid:
    """Images down the rows of a report.

    Attributes:
        content: what page.js shows.
        notes: sentences on what it does not show.
        size: characters of the embedded images.
    """

    content: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    size: int = 0


def build_image_grid(rows: Sequence[ReportRow]) -> tuple[ImageGrid, dict[Path, list[str]]]:
    """Embed as many images as fit into :data:`MAX_CHARACTERS`, each with the predictions of all rows that have it.

    Returns:
        The grid, and sentences on run folders without images.
    """
    problems: dict[Path, list[str]] = {}
    row_panels: dict[int, dict[str, Path]] = {}  # row -> image name -> its panel
    has_seeds = False
    for index, row in enumerate(rows):
        for folder in row.folders if len(row_panels) < MAX_ROWS else ():
            if panels := find_panels(folder, problems):
                row_panels[index] = panels
                has_seeds = has_seeds or len(row.folders) > 1
                break
    grid = ImageGrid()
    names = sorted(
        {name for panels in row_panels.values() for name in panels}, key=lambda name: natural_key(Path(name))
    )
    names.sort(key=lambda name: -sum(name in panels for panels in row_panels.values()))  # those of most rows first
    side = next(pixels for num_rows, pixels in SIDES if len(row_panels) <= num_rows)
    for name in names[:MAX_IMAGES]:
        image_panels = {i: panels[name] for i, panels in row_panels.items() if name in panels}
        entry, size, notes = make_entry(image_panels, side, rows, problems)
        if entry is None:
            continue
        if grid.content and grid.size + size > MAX_CHARACTERS:
            break
        grid.content.append(entry)
        grid.size += size
        grid.notes += notes
    if grid.content and len(names) > len(grid.content):
        grid.notes.append(f"{len(grid.content)} of {len(names)} images are shown, to keep the file small.")
    num_rows = sum(any(folder.files.panels.is_dir() for folder in row.folders) for row in rows)
    if num_rows > len(row_panels) == MAX_ROWS:
        grid.notes.append(f"The first {len(row_panels)} of {num_rows} rows are shown, to keep the file small.")
    if has_seeds:
        grid.notes.append("Of a row with several seeds, the images of the first one are shown.")
    return grid, problems


def find_panels(folder: ReportFolder, problems: dict[Path, list[str]]) -> dict[str, Path]:
    """Return a run's panels by the name of their file; add a problem if there are none."""
    if not folder.path.is_dir():
        return {}
    panels = {path.stem: path for path in sorted(folder.files.panels.glob("*.png"), key=natural_key)}
    if not panels:
        problems.setdefault(folder.path, []).append(
            f"It has no {PANELS}/, so it has no images (trainer.num_panels=4 draws some)."
        )
    return panels


def make_entry(
    panels: Mapping[int, Path], side: int, rows: Sequence[ReportRow], problems: dict[Path, list[str]]
) -> tuple[dict[str, Any] | None, int, list[str]]:
    """Embed one image with the labels and the predictions of each row.

    Args:
        panels: row -> the panel of the image.
        side: pixels of a tile's longer side.
        rows: the rows of the report.
        problems: gets a sentence on each run whose panel can't be read.

    Returns:
        The grid's entry, or None without a readable panel; its size in characters; notes on rows that are left out.
    """
    entry: dict[str, Any] | None = None
    image: np.ndarray | None = None
    size, notes = 0, []
    for index, path in panels.items():
        try:
            layout, tiles = cut_tiles(path)
        except (OSError, ValueError, KeyError, TypeError, SyntaxError, *MALFORMED) as error:
            unreadable = escape_control_characters(f"{path.name} can't be read ({error})")
            reason = str(error) if isinstance(error, NoLayoutError) else unreadable
            sentences = problems.setdefault(path.parent.parent, [])
            sentences += [f"Its images are left out: {reason}."] if not sentences else []
            continue
        if entry is None:
            image = tiles["image"]
            entry = {"id": layout["id"], "image": encode_tile(image, side), "tasks": {}, "lines": {}}
            size += len(entry["image"])
        elif image is not None and not np.array_equal(image, tiles["image"]):
            notes.append(f"{rows[index].label} shows another image as {path.stem}; it is left out there.")
            continue
        predictions: dict[str, dict[str, str]] = {}
        for task in complete_tasks(tiles):
            if task not in entry["tasks"]:
                label = encode_tile(tiles[f"{task}/label"], side)
                entry["tasks"][task] = {"label": label, "legend": []}
                size += len(label)
            legend = entry["tasks"][task]["legend"]
            legend += [item for item in layout["legends"].get(task, []) if item not in legend]  # this row's classes
            legend.sort(key=lambda item: item[0] == "void" or item[0].startswith("error: "))
            predictions[task] = {kind: encode_tile(tiles[f"{task}/{kind}"], side) for kind in TILE_KINDS[1:]}
            size += sum(map(len, predictions[task].values()))
        entry["lines"][index] = predictions
    return entry, size, notes


class NoLayoutError(ValueError):
    """A panel whose file does not describe the positions of its tiles."""


def cut_tiles(path: Path) -> tuple[dict[str, Any], Tiles]:
    """Read a panel: return its id and legends, and its tiles at their original size.

    Raises:
        NoLayoutError: the panel was drawn by a version that did not store the layout.
        ValueError: the file is no panel, or its layout does not fit it; so do the errors of :data:`MALFORMED`.
    """
    with Image.open(io.BytesIO(read_bytes(path))) as file:
        if file.format != "PNG" or file.width * file.height > MAX_PIXELS:
            raise ValueError("it is no PNG of a panel's size")
        file.load()
        text = getattr(file, "text", {}).get(LAYOUT_KEY)
        if text is None:
            raise NoLayoutError("they were drawn by an earlier version of mtcl; evaluate.py draws them again")
        panel = np.asarray(file.convert("RGB"))
    layout = parse_json(text, path)
    height, width = (int(length) for length in layout["size"])
    zoom = int(layout["zoom"])
    tiles = {}
    for name, (y, x) in layout["tiles"].items():
        tile = panel[int(y) : int(y) + height : zoom, int(x) : int(x) + width : zoom]
        if min(y, x) < 0 or not tile.size or tile.shape[:2] != (-(-height // zoom), -(-width // zoom)):
            raise ValueError("its layout does not fit its size")
        tiles[str(name)] = tile
    if "image" not in tiles or "id" not in layout:
        raise ValueError("its layout has no image or no id")
    legends = {task: parse_legend(items) for task, items in layout.get("legends", {}).items()}
    return {"id": layout["id"], "legends": legends}, tiles


def complete_tasks(tiles: Tiles) -> list[str]:
    """Return the tasks with tiles of every kind."""
    names = dict.fromkeys(name.rpartition("/")[0] for name in tiles if "/" in name)
    return [task for task in names if all(f"{task}/{kind}" in tiles for kind in TILE_KINDS)]


def parse_legend(items: Sequence[Any]) -> list[tuple[str, str]]:
    """Return (text, #rrggbb) pairs from (text, RGB) pairs."""
    return [(str(text), "#" + "".join(f"{int(value) & 255:02x}" for value in color[:3])) for text, color in items]


def encode_tile(tile: np.ndarray, side: int) -> str:
    """Return a tile as the data URI of a WebP, its longer side at most ``side`` pixels."""
    image = Image.fromarray(np.ascontiguousarray(tile))
    lossless = image.getcolors(LOSSLESS_COLORS) is not None
    longest = max(image.size)
    if longest > side:  # without mixing classes
        size = (max(1, image.width * side // longest), max(1, image.height * side // longest))
        image = image.resize(size, Image.Resampling.NEAREST if lossless else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=lossless, quality=QUALITY, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
