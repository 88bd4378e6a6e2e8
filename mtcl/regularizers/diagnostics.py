"""Compare the gradients of the regulariser and of the tasks at the task features."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mtcl import distributed


def compare_feature_gradients(
    task_loss: Tensor, regularizer_loss: Tensor, features: Mapping[str, Tensor], loss_scale: Tensor | None = None
) -> dict[str, Tensor]:
    """Compare the gradients of two losses at the task features.

    Costs two backward passes from the losses down to the features, not through the model; call it when logging. Leaves
    ``.grad`` and the graph unchanged.

    Args:
        task_loss: weighted sum over the tasks, as it enters the step.
        regularizer_loss: the regulariser's, times lambda.
        features: target -> feature map, in the graph of both; those that nothing trained makes are left out.
        loss_scale: both losses are multiplied by it before, and the norms divided, so that gradients in fp16 do not
            become 0.

    Returns:
        detached scalars ``TARGET/norm_task``, ``TARGET/norm_regularizer`` and ``TARGET/cosine``.
    """
    features = {name: feature for name, feature in features.items() if feature.requires_grad}
    if not features:
        return {}
    maps = list(features.values())
    if loss_scale is not None:
        task_loss, regularizer_loss = loss_scale * task_loss, loss_scale * regularizer_loss
    task_gradients = torch.autograd.grad(task_loss, maps, retain_graph=True, allow_unused=True)
    regularizer_gradients = torch.autograd.grad(regularizer_loss, maps, retain_graph=True, allow_unused=True)
    result = {}
    for name, feature, a, b in zip(features, maps, task_gradients, regularizer_gradients):
        a = torch.zeros_like(feature) if a is None else a
        b = torch.zeros_like(feature) if b is None else b
        a, b = a.float().flatten(), b.float().flatten()
        result[f"{name}/norm_task"], result[f"{name}/norm_regularizer"] = global_norm(a), global_norm(b)
        dot = distributed.all_reduce_sum((a * b).sum()) / distributed.world_size() ** 2
        result[f"{name}/cosine"] = dot / (global_norm(a).clamp(min=1e-8) * global_norm(b).clamp(min=1e-8))
        if loss_scale is not None:
            result |= {key: result[key] / loss_scale for key in (f"{name}/norm_task", f"{name}/norm_regularizer")}
    return result


def gradient_norms(loss: Tensor, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return target -> norm of the gradient of ``loss`` at its features, detached.

    Takes one feature map after the other, so that only one gradient of that size is in memory. Leaves ``.grad`` and the
    graph unchanged.
    """
    norms: dict[int, Tensor] = {}  # by map: targets may share one
    for feature in features.values():
        if id(feature) not in norms:
            (grad,) = torch.autograd.grad(loss, feature, retain_graph=True, allow_unused=True)
            norms[id(feature)] = (
                feature.new_zeros((), dtype=torch.float32) if grad is None else global_norm(grad.float())
            )
    return {name: norms[id(feature)] for name, feature in features.items()}


def global_norm(part: Tensor) -> Tensor:
    """Return the norm of the gradient of the mean loss over all processes, each of which has its own images' part."""
    if distributed.world_size() == 1:
        return part.norm()
    return distributed.all_reduce_sum(part.square().sum()).sqrt() / distributed.world_size()
