"""Masked means over all processes, and the cross-entropy of every pixel."""

import torch
from torch import Tensor

from mtcl import distributed

VOID = 255  # of class and edge labels


def masked_mean(values: Tensor, valid: Tensor, image_weight: Tensor | None = None) -> Tensor:
    """Compute the mean of ``values`` where ``valid``; 0, with the graph kept, where nothing is.

    The only place where losses count pixels. In a run of several processes the mean is over the
    pixels of all: each process returns its share of it times the world size, so that DDP's mean of the
    gradients equals the gradient of one process with the whole batch.

    Args:
        values: any shape; (B, ...) with ``image_weight``.
        valid: bool, same shape.
        image_weight: (B,), relative to all images of all processes; then the result is the weighted sum of each
            image's mean over its valid pixels, instead of the mean over the pixels of all images.

    Returns:
        Scalar.
    """
    if image_weight is not None:
        sums = torch.where(valid, values, 0.0).flatten(1).sum(dim=1)
        means = sums / valid.flatten(1).sum(dim=1).clamp(min=1)
        return distributed.scale_for_ddp_mean((image_weight * means).sum())
    count = distributed.all_reduce_sum(valid.sum())
    return distributed.scale_for_ddp_mean(torch.where(valid, values, 0.0).sum() / count.clamp(min=1))


def masked_fraction(mask: Tensor, valid: Tensor) -> Tensor:
    """Compute the fraction of the ``valid`` pixels, of all processes, where ``mask`` is true.

    Args:
        mask: bool, any shape.
        valid: bool, same shape.

    Returns:
        Scalar in 0..1, without gradient.
    """
    counts = distributed.all_reduce_sum(torch.stack([(mask & valid).sum(), valid.sum()]))
    return counts[0].float() / counts[1].clamp(min=1)


def pixel_cross_entropy(prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Compute -log softmax(prediction)[label] of every pixel in fp32.

    Args:
        prediction: logits (B, C, H, W).
        label: int64 (B, H, W), 255 where void.

    Returns:
        The cross-entropy (B, H, W), at void pixels that of class 0, and the bool mask (B, H, W) of
        valid pixels to apply to it.
    """
    valid = label != VOID
    target = torch.where(valid, label, 0)
    # Not F.nll_loss: on maps it has no deterministic CUDA implementation.
    log_probability = torch.log_softmax(prediction.float(), dim=1).gather(1, target.unsqueeze(1)).squeeze(1)
    return -log_probability, valid
