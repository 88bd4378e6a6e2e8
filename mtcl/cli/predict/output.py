"""Name the files that an image gets in the output folder, and write its maps."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtcl.atomic import convert_disk_errors
from mtcl.errors import UserError
from mtcl.inference.map_files import write_jpeg, write_map
from mtcl.tasks import TASK_NAMES
from mtcl.tasks.base import Task
from mtcl.visualization.panels import draw_predictions

OUTPUT_FOLDERS = {*TASK_NAMES, "panel"}
RECORD_FILE = "predict.json"
RETRY_HINT = "run it again: what is written stays"


class Settings(NamedTuple):
    """Settings of the output: folder, batch size, and which files are written."""

    output: Path
    batch_size: int = 1
    panel: bool = True
    overwrite: bool = False
    save_frames: bool = False
    seconds: float | None = None  # of a video or camera at most


def check_links(output: Path) -> None:
    """Raise ``UserError`` where a link in ``output`` would lead written or replaced files elsewhere."""
    for name in sorted({*OUTPUT_FOLDERS, RECORD_FILE}):
        if (output / name).is_symlink():
            raise UserError(
                f"--output {output} holds the link {name} to {os.readlink(output / name)}; maps are written into "
                "folders of their own only: remove the link, or choose another --output"
            )


def is_inside(folder: Path, path: Path) -> bool:
    """Tell whether a file to be written lies below ``folder`` once links are resolved."""
    return path.parent.resolve().is_relative_to(folder.resolve())


def output_names(files: Sequence[Path], source: Path) -> dict[Path, str]:
    """Return a name for what is written of each file: its path below ``source`` without suffix.

    The suffix stays where two files would have one name.
    """
    full = {path: (path.relative_to(source) if source.is_dir() else Path(path.name)).as_posix() for path in files}
    short = {path: name.removesuffix(path.suffix) for path, name in full.items()}
    counts = Counter([*short.values(), *full.values()])  # a.jpg.png is a.jpg, too, where a.jpg and a.png exist
    return {path: name if counts[name] == 1 else full[path] for path, name in short.items()}


def output_files(settings: Settings, tasks: Iterable[str], name: str) -> dict[str, Path]:
    """Return the files of an image: task -> path, and ``panel``."""
    paths = {task: settings.output / task / f"{name}.png" for task in tasks}
    return paths | ({"panel": settings.output / "panel" / f"{name}.jpg"} if settings.panel else {})


def describe_conflict(settings: Settings, name: str) -> str:
    """Say that maps of this name belong to another input."""
    return (
        f"{settings.output} has maps of another input's {name}; choose another --output, or replace them with "
        "--overwrite"
    )


def write_maps(
    settings: Settings, tasks: Mapping[str, Task], name: str, image: np.ndarray, maps: Mapping[str, np.ndarray]
) -> None:
    """Write the maps and the panel of an image."""
    for kind, path in output_files(settings, tasks, name).items():
        if not is_inside(settings.output, path):
            raise UserError(
                f"{path.parent} leads out of --output {settings.output}; remove the link, or choose another --output"
            )
        with convert_disk_errors(path, RETRY_HINT):
            if kind == "panel":
                write_jpeg(path, draw_predictions(image, maps, tasks))
            else:
                write_map(path, tasks[kind], maps[kind])
