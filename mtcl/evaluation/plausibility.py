"""Cheap plausibility checks of labels and saved maps that can be read, but hardly mean what they should.

Each check returns sentences; :func:`report_problems` logs them as warnings, or raises the first as an error.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mtcl.data.sample import MultiTaskDataset, Sample
from mtcl.data.transforms import finalize_labels
from mtcl.errors import ParameterError, UserError
from mtcl.evaluation.saved_predictions import SavedPredictions, has_label
from mtcl.progress import progress_bar
from mtcl.tasks.base import Task

log = logging.getLogger(__name__)

NUM_SAMPLES = 8  # images that are checked, evenly spaced over a list


def check_labels(dataset: MultiTaskDataset, tasks: Mapping[str, Task], split: str) -> list[str]:
    """Check the values of some images' labels.

    Args:
        dataset: the images.
        tasks: name -> task; each knows the range of its labels.
        split: "training" or "validation", for the messages.
    """
    chosen = dict(_readable(dataset, _spread(len(dataset.ids))))
    problems = []
    for name, task in tasks.items():
        labels = [sample.labels[name] for sample in chosen.values()]
        sentences = task.check_values(labels) if labels else []
        problems += [f"the labels of {name} of the {split} images {text}" for text in sentences]
    return problems


def find_unlabeled_tasks(dataset: MultiTaskDataset, tasks: Mapping[str, Task]) -> list[str]:
    """Find tasks without any label in a training list; the first label of each ends its search.

    Raises:
        UserError: the only task has none, so that nothing would be trained.
    """
    missing = list(tasks)
    indices = progress_bar(range(len(dataset.ids)), desc="looking for labels", leave=False, delay=2)
    for _, sample in _readable(dataset, indices):
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


def check_maps(saved: SavedPredictions, dataset: MultiTaskDataset, tasks: Mapping[str, Task]) -> list[str]:
    """Compare some saved maps with their labels."""
    problems = list(saved.problems)
    for name, task in tasks.items():
        with_map = [index for index, id in enumerate(dataset.ids) if id in saved.paths[name]]
        pairs = []
        for index, sample in _readable(dataset, (with_map[i] for i in _spread(len(with_map)))):
            values = saved.formats[name].load(saved.paths[name][dataset.ids[index]])
            label = finalize_labels(sample, {name: task}).labels[name]
            if values.shape[:2] == label.shape[:2]:  # else its scoring says so
                pairs.append((values, label))
        if pairs:
            maps, labels = zip(*pairs)
            problems += [f"the maps of {name} {text}" for text in task.check_maps(maps, labels)]
    return problems


def report_problems(problems: Sequence[str], strict: bool) -> list[str]:
    """Log problems as warnings and return them.

    Args:
        problems: one sentence each.
        strict: raise the first one instead.

    Raises:
        ParameterError: ``strict``, and there is a problem.
    """
    if problems and strict:
        raise ParameterError("strict", f"=true turns a warning into an error: {problems[0]}")
    for text in problems:
        log.warning("%s", text)
    return list(problems)


def _spread(count: int) -> list[int]:
    return sorted(set(np.linspace(0, count - 1, NUM_SAMPLES).astype(int).tolist())) if count else []


def _readable(dataset: MultiTaskDataset, indices: Iterable[int]) -> Iterator[tuple[int, Sample]]:
    """Yield the samples that can be read; the loader reports what is wrong with the others."""
    for index in indices:
        try:
            yield index, dataset.read(index)
        except UserError:
            continue
