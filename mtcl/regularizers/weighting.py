"""Lambda, the weight of the regulariser's loss beside the tasks' losses, over the course of a training."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtcl.errors import ParameterError, UserError
from mtcl.regularizers.diagnostics import gradient_norms
from mtcl.schedules import linear_warmup

OBJECTIVE_WEIGHT = 1.0  # of lambda * L_contrast as an objective beside the tasks': lambda alone weighs it


class GradientNormWeight(nn.Module):
    """Scales the regulariser's loss so that its gradient has the norm of the task loss's, at a place of each target.

    The place is the target's feature map F_t, or the first weight of its head. At the feature map the norm of the
    contrast grows with the number of sampled pixels, whose gradients partly cancel on the way to the weights; at the
    head's weight both norms are those of what the optimizer sees.

    There is a factor per comparison (a target, or a pair of target and source): a running mean of the ratio of the two
    norms, measured at every ``every``-th step (a backward pass down to the features or the head, not through the
    backbone). It stays on the device and is part of a run's state. Where one comparison serves all sources of a target,
    the norms may differ at a single step. In several processes the norms are those of the gradients of all of them
    together (:func:`mtcl.regularizers.diagnostics.global_norm`).

    Args:
        names: the comparisons.
        every: number of steps from one measurement to the next.
        momentum: of the running mean.
        cap: the largest factor that a loss is multiplied by; None: without a bound.
        targets: the target of each comparison; None: ``names`` are the targets.
        head_weights: target -> weight at which gradients are measured; None: at the feature maps.
        read_share: returns the part of each comparison among those of its target, (R,); None: equal parts.
    """

    def __init__(
        self,
        names: Sequence[str],
        every: int = 10,
        momentum: float = 0.9,
        cap: float | None = None,
        targets: Sequence[str] | None = None,
        head_weights: Mapping[str, Tensor] | None = None,
        read_share: Callable[[], Tensor] | None = None,
    ):
        super().__init__()
        self.names, self.every, self.momentum, self.cap = list(names), every, momentum, cap
        self.targets = self.names if targets is None else list(targets)
        self.head_weights, self.read_share = head_weights, read_share
        self.factor: Tensor
        self.register_buffer("factor", torch.zeros(len(self.names)))  # 0: not measured yet
        self.share: Tensor  # of each comparison among those of its target
        share = torch.tensor([1 / self.targets.count(target) for target in self.targets])
        self.register_buffer("share", share, persistent=False)

    def measure(self, task_loss: Tensor, contrast: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> None:
        """Measure the gradients of both losses and take them in, see :meth:`Lambda.update`.

        Raises:
            UserError: nothing that is trained comes before a target's feature map.
        """
        places = features if self.head_weights is None else self.head_weights
        if untrained := [target for target in self.targets if not places[target].requires_grad]:
            raise UserError(
                f"weighting=gradient_norm compares gradients at feature maps, but nothing that is trained comes before "
                f"that of {untrained[0]} on a frozen backbone; train the backbone, choose another feature or use "
                "weighting=fixed"
            )
        task = gradient_norms(task_loss, {target: places[target] for target in self.targets})
        if self.names == self.targets:
            total = torch.stack([contrast[name] for name in self.names]).sum()
            norms = gradient_norms(total, {name: places[name] for name in self.names})
        else:  # each on its own
            norms = {n: gradient_norms(contrast[n], {n: places[t]})[n] for n, t in zip(self.names, self.targets)}
        self.update({n: task[t] for n, t in zip(self.names, self.targets)}, norms)

    @torch.no_grad()
    def update(self, norm_task: Mapping[str, Tensor], norm_contrast: Mapping[str, Tensor]) -> None:
        """Take in gradient norms, comparison -> scalar. One without labels or anchors keeps its factor.

        So does one whose gradient is not finite, as those of scaled losses may be in fp16. A factor that both norms
        have does not matter.
        """
        task = torch.stack([norm_task[name] for name in self.names])
        contrast = torch.stack([norm_contrast[name] for name in self.names])
        ratio = task / contrast.clamp(min=torch.finfo(contrast.dtype).tiny)
        mean = torch.where(self.factor > 0, self.momentum * self.factor + (1 - self.momentum) * ratio, ratio)
        is_measured = (task > 0) & (contrast > 0) & contrast.isfinite() & ratio.isfinite()
        self.factor.copy_(torch.where(is_measured, mean, self.factor))

    def weighted_sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the sum over targets of the mean of its losses, each times its factor or at most the cap."""
        factor = self.factor if self.cap is None else self.factor.clamp(max=self.cap)
        share = self.share if self.read_share is None else self.read_share()
        return (torch.stack([losses[name] for name in self.names]) * (factor * share)).sum()


class Lambda:
    """lambda in the method's loss, L = sum_t w_t L_task_t + lambda * L_contrast.

    Called with a step it returns lambda: 0 before the part ``start_fraction`` of the training, then ``weight``, reached
    linearly over ``warmup_steps``, and 0 again after the part ``stop_fraction``. With a ``gradient_norm_weight`` the
    regulariser's loss that it multiplies is rescaled first, so that lambda is the ratio of the two gradients' norms.

    A balancer that treats the regulariser's loss as an objective multiplies it by :data:`OBJECTIVE_WEIGHT`.

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

    def hold_weight(self) -> None:
        """Take the final weight at every step, for a run that measures what a step costs."""
        self.warmup_steps, self.start_step, self.stop_step = 0, 0, math.inf

    def measures_gradients(self, step: int) -> bool:
        """Return whether :meth:`update` is due at ``step``."""
        if self.gradient_norm_weight is None:
            return False
        return (step - self.start_step) % self.gradient_norm_weight.every == 0

    def update(self, task_loss: Tensor, contrast: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> None:
        """Measure the gradients of both losses.

        Args:
            task_loss: the weighted sum over the tasks, a scalar.
            contrast: comparison -> the regulariser's loss.
            features: target -> its feature map, in the graph of both.
        """
        assert self.gradient_norm_weight is not None
        self.gradient_norm_weight.measure(task_loss, contrast, features)

    def rescale(self, loss: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the regulariser's loss that lambda multiplies: ``loss``, or the rescaled ``losses`` together.

        Args:
            loss: the mean over the comparisons.
            losses: comparison -> loss.
        """
        return loss if self.gradient_norm_weight is None else self.gradient_norm_weight.weighted_sum(losses)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the measured factors; None where nothing is measured."""
        return None if self.gradient_norm_weight is None else self.gradient_norm_weight.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue from :meth:`state_dict`; None: start afresh."""
        if self.gradient_norm_weight is not None and state is not None:
            self.gradient_norm_weight.load_state_dict(state)
