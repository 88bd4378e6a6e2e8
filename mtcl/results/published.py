"""Rows of published tables that stand beside runs: read from a YAML or CSV file, marked, never ranked with them.

YAML, with an entry per row; all but ``rows`` and a row's ``label`` and metrics may be left out::

    source: the paper or file, for the rows without a source of their own
    settings: {data.name: nyuv2_13} # of the runs that these rows compare with
    rows:
      - label: single-task
        single_task: true # the baseline of Delta_p
        semseg: {mIoU: 0.5350}
        depth: {abs_err: 0.3926}
      - {label: EW, seeds: 3, delta_p: -1.78, source: another paper, semseg: {mIoU: 0.5393}, depth: {abs_err: 0.3825}}

CSV, with a column for each of these keys, and ``TASK/METRIC`` for metrics; an empty cell is no value::

    label,source,single_task,seeds,delta_p,semseg/mIoU,depth/abs_err

Values are in the units of a metrics.json: fractions, metres, degrees; ``delta_p`` is in percent, as printed.
"""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtcl.errors import UserError, escape_control_characters
from mtcl.metrics.delta import MTAN_METRICS, delta_p
from mtcl.results.columns import Column
from mtcl.results.comparability import join_some
from mtcl.results.rows import Row
from mtcl.results.run_files import BOOL, MAPPING, POSITIVE_INT, TEXT, Check, Metrics, check_types, parse_metrics
from mtcl.results.runs import Run
from mtcl.safe_files import read_text, read_yaml
from mtcl.tasks.names import TASK_NAMES

MARK = " (published)"
NUMBER: Check = (
    "a finite number",
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
)
ROW_CHECKS: Mapping[str, Check] = {
    "label": TEXT,
    "source": TEXT,
    "single_task": BOOL,
    "seeds": POSITIVE_INT,
    "delta_p": NUMBER,
}
FILE_CHECKS: Mapping[str, Check] = {
    "source": TEXT,
    "settings": MAPPING,
    "rows": ("a list of rows", lambda value: isinstance(value, list) and bool(value)),
}


@dataclass(frozen=True)
class PublishedRow:
    """A row of a published table.

    Attributes:
        label: name of the method.
        source: where the numbers stand; empty if the file does not say.
        metrics: task -> metric -> value in the units of a metrics.json; NaN where the table has none.
        is_single_task: the row holds the single-task baselines, each task by a model of its own.
        seeds: number of runs that the numbers are the mean of; None: unknown.
        delta_p: in percent, as printed; None: not printed.
    """

    label: str
    source: str
    metrics: Metrics
    is_single_task: bool = False
    seeds: int | None = None
    delta_p: float | None = None


@dataclass(frozen=True)
class PublishedTable:
    """The content of a file of published rows.

    Attributes:
        path: the file.
        rows: in the order of the file.
        settings: dotted config key -> value of the runs that the rows compare with.
    """

    path: Path
    rows: tuple[PublishedRow, ...]
    settings: Mapping[str, Any]


# Reading


def read_published(path: Path) -> PublishedTable:
    """Read a file of published rows; the module's text has its format.

    Raises:
        UserError: it can't be read, or has another form; names the file and the row.
    """
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".csv"):
        raise UserError(f"--published {path} must be a .yaml or .csv file.")
    content = {"rows": _read_csv(path)} if suffix == ".csv" else read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping with the key rows, not a {type(content).__name__}.")
    _check_keys(path, content, FILE_CHECKS)
    check_types(path, content, FILE_CHECKS)
    if content.get("rows") is None:
        raise UserError(f"{path} has no rows; give at least one, with a label and a task's metrics.")
    source = content.get("source") or ""
    rows = tuple(_parse_row(path, number, row, source) for number, row in enumerate(content["rows"], start=1))
    labels = [row.label for row in rows]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"{path} has several rows with the label {repeated[0]}; give each its own.")
    if sum(row.is_single_task for row in rows) > 1:
        raise UserError(f"{path} has several rows with single_task: true; Delta_p needs one baseline.")
    return PublishedTable(path, rows, content.get("settings") or {})


def _check_keys(
    path: Path, content: Mapping[Any, Any], keys: Sequence[str] | Mapping[str, Any], position: str = ""
) -> None:
    unknown = [key for key in content if key not in keys]
    if unknown:
        name = escape_control_characters(str(unknown[0]))[:60]
        raise UserError(f"{path} has the unknown key {name}{position}; known are {', '.join(keys)}.")


def _parse_row(path: Path, number: int, content: Any, source: str) -> PublishedRow:
    position = f" in row {number}"
    if not isinstance(content, dict):
        example = "{label: EW, semseg: {mIoU: 0.5}}"
        raise UserError(f"{path} has no mapping{position}; write label and metrics, as {example}.")
    _check_keys(path, content, (*ROW_CHECKS, *TASK_NAMES), position)
    values = {key: value for key, value in content.items() if value is not None}
    if "label" not in values:
        raise UserError(f"{path} has no label{position}.")
    row_path = Path(f"{path}, row {number}")  # for messages
    check_types(row_path, values, ROW_CHECKS)
    metrics = parse_metrics(row_path, {task: values[task] for task in TASK_NAMES if task in values})
    return PublishedRow(
        label=escape_control_characters(values["label"]),
        source=escape_control_characters(values.get("source", source)),
        metrics=metrics,
        is_single_task=values.get("single_task", False),
        seeds=values.get("seeds"),
        delta_p=values.get("delta_p"),
    )


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a CSV file as those of a YAML file."""
    try:
        lines = list(csv.reader(io.StringIO(read_text(path)), strict=True))
    except csv.Error as error:
        raise UserError(f"{path} is not a readable CSV file: {error}.") from error
    if not lines or "label" not in lines[0]:
        raise UserError(f"{path} must begin with a line of column names, among them label.")
    head = lines[0]
    rows = []
    for number, line in enumerate(lines[1:], start=1):
        if not line:
            continue
        if len(line) != len(head):
            raise UserError(f"{path} has {len(line)} cells in row {number}, and {len(head)} column names.")
        rows.append(dict(_nest_cells(head, line)))
    return rows


def _nest_cells(head: Sequence[str], line: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield a row's keys with values, the metrics of a task as one mapping; empty cells are left out."""
    tasks: dict[str, dict[str, Any]] = {}
    for name, text in zip(head, line):
        task, slash, metric = name.partition("/")
        if not text.strip():
            continue
        if slash:
            tasks.setdefault(task, {})[metric] = _parse_cell(text)
        else:
            yield name, text if name in ("label", "source") else _parse_cell(text)
    yield from tasks.items()


def _parse_cell(text: str) -> Any:
    """Return a cell's number or truth value; other text unchanged, which the checks refuse."""
    if text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    for parse in (int, float):
        try:
            return parse(text)
        except ValueError:
            continue
    return text


# Rows beside runs


def add_published_rows(
    table: PublishedTable, rows: list[Row], runs: Sequence[Run], columns: list[Column], notes: list[str]
) -> None:
    """Append the published rows to those of runs, with the columns that these have.

    Delta_p is the printed one, or else that against the file's single-task row, where both have all metrics. Its column
    is added if any row has it and the table has none.

    Args:
        table: the published rows.
        rows: get the published rows at their end.
        runs: all runs of the comparison.
        columns: of the comparison.
        notes: get the sources, the formula of a Delta_p, and warnings on runs with other settings.
    """
    delta = next((c for c in columns if c.metric == "Delta_p"), Column("", "Delta_p", True, "%"))
    deltas = {row.label: value for row in table.rows if (value := _find_delta_p(row, table.rows)) is not None}
    if deltas and delta not in columns:
        columns.append(delta)
    for published in table.rows:
        row = Row(published.label + MARK, (), is_published=True, published_seeds=published.seeds)
        for column in columns:
            value = published.metrics.get(column.task, {}).get(column.metric, math.nan)
            if published.label in deltas and column == delta:
                value = deltas[published.label]
            if not math.isnan(value):
                row.values[column] = {"published": value}
        rows.append(row)
    notes += _describe(table, deltas) + _check_settings(table, runs)


def _find_delta_p(row: PublishedRow, rows: Sequence[PublishedRow]) -> float | None:
    """Return a row's Delta_p in percent: as printed, or against the single-task row; None if metrics are missing."""
    if row.delta_p is not None:
        return row.delta_p
    baseline = next((one for one in rows if one.is_single_task), None)
    if baseline is None or row.is_single_task or not set(row.metrics) <= set(MTAN_METRICS):
        return None
    try:
        value = delta_p(row.metrics, baseline.metrics)
    except UserError:  # other tasks or fewer metrics
        return None
    return None if math.isnan(value) else value


def _describe(table: PublishedTable, deltas: Mapping[str, float]) -> list[str]:
    """Return notes on where the rows come from."""
    labels: dict[str, list[str]] = {}
    for row in table.rows:
        labels.setdefault(row.source, []).append(row.label)
    notes = [f"Published rows are those of {table.path}; they are not ranked with the others."]
    for source, names in labels.items():
        origin = f"source: {source.rstrip('.')}" if source else "the file names no source"
        notes.append(f"{join_some(names, 20)}: {origin}.")
    computed = [row.label for row in table.rows if row.label in deltas and row.delta_p is None]
    if computed:
        single = next(row.label for row in table.rows if row.is_single_task)
        notes.append(f"Delta_p of {join_some(computed, 20)}: computed against {single}{MARK}, over all metrics.")
    if printed := [row.label for row in table.rows if row.delta_p is not None]:
        notes.append(f"Delta_p of {join_some(printed, 20)}: as printed.")
    return notes


def _check_settings(table: PublishedTable, runs: Sequence[Run]) -> list[str]:
    """Return a warning for each setting in which runs differ from those that the rows compare with."""
    notes = []
    for key, value in table.settings.items():
        if others := [run for run in runs if run.config.get(key, value) != value]:
            notes.append(
                f"warning: the rows of {table.path} compare with runs of {key}={value}, but {others[0].path} has "
                f"{others[0].config[key]}."
            )
    return notes
