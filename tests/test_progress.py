"""Progress in a file or pipe is lines; in a terminal it is tqdm's bar."""

import io
import sys

from tqdm import tqdm

from mtcl import progress
from mtcl.progress import PlainProgress, progress_bar


def test_a_file_gets_lines_that_stand_alone(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("mtcl.progress.time.monotonic", lambda: clock[0])
    with progress_bar(total=100, initial=10, desc="train", unit="step") as bar:
        for step in range(10, 100):
            clock[0] += 1.0
            bar.set_postfix_str(f"loss {step}")
            bar.update()
    lines = capsys.readouterr().err
    assert "\r" not in lines
    assert lines.splitlines() == [
        "train: 40/100 steps (40 %), 1.00 steps/s, 00:30 passed, 01:00 to go, loss 39",
        "train: 70/100 steps (70 %), 1.00 steps/s, 01:00 passed, 00:30 to go, loss 69",
        "train: 100/100 steps (100 %), 1.00 steps/s, 01:30 passed, loss 99",
    ]


def test_a_short_loop_is_silent(capsys):
    assert list(progress_bar(range(3), desc="evaluate", leave=False)) == [0, 1, 2]
    assert list(progress_bar(range(3), desc="train", disable=True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert PlainProgress(iter("ab"), desc="frames").format_line(4.0) == "frames: 0, 00:04 passed"


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.logging_beside_bar(), progress_bar(range(3), desc="train", disable=True) as bar:
        assert isinstance(bar, tqdm)
