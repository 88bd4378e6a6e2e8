"""A running mean of a model's weights."""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mtcl.models import DenseModel


class ModelEma:
    """``model``: a copy whose parameters become decay * old + (1 - decay) * now at each :meth:`update`.

    (torch's AveragedModel makes the host wait for the device at every update, and copies buffers one by one.)
    """

    def __init__(self, model: DenseModel, decay: float):
        self.model, self.decay, self.updates = copy.deepcopy(model), decay, 0
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: DenseModel) -> None:
        mean, now = _here(self.model), _here(model)
        if self.updates:
            torch._foreach_lerp_(mean, now, 1 - self.decay)
        else:
            torch._foreach_copy_(mean, now)
        self.updates += 1

    @torch.no_grad()
    def copy_buffers(self, model: DenseModel) -> None:
        """Running statistics are the model's own: to be called before the mean is used or saved."""
        for mine, its in zip(self.model.buffers(), model.buffers()):
            mine.copy_(its)


def _here(model: nn.Module) -> list[Tensor]:
    """The weights, or where they are shared out this process's part of each."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
