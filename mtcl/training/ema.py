"""An exponential moving average of a model's weights."""

from typing import cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mtcl.models import DenseModel


class ModelEma(ModelEmaV3):
    """Averages a model's parameters: decay * average + (1 - decay) * current, at each update.

    The copy, the decay and its warm-up are those of timm's ``ModelEmaV3``. The update differs from timm's in cost, not
    in the parameters that it gives (``tests/training/test_ema.py``): timm's goes over frozen parameters, too, and
    copies every buffer at each update, one operation per buffer; here buffers wait for :meth:`copy_buffers`.

    Args:
        model: its weights are where the average starts.
        decay: 0 to below 1. The first update takes the model's weights as they are.
        use_warmup: the decay of update n is at most 1 - n^(-2/3), as in ``timm``, so that a short training does not
            average over its first weights.

    Attributes:
        updates: the number of updates.
    """

    def __init__(self, model: DenseModel, decay: float, use_warmup: bool = False):
        super().__init__(model, decay, use_warmup=use_warmup, exclude_buffers=True)
        self.requires_grad_(False)
        self.updates = 0

    @property
    def model(self) -> DenseModel:
        """The model with the averaged weights."""
        return cast(DenseModel, self.module)

    def start_from(self, model: DenseModel) -> None:
        """Start the average, before any update, from a model's weights, which DDP makes those of process 0."""
        self.set(model)

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Take in the current weights.

        Args:
            model: the model that is trained.
            step: the number of this update, 1 for the first; None: the one after the last.
        """
        self.updates = self.updates + 1 if step is None else step
        super().update(model, self.updates)

    def apply_update_no_buffers_(self, model: nn.Module, decay: float) -> None:
        """Average the parameters that are trained, on the first update all, in one operation; see :meth:`update`."""
        pairs = list(zip(self.module.parameters(), model.parameters(), strict=True))
        pairs = [(average, current) for average, current in pairs if self.updates == 1 or current.requires_grad]
        if pairs:
            averages, currents = ([_local_part(parameter) for parameter in column] for column in zip(*pairs))
            torch._foreach_lerp_(averages, currents, 1 - decay)

    @torch.no_grad()
    def copy_buffers(self, model: DenseModel) -> None:
        """Copy the running statistics, which are not averaged; call it before the average is used or saved."""
        for own_buffer, buffer in zip(self.module.buffers(), model.buffers()):
            own_buffer.copy_(buffer)


def _local_part(parameter: Tensor) -> Tensor:
    """Return a parameter, or where it is sharded this process's part."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
