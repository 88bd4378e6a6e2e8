"""Cheap looks at what is about to be used: labels and maps that can be read, but hardly mean what they should.

Each gives sentences; :func:`report_problems` makes them warnings, or one of them an error (``data.strict``).
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from mtcl.data.sample import MultiTaskDataset, Sample
from mtcl.data.transforms import finalize_labels
from mtcl.errors import UserError
from mtcl.evaluation.saved_predictions import SavedPredictions, has_label
from mtcl.tasks.base import Task

log = logging.getLogger(__name__)

COUNT = 8  # images that are looked at, evenly spread over a list


def check_labels(reader: MultiTaskDataset, tasks: Mapping[str, Task], part: str) -> list[str]:
    """Look at the values of some images' labels.

    Args:
        reader: the list.
        tasks: those in use, which know their range.
        part: what its images are called, "training" or "validation".
    """
    chosen = dict(_readable(reader, _spread(len(reader.ids))))
    problems = []
    for name, task in tasks.items():
        labels = [sample.labels[name] for sample in chosen.values()]
        sentences = task.check_values(labels) if labels else []
        problems += [f"the labels of {name} of the {part} images {text}" for text in sentences]
    return problems


def find_unlabeled_tasks(reader: MultiTaskDataset, tasks: Mapping[str, Task]) -> list[str]:
    """Look for tasks without any label in a training list; the first label of each ends its search.

    Raises:
        UserError: the only task has none, so that nothing would be trained.
    """
    missing = list(tasks)
    every = tqdm(range(len(reader.ids)), desc="looking for labels", leave=False, delay=2, mininterval=1)
    for _, sample in _readable(reader, every):
        labels = finalize_labels(sample, {name: tasks[name] for name in missing}).labels
        missing = [name for name in missing if not has_label(tasks[name], labels[name])]
        if not missing:
            return []
    sentences = [f"no training image had a valid label of {name}: its head was not trained" for name in missing]
    if len(missing) == len(tasks):
        names = ", ".join(missing)
        raise UserError(
            f"no training image has a valid label of {names}, so there is nothing to train; check the files"
        )
    return sentences


def check_maps(saved: SavedPredictions, reader: MultiTaskDataset, tasks: Mapping[str, Task]) -> list[str]:
    """Look at some saved maps beside their labels."""
    problems = list(saved.problems)
    for name, task in tasks.items():
        listed = [index for index, id in enumerate(reader.ids) if id in saved.paths[name]]
        pairs = []
        for index, sample in _readable(reader, (listed[i] for i in _spread(len(listed)))):
            values = saved.formats[name].load(saved.paths[name][reader.ids[index]])
            label = finalize_labels(sample, {name: task}).labels[name]
            if values.shape[:2] == label.shape[:2]:  # else its scoring says so
                pairs.append((values, label))
        if pairs:
            maps, labels = zip(*pairs)
            problems += [f"the maps of {name} {text}" for text in task.check_maps(maps, labels)]
    return problems


def report_problems(problems: Sequence[str], strict: bool) -> list[str]:
    """Log each of ``doubts``; ``UserError`` of the first where ``strict``."""
    if problems and strict:
        raise UserError(f"{problems[0]} (data.strict=true makes this an error)")
    for text in problems:
        log.warning("%s", text)
    return list(problems)


def _spread(count: int) -> list[int]:
    return sorted(set(np.linspace(0, count - 1, COUNT).astype(int).tolist())) if count else []


def _readable(reader: MultiTaskDataset, indices: Iterable[int]) -> Iterator[tuple[int, Sample]]:
    """The samples that can be read; the loader says of the others what is wrong with them."""
    for index in indices:
        try:
            yield index, reader.read(index)
        except UserError:
            continue
