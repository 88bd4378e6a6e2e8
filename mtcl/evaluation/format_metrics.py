"""Format a model's metrics as a table for the terminal."""

import math
from collections.abc import Mapping

from mtcl.evaluation.evaluator import Metrics
from mtcl.tasks.base import Task

COUNT_UNITS = {"not_finite": "pixels", "absent_classes": "classes"}  # metrics that count


def format_metrics(tasks: Mapping[str, Task], columns: Mapping[str, Metrics]) -> str:
    """A row per task and metric, the headline first (marked *, said below), a column per heading; fractions in
    percent.

    Without the single classes' IoU, without counts of what was not finite where there was nothing of it, and without a
    second mIoU where every class occurs in the labels.
    """
    rows = [("task", "metric", *columns)]
    for name, task in tasks.items():
        found = {metric: None for column in reversed(list(columns.values())) for metric in column[name]}
        headline, _ = task.choose_metric(found)
        for metric in [headline, *(m for m in found if m != headline)]:
            values = [column[name].get(metric, math.nan) for column in columns.values()]
            if metric.startswith("IoU/") or (metric in COUNT_UNITS and not any(v > 0 for v in values)):
                continue
            if metric == "mIoU_present" and not any(
                column[name].get("absent_classes", 0) > 0 for column in columns.values()
            ):
                continue
            mark = "*" if metric == headline else ""
            rows.append((name, metric + mark, *(format_value(task, metric, value) for value in values)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: tuple[str, ...]) -> str:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:2], widths))
        return "  ".join([left, *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:]))])

    note = "* the task's main metric, which compare.py, runs.py and Delta_MTL take"
    return "\n".join([line(rows[0]), "-" * len(line(rows[0])), *map(line, rows[1:]), note])


def format_value(task: Task, metric: str, value: float) -> str:
    """A metric's value with its unit; "-" where nothing valid was seen."""
    unit = task.units.get(metric, "%")
    if math.isnan(value):
        return "-"
    if metric in COUNT_UNITS:
        return f"{value:.0f} {COUNT_UNITS[metric]}"
    return f"{value * 100:.2f} %" if unit == "%" else f"{value:.4f} {unit}".rstrip()
