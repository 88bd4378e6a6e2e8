"""Write files atomically, and say in one sentence what is wrong with a disk."""

import contextlib
import errno
import json
import math
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mtcl.errors import UserError

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")


def write_atomically(
    path: Path, write: Callable[[Path], object], durable: bool = True, keep: Path | None = None
) -> None:
    """Write a temporary file beside ``path``, then rename it.

    Readers see the old file or the new one, never a part; of several writers the last one wins.

    Args:
        path: its folder is created if it does not exist.
        write: writes the file at the path that it is given.
        durable: flush the file to the disk first, so that a crash of the machine also leaves the old or the new file.
        keep: a path in the same folder under which the replaced file is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        write(temporary)
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        if keep is not None and path.exists():
            _link_or_rename(path, keep)
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary_files(folder: Path) -> list[Path]:
    """Remove the temporary files of writers that were killed, and return them; only while nobody else writes."""
    paths = [path for path in folder.iterdir() if TEMPORARY.fullmatch(path.name)] if folder.is_dir() else []
    for path in paths:
        path.unlink(missing_ok=True)
    return paths


@contextlib.contextmanager
def convert_disk_errors(path: Path, advice: str = "run it again (a training run: with resume=auto)") -> Iterator[None]:
    """Convert an ``OSError`` of writing ``path`` to a ``UserError``.

    Args:
        path: the file that is written in the context.
        advice: what to do once the disk is in order.
    """
    try:
        yield
    except OSError as error:
        raise UserError(describe_disk_error(path, error, advice)) from error


def describe_disk_error(path: Path, error: OSError, advice: str) -> str:
    """Return a sentence about an ``error`` of writing ``path``; see :func:`convert_disk_errors`."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk of {path.parent} while writing {path.name}; free some, then {advice}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path.parent} can't be written to ({reason}); make it writable or choose another folder, then {advice}"
    return f"{path} can't be written ({reason}); check its disk, then {advice}"


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def _link_or_rename(path: Path, keep: Path) -> None:
    """Make ``keep`` a second name of ``path``, or its only one where the disk has no hard links."""
    spare = _temporary(keep)
    try:
        os.link(path, spare)
        os.replace(spare, keep)
    except OSError:
        os.replace(path, keep)
    finally:
        spare.unlink(missing_ok=True)  # it still exists if the two were one file already


def _sync_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Raises:
        UserError: the file can't be written.
    """

    def write(temporary: Path) -> None:
        temporary.write_bytes(text.encode("utf-8", "surrogateescape"))

    with convert_disk_errors(path):
        write_atomically(path, write)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically, with null for NaN (a metric without valid pixels), for JSON has no NaN.

    Raises:
        UserError: the file can't be written.
    """
    write_text(path, json.dumps(replace_non_finite(content), indent=2, allow_nan=False) + "\n")


def replace_non_finite(content: Any) -> Any:
    """Return plain containers with None in place of NaN and infinity."""
    if isinstance(content, Mapping):
        return {key: replace_non_finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [replace_non_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
