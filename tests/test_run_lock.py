"""One process at a time writes into a run folder."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mtcl import UserError
from mtcl.run_lock import find_holder, is_locked, lock_run

# Locks FOLDER, forks a process that lives on, and waits. The forked one reports: it has closed what it inherited.
HOLD = """
import os, sys, time
from pathlib import Path
from mtcl.run_lock import lock_run
lock = lock_run(Path(sys.argv[1]))
if os.fork() == 0:
    print("held", flush=True)
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""
LINUX = Path("/proc/locks").exists()


def test_a_folder_is_locked_by_one_run(tmp_path):
    lock = lock_run(tmp_path)
    with pytest.raises(UserError, match="another run"):
        lock_run(tmp_path)
    lock.close()
    lock_run(tmp_path).close()


def test_is_locked_creates_nothing(tmp_path):
    assert not is_locked(tmp_path)
    assert not list(tmp_path.iterdir())
    with lock_run(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_a_lock_survives_the_removal_of_its_file(tmp_path):
    with lock_run(tmp_path) as lock:
        (tmp_path / ".lock").unlink()
        assert not is_locked(tmp_path)
        lock.relock()
        assert is_locked(tmp_path)


@pytest.mark.skipif(not LINUX, reason="the system does not list its locks")
def test_the_message_names_the_process_that_holds_the_lock(tmp_path):
    with lock_run(tmp_path):
        assert find_holder(tmp_path / ".lock") == os.getpid()
        message = rf"another run is writing into .* \(process {os.getpid()}\); choose another folder"
        with pytest.raises(UserError, match=message):
            lock_run(tmp_path)
    assert find_holder(tmp_path / ".lock") is None
    assert find_holder(tmp_path / "missing") is None


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_killed_process_leaves_no_lock(tmp_path):
    """... even while a process lives that it has forked, as data workers do for some seconds."""
    command = [sys.executable, "-c", HOLD, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            assert is_locked(tmp_path)
            process.kill()
            process.wait()
            os.killpg(process.pid, 0)  # the forked one lives
            assert not is_locked(tmp_path)
            lock_run(tmp_path).close()
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_on_a_disk_without_locks_a_run_goes_on(code, tmp_path, monkeypatch, caplog):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    with lock_run(tmp_path):
        assert "can't be locked" in caplog.text
        assert not is_locked(tmp_path)
