"""Build a task, or its metric alone, by the task's name."""

from typing import TYPE_CHECKING, Any

from mtcl.errors import UserError, suggest
from mtcl.tasks.base import Task
from mtcl.tasks.depth import Depth
from mtcl.tasks.edge import Edge
from mtcl.tasks.human_parts import HumanParts
from mtcl.tasks.names import TASK_NAMES
from mtcl.tasks.normals import Normals
from mtcl.tasks.sal import Saliency
from mtcl.tasks.semseg import SemSeg

if TYPE_CHECKING:
    from torchmetrics import Metric

TASKS: dict[str, type[Task]] = {
    "semseg": SemSeg,
    "human_parts": HumanParts,
    "sal": Saliency,
    "depth": Depth,
    "normals": Normals,
    "edge": Edge,
}


def build_task(name: str, weight: float | None = None, **options: Any) -> Task:
    """Build a task.

    >>> from mtcl.tasks import VOC21
    >>> task = build_task("semseg", class_names=VOC21)
    >>> task.channels, task.primary_metric, task.weight
    (21, 'mIoU', 1.0)

    Args:
        name: one of :data:`TASK_NAMES`.
        weight: of its loss; None: the weight of the literature.
        **options: of the task's class: semseg ``class_names`` (required), edge ``positive_weight`` (0.95),
            normals ``normals_valid`` and ``distance_loss``, depth ``inverse``.

    Raises:
        UserError: the name is unknown.
    """
    if weight is not None:
        options["weight"] = weight
    return _task_class(name)(**options)


def build_metric(name: str, **options: Any) -> "Metric":
    """Build the metric of a task without the task.

    >>> build_metric("human_parts", num_classes=7)
    HumanPartsMetric()

    Args:
        name: one of :data:`TASK_NAMES`.
        **options: of the metric's class, see :mod:`mtcl.metrics`.

    Raises:
        UserError: the name is unknown.
    """
    return _task_class(name).metric_class()(**options)


def _task_class(name: str) -> type[Task]:
    if name in TASKS:
        return TASKS[name]
    raise UserError(f"There is no task {name!r}{suggest(name, TASKS)}: choose one of {', '.join(TASK_NAMES)}.")
