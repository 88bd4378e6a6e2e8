"""Weigh the images of a batch in the losses of partly labelled tasks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mtcl import distributed
from mtcl.tasks.base import Task


def find_labelled_images(tasks: Mapping[str, Task], labels: Mapping[str, Tensor]) -> Tensor:
    """Return which images have a label of each task: a label is there where any pixel of it is valid.

    Args:
        tasks: name -> task.
        labels: task -> label as in a batch.

    Returns:
        (T, B) bool, tasks in the order of ``tasks``.
    """
    return torch.stack([task.valid(labels[name]).flatten(1).any(dim=1) for name, task in tasks.items()])


def weigh_images(tasks: Mapping[str, Task], labels: Mapping[str, Tensor], weighting: str) -> dict[str, Tensor | None]:
    """Return each task's weights of the images' mean losses, for :meth:`~mtcl.tasks.base.Task.loss`.

    With N_t images that have a label of t, N that have any,
    and n_i labels of image i among T tasks, all of a batch in all processes, image i weighs in the loss of t

        pixels:           nothing: the loss is the mean over all labelled pixels of the batch
        images:           1 / N_t
        tasks_per_label:  T / (n_i N), as DiffusionMTL's public code (losses/loss_schemes.py)

    and 0 without a label of t. That code divides by all images of the batch, which is N where each has a label. MTPSL's
    code does, too, without the factor T / n_i; with one label per image it is the same up to the constant T.

    Args:
        tasks: name -> task.
        labels: task -> label as in a batch.
        weighting: one of :data:`~mtcl.tasks.names.IMAGE_WEIGHTINGS`.

    Returns:
        task -> (B,) float32, or None for ``pixels``.
    """
    if weighting == "pixels":
        return dict.fromkeys(tasks)
    has_label = find_labelled_images(tasks, labels).float()
    count = has_label.sum(dim=0)  # (B,): labels of each image
    if weighting == "images":
        num_images = distributed.all_reduce_sum(has_label.sum(dim=1)).clamp(min=1)
        weights = has_label / num_images[:, None]
    else:
        num_images = distributed.all_reduce_sum((count > 0).sum()).clamp(min=1)
        weights = has_label * (len(tasks) / count.clamp(min=1) / num_images)
    return dict(zip(tasks, weights))
