"""Checkpoints: a dict of tensors and plain containers, written whole or not at all, read without unpickling code.

A file is what ``torch.save`` writes, a zip archive, with the SHA-256 of all before it as the archive's comment. Plain
``torch.load`` reads it, too. Files without the comment, of before it or of ``torch.save`` alone, are read unchecked.
"""

import copy
import hashlib
import logging
import os
import re
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from mtcl import run_lock
from mtcl.atomic import convert_disk_errors, write_atomically
from mtcl.errors import UserError, describe_load_error
from mtcl.safe_files import check_depth
from mtcl.training.pickle_scan import validate_pickle

log = logging.getLogger(__name__)

FORMAT = 1
CHECKSUM_PREFIX = b"mtcl sha256 "
CHECKSUM_LENGTH = len(CHECKSUM_PREFIX) + 64  # bytes of the comment
ZIP_HEAD, ZIP_END, ZIP_END_LENGTH = b"PK\x03\x04", b"PK\x05\x06", 22  # its last two bytes: the comment's length
NUMBERED = re.compile(r"step_(\d+)")
RESUME_HINT = "continue with resume=auto"


class CorruptCheckpointError(UserError):
    """A checkpoint that is not as it was written."""

    def __init__(self, path: Path, why: str, message: str | None = None):
        then = "use an older one, resume=auto finds the newest intact one"
        super().__init__(message or f"checkpoint {path} is damaged ({why}); {then}")
        self.path, self.why = path, why


class LoadedCheckpoint(NamedTuple):
    path: Path
    content: dict[str, Any]
    rejected: list[CorruptCheckpointError]  # newer ones


# Writing


def save_checkpoint(path: Path, content: Mapping[str, Any], keep: Path | None = None) -> None:
    """Write ``content`` (tensors and plain containers only) as a checkpoint of the current format.

    ``keep``: a name for the file that is replaced.
    """
    write_atomically(path, lambda temporary: _write({"format": FORMAT, **content}, temporary), keep=keep)


class CheckpointWriter:
    """Writes a run's checkpoints into ``folder``: ``name.pt``, and the one before ``last.pt`` as ``previous.pt``.

    ``asynchronous``: ``save`` copies the content and a thread writes it, one at a time. What that thread raises comes
    out of the next ``save``, ``wait`` or ``close``; a process that ends waits for it.
    """

    def __init__(self, folder: Path, asynchronous: bool = False):
        self.folder, self.asynchronous = folder, asynchronous
        self.thread: threading.Thread | None = None
        self.error: UserError | None = None
        self.has_written = False
        self.last_is_valid = False  # to be intact

    def save(self, name: str, content: Mapping[str, Any]) -> None:
        self.wait()
        self._hold()
        if not self.asynchronous:
            self._save(name, content)
            return
        copied, ready = copy_to_cpu(content)

        def write() -> None:
            try:
                ready()
                self._save(name, copied)
            except UserError as error:
                self.error = error
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".split("\n")[0]
                self.error = UserError(f"{self.folder / f'{name}.pt'} could not be written ({reason})")
                self.error.__cause__ = error

        # Not a daemon: the interpreter waits for it at its end.
        self.thread = threading.Thread(target=write, name=f"checkpoint {name}")
        self.thread.start()

    def wait(self) -> None:
        """Until what was saved is on the disk; raises what went wrong."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def close(self) -> None:
        self.wait()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError as error:
            if kind is None:
                raise
            log.error("%s", error)  # beside what ends the run

    def _hold(self) -> None:
        """The folder is ours, and there: a run outlives the removal of its folder."""
        held = run_lock.locks_of_this_process.get(self.folder.resolve().parent)
        if held is not None:
            held.relock()
        if self.has_written and not self.folder.is_dir():
            log.warning("%s vanished in mid-run: it is made anew, earlier checkpoints are lost", self.folder)

    def _save(self, name: str, content: Mapping[str, Any]) -> None:
        path = self.folder / f"{name}.pt"
        keep = None
        if name == "last" and path.is_file() and (self.last_is_valid or find_corruption(path) is None):
            keep = self.folder / "previous.pt"
        with convert_disk_errors(path, RESUME_HINT):
            save_checkpoint(path, content, keep)
        self.has_written = True
        self.last_is_valid |= name == "last"


def copy_to_cpu(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], Callable[[], None]]:
    """A copy of ``content`` that shares no memory with it, and a function to wait for the copy before reading it.

    From a CUDA device it goes into page-locked memory behind what the device is doing: nothing here waits for it.
    """
    seen: dict[Any, Tensor] = {}  # tensors that are one stay one
    devices: set[torch.device] = set()

    def tensor(value: Tensor) -> Tensor:
        key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in seen or value.numel() == 0:
            if value.device.type == "cuda":
                devices.add(value.device)
                copied = torch.empty_like(value, device="cpu", pin_memory=True, requires_grad=False)
                seen[key] = copied.copy_(value.detach(), non_blocking=True)
            else:
                seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tensor(value)
        if isinstance(value, Mapping):
            copied: Any = copy.copy(value)  # of its own kind, with its attributes, as a state dict has
            for name in copied:
                copied[name] = walk(copied[name])
            return copied
        if isinstance(value, list | tuple):
            return type(value)(walk(item) for item in value)
        return copy.deepcopy(value)

    copied = walk(content)
    events = [torch.cuda.current_stream(device).record_event() for device in devices]

    def ready() -> None:
        for event in events:
            event.synchronize()

    return copied, ready


class _HashingFile:
    """What ``torch.save`` writes to: a file and its hash, but for the archive's end, which :meth:`seal` writes.

    An error of the disk is kept for :meth:`seal`, clear of torch's own writer; ``torch.save`` to a path would hide
    which one it was.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.hash, self.end = file, hashlib.sha256(), b""
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        if len(data) >= ZIP_END_LENGTH:
            self._pass(self.end)
            self._pass(data[:-ZIP_END_LENGTH])
            self.end = bytes(data[-ZIP_END_LENGTH:])
        else:
            joined = self.end + bytes(data)
            self._pass(joined[:-ZIP_END_LENGTH])
            self.end = joined[-ZIP_END_LENGTH:]
        return len(data)

    def flush(self) -> None:
        pass

    def seal(self) -> None:
        if self.error is None and not (self.end.startswith(ZIP_END) and self.end.endswith(b"\0\0")):
            raise RuntimeError("torch.save wrote something else than a zip archive without a comment")
        self._pass(self.end[:-2] + struct.pack("<H", CHECKSUM_LENGTH))
        self._pass(CHECKSUM_PREFIX + self.hash.hexdigest().encode())
        if self.error is not None:
            raise self.error

    def _pass(self, data: bytes | memoryview) -> None:
        if self.error is None:
            self.hash.update(data)
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error


def _write(content: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        sealing = _HashingFile(file)
        torch.save(content, sealing)  # type: ignore[arg-type]  # it asks for write and flush only
        sealing.seal()


# Reading


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint's dict on the CPU. Never runs code from the file (``weights_only=True``)."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist; give the path of a run's checkpoints/last.pt")
    try:
        why = find_corruption(path)
    except OSError as error:
        if isinstance(error, PermissionError):
            raise UserError(f"checkpoint {path} can't be read ({error.strerror}); mend its permissions") from error
        raise CorruptCheckpointError(path, f"it can't be read: {error.strerror or error}") from error
    if why is not None:
        raise CorruptCheckpointError(path, why)
    try:
        validate_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        why = describe_load_error(error)
        raise CorruptCheckpointError(
            path, why, f"checkpoint {path} can't be read ({why}); is it whole, and mtcl's?"
        ) from error
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


PARTS: dict[str, tuple[type, ...]] = {  # of a checkpoint, where it has them
    **dict.fromkeys(("model", "config", "meta", "optimizer", "schedule"), (Mapping,)),
    **dict.fromkeys(("ema", "regularizer", "share", "balancer"), (Mapping, type(None))),
    "rng": (Mapping, list),
    "step": (int,),
}


def validate_content(content: Mapping[str, Any], path: Path) -> None:
    """Raise ``UserError`` where a part of a checkpoint is of another kind, or a tensor claims more than the file holds.

    The config in it is looked at by whoever builds from it (:mod:`mtcl.config.stored_config`).
    """
    odd = f"checkpoint {path} is not as mtcl writes it: its"
    for name, kinds in PARTS.items():
        if name in content and (not isinstance(content[name], kinds) or isinstance(content[name], bool)):
            raise UserError(f"{odd} {name} is a {type(content[name]).__name__}")
    if content["step"] < 0:
        raise UserError(f"{odd} step is {content['step']}")
    if content.get("ema") is not None and not isinstance(content["ema"].get("model"), Mapping):
        raise UserError(f"{odd} ema has no weights")
    size = path.stat().st_size
    held: dict[int, int] = {}  # storage -> its bytes
    for tensor in _tensors(content):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise UserError(f"{odd} tensor of shape {tuple(tensor.shape)} has {storage.nbytes()} bytes only")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(content["model"]))
    if sum(held.values()) > size or weights > 2 * size:  # a few weights may be one
        raise UserError(f"{odd} tensors claim more than the {size:,} bytes that the file holds")
    if next(_tensors(content["config"]), None) is not None:
        raise UserError(f"{odd} config holds tensors")


def _to_plain(content: Any, path: Path) -> Any:
    """Return ``content`` with mappings as plain dicts: attributes that a file gives to them count for nothing."""
    check_depth(content, path)

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(item) for key, item in dict.items(value)}
        if isinstance(value, list | tuple):
            return type(value)(walk(item) for item in value) if type(value) in (list, tuple) else value
        return value

    return walk(content)


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers that lie in memory."""
    todo = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, dict | list | tuple):
            todo.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            yield value


def validate_archive(path: Path) -> None:
    """Raise ``DamagedError`` or ``UserError`` where a file could take far more time or memory than its size: members
    that are compressed (torch stores them as they are), or a pickle of more than tensors and plain containers.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CorruptCheckpointError(path, "its members are compressed")
        for member in members:
            if member.filename.endswith(".pkl"):
                validate_pickle(archive.read(member), path)


def find_corruption(path: Path) -> str | None:
    """Why the file is not the one that was written. None: it is; or it has no checksum and its end is a zip's."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(len(ZIP_HEAD))
        if not head:
            return "it is empty and can't be read"
        file.seek(max(size - CHECKSUM_LENGTH, 0))
        seal = file.read()
        if len(seal) == CHECKSUM_LENGTH and seal.startswith(CHECKSUM_PREFIX):
            file.seek(0)
            found = _hash(file, size - CHECKSUM_LENGTH)
            return None if seal == CHECKSUM_PREFIX + found.encode() else "its content does not fit its checksum"
        end = seal[-ZIP_END_LENGTH:]
        if head == ZIP_HEAD and not (end.startswith(ZIP_END) and end.endswith(b"\0\0")):
            return "its end is cut off or changed, the checksum can't be read"
    return None


def _hash(file: IO[bytes], count: int) -> str:
    found = hashlib.sha256()
    while count > 0:
        block = file.read(min(count, 1 << 20))
        if not block:
            break
        found.update(block)
        count -= len(block)
    return found.hexdigest()


def latest_valid_checkpoint(folder: Path) -> LoadedCheckpoint | None:
    """The checkpoint from which a run is continued; None where there is none. UserError where all are damaged.

    That is ``last``, else ``previous``; or what the run wrote after it at a later step: a ``best``, or a numbered one.
    """
    numbered = {path: int(match[1]) for path in folder.glob("*.pt") if (match := NUMBERED.fullmatch(path.stem))}
    named = [folder / f"{name}.pt" for name in ("last", "previous")]
    candidates = [*named, *sorted(numbered, key=lambda path: -numbered[path]), folder / "best.pt"]
    best: LoadedCheckpoint | None = None
    rejected: list[CorruptCheckpointError] = []
    for path in (path for path in candidates if path.is_file()):
        if best is not None:
            # What is not younger than it lies behind it, or on a way that the run was taken back from.
            younger = path.stat().st_mtime_ns > best.path.stat().st_mtime_ns
            if path in named or not younger or numbered.get(path, best.content["step"] + 1) <= best.content["step"]:
                continue
        try:
            content = load_checkpoint(path)
        except CorruptCheckpointError as error:
            rejected.append(error)
            continue
        if best is None or content["step"] > best.content["step"]:
            best = LoadedCheckpoint(path, content, rejected)
    if best is None and rejected:
        raise UserError(
            f"no checkpoint in {folder} is intact: {', '.join(f'{e.path.name} ({e.why})' for e in rejected)}; "
            "choose another hydra.run.dir to start afresh"
        )
    return best
