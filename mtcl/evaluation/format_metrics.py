"""Format a model's metrics as a table for the terminal."""

import math
from collections.abc import Mapping

from mtcl.evaluation.evaluator import Metrics
from mtcl.tasks.base import Task

COUNT_UNITS = {"not_finite": "pixels", "absent_classes": "classes"}  # metrics that count


def format_metrics(tasks: Mapping[str, Task], columns: Mapping[str, Metrics]) -> str:
    """Format a table with a row per task and metric and a column per heading; fractions in percent.

    A task's primary metric comes first and is marked with a star, which a note explains. Left out are the IoU of single
    classes, counts that are zero, and the second mIoU where every class occurs in the labels.

    Args:
        tasks: name -> task, whose metrics are shown; none: all metrics, of a distillation, as plain numbers.
        columns: heading -> metrics.
    """
    rows = [("task", "metric", *columns)]
    for name, task in tasks.items():
        metrics = {metric: None for column in reversed(list(columns.values())) for metric in column[name]}
        primary, _ = task.choose_metric(metrics)
        for metric in [primary, *(m for m in metrics if m != primary)]:
            values = [column[name].get(metric, math.nan) for column in columns.values()]
            if metric.startswith("IoU/") or (metric in COUNT_UNITS and not any(v > 0 for v in values)):
                continue
            if metric == "mIoU_present" and not any(
                column[name].get("absent_classes", 0) > 0 for column in columns.values()
            ):
                continue
            mark = "*" if metric == primary else ""
            rows.append((name, metric + mark, *(format_value(task, metric, value) for value in values)))
    for name in () if tasks else dict.fromkeys(name for column in columns.values() for name in column):
        metrics = dict.fromkeys(metric for column in columns.values() for metric in column[name])
        rows += [(name, m, *(f"{column[name].get(m, math.nan):.4f}" for column in columns.values())) for m in metrics]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: tuple[str, ...]) -> str:
        names = "  ".join(cell.ljust(width) for cell, width in zip(row[:2], widths))
        return "  ".join([names, *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:]))])

    note = "* the task's main metric, which mtcl compare, mtcl runs and Delta_MTL take"
    return "\n".join([line(rows[0]), "-" * len(line(rows[0])), *map(line, rows[1:]), *([note] if tasks else [])])


def format_value(task: Task, metric: str, value: float) -> str:
    """Format a metric's value with its unit; "-" where no pixel was valid."""
    unit = task.units.get(metric, "%")
    if math.isnan(value):
        return "-"
    if metric in COUNT_UNITS:
        return f"{value:.0f} {COUNT_UNITS[metric]}"
    return f"{value * 100:.2f} %" if unit == "%" else f"{value:.4f} {unit}".rstrip()
