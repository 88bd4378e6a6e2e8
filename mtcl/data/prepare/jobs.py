"""Output of a prepared dataset: every file is written atomically, so that an interrupted run can be resumed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from mtcl.atomic import remove_temporary_files, write_atomically
from mtcl.errors import UserError
from mtcl.safe_files import read_json

STAMP_FILE = "prepared.json"


class Prepared(NamedTuple):
    """A finished dataset: a summary to print, and the config that reads it."""

    summary: str
    group: str  # option of the config group `data`
    options: Mapping[str, Any]  # of that group, besides its defaults
    tasks: Sequence[str] | None = None  # the tasks it has labels for; None: all of the group


def start_output(destination: Path, settings: Mapping[str, Any]) -> None:
    """Make ``destination`` ready: empty, or started with the same ``settings`` (JSON values), which it stores."""
    stamp = destination / STAMP_FILE
    remove_temporary_files(destination)  # of a run that was killed while writing the stamp
    if stamp.is_file():
        try:
            previous = read_json(stamp)
        except UserError as error:
            raise UserError(f"{stamp} is damaged; delete {destination} and start again.") from error
        if not isinstance(previous, dict):
            raise UserError(f"{stamp} is damaged; delete {destination} and start again.")
        if previous != settings:
            changed = sorted(k for k in {**previous, **settings} if previous.get(k) != settings.get(k))
            raise UserError(
                f"{destination} was started with another {', '.join(changed)}; choose another folder or delete "
                "this one."
            )
        return
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} is not empty and was not started by this command; choose a new folder.")
    write_atomically(stamp, lambda path: path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8"))


def write_image(path: Path, array: np.ndarray) -> None:
    """Write uint8 RGB (H, W, 3) or one channel (H, W) as a PNG, atomically."""
    coloured = cv2.cvtColor(array, cv2.COLOR_RGB2BGR) if array.ndim == 3 else array
    _, data = cv2.imencode(".png", coloured)
    write_atomically(path, lambda temporary: temporary.write_bytes(data.tobytes()))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array as .npy, atomically."""

    def write(temporary: Path) -> None:
        """Save the array without pickling."""
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    write_atomically(path, write)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write lines of text, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8"))


def split_tuning_ids(train_ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the training ids into (tune_train, tune_val) for choosing settings.

    Of the sorted ids, position i is for validation where i mod 80 >= 64: contiguous blocks, because neighbouring
    frames of NYUD-v2 show the same room.
    """
    ids = sorted(train_ids)
    return [x for i, x in enumerate(ids) if i % 80 < 64], [x for i, x in enumerate(ids) if i % 80 >= 64]
