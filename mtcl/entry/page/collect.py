"""Folders as what a page tells of: runs that finished, runs that did not, what is wrong with either, one table."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtcl.entry.compare import (
    Comparison,
    Row,
    Run,
    check_same_data,
    choose_columns,
    compare_runs,
    fill,
    identity,
    labels,
    listed,
    natural,
    provenance,
    read_config,
    read_json,
    read_run,
)
from mtcl.errors import UserError
from mtcl.training.checkpoint import is_claimed

MARKS = ("metrics.json", "config.yaml", "log.jsonl")  # of a run folder, from its first minute on
INSIDE = ("checkpoints", "panels", ".git")  # folders that hold no runs
DIFFERENT_WAYS = "were scored in different ways"


@dataclass(frozen=True, eq=False)
class Folder:
    """One run folder. ``run``: its numbers, None while there are none; ``problems``: sentences about what is amiss.

    ``name``: its path below the folder of all, as a page that is handed on need not tell where on a disk they are;
    ``step``: how far it came, ``steps``: how far it was to go; None where that is not known.
    """

    path: Path
    name: str
    run: Run | None
    config: dict[str, Any]
    facts: dict[str, Any]
    step: int | None
    problems: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int | None:
        return self.facts.get("seed", self.config.get("seed"))

    @property
    def steps(self) -> int | None:
        steps = self.config.get("trainer.max_steps")
        return steps if isinstance(steps, int) else None

    @property
    def state(self) -> str:
        if self.run is not None:
            return "finished"
        if (self.path / "metrics.json").is_file():
            return "broken"
        return "running" if is_claimed(self.path) else "unfinished"

    @property
    def written(self) -> str:
        """When its log, or else its numbers, were last written; "" where there is neither."""
        for name in ("log.jsonl", "metrics.json", "config.yaml"):
            try:
                seconds = (self.path / name).stat().st_mtime
            except OSError:
                continue
            return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
        return ""


@dataclass(frozen=True, eq=False)
class Line:
    """What is one row of the table, one curve, one row of pictures: the folders that differ in the seed only.

    ``row``: its numbers; None for a run that has none.
    """

    label: str
    folders: list[Folder]
    row: Row | None


@dataclass(frozen=True, eq=False)
class Collection:
    """Everything read. ``comparison`` is None without a finished run; ``unranked``: why nothing is best, or ""."""

    folders: list[Folder]
    lines: list[Line]
    comparison: Comparison | None
    unranked: str


def collect(
    sources: Sequence[Path], baseline: Sequence[Path] = (), against: str | None = None, by: Sequence[str] = ()
) -> Collection:
    """Every run at or below ``sources``, compared as :func:`mtcl.entry.compare.compare` does where it can be.

    What is wrong with one run is told of it; ``UserError`` where there is none at all, or where a given ``baseline``,
    ``against`` or ``by`` does not fit.
    """
    paths = find_folders(sources)
    above = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    folders = [read_folder(path, str(path.absolute().relative_to(above))) for path in paths]
    runs = [folder.run for folder in folders if folder.run is not None]
    asked = bool(baseline or against is not None or by)
    names = {folder.path: folder.name for folder in folders}
    comparison, unranked = compared(runs, names, baseline, against, by, asked) if runs else (None, "")
    return Collection(folders, make_lines(folders, comparison), comparison, unranked)


# Reading


def find_folders(sources: Sequence[Path]) -> list[Path]:
    """Run folders, and files of metrics, each once: a source that is a run itself, else all runs below it."""
    found: dict[Path, Path] = {}
    for source in sources:
        if not source.exists():
            raise UserError(f"{source} does not exist; give run folders or folders of runs.")
        for path in [source] if source.is_file() or is_run(source) else sorted(below(source), key=natural):
            found.setdefault(path.resolve(), path)
    if not found:
        given = listed([str(source) for source in sources])
        raise UserError(f"There is no run in {given}: no {' or '.join(MARKS)} in it or below it.")
    return list(found.values())


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MARKS)


def below(source: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(source):
        names[:] = [name for name in names if name not in INSIDE]
        if any(name in files for name in MARKS):
            yield Path(folder)


def read_folder(path: Path, name: str) -> Folder:
    """What can be read of a run, and a sentence on each thing that cannot."""
    problems: list[str] = []
    run, config, facts = None, {}, {}
    if path.is_file() or (path / "metrics.json").is_file():
        try:
            run = read_run(path)
            config, facts = dict(run.config), dict(run.facts)
        except UserError as error:
            problems.append(str(error))
    else:
        going = "it is still going" if is_claimed(path) else "it broke off (resume=auto continues it)"
        problems.append(f"It has no metrics.json: {going}. Its curves are here, it takes no part in the table.")
    if run is None:
        for file, read in (("config.yaml", read_config), ("run.json", read_json)):
            try:
                content = read(path / file) if (path / file).is_file() else {}
            except UserError as error:
                problems += [str(error)] if str(error) not in problems else []
                continue
            if file == "config.yaml":
                config = content
            else:
                facts = content
    elif path.is_dir() and not facts:
        problems.append("It has no run.json: not known on which data, machine and version it was made.")
    elif path.is_dir() and not config:
        problems.append("Its config.yaml is not there: not known with which settings it was made.")
    step = facts.get("step", last_step(path / "log.jsonl"))
    return Folder(path, name, run, config, facts, step if isinstance(step, int) else None, problems)


def last_step(log: Path) -> int | None:
    """Of the last whole record in a run's log."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 65536))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return None
    for line in reversed(lines):
        try:
            step = json.loads(line).get("step") if line.endswith(b"\n") else None
        except (ValueError, AttributeError):
            continue
        if isinstance(step, int):
            return step
    return None


# Comparing


def compared(
    runs: Sequence[Run],
    names: Mapping[Path, str],
    baseline: Sequence[Path],
    against: str | None,
    by: Sequence[str],
    asked: bool,
) -> tuple[Comparison, str]:
    """The table of finished runs, and why it ranks nothing, or ""."""
    try:
        check_same_data(runs)
        found = compare_runs(runs, baseline, against, by)
    except UserError as error:
        if asked:
            raise
        return side_by_side(runs, names), str(error)
    tasks = {frozenset(run.metrics) for row in found.rows if not row.is_baseline for run in row.runs}
    ways = next((note for note in found.notes if DIFFERENT_WAYS in note), "")
    if len(tasks) > 1:
        several = "; ".join(" + ".join(sorted(names)) for names in sorted(tasks, key=sorted))
        return found, f"The runs learned different sets of tasks ({several}), so no row is better than another."
    ways = ways.removeprefix("warning: ")
    return found, ways[:1].upper() + ways[1:]


def side_by_side(runs: Sequence[Run], names: Mapping[Path, str]) -> Comparison:
    """Each run for itself, where they cannot stand in one table: no means, no Delta."""
    notes: list[str] = []
    columns = choose_columns(runs, False, notes)
    identities = [identity(run) for run in runs]
    texts = labels(identities, [{} for _ in runs], False, []) if all(identities) else [""] * len(runs)
    rows = []
    for run, text in zip(runs, texts):
        name = ", ".join(part for part in (names[run.path], text) if part)
        rows.append(Row(name, (run,)))
        fill(rows[-1], columns)
    return Comparison(columns, rows, [], [provenance(runs), *notes])


def make_lines(folders: Sequence[Folder], comparison: Comparison | None) -> list[Line]:
    """A line per row of the table, then one per run without numbers."""
    by_path = {folder.path.resolve(): folder for folder in folders}
    lines = []
    for row in comparison.rows if comparison else ():
        own = [by_path.get(run.path.resolve()) or read_folder(run.path, run.name) for run in row.runs]
        lines.append(Line(row.label, own, row))
    without = [folder for folder in folders if folder.run is None]
    return [*lines, *(Line(f"{folder.name} ({folder.state})", [folder], None) for folder in without)]
