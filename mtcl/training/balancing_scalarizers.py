"""Balance objectives by a scalarizer of TorchJD: a function of their losses, of which one backward pass is run."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtcl import distributed
from mtcl.errors import ParameterError
from mtcl.regularizers.masked_adamw import MaskedAdamW
from mtcl.schedules import Schedule
from mtcl.training.balancing import AdaptiveWeights, Balancer
from mtcl.training.balancing_torchjd import build_class, check_options, choose_class, private_randomness
from mtcl.training.optimizers import ScheduledOptimizer

ABSENT = 1e30  # stands for the loss of an objective without labels where that leaves it out
WITHOUT_LOSSES = ("Constant", "Mean", "Random", "Sum")  # their weights do not depend on the losses
LEARNED = ("IMTLL", "UW")


class Scalarization(AdaptiveWeights):
    """Minimises a scalarizer S of TorchJD, a function of the objectives' losses.

    The gradient of S is the sum over objectives of dS/dL_i times the gradient of L_i, so the factor of a loss is
    dS/dL_i (times ``scale``). L_i is the weighted loss of a batch, averaged over all processes: these have equal
    factors, and the gradient that DDP averages is that of S of the losses of all images together. An objective without
    labels in the batch (a loss of 0) is left out: the other factors are those of S without it. The host does not wait
    for the device.

    Args:
        weights: objective -> w, which multiplies its loss before the scalarizer.
        device: of the losses.
        scalarizer: name of a class in ``torchjd.scalarization``.
        options: of the scalarizer; a vector over objectives is a list in the order of ``weights``, or a mapping.
        scale: factor of the scalarizer. Many return about the mean of the losses, to which the number of objectives
            would be the factor of a sum.

    Raises:
        ParameterError: the scalarizer or one of its options is refused.
    """

    saved_name = "Scalarization"

    def __init__(
        self,
        weights: Mapping[str, float],
        device: torch.device,
        scalarizer: str,
        options: Mapping[str, Any] | None = None,
        scale: float = 1.0,
    ):
        super().__init__(weights, device)
        self.name, self.scale = scalarizer, scale
        options, names = dict(options or {}), list(self.weights)
        check_options("scalarizer", scalarizer, options, names)
        try:
            self.scalarizer: Any = build_class(choose_class("scalarizer", scalarizer), options, names, names, device)
            self.scalarizer.to(device)
            self._prepare()
        except (TypeError, ValueError) as error:
            problem = f"={scalarizer} with options {options}: {str(error).splitlines()[0].rstrip('.')}"
            raise ParameterError("scalarizer", problem) from error

    def _prepare(self) -> None:
        """Read the options that change where objectives are left out."""
        self.preference: Tensor | None = getattr(self.scalarizer, "weights", None)
        reference = getattr(self.scalarizer, "reference", None)
        self.reference = torch.zeros_like(self.fixed) if reference is None else reference

    def weigh(self, losses: Mapping[str, Tensor], num_batches: int = 1) -> dict[str, float | Tensor]:
        """Return w times the derivative of the scalarizer by each objective's loss; 1 for other losses."""
        values = self.fixed * distributed.all_reduce_sum(self._stack(losses)) * (num_batches / distributed.world_size())
        self.factors = self._factors(values, values != 0)
        return super().weigh(losses, num_batches)

    def _factors(self, values: Tensor, is_present: Tensor) -> Tensor:
        """Return the factors (K,) of the losses ``values`` (K,), of which ``is_present`` have labels."""
        if self.name == "STCH":
            values = torch.where(is_present, values, -ABSENT)
            if self.preference is None:  # it is uniform
                self.scalarizer.weights = torch.ones_like(values) / is_present.sum()
        elif self.preference is not None and self.name != "Constant":  # COSMOS, PBI
            values = torch.where(is_present, values, self.reference)
            self.scalarizer.weights = self.preference * is_present
        factors = differentiate(self.scalarizer, values)
        if self.name in ("Mean", "Random"):  # weights whose sum is 1
            factors = factors / (factors * is_present).sum()
        return torch.where(is_present, self.scale * factors, 1.0)


class GeometricMeanLoss(Scalarization):
    """Minimises the geometric mean of the losses (Chennupati et al., CVPR workshops 2019; GLS).

    This is TorchJD's ``GeometricMean`` of the objectives with labels. That class itself is not called, since it waits
    for the device to look for negative losses.
    """

    def _factors(self, values: Tensor, is_present: Tensor) -> Tensor:
        count = is_present.sum()
        mean = (torch.where(is_present, values, 1.0).log().sum() / count).exp()
        return torch.where(is_present, self.scale * mean / (count * values), 1.0)


class RandomWeights(Scalarization):
    """Draws the weights anew in each step (Lin et al., TMLR 2022; RLW), as a function of seed and step."""

    saved_name = "RandomWeights"

    def __init__(self, *arguments: Any, seed: int = 0, **options: Any):
        super().__init__(*arguments, **options)
        self.seed, self.step = seed, 0

    def _factors(self, values: Tensor, is_present: Tensor) -> Tensor:
        with private_randomness(self.seed, self.step, values.device):
            return super()._factors(values, is_present)

    def update(self, step: int, skip: Tensor) -> None:  # noqa: ARG002
        """Go on to the next step's weights."""
        self.step = step + 1

    def _state(self) -> dict[str, Any]:
        return {"step": self.step}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]


class StatefulScalarization(Scalarization):
    """A scalarizer whose factors follow from its state, not from the losses of the batch."""

    def _prepare(self) -> None:
        self.factors = self._current_factors()

    @abstractmethod
    def _current_factors(self) -> Tensor:
        """Return the factors (K,) by the current state."""

    def weigh(self, losses: Mapping[str, Tensor], num_batches: int = 1) -> dict[str, float | Tensor]:
        """Return w times the current factor; 1 for losses that are not objectives."""
        return AdaptiveWeights.weigh(self, losses, num_batches)


class LearnedScales(StatefulScalarization):
    """Learns a scale of each objective's loss L (w included) beside the model: TorchJD's ``UW`` or ``IMTLL``.

    ``UW`` (Kendall, Gal, Cipolla, CVPR 2018) is the sum of exp(-s) L / 2 + s / 2, ``IMTLL`` (Liu et al., ICLR 2021) of
    exp(s) L - s. All s start at 0. Where they have converged, the scaled losses are equal.

    Args:
        weights: objective -> w.
        device: of the losses.
        scalarizer: ``UW`` or ``IMTLL``.
        options: none.
        scale: factor of the scalarizer. Twice ``UW`` starts with the weights w.
        lr: learning rate of all s. The optimiser is MaskedAdamW: an objective without labels in a step keeps its s.
        schedule: of that learning rate.
    """

    def __init__(self, *arguments: Any, lr: float, schedule: Schedule, **options: Any):
        super().__init__(*arguments, **options)
        self.saved_name = {"UW": "Uncertainty"}.get(self.name, self.name)
        optimizer = MaskedAdamW([self.learned], lr=lr, weight_decay=0.0)
        self.optimizer = ScheduledOptimizer(optimizer, schedule)

    def _prepare(self) -> None:
        ((name, self.learned),) = self.scalarizer.named_parameters()
        self.quantity = {"log_var": "log_variance"}.get(name, name)  # its name in the log and in checkpoints
        super()._prepare()

    def _current_factors(self) -> Tensor:
        return self.scale * differentiate(self.scalarizer, torch.ones_like(self.fixed))

    def finish_step(self, step: int) -> None:
        """Compute the gradient of each s from the mean losses of the step."""
        super().finish_step(step)
        (gradient,) = torch.autograd.grad(self.scale * self.scalarizer(self.fixed * self.means), self.learned)
        self.learned.grad = torch.where(self.means == 0, 0.0, gradient)

    def update(self, step: int, skip: Tensor) -> None:
        """Take a step on all s."""
        self.optimizer.step(step, skip)
        self.optimizer.zero_grad()
        self.factors = self._current_factors()

    def summary(self) -> dict[str, Tensor | float]:
        """Return the current factors and scales."""
        learned = self.learned.detach().unbind()
        return super().summary() | {f"{name}/{self.quantity}": s for name, s in zip(self.weights, learned)}

    def _state(self) -> dict[str, Any]:
        return {self.quantity: self.learned.detach(), "optimizer": self.optimizer.optimizer.state_dict()}

    def _load(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.learned.copy_(state[self.quantity])
        self.optimizer.load(state["optimizer"])
        self.factors = self._current_factors()


class DynamicWeightAveraging(StatefulScalarization):
    """Dynamic weight averaging (Liu, Johns, Davison, CVPR 2019): TorchJD's ``DWA``.

    Of K objectives, the one whose loss decreases the slowest has the largest factor,

        K softmax(r / temperature),        r = mean loss of the last window / of the one before

    The factor is 1 in the first two windows, and for an objective without labels in one of the last two, which is then
    left out of the softmax and of K. That, steps that are skipped and several processes are why the means are computed
    here; the weights that follow from two of them are the library's.

    Args:
        weights: objective -> w.
        device: of the losses.
        scalarizer: ``DWA``.
        options: ``temperature``.
        scale: factor of the scalarizer.
        every: steps of a window (in the paper an epoch).
    """

    saved_name = "DynamicAverage"

    def __init__(self, *arguments: Any, every: int, **options: Any):
        super().__init__(*arguments, **options)
        self.every = every

    def _prepare(self) -> None:
        self.windows = torch.zeros(4, len(self.weights), device=self.fixed.device)
        # rows: sum and count of this window, means of the two before it
        super()._prepare()

    def update(self, step: int, skip: Tensor) -> None:
        """Take in the mean losses of the step; compute new factors at the end of a window."""
        has_labels = (self.means != 0) & self.means.isfinite() & (skip == 0)
        self.windows[0] += torch.where(has_labels, self.means, 0.0)
        self.windows[1] += has_labels
        if (step + 1) % self.every == 0:
            sums, counts, newer, _ = self.windows
            mean = torch.where(counts > 0, sums / counts, 0.0)
            self.windows = torch.stack([torch.zeros_like(mean), torch.zeros_like(mean), mean, newer])
            self.factors = self._current_factors()

    def _current_factors(self) -> Tensor:
        newer, older = self.windows[2:]
        has_both = (newer > 0) & (older > 0)
        self.scalarizer.reset()
        for average in (torch.where(has_both, older, 1.0), torch.where(has_both, newer, -torch.inf)):
            self.scalarizer(average)
            self.scalarizer.step()
        factors = differentiate(self.scalarizer, newer) * (has_both.sum() / len(self.weights))
        return torch.where(has_both, self.scale * factors, 1.0)

    def _state(self) -> dict[str, Any]:
        return {"windows": self.windows}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.windows.copy_(state["windows"])
        self.factors = self._current_factors()


class FastAdaptiveWeights(Scalarization):
    """Fast adaptive multitask optimization (Liu et al., NeurIPS 2023): TorchJD's ``FAMO``.

    The factor of an objective's loss L is c z / (L - b), with z the softmax of learned logits, b a lower bound of the
    loss (``min_losses``) and c such that the gradients are averaged. After a step the losses of its batches are
    computed once more. The logits then take a step of Adam, by which objectives whose logarithm decreased the least
    gain weight.

    An objective without labels, one whose loss is not above its bound, and every objective in a step that is skipped
    keeps its logit.
    """

    saved_name = "FAMO"
    measures_progress = True

    def _prepare(self) -> None:
        (self.logits,) = self.scalarizer.parameters()
        optimizer = MaskedAdamW([self.logits], lr=self.scalarizer.lr, weight_decay=0.0)
        self.optimizer = _MaskedAdam(self.logits, optimizer, self.scalarizer.weight_decay)
        self.scalarizer._optimizer = self.optimizer  # which the library would make at the first step
        self.progress = torch.zeros_like(self.fixed)

    def _factors(self, values: Tensor, is_present: Tensor) -> Tensor:
        factors = differentiate(self.scalarizer, torch.where(is_present, values, ABSENT))
        return torch.where(is_present, self.scale * factors, 1.0)

    def observe_progress(self, losses: Mapping[str, Tensor]) -> None:
        """Take in each objective's loss by the updated model, the mean over the step's batches."""
        self.progress = distributed.all_reduce_sum(self._stack(losses)) / distributed.world_size()

    def update(self, step: int, skip: Tensor) -> None:  # noqa: ARG002
        """Take a step on the logits."""
        bound = self.scalarizer.min_losses
        old, new = (self.fixed * losses - bound for losses in (self.means, self.progress))
        is_judged = (self.means != 0) & (old > 0) & (new > 0) & old.isfinite() & new.isfinite() & (skip == 0)
        old, new = (torch.where(is_judged, losses, 1.0) for losses in (old, new))
        weights = torch.softmax(self.logits.detach(), dim=0) * is_judged
        mean_progress = (weights * (old / new).log()).sum() / weights.sum()
        new = torch.where(is_judged, new, torch.exp(-mean_progress))  # neutral to the others' gradients
        self.optimizer.is_judged = is_judged
        self.scalarizer(old + bound)
        self.scalarizer.update(new + bound)

    def summary(self) -> dict[str, Tensor | float]:
        """Return the current factors and logits."""
        return super().summary() | {f"{name}/logit": s for name, s in zip(self.weights, self.logits.detach().unbind())}

    def _state(self) -> dict[str, Any]:
        return {"logits": self.logits.detach(), "optimizer": self.optimizer.optimizer.state_dict()}

    def _load(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        ScheduledOptimizer(self.optimizer.optimizer, lambda _: 1.0).load(state["optimizer"])


class _MaskedAdam:
    """Takes the steps of the Adam that FAMO makes for its logits, which counts and decays those without labels, too."""

    def __init__(self, logits: nn.Parameter, optimizer: MaskedAdamW, weight_decay: float):
        self.logits, self.optimizer, self.weight_decay = logits, optimizer, weight_decay
        self.is_judged = torch.ones_like(logits, dtype=torch.bool)

    def step(self) -> None:
        assert self.logits.grad is not None
        gradient = self.logits.grad + self.weight_decay * self.logits.detach()
        self.logits.grad = torch.where(self.is_judged, gradient, 0.0)
        self.optimizer.step()


def differentiate(scalarizer: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Return the derivative (K,) of a scalarizer at the losses ``values`` (K,)."""
    with torch.enable_grad():
        leaf = values.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(scalarizer(leaf), leaf)
    return gradient


def build_scalarization(
    weights: Mapping[str, float],
    device: torch.device,
    scalarizer: str,
    *,
    schedule: Schedule,
    options: Mapping[str, Any] | None = None,
    scale: float = 1.0,
    lr: float = 1e-3,
    every: int = 1,
    seed: int = 0,
) -> Balancer:
    """Build the balancer of a scalarizer of TorchJD.

    Args:
        weights: objective -> w, which multiplies its loss.
        device: of the losses.
        scalarizer: name of a class in ``torchjd.scalarization``.
        schedule: of ``lr``.
        options: of the scalarizer; a vector over objectives is a list in the order of ``weights``, or a mapping.
        scale: factor of the scalarizer.
        lr: learning rate of the scales of ``UW`` and ``IMTLL``.
        every: steps of a window of ``DWA``.
        seed: of the draws of ``Random``.

    Raises:
        ParameterError: the scalarizer or one of its options is refused, or how it keeps its state is not known.
    """
    arguments = (weights, device, scalarizer, options, scale)
    if scalarizer in LEARNED:
        return LearnedScales(*arguments, lr=lr, schedule=schedule)
    if scalarizer == "DWA":
        return DynamicWeightAveraging(*arguments, every=every)
    if scalarizer == "Random":
        return RandomWeights(*arguments, seed=seed)
    if scalarizer == "FAMO":
        return FastAdaptiveWeights(*arguments)
    if scalarizer == "GeometricMean":
        return GeometricMeanLoss(*arguments)
    balancer = Scalarization(*arguments)
    if any(True for _ in balancer.scalarizer.parameters()) or hasattr(balancer.scalarizer, "reset"):
        raise ParameterError("scalarizer", f"={scalarizer} keeps a state that checkpoints of mtcl do not hold")
    return balancer
