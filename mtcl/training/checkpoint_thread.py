"""Save a run's checkpoints, in a thread where asked; checkpoint_file.py writes their bytes."""

import copy
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtcl import run_lock
from mtcl.atomic import convert_disk_errors
from mtcl.errors import UserError
from mtcl.training.checkpoint import Checkpoint
from mtcl.training.checkpoint_file import find_corruption, write_checkpoint_file

log = logging.getLogger(__name__)

RESUME_HINT = "continue with resume=auto"


class CheckpointWriter:
    """Writes checkpoints into a folder: ``name.pt``, and the one that ``last.pt`` replaces as ``previous.pt``.

    Args:
        folder: made with the first checkpoint.
        asynchronous: :meth:`save` copies the checkpoint and a thread writes it, one at a time. An error of that thread
            is raised by the next ``save``, ``wait`` or ``close``; a process that ends waits for the thread.
    """

    def __init__(self, folder: Path, asynchronous: bool = False):
        self.folder, self.asynchronous = folder, asynchronous
        self.thread: threading.Thread | None = None
        self.error: UserError | None = None
        self.has_written = False
        self.last_is_valid = False

    def save(self, name: str, checkpoint: Checkpoint) -> None:
        """Write ``checkpoint`` as ``name.pt``, or start to write it.

        Raises:
            UserError: this one, or the one before, could not be written; or another run writes into the folder.
        """
        self.wait()
        self._check_folder()
        if not self.asynchronous:
            self._save(name, checkpoint.to_dict())
            return
        copied, wait_for_copy = copy_to_cpu(checkpoint.to_dict())

        def write() -> None:
            try:
                wait_for_copy()
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
        """Wait until what was saved is on the disk; raise what went wrong."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def close(self) -> None:
        """Wait for the last checkpoint."""
        self.wait()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError as error:
            if kind is None:
                raise
            log.error("%s", error)  # another exception is already ending the run

    def _check_folder(self) -> None:
        """Lock the run folder again and warn, where somebody has removed it: a run outlives that."""
        lock = run_lock.locks_of_this_process.get(self.folder.resolve().parent)
        if lock is not None:
            lock.relock()
        if self.has_written and not self.folder.is_dir():
            log.warning(
                "%s vanished during the run: it is created again, but earlier checkpoints are lost", self.folder
            )

    def _save(self, name: str, content: Mapping[str, Any]) -> None:
        path = self.folder / f"{name}.pt"
        keep = None
        if name == "last" and path.is_file() and (self.last_is_valid or find_corruption(path) is None):
            keep = self.folder / "previous.pt"
        with convert_disk_errors(path, RESUME_HINT):
            write_checkpoint_file(path, content, keep)
        self.has_written = True
        self.last_is_valid |= name == "last"


def copy_to_cpu(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], Callable[[], None]]:
    """Copy nested containers of tensors to the CPU.

    From a CUDA device tensors are copied into page-locked memory, queued behind the device's work, so that this call
    does not wait for the device.

    Returns:
        the copy, which shares no memory with ``content``, and a function to call before it is read.
    """
    copies: dict[Any, Tensor] = {}  # tied tensors stay tied
    devices: set[torch.device] = set()

    def copy_tensor(value: Tensor) -> Tensor:
        key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in copies or value.numel() == 0:
            if value.device.type == "cuda":
                devices.add(value.device)
                copied = torch.empty_like(value, device="cpu", pin_memory=True, requires_grad=False)
                copies[key] = copied.copy_(value.detach(), non_blocking=True)
            else:
                copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return copy_tensor(value)
        if isinstance(value, Mapping):
            copied: Any = copy.copy(value)  # of its own type, with its attributes, as a state dict has
            for name in copied:
                copied[name] = walk(copied[name])
            return copied
        if isinstance(value, list | tuple):
            return type(value)(walk(item) for item in value)
        return copy.deepcopy(value)

    copied = walk(content)
    events = [torch.cuda.current_stream(device).record_event() for device in devices]

    def wait_for_copy() -> None:
        for event in events:
            event.synchronize()

    return copied, wait_for_copy
