"""A study: the runs of one YAML file, several at a time, each in a process of its own; then their table.

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
from typing import Any

from mtcl.atomic import write_json, write_text
from mtcl.config.build_data import build_tasks
from mtcl.config.compose import compose_config
from mtcl.config.quoting import quote_value
from mtcl.config.renamed import upgrade_override
from mtcl.errors import UserError
from mtcl.launch import study_tables
from mtcl.launch.processes import catch_signals, ended, format_duration, reason, started
from mtcl.launch.study_file import (
    Study,
    Variant,
    check_overrides,
    is_file_path,
    make_portable,
    merge_overrides,
    read_study,
    strip_prefix,
)
from mtcl.results.run_files import TEXT_LIST, TEXT_MAPPING, check_types, read_json_object, read_record
from mtcl.run_lock import is_locked, lock_run

TasksOf = Callable[[Sequence[str]], list[str]]
POLL = 0.1  # seconds between two looks at the running processes
PATIENCE = 30.0  # seconds that an interrupted run has to end by itself


@dataclass(frozen=True)
class Job:
    """One run of a study: in ``folder``, with its record and log beside it."""

    variant: Variant
    seed: int
    folder: Path
    overrides: tuple[str, ...]  # all but the seed and the folder

    @property
    def title(self) -> str:
        return f"{self.variant.name} seed {self.seed}"

    @property
    def record(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def is_finished(self) -> bool:
        return all((self.folder / name).is_file() for name in ("metrics.json", "run.json"))

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.pt"


@dataclass(frozen=True)
class Failure:
    """A run that ended without its numbers. ``reason``: the last line of its log."""

    job: Job
    reason: str


def run_study(
    path: Path,
    output: Path,
    given: Sequence[str] = (),
    *,
    command: Sequence[str],
    root: Path,
    tasks_of: TasksOf,
    num_parallel: int = 1,
    only: Sequence[str] = (),
    results: Path | None = None,
    table_only: bool = False,
    holm: bool = False,
    say: Callable[[str], None] = print,
) -> list[Failure]:
    """Run what is not finished of the study in ``path``, write and show its table; the runs that failed.

    ``given``: overrides of every run, on top of the file's. ``command``: what trains, started in ``root`` with the
    overrides as words. ``tasks_of``: the tasks of a run with these overrides, ``UserError`` if train.py would refuse
    them. ``only``: the arms (with ``singles``, all of theirs) to run; the table is of all that is there. ``results``:
    a folder for one small JSON per run. ``holm``: verdicts by corrected p-values. ``UserError`` before anything is
    started where an earlier run in ``output`` was made by other overrides.
    """
    check_overrides("the command", given)
    study = read_study(path)
    if table_only and not given:  # those of the runs that are there
        given = read_last_overrides(output)
    output = output.resolve()
    common = merge_overrides(study.overrides, given)
    if study.single_task is not None:
        study = study.with_single_task_variants(
            study.single_task_names or tasks_of(merge_overrides(common, study.single_task.overrides))
        )
    jobs = list_jobs(study, output, given)
    chosen = [job for job in jobs if not only or is_chosen(job.variant, only)]
    for name in only:
        if not any(is_chosen(variant, [name]) for variant in study.variants):
            raise UserError(
                f"--only {name}: {path} has no such arm; choose among {', '.join(a.name for a in study.variants)}."
            )
    for job in jobs:
        check_same(job, study.environment)
    failures: list[Failure] = []
    if not table_only:
        wanted = {job.variant.name: job for job in reversed(chosen) if not job.is_finished}
        for job in wanted.values():
            try:
                tasks_of(job.overrides)
            except UserError as error:
                raise UserError(f"{path}: {job.variant.name}: {error}") from error
        with lock_output(output):
            failures = run_jobs(chosen, given, study, command, root, num_parallel, say)
    records = [
        study_tables.record(study, job.variant, job.seed, job.overrides, job.folder) for job in jobs if job.is_finished
    ]
    if not records:
        say("no run has finished: there is no table")
        return failures
    report = study_tables.report(study, records, holm)
    say("\n" + study_tables.format_text(report))
    how = format_command(path, study.name, given, root)
    write_text(output / "study.md", study_tables.format_markdown(report, how))
    write_json(output / "study.json", study_tables.to_json(report))
    say(f"{output / 'study.md'} and study.json hold this table")
    if results is not None:
        study_tables.write_results(results, study, records, how)
        say(f"{results}: {len(records)} runs, one file each")
    return failures


def is_chosen(variant: Variant, only: Sequence[str]) -> bool:
    return variant.name in only or (bool(variant.task) and "singles" in only)


def list_jobs(study: Study, output: Path, given: Sequence[str]) -> list[Job]:
    """Every run, seed by seed: a study that is stopped early has whole pairs."""
    order = list(dict.fromkeys(seed for variant in study.variants for seed in variant.seeds))
    return [
        Job(
            variant,
            seed,
            output / variant.name / f"seed_{seed}",
            tuple(merge_overrides(study.overrides, variant.overrides, given)),
        )
        for seed in order
        for variant in study.variants
        if seed in variant.seeds
    ]


def compose_task_names(overrides: Sequence[str], configs: Path) -> list[str]:
    """The tasks of train.py with these overrides; ``UserError`` if it would refuse them."""
    return list(build_tasks(compose_config(overrides, configs)))


# What is there already


def check_same(job: Job, environment: Mapping[str, str]) -> None:
    """``UserError`` where the run in the job's folder, finished or to be continued, was made by other overrides."""
    if not job.checkpoint.is_file() and not (job.folder / "metrics.json").is_file():
        return
    ending = "remove the folder or choose another --output"
    if job.record.is_file():
        before = read_job(job.record)
    elif (job.folder / "run.json").is_file():
        before = {"overrides": read_record(job.folder / "run.json").get("overrides", []), "environment": environment}
    else:
        raise UserError(f"{job.folder} holds a run that this study did not make; {ending}.")
    then, now = (as_dict(make_portable(words)) for words in (before.get("overrides", []), job.overrides))
    then |= before.get("environment", {})
    now |= environment
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    if keys:
        told = [f"{key} was {then.get(key, 'not given')}, now {now.get(key, 'not given')}" for key in keys]
        raise UserError(f"{job.folder} was made by other settings ({'; '.join(told)}); {ending}.")


def as_dict(overrides: Sequence[str]) -> dict[str, str]:
    return {strip_prefix(key): value for key, _, value in (word.partition("=") for word in overrides)}


def read_last_overrides(output: Path) -> list[str]:
    """The words given to the command that made the newest run in ``output``."""
    records = sorted(output.glob("*/seed_*.json"), key=lambda path: path.stat().st_mtime)
    return list(read_job(records[-1]).get("given", [])) if records else []


def read_job(path: Path) -> dict[str, Any]:
    """Read what :func:`start_job` wrote of a job."""
    content = read_json_object(path)
    check_types(path, content, {"overrides": TEXT_LIST, "given": TEXT_LIST, "environment": TEXT_MAPPING})
    lists = {key: list(map(upgrade_override, content[key])) for key in ("overrides", "given") if key in content}
    return content | lists


@contextlib.contextmanager
def lock_output(output: Path) -> Iterator[None]:
    """``output`` for this process alone."""
    try:
        lock = lock_run(output)
    except UserError as error:
        raise UserError(f"another study is running in {output}; wait for it or choose another --output.") from error
    with lock:
        yield


def format_command(path: Path, name: str, given: Sequence[str], root: Path) -> str:
    """The command for others to repeat: machines' folders and files as shell variables, or left out."""
    file = path.resolve().relative_to(root.resolve()) if path.resolve().is_relative_to(root.resolve()) else path.name
    words = ["python scripts/study.py", shlex.quote(str(file)), f"--output outputs/{name}"]
    for word in given:
        key, _, value = word.partition("=")
        if key == "data.root":
            words.append("data.root=$DATA")
        elif is_file_path(strip_prefix(key), value) and make_portable([word]):
            words.append(f"{key}=${re.sub('[^A-Z]', '_', strip_prefix(key).rpartition('.')[2].upper())}")
        elif make_portable([word]):
            words.append(shlex.quote(word))
    return " ".join(words)


# Running


def run_jobs(
    jobs: Sequence[Job],
    given: Sequence[str],
    study: Study,
    command: Sequence[str],
    root: Path,
    num_parallel: int,
    say: Callable[[str], None],
) -> list[Failure]:
    """Run the jobs that are not finished, ``num_parallel`` at once; those that failed. What a process of an earlier
    study still runs is waited for.

    ``KeyboardInterrupt`` once a signal has ended them.
    """
    waiting = [job for job in jobs if not job.is_finished]
    say(f"{study.name}: {len(jobs)} runs, {len(jobs) - len(waiting)} of them finished before")
    running: dict[subprocess.Popen, tuple[Job, float]] = {}
    failures: list[Failure] = []
    took: list[float] = []
    for job in waiting:
        if is_locked(job.folder):
            say(f"{job.title} is still run by a process of a study that was killed: it is waited for")
    began, number, num_done = time.monotonic(), len(jobs) - len(waiting), len(jobs) - len(waiting)
    with catch_signals() as signals:
        while (waiting or running) and not signals:
            while waiting and len(running) < num_parallel:
                free = next((one for one in waiting if not is_locked(one.folder)), None)
                if free is None:  # all that is left is run by processes of a study that was killed
                    break
                job = free
                waiting.remove(job)
                if job.is_finished:
                    num_done, number = num_done + 1, number + 1
                    say(f"[{num_done}/{len(jobs)}] {job.title} finished by a process of a study before this one")
                    continue
                continued = job.checkpoint.is_file()
                running[start_job(job, given, study, command, root)] = (job, time.monotonic())
                number += 1
                say(f"[{number}/{len(jobs)}] {job.title} {'continued' if continued else 'started'}, log {job.log}")
            for process in [process for process in running if process.poll() is not None]:
                job, since = running.pop(process)
                num_done += 1
                took.append(time.monotonic() - since)
                if process.returncode == 0 and job.is_finished:
                    told = "finished"
                else:
                    failures.append(Failure(job, reason(job.log, process.returncode)))
                    told = f"FAILED ({failures[-1].reason})"
                left = remaining(took, [since for _, since in running.values()], len(waiting), num_parallel)
                rest = f", about {format_duration(left)} left" if waiting or running else ""
                elapsed = format_duration(time.monotonic() - began)
                say(
                    f"[{num_done}/{len(jobs)}] {job.title} {told} after {format_duration(took[-1])}; {elapsed} so far{rest}"
                )
            time.sleep(POLL)
        if signals and (running or waiting):
            say(f"interrupted: ending {len(running)} run{'s' * (len(running) != 1)}")
            ended(list(running), signal.SIGINT, PATIENCE)
            say("the same command continues this study")
            raise KeyboardInterrupt
    return failures


def start_job(job: Job, given: Sequence[str], study: Study, command: Sequence[str], root: Path) -> subprocess.Popen:
    """The job's process."""
    job.folder.mkdir(parents=True, exist_ok=True)
    facts = {"study": study.name, "arm": job.variant.name, "seed": job.seed, "overrides": job.overrides, "given": given}
    write_json(job.record, {**facts, "environment": study.environment})
    words = [*command, *job.overrides, f"seed={job.seed}", f"hydra.run.dir={quote_value(job.folder)}"]
    if job.checkpoint.is_file():
        words.append("resume=auto")  # of its own folder
    return started(words, job.log, {**os.environ, **study.environment}, root)


def remaining(took: Sequence[float], since: Sequence[float], num_waiting: int, num_parallel: int) -> float:
    """Seconds still to go, if every run takes as long as those so far did on average."""
    mean, now = sum(took) / len(took), time.monotonic()
    return (mean * num_waiting + sum(max(mean - (now - began), 0) for began in since)) / num_parallel


def format_failures(failures: Sequence[Failure]) -> str:
    """One sentence on the runs that failed."""
    told = "; ".join(f"{one.job.title}: {one.reason} ({one.job.log})" for one in failures)
    return f"{len(failures)} run{'s' * (len(failures) > 1)} failed, the same command tries again: {told}"
