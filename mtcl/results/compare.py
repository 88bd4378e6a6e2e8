"""Compare finished runs: one row per configuration, with Delta_MTL and paired differences over seeds.

:mod:`mtcl.results.tables` renders the comparison; :mod:`mtcl.results.runs` reads the runs and
:mod:`mtcl.results.rows` groups them.
"""

import itertools
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mtcl.errors import UserError, escape_control_characters
from mtcl.metrics.delta import MTAN_METRICS, delta_mtl, delta_p
from mtcl.results.columns import Column
from mtcl.results.comparability import (
    check_backbone,
    check_same_data,
    check_same_scoring,
    describe_provenance,
    join_some,
    note_different_baselines,
    note_different_tasks,
    note_missing_values,
    note_zero_weight,
)
from mtcl.results.published import PublishedTable, add_published_rows, read_published
from mtcl.results.rows import Row, check_unique_seeds, choose_columns, fill_row, is_primary, make_rows
from mtcl.results.runs import (
    REGULARIZER,
    Run,
    differing_keys,
    distinguishing_settings,
    find_runs,
    is_regularizer_off,
    result_settings,
)
from mtcl.results.statistics import PairedDifference, adjust_by_holm, paired_difference
from mtcl.tasks.names import TASK_NAMES

SINGLE_TASK = "single-task"  # the label of the baselines' row


@dataclass(frozen=True, eq=False)
class Difference:
    """``row`` minus ``reference`` over the seeds that both have.

    Attributes:
        row: the row.
        reference: the row that is subtracted.
        columns: column -> mean difference and its interval.
        adjusted_p_values: Holm's p-values over all intervals of the comparison; None if they were not requested.
    """

    row: Row
    reference: Row
    columns: dict[Column, PairedDifference]
    adjusted_p_values: Mapping[Column, float] | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """The content of a table.

    Attributes:
        columns: a primary metric per task, possibly further metrics, then Deltas.
        rows: the single-task baseline if there is one, then a row per configuration, then published rows.
        differences: each row minus the reference.
        notes: sentences for below the table; those that question its numbers begin with "warning:".
    """

    columns: list[Column]
    rows: list[Row]
    differences: list[Difference]
    notes: list[str]


def compare(
    sources: Sequence[Path],
    baseline: Sequence[Path] = (),
    against: str | None = None,
    by: Sequence[str] = (),
    all_metrics: bool = False,
    holm: bool = False,
    published: Path | None = None,
) -> Comparison:
    """Compare all runs at or below ``sources``.

    Args:
        sources: run folders, folders of runs, files of metrics.
        baseline: single-task runs or a file of their values, for Delta_MTL; or runs of one multi-task row, which is
            the same as ``against``.
        against: the row to subtract from the others: a run, a folder of runs that form one row, or a row's label.
        by: config keys, or groups of keys, that alone distinguish rows; empty for all that affect the numbers.
        all_metrics: add a column for each metric, not only for each task's primary one.
        holm: decide by p-values that are corrected for the number of intervals.
        published: file of rows of published tables (:mod:`mtcl.results.published`), shown below those of the runs.

    Raises:
        UserError: the runs do not belong in one table, or an argument fits none of them.
    """
    table = None if published is None else read_published(published)
    runs, notes = find_runs(sources)
    return compare_runs(runs, baseline, against, by, all_metrics, notes, holm, table)


def compare_runs(
    runs: Sequence[Run],
    baseline: Sequence[Path] = (),
    against: str | None = None,
    by: Sequence[str] = (),
    all_metrics: bool = False,
    notes: Sequence[str] = (),
    holm: bool = False,
    published: PublishedTable | None = None,
) -> Comparison:
    """Compare ``runs`` as :func:`compare` does; ``notes`` are those of reading the runs."""
    notes = list(notes)
    single_task_runs, reference_runs = _read_reference(baseline, against, notes)
    paths = {run.path.resolve() for run in runs}
    runs = [*(run for run in reference_runs if run.path.resolve() not in paths), *runs]
    all_runs = [*runs, *single_task_runs]
    notes += check_same_data(all_runs) + check_same_scoring(all_runs)
    rows = make_rows(runs, by, notes)
    notes += note_different_tasks(rows)
    if single_task_runs:
        check_backbone(rows, single_task_runs)
    columns = choose_columns(all_runs, all_metrics, notes)
    for row in rows:
        fill_row(row, columns)
    primary = [column for column in columns if is_primary(column, columns)]
    if single_task_runs:
        baseline_row = make_baseline_row(single_task_runs, columns)
        notes += note_different_baselines(rows, single_task_runs)
        add_delta_column(rows, baseline_row, primary, "Delta_MTL", columns, notes)
        add_delta_p_column(rows, baseline_row, columns, notes)
        rows = [baseline_row, *rows]
    reference = choose_reference(rows, reference_runs, against, notes)
    differences = []
    if reference is not None:
        if not single_task_runs or reference_runs or against is not None:  # beside Delta_MTL only if requested
            add_delta_column(rows, reference, primary, _name_delta(reference, rows), columns, notes)
        others = [row for row in rows if row is not reference and not row.is_baseline]
        differences = [d for row in others if (d := paired_differences(row, reference, columns, notes)) is not None]
    notes += note_missing_values(rows, columns)
    if holm:
        differences = _add_holm_p_values(differences)
    notes = [describe_provenance(all_runs), *note_zero_weight(rows), *notes]
    if published is not None:
        add_published_rows(published, rows, all_runs, columns, notes)
    return Comparison(columns, rows, differences, [*map(escape_control_characters, notes)])


# Baselines and references


def _read_reference(baseline: Sequence[Path], against: str | None, notes: list[str]) -> tuple[list[Run], list[Run]]:
    """Return the single-task runs, and the runs of the row to compare with."""
    single_task_runs, reference_runs = split_baseline(baseline, notes)
    if against is None:
        return single_task_runs, reference_runs
    if reference_runs:
        raise UserError("Give either --against or a multi-task run as --baseline, not both.")
    return single_task_runs, find_runs([Path(against)])[0] if os.path.exists(against) else []


def split_baseline(paths: Sequence[Path], notes: list[str]) -> tuple[list[Run], list[Run]]:
    """Read the runs of ``--baseline``: return (single-task runs, []) or ([], multi-task runs of one row)."""
    if not paths:
        return [], []
    runs, reading_notes = find_runs(paths)
    notes += reading_notes
    if len(runs) == 1 and runs[0].path.is_file():
        values = runs[0].metrics  # a file of single-task values: treat it as one run per task
        return [Run(runs[0].path, {task: values[task]}) for task in values], []
    single_task_runs = [run for run in runs if len(run.metrics) == 1]
    if single_task_runs and len(single_task_runs) < len(runs):
        other = next(run for run in runs if run not in single_task_runs)
        raise UserError(
            f"--baseline takes single-task runs or one multi-task run, but {single_task_runs[0].path} has one task and "
            f"{other.path} has {len(other.metrics)}."
        )
    return (runs, []) if single_task_runs else ([], runs)


def make_baseline_row(single_task_runs: Sequence[Run], columns: Sequence[Column]) -> Row:
    """Return one row of all single-task runs.

    Raises:
        UserError: two runs of the same task differ in more than the seed.
    """
    for task in TASK_NAMES:
        task_runs = [run for run in single_task_runs if task in run.metrics]
        for run in task_runs[1:]:
            keys = differing_keys([distinguishing_settings(task_runs[0]), distinguishing_settings(run)])
            if keys:
                raise UserError(
                    f"{task_runs[0].path} and {run.path} are both baselines of {task}, but differ in "
                    f"{join_some(keys)}; give runs that differ in the seed only."
                )
        check_unique_seeds(Row(f"the baseline of {task}", tuple(task_runs)))
    row = Row(SINGLE_TASK, tuple(single_task_runs), is_baseline=True)
    fill_row(row, columns)
    return row


def choose_reference(rows: Sequence[Row], runs: Sequence[Run], against: str | None, notes: list[str]) -> Row | None:
    """Return the row to compare the others with: as requested, otherwise the only one that is off or the first of two.

    Args:
        rows: all rows; single-task baselines are not eligible.
        runs: the runs of the requested row.
        against: the label of the requested row, or a part of it.
        notes: gets a hint on --against if there are several candidates.
    """
    rows = [row for row in rows if not row.is_baseline]
    if runs:
        return _find_row_of(runs, rows)
    if against is not None:
        matches = [row for row in rows if row.label == against] or [row for row in rows if against in row.label]
        if len(matches) != 1:
            problem = "fits several rows" if matches else "is neither a row nor a run"
            raise UserError(f"--against {against} {problem}; choose one of: {'; '.join(row.label for row in rows)}.")
        return matches[0]
    off = [row for row in rows if is_regularizer_off(row.runs[0])]
    if len(rows) > 1 and len(off) == 1:
        return off[0]
    if len(rows) == 2 and set(rows[0].values) & set(rows[1].values):
        return rows[0]
    if len(rows) > 2 and any(set(a.values) & set(b.values) for a, b in itertools.combinations(rows, 2)):
        notes.append("--against LABEL adds the differences from that row, paired over seeds.")
    return None


def _find_row_of(runs: Sequence[Run], rows: Sequence[Row]) -> Row:
    """Return the row that contains ``runs``; ``UserError`` if they are in several rows."""
    paths = {run.path.resolve() for run in runs}
    matches = [row for row in rows if any(run.path.resolve() in paths for run in row.runs)]
    if len(matches) > 1:
        raise UserError(
            f"{runs[0].path} and the other runs to compare with are {len(matches)} rows ({matches[0].label}; "
            f"{matches[1].label}); name those of one, or give --against LABEL."
        )
    return matches[0]


def compares_on_off(reference: Row, rows: Sequence[Row]) -> bool:
    """Is the regulariser off in ``reference`` and on in all other rows, which differ in nothing else?"""
    others = [row.runs[0] for row in rows if row is not reference and not row.is_baseline]
    if reference.is_baseline or not others or not is_regularizer_off(reference.runs[0]):
        return False
    keys = [differing_keys([result_settings(reference.runs[0]), result_settings(run)]) for run in others]
    return (
        all(key.startswith("regularizer.") for run_keys in keys for key in run_keys)
        and not any(map(is_regularizer_off, others))
        and all(run.config.get(REGULARIZER) is not None for run in others)
    )


# Deltas and differences


def _name_delta(reference: Row, rows: Sequence[Row]) -> str:
    return "Delta_on/off" if compares_on_off(reference, rows) else f"Delta vs. {reference.label}"


def add_delta_column(
    rows: Sequence[Row], base: Row, primary: Sequence[Column], name: str, columns: list[Column], notes: list[str]
) -> None:
    """Add a column ``name`` with each run's Delta in percent against the means of ``base`` over its seeds.

    Args:
        rows: the rows to fill; one that lacks a task gets no Delta.
        base: the row of the baseline values.
        primary: the columns that the Delta is computed from, one per task.
        name: the metric of the new column.
        columns: gets the new column.
        notes: gets the formula and a warning on rows without a Delta.

    Raises:
        UserError: the single-task baselines lack a task.
    """
    means = {c.task: base.summarize(c).mean for c in primary if not math.isnan(base.summarize(c).mean)}
    absent = [c.task for c in primary if c.task not in means and any(c in row.values for row in rows)]
    if base.is_baseline and absent:
        raise UserError(
            f"Delta_MTL needs a single-task baseline of every task, and {base.runs[0].path} and the others given "
            f"have none of {', '.join(absent)}; train it with tasks=single_{absent[0]}."
        )
    used = [c for c in primary if c.task in means and any(c in row.values for row in rows if row is not base)]
    if not used:
        return
    if not base.is_baseline and any(means[c.task] <= 0 for c in used):
        notes.append(f"warning: no {name}: a metric of {base.label} is 0.")
        return
    direction = {c.task: c.higher_is_better for c in used}
    baseline = {c.task: means[c.task] for c in used}
    delta = Column("", name, True, "%")
    without = []
    for row in rows:
        if row.is_baseline or any(c not in row.values for c in used):
            without += [row.label] * (not row.is_baseline)
            continue
        row.values[delta] = {
            seed: delta_mtl({c.task: row.values[c].get(seed, math.nan) for c in used}, baseline, direction)
            for seed in dict.fromkeys(seed for c in used for seed in row.values[c])
        }
    columns.append(delta)
    names = ", ".join(f"{c.task} {c.metric}" for c in used)
    notes.append(f"{name} = (100/T) sum_t s_t (M_t - B_t) / B_t over {names}; B: mean of {base.label}.")
    if without:
        notes.append(f"warning: {join_some(without)} has no {name}: a task is missing.")


def add_delta_p_column(rows: Sequence[Row], base: Row, columns: list[Column], notes: list[str]) -> None:
    """Add a column of LibMTL's Delta_p in percent if all runs were scored by the protocol ``mtan``.

    Args:
        rows: the rows to fill.
        base: the row of single-task runs of every task of the rows; B is their mean over the seeds.
        columns: gets the new column.
        notes: gets the formula, or a warning if there is no Delta_p.
    """
    filled = [row for row in rows if not row.is_baseline]
    runs = [*base.runs, *(run for row in filled for run in row.runs)]
    if not filled or not all(map(is_scored_by_mtan, runs)):
        return
    baseline: dict[str, dict[str, float]] = {}
    for task in dict.fromkeys(task for run in base.runs for task in run.metrics):
        of_task = [run.metrics[task] for run in base.runs if task in run.metrics]
        baseline[task] = {n: math.fsum(one[n] for one in of_task) / len(of_task) for n in MTAN_METRICS[task]}
    delta = Column("", "Delta_p", True, "%")
    for row in filled:
        try:
            values: dict[Hashable, float] = {
                str(run.path) if run.seed is None else run.seed: delta_p(
                    run.metrics, {task: baseline[task] for task in run.metrics if task in baseline}
                )
                for run in row.runs
            }
        except UserError as error:
            notes.append(f"warning: {row.label} has no Delta_p. {error}")
            continue
        row.values[delta] = values
    columns.append(delta)
    notes.append(
        "Delta_p = (100/T) sum_t (1/M_t) sum_m s_tm (N_tm - B_tm) / B_tm over all metrics of the protocol mtan; "
        f"B: mean of {base.label}."
    )


def is_scored_by_mtan(run: Run) -> bool:
    """Return whether every task of a run was scored by the protocol ``mtan`` and has all of its metrics."""
    return all(
        run.config.get(f"evaluation.options.{task}.protocol") == "mtan"
        and set(MTAN_METRICS.get(task, {"": True})) <= set(metrics)
        for task, metrics in run.metrics.items()
    )


def paired_differences(row: Row, reference: Row, columns: Sequence[Column], notes: list[str]) -> Difference | None:
    """Compute ``row`` minus ``reference``, paired over the seeds of both; None, with a note, if nothing is paired."""
    row_seeds, reference_seeds = ([run.seed for run in r.runs if run.seed is not None] for r in (row, reference))
    common = [seed for seed in row_seeds if seed in reference_seeds]
    if not row_seeds or not reference_seeds:
        return None
    if not common:
        notes.append(f"{row.label} and {reference.label} have no seed in common, so nothing is paired.")
        return None
    for label, seeds in ((row.label, row_seeds), (reference.label, reference_seeds)):
        if unpaired := [str(seed) for seed in sorted(seeds) if seed not in common]:
            other = reference.label if label == row.label else row.label
            notes.append(f"Seed {join_some(unpaired, 10)} of {label} has no partner in {other}.")
    shared = [column for column in columns if column in row.values and column in reference.values]
    differences = {column: paired_difference(row.values[column], reference.values[column]) for column in shared}
    paired = {column: one for column, one in differences.items() if one.pairs}
    if not paired:
        notes.append(f"{row.label} and {reference.label} have no metric with values in both, so nothing is paired.")
    return Difference(row, reference, paired) if paired else None


def _add_holm_p_values(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences with Holm's p-values over all intervals that have enough pairs for a verdict."""
    p_values = holm_p_values([one.columns for one in differences])
    return [replace(one, adjusted_p_values=values) for one, values in zip(differences, p_values)]


def holm_p_values(blocks: Sequence[Mapping[Column, PairedDifference]]) -> list[dict[Column, float]]:
    """Return Holm's p-values over all blocks together, for the differences with enough pairs for a verdict."""
    tested = [(i, column) for i, block in enumerate(blocks) for column, pair in block.items() if pair.has_enough_pairs]
    values = adjust_by_holm([blocks[i][column].p_value for i, column in tested])
    p_values: list[dict[Column, float]] = [{} for _ in blocks]
    for (i, column), value in zip(tested, values):
        p_values[i][column] = value
    return p_values
