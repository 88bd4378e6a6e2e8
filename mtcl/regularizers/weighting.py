"""Lambda, the weight of the contrastive loss beside the tasks' losses, over the course of a training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtcl.errors import ParameterError
from mtcl.regularizers.diagnostics import gradient_norms
from mtcl.schedules import linear_warmup

OBJECTIVE_WEIGHT = 1.0  # of lambda * L_contrast as an objective beside the tasks': lambda alone weighs it


class GradientNormWeight(nn.Module):
    """Scales the contrastive loss so that its gradient at the task features has the same norm as the task loss's.

    There is a factor per target: a running mean of the ratio of the two norms, measured at every ``every``-th step (a
    backward pass down to the features, not through the backbone). It stays on the device and is part of a run's state.
    One factor serves all sources of a target, so that at a single step the norms may differ. In several processes the
    norms are those of the gradients of all of them together (:func:`mtcl.regularizers.diagnostics.global_norm`).

    Args:
        names: the targets.
        every: number of steps from one measurement to the next.
        momentum: of the running mean.
        cap: the largest factor that a loss is multiplied by; None: without a bound.
    """

    def __init__(self, names: Sequence[str], every: int = 10, momentum: float = 0.9, cap: float | None = None):
        super().__init__()
        self.cap = cap
        self.names, self.every, self.momentum = list(names), every, momentum
        self.factor: Tensor
        self.register_buffer("factor", torch.zeros(len(self.names)))  # 0: not measured yet

    @torch.no_grad()
    def update(self, norm_task: Mapping[str, Tensor], norm_contrast: Mapping[str, Tensor]) -> None:
        """Take in gradient norms, target -> scalar. A target without labels or anchors keeps its factor."""
        task = torch.stack([norm_task[name] for name in self.names])
        contrast = torch.stack([norm_contrast[name] for name in self.names])
        ratio = task / contrast.clamp(min=torch.finfo(contrast.dtype).tiny)
        mean = torch.where(self.factor > 0, self.momentum * self.factor + (1 - self.momentum) * ratio, ratio)
        is_measured = (task > 0) & (contrast > 0) & ratio.isfinite()
        self.factor.copy_(torch.where(is_measured, mean, self.factor))

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the targets' losses, each times its factor or, where that is larger, the cap."""
        factor = self.factor if self.cap is None else self.factor.clamp(max=self.cap)
        return (torch.stack([losses[name] for name in self.names]) * factor).sum()


class Lambda:
    """lambda in the method's loss, L = sum_t w_t L_task_t + lambda * L_contrast.

    Called with a step it returns lambda: 0 before the part ``start_fraction`` of the training, then ``weight``, reached
    linearly over ``warmup_steps``, and 0 again after the part ``stop_fraction``. With a ``gradient_norm_weight`` the
    contrastive loss that it multiplies is rescaled first, so that lambda is the ratio of the two gradients' norms at
    the task features.

    A balancer that treats the contrastive loss as an objective multiplies it by :data:`OBJECTIVE_WEIGHT`.

    Args:
        weight: the final value; 0: the regulariser only reports, and the training is that without it.
        max_steps: length of the training.
        warmup_steps: steps of the linear increase; 0: none.
        stop_fraction: 0 to 1.
        start_fraction: 0 to ``stop_fraction``; 0: from the first step.
        gradient_norm_weight: None: lambda is a plain factor.
    """

    def __init__(
        self,
        weight: float,
        max_steps: int,
        warmup_steps: int = 0,
        stop_fraction: float = 1.0,
        start_fraction: float = 0.0,
        gradient_norm_weight: GradientNormWeight | None = None,
    ):
        if start_fraction > stop_fraction:
            raise ParameterError("start_fraction", f"={start_fraction} must not be above stop_fraction={stop_fraction}")
        self.weight, self.warmup_steps = weight, warmup_steps
        self.start_step, self.stop_step = math.ceil(start_fraction * max_steps), stop_fraction * max_steps
        self.gradient_norm_weight = gradient_norm_weight

    def __call__(self, step: int) -> float:
        """Return lambda at ``step``."""
        if step < self.start_step or step >= self.stop_step:
            return 0.0
        return self.weight * linear_warmup(step - self.start_step, self.warmup_steps)

    def measures_gradients(self, step: int) -> bool:
        """Return whether :meth:`update` is due at ``step``."""
        if self.gradient_norm_weight is None:
            return False
        return (step - self.start_step) % self.gradient_norm_weight.every == 0

    def update(self, task_loss: Tensor, contrast: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> None:
        """Measure the gradients of both losses at the task features.

        Args:
            task_loss: the weighted sum over the tasks, a scalar.
            contrast: target -> contrastive loss.
            features: target -> its feature map, in the graph of both.
        """
        assert self.gradient_norm_weight is not None
        total = torch.stack(list(contrast.values())).sum()
        self.gradient_norm_weight.update(gradient_norms(task_loss, features), gradient_norms(total, features))

    def rescale(self, loss: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the contrastive loss that lambda multiplies: ``loss``, or the sum of the rescaled ``losses``.

        Args:
            loss: the mean over the targets.
            losses: target -> loss.
        """
        return loss if self.gradient_norm_weight is None else self.gradient_norm_weight.weighted_sum(losses)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the measured factors; None where nothing is measured."""
        return None if self.gradient_norm_weight is None else self.gradient_norm_weight.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue from :meth:`state_dict`; None: start afresh."""
        if self.gradient_norm_weight is not None and state is not None:
            self.gradient_norm_weight.load_state_dict(state)
