"""Run a search: Optuna proposes values for a run's keys, train.py tries them, in a process for each trial.

Optuna's study is in ``search.db`` beside the trials' folders; several searches may work on bounds.
"""

import contextlib
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtcl import run_log
from mtcl.atomic import write_json
from mtcl.errors import UserError
from mtcl.launch.job import Job
from mtcl.launch.overrides import LAUNCHER_KEYS, check_overrides, merge_overrides
from mtcl.launch.processes import EXIT_REQUEUE, catch_signals, explain_exit, format_duration, stop_processes
from mtcl.launch.search_file import DELTA_OBJECTIVES, SIGNIFICANT_DIGITS, Range, Search, read_search
from mtcl.metrics.delta import delta_mtl
from mtcl.results.columns import make_column, primary_metrics
from mtcl.results.comparability import check_same_data
from mtcl.results.compare import split_baseline
from mtcl.results.list_runs import nest_metrics
from mtcl.results.run_files import read_json_object
from mtcl.results.runs import Run, find_runs, read_run
from mtcl.results.tables import align_columns, format_value
from mtcl.run_lock import find_holder, is_locked, lock_run

log = logging.getLogger(__name__)
POLL = 0.3  # seconds between two looks at the running trials
PATIENCE = 120.0  # seconds that a run has to save and end
NUM_SHOWN = 10  # trials in the table
MIN_FOR_IMPORTANCE = 10  # finished trials, for importances
TABLE_WIDTH = 100  # columns of the table


@dataclass
class TrialJob(Job):
    """A trial's run, or (``trial`` is None) a baseline's."""

    trial: Any = None
    process: subprocess.Popen | None = None
    start_time: float = 0.0
    num_read_bytes: int = 0  # of its log
    last_validation: int = 0  # the newest step whose validation was reported
    is_pruned: bool = False


# The search


def run_search(
    path: Path,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    command: Sequence[str],
    root: Path,
    list_tasks: Callable[[Sequence[str]], list[str]],
    trials: int | None = None,
    num_parallel: int = 1,
    baseline: Sequence[Path] = (),
    gpus: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Run trials of a search until there are enough, and print the best.

    Args:
        path: The search's YAML file.
        output: The folder of trials and ``search.db``.
        overrides: Overrides of every run, after the file's.
        command: What trains.
        root: The folder that it is started in.
        list_tasks: Returns the tasks of a run with these overrides; ``UserError`` if train.py would refuse them.
        trials: Trials of all searches on this ``output`` together; None: as the file says.
        num_parallel: Trials at once.
        baseline: Runs, or a file, in place of those that the search would run itself.
        gpus: The GPUs that runs are spread over.
        say: Prints a line.

    Raises:
        UserError: A mistake in file or overrides, or all trials failed.
    """
    search = read_search(path)
    check_overrides(
        "the command", overrides, "search", reserved=(*LAUNCHER_KEYS, *(bounds.key for bounds in search.space))
    )
    if baseline and search.objective not in DELTA_OBJECTIVES:
        raise UserError(f"--baseline is of no use with the objective {search.objective}.")
    output = output.resolve()
    overrides = tuple(merge_overrides(["data.split=tune"], search.overrides, overrides))
    if "data.split=tune" not in overrides:
        split = next(override for override in overrides if override.startswith("data.split="))
        raise UserError(f"{split}: values are chosen on the tune split, never on the test images; leave it out.")
    tasks = check_search(path, search, overrides, list_tasks)
    output.mkdir(parents=True, exist_ok=True)
    storage = Storage(search, overrides, output)
    pool = JobPool(search, command, root, num_parallel, gpus, say)
    searcher = output / ".searches" / uuid.uuid4().hex[:12]
    try:
        with lock_run(searcher), catch_signals() as signals:
            base = run_baselines(search, overrides, tasks, output, baseline, pool, signals)
            run_trials(search, overrides, base, storage, pool, searcher, trials or search.trials, signals)
    finally:
        (searcher / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            searcher.rmdir()
    completed = storage.completed_trials()
    say("\n" + format_report(search, overrides, storage))
    if not completed:
        raise UserError(f"no trial of {output} finished; look at the logs named above.")


def check_search(
    path: Path, search: Search, overrides: Sequence[str], list_tasks: Callable[[Sequence[str]], list[str]]
) -> list[str]:
    """Return the runs' tasks; ``UserError`` where train.py would refuse the overrides, or a bound of a range."""
    tasks = list_tasks(overrides)
    for bounds in search.space:
        for override in bounds.bound_overrides():
            try:
                list_tasks([*overrides, override])
            except UserError as error:
                raise UserError(f"{path}: space.{bounds.key}: {error}") from error
    task = search.column.task
    if task and task not in tasks:
        raise UserError(f"{path}: objective: {search.objective}, but the runs have {', '.join(tasks)}.")
    return tasks


class Storage:
    """Optuna's study in ``search.db``; trials also know their folder and the search that runs them."""

    seconds_to_warning = 10.0  # of waiting for another search, which needs less for a proposal

    def __init__(self, search: Search, overrides: Sequence[str], output: Path):
        try:
            import optuna
            from sqlalchemy import URL
        except ImportError as error:
            raise UserError("scripts/search.py needs Optuna; pip install 'mtcl[search]' (optuna>=4.9)") from error
        self.optuna, self.search, self.output = optuna, search, output
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        url = URL.create("sqlite", database=str(output / "search.db")).render_as_string()
        wait = {"connect_args": {"timeout": 100}}  # for another search's writing
        startup, warmup = search.pruning or (0, 0)
        median = optuna.pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=warmup)
        with self.lock():
            self.study = optuna.create_study(
                storage=optuna.storages.RDBStorage(url, engine_kwargs=wait),
                study_name=search.name,
                direction="maximize" if search.column.higher_is_better else "minimize",
                load_if_exists=True,
                pruner=median if search.pruning else optuna.pruners.NopPruner(),
            )
            self.check_same({"objective": search.objective, "seed": search.seed, "overrides": list(overrides)})
            if not self.study.trials:
                for values in search.first:
                    self.study.enqueue_trial(dict(values))

    def check_same(self, definition: dict[str, Any]) -> None:
        """Raise ``UserError`` where the folder has another search."""
        definition["space"] = {
            bounds.key: [str(value) for value in bounds.__dict__.values()] for bounds in self.search.space
        }
        earlier = self.study.user_attrs.get("definition")
        if earlier is None:
            self.study.set_user_attr("definition", definition)
            return
        for key, value in definition.items():
            if earlier.get(key) != value:
                raise UserError(
                    f"{self.output} holds a search with other {key} ({earlier.get(key)}, now {value}); "
                    "choose another --output."
                )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the study: one search at a time. On a network disk without locks nothing is locked."""
        from filelock import FileLock, Timeout

        path = self.output / ".turn"
        # What filelock does by default on such a disk would remain of a search that was killed on another machine.
        lock = FileLock(path, fallback_to_soft=False)
        try:
            lock.acquire(timeout=self.seconds_to_warning)
        except Timeout:
            holder = find_holder(path)
            log.warning("waiting for another search of %s%s", self.output, f" (process {holder})" if holder else "")
            lock.acquire()
        except OSError:
            pass
        try:
            yield
        finally:
            lock.release()

    def folder(self, trial: Any) -> str | None:
        """Return a trial's folder; None where its search was killed before it was noted."""
        return trial.user_attrs.get("folder")

    def propose(self, num_trials: int, searcher: Path) -> tuple[Any, list[str]] | None:
        """Return a new trial and its overrides; None where there are ``num_trials`` already.

        The proposal depends on the seed, on the number of earlier trials and on their results.
        """
        waiting = self.optuna.trial.TrialState.WAITING
        with self.lock():
            self.requeue_abandoned()
            trials = self.study.trials
            count = len({self.folder(trial) for trial in trials} - {None})
            interrupted = any(trial.state == waiting and self.folder(trial) for trial in trials)
            if count >= num_trials and not interrupted:
                return None
            seed = int(np.random.SeedSequence([self.search.seed, count]).generate_state(1)[0])
            self.study.sampler = self.optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            trial = self.study.ask()
            trial.set_user_attr("searcher", searcher.name)
            trial.set_user_attr("folder", trial.user_attrs.get("folder", f"trial_{count:04d}"))
            return trial, [bounds.to_override(trial) for bounds in self.search.space]

    def requeue_abandoned(self) -> None:
        """Queue the trials again whose search is gone, with their values and their folder."""
        states = self.optuna.trial.TrialState
        for trial in self.study.get_trials(states=(states.RUNNING,)):
            if not is_locked(self.output / ".searches" / trial.user_attrs.get("searcher", "none")):
                self.requeue(trial)

    def requeue(self, trial: Any) -> None:
        """Queue a trial again."""
        self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
        if folder := self.folder(trial):
            self.study.enqueue_trial(trial.params, user_attrs={"folder": folder})

    def latest_trials(self) -> list[Any]:
        """Return the newest trial of each folder."""
        return list({folder: trial for trial in self.study.trials if (folder := self.folder(trial))}.values())

    def completed_trials(self) -> list[Any]:
        """Return completed trials, best first."""
        completed = [t for t in self.latest_trials() if t.state == self.optuna.trial.TrialState.COMPLETE]
        return sorted(completed, key=lambda t: t.value, reverse=self.search.column.higher_is_better)


class JobPool:
    """Runs jobs in slots; every slot has its own GPU as far as there are enough."""

    def __init__(
        self,
        search: Search,
        command: Sequence[str],
        root: Path,
        size: int,
        gpus: Sequence[str],
        say: Callable[[str], None],
    ):
        self.search, self.command, self.root, self.size, self.gpus, self.say = search, command, root, size, gpus, say
        self.jobs: dict[int, TrialJob] = {}

    @property
    def is_full(self) -> bool:
        """Are all slots taken?"""
        return len(self.jobs) >= self.size

    def add(self, job: TrialJob) -> None:
        """Put a job into a free slot."""
        slot = next(number for number in range(self.size) if number not in self.jobs)
        job.start_time = time.monotonic()
        self.jobs[slot] = job

    def collect(self) -> list[tuple[TrialJob, int]]:
        """Start what can be started; return the jobs that ended since the last call with their exit codes."""
        ended = []
        for slot, job in list(self.jobs.items()):
            code = None if job.process is None else job.process.poll()
            if job.process is None and not job.is_locked:  # else a process of a killed search still runs it
                if job.is_finished:
                    code = 0
                else:
                    job.process = self._start(slot, job)
            if code is not None:
                ended.append((job, code))
                del self.jobs[slot]
        return ended

    def stop(self, signals: Sequence[int] = ()) -> None:
        """Let all jobs save and stop; a second signal kills them."""
        running = [job.process for job in self.jobs.values() if job.process is not None]
        self.say(f"interrupted: {len(running)} run{'s' * (len(running) != 1)} save and stop; the same command goes on")
        stop_processes(running, signal.SIGTERM, PATIENCE, signals)

    def _start(self, slot: int, job: TrialJob) -> subprocess.Popen:
        environment = dict(os.environ)
        if self.size > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // self.size, 1)))
            if len(self.gpus) > 1:
                environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return job.start(self.command, {**environment, **self.search.environment}, self.root)


def run_baselines(
    search: Search,
    overrides: Sequence[str],
    tasks: Sequence[str],
    output: Path,
    baseline: Sequence[Path],
    pool: JobPool,
    signals: list[int],
) -> list[Run]:
    """Return the runs that a Delta is against: ``baseline``, or runs with the same overrides; [] without a Delta."""
    if search.objective not in DELTA_OBJECTIVES:
        return []
    if baseline:
        singles, others = split_baseline(baseline, [])
        runs = singles or others
        if bool(singles) != (search.objective == "Delta_MTL"):
            raise UserError(f"--baseline: {search.objective} needs {DELTA_OBJECTIVES[search.objective]}.")
        for run in runs:
            if run.record.get("split", "tune") != "tune":
                raise UserError(f"--baseline {run.path} was scored on split {run.record['split']}; it must be tune.")
    else:
        without = [override for override in overrides if not re.match(r"[+~]*regularizer\b", override)]
        off = merge_overrides(without, ["regularizer=none", f"seed={search.seed}"])
        jobs = [TrialJob(output / "off", tuple(off))]
        if search.objective == "Delta_MTL":
            jobs = [
                TrialJob(output / f"single_{t}", tuple(merge_overrides(off, [f"tasks.names=[{t}]"]))) for t in tasks
            ]
        run_baseline_jobs(jobs, pool, signals)
        runs = find_runs([job.folder for job in jobs])[0]
    absent = [task for task in tasks if not any(task in run.metrics for run in runs)]
    if absent:
        raise UserError(f"--baseline has no value of {', '.join(absent)}, which the runs of this search have.")
    return runs


def run_baseline_jobs(jobs: Sequence[TrialJob], pool: JobPool, signals: list[int]) -> None:
    """Run the unfinished jobs; ``UserError`` where one fails."""
    waiting = [job for job in jobs if not job.is_finished]
    if waiting:
        pool.say(f"{len(waiting)} of {len(jobs)} runs to compare with: {', '.join(j.folder.name for j in waiting)}")
    while waiting or pool.jobs:
        while waiting and not pool.is_full:
            pool.add(waiting.pop(0))
        for job, code in pool.collect():
            if not job.is_finished:
                pool.stop()
                reason = explain_exit(job.log, code)
                raise UserError(f"{job.folder.name}, to compare with, failed: {reason} ({job.log})")
        if signals:
            pool.stop(signals)
            raise KeyboardInterrupt
        time.sleep(POLL)


def run_trials(
    search: Search,
    overrides: Sequence[str],
    base: Sequence[Run],
    storage: Storage,
    pool: JobPool,
    searcher: Path,
    num_trials: int,
    signals: list[int],
) -> None:
    """Run trials until there are ``num_trials``; ``KeyboardInterrupt`` once a signal has stopped them."""
    exhausted = False
    while not signals:
        while not pool.is_full and not exhausted:
            proposed = storage.propose(num_trials, searcher)
            if proposed is None:
                exhausted = True
                break
            trial, values = proposed
            job = TrialJob(
                storage.output / trial.user_attrs["folder"], (*overrides, *values, f"seed={search.seed}"), trial
            )
            pool.add(job)
            write_json(job.record, {"search": search.name, "trial": trial.number, "values": values, "state": "running"})
            pool.say(f"[{trial_number(job) + 1}/{num_trials}] {job.folder.name}: {' '.join(values)}")
        if exhausted and not pool.jobs:
            return
        for job, code in pool.collect():
            finish_trial(search, job, code, base, storage, pool.say)
            exhausted = False  # what was preempted is proposed again
        for job in pool.jobs.values():
            report_validations(search, job, base, pool.say)
        time.sleep(POLL)
    pool.stop(signals)
    raise KeyboardInterrupt


def trial_number(job: TrialJob) -> int:
    """Return a trial's number."""
    return int(job.folder.name.rpartition("_")[2])


def report_validations(search: Search, job: TrialJob, base: Sequence[Run], say: Callable[[str], None]) -> None:
    """Report a running trial's new validations; stop it where the median of the others is better."""
    if job.process is None or job.is_pruned:
        return
    for step, value in new_validations(search, job, base):
        job.trial.report(value, step)
        if search.pruning and job.trial.should_prune():
            say(f"{job.folder.name}: {format_value(search.column, value)} at step {step}, pruned")
            job.is_pruned = True
            job.process.send_signal(signal.SIGTERM)
            return


def new_validations(search: Search, job: TrialJob, base: Sequence[Run]) -> Iterator[tuple[int, float]]:
    """Yield step and objective of each validation that the run has logged since the last call."""
    path = job.run_folder.log
    if not path.is_file():
        return
    if path.stat().st_size < job.num_read_bytes:  # a resumed run drops records after its checkpoint
        job.num_read_bytes = 0
    for line in run_log.read_lines(path, job.num_read_bytes):
        if line.is_truncated:  # still being written
            return
        job.num_read_bytes += len(line.data)
        record = line.record or {}
        if record.get("kind") == "val" and record["step"] > job.last_validation:
            job.last_validation = record["step"]
            with contextlib.suppress(UserError):  # a metric that is missing now may exist at the end
                yield job.last_validation, compute_objective(search, nest_metrics(record), base)


def finish_trial(
    search: Search, job: TrialJob, code: int, base: Sequence[Run], storage: Storage, say: Callable[[str], None]
) -> None:
    """Report to Optuna, the user and the trial's record how it ended."""
    states = storage.optuna.trial.TrialState
    name, value, reason, duration = job.folder.name, None, None, format_duration(time.monotonic() - job.start_time)
    if code == 0 and job.is_finished:
        state = states.COMPLETE
        try:
            run = read_run(job.folder)
            check_same_data([run, *base])
            value = compute_objective(search, run.metrics, base)
            for step, earlier in new_validations(search, job, base):  # later trials are compared with them
                job.trial.report(earlier, step)
            say(f"{name}: {search.objective} {format_value(search.column, value)} after {duration}")
        except UserError as error:
            state, reason = states.FAIL, str(error)
    elif job.is_pruned and code in (EXIT_REQUEUE, -signal.SIGTERM):
        state = states.PRUNED
    elif code == EXIT_REQUEUE:
        say(f"{name}: preempted, to be continued")
        storage.requeue(storage.study.trials[job.trial.number])
        return
    else:
        state, reason = states.FAIL, f"{explain_exit(job.log, code)} ({job.log})"
    if reason is not None:
        say(f"{name}: FAILED ({reason})")
        job.trial.set_user_attr("reason", reason)
    storage.study.tell(job.trial, value, state=state)
    ending = {states.COMPLETE: "finished", states.PRUNED: "pruned", states.FAIL: "failed"}[state]
    write_json(job.record, read_json_object(job.record) | {"state": ending, "value": value, "reason": reason})


def compute_objective(search: Search, metrics: Mapping[str, Mapping[str, float]], base: Sequence[Run]) -> float:
    """Return the objective, a Delta in percent; ``UserError`` where a metric is missing."""
    column = search.column
    if column.task:
        value = metrics.get(column.task, {}).get(column.metric, math.nan)
        if math.isnan(value):
            available = ", ".join(metrics.get(column.task, {})) or "none"
            raise UserError(f"no value of {search.objective}; available: {available}.")
        return value
    values, against, direction = {}, {}, {}
    for task in metrics:
        means = {name: mean([run.metrics[task].get(name, math.nan) for run in base if task in run.metrics])
                 for name in primary_metrics(task)}  # fmt: skip
        name = next((n for n in means if not math.isnan(means[n] + metrics[task].get(n, math.nan))), None)
        if name is None:
            raise UserError(
                f"{primary_metrics(task)[0]} of {task} is missing in this run or in the run it is compared with."
            )
        values[task], against[task] = metrics[task][name], means[name]
        direction[task] = make_column(task, name).higher_is_better
    return delta_mtl(values, against, direction)


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN of no values."""
    return sum(values) / len(values) if values else math.nan


# The report


def format_report(search: Search, overrides: Sequence[str], storage: Storage) -> str:
    """Return the best trials, the importance of the keys, and how to repeat the best trial."""
    best, latest = storage.completed_trials(), storage.latest_trials()
    states = storage.optuna.trial.TrialState
    counts = {"finished": len(best)}
    counts |= {
        n: sum(t.state == getattr(states, s) for t in latest) for n, s in (("pruned", "PRUNED"), ("failed", "FAIL"))
    }
    lines = [f"{search.name}: " + ", ".join(f"{count} trials {name}" for name, count in counts.items())]
    failed = [trial for trial in latest if trial.state == states.FAIL]
    lines += [f"failed: {storage.folder(t)}: {t.user_attrs.get('reason', 'reason unknown')}" for t in failed]
    if not best:
        return "\n".join(lines)
    keys = [bounds.key for bounds in search.space]
    names = [key if sum(map(len, keys)) < TABLE_WIDTH // 2 else key.rpartition(".")[2] for key in keys]
    body = [
        [
            trial.user_attrs["folder"],
            format_value(search.column, trial.value),
            *(format_parameter(bounds, trial) for bounds in search.space),
        ]
        for trial in best[:NUM_SHOWN]
    ]
    unit = f" ({search.column.unit})" if search.column.unit else ""
    arrow = "↑" if search.column.higher_is_better else "↓"
    lines += ["", align_columns([["trial", f"{search.objective} {arrow}{unit}", *names]], body, num_left=1)]
    if len(best) >= MIN_FOR_IMPORTANCE:
        evaluator = storage.optuna.importance.PedAnovaImportanceEvaluator()
        with contextlib.suppress(ValueError, RuntimeError):  # of values that are all alike
            importances = storage.optuna.importance.get_param_importances(storage.study, evaluator=evaluator)
            text = ", ".join(f"{key} {100 * part:.0f} %" for key, part in importances.items())
            lines += ["", f"importance (PED-ANOVA, {len(best)} trials): {text}"]
    values = [f"{bounds.key}={format_parameter(bounds, best[0])}" for bounds in search.space]
    lines += ["", "the best again:", f"python train.py {shlex.join([*overrides, *values, f'seed={search.seed}'])}", ""]
    lines.append(
        "Chosen on the tune split by one run each: compare it there over several seeds, then on the test split."
    )
    return "\n".join(lines)


def format_parameter(bounds: Range, trial: Any) -> str:
    """Format a trial's value as its run had it."""
    value = trial.params[bounds.key]
    return f"{value:.{SIGNIFICANT_DIGITS}g}" if isinstance(value, float) else str(value)
