"""Does the regulariser do anything? Its gradient at the tapped features, beside the tasks' own."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mtcl import distributed


def compare_feature_gradients(task_loss: Tensor, contrast: Tensor, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Per target, detached scalars: ``norm_task``, ``norm_contrast`` (weighted, as they enter the step), ``cosine``
    of the two.

    Costs two backward passes from the losses down to ``taps``, not through the model; call it when logging. Leaves
    ``.grad`` and the graph as they are.
    """
    maps = list(features.values())
    own = torch.autograd.grad(task_loss, maps, retain_graph=True, allow_unused=True)
    ours = torch.autograd.grad(contrast, maps, retain_graph=True, allow_unused=True)
    found = {}
    for name, feature, a, b in zip(features, maps, own, ours):
        a = torch.zeros_like(feature) if a is None else a
        b = torch.zeros_like(feature) if b is None else b
        a, b = a.float().flatten(), b.float().flatten()
        found[f"{name}/norm_task"], found[f"{name}/norm_contrast"] = global_norm(a), global_norm(b)
        dot = distributed.all_reduce_sum((a * b).sum()) / distributed.world_size() ** 2
        found[f"{name}/cosine"] = dot / (global_norm(a).clamp(min=1e-8) * global_norm(b).clamp(min=1e-8))
    return found


def gradient_norms(loss: Tensor, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Target -> length of the gradient of ``loss`` at its tapped features, detached.

    One map after the other: never more than one gradient of that size. Leaves ``.grad`` and the graph as they are.
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
    """The norm of the gradient of the mean over processes, of which each has the part of its own pictures."""
    if distributed.world_size() == 1:
        return part.norm()
    return distributed.all_reduce_sum(part.square().sum()).sqrt() / distributed.world_size()
