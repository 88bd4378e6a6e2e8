"""A cache of decoded arrays on disk, so that a file is decoded once; a damaged entry is recomputed.

An entry is one file: its magic (which changes with the format), a checked header, then the array: plain, to be mapped
into memory, or compressed by zlib. It belongs to the content of its source files. Entries appear atomically, so any
number of processes may fill one cache.
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

from mtcl.atomic import convert_disk_errors, write_atomically
from mtcl.data.image_io import file_error, read_bytes, record_checksums
from mtcl.errors import UserError

log = logging.getLogger(__name__)

MAGIC = b"mtcl array 1\n\0\0\0"
_LENGTHS = struct.Struct("<II")  # of the header: bytes, CRC-32
_ALIGNMENT = 64


class CacheEntry(NamedTuple):
    """An array as it is used, and the size of the image or label it was made from."""

    array: np.ndarray
    native_size: tuple[int, int]  # height, width


class ArrayCache:
    """Arrays by (kind, name) below ``folder``.

    Args:
        folder: of all entries.
        create: create it now, if it is missing.

    Raises:
        UserError: the folder can't be created.
    """

    def __init__(self, folder: Path, create: bool = True) -> None:
        self.folder = folder
        self._trusted: dict[Path, int] = {}  # entry -> checksum that this process has verified
        self._writable = True
        self._warned = False
        if create:
            self.create_folder()

    def create_folder(self) -> None:
        """Create the folder, unless it exists.

        Raises:
            UserError: it can't be created.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the cache {self.folder} can't be created ({error.strerror}); choose another folder, or no cache."
            ) from error

    def get(
        self, kind: str, name: str, sources: Sequence[Path], make: Callable[[], CacheEntry], compressed: bool = False
    ) -> CacheEntry:
        """Return the cached entry, or compute it with ``make()`` and cache it.

        Where the disk is full the arrays are recomputed each time, after one warning.

        Args:
            kind: subfolder of the entry.
            name: id of the image.
            sources: files that the entry is made from.
            make: computes the entry.
            compressed: compress the array by zlib instead of mapping it into memory.

        Returns:
            The entry; its array may be read-only.
        """
        path = self._path(kind, name)
        entry = self._open(path, sources)
        if entry is not None:
            return entry
        stamps = (
            [_stamp(source) for source in sources] if self._writable else []
        )  # before decoding: a source that changes meanwhile makes the entry stale
        with record_checksums() as read_sums:  # of what was decoded, whatever happens to the file afterwards
            new_entry = make()
        if self._writable:
            sums = [read_sums[source] if source in read_sums else _checksum(source) for source in sources]
            self._write(path, new_entry, stamps, sums, compressed)
        return new_entry

    def find(self, kind: str, name: str, sources: Sequence[Path]) -> CacheEntry | None:
        """Return the entry if it exists, is intact, and was made from ``sources`` as they are now; see :meth:`get`."""
        return self._open(self._path(kind, name), sources)

    def put(self, kind: str, name: str, sources: Sequence[Path], entry: CacheEntry) -> None:
        """Write an entry, not compressed; see :meth:`get`.

        Raises:
            UserError: it can't be written.
        """
        path = self._path(kind, name)
        stamps, sums = [_stamp(source) for source in sources], [_checksum(source) for source in sources]
        with convert_disk_errors(path, "start again: what is written stays"):
            _write_parts(path, _serialize(entry, stamps, sums, compressed=False))

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{name}.array"

    def _write(self, path: Path, entry: CacheEntry, stamps: list[list[int]], sums: list[int], compressed: bool) -> None:
        """Write an entry; on a full disk warn once and stop writing."""
        try:
            _write_parts(path, _serialize(entry, stamps, sums, compressed))
        except OSError as error:
            self._writable = False
            log.warning(
                "the cache %s can't be written (%s): files are decoded at each access from now on; free some space or "
                "choose another folder",
                self.folder,
                error.strerror,
            )

    def _open(self, path: Path, sources: Sequence[Path]) -> CacheEntry | None:
        """Return the entry if it exists, is intact, and was made from the sources as they are now."""
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
        header = _read_header(content)
        if header is None or len(content) != header["begin"] + header["bytes"]:
            self._warn("is damaged or of another version", path)
            return None
        if self._trusted.get(path) == header["crc"]:
            return _read_array(content, header)
        if zlib.crc32(memoryview(content)[header["begin"] :]) != header["crc"]:
            self._warn("is damaged", path)
            return None
        stamps = [_stamp(source) for source in sources]
        entry = _read_array(content, header)
        if stamps != header["stamps"]:
            # Moved, or unpacked again: the content decides. With the new stamps, the next check is fast again.
            sums = [_checksum(source) for source in sources]
            if sums != header["sums"]:
                return None
            if self._writable:
                self._write(path, entry, stamps, sums, header["packed"])
        self._trusted[path] = header["crc"]
        return entry

    def _warn(self, problem: str, path: Path, *details: object) -> None:
        """Warn about the first bad entry only; thousands of warnings would fill the log."""
        level = logging.DEBUG if self._warned else logging.WARNING
        log.log(level, f"the cached %s {problem}: such entries are recomputed", path, *details)
        self._warned = True


def _write_parts(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write a file of these parts atomically; the parts are not joined, for they are large."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.writelines(parts)

    write_atomically(path, write, durable=False)


def _serialize(
    entry: CacheEntry, stamps: list[list[int]], sums: list[int], compressed: bool
) -> tuple[bytes, memoryview | bytes]:
    """Serialise an entry: magic and header, and the payload, which is the array's memory if it is not compressed."""
    array = np.ascontiguousarray(entry.array)
    payload: memoryview | bytes = array.reshape(-1).view(np.uint8).data
    if compressed:
        payload = zlib.compress(payload, 1)
    metadata = {
        "dtype": array.dtype.str,
        "shape": array.shape,
        "native": entry.native_size,
        "packed": compressed,
        "bytes": len(payload),
        "crc": zlib.crc32(payload),
        "stamps": stamps,
        "sums": sums,
    }
    header = json.dumps(metadata).encode()
    head = MAGIC + _LENGTHS.pack(len(header), zlib.crc32(header)) + header
    return head + bytes(-len(head) % _ALIGNMENT), payload


def _read_header(content: mmap.mmap) -> dict[str, Any] | None:
    """Return the metadata of an entry and where its array begins; None if they fail their checksum."""
    start = len(MAGIC) + _LENGTHS.size
    if len(content) < start or content[: len(MAGIC)] != MAGIC:
        return None
    length, crc = _LENGTHS.unpack(content[len(MAGIC) : start])
    text = content[start : start + length]
    if len(text) != length or zlib.crc32(text) != crc:
        return None
    end = start + length
    return {**json.loads(text), "begin": end + -end % _ALIGNMENT}


def _read_array(content: mmap.mmap, header: dict[str, Any]) -> CacheEntry:
    """Return the array of an entry, mapped or decompressed."""
    data: Any = content
    begin = header["begin"]
    if header["packed"]:
        data, begin = zlib.decompress(memoryview(content)[begin:]), 0
    shape = tuple(header["shape"])
    array = np.frombuffer(data, np.dtype(header["dtype"]), int(np.prod(shape)), begin).reshape(shape)
    height, width = header["native"]
    return CacheEntry(array, (height, width))


def _stamp(path: Path) -> list[int]:
    """Return size and times of a file, which tell a changed one; a moved file keeps all but the last."""
    try:
        status = path.stat()
    except OSError as error:
        raise file_error(path, error) from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file's content."""
    return zlib.crc32(read_bytes(path))
