"""Which sampled pixels are alike, and which differ, under a task's labels: one rule for discrete and continuous ones.

Every task places its labels in a space of three dimensions in which Euclidean distance orders pairs as its label
distance does (``Task.place``, ``Task.span``). So one batched distance serves all sources of a step.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mtcl.regularizers.sampling import Size, pixel_index

EXACT = "donot_use_mm_for_euclid_dist"  # the faster mode cancels for labels close to each other


class Pairs(NamedTuple):
    """Relations among the K pixels of each group (an image, or all images of a batch): bool (T, B, K, K)."""

    positive: Tensor
    negative: Tensor


def pairwise_distances(place: Tensor) -> Tensor:
    """Placed labels (T, B, K, 3) -> their distances (T, B, K, K)."""
    return torch.cdist(place, place, compute_mode=EXACT)


def make_pairs(place: Tensor, valid: Tensor, near: Tensor, far: Tensor) -> Pairs:
    """Positive up to ``near`` and negative from ``far`` on, both (T, B, K or 1), where both pixels are ``valid`` (T, B,
    K)."""
    apart = pairwise_distances(torch.where(valid[..., None], place, torch.nan))  # no comparison with NaN holds
    return Pairs(apart <= near[..., None], apart >= far[..., None])


def flat_index(pixels: Tensor, size: Size) -> Tensor:
    """Which pixel of a map of ``size`` each sampled one (..., K, 2) is: int32 (..., K)."""
    row, column = pixel_index(pixels, size)
    return (row * size[1] + column).int()


def is_other_pixel(pixels: Tensor, size: Size) -> Tensor:
    """Whether two sampled pixels (..., K, 2) are different pixels of a map of ``size``: bool (..., K, K). A position
    that was sampled twice is no pair with itself."""
    number = flat_index(pixels, size)
    return number[..., :, None] != number[..., None, :]


def within_window(pixels: Tensor, window: float) -> Tensor:
    """Whether two sampled pixels lie at most ``window`` (a part of the picture's height and of its width) apart."""
    return torch.cdist(pixels, pixels, p=torch.inf) <= window
