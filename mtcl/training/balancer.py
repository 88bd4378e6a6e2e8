"""From one loss per objective to gradients."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor, nn


class Balancer(Protocol):
    def backward(self, losses: Mapping[str, Tensor], shared: Iterable[nn.Parameter]) -> None:
        """Fill ``.grad`` from scalar losses by objective; ``shared`` is what several objectives pull at."""
        ...


class FixedWeights:
    """The field's way: one backward pass through the sum of fixed multiples. An objective without a weight counts
    once."""

    def __init__(self, weights: Mapping[str, float]):
        self.weights = dict(weights)

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        return sum((self.weights.get(name, 1.0) * loss for name, loss in losses.items()), start=_zero(losses))

    def backward(self, losses: Mapping[str, Tensor], shared: Iterable[nn.Parameter]) -> None:
        self.total(losses).backward()


def _zero(losses: Mapping[str, Tensor]) -> Tensor:
    return next(iter(losses.values())).new_zeros(())
