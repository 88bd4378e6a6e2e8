"""The tasks, and the names and options by which configs and datasets ask for them."""

import difflib
from typing import Any

from mtcl.errors import UserError
from mtcl.tasks.base import Task
from mtcl.tasks.class_names import HUMAN_PARTS, NYUD40, VOC21
from mtcl.tasks.depth import Depth
from mtcl.tasks.edge import Edge
from mtcl.tasks.human_parts import HumanParts
from mtcl.tasks.normals import Normals
from mtcl.tasks.sal import Saliency
from mtcl.tasks.semseg import SemSeg

TASKS: dict[str, type[Task]] = {
    "semseg": SemSeg,
    "human_parts": HumanParts,
    "sal": Saliency,
    "depth": Depth,
    "normals": Normals,
    "edge": Edge,
}
TASK_NAMES = tuple(TASKS)  # in the order in which they are always listed


def build_task(name: str, weight: float | None = None, **options: Any) -> Task:
    """The task of that name, with the field's loss weight unless ``weight`` is given.

    Options: semseg ``class_names`` (required), edge ``positive_weight`` (0.95). An unknown name is a
    ``UserError``.

    >>> task = build_task("semseg", class_names=VOC21)
    >>> task.channels, task.primary, task.weight
    (21, 'mIoU', 1.0)
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"There is no task {name!r}: choose one of {', '.join(TASK_NAMES)}.{hint}")
    if weight is not None:
        options["weight"] = weight
    return TASKS[name](**options)


__all__ = [
    "HUMAN_PARTS",
    "NYUD40",
    "TASKS",
    "TASK_NAMES",
    "VOC21",
    "Depth",
    "Edge",
    "HumanParts",
    "Normals",
    "Saliency",
    "SemSeg",
    "Task",
    "build_task",
]
