"""Write the bytes of a checkpoint file, as a whole or not at all, and read them without unpickling code.

A file is what ``torch.save`` writes, a zip archive, with the SHA-256 of all bytes before it as the archive's comment.
Plain ``torch.load`` reads it, too. Files without that comment (from older versions, or from ``torch.save`` alone) are
read without the comparison.
"""

import hashlib
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mtcl.atomic import write_atomically
from mtcl.errors import UserError, describe_load_error
from mtcl.safe_files import check_depth
from mtcl.training.pickle_scan import validate_pickle

FORMAT = 1
CHECKSUM_PREFIX = b"mtcl sha256 "
CHECKSUM_LENGTH = len(CHECKSUM_PREFIX) + 64  # bytes of the comment
ZIP_HEAD, ZIP_END, ZIP_END_LENGTH = b"PK\x03\x04", b"PK\x05\x06", 22  # its last two bytes: the comment's length

CONTENT_TYPES: dict[str, tuple[type, ...]] = {  # of a checkpoint's entries, where it has them
    **dict.fromkeys(("model", "config", "meta", "optimizer", "schedule"), (Mapping,)),
    **dict.fromkeys(("ema", "regularizer", "share", "balancer"), (Mapping, type(None))),
    "rng": (Mapping, list),
    "step": (int,),
}


class CorruptCheckpointError(UserError):
    """A checkpoint file that is not as it was written."""

    def __init__(self, path: Path, why: str, message: str | None = None):
        advice = "use an older one, resume=auto finds the newest intact one"
        super().__init__(message or f"checkpoint {path} is damaged ({why}); {advice}")
        self.path, self.why = path, why


# Writing


def write_checkpoint_file(path: Path, content: Mapping[str, Any], keep: Path | None = None) -> None:
    """Write a checkpoint file of the current format.

    Args:
        path: the file; an existing one is replaced.
        content: tensors and plain containers only.
        keep: where to keep the file that is replaced; None: it is deleted.
    """
    write_atomically(path, lambda temporary: _write({"format": FORMAT, **content}, temporary), keep=keep)


class _HashingFile:
    """File that ``torch.save`` writes to, and its hash, except for the archive's end, which :meth:`finalize` writes.

    A disk error is raised by :meth:`finalize`, outside torch's own writer, which would hide its kind.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.hash, self.end = file, hashlib.sha256(), b""
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write ``data``, but hold back what may be the archive's end."""
        if len(data) >= ZIP_END_LENGTH:
            self._write_through(self.end)
            self._write_through(data[:-ZIP_END_LENGTH])
            self.end = bytes(data[-ZIP_END_LENGTH:])
        else:
            joined = self.end + bytes(data)
            self._write_through(joined[:-ZIP_END_LENGTH])
            self.end = joined[-ZIP_END_LENGTH:]
        return len(data)

    def flush(self) -> None:
        """Do nothing: the file is flushed when it is closed."""

    def finalize(self) -> None:
        """Write the archive's end with the checksum as its comment; raise what went wrong on the disk."""
        if self.error is None and not (self.end.startswith(ZIP_END) and self.end.endswith(b"\0\0")):
            raise RuntimeError("torch.save wrote something else than a zip archive without a comment")
        self._write_through(self.end[:-2] + struct.pack("<H", CHECKSUM_LENGTH))
        self._write_through(CHECKSUM_PREFIX + self.hash.hexdigest().encode())
        if self.error is not None:
            raise self.error

    def _write_through(self, data: bytes | memoryview) -> None:
        if self.error is None:
            self.hash.update(data)
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error


def _write(content: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        torch.save(content, hashing)  # type: ignore[arg-type]  # it needs only write and flush
        hashing.finalize()


# Reading


def read_checkpoint_file(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's entries onto the CPU. Never runs code from the file (``weights_only=True``).

    Raises:
        CorruptCheckpointError: the file is not as it was written.
        UserError: the file does not exist, is not a checkpoint of mtcl, or is of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist; give the path of a run's checkpoints/last.pt")
    try:
        corruption = find_corruption(path)
    except OSError as error:
        if isinstance(error, PermissionError):
            raise UserError(f"checkpoint {path} can't be read ({error.strerror}); change its permissions") from error
        raise CorruptCheckpointError(path, f"it can't be read: {error.strerror or error}") from error
    if corruption is not None:
        raise CorruptCheckpointError(path, corruption)
    try:
        validate_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        why = describe_load_error(error)
        message = f"checkpoint {path} can't be read ({why}); is it complete, and written by mtcl?"
        raise CorruptCheckpointError(path, why, message) from error
    missing = [name for name in ("model", "config", "step") if not isinstance(content, dict) or name not in content]
    if missing:
        raise UserError(f"{path} is not a checkpoint of mtcl: it has no {' and '.join(missing)}")
    if content.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {str(content.get('format'))[:9]}, this version of mtcl reads format {FORMAT}"
        )
    content = _to_plain(content, path)
    validate_content(content, path)
    return content


def find_corruption(path: Path) -> str | None:
    """Return why the file is not the one that was written; None: it is, or it has no checksum but a zip's end."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(len(ZIP_HEAD))
        if not head:
            return "it is empty and can't be read"
        file.seek(max(size - CHECKSUM_LENGTH, 0))
        comment = file.read()
        if len(comment) == CHECKSUM_LENGTH and comment.startswith(CHECKSUM_PREFIX):
            file.seek(0)
            digest = _compute_sha256(file, size - CHECKSUM_LENGTH)
            return None if comment == CHECKSUM_PREFIX + digest.encode() else "its content does not fit its checksum"
        end = comment[-ZIP_END_LENGTH:]
        if head == ZIP_HEAD and not (end.startswith(ZIP_END) and end.endswith(b"\0\0")):
            return "its end is cut off or changed, the checksum can't be read"
    return None


def _compute_sha256(file: IO[bytes], count: int) -> str:
    """Return the hash of the next ``count`` bytes."""
    digest = hashlib.sha256()
    while count > 0:
        block = file.read(min(count, 1 << 20))
        if not block:
            break
        digest.update(block)
        count -= len(block)
    return digest.hexdigest()


def validate_archive(path: Path) -> None:
    """Refuse a file that could take far more time or memory to read than its size suggests.

    Raises:
        CorruptCheckpointError: its members are compressed; torch stores them as they are.
        UserError: a pickle in it names more than tensors and plain containers.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CorruptCheckpointError(path, "its members are compressed")
        for member in members:
            if member.filename.endswith(".pkl"):
                validate_pickle(archive.read(member), path)


def validate_content(content: Mapping[str, Any], path: Path) -> None:
    """Refuse entries of an unexpected type, and tensors that claim more than the file holds.

    Whoever builds from the stored config checks that one (:mod:`mtcl.config.stored_config`).

    Raises:
        UserError: naming the entry.
    """
    problem = f"checkpoint {path} is not as mtcl writes it: its"
    for name, types in CONTENT_TYPES.items():
        if name in content and (not isinstance(content[name], types) or isinstance(content[name], bool)):
            raise UserError(f"{problem} {name} is a {type(content[name]).__name__}")
    if content["step"] < 0:
        raise UserError(f"{problem} step is {content['step']}")
    if content.get("ema") is not None and not isinstance(content["ema"].get("model"), Mapping):
        raise UserError(f"{problem} ema has no weights")
    size = path.stat().st_size
    storages: dict[int, int] = {}  # address -> bytes
    for tensor in _iterate_tensors(content):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise UserError(f"{problem} tensor of shape {tuple(tensor.shape)} has {storage.nbytes()} bytes only")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in _iterate_tensors(content["model"]))
    if sum(storages.values()) > size or weights > 2 * size:  # weights may be tied
        raise UserError(f"{problem} tensors claim more than the {size:,} bytes that the file holds")
    if next(_iterate_tensors(content["config"]), None) is not None:
        raise UserError(f"{problem} config holds tensors")


def _to_plain(content: Any, path: Path) -> Any:
    """Return ``content`` with mappings as plain dicts, without the attributes that a file may give them."""
    check_depth(content, path)

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(item) for key, item in dict.items(value)}
        if isinstance(value, list | tuple):
            return type(value)(walk(item) for item in value) if type(value) in (list, tuple) else value
        return value

    return walk(content)


def _iterate_tensors(content: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers that lie in memory."""
    stack = [content]
    while stack:
        value = stack.pop()
        if isinstance(value, dict | list | tuple):
            stack.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            yield value
