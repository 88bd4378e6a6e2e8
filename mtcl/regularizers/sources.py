"""Source tasks of each target: which may be drawn, and which one an image uses."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtcl.errors import ParameterError
from mtcl.tasks import TASK_NAMES


def list_allowed_sources(
    task_names: Sequence[str], source_tasks: str, excluded_pairs: Collection[str]
) -> list[list[int]]:
    """List the sources that may be drawn for each target, as indices into ``task_names``.

    Args:
        task_names: tasks in use, each of which is a target.
        source_tasks: ``other`` (the paper), ``self``, ``any`` or the name of a task, see
            :class:`~mtcl.regularizers.contrastive.Contrastive`.
        excluded_pairs: pairs ``target<-source`` to leave out; those of tasks that are not in use are allowed.

    Raises:
        ParameterError: an unknown value, or a target without any source.
    """
    tasks = range(len(task_names))
    others = [[s for s in tasks if s != t] for t in tasks]
    if source_tasks in task_names:
        fixed = task_names.index(source_tasks)
        allowed = [others[t] if t == fixed else [fixed] for t in tasks]
    elif source_tasks == "self":
        allowed = [[t] for t in tasks]
    elif source_tasks == "other":
        allowed = others
    elif source_tasks == "any":
        allowed = [list(tasks) for _ in tasks]
    else:
        raise ParameterError("source_tasks", f"={source_tasks} is not known; choose other, self, any or a task in use")
    all_pairs = {f"{t}<-{s}" for t in TASK_NAMES for s in TASK_NAMES}
    for pair in excluded_pairs:
        if pair not in all_pairs:
            raise ParameterError(
                "excluded_pairs", f": {pair} is no pair target<-source, e.g. {task_names[0]}<-{task_names[1]}"
            )
    for t, target in enumerate(task_names):
        allowed[t] = [s for s in allowed[t] if f"{target}<-{task_names[s]}" not in excluded_pairs]
        if not allowed[t]:
            raise ParameterError("excluded_pairs", f" leaves {target} without a source; leave one of its pairs in")
    return allowed


class Comparison(NamedTuple):
    """A target and the sources that its features are compared by in one loss, one source per image.

    Attributes:
        name: the target; ``target<-source`` where the target has a comparison per source.
        target: name of the target.
        sources: indices of the tasks.
    """

    name: str
    target: str
    sources: list[int]


def list_comparisons(
    task_names: Sequence[str], allowed_sources: Sequence[list[int]], targets: Collection[str] | None, all_sources: bool
) -> list[Comparison]:
    """List the comparisons of a step: one per target, or one per pair.

    Args:
        task_names: tasks in use.
        allowed_sources: result of :func:`list_allowed_sources`.
        targets: tasks that are targets; None: all.
        all_sources: one comparison for each of a target's sources; else one, whose source is drawn.

    Raises:
        ParameterError: no target, or one that is not in use.
    """
    if targets is not None and (not targets or not set(targets) <= set(task_names)):
        raise ParameterError("targets", f"={list(targets)} must be null or some of {', '.join(task_names)}")
    chosen = [(t, sources) for t, sources in zip(task_names, allowed_sources) if targets is None or t in targets]
    if all_sources:
        return [Comparison(f"{t}<-{task_names[s]}", t, [s]) for t, sources in chosen for s in sources]
    return [Comparison(t, t, sources) for t, sources in chosen]


def choose_available_source(order: Tensor, has_labels: Tensor) -> Tensor:
    """Choose each image's source: the first task of the drawn order that labels it.

    With all labels present this is the batch's one draw, ``order[..., 0]``. An image that lacks it (partial labels, all
    void) goes on to the next, which is uniform among those it has; without any it gets the first.

    Args:
        order: int64 (..., n), a random order of sources per target.
        has_labels: bool (S, B).

    Returns:
        int64 (..., B).
    """
    first = has_labels[order].to(torch.uint8).argmax(dim=-2)  # (..., B)
    return order.gather(-1, first)
