"""What run folders hold: how far each run is, and its numbers. Reads only, and disturbs no run that is going on."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtcl.entry.compare import column_of, parsed_metrics, primaries, read_json, read_yaml
from mtcl.entry.tables import figure
from mtcl.errors import UserError
from mtcl.tasks import TASK_NAMES
from mtcl.training.checkpoint import is_claimed

STATES = ("running", "finished", "interrupted", "pruned", "failed", "not started", "evaluation", "broken")
SIGNS = ("metrics.json", "config.yaml", "log.jsonl")  # any of these makes a folder a run's
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
    asked: int | None = None
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    changed: float = 0.0
    note: str = ""

    def headline(self, task: str) -> tuple[str, float]:
        """The metric that stands for a task here, and its value."""
        known = self.metrics.get(task, {})
        name = next((name for name in primaries(task) if name in known), primaries(task)[0])
        return name, known.get(name, math.nan)


def list_runs(sources: Sequence[Path]) -> list[RunState]:
    """Every run at or below ``sources``, newest first."""
    folders: dict[Path, None] = {}
    for source in sources:
        if not source.is_dir():
            raise UserError(f"{source} is not a folder; give folders of runs.")
        folders |= dict.fromkeys(run_folders(source))
    return sorted(map(look, folders), key=lambda run: -run.changed)


def run_folders(source: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(source):
        folders[:] = [name for name in folders if name not in INSIDE and not name.startswith(".")]
        if any(sign in files for sign in SIGNS):
            yield Path(root)


def look(folder: Path) -> RunState:
    """A run's state; "broken" with a reason where its files can't be read."""
    changed = max((path.stat().st_mtime for name in SIGNS if (path := folder / name).exists()), default=0.0)
    try:
        return _state(folder, changed)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return RunState(folder, "broken", changed=changed, note=why)


def _state(folder: Path, changed: float) -> RunState:
    claimed = is_claimed(folder)  # first: a run writes its metrics before it lets go
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    asked = config.get("trainer", {}).get("max_steps")
    done = folder / "metrics.json"
    facts = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    if done.is_file() and not claimed:
        metrics = parsed_metrics(done, read_json(done))
        if not config and ("checkpoint" in facts or "predictions" in facts):
            return RunState(folder, "evaluation", facts.get("step"), None, metrics, changed)
        step = facts.get("step")
        if None in (step, asked) or step >= asked or config["trainer"].get("dry_run"):
            return RunState(folder, "finished", step, step if asked is None else asked, metrics, changed)
    step, metrics = read_log(folder / "log.jsonl")
    step = max(step, facts.get("step") or 0)
    record = folder.with_name(f"{folder.name}.json")  # of a search
    ended = read_json(record) if record.is_file() else {}
    state = "running" if claimed else "interrupted" if step else "not started"
    if not claimed and ended.get("state") in ("pruned", "failed"):
        state = ended["state"]
    return RunState(folder, state, step, asked, metrics, changed, str(ended.get("reason") or ""))


def read_log(path: Path) -> tuple[int, dict[str, dict[str, float]]]:
    """Steps done and the last validation of a ``log.jsonl``; 0 and {} where there is none."""
    step, metrics = 0, {}
    size = path.stat().st_size if path.is_file() else 0
    for length in TAIL if size else ():
        with path.open("rb") as file:
            file.seek(max(size - length, 0))
            lines = file.read(length).split(b"\n")
        records = [json.loads(line) for line in lines[int(size > length) : -1]]  # the last is empty, or half a line
        step = max((one["step"] + (one["kind"] == "train") for one in records), default=0)
        if validations := [one for one in records if one["kind"] == "val"]:
            metrics = nested(validations[-1])
            break
        if length >= size:
            break
    return step, metrics


def nested(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """A validation's record, ``task/metric`` -> value, as {task: {metric: value}}; null becomes NaN."""
    found: dict[str, dict[str, float]] = {}
    for key, value in record.items():
        task, slash, metric = key.partition("/")
        if slash:
            found.setdefault(task, {})[metric] = math.nan if value is None else float(value)
    return found


# What is shown


def grid(runs: Sequence[RunState], now: float) -> list[list[str]]:
    """Heading and a line per run: state, steps, age, a metric per task, folder."""
    tasks = [task for task in TASK_NAMES if any(task in run.metrics for run in runs)]
    lines = [["state", "steps", "age", *map(task_heading(runs), tasks), "folder"]]
    for run in runs:
        of = "" if run.asked is None else f"/{run.asked}"
        steps = "-" if run.step is None else f"{run.step}{of}"
        cells = [short_figure(task, *run.headline(task)) for task in tasks]
        lines.append([run.state, steps, age(now - run.changed), *cells, str(run.folder)])
    return lines


def task_heading(runs: Sequence[RunState]) -> Any:
    """A task's name, with that of its metric where runs differ in it (an edge's odsF, or its loss)."""

    def heading(task: str) -> str:
        names = {run.headline(task)[0] for run in runs if task in run.metrics}
        return SHORT.get(task, task) + (f" {min(names)}" if len(names) == 1 and task == "edge" else "")

    return heading


def short_figure(task: str, metric: str, value: float) -> str:
    return figure(column_of(task, metric), value)


def age(seconds: float) -> str:
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


def as_text(runs: Sequence[RunState], width: int) -> str:
    """A table of at most ``width`` columns: what is too long of a folder's name is left out of its middle."""
    lines = grid(runs, time.time())
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    room = max(width - sum(w + 2 for w in widths[:-1]), 16)
    text = []
    for line in lines:
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line[:-1], widths))]
        text.append("  ".join([*cells, shortened(line[-1], room)]))
    text += [f"{shortened(str(run.folder), room)}: {run.note}" for run in runs if run.note]
    counts = {state: sum(run.state == state for run in runs) for state in STATES}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return "\n".join([*text, f"{len(runs)} run{'s' * (len(runs) != 1)}: {told}"]) + "\n"


def shortened(text: str, room: int) -> str:
    """
    >>> shortened("outputs/rooms/sweep/weight-0.1_seed-0_3a6dcc16", 24)
    'outputs/ro…ed-0_3a6dcc16'
    """
    if len(text) <= room:
        return text
    tail = (room - 1) * 3 // 5
    return f"{text[: room - 1 - tail]}…{text[-tail:]}"


def as_records(runs: Sequence[RunState]) -> list[dict[str, Any]]:
    """Plain values in full, for CSV and JSON."""
    records = []
    for run in runs:
        record: dict[str, Any] = {
            "folder": str(run.folder),
            "state": run.state,
            "step": run.step,
            "max_steps": run.asked,
        }
        record |= {"changed": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(run.changed)), "note": run.note}
        for task in (task for task in TASK_NAMES if task in run.metrics):
            name, value = run.headline(task)
            record[f"{task}/{name}"] = None if math.isnan(value) else value
        records.append(record)
    return records
