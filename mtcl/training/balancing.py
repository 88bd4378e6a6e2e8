"""Balance objectives: from one loss per objective to the gradients of the model."""

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtcl import distributed

log = logging.getLogger(__name__)


def rename_objective(name: str) -> str:
    """Return today's name of an objective in a checkpoint: before version 0.3 the regulariser was called contrast."""
    return "regularizer" if name == "contrast" else name


class Balancer(ABC):
    """Decides how much each objective contributes to the gradients.

    A step calls :meth:`backward` for each of its batches, :meth:`finish_step` before the gradients are used, and
    :meth:`update` after the optimiser's step. Where :attr:`measures_progress` is set, :meth:`observe_progress` comes
    before the last of them.

    Args:
        weights: objective -> fixed factor of its loss. Losses of other names (a model's auxiliary ones, the
            regulariser's where it is not an objective) are added with factor 1.
    """

    saved_name: str  # in checkpoints, where it must not change
    loss_scale: Tensor | None = None  # factor of what is differentiated, and so of .grad, against underflow in fp16
    measures_progress = False  # whether it needs the losses of a step's batches once more, after the step

    def __init__(self, weights: Mapping[str, float]):
        self.weights = dict(weights)

    def weigh(self, losses: Mapping[str, Tensor], num_batches: int = 1) -> dict[str, float | Tensor]:  # noqa: ARG002
        """Return the factor of each loss in the sum that is differentiated, before gradients are aggregated.

        Args:
            losses: name -> scalar, of one batch; all processes must call this alike.
            num_batches: what the losses were divided by.
        """
        return {name: self.weights.get(name, 1.0) for name in losses}

    @abstractmethod
    def backward(self, losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter], num_batches: int = 1) -> None:
        """Add the gradients of a batch's losses.

        Args:
            losses: name -> scalar.
            parameters: all that are trained.
            num_batches: batches of the step, by whose number the losses were divided.
        """

    def finish_step(self, step: int) -> None:  # noqa: B027  # optional
        """Complete ``.grad``, which has the factor :attr:`loss_scale`, after the step's last batch."""

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return a loss times :attr:`loss_scale`."""
        return loss if self.loss_scale is None else self.loss_scale * loss

    def unscale_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient of a scaled loss without the factor."""
        return gradient if self.loss_scale is None else gradient / self.loss_scale

    @contextlib.contextmanager
    def unscaled_gradients(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Take the factor from ``.grad`` inside the context. It is a power of two, so nothing is rounded."""
        if self.loss_scale is None:
            yield
            return
        parameters = list(parameters)
        for gradient in (p.grad for p in parameters if p.grad is not None):
            gradient /= self.loss_scale
        yield
        for gradient in (p.grad for p in parameters if p.grad is not None):
            gradient *= self.loss_scale

    def observe_progress(self, losses: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take in the losses (objective -> mean over the step's batches) that the updated model has."""

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
        objectives = [rename_objective(name) for name in state.get("objectives") or ()]
        same = state["method"] == self.saved_name and objectives == list(self.weights)
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

    def total(self, losses: Mapping[str, Tensor], num_batches: int = 1) -> Tensor:
        """Return the weighted sum of the losses."""
        weights = self.weigh(losses, num_batches)
        return sum((weights[name] * loss for name, loss in losses.items()), start=_zero(losses))

    def backward(
        self,
        losses: Mapping[str, Tensor],
        parameters: Iterable[nn.Parameter],  # noqa: ARG002
        num_batches: int = 1,
    ) -> None:
        """Add the gradients of the weighted sum."""
        self.scale_loss(self.total(losses, num_batches)).backward()


class AdaptiveWeights(FixedWeights):
    """Factors that change during the training, those of :attr:`factors`, beside the fixed ones.

    :meth:`finish_step` averages the losses over a step's batches and all processes. An objective whose mean loss is 0
    had no labels.

    Args:
        weights: objective -> fixed factor of its loss.
        device: of the losses.
    """

    def __init__(self, weights: Mapping[str, float], device: torch.device):
        super().__init__(weights)
        self.fixed = torch.tensor(list(self.weights.values()), dtype=torch.float32, device=device)
        self.factors = torch.ones_like(self.fixed)
        self.sums = torch.zeros_like(self.factors)  # of this step's batches
        self.means = torch.zeros_like(self.factors)  # of the last step; 0: the objective had no labels

    def weigh(self, losses: Mapping[str, Tensor], num_batches: int = 1) -> dict[str, float | Tensor]:  # noqa: ARG002
        """Return the fixed factor times the current one; 1 for losses that are not objectives."""
        factors = dict(zip(self.weights, self.factors.unbind()))
        return {name: self.weights[name] * factors[name] if name in factors else 1.0 for name in losses}

    def backward(self, losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter], num_batches: int = 1) -> None:
        """Add the gradients of the weighted sum, and the losses to the step's means."""
        super().backward(losses, parameters, num_batches)
        self.sums += self._stack(losses)

    def _stack(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the objectives' losses (K,), detached; 0 for those that are not there."""
        zero = _zero(losses).float()
        return torch.stack([losses[name].detach().float() if name in losses else zero for name in self.weights])

    def finish_step(self, step: int) -> None:  # noqa: ARG002
        """Average the step's losses over all processes."""
        self.means = distributed.all_reduce_sum(self.sums) / distributed.world_size()
        self.sums = torch.zeros_like(self.sums)

    def summary(self) -> dict[str, Tensor | float]:
        """Return the current factor of each objective's loss."""
        return {f"{name}/weight": weight * self.factors[i] for i, (name, weight) in enumerate(self.weights.items())}


def _zero(losses: Mapping[str, Tensor]) -> Tensor:
    return next(iter(losses.values())).new_zeros(())
