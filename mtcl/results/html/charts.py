"""Compute the numbers that a report's charts draw, as plain containers for JSON; NaN becomes None."""

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtcl import run_log
from mtcl.errors import UserError, escape_control_characters
from mtcl.results.columns import Column, make_column, primary_metrics
from mtcl.results.html.collect import ReportData, ReportRow
from mtcl.results.row_labels import format_setting
from mtcl.results.rows import Row
from mtcl.results.runs import REGULARIZER, WEIGHT, differing_keys, is_regularizer_off, result_settings
from mtcl.results.tables import DIGITS, column_heading, find_best
from mtcl.run_folder import LOG
from mtcl.tasks.names import SCORES, TASK_NAMES

MAX_CURVES = 60  # rows of which curves are embedded
MAX_POINTS = 150  # of a curve of losses; each is a mean over some steps
MAX_VALUE = 1e100  # of a curve, so that sums and multiples are finite
MAX_LOG_BYTES = 64 * 2**20
NOT_SWEPT = ("step", "checkpoint")  # of a row's settings: which checkpoint was scored

Points = list[tuple[int, float]]  # step, value
Curves = dict[str, Points]  # "val/task/metric" or "train/name" -> its points


def round_number(value: float) -> float | None:
    """Round to five digits, more than a screen shows; None for NaN and infinity."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


# Columns and rows


def column_data(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Return names, units and directions of the columns."""
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
    """Return mean and standard deviation of each column; None for a missing one."""
    return [[round_number(summary.mean), round_number(summary.std)] for summary in map(row.summarize, columns)]


def find_all_best(columns: Sequence[Column], rows: Sequence[Row], ranked: bool) -> dict[Column, list[bool]]:
    """Return for each column which rows are best; none if rows are not ranked."""
    return {column: find_best(column, rows) if ranked else [False] * len(rows) for column in columns}


# Swept keys


def swept_keys(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """Return the numeric config keys in which the rows differ, with their value in each row or None.

    The regulariser's weight comes first, and is 0 for rows without a regulariser.
    """
    settings = [result_settings(row.runs[0]) if not row.is_baseline else {} for row in rows]
    for one, row in zip(settings, rows):
        if WEIGHT in one and is_regularizer_off(row.runs[0]):
            one[WEIGHT] = 0.0
    keys = differing_keys([one for one in settings if one] or [{}])
    swept = {}
    for key in sorted(keys, key=lambda key: key != WEIGHT):
        values = [to_number(one.get(key)) for one in settings]
        numbers = {value for value in values if value is not None}
        if key not in NOT_SWEPT and len(numbers) > 1:
            swept[key] = values
    return swept


def to_number(value: Any) -> float | None:
    """Return a finite number as it is, and None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def series_labels(rows: Sequence[Row], key: str) -> list[str]:
    """Return a label of each row's settings without ``key``; rows of equal labels are one series over ``key``."""
    settings = [{k: v for k, v in result_settings(row.runs[0]).items() if k != key} for row in rows]
    if key == WEIGHT:  # regularizer=none is the point at 0
        settings = [{k: v for k, v in one.items() if k != REGULARIZER} for one in settings]
    keys = differing_keys(settings or [{}])
    return [", ".join(f"{k}={format_setting(one.get(k))}" for k in keys) for one in settings]


# Curves


def read_log(path: Path) -> tuple[Curves, list[str]]:
    """Return the numbers in a run's log by name, and sentences on what it lacks."""
    if not os.path.lexists(path):
        return {}, [f"It has no {LOG}, so it has no curves."]
    curves: Curves = defaultdict(list)
    damaged = 0
    try:
        if os.path.getsize(path) > MAX_LOG_BYTES:
            return {}, [f"Its {LOG} is larger than {MAX_LOG_BYTES // 2**20} MB and is not read."]
        for line in run_log.read_lines(path):
            damaged += line.record is None
            add_record(line.record or {}, curves)
    except UserError as error:
        return {}, [escape_control_characters(f"It has no curves: {error}.")]
    except OSError as error:
        return {}, [f"Its {LOG} can't be read ({error.strerror or error})."]
    notes = [f"{damaged} line{'s' * (damaged > 1)} of its {LOG} can't be read."] if damaged else []
    if not any(name.startswith("train/") for name in curves):
        notes.append(f"Its {LOG} contains no training step yet.")
    return dict(curves), notes


def add_record(record: Mapping[str, Any], curves: Curves) -> None:
    """Add the numbers of a training step's or a validation's record to ``curves``."""
    kind = record.get("kind")
    for name, value in record.items() if kind in ("train", "val") else ():
        if name not in ("step", "kind") and value is not None and abs(value) < MAX_VALUE:
            curves[f"{kind}/{name}"].append((record["step"], value))


def average_points(points: Points, width: int) -> Points:
    """Return the mean over each interval of ``width`` steps, at the mean of its steps."""
    intervals: dict[int, Points] = defaultdict(list)
    for step, value in points:
        intervals[step // width].append((step, value))
    return [(round(mean([s for s, _ in part])), mean([v for _, v in part])) for part in intervals.values()]


def mean(values: Sequence[float]) -> float:
    """Return the mean, computed with an exact sum."""
    return math.fsum(values) / len(values)


def curve_data(rows: Sequence[ReportRow]) -> tuple[dict[str, Any], dict[Path, list[str]]]:
    """Read the curves of the first :data:`MAX_CURVES` rows.

    Returns:
        The data: ``charts`` with title, group, unit, ...; ``lines``: row -> chart -> per seed [steps, values];
        ``width``: steps per point of a loss. And sentences on each run's log.
    """
    logs: dict[Path, Curves] = {}
    notes: dict[Path, list[str]] = {}
    for folder in (folder for row in rows[:MAX_CURVES] for folder in row.folders if folder.path.is_dir()):
        logs[folder.path], notes[folder.path] = read_log(folder.files.log)
    last = max((points[-1][0] for curves in logs.values() for points in curves.values()), default=0)
    width = max(1, math.ceil((last + 1) / MAX_POINTS))
    charts = choose_charts(list(logs.values()))
    drawn = []
    for row in rows[:MAX_CURVES]:
        row_curves: dict[int, list[list[list[float]]]] = {}
        for i, chart in enumerate(charts):
            seeds = [logs.get(folder.path, {}).get(chart["source"], []) for folder in row.folders]
            if chart["group"] == "loss":
                seeds = [average_points(points, width) for points in seeds]
            seeds = [points for points in seeds if points]
            if seeds:
                row_curves[i] = [
                    [[s for s, _ in points], [float(f"{v * chart['scale']:.4g}") for _, v in points]]
                    for points in seeds
                ]
        drawn.append(row_curves)
    return {"charts": charts, "lines": drawn, "width": width}, notes


def choose_charts(logs: Sequence[Curves]) -> list[dict[str, Any]]:
    """Return a chart of each task's primary metric over validations, then one of each loss."""
    names = {name for curves in logs for name in curves}
    charts = []
    for task in TASK_NAMES:
        metrics = (*primary_metrics(task), *((fallback,) if (fallback := SCORES[task].fallback_metric) else ()))
        counted = {
            m: max(len(curves.get(f"val/{task}/{m}", ())) for curves in logs)
            for m in metrics
            if f"val/{task}/{m}" in names
        }
        if counted:  # odsF may be known at the end only, while the loss has a curve
            metric = next((m for m, count in counted.items() if count > 1), next(iter(counted)))
            column = make_column(task, metric)
            scale = 100 if column.unit == "%" else 1
            about = {"title": f"{task} {column_heading(column)}", "group": "metric", "source": f"val/{task}/{metric}"}
            charts.append(about | {"scale": scale, "digits": DIGITS.get(column.unit, 4), "unit": column.unit})
    losses = sorted(name.removeprefix("train/") for name in names if name.startswith("train/"))
    order = [*(task for task in TASK_NAMES if task in losses), *(n for n in losses if n not in (*TASK_NAMES, "lr"))]
    for name in order:
        title = "total loss" if name == "loss" else f"{name} loss"
        about = {"title": title, "group": "loss", "source": f"train/{name}"}
        charts.append(about | {"scale": 1, "digits": 4, "unit": ""})
    return charts


# All data


def chart_data(report: ReportData) -> tuple[dict[str, Any], dict[Path, list[str]]]:
    """Return what page.js draws, except the images, and sentences on each run's log."""
    comparison = report.comparison
    columns, rows = (comparison.columns, comparison.rows) if comparison else ([], [])
    swept = swept_keys(rows)
    curves, notes = curve_data(report.rows)
    return {
        "columns": column_data(columns),
        "rows": [
            {"label": one.label, "baseline": bool(one.row and one.row.is_baseline), "numbers": one.row is not None}
            for one in report.rows
        ],
        "cells": [cell_data(row, columns) for row in rows],
        "swept": {key: {"values": values, "series": series_labels(rows, key)} for key, values in swept.items()},
        "curves": curves,
    }, notes
