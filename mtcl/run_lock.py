"""Lock a run folder: one process writes into it at a time."""

import logging
import os
import time
from pathlib import Path
from typing import IO, Any

from mtcl.atomic import convert_disk_errors
from mtcl.errors import UserError
from mtcl.safe_files import open_regular

log = logging.getLogger(__name__)
LOCK_ATTEMPTS = 5  # at a lock that is held, before it counts as a run's: is_claimed() has it for a moment


class RunLock:
    """A folder held for this process until :meth:`close` or the process's end, however it ends: see :func:`lock_run`."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.file = self._locked()
        locks_of_this_process[self.folder] = self

    def close(self) -> None:
        self.file.close()
        if locks_of_this_process.get(self.folder) is self:
            del locks_of_this_process[self.folder]

    def relock(self) -> None:
        """Hold the folder again where somebody removed it in the meantime. UserError where another run has it now."""
        try:
            there = os.path.samestat(os.stat(self.folder / ".lock"), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            there = False
        if not there:
            before, self.file = self.file, self._locked()
            before.close()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _locked(self) -> IO[str]:
        path = self.folder / ".lock"
        with convert_disk_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                raise UserError(f"{path} is a link, in place of the file that mtcl locks; remove it")
            file = _open_lock(path)
        try:
            _lock(file)
        except ImportError:
            pass
        except BlockingIOError as error:
            file.close()
            raise UserError(f"another run is writing into {self.folder}; choose another hydra.run.dir") from error
        except OSError as error:  # a network disk without locks
            log.warning("%s can't be locked (%s): see that no other run writes into it", self.folder, error.strerror)
        return file


locks_of_this_process: dict[Path, RunLock] = {}  # what this process holds


def lock_run(folder: Path) -> RunLock:
    """Hold ``folder`` for this process until the claim is closed or the process ends, however it ends.

    UserError where another process holds it. On systems without ``fcntl`` nothing is held.
    """
    return RunLock(folder)


def is_locked(folder: Path) -> bool:
    """Whether a process holds ``folder``. A look disturbs no run, not even one that is starting."""
    try:
        with open_regular(folder / ".lock") as file:
            _lock(file, shared=True)
    except BlockingIOError:
        return True
    except (ImportError, OSError, UserError):  # no lock there, or none on such a disk
        pass
    return False


def _open_lock(path: Path) -> IO[str]:
    """Open a lock file as it is: its content counts for nothing, and a link that lies there is not followed."""
    guards = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | guards, 0o666), "r+")


def _lock(file: IO[Any], shared: bool = False) -> None:
    """``BlockingIOError`` where somebody else has the lock."""
    import fcntl  # not on Windows

    for look in range(1, LOCK_ATTEMPTS + 1):
        try:
            return fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if shared or look == LOCK_ATTEMPTS:
                raise
            time.sleep(0.02)
