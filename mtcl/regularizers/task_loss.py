"""Compute a task's loss in training, by rules that the trainer and the regularizers share."""

from dataclasses import dataclass

from torch import Tensor

from mtcl.models.base import DenseOutput
from mtcl.tasks.base import Task


@dataclass(frozen=True)
class TaskLossOptions:
    """Say how the tasks' losses of a batch are computed.

    Attributes:
        intermediate_weight: factor of the losses of intermediate predictions, relative to those of the final ones.
        image_weighting: how the images of a batch count, see :func:`mtcl.tasks.image_weights.weigh_images`.
        views_per_step: number V of augmented views of each image: of B rows of a batch, row i is view i // (B / V) of
            image i % (B / V).
        views: which of them have losses of the tasks, ``all`` or the ``first``; a regularizer takes all.
    """

    intermediate_weight: float = 1.0
    image_weighting: str = "pixels"
    views_per_step: int = 1
    views: str = "all"


def compute_task_loss(
    name: str,
    task: Task,
    output: DenseOutput,
    label: Tensor,
    intermediate_weight: float,
    image_weight: Tensor | None = None,
) -> Tensor:
    """Compute a task's loss in training, a scalar: that of its prediction plus the weighted ones of intermediate ones.

    Args:
        name: the name of the task among the predictions.
        task: the task whose loss is taken.
        output: a forward pass in training.
        label: the task's label in batch layout, (B, H, W) or (B, c, H, W).
        intermediate_weight: factor of the losses of intermediate predictions.
        image_weight: weight of each image's mean loss, (B,); None: all valid pixels of the batch count alike.
    """
    target = (label,) if image_weight is None else (label, image_weight)
    loss = task.loss(output.predictions[name], *target)
    for predictions in output.intermediate:
        if name in predictions:
            loss = loss + intermediate_weight * task.loss(predictions[name], *target)
    return loss
