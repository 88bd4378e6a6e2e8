"""An exponential moving average of a model's weights."""

import copy
from itertools import compress

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mtcl.models import DenseModel


class ModelEma:
    """Keeps a copy of a model whose parameters are averaged: decay * average + (1 - decay) * current, at each update.

    (torch's AveragedModel makes the host wait for the device at every update, and copies buffers one by one.)

    Args:
        model: its weights are where the average starts.
        decay: 0 to 1.
    """

    def __init__(self, model: DenseModel, decay: float):
        self.model, self.decay, self.updates = copy.deepcopy(model), decay, 0
        self.model.requires_grad_(False)

    @torch.no_grad()
    def start_from(self, model: DenseModel) -> None:
        """Start the average, before any update, from a model's weights, which DDP makes those of process 0."""
        torch._foreach_copy_(_local_parameters(self.model), _local_parameters(model))

    @torch.no_grad()
    def update(self, model: DenseModel) -> None:
        """Take in the current weights; the first update replaces the average, later ones pass over frozen ones."""
        average, current = _local_parameters(self.model), _local_parameters(model)
        if self.updates:
            is_trained = [parameter.requires_grad for parameter in model.parameters()]
            average, current = list(compress(average, is_trained)), list(compress(current, is_trained))
            torch._foreach_lerp_(average, current, 1 - self.decay)
        else:
            torch._foreach_copy_(average, current)
        self.updates += 1

    @torch.no_grad()
    def copy_buffers(self, model: DenseModel) -> None:
        """Copy the running statistics, which are not averaged; call it before the average is used or saved."""
        for own_buffer, buffer in zip(self.model.buffers(), model.buffers()):
            own_buffer.copy_(buffer)


def _local_parameters(model: nn.Module) -> list[Tensor]:
    """Return the parameters, or where they are sharded this process's part of each."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
