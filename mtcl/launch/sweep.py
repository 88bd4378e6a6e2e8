"""Sweeps (``train.py -m``): every job is a train.py in a process of its own, whichever of Hydra's launchers starts it.

So what a run does to its process (a crash, no memory left, the kernel's SIGKILL) ends that run only. A job's folder
follows from its words: started again, a sweep skips what is finished and continues what is not.
"""

import contextlib
import hashlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from mtcl.config.diff import changed_meanings, described_changes
from mtcl.config.quoting import quoted
from mtcl.config.schema import role_of
from mtcl.errors import UserError, printable
from mtcl.launch.processes import REQUEUE, caught_signals, duration, killed, reason, started
from mtcl.launch.study_file import bare, is_path, merged
from mtcl.results.columns import column_of, primaries
from mtcl.results.run_files import CONFIG, METRICS, read_config_tree, read_metrics
from mtcl.results.tables import figure
from mtcl.run_lock import is_claimed

NAME_LENGTH, PART_LENGTH = 100, 40  # of the readable part of a job's folder, of one of its words
FOLDERS = ("data.root", "data.cache")  # not in that part
POLL = 0.1  # seconds between two looks at a running job
FINISHED, BEFORE, ELSEWHERE, STOPPED, FAILED = "finished", "finished before", "running elsewhere", "stopped", "failed"


def job_folder(words: Sequence[str], folder: str | Path | None = None) -> str:
    """Name a job's folder: a readable part, and a hash of all its words in whatever order.

    The words that sweeps mostly differ in come first: numbers, then tasks; those of the machine come last. Where
    ``folder``, the sweep's, has one of that hash already (an earlier version called it otherwise), it keeps its name.

    >>> job_folder(["data=nyud", "data.root=/my/data", "seed=1", "regularizer.weight=0.03"])
    'weight-0.03_seed-1_data-nyud_f51555a1'
    >>> job_folder(["data=nyud", "tasks.names=[semseg,depth]"])
    'tasks-semseg-depth_data-nyud_97bf6389'
    """
    words = sorted(word for word in words if word not in ("resume=auto", "resume=null"))
    digest = hashlib.sha256("\n".join(words).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    if folder is not None and len(earlier := list(Path(folder).glob(f"*_{digest}/"))) == 1:
        return earlier[0].name
    pairs = [(bare(key), value) for key, _, value in (word.partition("=") for word in words)]
    shown = [(key, value) for key, value in pairs if key not in FOLDERS and not is_path(key, value)]
    shown.sort(key=_order)
    parts = [_readable(f"{_short(key)}-{value.strip('[]')}")[:PART_LENGTH] for key, value in shown]
    text = _readable("_".join(parts))[:NAME_LENGTH].strip("-_.")
    return f"{text}_{digest}".lstrip("_")


def _short(key: str) -> str:
    """The last part of a key; ``tasks`` of ``tasks.names``, which is no name of its own."""
    return key.removesuffix(".names").rpartition(".")[2]


def _order(pair: tuple[str, str]) -> int:
    key, value = pair
    if role_of(key) not in ("result", "seed"):
        return 3
    return 0 if re.fullmatch(r"[-+.\de]+", value) else 1 if key.partition(".")[0] == "tasks" else 2


def _readable(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).rstrip("-")


OmegaConf.register_new_resolver("job_folder", lambda words, folder=None: job_folder(list(words), folder), replace=True)


@dataclass(frozen=True)
class Outcome:
    """How a job of a sweep ended. Those of other processes and machines come back pickled: wherever one is made or
    unpickled, it is kept in :data:`outcomes`; Hydra gives us none of them itself."""

    number: int
    words: tuple[str, ...]
    ending: str
    reason: str = ""

    def __post_init__(self) -> None:
        outcomes[self.number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return Outcome, astuple(self)


outcomes: dict[int, Outcome] = {}  # of this process's sweep, by the job's number
received: list[int] = []  # signals that told this process to end: no further job is started


class Stopped(BaseException):
    """The sweep was told to end and its job has; goes past Hydra, which takes exceptions for a job's own."""


def run_job(
    command: Sequence[str],
    words: Sequence[str],
    config: Mapping[str, Any],
    folder: Path,
    number: int,
    environment: Mapping[str, str],
    here: bool,
) -> Outcome:
    """``command words`` as a process that trains in ``folder``, unless the run is finished, or running elsewhere.

    ``config``: what the words are composed to. ``here``: in the process that was started as the sweep, one job after
    the other; then what it writes into its log (``folder``'s name and ``.log``) is shown, too.
    """
    told = tuple(words)
    found = state_of(folder, config)
    if found is not None or received:
        say(number, folder, f"{found or STOPPED}{score(folder)}")
        return Outcome(number, told, found or STOPPED)
    resume = ["resume=auto"] if any(folder.glob("checkpoints/*.pt")) else []
    log = folder.with_name(f"{folder.name}.log")
    full = [*command, *merged(words, resume), f"hydra.run.dir={quoted(folder)}"]
    say(number, folder, f"{'continued' if resume else 'started'}, log {log}")
    began = time.monotonic()
    with caught_signals() as signals, followed(log, here):
        process = started(full, log, environment)
        code = waited(process, signals)
    received.extend(signals)
    found = state_of(folder, config)
    if code == 0 and found == BEFORE:
        ending, why = FINISHED, ""
    elif code == REQUEUE or received:
        ending, why = STOPPED, ""
    else:  # another sweep may have taken the folder while ours was starting
        ending, why = found or FAILED, "" if found else f"{reason(log, code)} ({log})"
    say(number, folder, f"{ending} after {duration(time.monotonic() - began)}{score(folder)}{why and f': {why}'}")
    outcome = Outcome(number, told, ending, why)
    if received and here:
        raise Stopped
    return outcome


def say(number: int, folder: Path, text: str) -> None:
    """Write a line on a job to the standard error."""
    print(printable(f"[{number + 1}] {folder.name}: {text}"), file=sys.stderr, flush=True)


def score(folder: Path) -> str:
    """The first task's main metric as the run's end scored it, for a line; "" where it did not."""
    try:
        task, values = next(iter(read_metrics(folder / METRICS).items()))
        metric = next(name for name in primaries(task) if name in values)
    except (UserError, StopIteration):
        return ""
    column = column_of(task, metric)
    return f", {task} {metric} {figure(column, values[metric])} {column.unit}".rstrip()


def state_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    """None: the run in ``folder`` is to be started or continued. ``UserError`` where it is one of another config."""
    if is_claimed(folder):
        return ELSEWHERE
    if not os.path.lexists(folder / CONFIG):
        return None
    saved, now = read_config_tree(folder / CONFIG), dict(config)
    if keys := changed_meanings(saved, now):
        raise UserError(
            f"{folder} holds a run of another config ({described_changes(saved, now, keys)}); "
            "remove it or choose another hydra.sweep.dir"
        )
    return BEFORE if all((folder / name).is_file() for name in ("metrics.json", "run.json")) else None


def waited(process: subprocess.Popen, signals: list[int]) -> int:
    """The process's exit code. Told to end, so is the process, which saves first; told twice, it is killed."""
    parent, asked = os.getppid(), False
    in_pool = multiprocessing.parent_process() is not None
    try:
        while (code := process.poll()) is None:
            if in_pool and os.getppid() != parent and not signals:  # the sweep itself is gone
                signals.append(signal.SIGTERM)
            if signals and not asked:
                process.terminate()
                asked = True
            elif len(signals) > 1:
                killed(process)
            time.sleep(POLL)
        return code
    finally:
        if process.poll() is None:  # an exception out of a launcher's own signal handler
            process.terminate()


@contextlib.contextmanager
def followed(log: Path, shown: bool) -> Iterator[None]:
    """What is added to ``log`` meanwhile goes to the terminal, too."""
    if not shown:
        yield
        return
    done = threading.Event()
    start = log.stat().st_size if log.is_file() else 0

    def copy() -> None:
        with contextlib.ExitStack() as stack:
            file: IO[str] | None = None
            while True:
                last = done.wait(POLL)
                if file is None and log.is_file():
                    file = stack.enter_context(log.open(encoding="utf-8", errors="replace", newline=""))
                    file.seek(start)
                if file is not None:
                    sys.stdout.write(file.read())
                    sys.stdout.flush()
                if last:
                    return

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# The sweep as a whole


@contextlib.contextmanager
def told_to_end() -> Iterator[None]:
    """A signal goes on to the processes of a launcher's pool, which end their runs; with none, or twice, it raises."""

    def hear(number: int, frame: Any) -> None:
        received.append(number)
        pool = multiprocessing.active_children()
        if len(received) > 1 or not pool:
            raise Stopped
        print("told to end: the runs save first (again: at once)", file=sys.stderr, flush=True)
        for process in pool:
            process.terminate()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, hear)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code() -> int:
    """Of the sweep: 130 or 75 where it was told to end, 1 where a run failed."""
    endings = [outcome.ending for outcome in outcomes.values()]
    if received:
        return 130 if received[0] == signal.SIGINT else REQUEUE
    return 1 if FAILED in endings else REQUEUE if STOPPED in endings else 0


def summary() -> list[str]:
    """A line on all jobs, one for each that failed: the words that not all jobs have, and why."""
    found = [outcomes[number] for number in sorted(outcomes)]
    counts = {ending: sum(one.ending == ending for one in found) for ending in (FINISHED, BEFORE, ELSEWHERE, STOPPED)}
    failed = [one for one in found if one.ending == FAILED]
    parts = [f"{count} {ending}" for ending, count in {**counts, FAILED: len(failed)}.items() if count]
    lines = [f"sweep of {len(found)} run{'s' * (len(found) != 1)}: {', '.join(parts)}"]
    common = set.intersection(*(set(one.words) for one in found)) if len(found) > 1 else set()
    for one in failed:
        words = " ".join(word for word in one.words if word not in common)
        lines.append(f"error: {words or f'job {one.number}'}: {one.reason}")
    if failed or counts[STOPPED] or received:
        lines.append("the same command runs what is not finished")
    return lines
