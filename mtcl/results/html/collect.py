"""Folders as what a page tells of: runs that finished, runs that did not, what is wrong with either, one table."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtcl import run_log
from mtcl.errors import UserError, escape_control_characters
from mtcl.results.comparability import check_same_data, describe_provenance, join_some
from mtcl.results.compare import Comparison, compare_runs
from mtcl.results.row_labels import make_labels
from mtcl.results.rows import Row, choose_columns, fill_row
from mtcl.results.run_files import read_config, read_record
from mtcl.results.runs import Run, natural_key, read_run, result_settings, sort_by_settings
from mtcl.run_folder import CONFIG, METRICS, RECORD
from mtcl.run_lock import is_locked

MARKS = (METRICS, CONFIG, run_log.NAME)  # of a run folder, from its first minute on
INSIDE = ("checkpoints", "panels", ".git")  # folders that hold no runs
DIFFERENT_WAYS = "were scored in different ways"


@dataclass(frozen=True, eq=False)
class ReportRun:
    """One run folder. ``run``: its numbers, None while there are none; ``problems``: sentences about what is amiss.

    ``name``: its path below the folder of all, as a page that is handed on need not tell where on a disk they are;
    ``step``: how far it came, ``steps``: how far it was to go; None where that is not known.
    """

    path: Path
    name: str
    run: Run | None
    config: dict[str, Any]
    record: dict[str, Any]
    step: int | None
    problems: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int | None:
        return self.record.get("seed", self.config.get("seed"))

    @property
    def max_steps(self) -> int | None:
        return self.config.get("trainer.max_steps")

    @property
    def state(self) -> str:
        if self.run is not None:
            return "finished"
        if os.path.lexists(self.path / METRICS):
            return "broken"
        return "running" if is_locked(self.path) else "unfinished"

    @property
    def last_modified(self) -> str:
        """When its log, or else its numbers, were last written; "" where there is neither."""
        for name in (run_log.NAME, METRICS, CONFIG):
            try:
                seconds = (self.path / name).stat().st_mtime
                return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
            except (OSError, ValueError, OverflowError):  # none, or a date that no calendar has
                continue
        return ""


@dataclass(frozen=True, eq=False)
class ReportRow:
    """What is one row of the table, one curve, one row of pictures: the folders that differ in the seed only.

    ``row``: its numbers; None for a run that has none.
    """

    label: str
    folders: list[ReportRun]
    row: Row | None


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything read. ``comparison`` is None without a finished run; ``unranked``: why nothing is best, or ""."""

    folders: list[ReportRun]
    lines: list[ReportRow]
    comparison: Comparison | None
    unranked: str


def collect(
    sources: Sequence[Path],
    baseline: Sequence[Path] = (),
    against: str | None = None,
    by: Sequence[str] = (),
    holm: bool = False,
) -> ReportData:
    """Every run at or below ``sources``, compared as :func:`mtcl.results.compare.compare` does where it can be.

    What is wrong with one run is told of it; ``UserError`` where there is none at all, or where a given ``baseline``,
    ``against`` or ``by`` does not fit.
    """
    groups = find_folders(sources)
    paths = [path for group in groups for path in group]
    above = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    folders = [read_folder(path, str(path.absolute().relative_to(above))) for path in paths]
    read = {folder.path: folder.run for folder in folders if folder.run is not None}
    runs = [run for group in groups for run in sort_by_settings([read[path] for path in group if path in read])]
    asked = bool(baseline or against is not None or by)
    names = {folder.path: folder.name for folder in folders}
    comparison, unranked = compare_finished(runs, names, baseline, against, by, holm, asked) if runs else (None, "")
    return ReportData(folders, make_lines(folders, comparison), comparison, unranked)


# Reading


def find_folders(sources: Sequence[Path]) -> list[list[Path]]:
    """Run folders, and files of metrics, each once, by source: one that is a run itself, else all runs below it."""
    seen: set[Path] = set()
    groups: list[list[Path]] = []
    for source in sources:
        if not os.path.exists(source):
            raise UserError(f"{source} does not exist; give run folders or folders of runs.")
        group: dict[Path, Path] = {}
        for path in (
            [source] if source.is_file() or is_run_folder(source) else sorted(find_below(source), key=natural_key)
        ):
            if path.resolve() not in seen:
                group.setdefault(path.resolve(), path)
        seen |= group.keys()
        groups.append(list(group.values()))
    if not seen:
        given = join_some([str(source) for source in sources])
        raise UserError(f"There is no run in {given}: no {' or '.join(MARKS)} in it or below it.")
    return groups


def is_run_folder(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MARKS)


def find_below(source: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(source):
        names[:] = [name for name in names if name not in INSIDE]
        if any(name in files for name in MARKS):
            yield Path(folder)


def read_folder(path: Path, name: str) -> ReportRun:
    """What can be read of a run, and a sentence on each thing that cannot."""
    problems: list[str] = []
    run, config, facts = None, {}, {}
    if path.is_file() or os.path.lexists(path / METRICS):
        try:
            run = read_run(path)
            config, facts = dict(run.config), dict(run.record)
        except UserError as error:
            problems.append(str(error))
    else:
        going = "it is still going" if is_locked(path) else "it broke off (resume=auto continues it)"
        problems.append(f"It has no metrics.json: {going}. Its curves are here, it takes no part in the table.")
    if run is None:
        config = _read(read_config, path / CONFIG, problems)
        facts = _read(read_record, path / RECORD, problems)
    elif path.is_dir() and not facts:
        problems.append("It has no run.json: not known on which data, machine and version it was made.")
    elif path.is_dir() and not config:
        problems.append("Its config.yaml is not there: not known with which settings it was made.")
    step = facts["step"] if "step" in facts else last_step(path / run_log.NAME)
    return ReportRun(path, name, run, config, facts, step, [escape_control_characters(problem) for problem in problems])


def _read(read: Callable[[Path], dict[str, Any]], path: Path, problems: list[str]) -> dict[str, Any]:
    """Read a file by ``read``; empty where there is none, and with a problem more where it can't be read."""
    try:
        return read(path) if os.path.lexists(path) else {}
    except UserError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return {}


def last_step(log: Path) -> int | None:
    """Of the last whole record in a run's log."""
    try:
        lines, _ = run_log.read_tail(log, 1 << 16)
    except UserError:
        return None
    return next((line.record["step"] for line in reversed(lines) if line.record is not None), None)


# Comparing


def compare_finished(
    runs: Sequence[Run],
    names: Mapping[Path, str],
    baseline: Sequence[Path],
    against: str | None,
    by: Sequence[str],
    holm: bool,
    asked: bool,
) -> tuple[Comparison, str]:
    """The table of finished runs, and why it ranks nothing, or ""."""
    try:
        check_same_data(runs)
        found = compare_runs(runs, baseline, against, by, holm=holm)
    except UserError as error:
        if asked:
            raise
        return list_uncompared(runs, names), str(error)
    tasks = {frozenset(run.metrics) for row in found.rows if not row.is_baseline for run in row.runs}
    ways = next((note for note in found.notes if DIFFERENT_WAYS in note), "")
    if len(tasks) > 1:
        several = "; ".join(" + ".join(sorted(names)) for names in sorted(tasks, key=sorted))
        return found, f"The runs learned different sets of tasks ({several}), so no row is better than another."
    ways = ways.removeprefix("warning: ")
    return found, ways[:1].upper() + ways[1:]


def list_uncompared(runs: Sequence[Run], names: Mapping[Path, str]) -> Comparison:
    """Each run for itself, where they cannot stand in one table: no means, no Delta."""
    notes: list[str] = []
    columns = choose_columns(runs, False, notes)
    identities = [result_settings(run) for run in runs]
    texts = make_labels(identities, [{} for _ in runs], False, []) if all(identities) else [""] * len(runs)
    rows = []
    for run, text in zip(runs, texts):
        name = ", ".join(part for part in (names[run.path], text) if part)
        rows.append(Row(escape_control_characters(name), (run,)))
        fill_row(rows[-1], columns)
    return Comparison(columns, rows, [], [*map(escape_control_characters, [describe_provenance(runs), *notes])])


def make_lines(folders: Sequence[ReportRun], comparison: Comparison | None) -> list[ReportRow]:
    """A line per row of the table, then one per run without numbers."""
    by_path = {folder.path.resolve(): folder for folder in folders}
    lines = []
    for row in comparison.rows if comparison else ():
        own = [by_path.get(run.path.resolve()) or read_folder(run.path, run.name) for run in row.runs]
        lines.append(ReportRow(row.label, own, row))
    without = [folder for folder in folders if folder.run is None]
    return [*lines, *(ReportRow(f"{folder.name} ({folder.state})", [folder], None) for folder in without)]
