"""A search: Optuna proposes values for a run's keys, train.py tries them, in a process for each trial.

What is known of the trials lies in ``search.db`` beside their folders; several searches may work on one.
"""

import contextlib
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
from mtcl.config.quoting import quote_value
from mtcl.errors import UserError
from mtcl.launch.processes import EXIT_REQUEUE, catch_signals, ended, format_duration, reason, started
from mtcl.launch.search_file import DELTA_OBJECTIVES, SIGNIFICANT_DIGITS, Range, Search, read_search
from mtcl.launch.study_file import LAUNCHER_KEYS, check_overrides, merge_overrides
from mtcl.metrics.delta import delta_mtl
from mtcl.results.columns import make_column, primary_metrics
from mtcl.results.comparability import check_same_data
from mtcl.results.compare import split_baseline
from mtcl.results.list_runs import nest_metrics
from mtcl.results.run_files import read_json_object
from mtcl.results.runs import Run, find_runs, read_run
from mtcl.results.tables import align_columns, format_value
from mtcl.run_lock import is_locked, lock_run

POLL = 0.3  # seconds between two looks at the running trials
PATIENCE = 120.0  # seconds that a run has to save and end
SHOWN = 10  # trials in the table
ENOUGH = 10  # finished trials, for importances
ROOM = 100  # columns of the table


@dataclass
class Job:
    """A trial's run, or (``trial`` is None) one that others are compared with."""

    folder: Path
    words: tuple[str, ...]
    trial: Any = None
    process: subprocess.Popen | None = None
    since: float = 0.0
    seen: int = 0  # bytes of its log that were read
    reported: int = 0  # the newest step whose validation was
    is_pruned: bool = False

    @property
    def is_finished(self) -> bool:
        return all((self.folder / name).is_file() for name in ("metrics.json", "run.json"))

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def record(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")


# The search


def run_search(
    path: Path,
    output: Path,
    given: Sequence[str] = (),
    *,
    command: Sequence[str],
    root: Path,
    tasks_of: Callable[[Sequence[str]], list[str]],
    trials: int | None = None,
    num_parallel: int = 1,
    baseline: Sequence[Path] = (),
    gpus: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Run what is left of the search in ``path``, ``num_parallel`` trials at once, and tell its best.

    ``given``: overrides of every run, on top of the file's. ``command``: what trains, started in ``root``.
    ``tasks_of``: the tasks of a run with these words, ``UserError`` if train.py would refuse them. ``trials``: of all
    searches on this ``output`` together. ``baseline``: runs or a file in place of those the search makes itself.
    ``gpus``: the runs are spread over them. ``UserError`` where all trials failed.
    """
    search = read_search(path)
    check_overrides("the command", given, own=(*LAUNCHER_KEYS, *(one.key for one in search.space)))
    if baseline and search.objective not in DELTA_OBJECTIVES:
        raise UserError(f"--baseline is of no use with the objective {search.objective}.")
    output = output.resolve()
    words = tuple(merge_overrides(["data.split=tune"], search.overrides, given))
    if "data.split=tune" not in words:
        split = next(word for word in words if word.startswith("data.split="))
        raise UserError(
            f"{split}: values are chosen on the tune split, never on the pictures of the test; leave it out."
        )
    tasks = checked(path, search, words, tasks_of)
    output.mkdir(parents=True, exist_ok=True)
    storage = Storage(search, words, output)
    pool = JobPool(search, command, root, num_parallel, gpus, say)
    me = output / ".searches" / uuid.uuid4().hex[:12]
    try:
        with lock_run(me), catch_signals() as signals:
            base = run_baselines(search, words, tasks, output, baseline, pool, signals)
            run_trials(search, words, base, storage, pool, me, trials or search.trials, signals)
    finally:
        (me / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            me.rmdir()
    told = storage.completed_trials()
    say("\n" + report(search, words, storage, command))
    if not told:
        raise UserError(f"no trial of {output} finished; look at the logs named above.")


def checked(
    path: Path, search: Search, words: Sequence[str], tasks_of: Callable[[Sequence[str]], list[str]]
) -> list[str]:
    """The runs' tasks. ``UserError`` where train.py would not take the words, or an end of a range."""
    tasks = tasks_of(words)
    for one in search.space:
        for word in one.bound_overrides():
            try:
                tasks_of([*words, word])
            except UserError as error:
                raise UserError(f"{path}: space.{one.key}: {error}") from error
    task = search.column.task
    if task and task not in tasks:
        raise UserError(f"{path}: objective: {search.objective}, but the runs have {', '.join(tasks)}.")
    return tasks


class Storage:
    """Optuna's study in ``search.db``, with what is ours: which folder is whose trial's, and whether that one lives."""

    def __init__(self, search: Search, words: Sequence[str], output: Path):
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
            self.check_same({"objective": search.objective, "seed": search.seed, "overrides": list(words)})

    def check_same(self, definition: dict[str, Any]) -> None:
        definition["space"] = {one.key: [str(value) for value in one.__dict__.values()] for one in self.search.space}
        before = self.study.user_attrs.get("definition")
        if before is None:
            self.study.set_user_attr("definition", definition)
            return
        for key, value in definition.items():
            if before.get(key) != value:
                raise UserError(
                    f"{self.output} holds a search with other {key} ({before.get(key)}, now {value}); "
                    "choose another --output."
                )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One search at a time."""
        with (self.output / ".turn").open("w") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            except (ImportError, OSError):  # not on Windows, nor on every network disk
                pass
            yield

    def folder(self, trial: Any) -> str | None:
        """None: its search was killed before it could say."""
        return trial.user_attrs.get("folder")

    def next(self, wanted: int, me: Path) -> tuple[Any, list[str]] | None:
        """A trial and its overrides; None where there are as many as are wanted.

        What it proposes is a function of the seed, of how many there were, and of their results.
        """
        waiting = self.optuna.trial.TrialState.WAITING
        with self.lock():
            self.requeue_abandoned()
            known = self.study.trials
            count = len({self.folder(trial) for trial in known} - {None})
            if count >= wanted and not any(trial.state == waiting for trial in known):
                return None
            seed = int(np.random.SeedSequence([self.search.seed, count]).generate_state(1)[0])
            self.study.sampler = self.optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            trial = self.study.ask()
            trial.set_user_attr("searcher", me.name)
            trial.set_user_attr("folder", trial.user_attrs.get("folder", f"trial_{count:04d}"))
            return trial, [one.to_override(trial) for one in self.search.space]

    def requeue_abandoned(self) -> None:
        """Trials whose search is gone are proposed again, with their values and their folder."""
        states = self.optuna.trial.TrialState
        for trial in self.study.get_trials(states=(states.RUNNING,)):
            if not is_locked(self.output / ".searches" / trial.user_attrs.get("searcher", "none")):
                self.requeue(trial)

    def requeue(self, trial: Any) -> None:
        self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
        if folder := self.folder(trial):
            self.study.enqueue_trial(trial.params, user_attrs={"folder": folder})

    def latest_trials(self) -> list[Any]:
        """The newest trial of each folder."""
        return list({folder: trial for trial in self.study.trials if (folder := self.folder(trial))}.values())

    def completed_trials(self) -> list[Any]:
        """Best first."""
        found = [t for t in self.latest_trials() if t.state == self.optuna.trial.TrialState.COMPLETE]
        return sorted(found, key=lambda t: t.value, reverse=self.search.column.higher_is_better)


class JobPool:
    """Starts runs in slots; a slot's GPU is its own as far as there are enough."""

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
        self.jobs: dict[int, Job] = {}

    @property
    def is_full(self) -> bool:
        return len(self.jobs) >= self.size

    def add(self, job: Job) -> None:
        slot = next(number for number in range(self.size) if number not in self.jobs)
        job.since = time.monotonic()
        self.jobs[slot] = job

    def ended(self) -> list[tuple[Job, int]]:
        """The jobs that have ended since the last call and their exit codes; starts what can be started."""
        found = []
        for slot, job in list(self.jobs.items()):
            code = None if job.process is None else job.process.poll()
            if job.process is None and not is_locked(job.folder):  # else a killed search's process is at it still
                if job.is_finished:
                    code = 0
                else:
                    job.process = self._started(slot, job)
            if code is not None:
                found.append((job, code))
                del self.jobs[slot]
        return found

    def end(self, signals: Sequence[int] = ()) -> None:
        """All save and stop, before a second signal comes in."""
        running = [job.process for job in self.jobs.values() if job.process is not None]
        self.say(f"interrupted: {len(running)} run{'s' * (len(running) != 1)} save and stop; the same command goes on")
        ended(running, signal.SIGTERM, PATIENCE, signals)

    def _started(self, slot: int, job: Job) -> subprocess.Popen:
        environment = dict(os.environ)
        if self.size > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // self.size, 1)))
            if len(self.gpus) > 1:
                environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        resume = ["resume=auto"] if any(job.folder.glob("checkpoints/*.pt")) else []
        words = [*self.command, *job.words, *resume, f"hydra.run.dir={quote_value(job.folder)}"]
        return started(words, job.log, {**environment, **self.search.environment}, self.root)


def run_baselines(
    search: Search,
    words: Sequence[str],
    tasks: Sequence[str],
    output: Path,
    baseline: Sequence[Path],
    pool: JobPool,
    signals: list[int],
) -> list[Run]:
    """The runs that a Delta is against: those given, else made here with the same words and seed; [] without one."""
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
        own = [word for word in words if not re.match(r"[+~]*regularizer\b", word)]  # none has no such keys
        off = merge_overrides(own, ["regularizer=none", f"seed={search.seed}"])
        jobs = [Job(output / "off", tuple(off))]
        if search.objective == "Delta_MTL":
            jobs = [Job(output / f"single_{t}", tuple(merge_overrides(off, [f"tasks.names=[{t}]"]))) for t in tasks]
        waiting = [job for job in jobs if not job.is_finished]
        if waiting:
            pool.say(f"{len(waiting)} of {len(jobs)} runs to compare with: {', '.join(j.folder.name for j in waiting)}")
        while waiting or pool.jobs:
            while waiting and not pool.is_full:
                pool.add(waiting.pop(0))
            for job, code in pool.ended():
                if not job.is_finished:
                    pool.end()
                    raise UserError(f"{job.folder.name}, to compare with, failed: {reason(job.log, code)} ({job.log})")
            if signals:
                pool.end(signals)
                raise KeyboardInterrupt
            time.sleep(POLL)
        runs = find_runs([job.folder for job in jobs])[0]
    absent = [task for task in tasks if not any(task in run.metrics for run in runs)]
    if absent:
        raise UserError(f"--baseline has no value of {', '.join(absent)}, which the runs of this search have.")
    return runs


def run_trials(
    search: Search,
    words: Sequence[str],
    base: Sequence[Run],
    storage: Storage,
    pool: JobPool,
    me: Path,
    wanted: int,
    signals: list[int],
) -> None:
    """Trials until ``wanted`` are told. ``KeyboardInterrupt`` once a signal has ended them, to be continued."""
    exhausted = False
    while not signals:
        while not pool.is_full and not exhausted:
            proposed = storage.next(wanted, me)
            if proposed is None:
                exhausted = True
                break
            trial, values = proposed
            job = Job(storage.output / trial.user_attrs["folder"], (*words, *values, f"seed={search.seed}"), trial)
            pool.add(job)
            write_json(job.record, {"search": search.name, "trial": trial.number, "values": values, "state": "running"})
            pool.say(f"[{number_of(job) + 1}/{wanted}] {job.folder.name}: {' '.join(values)}")
        if exhausted and not pool.jobs:
            return
        for job, code in pool.ended():
            tell(search, job, code, base, storage, pool.say)
            exhausted = False  # what was preempted is proposed again
        for job in pool.jobs.values():
            report_validations(search, job, base, pool.say)
        time.sleep(POLL)
    pool.end(signals)
    raise KeyboardInterrupt


def number_of(job: Job) -> int:
    return int(job.folder.name.rpartition("_")[2])


def report_validations(search: Search, job: Job, base: Sequence[Run], say: Callable[[str], None]) -> None:
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


def new_validations(search: Search, job: Job, base: Sequence[Run]) -> Iterator[tuple[int, float]]:
    """Step and objective of each validation that the run has logged since the last call."""
    path = job.folder / run_log.NAME
    if not path.is_file():
        return
    if path.stat().st_size < job.seen:  # a resumed run drops what comes anew
        job.seen = 0
    for line in run_log.read_lines(path, job.seen):
        if line.is_truncated:  # it is being written
            return
        job.seen += len(line.data)
        record = line.record or {}
        if record.get("kind") == "val" and record["step"] > job.reported:
            job.reported = record["step"]
            with contextlib.suppress(UserError):  # a value that is missing now may be there at the end
                yield job.reported, compute_objective(search, nest_metrics(record), base)


def tell(
    search: Search, job: Job, code: int, base: Sequence[Run], storage: Storage, say: Callable[[str], None]
) -> None:
    """Tell Optuna, the user and the run's record how a trial ended."""
    states = storage.optuna.trial.TrialState
    name, value, why, took = job.folder.name, None, None, format_duration(time.monotonic() - job.since)
    if code == 0 and job.is_finished:
        state = states.COMPLETE
        try:
            run = read_run(job.folder)
            check_same_data([run, *base])
            value = compute_objective(search, run.metrics, base)
            for step, earlier in new_validations(search, job, base):  # later trials are compared with them
                job.trial.report(earlier, step)
            say(f"{name}: {search.objective} {format_value(search.column, value)} after {took}")
        except UserError as error:
            state, why = states.FAIL, str(error)
    elif job.is_pruned and code in (EXIT_REQUEUE, -signal.SIGTERM):
        state = states.PRUNED
    elif code == EXIT_REQUEUE:
        say(f"{name}: told to make room, to be continued")
        storage.requeue(storage.study.trials[job.trial.number])
        return
    else:
        state, why = states.FAIL, f"{reason(job.log, code)} ({job.log})"
    if why is not None:
        say(f"{name}: FAILED ({why})")
        job.trial.set_user_attr("reason", why)
    storage.study.tell(job.trial, value, state=state)
    ending = {states.COMPLETE: "finished", states.PRUNED: "pruned", states.FAIL: "failed"}[state]
    write_json(job.record, read_json_object(job.record) | {"state": ending, "value": value, "reason": why})


def compute_objective(search: Search, metrics: Mapping[str, Mapping[str, float]], base: Sequence[Run]) -> float:
    """The objective, a Delta in percent; ``UserError`` where a value is missing."""
    column = search.column
    if column.task:
        value = metrics.get(column.task, {}).get(column.metric, math.nan)
        if math.isnan(value):
            known = ", ".join(metrics.get(column.task, {})) or "nothing"
            raise UserError(f"no value of {search.objective}; there is {known}.")
        return value
    values, against, direction = {}, {}, {}
    for task in metrics:
        means = {name: mean([run.metrics[task].get(name, math.nan) for run in base if task in run.metrics])
                 for name in primary_metrics(task)}  # fmt: skip
        name = next((n for n in means if not math.isnan(means[n] + metrics[task].get(n, math.nan))), None)
        if name is None:
            raise UserError(f"no value of {task}'s {primary_metrics(task)[0]}, here or in what it is compared with.")
        values[task], against[task] = metrics[task][name], means[name]
        direction[task] = make_column(task, name).higher_is_better
    return delta_mtl(values, against, direction)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


# What it found


def report(search: Search, words: Sequence[str], storage: Storage, command: Sequence[str]) -> str:
    """The best trials, what mattered, and how to repeat the best."""
    best, told = storage.completed_trials(), storage.latest_trials()
    states = storage.optuna.trial.TrialState
    counts = {"finished": len(best)}
    counts |= {
        n: sum(t.state == getattr(states, s) for t in told) for n, s in (("pruned", "PRUNED"), ("failed", "FAIL"))
    }
    lines = [f"{search.name}: " + ", ".join(f"{count} trials {name}" for name, count in counts.items())]
    failed = [trial for trial in told if trial.state == states.FAIL]
    lines += [f"failed: {storage.folder(t)}: {t.user_attrs.get('reason', 'not known why')}" for t in failed]
    if not best:
        return "\n".join(lines)
    keys = [one.key for one in search.space]
    names = [key if sum(map(len, keys)) < ROOM // 2 else key.rpartition(".")[2] for key in keys]
    body = [
        [
            trial.user_attrs["folder"],
            format_value(search.column, trial.value),
            *(shown(one, trial) for one in search.space),
        ]
        for trial in best[:SHOWN]
    ]
    unit = f" ({search.column.unit})" if search.column.unit else ""
    arrow = "↑" if search.column.higher_is_better else "↓"
    lines += ["", align_columns([["trial", f"{search.objective} {arrow}{unit}", *names]], body, num_left=1)]
    if len(best) >= ENOUGH:
        evaluator = storage.optuna.importance.PedAnovaImportanceEvaluator()
        with contextlib.suppress(ValueError, RuntimeError):  # of values that are all alike
            found = storage.optuna.importance.get_param_importances(storage.study, evaluator=evaluator)
            told_of = ", ".join(f"{key} {100 * part:.0f} %" for key, part in found.items())
            lines += ["", f"importance (PED-ANOVA, {len(best)} trials): {told_of}"]
    values = [f"{one.key}={shown(one, best[0])}" for one in search.space]
    lines += ["", "the best again:", f"python train.py {shlex.join([*words, *values, f'seed={search.seed}'])}", ""]
    lines.append(
        "Chosen on the tune split by one run each: compare it there over several seeds, then on the test split."
    )
    return "\n".join(lines)


def shown(one: Range, trial: Any) -> str:
    """A trial's value as its run had it."""
    value = trial.params[one.key]
    return f"{value:.{SIGNIFICANT_DIGITS}g}" if isinstance(value, float) else str(value)
