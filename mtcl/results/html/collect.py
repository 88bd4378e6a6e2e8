"""Read run folders for a report: finished and unfinished runs, what is wrong with them, and their comparison."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtcl import run_log
from mtcl.errors import UserError, escape_control_characters
from mtcl.results.comparability import DIFFERENT_SCORING, check_same_data, describe_provenance, join_some
from mtcl.results.compare import Comparison, compare_runs
from mtcl.results.row_labels import make_labels
from mtcl.results.rows import Row, choose_columns, fill_row
from mtcl.results.run_files import read_config, read_record
from mtcl.results.runs import Run, natural_key, read_run, result_settings, sort_by_settings
from mtcl.run_folder import CONFIG, MARKERS, METRICS, RECORD, RunFolder, find_run_folders


@dataclass(frozen=True, eq=False)
class ReportFolder:
    """One run folder of a report.

    Attributes:
        path: the folder, or a file of metrics.
        name: its path relative to the common parent of all, so that a shared page does not tell where they were.
        run: its numbers; None if it has none yet.
        config: dotted key -> value; empty if unknown.
        record: the content of run.json; empty if unknown.
        step: the last step; None if unknown.
        problems: sentences on what is missing or unreadable.
    """

    path: Path
    name: str
    run: Run | None
    config: dict[str, Any]
    record: dict[str, Any]
    step: int | None
    problems: list[str] = field(default_factory=list)

    @property
    def files(self) -> RunFolder:
        """The folder's file names."""
        return RunFolder(self.path)

    @property
    def seed(self) -> int | None:
        """The run's seed; None if unknown."""
        return self.record.get("seed", self.config.get("seed"))

    @property
    def max_steps(self) -> int | None:
        """The number of steps of the whole run; None if unknown."""
        return self.config.get("trainer.max_steps")

    @property
    def state(self) -> str:
        """``finished``, ``broken`` (unreadable metrics), ``running`` or ``unfinished``."""
        if self.run is not None:
            return "finished"
        if self.files.has_metrics:
            return "broken"
        return "running" if self.files.is_locked else "unfinished"

    @property
    def last_modified(self) -> str:
        """When its log, or else its metrics or config, was last written; "" if there is none of them."""
        for path in (self.files.log, self.files.metrics, self.files.config):
            try:
                return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
            except (OSError, ValueError, OverflowError):  # no such file, or a date that no calendar has
                continue
        return ""


@dataclass(frozen=True, eq=False)
class ReportRow:
    """One row of the table, one curve, one row of images: the runs that differ in the seed only.

    ``row``: its numbers; None for a run that has none.
    """

    label: str
    folders: list[ReportFolder]
    row: Row | None


@dataclass(frozen=True, eq=False)
class ReportData:
    """All data of a report.

    Attributes:
        folders: every run folder.
        rows: the rows of the comparison, then a row per run without numbers.
        comparison: the table; None if no run is finished.
        unranked_reason: why no row is marked as best; "" if rows are ranked.
    """

    folders: list[ReportFolder]
    rows: list[ReportRow]
    comparison: Comparison | None
    unranked_reason: str


def collect(
    sources: Sequence[Path],
    baseline: Sequence[Path] = (),
    against: str | None = None,
    by: Sequence[str] = (),
    holm: bool = False,
) -> ReportData:
    """Read every run at or below ``sources`` and compare the finished ones.

    Args:
        sources: run folders, folders of runs, files of metrics.
        baseline: as of :func:`mtcl.results.compare.compare`, like the further arguments.
        against: the row to subtract from the others.
        by: config keys that alone distinguish rows.
        holm: decide by corrected p-values.

    Raises:
        UserError: there is no run at all, or ``baseline``, ``against`` or ``by`` does not fit. Problems of single
            runs are reported in their :class:`ReportFolder`.
    """
    groups = find_folders(sources)
    paths = [path for group in groups for path in group]
    parent = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    folders = [read_folder(path, str(path.absolute().relative_to(parent))) for path in paths]
    by_path = {folder.path: folder.run for folder in folders if folder.run is not None}
    runs = [run for group in groups for run in sort_by_settings([by_path[path] for path in group if path in by_path])]
    names = {folder.path: folder.name for folder in folders}
    comparison, reason = _compare_finished(runs, names, baseline, against, by, holm) if runs else (None, "")
    return ReportData(folders, _make_report_rows(folders, comparison), comparison, reason)


# Reading


def find_folders(sources: Sequence[Path]) -> list[list[Path]]:
    """Return the run folders and files of metrics of each source, each once.

    A source that is a run itself stands alone, without runs below it.
    """
    resolved_paths: set[Path] = set()
    groups: list[list[Path]] = []
    for source in sources:
        if not os.path.exists(source):
            raise UserError(f"{source} does not exist; give run folders or folders of runs.")
        is_run = source.is_file() or RunFolder(source).is_run
        group: dict[Path, Path] = {}
        for path in [source] if is_run else sorted((run.path for run in find_run_folders(source)), key=natural_key):
            if path.resolve() not in resolved_paths:
                group.setdefault(path.resolve(), path)
        resolved_paths |= group.keys()
        groups.append(list(group.values()))
    if not resolved_paths:
        names = join_some([str(source) for source in sources])
        raise UserError(f"There is no run in {names}: no {' or '.join(MARKERS)} in it or below it.")
    return groups


def read_folder(path: Path, name: str) -> ReportFolder:
    """Read what is readable of a run, with a sentence on each thing that is not."""
    problems: list[str] = []
    run, config, record = None, {}, {}
    files = RunFolder(path)
    if path.is_file() or files.has_metrics:
        try:
            run = read_run(path)
            config, record = dict(run.config), dict(run.record)
        except UserError as error:
            problems.append(str(error))
    else:
        state = "it is still running" if files.is_locked else "it was interrupted (resume=auto continues it)"
        problems.append(f"It has no {METRICS}: {state}. Its curves are shown, but it is not in the table.")
    if run is None:
        config = _read(read_config, files.config, problems)
        record = _read(read_record, files.record, problems)
    elif path.is_dir() and not record:
        problems.append(f"It has no {RECORD}: its data, machine and version are unknown.")
    elif path.is_dir() and not config:
        problems.append(f"It has no {CONFIG}: its settings are unknown.")
    step = record["step"] if "step" in record else _read_last_step(files.log)
    problems = [escape_control_characters(problem) for problem in problems]
    return ReportFolder(path, name, run, config, record, step, problems)


def _read(read: Callable[[Path], dict[str, Any]], path: Path, problems: list[str]) -> dict[str, Any]:
    """Read a file by ``read``; return an empty dict if there is none, or, with a problem more, if it is unreadable."""
    try:
        return read(path) if os.path.lexists(path) else {}
    except UserError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return {}


def _read_last_step(log: Path) -> int | None:
    """Return the step of the last intact record in a run's log."""
    try:
        lines, _ = run_log.read_tail(log, 1 << 16)
    except UserError:
        return None
    return next((line.record["step"] for line in reversed(lines) if line.record is not None), None)


# Comparing


def _compare_finished(
    runs: Sequence[Run],
    names: Mapping[Path, str],
    baseline: Sequence[Path],
    against: str | None,
    by: Sequence[str],
    holm: bool,
) -> tuple[Comparison, str]:
    """Return the table of finished runs, and why it ranks nothing, or ""."""
    try:
        check_same_data(runs)
        comparison = compare_runs(runs, baseline, against, by, holm=holm)
    except UserError as error:
        if baseline or against is not None or by:
            raise
        return _list_uncompared(runs, names), str(error)
    tasks = {frozenset(run.metrics) for row in comparison.rows if not row.is_baseline for run in row.runs}
    if len(tasks) > 1:
        task_sets = "; ".join(" + ".join(sorted(names)) for names in sorted(tasks, key=sorted))
        reason = f"The runs were trained on different sets of tasks ({task_sets}), so no row is better than another."
        return comparison, reason
    reason = next((note for note in comparison.notes if DIFFERENT_SCORING in note), "").removeprefix("warning: ")
    return comparison, reason[:1].upper() + reason[1:]


def _list_uncompared(runs: Sequence[Run], names: Mapping[Path, str]) -> Comparison:
    """Return a row per run, without means and Deltas, for runs that do not belong in one table."""
    notes: list[str] = []
    columns = choose_columns(runs, False, notes)
    settings = [result_settings(run) for run in runs]
    labels = make_labels(settings, [{} for _ in runs], False, []) if all(settings) else [""] * len(runs)
    rows = []
    for run, label in zip(runs, labels):
        name = ", ".join(part for part in (names[run.path], label) if part)
        rows.append(Row(escape_control_characters(name), (run,)))
        fill_row(rows[-1], columns)
    return Comparison(columns, rows, [], [*map(escape_control_characters, [describe_provenance(runs), *notes])])


def _make_report_rows(folders: Sequence[ReportFolder], comparison: Comparison | None) -> list[ReportRow]:
    """Return a report row per row of the table, then one per run without numbers."""
    by_path = {folder.path.resolve(): folder for folder in folders}
    rows = []
    for row in comparison.rows if comparison else ():
        row_folders = [by_path.get(run.path.resolve()) or read_folder(run.path, run.name) for run in row.runs]
        rows.append(ReportRow(row.label, row_folders, row))
    without = [folder for folder in folders if folder.run is None]
    return [*rows, *(ReportRow(f"{folder.name} ({folder.state})", [folder], None) for folder in without)]
