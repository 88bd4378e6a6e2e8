"""What is written when a dataset is prepared: whole files only, so that a run that was stopped goes on where it was."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mtcl.atomic import remove_temporary_files, write_atomically
from mtcl.errors import UserError
from mtcl.safe_files import read_json

STAMP_FILE = "prepared.json"


def start_output(destination: Path, settings: Mapping[str, Any]) -> None:
    """Make ``destination`` ready: empty, or begun with the same ``settings`` (JSON values), which it remembers."""
    stamp = destination / STAMP_FILE
    remove_temporary_files(destination)  # of a run that was killed while it wrote the stamp
    if stamp.is_file():
        try:
            before = read_json(stamp)
        except UserError as error:
            raise UserError(f"{stamp} is damaged; delete {destination} and begin anew.") from error
        if not isinstance(before, dict):
            raise UserError(f"{stamp} is damaged; delete {destination} and begin anew.")
        if before != settings:
            changed = sorted(k for k in {**before, **settings} if before.get(k) != settings.get(k))
            raise UserError(
                f"{destination} was begun with another {', '.join(changed)}; give another folder or delete this one."
            )
        return
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} is not empty and was not begun by this command; give a new folder.")
    write_atomically(stamp, lambda path: path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8"))


def write_image(path: Path, array: np.ndarray) -> None:
    """uint8 RGB (H, W, 3) or one channel (H, W) as a PNG, whole or not at all."""
    coloured = cv2.cvtColor(array, cv2.COLOR_RGB2BGR) if array.ndim == 3 else array
    _, data = cv2.imencode(".png", coloured)
    write_atomically(path, lambda temporary: temporary.write_bytes(data.tobytes()))


def write_array(path: Path, array: np.ndarray) -> None:
    """An array as .npy, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    write_atomically(path, write)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Lines of text, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8"))


def split_tuning_ids(train_ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """(tune_train, tune_val): the training ids split for choosing settings.

    Of the sorted ids, position i is for validation where i mod 80 >= 64: contiguous blocks, because neighbouring
    frames of NYUD-v2 show the same room.
    """
    ids = sorted(train_ids)
    return [x for i, x in enumerate(ids) if i % 80 < 64], [x for i, x in enumerate(ids) if i % 80 >= 64]
