"""The weight of the contrast relative to the task: by the gradients that both send into the task's features."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class GradientNormWeight(nn.Module):
    """Keeps per target a factor that makes the contrast's gradient at F_t as long as the task's own.

    The factor is a running mean of the ratio of the two norms, measured every ``every`` steps (a backward pass down to
    the features, not through the backbone). It stays on the device and is part of a run's state. One factor serves all
    sources of a target, so at a single step the contrast may have more or less than its share. In several
    processes the norms are those of all of them together (:func:`mtcl.regularizers.diagnostics.length`).
    """

    def __init__(self, names: Sequence[str], every: int = 10, momentum: float = 0.9):
        super().__init__()
        self.names, self.every, self.momentum = list(names), every, momentum
        self.factor: Tensor
        self.register_buffer("factor", torch.zeros(len(self.names)))  # 0: not measured yet

    @torch.no_grad()
    def update(self, norm_task: Mapping[str, Tensor], norm_contrast: Mapping[str, Tensor]) -> None:
        """Take in gradient norms, target -> scalar. A target whose batch has no labels, or no anchors, keeps its
        factor."""
        task = torch.stack([norm_task[name] for name in self.names])
        contrast = torch.stack([norm_contrast[name] for name in self.names])
        ratio = task / contrast.clamp(min=torch.finfo(contrast.dtype).tiny)
        mixed = torch.where(self.factor > 0, self.momentum * self.factor + (1 - self.momentum) * ratio, ratio)
        seen = (task > 0) & (contrast > 0) & ratio.isfinite()
        self.factor.copy_(torch.where(seen, mixed, self.factor))

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The losses' sum, each times its factor."""
        return (torch.stack([losses[name] for name in self.names]) * self.factor).sum()
