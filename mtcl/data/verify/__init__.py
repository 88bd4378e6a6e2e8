"""Verification of dataset folders: every listed image and label, read as in training, against known facts."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtcl.data.datasets.base import IMAGE, FileDataset
from mtcl.data.prepare.jobs import STAMP_FILE
from mtcl.data.verify.facts import FACTS, DatasetFacts, find_dataset
from mtcl.data.verify.judge import alignment_rows, reading_rows, shares, size_rows, value_rows
from mtcl.data.verify.lists import VerifiedList, file_rows, list_rows, numbered_rows, open_datasets, open_lists
from mtcl.data.verify.measure import Item, Measurements, measure, merge_measurements
from mtcl.data.verify.sheet import write_sheet
from mtcl.data.verify.table import Row, format_table
from mtcl.data.worker_pool import run_jobs
from mtcl.errors import UserError
from mtcl.safe_files import read_json
from mtcl.tasks import build_task
from mtcl.tasks.base import Task

__all__ = ["FACTS", "Report", "find_dataset", "format_report", "verify", "write_sheet"]

COMPARED = 100  # images of each list whose labels are compared with them
CHUNK = 16  # images that a process is given at a time


@dataclass(frozen=True)
class Report:
    """Results of the checks of one folder."""

    name: str  # key of FACTS
    root: Path
    limit: int | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    shares: tuple[float, ...]  # of the semseg classes in the training list, void excluded
    lists: tuple[VerifiedList, ...]
    tasks: Mapping[str, Task]  # those that are there

    @property
    def damages(self) -> list[Row]:
        """The rows whose verdict is damage."""
        return [row for row in self.rows if row.verdict == "damage"]


def verify(folder: Path, name: str | None = None, workers: int = 0, limit: int | None = None) -> Report:
    """Check a dataset folder.

    Args:
        folder: the dataset's folder or its parent.
        name: key of :data:`FACTS`; by default it is recognised from the folder.
        workers: number of processes; 0 works in this one.
        limit: measure only the first so many images of each list.

    Raises:
        UserError: nothing can be measured: no dataset, no list or no image.
    """
    if workers < 0:
        raise UserError(f"workers={workers} is not possible; give 0 (this process) or more.")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} leaves no image; give at least 1.")
    name, root = find_dataset(folder, name)
    facts = FACTS[name]
    if facts.numbered:
        rows, ids = numbered_rows(root, facts.official)
    else:
        rows, ids = list_rows(root / facts.lists, facts.official)
    if not ids and facts.numbered:
        raise UserError(
            f"{root} has no images 0.npy, 1.npy, ... in train/image or val/image; unpack the archive there."
        )
    if not ids:
        raise UserError(f"{root / facts.lists} has neither a train.txt nor a val.txt with ids; unpack the lists again.")
    _open_datasets.cache_clear()  # the folder may have changed since the last time
    lists = open_lists(_open_datasets(name, root), ids, limit)
    more, names = file_rows(root, lists)
    options = facts.dataset_class.task_options()  # type: ignore[attr-defined]
    tasks = {name: build_task(name, **options[name]) for name in names}
    items = _items(lists, names)
    chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    workers = 0 if len(chunks) == 1 else workers
    measured = merge_measurements(run_jobs(_Work(name, root, tasks), chunks, workers, f"images, {CHUNK} at a time"))
    rows += more
    rows += reading_rows(measured, (IMAGE, *names)) + size_rows(measured, facts, names)
    rows += value_rows(measured, facts, names)
    rows += alignment_rows(measured, names, [part.name for part in lists])
    frequencies = tuple(shares(measured, len(facts.classes), ["train"]).tolist())
    return Report(name, root, limit, tuple(rows), _notes(root, facts), frequencies, tuple(lists), tasks)


def format_report(result: Report) -> str:
    """Return the table, then a line for each deviation and each error."""
    facts = FACTS[result.name]
    measured = "" if result.limit is None else f", only the first {result.limit} images of each list"
    lines = [f"{facts.title} in {result.root}{measured}", "", format_table(result.rows), ""]
    for row in result.rows:
        if row.verdict == "deviation":
            explanation = facts.known_deviations.get(row.check)
            why = explanation or "; ".join(row.details) or f"{row.value}, expected {row.expected}"
            lines.append(f"{'known deviation' if explanation else 'deviation'}: {row.check}: {why}")
    lines += [f"known deviation: {note}" for note in result.notes]
    for row in result.damages:
        lines += [f"damage: {row.check}: {text}" for text in row.details or (f"{row.value}, expected {row.expected}",)]
    deviations = sum(row.verdict == "deviation" for row in result.rows)
    lines.append(f"{len(result.rows)} checks: {deviations} deviations, {len(result.damages)} damages")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Work:
    """A picklable measurement of items, small enough to be sent with each; the process opens the datasets itself."""

    name: str  # key of FACTS
    root: Path
    tasks: Mapping[str, Task]

    def __call__(self, items: Sequence[Item]) -> Measurements:
        """Measure the items and add up the results."""
        facts, datasets = FACTS[self.name], _open_datasets(self.name, self.root)
        return merge_measurements(measure(item, datasets[item.subset], self.tasks, facts.floor) for item in items)


@functools.cache
def _open_datasets(dataset: str, root: Path) -> dict[str, FileDataset]:
    """Open the datasets of both lists, once per process."""
    return open_datasets(root, FACTS[dataset])


def _items(lists: Sequence[VerifiedList], tasks: Sequence[str]) -> list[Item]:
    """Return every listed image; COMPARED of each list, evenly spread, are compared with their labels."""
    items = []
    for verified in lists:
        aligned = set(np.linspace(0, len(verified.ids) - 1, COMPARED).astype(int).tolist())
        for index, name in enumerate(verified.ids):
            kinds = tuple(kind for kind in (IMAGE, *tasks) if name in verified.files[kind])
            items.append(Item(verified.name, name, kinds, index in aligned))
    return items


def _notes(root: Path, facts: DatasetFacts) -> tuple[str, ...]:
    """Return the notes on a dataset, and whether one of the prepare scripts wrote it."""
    notes = list(facts.notes)
    stamp = root / STAMP_FILE
    if stamp.is_file():
        settings = read_json(stamp)
        size = settings.get("size") if isinstance(settings, dict) else None
        size_text = "" if size is None else f": size {size}"
        notes.append(f"written by one of mtcl's prepare scripts ({STAMP_FILE}{size_text})")
    return tuple(notes)
