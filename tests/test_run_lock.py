"""One process at a time writes into a run folder."""

import pytest

from mtcl import UserError
from mtcl.run_lock import is_locked, lock_run


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
