"""List runs with their state, step and latest metrics. Only reads, so that running runs are not disturbed."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtcl import run_log
from mtcl.errors import UserError, escape_control_characters
from mtcl.results.columns import make_column, primary_metrics
from mtcl.results.run_files import is_stopped_early, parse_metrics, read_config, read_json_object, read_record
from mtcl.results.tables import format_value
from mtcl.run_folder import RunFolder, find_run_folders
from mtcl.tasks.names import TASK_NAMES

STATES = ("running", "finished", "interrupted", "pruned", "failed", "not started", "evaluation", "broken")
DISTILLATION = "distillation"  # in place of tasks in the metrics of a run of scripts/distill.py
TAIL_LENGTHS = (1 << 16, 1 << 20)  # bytes at the end of a log to read, the second if the first has no validation
SHORT_NAMES = {"human_parts": "parts"}


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        folder: its folder.
        state: one of :data:`STATES`.
        step: optimiser steps done.
        max_steps: optimiser steps of the whole run.
        metrics: task -> metric -> value of the latest evaluation; fractions, metres, degrees.
        modified: when one of its files was last written, in seconds since 1970.
        note: why it is broken or was ended.
    """

    folder: Path
    state: str
    step: int | None = None
    max_steps: int | None = None
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    modified: float = 0.0
    note: str = ""

    def primary_metric(self, task: str) -> tuple[str, float]:
        """Return name and value of the metric that represents a task in this run."""
        values = self.metrics.get(task, {})
        name = next((name for name in primary_metrics(task) if name in values), primary_metrics(task)[0])
        return name, values.get(name, math.nan)


def list_runs(sources: Sequence[Path]) -> list[RunState]:
    """Return the state of every run at or below the folders ``sources``, newest first."""
    folders: dict[Path, None] = {}
    for source in sources:
        if not source.is_dir():
            raise UserError(f"{source} is not a folder; give folders of runs.")
        folders |= dict.fromkeys(run.path for run in find_run_folders(source))
    return sorted(map(read_state, folders), key=lambda run: -run.modified)


def read_state(folder: Path) -> RunState:
    """Return a run's state; "broken" with a reason if its files can't be read."""
    modified = 0.0
    try:
        modified = RunFolder(folder).modified
        return _read_state(RunFolder(folder), modified)
    except UserError as error:
        return RunState(folder, "broken", modified=modified, note=str(error))
    except OSError as error:  # a folder that vanishes, or may not be read
        return RunState(folder, "broken", modified=modified, note=f"{folder} can't be read ({error.strerror or error})")


def _read_state(run: RunFolder, modified: float) -> RunState:
    locked = run.is_locked  # first: a run writes its metrics before it releases the lock
    config = _read_if_present(read_config, run.config)
    max_steps = config.get("trainer.max_steps")
    record = _read_if_present(read_record, run.record)
    if run.has_metrics and not locked:
        metrics = _read_task_metrics(run.metrics)
        if not config and ("checkpoint" in record or "predictions" in record):
            return RunState(run.path, "evaluation", record.get("step"), None, metrics, modified)
        step = record.get("step")
        is_short = step is not None and max_steps is not None and step < max_steps
        if not is_short or config.get("trainer.dry_run") or is_stopped_early(record, config):
            max_steps = step if max_steps is None else max_steps
            return RunState(run.path, "finished", step, max_steps, metrics, modified)
    step, metrics = read_progress(run.log)
    step = max(step, record.get("step", 0))
    trial = _read_if_present(read_json_object, run.path.with_name(f"{run.path.name}.json")) if run.path.name else {}
    state = "running" if locked else "interrupted" if step else "not started"
    if not locked and trial.get("state") in ("pruned", "failed"):  # by a search
        state = trial["state"]
    return RunState(run.path, state, step, max_steps, metrics, modified, str(trial.get("reason") or ""))


def _read_task_metrics(path: Path) -> dict[str, dict[str, float]]:
    """Read a file of metrics; return an empty dict for a distillation's, which has no tasks."""
    content = read_json_object(path)
    return {} if list(content) == [DISTILLATION] else parse_metrics(path, content)


def _read_if_present(read: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    """Read a file by ``read``; return an empty dict if there is none."""
    return read(path) if os.path.lexists(path) else {}


def read_progress(path: Path) -> tuple[int, dict[str, dict[str, float]]]:
    """Return the steps done and the last validation in a run's log, skipping damaged lines; 0 and {} without a log."""
    step, metrics = 0, {}
    for length in TAIL_LENGTHS:
        lines, is_all = run_log.read_tail(path, length)
        records = [line.record for line in lines if line.record is not None]
        step = max((one["step"] + (one["kind"] == "train") for one in records), default=0)
        if validations := [one for one in records if one["kind"] == "val"]:
            metrics = nest_metrics(validations[-1])
            break
        if is_all:
            break
    return step, metrics


def nest_metrics(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return a validation's record, ``task/metric`` -> value, as task -> metric -> value; null becomes NaN."""
    metrics: dict[str, dict[str, float]] = {}
    for key, value in record.items():
        task, slash, metric = key.partition("/")
        if slash:
            metrics.setdefault(task, {})[metric] = math.nan if value is None else float(value)
    return metrics


# Output


def _make_grid(runs: Sequence[RunState], now: float) -> list[list[str]]:
    """Return heading and a line per run: state, steps, age, a metric per task, folder."""
    tasks = [task for task in TASK_NAMES if any(task in run.metrics for run in runs)]
    lines = [["state", "steps", "age", *(_task_heading(task, runs) for task in tasks), "folder"]]
    for run in runs:
        total = "" if run.max_steps is None else f"/{run.max_steps}"
        steps = "-" if run.step is None else f"{run.step}{total}"
        cells = [_format_task_value(task, *run.primary_metric(task)) for task in tasks]
        folder = escape_control_characters(str(run.folder))
        lines.append([run.state, steps, format_age(now - run.modified), *cells, folder])
    return lines


def _task_heading(task: str, runs: Sequence[RunState]) -> str:
    """Return a task's name; of edges with the metric, odsF or loss, if it is the same in all runs."""
    names = {run.primary_metric(task)[0] for run in runs if task in run.metrics}
    return SHORT_NAMES.get(task, task) + (f" {min(names)}" if len(names) == 1 and task == "edge" else "")


def _format_task_value(task: str, metric: str, value: float) -> str:
    return format_value(make_column(task, metric), value)


def format_age(seconds: float) -> str:
    """Format a duration in its largest unit.

    >>> format_age(5), format_age(130), format_age(7300), format_age(200000), format_age(2e9)
    ('5 s', '2 min', '2 h', '2 d', '-')
    """
    if seconds > 1e9:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def format_runs(runs: Sequence[RunState], width: int | None) -> str:
    """Return a table of at most ``width`` columns, with long folder names shortened in their middle.

    ``width`` None: names are not shortened, as programs need them.
    """
    lines = _make_grid(runs, time.time())
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    room = widths[-1] if width is None else max(width - sum(w + 2 for w in widths[:-1]), 16)
    text = []
    for line in lines:
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line[:-1], widths))]
        text.append("  ".join([*cells, shorten_middle(line[-1], room)]))
    for run in (run for run in runs if run.note):
        folder = shorten_middle(escape_control_characters(str(run.folder)), room)
        text.append(f"{folder}: {escape_control_characters(run.note)}")
    counts = {state: sum(run.state == state for run in runs) for state in STATES}
    summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return "\n".join([*text, f"{len(runs)} run{'s' * (len(runs) != 1)}: {summary}"]) + "\n"


def shorten_middle(text: str, length: int) -> str:
    """Shorten a text to ``length`` characters by cutting its middle.

    >>> shorten_middle("outputs/rooms/sweep/weight-0.1_seed-0_3a6dcc16", 24)
    'outputs/ro…ed-0_3a6dcc16'
    """
    if len(text) <= length:
        return text
    tail = (length - 1) * 3 // 5
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def to_records(runs: Sequence[RunState]) -> list[dict[str, Any]]:
    """Return plain values in full precision, for CSV and JSON."""
    records = []
    for run in runs:
        record: dict[str, Any] = {
            "folder": str(run.folder),
            "state": run.state,
            "step": run.step,
            "max_steps": run.max_steps,
        }
        record |= {"changed": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(run.modified)), "note": run.note}
        for task in (task for task in TASK_NAMES if task in run.metrics):
            name, value = run.primary_metric(task)
            record[f"{task}/{name}"] = None if math.isnan(value) else value
        records.append(record)
    return records
