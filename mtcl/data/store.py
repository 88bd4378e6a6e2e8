"""Decoded arrays kept on a disk of the user's choice, so that a file is decoded once; a damaged one is made anew.

An entry is one file: its magic (which changes with the format), a checked header, then the array: plain, to be mapped
into memory, or packed by zlib. It belongs to the content of the files it was made from. Entries appear whole, so any
number of processes may fill one store.
"""

import json
import logging
import mmap
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtcl.atomic import write_atomically
from mtcl.errors import UserError

log = logging.getLogger(__name__)

MAGIC = b"mtcl array 1\n\0\0\0"
_LENGTHS = struct.Struct("<II")  # of the header: bytes, CRC-32
_ALIGNMENT = 64


class Stored(NamedTuple):
    """An array as it is used, and the size of the picture or label it was made from."""

    array: np.ndarray
    native_size: tuple[int, int]  # height, width


class ArrayStore:
    """Arrays by (kind, name) below ``folder``, which is made now: a UserError where it can't be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trusted: set[Path] = set()  # entries that this process has checked
        self._writable = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the cache {folder} can't be made ({error.strerror}); give another folder, data.cache=PATH, or null."
            ) from error

    def get(
        self, kind: str, name: str, sources: Sequence[Path], make: Callable[[], Stored], packed: bool = False
    ) -> Stored:
        """The entry, or ``make()``, which is kept; ``sources``: the files it is made from.

        The array is read-only. Where the disk is full the arrays are made each time, after one warning.
        """
        path = self.folder / kind / f"{name}.array"
        found = self._open(path, sources)
        if found is not None:
            return found
        made = make()
        if self._writable:
            try:
                data = _entry(made, sources, packed)
                write_atomically(path, lambda temporary: temporary.write_bytes(data), durable=False)
            except OSError as error:
                self._writable = False
                log.warning(
                    "the cache %s can't be written any more (%s): files are decoded at each access from here on; free "
                    "some space or give another folder, data.cache=PATH",
                    self.folder,
                    error.strerror,
                )
        return made

    def _open(self, path: Path, sources: Sequence[Path]) -> Stored | None:
        """The entry if it is there, whole, and made from the sources as they are now."""
        try:
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):  # ValueError: an empty file
            content = None
        header = None if content is None else _header(content)
        if content is None or header is None or (path not in self._trusted and not _is_whole(content, header)):
            log.warning("the cached %s is damaged or of another version: it is made anew", path)
            return None
        if path not in self._trusted:
            if not _made_from(header["sources"], sources):
                return None
            self._trusted.add(path)
        return _array(content, header)


def _entry(stored: Stored, sources: Sequence[Path], packed: bool) -> bytes:
    array = np.ascontiguousarray(stored.array)
    payload = zlib.compress(array.tobytes(), 1) if packed else array.tobytes()
    facts = {
        "dtype": array.dtype.str,
        "shape": array.shape,
        "native": stored.native_size,
        "packed": packed,
        "bytes": len(payload),
        "crc": zlib.crc32(payload),
        "sources": [[*_stamp(path), zlib.crc32(path.read_bytes())] for path in sources],
    }
    header = json.dumps(facts).encode()
    head = MAGIC + _LENGTHS.pack(len(header), zlib.crc32(header)) + header
    return head + bytes(-len(head) % _ALIGNMENT) + payload


def _header(content: mmap.mmap) -> dict[str, Any] | None:
    """The facts of an entry and where its array begins; None if they can't be trusted."""
    start = len(MAGIC) + _LENGTHS.size
    if len(content) < start or content[: len(MAGIC)] != MAGIC:
        return None
    length, crc = _LENGTHS.unpack(content[len(MAGIC) : start])
    text = content[start : start + length]
    if len(text) != length or zlib.crc32(text) != crc:
        return None
    end = start + length
    return {**json.loads(text), "begin": end + -end % _ALIGNMENT}


def _is_whole(content: mmap.mmap, header: dict[str, Any]) -> bool:
    begin, count = header["begin"], header["bytes"]
    return len(content) == begin + count and zlib.crc32(memoryview(content)[begin:]) == header["crc"]


def _array(content: mmap.mmap, header: dict[str, Any]) -> Stored:
    data: Any = content
    begin = header["begin"]
    if header["packed"]:
        data, begin = zlib.decompress(memoryview(content)[begin:]), 0
    shape = tuple(header["shape"])
    array = np.frombuffer(data, np.dtype(header["dtype"]), int(np.prod(shape)), begin).reshape(shape)
    height, width = header["native"]
    return Stored(array, (height, width))


def _stamp(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def _made_from(known: list[list[Any]], sources: Sequence[Path]) -> bool:
    """Are the sources untouched, or, if they moved or were written again, still of the same content?"""
    if len(known) != len(sources):
        return False
    return all(
        [*_stamp(path)] == before[:3] or zlib.crc32(path.read_bytes()) == before[3]
        for path, before in zip(sources, known)
    )
