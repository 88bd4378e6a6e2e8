"""Files that are there whole or not at all, and what a disk that fails is called."""

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
    """``write`` a temporary neighbour, then give it its name: readers see the old or the new file, of several writers
    the last.

    ``durable``: flush it to the disk first, so that a crash of the machine leaves the old or the new file, too.
    ``keep``: a neighbour's name for the file that is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        write(temporary)
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        if keep is not None and path.exists():
            _rename_kept(path, keep)
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary_files(folder: Path) -> list[Path]:
    """Remove the temporary files of writers that were killed; they are returned. Only where nobody else writes."""
    found = [path for path in folder.iterdir() if TEMPORARY.fullmatch(path.name)] if folder.is_dir() else []
    for path in found:
        path.unlink(missing_ok=True)
    return found


@contextlib.contextmanager
def convert_disk_errors(path: Path, then: str = "run it again (a training run: with resume=auto)") -> Iterator[None]:
    """An ``OSError`` of writing ``path`` as a ``UserError``; ``then``: what to do once the disk is in order."""
    try:
        yield
    except OSError as error:
        raise UserError(disk_error(path, error, then)) from error


def disk_error(path: Path, error: OSError, then: str) -> str:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk of {path.parent} while writing {path.name}; free some, then {then}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path.parent} can't be written to ({reason}); make it writable or choose another folder, then {then}"
    return f"{path} can't be written ({reason}); look at its disk, then {then}"


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def _rename_kept(path: Path, keep: Path) -> None:
    """``path`` is ``keep``, too, from now on; without hard links ``keep`` only."""
    spare = _temporary(keep)
    try:
        os.link(path, spare)
        os.replace(spare, keep)
    except OSError:
        os.replace(path, keep)
    finally:
        spare.unlink(missing_ok=True)  # still there where the two were one file already


def _sync_folder(folder: Path) -> None:
    """The names in ``folder`` to the disk. Not every system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(text.encode("utf-8", "surrogateescape"))

    with convert_disk_errors(path):
        write_atomically(path, write)


def write_json(path: Path, content: Any) -> None:
    """NaN, as a metric is that saw nothing valid, becomes null: JSON has no NaN."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
