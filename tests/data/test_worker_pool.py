"""Work in several processes: in order, to the first mistake, and no further than a Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtcl import UserError
from mtcl.data.worker_pool import run_jobs

PROGRAM = """
import sys, time
from pathlib import Path
from mtcl.data.worker_pool import run_jobs
from mtcl.cli.script import run

def work(path):
    time.sleep(0.05)
    path.touch()

if __name__ == "__main__":
    run(lambda: run_jobs(work, [Path(sys.argv[1]) / str(number) for number in range(200)], 2, "files"))
"""


def double(number: int) -> int:
    if number == 13:
        raise UserError("13 is no number.")
    return 2 * number


def test_results_come_in_order_and_the_first_mistake_ends_it() -> None:
    for workers in (0, 1):
        assert run_jobs(double, range(5), workers, "numbers") == [0, 2, 4, 6, 8]
    with pytest.raises(UserError, match="13 is no number"):
        run_jobs(double, range(20), 0, "numbers")


@pytest.mark.slow
def test_ctrl_c_ends_the_work_soon_with_one_word(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    for _ in range(600):  # until the work goes on
        if any((tmp_path / "out").iterdir()):
            break
        time.sleep(0.1)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, output = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.splitlines()[-1] == "interrupted"
    assert "Traceback" not in output
    assert 0 < len(list((tmp_path / "out").iterdir())) < 150
