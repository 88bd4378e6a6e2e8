"""What run folders hold: how far each run is, and its numbers. Reads only, and disturbs no run that is going on."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtcl import run_log
from mtcl.errors import UserError, escape_control_characters
from mtcl.results.columns import make_column, primary_metrics
from mtcl.results.run_files import CONFIG, METRICS, RECORD, read_config, read_json_object, read_metrics, read_record
from mtcl.results.tables import format_value
from mtcl.run_lock import is_locked
from mtcl.tasks import TASK_NAMES

STATES = ("running", "finished", "interrupted", "pruned", "failed", "not started", "evaluation", "broken")
SIGNS = (METRICS, CONFIG, run_log.NAME)  # any of these makes a folder a run's
INSIDE = ("checkpoints", "panels")  # parts of a run's folder
TAIL = (1 << 16, 1 << 20)  # bytes at the end of a log that are looked at, and where they hold no validation
SHORT = {"human_parts": "parts"}


@dataclass(frozen=True)
class RunState:
    """``step`` of ``asked``: optimiser steps done. ``metrics``: {task: {metric: value}} of the last state that was
    scored, fractions, metres, degrees. ``changed``: when it last wrote something, seconds since 1970."""

    folder: Path
    state: str
    step: int | None = None
    max_steps: int | None = None
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    modified: float = 0.0
    note: str = ""

    def headline(self, task: str) -> tuple[str, float]:
        """The metric that stands for a task here, and its value."""
        known = self.metrics.get(task, {})
        name = next((name for name in primary_metrics(task) if name in known), primary_metrics(task)[0])
        return name, known.get(name, math.nan)


def list_runs(sources: Sequence[Path]) -> list[RunState]:
    """Every run at or below ``sources``, newest first."""
    folders: dict[Path, None] = {}
    for source in sources:
        if not source.is_dir():
            raise UserError(f"{source} is not a folder; give folders of runs.")
        folders |= dict.fromkeys(run_folders(source))
    return sorted(map(read_state, folders), key=lambda run: -run.modified)


def run_folders(source: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(source):
        folders[:] = [name for name in folders if name not in INSIDE and not name.startswith(".")]
        if any(sign in files for sign in SIGNS):
            yield Path(root)


def read_state(folder: Path) -> RunState:
    """A run's state; "broken" with a reason where its files can't be read."""
    modified = 0.0
    try:
        modified = max(
            (os.lstat(folder / name).st_mtime for name in SIGNS if os.path.lexists(folder / name)), default=0.0
        )
        return _state(folder, modified)
    except UserError as error:
        return RunState(folder, "broken", modified=modified, note=str(error))
    except OSError as error:  # a folder that vanishes, or may not be read
        return RunState(folder, "broken", modified=modified, note=f"{folder} can't be read ({error.strerror or error})")


def _state(folder: Path, modified: float) -> RunState:
    claimed = is_locked(folder)  # first: a run writes its metrics before it lets go
    config = _if_there(read_config, folder / CONFIG)
    max_steps = config.get("trainer.max_steps")
    facts = _if_there(read_record, folder / RECORD)
    if os.path.lexists(folder / METRICS) and not claimed:
        metrics = read_metrics(folder / METRICS)
        if not config and ("checkpoint" in facts or "predictions" in facts):
            return RunState(folder, "evaluation", facts.get("step"), None, metrics, modified)
        step = facts.get("step")
        if step is None or max_steps is None or step >= max_steps or config.get("trainer.dry_run"):
            return RunState(folder, "finished", step, step if max_steps is None else max_steps, metrics, modified)
    step, metrics = read_log(folder / run_log.NAME)
    step = max(step, facts.get("step", 0))
    ended = _if_there(read_json_object, folder.with_name(f"{folder.name}.json")) if folder.name else {}  # of a search
    state = "running" if claimed else "interrupted" if step else "not started"
    if not claimed and ended.get("state") in ("pruned", "failed"):
        state = ended["state"]
    return RunState(folder, state, step, max_steps, metrics, modified, str(ended.get("reason") or ""))


def _if_there(read: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    """Read a file by ``read``; empty where there is none."""
    return read(path) if os.path.lexists(path) else {}


def read_log(path: Path) -> tuple[int, dict[str, dict[str, float]]]:
    """Steps done and the last validation of a ``log.jsonl`` without its damaged lines; 0 and {} where there is none."""
    step, metrics = 0, {}
    for length in TAIL:
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
    """A validation's record, ``task/metric`` -> value, as {task: {metric: value}}; null becomes NaN."""
    found: dict[str, dict[str, float]] = {}
    for key, value in record.items():
        task, slash, metric = key.partition("/")
        if slash:
            found.setdefault(task, {})[metric] = math.nan if value is None else float(value)
    return found


# What is shown


def make_grid(runs: Sequence[RunState], now: float) -> list[list[str]]:
    """Heading and a line per run: state, steps, age, a metric per task, folder."""
    tasks = [task for task in TASK_NAMES if any(task in run.metrics for run in runs)]
    lines = [["state", "steps", "age", *map(task_heading(runs), tasks), "folder"]]
    for run in runs:
        of = "" if run.max_steps is None else f"/{run.max_steps}"
        steps = "-" if run.step is None else f"{run.step}{of}"
        cells = [format_task_value(task, *run.headline(task)) for task in tasks]
        lines.append(
            [run.state, steps, format_age(now - run.modified), *cells, escape_control_characters(str(run.folder))]
        )
    return lines


def task_heading(runs: Sequence[RunState]) -> Any:
    """A task's name, with that of its metric where runs differ in it (an edge's odsF, or its loss)."""

    def heading(task: str) -> str:
        names = {run.headline(task)[0] for run in runs if task in run.metrics}
        return SHORT.get(task, task) + (f" {min(names)}" if len(names) == 1 and task == "edge" else "")

    return heading


def format_task_value(task: str, metric: str, value: float) -> str:
    return format_value(make_column(task, metric), value)


def format_age(seconds: float) -> str:
    """
    >>> age(5), age(130), age(7300), age(200000), age(2e9)
    ('5 s', '2 min', '2 h', '2 d', '-')
    """
    if seconds > 1e9:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def format_runs(runs: Sequence[RunState], width: int | None) -> str:
    """A table of at most ``width`` columns: what is too long of a folder's name is left out of its middle.

    ``width`` None: names are whole, as programs need them.
    """
    lines = make_grid(runs, time.time())
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    room = widths[-1] if width is None else max(width - sum(w + 2 for w in widths[:-1]), 16)
    text = []
    for line in lines:
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line[:-1], widths))]
        text.append("  ".join([*cells, shorten_middle(line[-1], room)]))
    text += [
        f"{shorten_middle(escape_control_characters(str(run.folder)), room)}: {escape_control_characters(run.note)}"
        for run in runs
        if run.note
    ]
    counts = {state: sum(run.state == state for run in runs) for state in STATES}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return "\n".join([*text, f"{len(runs)} run{'s' * (len(runs) != 1)}: {told}"]) + "\n"


def shorten_middle(text: str, room: int) -> str:
    """
    >>> shortened("outputs/rooms/sweep/weight-0.1_seed-0_3a6dcc16", 24)
    'outputs/ro…ed-0_3a6dcc16'
    """
    if len(text) <= room:
        return text
    tail = (room - 1) * 3 // 5
    return f"{text[: room - 1 - tail]}…{text[-tail:]}"


def to_records(runs: Sequence[RunState]) -> list[dict[str, Any]]:
    """Plain values in full, for CSV and JSON."""
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
            name, value = run.headline(task)
            record[f"{task}/{name}"] = None if math.isnan(value) else value
        records.append(record)
    return records
