"""Lock a run folder: one process writes into it at a time.

The ``filelock`` package, which the searches use, has no replacement for three things that are needed here: a look at
the lock that changes nothing (:func:`is_locked`); a disk without locks, on which a run goes on after a warning, where
filelock raises, or by default writes a marker that a process killed on another machine leaves behind; and a lock file
that is removed while it is locked (:meth:`RunLock.relock`). Closing the file in forked processes is filelock's idea.
"""

import logging
import os
import time
from pathlib import Path
from typing import IO, Any

from mtcl.atomic import convert_disk_errors
from mtcl.errors import UserError
from mtcl.safe_files import open_regular

log = logging.getLogger(__name__)
LOCK_ATTEMPTS = 5  # before a lock counts as held by a run: is_locked() holds it for a moment


class RunLock:
    """The lock of a folder, held until :meth:`close` or the end of the process, however it ends.

    Args:
        folder: created if it does not exist.

    Raises:
        UserError: another process holds the lock, or the folder can't be written to.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.file = self._acquire()
        locks_of_this_process[self.folder] = self

    def close(self) -> None:
        """Release the lock."""
        self.file.close()
        if locks_of_this_process.get(self.folder) is self:
            del locks_of_this_process[self.folder]

    def relock(self) -> None:
        """Lock the folder again if somebody removed it in the meantime.

        Raises:
            UserError: another run holds the lock now.
        """
        try:
            is_intact = os.path.samestat(os.stat(self.folder / ".lock"), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            is_intact = False
        if not is_intact:
            old_file, self.file = self.file, self._acquire()
            old_file.close()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _acquire(self) -> IO[str]:
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
            holder = find_holder(path)
            process = "" if holder is None else f" (process {holder})"
            raise UserError(f"another run is writing into {self.folder}{process}; choose another folder") from error
        except OSError as error:  # a network disk without locks
            log.warning(
                "%s can't be locked (%s): make sure that no other run writes into it", self.folder, error.strerror
            )
        return file


locks_of_this_process: dict[Path, RunLock] = {}  # resolved folder -> lock


def _forget_locks() -> None:
    """Close in a forked process what it has inherited: a data worker would hold the lock of a run that was killed."""
    for lock in locks_of_this_process.values():
        lock.file.close()
    locks_of_this_process.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_locks)


def lock_run(folder: Path) -> RunLock:
    """Lock ``folder`` for this process; on systems without ``fcntl`` nothing is locked.

    Raises:
        UserError: another process holds the lock, or the folder can't be written to.
    """
    return RunLock(folder)


def is_locked(folder: Path) -> bool:
    """Return whether a process holds the lock of ``folder``, without disturbing a run, even one that is starting."""
    try:
        with open_regular(folder / ".lock") as file:
            _lock(file, shared=True)
    except BlockingIOError:
        return True
    except (ImportError, OSError, UserError):  # there is no lock file, or the disk has no locks
        pass
    return False


def find_holder(path: Path) -> int | None:
    """Return the number of the process that holds the lock of a file; None where the system does not tell.

    Linux lists the locks of its own processes in /proc/locks, by device and inode: ``1: FLOCK ADVISORY WRITE 1234
    fe:00:567 0 EOF``. Those of other machines on a network disk are not there.
    """
    try:
        stat = os.stat(path)
        lines = Path("/proc/locks").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    file = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    for fields in map(str.split, lines):
        if len(fields) > 5 and fields[3] == "WRITE" and fields[5] == file and fields[4].isdecimal():
            return int(fields[4]) or None  # 0: of another container
    return None


def _open_lock(path: Path) -> IO[str]:
    """Open a lock file without changing its content and without following a link in its place."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666), "r+")


def _lock(file: IO[Any], shared: bool = False) -> None:
    """Lock an open file; ``BlockingIOError`` if another process holds the lock."""
    import fcntl  # not on Windows

    for attempt in range(1, LOCK_ATTEMPTS + 1):
        try:
            return fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if shared or attempt == LOCK_ATTEMPTS:
                raise
            time.sleep(0.02)
