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

from mtcl.config.diff import find_changed_experiment_keys, format_changes
from mtcl.config.quoting import quote_value
from mtcl.config.schema import role_of
from mtcl.errors import UserError, escape_control_characters
from mtcl.launch.processes import EXIT_REQUEUE, catch_signals, format_duration, killed, reason, started
from mtcl.launch.study_file import is_file_path, merge_overrides, strip_prefix
from mtcl.results.columns import make_column, primary_metrics
from mtcl.results.run_files import read_metrics, read_nested_config
from mtcl.results.tables import format_value
from mtcl.run_folder import CONFIG, METRICS
from mtcl.run_lock import is_locked

NAME_LENGTH, PART_LENGTH = 100, 40  # of the readable part of a job's folder, of one of its words
FOLDERS = ("data.root", "data.cache")  # not in that part
POLL = 0.1  # seconds between two looks at a running job
FINISHED, FINISHED_EARLIER, RUNNING_ELSEWHERE, STOPPED, FAILED = (
    "finished",
    "finished before",
    "running elsewhere",
    "stopped",
    "failed",
)


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
    pairs = [(strip_prefix(key), value) for key, _, value in (word.partition("=") for word in words)]
    shown = [(key, value) for key, value in pairs if key not in FOLDERS and not is_file_path(key, value)]
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
class JobOutcome:
    """How a job of a sweep ended. Those of other processes and machines come back pickled: wherever one is made or
    unpickled, it is kept in :data:`job_outcomes`; Hydra gives us none of them itself."""

    number: int
    words: tuple[str, ...]
    ending: str
    reason: str = ""

    def __post_init__(self) -> None:
        job_outcomes[self.number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return JobOutcome, astuple(self)


job_outcomes: dict[int, JobOutcome] = {}  # of this process's sweep, by the job's number
received_signals: list[int] = []  # signals that told this process to end: no further job is started


class SweepStopped(BaseException):
    """The sweep was told to end and its job has; goes past Hydra, which takes exceptions for a job's own."""


def run_job(
    command: Sequence[str],
    words: Sequence[str],
    config: Mapping[str, Any],
    folder: Path,
    number: int,
    environment: Mapping[str, str],
    here: bool,
) -> JobOutcome:
    """``command words`` as a process that trains in ``folder``, unless the run is finished, or running elsewhere.

    ``config``: what the words are composed to. ``here``: in the process that was started as the sweep, one job after
    the other; then what it writes into its log (``folder``'s name and ``.log``) is shown, too.
    """
    told = tuple(words)
    found = find_run_state(folder, config)
    if found is not None or received_signals:
        say(number, folder, f"{found or STOPPED}{score(folder)}")
        return JobOutcome(number, told, found or STOPPED)
    resume = ["resume=auto"] if any(folder.glob("checkpoints/*.pt")) else []
    log = folder.with_name(f"{folder.name}.log")
    full = [*command, *merge_overrides(words, resume), f"hydra.run.dir={quote_value(folder)}"]
    say(number, folder, f"{'continued' if resume else 'started'}, log {log}")
    began = time.monotonic()
    with catch_signals() as signals, follow_log(log, here):
        process = started(full, log, environment)
        code = wait_for_process(process, signals)
    received_signals.extend(signals)
    found = find_run_state(folder, config)
    if code == 0 and found == FINISHED_EARLIER:
        ending, why = FINISHED, ""
    elif code == EXIT_REQUEUE or received_signals:
        ending, why = STOPPED, ""
    else:  # another sweep may have taken the folder while ours was starting
        ending, why = found or FAILED, "" if found else f"{reason(log, code)} ({log})"
    say(
        number, folder, f"{ending} after {format_duration(time.monotonic() - began)}{score(folder)}{why and f': {why}'}"
    )
    outcome = JobOutcome(number, told, ending, why)
    if received_signals and here:
        raise SweepStopped
    return outcome


def say(number: int, folder: Path, text: str) -> None:
    """Write a line on a job to the standard error."""
    print(escape_control_characters(f"[{number + 1}] {folder.name}: {text}"), file=sys.stderr, flush=True)


def score(folder: Path) -> str:
    """The first task's main metric as the run's end scored it, for a line; "" where it did not."""
    try:
        task, values = next(iter(read_metrics(folder / METRICS).items()))
        metric = next(name for name in primary_metrics(task) if name in values)
    except (UserError, StopIteration):
        return ""
    column = make_column(task, metric)
    return f", {task} {metric} {format_value(column, values[metric])} {column.unit}".rstrip()


def find_run_state(folder: Path, config: Mapping[str, Any]) -> str | None:
    """None: the run in ``folder`` is to be started or continued. ``UserError`` where it is one of another config."""
    if is_locked(folder):
        return RUNNING_ELSEWHERE
    if not os.path.lexists(folder / CONFIG):
        return None
    saved, now = read_nested_config(folder / CONFIG), dict(config)
    if keys := find_changed_experiment_keys(saved, now):
        raise UserError(
            f"{folder} holds a run of another config ({format_changes(saved, now, keys)}); "
            "remove it or choose another hydra.sweep.dir"
        )
    return FINISHED_EARLIER if all((folder / name).is_file() for name in ("metrics.json", "run.json")) else None


def wait_for_process(process: subprocess.Popen, signals: list[int]) -> int:
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
def follow_log(log: Path, shown: bool) -> Iterator[None]:
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
def forward_signals() -> Iterator[None]:
    """A signal goes on to the processes of a launcher's pool, which end their runs; with none, or twice, it raises."""

    def hear(number: int, frame: Any) -> None:
        received_signals.append(number)
        pool = multiprocessing.active_children()
        if len(received_signals) > 1 or not pool:
            raise SweepStopped
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
    endings = [outcome.ending for outcome in job_outcomes.values()]
    if received_signals:
        return 130 if received_signals[0] == signal.SIGINT else EXIT_REQUEUE
    return 1 if FAILED in endings else EXIT_REQUEUE if STOPPED in endings else 0


def summary() -> list[str]:
    """A line on all jobs, one for each that failed: the words that not all jobs have, and why."""
    found = [job_outcomes[number] for number in sorted(job_outcomes)]
    counts = {
        ending: sum(one.ending == ending for one in found)
        for ending in (FINISHED, FINISHED_EARLIER, RUNNING_ELSEWHERE, STOPPED)
    }
    failed = [one for one in found if one.ending == FAILED]
    parts = [f"{count} {ending}" for ending, count in {**counts, FAILED: len(failed)}.items() if count]
    lines = [f"sweep of {len(found)} run{'s' * (len(found) != 1)}: {', '.join(parts)}"]
    common = set.intersection(*(set(one.words) for one in found)) if len(found) > 1 else set()
    for one in failed:
        words = " ".join(word for word in one.words if word not in common)
        lines.append(f"error: {words or f'job {one.number}'}: {one.reason}")
    if failed or counts[STOPPED] or received_signals:
        lines.append("the same command runs what is not finished")
    return lines
