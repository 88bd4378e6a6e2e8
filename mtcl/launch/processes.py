"""Start, stop and log the processes that train, for studies, sweeps and searches."""

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

EXIT_REQUEUE = 75  # EX_TEMPFAIL: exit code of a preempted run that saved its state; for the scheduler's list


def start_process(
    args: Sequence[str], log: Path, environment: Mapping[str, str], root: Path | None = None
) -> subprocess.Popen:
    """Start a process that writes to ``log``, in its own group: a terminal's Ctrl-C reaches it through us only."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(f"$ {shlex.join(args)}\n")
        file.flush()
        return subprocess.Popen(
            args,
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )


def stop_processes(
    processes: Sequence[subprocess.Popen], number: signal.Signals, patience: float, signals: Sequence[int] = ()
) -> None:
    """Send a signal, and kill the processes that do not end.

    Args:
        processes: Leaders of process groups.
        number: The signal.
        patience: Seconds after which they are killed, with all their children.
        signals: Signals that this process receives; a second one shortens the wait.
    """
    for process in processes:
        process.send_signal(number)
    deadline = time.monotonic() + patience
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline or len(signals) > 1:
            for process in processes:
                kill_process_group(process)
        time.sleep(0.05)


def kill_process_group(process: subprocess.Popen) -> None:
    """Kill a process with all its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def explain_exit(log: Path, code: int) -> str:
    """Return how a process ended: its exit code or signal, and the last line of its log."""
    lines = [line.strip() for line in re.split(r"[\r\n]", log.read_text("utf-8", "replace")) if line.strip()]
    cause = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{cause}: {lines[-1]}" if lines and not lines[-1].startswith("$ ") else cause


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect the signals that would end this process.

    A handler, unlike an ignored signal, is not inherited: the children react to Ctrl-C even where this process
    ignores it, as in the background of a shell's script.
    """
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        previous[number] = signal.getsignal(number)
        is_ignored = previous[number] == signal.SIG_IGN
        signal.signal(number, ignore_signal if is_ignored else lambda caught, _: received.append(caught))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_signal(_number: int, _frame: Any) -> None:
    """Do nothing, as a signal handler."""


def format_duration(seconds: float) -> str:
    """Format seconds for people.

    >>> format_duration(12.3), format_duration(130), format_duration(3900)
    ('12 s', '2 min 10 s', '1 h 05 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
