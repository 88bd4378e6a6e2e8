"""Balance objectives: from one loss per objective to the gradients of the model."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtcl import distributed
from mtcl.regularizers.masked_adamw import MaskedAdamW
from mtcl.schedules import Schedule
from mtcl.training.optimizers import ScheduledOptimizer

log = logging.getLogger(__name__)


class Balancer(ABC):
    """Decides how much each objective contributes to the gradients.

    A step calls :meth:`backward` for each of its batches, :meth:`finish_step` before the gradients are used, and
    :meth:`update` after the optimiser's step.

    Args:
        weights: objective -> fixed factor of its loss. Losses of other names (a model's auxiliary ones, the contrast
            where it is not an objective) are added with factor 1.
    """

    saved_name: str  # in checkpoints, where it must not change

    def __init__(self, weights: Mapping[str, float]):
        self.weights = dict(weights)

    def weight(self, name: str) -> float | Tensor:
        """Return the current factor of a loss, before gradients are aggregated."""
        return self.weights.get(name, 1.0)

    @abstractmethod
    def backward(self, losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> None:
        """Add the gradients of a batch's losses.

        Args:
            losses: name -> scalar.
            parameters: all that are trained.
        """

    def finish_step(self, step: int) -> None:  # noqa: B027  # optional
        """Complete ``.grad`` after the step's last batch."""

    def update(self, step: int, skip: Tensor) -> None:  # noqa: B027
        """Update the balancer's own state after a step, unless ``skip`` is 1.0 on the device."""

    def summary(self) -> dict[str, Tensor | float]:
        """Return ``objective/quantity`` -> scalar, for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"method": self.saved_name, "objectives": list(self.weights), **self._state()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue from :meth:`state_dict`; start afresh, after a warning, if that is of another method."""
        state = state or {"method": FixedWeights.saved_name}  # checkpoints from before there were balancers
        same = state["method"] == self.saved_name and state.get("objectives") == list(self.weights)
        if self._state() and not same:
            log.warning("the checkpoint was trained with another balancing: this one starts afresh")
        elif self._state():
            self._load(state)

    def _state(self) -> dict[str, Any]:
        return {}

    def _load(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Load what :meth:`_state` returned."""


class FixedWeights(Balancer):
    """Sums the losses with fixed factors, the standard way, and runs one backward pass."""

    saved_name = "FixedWeights"

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses."""
        return sum((self.weight(name) * loss for name, loss in losses.items()), start=_zero(losses))

    def backward(self, losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> None:  # noqa: ARG002
        """Add the gradients of the weighted sum."""
        self.total(losses).backward()


class _AdaptiveWeights(FixedWeights):
    """Factors that follow the losses. :meth:`finish_step` averages these over a step's batches and all processes."""

    def __init__(self, weights: Mapping[str, float], device: torch.device):
        super().__init__(weights)
        self.fixed = torch.tensor(list(self.weights.values()), dtype=torch.float32, device=device)
        self.factors = torch.ones_like(self.fixed)
        self.sums = torch.zeros_like(self.factors)  # of this step's batches
        self.means = torch.zeros_like(self.factors)  # of the last step; 0: the objective had no labels

    def weight(self, name: str) -> float | Tensor:
        if name not in self.weights:
            return 1.0
        return self.weights[name] * self.factors[list(self.weights).index(name)]

    def backward(self, losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> None:
        super().backward(losses, parameters)
        zero = _zero(losses).float()
        self.sums += torch.stack([losses[name].detach().float() if name in losses else zero for name in self.weights])

    def finish_step(self, step: int) -> None:  # noqa: ARG002
        self.means = distributed.all_reduce_sum(self.sums) / distributed.world_size()
        self.sums = torch.zeros_like(self.sums)

    def summary(self) -> dict[str, Tensor | float]:
        return {f"{name}/weight": weight * self.factors[i] for i, (name, weight) in enumerate(self.weights.items())}


class UncertaintyWeighting(_AdaptiveWeights):
    """Learns a log-variance s per objective (Kendall, Gal, Cipolla, CVPR 2018).

    The sum of

        exp(-s) w L + s

    is minimised over the model and over s. All s start at 0, so a run begins with the fixed weights w; where s has
    converged, exp(s) is the size of w L. This is the likelihood of Laplace's distribution, i.e. of the L1 losses of
    depth and normals; the paper's forms for Gaussians (exp(-s) L / 2 + s / 2) and for classes (exp(-s) L + s / 2)
    differ from it in a constant of each task.

    Args:
        weights: objective -> w.
        device: of the losses.
        lr: learning rate of all s. The optimiser is MaskedAdamW: an objective without labels in a step keeps its s.
        schedule: of that learning rate.
    """

    saved_name = "Uncertainty"

    def __init__(self, weights: Mapping[str, float], device: torch.device, lr: float, schedule: Schedule):
        super().__init__(weights, device)
        self.log_variance = nn.Parameter(torch.zeros_like(self.factors))
        self.optimizer = ScheduledOptimizer(MaskedAdamW([self.log_variance], lr=lr, weight_decay=0.0), schedule)

    def finish_step(self, step: int) -> None:
        """Compute the gradient of each s from the mean losses of the step."""
        super().finish_step(step)
        self.log_variance.grad = torch.where(self.means == 0, 0.0, 1 - self.factors * self.fixed * self.means)

    def update(self, step: int, skip: Tensor) -> None:
        """Take a step on all s."""
        self.optimizer.step(step, skip)
        self.optimizer.zero_grad()
        self.factors = torch.exp(-self.log_variance.detach())

    def summary(self) -> dict[str, Tensor | float]:
        """Return the current factors and log-variances."""
        log_variances = self.log_variance.detach().unbind()
        return super().summary() | {f"{name}/log_variance": s for name, s in zip(self.weights, log_variances)}

    def _state(self) -> dict[str, Any]:
        return {"log_variance": self.log_variance.detach(), "optimizer": self.optimizer.optimizer.state_dict()}

    def _load(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.log_variance.copy_(state["log_variance"])
        self.optimizer.load(state["optimizer"])
        self.factors = torch.exp(-self.log_variance.detach())


class DynamicWeightAveraging(_AdaptiveWeights):
    """Dynamic weight averaging (Liu, Johns, Davison, CVPR 2019).

    Of K objectives, the one whose loss decreases the slowest has the largest factor,

        K softmax(r / temperature) w L,        r = mean loss of the last window / of the one before

    The factor is 1 in the first two windows, and for an objective without labels in one of the last two, which is then
    left out of the softmax and of K.

    Args:
        weights: objective -> w.
        device: of the losses.
        every: steps of a window (in the paper an epoch).
        temperature: of the softmax.
    """

    saved_name = "DynamicAverage"

    def __init__(self, weights: Mapping[str, float], device: torch.device, every: int, temperature: float = 2.0):
        super().__init__(weights, device)
        self.every, self.temperature = every, temperature
        self.windows = torch.zeros(
            4, len(self.weights), device=device
        )  # sum and count of this one, means of the two before

    def update(self, step: int, skip: Tensor) -> None:
        """Take in the mean losses of the step; compute new factors at the end of a window."""
        has_labels = (self.means != 0) & self.means.isfinite() & (skip == 0)
        self.windows[0] += torch.where(has_labels, self.means, 0.0)
        self.windows[1] += has_labels
        if (step + 1) % self.every == 0:
            sums, counts, newer, _ = self.windows
            mean = torch.where(counts > 0, sums / counts, 0.0)
            self.windows = torch.stack([torch.zeros_like(mean), torch.zeros_like(mean), mean, newer])
            self.factors = self._factors()

    def _factors(self) -> Tensor:
        newer, older = self.windows[2:]
        has_both = (newer > 0) & (older > 0)
        rate = torch.where(has_both, newer / older / self.temperature, -torch.inf)
        return torch.where(has_both, has_both.sum() * torch.softmax(rate, dim=0), 1.0)

    def _state(self) -> dict[str, Any]:
        return {"windows": self.windows}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.windows.copy_(state["windows"])
        self.factors = self._factors()


def _zero(losses: Mapping[str, Tensor]) -> Tensor:
    return next(iter(losses.values())).new_zeros(())
