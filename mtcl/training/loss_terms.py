"""Named loss terms that can be added and scaled, and stay apart for the balancer."""

from collections.abc import Mapping

from torch import Tensor


class LossTerms(dict[str, Tensor]):
    """Scalar losses by name, written as the sum that they make.

    A balancer may weight each term, or aggregate their gradients; so ``a + b`` keeps the terms of both.

    >>> import torch
    >>> task_loss, regularizer_loss = LossTerms(depth=torch.tensor(2.0)), LossTerms(regularizer=torch.tensor(3.0))
    >>> task_loss + 0.5 * regularizer_loss
    {'depth': tensor(2.), 'regularizer': tensor(1.5000)}
    """

    def __add__(self, other: Mapping[str, Tensor]) -> "LossTerms":
        """Return the terms of both; a name must be in one of them only."""
        if shared := self.keys() & other.keys():
            raise ValueError(f"two loss terms are named {shared.pop()}")
        return LossTerms({**self, **other})

    def __rmul__(self, factor: float) -> "LossTerms":
        """Return the terms, each times ``factor``."""
        return LossTerms({name: factor * loss for name, loss in self.items()})

    def __truediv__(self, count: int) -> "LossTerms":
        """Return the terms, each divided by ``count``."""
        return LossTerms({name: loss / count for name, loss in self.items()})
