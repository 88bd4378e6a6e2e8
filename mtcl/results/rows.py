"""Group runs that differ in the seed only into the rows of a table, and choose its columns."""

import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mtcl.errors import UserError, escape_control_characters, find_similar, suggest
from mtcl.results.columns import NOT_FINITE, UNRANKED_METRICS, Column, make_column, primary_metrics
from mtcl.results.row_labels import make_labels, typed_choices, unique_name
from mtcl.results.runs import Run, differing_keys, distinguishing_settings, result_settings
from mtcl.results.statistics import Summary, summarize_values
from mtcl.run_folder import CONFIG, RECORD
from mtcl.tasks.names import TASK_NAMES


@dataclass(frozen=True, eq=False)
class Row:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: the row's name in the table.
        runs: one run per seed; of a baseline row the single-task runs.
        values: column -> seed -> value; without the columns of tasks that the runs do not have.
        is_baseline: the runs are the single-task baselines, each of another task.
        is_published: the values are those of a published table; there are no runs, and the row is not ranked.
        published_seeds: number of runs that a published row is the mean of; None: unknown.
    """

    label: str
    runs: tuple[Run, ...]
    values: dict[Column, dict[Hashable, float]] = field(default_factory=dict)
    is_baseline: bool = False
    is_published: bool = False
    published_seeds: int | None = None

    def summarize(self, column: Column) -> Summary:
        """Return mean, standard deviation and number of the values over seeds."""
        return summarize_values(self.values.get(column, {}).values())

    @property
    def num_seeds(self) -> int:
        """The number of seeds, 0 if unknown; of a baseline row the smallest of any column that has a value."""
        if self.is_published:
            return self.published_seeds or 0
        counts = [count for column in self.values if (count := self.summarize(column).num)]
        return min(counts, default=0) if self.is_baseline else len(self.runs)


def make_rows(runs: Sequence[Run], by: Sequence[str], notes: list[str]) -> list[Row]:
    """Group runs that differ in nothing but the seed into rows, named by the settings in which the rows differ.

    A run without a config is a row of its own. Runs with the regulariser off are equal, whatever its settings.

    Args:
        runs: the runs, in the order in which their rows shall be.
        by: config keys, or groups of keys, that alone distinguish rows; empty for all that affect the numbers.
        notes: gets notes on runs that are left out and on settings that the names do not tell.

    Raises:
        UserError: two runs of a row have the same seed, or no run has a key of ``by``.
    """
    settings = [select_keys(run, by, runs) if by else result_settings(run) for run in runs]
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(settings):
        decisive = one if by else distinguishing_settings(runs[index])
        key = json.dumps(decisive, sort_keys=True, default=str) if one else str(runs[index].path.resolve())
        groups.setdefault(key, []).append(index)
    first = [members[0] for members in groups.values()]
    with_settings = [index for index in first if settings[index]]
    texts = make_labels(
        [settings[i] for i in with_settings], [typed_choices(runs[i]) for i in with_settings], bool(by), notes
    )
    labels = dict(zip(with_settings, texts))
    names = {index: escape_control_characters(labels.get(index) or unique_name(runs[index], runs)) for index in first}
    rows = [Row(names[members[0]], tuple(runs[i] for i in members)) for members in groups.values()]
    if not by:
        rows = [drop_repeats(row, notes) for row in rows]
    for row in rows:
        check_unique_seeds(row)
        if by and (differing := differing_keys([result_settings(run) for run in row.runs])):
            notes.append(f"warning: the runs of {row.label} differ in {', '.join(differing)}, too.")
    return rows


def drop_repeats(row: Row, notes: list[str]) -> Row:
    """Leave out runs with the regulariser off that repeat another's seed with other settings of the regulariser."""
    distinct: list[Run] = []
    for run in row.runs:
        same = next((one for one in distinct if run.seed is not None and one.seed == run.seed), None)
        if same is None or result_settings(same) == result_settings(run):
            distinct.append(run)
            continue
        notes.append(
            f"warning: {run.path} is left out: its regulariser is off, as that of {same.path} with the same seed."
        )
    return Row(row.label, tuple(distinct))


def select_keys(run: Run, by: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    """Return the values of the keys, or groups of keys, ``by`` from the run's config or else its record."""
    values: dict[str, Any] = {}
    for key in by:
        settings = {**{k: v for k, v in run.record.items() if not isinstance(v, dict | list)}, **run.config}
        matches = {k: v for k, v in settings.items() if k == key or k.startswith(f"{key}.")}
        if not matches and not any(k == key or k.startswith(f"{key}.") for r in runs for k in (*r.record, *r.config)):
            similar = find_similar(key, settings)
            hint = f"; did you mean {similar[0]}?" if similar else "."
            raise UserError(f"--by {key}: no {CONFIG} or {RECORD} of the given runs has that key{hint}")
        values |= matches or {key: None}
    return values


def check_unique_seeds(row: Row) -> None:
    """Raise ``UserError`` if two runs of a row have the same seed."""
    by_seed: dict[int, Run] = {}
    for run in row.runs:
        if run.seed is not None and run.seed in by_seed:
            raise UserError(
                f"{by_seed[run.seed].path} and {run.path} are both {row.label} with seed {run.seed}; leave one of them "
                "out, or tell them apart with --by KEY."
            )
        if run.seed is not None:
            by_seed[run.seed] = run


def choose_columns(
    runs: Sequence[Run], all_metrics: bool, notes: list[str], metrics: Mapping[str, str] = MappingProxyType({})
) -> list[Column]:
    """Return the columns of a table, the metric that represents a task first.

    Args:
        runs: the runs of the table.
        all_metrics: add a column for each other metric of any run.
        notes: gets a note where edges are compared by their loss.
        metrics: task -> the metric that represents it in place of its primary metric.

    Raises:
        UserError: no run has a task or a metric of ``metrics``.
    """
    check_metrics(metrics, runs)
    columns = []
    for task in (task for task in TASK_NAMES if any(task in run.metrics for run in runs)):
        task_runs = [run for run in runs if task in run.metrics]
        primary = metrics.get(task) or choose_primary_metric(task, task_runs, notes)
        others = [
            m
            for run in task_runs
            for m, value in run.metrics[task].items()
            if m not in (primary, *UNRANKED_METRICS) and (m != NOT_FINITE or value)
        ]
        names = [primary, *dict.fromkeys(others)] if all_metrics else [primary]
        columns += [make_column(task, metric) for metric in names]
    return columns


def parse_metrics_option(text: str) -> dict[str, str]:
    """Parse the metrics that shall represent tasks: task -> metric.

    >>> parse_metrics_option("semseg/pixel_accuracy,depth/log_rmse")
    {'semseg': 'pixel_accuracy', 'depth': 'log_rmse'}

    Args:
        text: pairs ``TASK/METRIC``, separated by commas.

    Raises:
        UserError: a pair has another form, or a task has two metrics.
    """
    metrics: dict[str, str] = {}
    for pair in text.split(","):
        task, slash, metric = pair.strip().partition("/")
        if not (task and slash and metric):
            raise UserError(f"--metrics {text}: {pair!r} is not TASK/METRIC, such as semseg/pixel_accuracy.")
        if task in metrics:
            raise UserError(f"--metrics {text}: {task} has two metrics; one represents a task.")
        metrics[task] = metric
    return metrics


def check_metrics(metrics: Mapping[str, str], runs: Sequence[Run]) -> None:
    """Raise ``UserError`` if no run has a task of ``metrics`` or its metric, or if that metric has no direction."""
    for task, metric in metrics.items():
        tasks = list(dict.fromkeys(name for run in runs for name in run.metrics))
        if task not in tasks:
            raise UserError(f"--metrics {task}/{metric}: the runs have no task {task}{suggest(task, tasks)}.")
        values = [name for run in runs for name in run.metrics.get(task, {})]
        names = [name for name in dict.fromkeys(values) if name not in (*UNRANKED_METRICS, NOT_FINITE)]
        if metric not in names:
            hint = suggest(metric, names)
            raise UserError(f"--metrics {task}/{metric}: choose among {', '.join(names)}{hint}.")


def choose_primary_metric(task: str, runs: Sequence[Run], notes: list[str]) -> str:
    """Return the first primary metric that all ``runs`` have, or the first that any run has if there is none."""
    names = primary_metrics(task)
    common = [name for name in names if all(name in run.metrics[task] for run in runs)]
    chosen = common[0] if common else next((n for n in names if any(n in run.metrics[task] for run in runs)), names[0])
    if task == "edge" and chosen == "loss":
        lacking = next(run for run in runs if "odsF" not in run.metrics[task])
        notes.append(
            f"edge is compared by its loss, because {lacking.path} has no odsF; this does not compare with papers."
        )
    return chosen


def is_primary(column: Column, columns: Sequence[Column]) -> bool:
    """Is this the first column of its task?"""
    return next(c for c in columns if c.task == column.task) == column


def fill_row(row: Row, columns: Iterable[Column]) -> None:
    """Fill ``row.values`` from the row's runs; runs without a seed are keyed by their folder."""
    for column in columns:
        values: dict[Hashable, float] = {
            str(run.path) if run.seed is None else run.seed: run.metrics[column.task].get(column.metric, math.nan)
            for run in row.runs
            if column.task in run.metrics
        }
        if values:
            row.values[column] = values
