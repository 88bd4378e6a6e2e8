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
from mtcl.data.image_io import file_error, read_bytes
from mtcl.errors import UserError

log = logging.getLogger(__name__)

MAGIC = b"mtcl array 1\n\0\0\0"
_LENGTHS = struct.Struct("<II")  # of the header: bytes, CRC-32
_ALIGNMENT = 64


class CacheEntry(NamedTuple):
    """An array as it is used, and the size of the picture or label it was made from."""

    array: np.ndarray
    native_size: tuple[int, int]  # height, width


class ArrayCache:
    """Arrays by (kind, name) below ``folder``, which is made now: a UserError where it can't be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trusted: dict[Path, int] = {}  # entry -> checksum, once this process has checked it
        self._writable = True
        self._warned = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the cache {folder} can't be made ({error.strerror}); give another folder, data.cache=PATH, or null."
            ) from error

    def get(
        self, kind: str, name: str, sources: Sequence[Path], make: Callable[[], CacheEntry], compressed: bool = False
    ) -> CacheEntry:
        """The entry, or ``make()``, which is kept; ``sources``: the files it is made from.

        The array may be read-only. Where the disk is full the arrays are made each time, after one warning.
        """
        path = self.folder / kind / f"{name}.array"
        found = self._open(path, sources)
        if found is not None:
            return found
        before = [_stamp(source) for source in sources] if self._writable else []  # what changes meanwhile is stale
        made = make()
        if self._writable:
            self._write(path, made, before, [_checksum(source) for source in sources], compressed)
        return made

    def _write(self, path: Path, made: CacheEntry, stamps: list[list[int]], sums: list[int], compressed: bool) -> None:
        try:
            data = _entry(made, stamps, sums, compressed)
            write_atomically(path, lambda temporary: temporary.write_bytes(data), durable=False)
        except OSError as error:
            self._writable = False
            log.warning(
                "the cache %s can't be written (%s): files are decoded at each access from here on; free some space or "
                "give another folder, data.cache=PATH",
                self.folder,
                error.strerror,
            )

    def _open(self, path: Path, sources: Sequence[Path]) -> CacheEntry | None:
        """The entry if it is there, whole, and made from the sources as they are now."""
        try:
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("can't be read (%s)", path, error.strerror)
            return None
        except ValueError:  # an empty file
            self._warn("is damaged", path)
            return None
        header = _header(content)
        if header is None or len(content) != header["begin"] + header["bytes"]:
            self._warn("is damaged or of another version", path)
            return None
        if self._trusted.get(path) == header["crc"]:
            return _array(content, header)
        if zlib.crc32(memoryview(content)[header["begin"] :]) != header["crc"]:
            self._warn("is damaged", path)
            return None
        stamps = [_stamp(source) for source in sources]
        found = _array(content, header)
        if stamps != header["stamps"]:
            # Moved, or unpacked again: what counts is the content. Next time the stamps will do.
            sums = [_checksum(source) for source in sources]
            if sums != header["sums"]:
                return None
            if self._writable:
                self._write(path, found, stamps, sums, header["packed"])
        self._trusted[path] = header["crc"]
        return found

    def _warn(self, what: str, path: Path, *details: object) -> None:
        """Say of the first entry what is wrong; of thousands it would only fill the log."""
        level = logging.DEBUG if self._warned else logging.WARNING
        log.log(level, f"the cached %s {what}: such entries are made anew", path, *details)
        self._warned = True


def _entry(stored: CacheEntry, stamps: list[list[int]], sums: list[int], compressed: bool) -> bytes:
    array = np.ascontiguousarray(stored.array)
    payload = zlib.compress(array.tobytes(), 1) if compressed else array.tobytes()
    facts = {
        "dtype": array.dtype.str,
        "shape": array.shape,
        "native": stored.native_size,
        "packed": compressed,
        "bytes": len(payload),
        "crc": zlib.crc32(payload),
        "stamps": stamps,
        "sums": sums,
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


def _array(content: mmap.mmap, header: dict[str, Any]) -> CacheEntry:
    data: Any = content
    begin = header["begin"]
    if header["packed"]:
        data, begin = zlib.decompress(memoryview(content)[begin:]), 0
    shape = tuple(header["shape"])
    array = np.frombuffer(data, np.dtype(header["dtype"]), int(np.prod(shape)), begin).reshape(shape)
    height, width = header["native"]
    return CacheEntry(array, (height, width))


def _stamp(path: Path) -> list[int]:
    """What changes with a file, and, but for the time of its last change, survives a move."""
    try:
        status = path.stat()
    except OSError as error:
        raise file_error(path, error) from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _checksum(path: Path) -> int:
    return zlib.crc32(read_bytes(path))
