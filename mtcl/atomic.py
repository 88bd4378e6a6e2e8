"""Files that are there whole or not at all."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object], durable: bool = True) -> None:
    """``write`` a temporary neighbour, then give it its name: readers see the old or the new file, of several writers
    the last.

    ``durable``: flush it to the disk first, so that a crash of the machine leaves the old or the new file, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        write(temporary)
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
