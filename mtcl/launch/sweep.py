"""Run sweeps (``train.py -m``): every job is a train.py in its own process, whichever of Hydra's launchers starts it.

A failure that ends a process (a crash, no memory, SIGKILL) ends that run only. A job's folder follows from its
overrides: started again, a sweep skips finished runs and resumes the others.
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
from mtcl.config.schema import MACHINE, PATH_KEYS, role_of
from mtcl.errors import UserError, escape_control_characters
from mtcl.launch.job import Job
from mtcl.launch.overrides import is_file_path, split_override
from mtcl.launch.processes import EXIT_REQUEUE, catch_signals, explain_exit, format_duration, kill_process_group
from mtcl.results.columns import make_column, primary_metrics
from mtcl.results.run_files import read_metrics, read_nested_config
from mtcl.results.tables import format_value
from mtcl.run_folder import RunFolder

NAME_LENGTH, PART_LENGTH = 100, 40  # of the readable part of a job's folder, of one of its overrides
FOLDERS = tuple(key for key in PATH_KEYS if role_of(key) == MACHINE)  # not in that part
POLL = 0.1  # seconds between two looks at a running job
FINISHED, FINISHED_EARLIER, RUNNING_ELSEWHERE, STOPPED, FAILED = (
    "finished",
    "finished before",
    "running elsewhere",
    "stopped",
    "failed",
)


def job_folder(overrides: Sequence[str], folder: str | Path | None = None) -> str:
    """Return the name of a job's folder: a readable part, and a hash of all its overrides in any order.

    Overrides in which sweeps mostly differ come first: numbers, then tasks; those of the machine come last. A folder
    of that hash in ``folder``, the sweep's, keeps its name, which an earlier version may have chosen differently.

    >>> job_folder(["data=nyud", "data.root=/my/data", "seed=1", "regularizer.weight=0.03"])
    'weight-0.03_seed-1_data-nyud_f51555a1'
    >>> job_folder(["data=nyud", "tasks.names=[semseg,depth]"])
    'tasks-semseg-depth_data-nyud_97bf6389'
    """
    overrides = sorted(override for override in overrides if override not in ("resume=auto", "resume=null"))
    digest = hashlib.sha256("\n".join(overrides).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    if folder is not None and len(earlier := list(Path(folder).glob(f"*_{digest}/"))) == 1:
        return earlier[0].name
    pairs = [split_override(override) for override in overrides]
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


OmegaConf.register_new_resolver(
    "job_folder", lambda overrides, folder=None: job_folder(list(overrides), folder), replace=True
)


@dataclass(frozen=True)
class JobOutcome:
    """How a job of a sweep ended.

    Outcomes of other processes and machines come back pickled. Wherever one is constructed or unpickled, it is added to
    :data:`job_outcomes`, as Hydra does not return them.
    """

    number: int
    overrides: tuple[str, ...]
    ending: str
    reason: str = ""

    def __post_init__(self) -> None:
        job_outcomes[self.number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return JobOutcome, astuple(self)


job_outcomes: dict[int, JobOutcome] = {}  # of this process's sweep, by the job's number
received_signals: list[int] = []  # signals that ended this process: no further job is started


class SweepStopped(BaseException):
    """The sweep was stopped by a signal; not an ``Exception``, which Hydra would take for a job's own."""


def run_job(
    command: Sequence[str],
    overrides: Sequence[str],
    config: Mapping[str, Any],
    folder: Path,
    number: int,
    environment: Mapping[str, str],
    in_main_process: bool,
) -> JobOutcome:
    """Train in a process, unless the run is finished or running elsewhere.

    Args:
        command: What trains.
        overrides: Those of the job.
        config: The config composed from them.
        folder: The run folder.
        number: The job's number.
        environment: The process's environment variables.
        in_main_process: Whether this process was started as the sweep; then the run's log is shown, too.
    """
    job = Job(folder, tuple(overrides))
    state = find_run_state(folder, config)
    if state is not None or received_signals:
        say(number, folder, f"{state or STOPPED}{format_score(folder)}")
        return JobOutcome(number, job.overrides, state or STOPPED)
    say(number, folder, f"{'continued' if job.can_resume else 'started'}, log {job.log}")
    start_time = time.monotonic()
    with catch_signals() as signals, follow_log(job.log, in_main_process):
        process = job.start(command, environment)
        code = wait_for_process(process, signals)
    received_signals.extend(signals)
    state = find_run_state(folder, config)
    ending, reason = state or FAILED, "" if state else f"{explain_exit(job.log, code)} ({job.log})"
    if code == 0 and state == FINISHED_EARLIER:
        ending, reason = FINISHED, ""
    elif code == EXIT_REQUEUE or received_signals:
        ending, reason = STOPPED, ""
    duration = format_duration(time.monotonic() - start_time)
    say(number, folder, f"{ending} after {duration}{format_score(folder)}{reason and f': {reason}'}")
    outcome = JobOutcome(number, job.overrides, ending, reason)
    if received_signals and in_main_process:
        raise SweepStopped
    return outcome


def say(number: int, folder: Path, text: str) -> None:
    """Print a line on a job to the standard error."""
    print(escape_control_characters(f"[{number + 1}] {folder.name}: {text}"), file=sys.stderr, flush=True)


def format_score(folder: Path) -> str:
    """Return the first task's final main metric, for a line; "" without one."""
    try:
        task, values = next(iter(read_metrics(RunFolder(folder).metrics).items()))
        metric = next(name for name in primary_metrics(task) if name in values)
    except (UserError, StopIteration):
        return ""
    column = make_column(task, metric)
    return f", {task} {metric} {format_value(column, values[metric])} {column.unit}".rstrip()


def find_run_state(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the state of the run in ``folder``; None: start or resume it.

    Raises:
        UserError: It is a run of another config.
    """
    run = RunFolder(folder)
    if run.is_locked:
        return RUNNING_ELSEWHERE
    if not os.path.lexists(run.config):
        return None
    saved, new = read_nested_config(run.config), dict(config)
    if keys := find_changed_experiment_keys(saved, new):
        raise UserError(
            f"{folder} holds a run of another config ({format_changes(saved, new, keys)}); "
            "remove it or choose another hydra.sweep.dir"
        )
    return FINISHED_EARLIER if run.is_finished else None


def wait_for_process(process: subprocess.Popen, signals: list[int]) -> int:
    """Return the process's exit code; a signal is passed on to it, a second one kills it."""
    parent, is_terminated = os.getppid(), False
    in_pool = multiprocessing.parent_process() is not None
    try:
        while (code := process.poll()) is None:
            if in_pool and os.getppid() != parent and not signals:  # the sweep itself is gone
                signals.append(signal.SIGTERM)
            if signals and not is_terminated:
                process.terminate()
                is_terminated = True
            elif len(signals) > 1:
                kill_process_group(process)
            time.sleep(POLL)
        return code
    finally:
        # An exception out of a launcher's own signal handler, such as submitit's for SIGUSR2.
        if process.poll() is None:
            process.terminate()
            process.wait()  # it saves; Slurm kills what is left of a job once this process has ended


@contextlib.contextmanager
def follow_log(log: Path, shown: bool) -> Iterator[None]:
    """Copy to the terminal what is added to ``log``."""
    if not shown:
        yield
        return
    is_over = threading.Event()
    start = log.stat().st_size if log.is_file() else 0

    def copy() -> None:
        with contextlib.ExitStack() as stack:
            file: IO[str] | None = None
            while True:
                last = is_over.wait(POLL)
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
        is_over.set()
        thread.join()


# The sweep as a whole


@contextlib.contextmanager
def forward_signals() -> Iterator[None]:
    """Pass signals on to the processes of a launcher's pool; without a pool, or a second time, raise."""

    def handle(number: int, _frame: Any) -> None:
        received_signals.append(number)
        pool = multiprocessing.active_children()
        if len(received_signals) > 1 or not pool:
            raise SweepStopped
        print("stopping: the runs save first (a second signal stops them at once)", file=sys.stderr, flush=True)
        for process in pool:
            process.terminate()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def exit_code() -> int:
    """Return the sweep's exit code: 130 or 75 where a signal stopped it, 1 where a run failed."""
    endings = [outcome.ending for outcome in job_outcomes.values()]
    if received_signals:
        return 130 if received_signals[0] == signal.SIGINT else EXIT_REQUEUE
    return 1 if FAILED in endings else EXIT_REQUEUE if STOPPED in endings else 0


def summary() -> list[str]:
    """Return a line on all jobs and one per failed job: the overrides that not all jobs have, and the reason."""
    outcomes = [job_outcomes[number] for number in sorted(job_outcomes)]
    counts = {
        ending: sum(outcome.ending == ending for outcome in outcomes)
        for ending in (FINISHED, FINISHED_EARLIER, RUNNING_ELSEWHERE, STOPPED)
    }
    failed = [outcome for outcome in outcomes if outcome.ending == FAILED]
    parts = [f"{count} {ending}" for ending, count in {**counts, FAILED: len(failed)}.items() if count]
    lines = [f"sweep of {len(outcomes)} run{'s' * (len(outcomes) != 1)}: {', '.join(parts)}"]
    common = set.intersection(*(set(outcome.overrides) for outcome in outcomes)) if len(outcomes) > 1 else set()
    for outcome in failed:
        overrides = " ".join(override for override in outcome.overrides if override not in common)
        lines.append(f"error: {overrides or f'job {outcome.number}'}: {outcome.reason}")
    if failed or counts[STOPPED] or received_signals:
        lines.append("the same command runs what is not finished")
    return lines
