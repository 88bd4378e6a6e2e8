"""The numbers that a page's charts draw, as plain containers for JSON; NaN becomes None."""

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtcl import run_log
from mtcl.errors import UserError, escape_control_characters
from mtcl.results.columns import TASKS, Column, make_column, primary_metrics
from mtcl.results.html.collect import ReportData, ReportRow
from mtcl.results.row_labels import format_setting
from mtcl.results.rows import Row
from mtcl.results.runs import WEIGHT, differing_keys, is_regularizer_off, result_settings
from mtcl.results.tables import DIGITS, column_heading, find_best
from mtcl.tasks import TASK_NAMES

MOST_CURVES = 60  # lines of which curves are embedded
POINTS = 150  # of a curve of losses, each a mean over some steps
MOST = 1e100  # of a value in a curve: sums and scales of it are numbers, too
MOST_BYTES = 64 * 2**20  # of a log that is read
NOT_SWEPT = ("step", "checkpoint")  # of a row's identity, no settings

Points = list[tuple[int, float]]  # step, value
Curves = dict[str, Points]  # "val/task/metric" or "train/name" -> its points


def number(value: float) -> float | None:
    """Five digits are more than a screen shows."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


# Columns and rows


def column_data(columns: Sequence[Column]) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{column.task} {column.metric}".strip(),
            "heading": f"{column.task} {column_heading(column)}".strip(),
            "axis": [column.task, column_heading(column)]
            if column.task
            else [column.metric.partition(" ")[0], column_heading(column)[-5:]],
            "unit": column.unit,
            "scale": 100 if column.unit == "%" and column.task else 1,
            "digits": DIGITS.get(column.unit, 4),
            "higher": column.higher_is_better,
        }
        for column in columns
    ]


def cell_data(row: Row, columns: Sequence[Column]) -> list[list[float | None]]:
    """(mean, standard deviation) of each column, None where there is none."""
    return [[number(found.mean), number(found.std)] for found in map(row.summarize, columns)]


def find_all_best(columns: Sequence[Column], rows: Sequence[Row], ranked: bool) -> dict[Column, list[bool]]:
    return {column: find_best(column, rows) if ranked else [False] * len(rows) for column in columns}


# Swept keys


def swept_keys(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """Numeric config keys in which the rows differ -> their value in each row; None: it has none there.

    The regulariser's weight comes first, and is 0 where there is no regulariser.
    """
    known = [result_settings(row.runs[0]) if not row.is_baseline else {} for row in rows]
    for settings, row in zip(known, rows):
        if WEIGHT in settings and is_regularizer_off(row.runs[0]):
            settings[WEIGHT] = 0.0
    keys = differing_keys([settings for settings in known if settings] or [{}])
    found = {}
    for key in sorted(keys, key=lambda key: key != WEIGHT):
        values = [plain_number(settings.get(key)) for settings in known]
        numbers = {value for value in values if value is not None}
        if key not in NOT_SWEPT and len(numbers) > 1:
            found[key] = values
    return found


def plain_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def series_labels(rows: Sequence[Row], key: str) -> list[str]:
    """What a row is beside ``key``: rows that share it are one series over ``key``."""
    known = [{k: v for k, v in result_settings(row.runs[0]).items() if k != key} for row in rows]
    if key == WEIGHT:  # regularizer=none is the series' 0
        known = [{k: v for k, v in settings.items() if k != "regularizer._target_"} for settings in known]
    keys = differing_keys(known or [{}])
    return [", ".join(f"{k}={format_setting(settings.get(k))}" for k in keys) for settings in known]


# Curves


def read_log(path: Path) -> tuple[Curves, list[str]]:
    """The numbers of a run's log.jsonl by name, and sentences on what it does not hold."""
    if not os.path.lexists(path):
        return {}, ["It has no log.jsonl, so it has no curves."]
    curves: Curves = defaultdict(list)
    damaged = 0
    try:
        if os.path.getsize(path) > MOST_BYTES:
            return {}, [f"Its log.jsonl is larger than {MOST_BYTES // 2**20} MB and is not read."]
        for line in run_log.read_lines(path):
            damaged += line.record is None
            add_record(line.record or {}, curves)
    except UserError as error:
        return {}, [escape_control_characters(f"It has no curves: {error}.")]
    except OSError as error:
        return {}, [f"Its log.jsonl can't be read ({error.strerror or error})."]
    told = [f"{damaged} line{'s' * (damaged > 1)} of its log.jsonl can't be read."] if damaged else []
    if not any(name.startswith("train/") for name in curves):
        told.append("Its log.jsonl holds no training step yet.")
    return dict(curves), told


def add_record(record: Mapping[str, Any], curves: Curves) -> None:
    """Add the numbers of a training step's or a validation's record to ``curves``."""
    kind = record.get("kind")
    for name, value in record.items() if kind in ("train", "val") else ():
        if name not in ("step", "kind") and value is not None and abs(value) < MOST:
            curves[f"{kind}/{name}"].append((record["step"], value))


def average_points(points: Points, width: int) -> Points:
    """The mean over each stretch of ``width`` steps, at the mean of its steps."""
    stretches: dict[int, Points] = defaultdict(list)
    for step, value in points:
        stretches[step // width].append((step, value))
    return [(round(mean([s for s, _ in part])), mean([v for _, v in part])) for part in stretches.values()]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def curve_data(lines: Sequence[ReportRow]) -> tuple[dict[str, Any], dict[Path, list[str]]]:
    """The charts and what each draws of the first :data:`MOST_CURVES` lines; sentences on each run's log.

    ``charts``: title, group, unit, ...; ``lines``: line -> chart -> per seed [steps, values].
    """
    read: dict[Path, Curves] = {}
    told: dict[Path, list[str]] = {}
    for folder in (folder for line in lines[:MOST_CURVES] for folder in line.folders if folder.path.is_dir()):
        read[folder.path], told[folder.path] = read_log(folder.path / "log.jsonl")
    last = max((points[-1][0] for curves in read.values() for points in curves.values()), default=0)
    width = max(1, math.ceil((last + 1) / POINTS))
    charts = choose_charts(list(read.values()))
    drawn = []
    for line in lines[:MOST_CURVES]:
        of_line: dict[int, list[list[list[float]]]] = {}
        for i, chart in enumerate(charts):
            seeds = [read.get(folder.path, {}).get(chart["source"], []) for folder in line.folders]
            if chart["group"] == "loss":
                seeds = [average_points(points, width) for points in seeds]
            seeds = [points for points in seeds if points]
            if seeds:
                of_line[i] = [
                    [[s for s, _ in points], [float(f"{v * chart['scale']:.4g}") for _, v in points]]
                    for points in seeds
                ]
        drawn.append(of_line)
    return {"charts": charts, "lines": drawn, "width": width}, told


def choose_charts(read: Sequence[Curves]) -> list[dict[str, Any]]:
    """A chart of each task's headline over validations, then one of each loss."""
    names = {name for curves in read for name in curves}
    charts = []
    for task in TASK_NAMES:
        wanted = (*primary_metrics(task), *((TASKS[task].fallback_metric,) if TASKS[task].fallback_metric else ()))
        counted = {
            m: max(len(curves.get(f"val/{task}/{m}", ())) for curves in read)
            for m in wanted
            if f"val/{task}/{m}" in names
        }
        if counted:  # odsF may stand at the end only, where the loss has a curve
            metric = next((m for m, count in counted.items() if count > 1), next(iter(counted)))
            column = make_column(task, metric)
            scale = 100 if column.unit == "%" else 1
            about = {"title": f"{task} {column_heading(column)}", "group": "metric", "source": f"val/{task}/{metric}"}
            charts.append(about | {"scale": scale, "digits": DIGITS.get(column.unit, 4), "unit": column.unit})
    losses = sorted(name.removeprefix("train/") for name in names if name.startswith("train/"))
    order = [*(task for task in TASK_NAMES if task in losses), *(n for n in losses if n not in (*TASK_NAMES, "lr"))]
    for name in order:
        about = {"title": f"{name} loss", "group": "loss", "source": f"train/{name}"}
        charts.append(about | {"scale": 1, "digits": 4, "unit": ""})
    return charts


# Together


def data(collection: ReportData) -> tuple[dict[str, Any], dict[Path, list[str]]]:
    """What page.js draws, but for the pictures; and sentences on each run's log."""
    found = collection.comparison
    columns, rows = (found.columns, found.rows) if found else ([], [])
    swept = swept_keys(rows)
    curves, told = curve_data(collection.lines)
    return {
        "columns": column_data(columns),
        "rows": [
            {"label": line.label, "baseline": bool(line.row and line.row.is_baseline), "numbers": line.row is not None}
            for line in collection.lines
        ],
        "cells": [cell_data(row, columns) for row in rows],
        "swept": {key: {"values": values, "series": series_labels(rows, key)} for key, values in swept.items()},
        "curves": curves,
    }, told
