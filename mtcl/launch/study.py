"""Run a study: the runs of one YAML file, several at a time, each in its own process; then write its table.

Definition: :mod:`mtcl.launch.study_file`; numbers and tables: :mod:`mtcl.launch.study_tables`.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mtcl.atomic import write_json, write_text
from mtcl.config.build_data import build_tasks
from mtcl.config.compose import compose_config
from mtcl.config.renamed import upgrade_override
from mtcl.errors import UserError, suggest
from mtcl.launch import study_tables
from mtcl.launch.job import Job
from mtcl.launch.overrides import (
    check_overrides,
    is_file_path,
    make_portable,
    merge_overrides,
    split_override,
)
from mtcl.launch.processes import catch_signals, explain_exit, format_duration, stop_processes
from mtcl.launch.study_file import Study, Variant, read_study
from mtcl.results.run_files import TEXT_LIST, TEXT_MAPPING, check_types, read_json_object, read_record
from mtcl.run_lock import lock_run

ListTasks = Callable[[Sequence[str]], list[str]]
POLL = 0.1  # seconds between two looks at the running processes
PATIENCE = 30.0  # seconds that an interrupted run has to end by itself


@dataclass
class StudyJob(Job):
    """One run of a study; ``overrides`` are all but the seed and the folder."""

    variant: Variant
    seed: int

    @property
    def title(self) -> str:
        """Name the run for people."""
        return f"{self.variant.name} seed {self.seed}"


@dataclass(frozen=True)
class Failure:
    """A run that ended without its metrics, and how it ended."""

    job: StudyJob
    reason: str


class TimeLimitReached(Exception):  # noqa: N818
    """The time limit ended a study: ``remaining`` of its runs are not finished, and the same command continues them."""

    def __init__(self, remaining: int):
        self.remaining = remaining
        super().__init__(f"time limit: {remaining} run{'s' * (remaining > 1)} to go, the same command continues them")


@dataclass(frozen=True)
class Launcher:
    """Describe how runs are started: ``command`` in the folder ``root``, ``num_parallel`` at once.

    After ``time_limit`` seconds (None: never) no more are started, and those that run save their state and end.
    """

    command: Sequence[str]
    root: Path
    num_parallel: int
    say: Callable[[str], None]
    time_limit: float | None = None


def run_study(
    path: Path,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    command: Sequence[str],
    root: Path,
    list_tasks: ListTasks,
    num_parallel: int = 1,
    only: Sequence[str] = (),
    results: Path | None = None,
    table_only: bool = False,
    holm: bool = False,
    metrics: Mapping[str, str] = MappingProxyType({}),
    time_limit: float | None = None,
    say: Callable[[str], None] = print,
) -> list[Failure]:
    """Run the unfinished runs of a study, then write and print its table.

    Args:
        path: The study's YAML file.
        output: The folder of runs and table.
        overrides: Overrides of every run, after the file's.
        command: What trains.
        root: The folder that it is started in.
        list_tasks: Returns the tasks of a run with these overrides; ``UserError`` if train.py would refuse them.
        num_parallel: Runs at once.
        only: The variants to run (``single_task``: all single-task ones); the table has all that are finished.
        results: A folder for one small JSON per run. Runs that have theirs are not run again, and are in the table.
        table_only: Run nothing.
        holm: Base verdicts on p-values corrected by Holm's method.
        metrics: Print the table by these metrics, task -> metric; the table in ``output`` is by the primary ones.
        time_limit: End the runs after so many seconds, with their state saved; the table has what is finished.
        say: Prints a line.

    Returns:
        The runs that failed.

    Raises:
        UserError: A mistake in file or overrides, or ``output`` has runs of other overrides; nothing was started.
        TimeLimitReached: The time limit ended the study before its last run.
    """
    if table_only and not overrides:  # those of the finished runs
        overrides = read_last_overrides(output)
    output = output.resolve()
    study, jobs = plan_study(path, output, overrides, list_tasks)
    stored = find_stored_results(results, study, jobs)
    chosen = [job for job in choose_jobs(path, study, jobs, only) if job.folder not in stored]
    if stored:
        say(f"{results}: {len(stored)} runs have their results there and are not run again")
    failures: list[Failure] = []
    if not table_only:
        check_variants(path, chosen, list_tasks)
        with lock_output(output):
            failures = run_jobs(chosen, overrides, study, Launcher(command, root, num_parallel, say, time_limit))
    repeat_command = format_command(path, study.name, overrides, root)
    write_table(study, jobs, stored, output, repeat_command, results=results, holm=holm, metrics=metrics, say=say)
    failed = {failure.job.folder for failure in failures}
    remaining = sum(not job.is_finished and job.folder not in failed for job in chosen)
    if remaining and not table_only:
        raise TimeLimitReached(remaining)
    return failures


def write_table(
    study: Study,
    jobs: Sequence[StudyJob],
    stored: Mapping[Path, study_tables.Record],
    output: Path,
    repeat_command: str,
    *,
    results: Path | None,
    holm: bool,
    metrics: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """Print the table of the finished runs and write it; for the arguments see :func:`run_study`."""
    records = [
        study_tables.make_record(study, job.variant, job.seed, job.overrides, job.folder)
        if job.is_finished
        else stored[job.folder]
        for job in jobs
        if job.is_finished or job.folder in stored
    ]
    if not records:
        say("no run has finished: there is no table")
        return
    report = study_tables.build_report(study, records, holm)
    printed = study_tables.build_report(study, records, holm, metrics) if metrics else report
    say("\n" + study_tables.format_text(printed))
    write_text(output / "study.md", study_tables.format_markdown(report, repeat_command))
    write_json(output / "study.json", study_tables.to_json(report))
    say(f"{output / 'study.md'} and study.json contain {'the table by primary metrics' if metrics else 'this table'}")
    if results is not None:
        study_tables.write_results(results, study, records, repeat_command)
        say(f"{results}: {len(records)} runs, one file each")


def plan_study(
    path: Path, output: Path, overrides: Sequence[str], list_tasks: ListTasks
) -> tuple[Study, list[StudyJob]]:
    """Read a study; return it with its single-task variants, and all its runs in an order that nothing but it changes.

    Raises:
        UserError: A mistake in file or overrides, or ``output`` has runs of other overrides.
    """
    check_overrides("the command", overrides, "study")
    study = read_study(path)
    if study.single_task is not None:
        common = merge_overrides(study.overrides, overrides, study.single_task.overrides)
        study = study.with_single_task_variants(study.single_task_names or list_tasks(common))
    jobs = list_jobs(study, output, overrides)
    for job in jobs:
        check_same_settings(job, study.environment)
    return study, jobs


def choose_jobs(path: Path, study: Study, jobs: Sequence[StudyJob], only: Sequence[str]) -> list[StudyJob]:
    """Return the runs of the variants ``only``; all, where it is empty."""
    for name in only:
        if not any(is_chosen(variant, [name]) for variant in study.variants):
            names = [variant.name for variant in study.variants]
            hint = suggest(name, names)
            raise UserError(f"--only {name}: {path} has no such variant{hint}; choose among {', '.join(names)}.")
    return [job for job in jobs if not only or is_chosen(job.variant, only)]


def check_variants(path: Path, jobs: Sequence[StudyJob], list_tasks: ListTasks) -> None:
    """Raise ``UserError`` where train.py would refuse the overrides of a variant with unfinished runs."""
    jobs_by_variant = {job.variant.name: job for job in reversed(jobs) if not job.is_finished}
    for job in jobs_by_variant.values():
        try:
            list_tasks(job.overrides)
        except UserError as error:
            raise UserError(f"{path}: {job.variant.name}: {error}") from error


def find_stored_results(
    results: Path | None, study: Study, jobs: Sequence[StudyJob]
) -> dict[Path, study_tables.Record]:
    """Return the records in ``results`` of runs that are not finished in their own folders, run folder -> record.

    So a study goes on where only its results were kept, as in a repository.

    Raises:
        UserError: The folder holds another study's results, or a record is of other settings.
    """
    if results is None or not (results / "study.json").is_file():
        return {}
    earlier, records, _ = study_tables.read_results(results)
    study_tables.check_same_study(results, earlier.name, study.name)
    unfinished = {(job.variant.name, job.seed): job for job in jobs if not job.is_finished}
    stored = {}
    for record in records:
        job = unfinished.get((record["arm"], record["seed"]))
        if job is not None:
            overrides = list(map(upgrade_override, record.get("overrides", [])))
            settings = (overrides, earlier.environment), (job.overrides, study.environment)
            if changes := describe_changes(*settings):
                file = results / study_tables.name_result(record)
                raise UserError(f"{file} is of other settings ({changes}); give the same or choose another --results.")
            stored[job.folder] = record
    return stored


def is_chosen(variant: Variant, only: Sequence[str]) -> bool:
    """Is this variant among those to run?"""
    return variant.name in only or (bool(variant.task) and "single_task" in only)


def list_jobs(study: Study, output: Path, overrides: Sequence[str]) -> list[StudyJob]:
    """Return every run, seed by seed, so that a study that is stopped early has complete pairs."""
    seeds = list(dict.fromkeys(seed for variant in study.variants for seed in variant.seeds))
    return [
        StudyJob(
            output / variant.name / f"seed_{seed}",
            tuple(merge_overrides(study.overrides, variant.overrides, overrides)),
            variant,
            seed,
        )
        for seed in seeds
        for variant in study.variants
        if seed in variant.seeds
    ]


def compose_task_names(overrides: Sequence[str], configs: Path) -> list[str]:
    """Return the tasks of train.py with these overrides; ``UserError`` if it would refuse them."""
    return list(build_tasks(compose_config(overrides, configs)))


# Earlier runs


def check_same_settings(job: StudyJob, environment: Mapping[str, str]) -> None:
    """Raise ``UserError`` where the job's folder has a run, finished or to be resumed, of other overrides."""
    run = job.run_folder
    if not job.can_resume and not run.metrics.is_file():
        return
    advice = "remove the folder or choose another --output"
    if job.record.is_file():
        earlier = read_job(job.record)
    elif run.record.is_file():
        earlier = {"overrides": read_record(run.record).get("overrides", []), "environment": environment}
    else:
        raise UserError(f"{job.folder} has a run that this study did not start; {advice}.")
    settings = (earlier.get("overrides", []), earlier.get("environment", {})), (job.overrides, environment)
    if changes := describe_changes(*settings):
        raise UserError(f"{job.folder} was made by other settings ({changes}); {advice}.")


def describe_changes(
    earlier: tuple[Sequence[str], Mapping[str, str]], later: tuple[Sequence[str], Mapping[str, str]]
) -> str:
    """Say what differs between two pairs of overrides and environment, apart from a machine's; empty: nothing."""
    old, new = (dict(map(split_override, make_portable(pair[0]))) | dict(pair[1]) for pair in (earlier, later))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "; ".join(f"{key} was {old.get(key, 'not set')}, now {new.get(key, 'not set')}" for key in changed)


def read_last_overrides(output: Path) -> list[str]:
    """Return the overrides of the command that started the newest run in ``output``."""
    records = sorted(output.glob("*/seed_*.json"), key=lambda path: path.stat().st_mtime)
    return list(read_job(records[-1]).get("given", [])) if records else []


def read_job(path: Path) -> dict[str, Any]:
    """Read what :func:`write_job` wrote of a job."""
    content = read_json_object(path)
    check_types(path, content, {"overrides": TEXT_LIST, "given": TEXT_LIST, "environment": TEXT_MAPPING})
    lists = {key: list(map(upgrade_override, content[key])) for key in ("overrides", "given") if key in content}
    return content | lists


@contextlib.contextmanager
def lock_output(output: Path) -> Iterator[None]:
    """Lock ``output`` against other studies."""
    try:
        lock = lock_run(output)
    except UserError as error:
        raise UserError(f"another study is running in {output}; wait for it or choose another --output.") from error
    with lock:
        yield


def format_command(path: Path, name: str, overrides: Sequence[str], root: Path) -> str:
    """Return the command for others to repeat; folders and files of this machine become shell variables or go."""
    file = path.resolve().relative_to(root.resolve()) if path.resolve().is_relative_to(root.resolve()) else path.name
    parts = ["python scripts/study.py", shlex.quote(str(file)), f"--output outputs/{name}"]
    for override in overrides:
        key, value = split_override(override)
        prefixed = override.partition("=")[0]
        if key == "data.root":
            parts.append("data.root=$DATA")
        elif is_file_path(key, value) and make_portable([override]):
            parts.append(f"{prefixed}=${re.sub('[^A-Z]', '_', key.rpartition('.')[2].upper())}")
        elif make_portable([override]):
            parts.append(shlex.quote(override))
    return " ".join(parts)


# Running


def run_jobs(jobs: Sequence[StudyJob], overrides: Sequence[str], study: Study, launcher: Launcher) -> list[Failure]:
    """Run the unfinished jobs, several at once, and wait for runs that processes of an earlier study still hold.

    Args:
        jobs: All jobs, finished ones included.
        overrides: Those of the command, for the jobs' records.
        study: The study.
        launcher: How runs are started.

    Returns:
        The jobs that failed.

    Raises:
        KeyboardInterrupt: A signal ended the runs; they can be resumed.
    """
    queue = JobQueue(jobs, overrides, study, launcher)
    say = launcher.say
    with catch_signals() as signals:
        while (queue.waiting or queue.running) and not signals and not queue.is_out_of_time:
            queue.start_jobs()
            queue.collect_jobs()
            time.sleep(POLL)
        if signals and (queue.running or queue.waiting):
            say(f"interrupted: ending {len(queue.running)} run{'s' * (len(queue.running) != 1)}")
            stop_processes(list(queue.running), signal.SIGTERM, PATIENCE, signals)
            say("the same command continues this study")
            raise KeyboardInterrupt
        if queue.running:
            say(f"time limit: ending {len(queue.running)} run{'s' * (len(queue.running) != 1)}")
            stop_processes(list(queue.running), signal.SIGTERM, PATIENCE, signals)
    return queue.failures


class JobQueue:
    """The jobs of a study that wait, run and failed."""

    def __init__(self, jobs: Sequence[StudyJob], overrides: Sequence[str], study: Study, launcher: Launcher) -> None:
        self.overrides, self.study, self.launcher, self.say = overrides, study, launcher, launcher.say
        self.waiting = [job for job in jobs if not job.is_finished]
        self.total = len(jobs)
        self.num_done = self.num_started = self.total - len(self.waiting)
        self.running: dict[subprocess.Popen, tuple[StudyJob, float]] = {}
        self.failures: list[Failure] = []
        self.durations: list[float] = []
        self.start_time = time.monotonic()
        self.say(f"{study.name}: {self.total} runs, {self.num_done} of them finished before")
        for job in self.waiting:
            if job.is_locked:
                self.say(f"{job.title} is still run by a process of a study that was killed: waiting for it")

    @property
    def is_out_of_time(self) -> bool:
        """Has the study run for as long as it may?"""
        limit = self.launcher.time_limit
        return limit is not None and time.monotonic() - self.start_time >= limit

    def start_jobs(self) -> None:
        """Start jobs that no process holds, as far as there are free slots."""
        while self.waiting and len(self.running) < self.launcher.num_parallel:
            job = next((job for job in self.waiting if not job.is_locked), None)
            if job is None:  # processes of a study that was killed hold all of them
                return
            self.waiting.remove(job)
            self.num_started += 1
            if job.is_finished:
                self.num_done += 1
                self.say(f"[{self.num_done}/{self.total}] {job.title} finished by a process of an earlier study")
                continue
            verb = "continued" if job.can_resume else "started"
            self.running[start_job(job, self.overrides, self.study, self.launcher)] = (job, time.monotonic())
            self.say(f"[{self.num_started}/{self.total}] {job.title} {verb}, log {job.log}")

    def collect_jobs(self) -> None:
        """Report the jobs that have ended since the last call."""
        for process in [process for process in self.running if process.poll() is not None]:
            job, job_start = self.running.pop(process)
            self.num_done += 1
            self.durations.append(time.monotonic() - job_start)
            outcome = "finished"
            if process.returncode != 0 or not job.is_finished:
                self.failures.append(Failure(job, explain_exit(job.log, process.returncode)))
                outcome = f"FAILED ({self.failures[-1].reason})"
            starts = [start for _, start in self.running.values()]
            seconds = estimate_remaining(self.durations, starts, len(self.waiting), self.launcher.num_parallel)
            remaining = f", about {format_duration(seconds)} left" if self.waiting or self.running else ""
            elapsed = format_duration(time.monotonic() - self.start_time)
            duration = format_duration(self.durations[-1])
            self.say(
                f"[{self.num_done}/{self.total}] {job.title} {outcome} after {duration}; {elapsed} so far{remaining}"
            )


def start_job(job: StudyJob, overrides: Sequence[str], study: Study, launcher: Launcher) -> subprocess.Popen:
    """Write the job's record and start its process."""
    write_job(job, overrides, study)
    environment = {**os.environ, **study.environment}
    return job.start(launcher.command, environment, launcher.root, [f"seed={job.seed}"])


def write_job(job: StudyJob, overrides: Sequence[str], study: Study) -> None:
    """Make the job's folder and write its record beside it."""
    job.folder.mkdir(parents=True, exist_ok=True)
    record = {
        "study": study.name,
        "arm": job.variant.name,
        "seed": job.seed,
        "overrides": job.overrides,
        "given": overrides,
        "environment": study.environment,
    }
    write_json(job.record, record)


def estimate_remaining(
    durations: Sequence[float], starts: Sequence[float], num_waiting: int, num_parallel: int
) -> float:
    """Return the seconds to go if every run takes as long as the finished ones did on average."""
    mean, now = sum(durations) / len(durations), time.monotonic()
    return (mean * num_waiting + sum(max(mean - (now - start), 0) for start in starts)) / num_parallel


def format_failures(failures: Sequence[Failure]) -> str:
    """Return one sentence on the runs that failed."""
    texts = "; ".join(f"{failure.job.title}: {failure.reason} ({failure.job.log})" for failure in failures)
    return f"{len(failures)} run{'s' * (len(failures) > 1)} failed, the same command tries again: {texts}"
