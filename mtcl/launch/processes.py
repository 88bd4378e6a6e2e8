"""Processes that train, as a study, a sweep or a search starts them: their words, their logs, how they are ended."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

EXIT_REQUEUE = (
    75  # EX_TEMPFAIL: the exit code of a run that saved and made room; for the scheduler's list of such codes
)


def started(
    words: Sequence[str], log: Path, environment: Mapping[str, str], root: Path | None = None
) -> subprocess.Popen:
    """A process that writes into ``log``, in a group of its own: a terminal's Ctrl-C reaches it through us only."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(f"$ {shlex.join(words)}\n")
        file.flush()
        return subprocess.Popen(
            words,
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )


def ended(
    processes: Sequence[subprocess.Popen], number: signal.Signals, patience: float, signals: Sequence[int] = ()
) -> None:
    """Send the signal; those that do not end in time, or until a second of ``signals`` comes in, are killed with all
    their children."""
    for process in processes:
        process.send_signal(number)
    deadline = time.monotonic() + patience
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline or len(signals) > 1:
            for process in processes:
                killed(process)
        time.sleep(0.05)


def killed(process: subprocess.Popen) -> None:
    """With all its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def reason(log: Path, code: int) -> str:
    """How a process ended: the last line of its log, or what is known where that says nothing."""
    lines = [line.strip() for line in re.split(r"[\r\n]", log.read_text("utf-8", "replace")) if line.strip()]
    how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}: {lines[-1]}" if lines and not lines[-1].startswith("$ ") else how


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """The signals that asked this process to end, in place of being ended by them.

    A handler, unlike an ignored signal, is not inherited: the children hear Ctrl-C even where we do not, as in the
    background of a shell's script.
    """
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.getsignal(number)
        is_ignored = before[number] == signal.SIG_IGN
        signal.signal(number, ignore_signal if is_ignored else lambda heard, frame: received.append(heard))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signal(number: int, frame: Any) -> None:
    """A signal handler."""


def format_duration(seconds: float) -> str:
    """
    >>> duration(12.3), duration(130), duration(3900)
    ('12 s', '2 min 10 s', '1 h 05 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
