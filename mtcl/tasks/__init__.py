"""Everything about the tasks: one class per task, built by its name.

:func:`build_task` gives a task with its loss, metric and label rules; :func:`build_metric` its metric alone.
"""

from typing import TYPE_CHECKING

from mtcl.lazy_imports import import_on_use
from mtcl.tasks.names import TASK_NAMES

if TYPE_CHECKING:
    from mtcl.tasks.base import Task
    from mtcl.tasks.build import TASKS, build_metric, build_task
    from mtcl.tasks.class_names import CITYSCAPES7, CITYSCAPES19, HUMAN_PARTS, NYUD13, NYUD40, VOC21
    from mtcl.tasks.depth import Depth
    from mtcl.tasks.edge import Edge
    from mtcl.tasks.human_parts import HumanParts
    from mtcl.tasks.normals import Normals
    from mtcl.tasks.sal import Saliency
    from mtcl.tasks.semseg import SemSeg

__getattr__ = import_on_use(
    __name__,
    {
        "CITYSCAPES19": "mtcl.tasks.class_names",
        "CITYSCAPES7": "mtcl.tasks.class_names",
        "Depth": "mtcl.tasks.depth",
        "Edge": "mtcl.tasks.edge",
        "HUMAN_PARTS": "mtcl.tasks.class_names",
        "HumanParts": "mtcl.tasks.human_parts",
        "NYUD13": "mtcl.tasks.class_names",
        "NYUD40": "mtcl.tasks.class_names",
        "Normals": "mtcl.tasks.normals",
        "Saliency": "mtcl.tasks.sal",
        "SemSeg": "mtcl.tasks.semseg",
        "TASKS": "mtcl.tasks.build",
        "Task": "mtcl.tasks.base",
        "VOC21": "mtcl.tasks.class_names",
        "build_metric": "mtcl.tasks.build",
        "build_task": "mtcl.tasks.build",
    },
)

__all__ = [
    "CITYSCAPES7",
    "CITYSCAPES19",
    "HUMAN_PARTS",
    "NYUD13",
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
    "build_metric",
    "build_task",
]
