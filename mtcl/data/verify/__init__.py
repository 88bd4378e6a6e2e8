"""The checker of dataset folders: every listed picture and label, read as training reads it, against what is known."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtcl.data.datasets.base import IMAGE, FileDataset
from mtcl.data.prepare.jobs import STAMP_FILE
from mtcl.data.verify.facts import FACTS, DatasetFacts, find_dataset
from mtcl.data.verify.judge import alignment_rows, reading_rows, shares, size_rows, value_rows
from mtcl.data.verify.lists import VerifiedList, file_rows, list_rows, open_datasets, open_lists
from mtcl.data.verify.measure import Item, Measurements, measure, merge_measurements
from mtcl.data.verify.sheet import write_sheet
from mtcl.data.verify.table import Row, format_table
from mtcl.data.worker_pool import run_jobs
from mtcl.errors import UserError
from mtcl.safe_files import read_json
from mtcl.tasks import build_task
from mtcl.tasks.base import Task

__all__ = ["STAMP_FILE", "Report", "find_dataset", "format_report", "verify", "write_sheet"]

COMPARED = 100  # pictures of each list whose labels are compared with them
CHUNK = 16  # pictures that a process is given at a time


@dataclass(frozen=True)
class Report:
    """What was found in one folder."""

    dataset: str
    root: Path
    limit: int | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    shares: tuple[float, ...]  # of the semseg classes in the training list, void excluded
    parts: tuple[VerifiedList, ...]
    tasks: Mapping[str, Task]  # those that are there

    @property
    def damages(self) -> list[Row]:
        return [row for row in self.rows if row.verdict == "damage"]


def verify(given: Path, dataset: str | None = None, workers: int = 0, limit: int | None = None) -> Report:
    """Check a folder in ``workers`` processes (0: in this one); ``limit`` measures only the first so many of a list.

    UserError where nothing can be measured: no dataset, no list or no picture.
    """
    if workers < 0:
        raise UserError(f"workers={workers} is not possible; give 0 (this process) or more.")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} leaves no picture; give at least 1.")
    dataset, root = find_dataset(given, dataset)
    facts = FACTS[dataset]
    rows, found = list_rows(root / facts.lists, facts.official)
    if not found:
        raise UserError(f"{root / facts.lists} has neither a train.txt nor a val.txt with ids; unpack the lists again.")
    _readers.cache_clear()  # the folder may have changed since the last time
    parts = open_lists(_readers(dataset, root), found, limit)
    more, names = file_rows(root, parts)
    offered = facts.reader.task_options()  # type: ignore[attr-defined]
    tasks = {name: build_task(name, **offered[name]) for name in names}
    items = _items(parts, names)
    chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    workers = 0 if len(chunks) == 1 else workers
    measured = merge_measurements(
        run_jobs(_Work(dataset, root, tasks), chunks, workers, f"pictures, {CHUNK} at a time")
    )
    rows += more
    rows += reading_rows(measured, (IMAGE, *names)) + size_rows(measured, facts, names)
    rows += value_rows(measured, facts, names)
    rows += alignment_rows(measured, names, [part.name for part in parts])
    frequencies = tuple(shares(measured, len(facts.classes), ["train"]).tolist())
    return Report(dataset, root, limit, tuple(rows), _notes(root, facts), frequencies, tuple(parts), tasks)


def format_report(result: Report) -> str:
    """The table, then a line for each deviation and each complaint."""
    facts = FACTS[result.dataset]
    measured = "" if result.limit is None else f", only the first {result.limit} pictures of each list"
    lines = [f"{facts.title} in {result.root}{measured}", "", format_table(result.rows), ""]
    for row in result.rows:
        if row.verdict == "deviation":
            known = facts.known.get(row.check)
            why = known or "; ".join(row.details) or f"{row.found}, expected {row.expected}"
            lines.append(f"{'known deviation' if known else 'deviation'}: {row.check}: {why}")
    lines += [f"known deviation: {note}" for note in result.notes]
    for row in result.damages:
        lines += [f"damage: {row.check}: {text}" for text in row.details or (f"{row.found}, expected {row.expected}",)]
    deviations = sum(row.verdict == "deviation" for row in result.rows)
    lines.append(f"{len(result.rows)} checks: {deviations} deviations, {len(result.damages)} damages")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Work:
    """What a process needs to measure items: little, so that it is sent with each; the readers it opens itself."""

    dataset: str
    root: Path
    tasks: Mapping[str, Task]

    def __call__(self, items: Sequence[Item]) -> Measurements:
        facts, readers = FACTS[self.dataset], _readers(self.dataset, self.root)
        return merge_measurements(measure(item, readers[item.part], self.tasks, facts.floor) for item in items)


@functools.cache
def _readers(dataset: str, root: Path) -> dict[str, FileDataset]:
    return open_datasets(root, FACTS[dataset])


def _items(parts: Sequence[VerifiedList], tasks: Sequence[str]) -> list[Item]:
    """Every listed picture; COMPARED of each list, evenly spread, are compared with their labels."""
    items = []
    for part in parts:
        compared = set(np.linspace(0, len(part.ids) - 1, COMPARED).astype(int).tolist())
        for index, name in enumerate(part.ids):
            kinds = tuple(kind for kind in (IMAGE, *tasks) if name in part.files[kind])
            items.append(Item(part.name, name, kinds, index in compared))
    return items


def _notes(root: Path, facts: DatasetFacts) -> tuple[str, ...]:
    notes = list(facts.notes)
    stamp = root / STAMP_FILE
    if stamp.is_file():
        settings = read_json(stamp)
        size = settings.get("size") if isinstance(settings, dict) else None
        told = "" if size is None else f": size {size}"
        notes.append(f"written by one of mtcl's prepare scripts ({STAMP_FILE}{told})")
    return tuple(notes)
