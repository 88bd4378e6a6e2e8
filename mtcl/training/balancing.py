"""From one loss per objective to gradients."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtcl import distributed
from mtcl.regularizers.masked_adamw import MaskedAdamW
from mtcl.training.optimizers import Schedule, ScheduledOptimizer

log = logging.getLogger(__name__)


class Balancer(ABC):
    """Decides how much each objective moves the model.

    ``weights``: the objectives, and by how much each loss is multiplied first. Losses of other names (a model's
    auxiliary ones, the contrast where it is no objective) are added as they come.

    A step calls :meth:`backward` for each of its batches, :meth:`finish` before gradients are looked at, and
    :meth:`update` after the model's own step.
    """

    saved_name: str  # in checkpoints, where it must not change

    def __init__(self, weights: Mapping[str, float]):
        self.weights = dict(weights)

    def weight(self, name: str) -> float | Tensor:
        """What this loss counts now, before gradients are aggregated."""
        return self.weights.get(name, 1.0)

    @abstractmethod
    def backward(self, losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> None:
        """Add the gradients of a batch's scalar losses, by name; ``parameters``: all that is trained."""

    def finish_step(self, step: int) -> None:  # noqa: B027  # nothing to do is a fine answer
        """All batches of the step are in: ``.grad`` is complete afterwards."""

    def update(self, step: int, skip: Tensor) -> None:  # noqa: B027
        """Learn from the step; ``skip``: 1.0 on the device where nothing is to be learnt from it."""

    def summary(self) -> dict[str, Tensor | float]:
        """``objective/what`` -> scalar, for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"method": self.saved_name, "objectives": list(self.weights), **self._state()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from :meth:`state_dict`; afresh, after a warning, where that is of another balancing."""
        state = state or {"method": FixedWeights.saved_name}  # of before the key
        same = state["method"] == self.saved_name and state.get("objectives") == list(self.weights)
        if self._state() and not same:
            log.warning("the checkpoint was trained with another balancing: this one starts afresh")
        elif self._state():
            self._load(state)

    def _state(self) -> dict[str, Any]:
        return {}

    def _load(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what :meth:`_state` gave."""


class FixedWeights(Balancer):
    """The field's way: one backward pass through the sum of fixed multiples. An objective without a weight counts
    once."""

    saved_name = "FixedWeights"

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        return sum((self.weight(name) * loss for name, loss in losses.items()), start=_zero(losses))

    def backward(self, losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> None:
        self.total(losses).backward()


class _AdaptiveWeights(FixedWeights):
    """One backward pass, too, but the multiples follow the losses: those of a step, over its batches and all
    processes, are at hand when it is finished."""

    def __init__(self, weights: Mapping[str, float], device: torch.device):
        super().__init__(weights)
        self.fixed = torch.tensor(list(self.weights.values()), dtype=torch.float32, device=device)
        self.factors = torch.ones_like(self.fixed)
        self.sums = torch.zeros_like(self.factors)  # of this step's batches
        self.means = torch.zeros_like(self.factors)  # of the finished step; 0: the objective was not there

    def weight(self, name: str) -> float | Tensor:
        if name not in self.weights:
            return 1.0
        return self.weights[name] * self.factors[list(self.weights).index(name)]

    def backward(self, losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> None:
        super().backward(losses, parameters)
        zero = _zero(losses).float()
        self.sums += torch.stack([losses[name].detach().float() if name in losses else zero for name in self.weights])

    def finish_step(self, step: int) -> None:
        self.means = distributed.all_reduce_sum(self.sums) / distributed.world_size()
        self.sums = torch.zeros_like(self.sums)

    def summary(self) -> dict[str, Tensor | float]:
        return {f"{name}/weight": weight * self.factors[i] for i, (name, weight) in enumerate(self.weights.items())}


class UncertaintyWeighting(_AdaptiveWeights):
    """Each objective has a learned log-variance s (Kendall, Gal, Cipolla, CVPR 2018): the sum of

        exp(-s) w L + s

    is minimised over the model and over s. All s start at 0, so a run begins with the fixed weights w; where s has
    settled, exp(s) is the size of w L. This is the likelihood of Laplace's distribution, i.e. of the L1 losses of
    depth and normals; the paper's forms for Gaussians (exp(-s) L / 2 + s / 2) and for classes (exp(-s) L + s / 2)
    differ from it in a constant of each task.

    ``lr``: of SliceAdamW on all s, times the ``schedule``: an objective without a label in a step keeps its own.
    """

    saved_name = "Uncertainty"

    def __init__(self, weights: Mapping[str, float], device: torch.device, lr: float, schedule: Schedule):
        super().__init__(weights, device)
        self.log_variance = nn.Parameter(torch.zeros_like(self.factors))
        self.optimizer = ScheduledOptimizer(MaskedAdamW([self.log_variance], lr=lr, weight_decay=0.0), schedule)

    def finish_step(self, step: int) -> None:
        super().finish_step(step)
        self.log_variance.grad = torch.where(self.means == 0, 0.0, 1 - self.factors * self.fixed * self.means)

    def update(self, step: int, skip: Tensor) -> None:
        self.optimizer.step(step, skip)
        self.optimizer.zero_grad()
        self.factors = torch.exp(-self.log_variance.detach())

    def summary(self) -> dict[str, Tensor | float]:
        learned = self.log_variance.detach().unbind()
        return super().summary() | {f"{name}/log_variance": s for name, s in zip(self.weights, learned)}

    def _state(self) -> dict[str, Any]:
        return {"log_variance": self.log_variance.detach(), "optimizer": self.optimizer.optimizer.state_dict()}

    def _load(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.log_variance.copy_(state["log_variance"])
        self.optimizer.load(state["optimizer"])
        self.factors = torch.exp(-self.log_variance.detach())


class DynamicWeightAveraging(_AdaptiveWeights):
    """Dynamic weight averaging (Liu, Johns, Davison, CVPR 2019): of K objectives, the one whose loss falls the slowest
    counts the most,

        K softmax(r / temperature) w L,        r = mean loss of the last window / of the one before

    ``every``: steps of a window (the paper: an epoch). 1 in the first two windows, and for an objective that was not
    seen in both of the last two, which then has no part in the softmax and in K.
    """

    saved_name = "DynamicAverage"

    def __init__(self, weights: Mapping[str, float], device: torch.device, every: int, temperature: float = 2.0):
        super().__init__(weights, device)
        self.every, self.temperature = every, temperature
        self.windows = torch.zeros(4, len(self.weights), device=device)  # sum and count of this one, earlier two's mean

    def update(self, step: int, skip: Tensor) -> None:
        seen = (self.means != 0) & self.means.isfinite() & (skip == 0)
        self.windows[0] += torch.where(seen, self.means, 0.0)
        self.windows[1] += seen
        if (step + 1) % self.every == 0:
            sums, counts, newer, _ = self.windows
            mean = torch.where(counts > 0, sums / counts, 0.0)
            self.windows = torch.stack([torch.zeros_like(mean), torch.zeros_like(mean), mean, newer])
            self.factors = self._factors()

    def _factors(self) -> Tensor:
        newer, older = self.windows[2:]
        known = (newer > 0) & (older > 0)
        rate = torch.where(known, newer / older / self.temperature, -torch.inf)
        return torch.where(known, known.sum() * torch.softmax(rate, dim=0), 1.0)

    def _state(self) -> dict[str, Any]:
        return {"windows": self.windows}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.windows.copy_(state["windows"])
        self.factors = self._factors()


def _zero(losses: Mapping[str, Tensor]) -> Tensor:
    return next(iter(losses.values())).new_zeros(())
