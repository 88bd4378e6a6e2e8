"""What the losses share: the mean over valid pixels, and the cross-entropy of every pixel."""

import torch
from torch import Tensor

from mtcl import distributed

VOID = 255  # of class and edge labels


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``values`` where ``valid`` (bool, same shape); 0 with the graph kept where nothing is.

    The only place where losses count pixels. In a run of several processes the pixels are those of all, and a process
    gives its part of their mean, times the number of processes: the mean over processes, which DDP takes of gradients,
    is then that of one process with the whole batch.
    """
    count = distributed.all_reduce_sum(valid.sum())
    return distributed.scale_for_ddp_mean(torch.where(valid, values, 0.0).sum() / count.clamp(min=1))


def masked_fraction(chosen: Tensor, valid: Tensor) -> Tensor:
    """The part of the ``valid`` pixels, of all processes, that is ``chosen`` (both bool, same shape); no gradient."""
    counts = distributed.all_reduce_sum(torch.stack([(chosen & valid).sum(), valid.sum()]))
    return counts[0].float() / counts[1].clamp(min=1)


def pixel_cross_entropy(prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(prediction)[label] in fp32, and which pixels are valid, both (B, H, W).

    prediction: logits (B, C, H, W); label: int64 (B, H, W). The first result is to be masked by the second:
    at void pixels it is that of class 0.
    """
    valid = label != VOID
    target = torch.where(valid, label, 0)
    # Not F.nll_loss: on maps it has no deterministic CUDA implementation.
    log_probability = torch.log_softmax(prediction.float(), dim=1).gather(1, target.unsqueeze(1)).squeeze(1)
    return -log_probability, valid
