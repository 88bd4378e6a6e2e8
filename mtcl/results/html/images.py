"""The qualitative wall: tiles cut out of the runs' panels, small enough that sixty runs are one file to be mailed."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mtcl.errors import UserError, escape_control_characters
from mtcl.results.html.collect import ReportRow, ReportRun
from mtcl.results.runs import natural_key
from mtcl.safe_files import parse_json, read_bytes
from mtcl.visualization.panels import LAYOUT_KEY, TILE_KINDS

MAX_ROWS = 24  # rows of the wall
MAX_IMAGES = 6
MAX_CHARACTERS = 9 * 2**20  # characters of all embedded pictures together
SIDES = ((4, 640), (12, 448), (MAX_ROWS, 320))  # up to so many runs: pixels of a tile's longer side
FEW_COLOURS = 64  # a map of so few is kept without loss
MOST_PIXELS = 2**26  # of a panel
QUALITY = 80

FORGED = (UserError, AttributeError, OverflowError, MemoryError, Image.DecompressionBombError)  # what such panels raise

Tiles = dict[str, np.ndarray]  # "image" or "task/kind" -> uint8 (H, W, 3)


@dataclass
class Wall:
    """``content``: what page.js shows, ``notes``: whole sentences on what it does not show."""

    content: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    size: int = 0


def build_image_grid(lines: Sequence[ReportRow]) -> tuple[Wall, dict[Path, list[str]]]:
    """As many whole pictures as the budget holds, each of all lines that have it; sentences on runs without."""
    told: dict[Path, list[str]] = {}
    shown: dict[int, dict[str, Path]] = {}  # line -> picture -> its panel
    seeds: list[int] = []
    for index, line in enumerate(lines):
        for folder in line.folders if len(shown) < MAX_ROWS else ():
            if panels := find_panels(folder, told):
                shown[index] = panels
                seeds += [len(line.folders)]
                break
    wall = Wall()
    names = sorted({name for panels in shown.values() for name in panels}, key=lambda name: natural_key(Path(name)))
    # Those that most runs have come first: the wall is there to compare.
    names.sort(key=lambda name: -sum(name in panels for panels in shown.values()))
    side = next(pixels for most, pixels in SIDES if len(shown) <= most)
    for name in names[:MAX_IMAGES]:
        entry, size, missing = make_entry({i: p[name] for i, p in shown.items() if name in p}, side, lines, told)
        if entry is None:
            continue
        if wall.content and wall.size + size > MAX_CHARACTERS:
            break
        wall.content.append(entry)
        wall.size += size
        wall.notes += missing
    left = len(names) - len(wall.content)
    if wall.content and left > 0:
        wall.notes.append(f"{len(wall.content)} of {len(names)} pictures are here, to keep the file small.")
    with_panels = sum(any((folder.path / "panels").is_dir() for folder in line.folders) for line in lines)
    if with_panels > len(shown) == MAX_ROWS:
        wall.notes.append(f"The first {len(shown)} of {with_panels} rows are here, to keep the file small.")
    if any(count > 1 for count in seeds):
        wall.notes.append("Of a row with several seeds it is the first one's pictures.")
    return wall, told


def find_panels(folder: ReportRun, told: dict[Path, list[str]]) -> dict[str, Path]:
    """A run's panels by the name of their file."""
    if not folder.path.is_dir():
        return {}
    found = {path.stem: path for path in sorted((folder.path / "panels").glob("*.png"), key=natural_key)}
    if not found:
        told.setdefault(folder.path, []).append(
            "It has no panels/, so it has no pictures (trainer.num_panels=4 draws some)."
        )
    return found


def make_entry(
    panels: Mapping[int, Path], side: int, lines: Sequence[ReportRow], told: dict[Path, list[str]]
) -> tuple[dict[str, Any] | None, int, list[str]]:
    """One picture down the lines: its entry of the wall, its size, and sentences on lines that are left out."""
    entry: dict[str, Any] | None = None
    first: np.ndarray | None = None
    size, missing = 0, []
    for index, path in panels.items():
        try:
            layout, tiles = cut_tiles(path)
        except (OSError, ValueError, KeyError, TypeError, SyntaxError, *FORGED) as error:
            why = (
                str(error)
                if isinstance(error, NoLayout)
                else escape_control_characters(f"{path.name} can't be read ({error})")
            )
            sentences = told.setdefault(path.parent.parent, [])
            sentences += [f"Its pictures are left out: {why}."] if not sentences else []
            continue
        if entry is None:
            first = tiles["image"]
            entry = {"id": layout["id"], "image": encode_tile(first, side), "tasks": {}, "lines": {}}
            size += len(entry["image"])
        elif first is not None and not np.array_equal(first, tiles["image"]):
            missing.append(f"{lines[index].label} shows another picture as {path.stem}; it is left out there.")
            continue
        own: dict[str, dict[str, str]] = {}
        for task in tasks_of(tiles):
            if task not in entry["tasks"]:
                label = encode_tile(tiles[f"{task}/label"], side)
                entry["tasks"][task] = {"label": label, "legend": []}
                size += len(label)
            legend = entry["tasks"][task]["legend"]
            legend += [row for row in layout["legends"].get(task, []) if row not in legend]  # a class of this line only
            legend.sort(key=lambda row: row[0] == "void" or row[0].startswith("error: "))
            own[task] = {kind: encode_tile(tiles[f"{task}/{kind}"], side) for kind in TILE_KINDS[1:]}
            size += sum(map(len, own[task].values()))
        entry["lines"][index] = own
    return entry, size, missing


class NoLayout(ValueError):
    """A panel that does not tell what stands where in it."""


def cut_tiles(path: Path) -> tuple[dict[str, Any], Tiles]:
    """A panel's id and legends, and its tiles at the size that they were drawn from."""
    with Image.open(io.BytesIO(read_bytes(path))) as opened:
        if opened.format != "PNG" or opened.width * opened.height > MOST_PIXELS:
            raise ValueError("it is no PNG of a panel's size")
        opened.load()
        text = getattr(opened, "text", {}).get(LAYOUT_KEY)
        if text is None:
            raise NoLayout("they were drawn by an earlier version of mtcl; evaluate.py draws them anew")
        panel = np.asarray(opened.convert("RGB"))
    layout = parse_json(text, path)
    height, width = (int(length) for length in layout["size"])
    zoom = int(layout["zoom"])
    tiles = {}
    for name, (top, left) in layout["tiles"].items():
        tile = panel[int(top) : int(top) + height : zoom, int(left) : int(left) + width : zoom]
        if min(top, left) < 0 or not tile.size or tile.shape[:2] != (-(-height // zoom), -(-width // zoom)):
            raise ValueError("its layout is not its own")
        tiles[str(name)] = tile
    if "image" not in tiles or "id" not in layout:
        raise ValueError("its layout has no image or no id")
    legends = {task: legend_of(rows) for task, rows in layout.get("legends", {}).items()}
    return {"id": layout["id"], "legends": legends}, tiles


def tasks_of(tiles: Tiles) -> list[str]:
    """Tasks of which all is there."""
    names = dict.fromkeys(name.rpartition("/")[0] for name in tiles if "/" in name)
    return [task for task in names if all(f"{task}/{kind}" in tiles for kind in TILE_KINDS)]


def legend_of(rows: Sequence[Any]) -> list[tuple[str, str]]:
    """(text, #rrggbb) rows."""
    return [(str(text), "#" + "".join(f"{int(value) & 255:02x}" for value in colour[:3])) for text, colour in rows]


def encode_tile(tile: np.ndarray, side: int) -> str:
    """A tile as the data URI of a WebP, its longer side at most ``side`` pixels."""
    picture = Image.fromarray(np.ascontiguousarray(tile))
    few = picture.getcolors(FEW_COLOURS) is not None
    longest = max(picture.size)
    if longest > side:  # classes are not mixed
        size = (max(1, picture.width * side // longest), max(1, picture.height * side // longest))
        picture = picture.resize(size, Image.Resampling.NEAREST if few else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=few, quality=QUALITY, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
