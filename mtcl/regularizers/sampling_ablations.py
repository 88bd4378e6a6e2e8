"""Ablations of which pixels are sampled and which of them make pairs; none of them is stated in the paper."""

from typing import NamedTuple

import torch
from torch import Tensor

from mtcl.regularizers.pairs import Pairs, PixelLabels, pairwise_distances


class PairOptions(NamedTuple):
    """Which pairs are compared, see :class:`~mtcl.regularizers.contrastive.Contrastive`."""

    window: float | None
    drop_conflicting_positives: bool
    drop_conflicting_negatives: bool
    across_images: bool


def filter_pairs(pairs: Pairs, pixels: PixelLabels, options: PairOptions, thresholds: Tensor) -> Pairs:
    """Keep the pairs that the options allow.

    Args:
        pairs: relations of a group's pixels.
        pixels: the pixels.
        options: which pairs are allowed.
        thresholds: see :func:`drop_conflicting`.
    """
    if options.across_images:
        pairs = keep_equal_sources(pairs, pixels)
    positives, negatives = options.drop_conflicting_positives, options.drop_conflicting_negatives
    if positives or negatives:
        pairs = drop_conflicting(pairs, pixels, thresholds, positives=positives, negatives=negatives)
    if options.window is not None:
        pairs = keep_within_window(pairs, pixels, options.window)
    return pairs


def keep_within_window(pairs: Pairs, pixels: PixelLabels, window: float) -> Pairs:
    """Keep pairs of pixels at most ``window`` (a fraction of the image's height and of its width) apart."""
    near = torch.cdist(pixels.pixels, pixels.pixels, p=torch.inf) <= window
    return Pairs(pairs.positive & near, pairs.negative & near)


def drop_conflicting(
    pairs: Pairs, pixels: PixelLabels, thresholds: Tensor, *, positives: bool, negatives: bool
) -> Pairs:
    """Drop pairs that the target's own labels contradict: positives they call different, negatives they call similar.

    A void label contradicts nothing.

    Args:
        pairs: relations of a group's pixels.
        pixels: the pixels.
        thresholds: (R, 2), positive and negative, embedded, of the targets' labels.
        positives: whether positives are dropped.
        negatives: whether negatives are dropped.
    """
    distance = pairwise_distances(pixels.target_label)  # NaN with a void label: no comparison holds
    similar, different = (limit[:, None, None, None] for limit in thresholds.unbind(dim=1))
    return Pairs(
        pairs.positive & ~(distance >= different) if positives else pairs.positive,
        pairs.negative & ~(distance <= similar) if negatives else pairs.negative,
    )


def keep_equal_sources(pairs: Pairs, pixels: PixelLabels) -> Pairs:
    """Keep pairs whose labels come from one task: with partial labels, images differ in their source."""
    comparable = pixels.source[..., :, None] == pixels.source[..., None, :]
    return Pairs(pairs.positive & comparable, pairs.negative & comparable)


def merge_groups(pixels: PixelLabels, num_pixels: int) -> PixelLabels:
    """Merge all images of a batch into one group, so that pairs may lie in different images.

    Args:
        pixels: one group per image.
        num_pixels: H * W of an image.
    """
    batch, count = pixels.valid.shape[1:]
    image = torch.arange(batch, device=pixels.valid.device, dtype=torch.int32)[:, None]
    return PixelLabels(
        source=merge_images(pixels.source.expand(-1, -1, count)),
        pixels=merge_images(pixels.pixels),
        pixel_id=merge_images(pixels.pixel_id + image * num_pixels),
        label=merge_images(pixels.label),
        valid=merge_images(pixels.valid),
        target_label=merge_images(pixels.target_label),
    )


def merge_images(x: Tensor) -> Tensor:
    """Merge the images of a batch into one group: (R, B, K, ...) -> (R, 1, B K, ...)."""
    return x.flatten(1, 2)[:, None]


def reorder_pixels(pixels: PixelLabels, order: Tensor) -> PixelLabels:
    """Put the N pixels of every group in another order.

    Random choices within a group follow the order of its pixels, which is random where they were drawn, but neither
    where classes are balanced, which puts repeated pixels side by side, nor where images were merged.

    Args:
        pixels: groups of N pixels.
        order: int64 (N,), the pixel that comes to each place.
    """
    fields = (None if x is None else x if x.shape[2] == 1 else x.index_select(2, order) for x in pixels)
    return PixelLabels(*fields)  # type: ignore[arg-type]


def balance_classes(pixels: PixelLabels, bins: Tensor, count: int) -> PixelLabels:
    """Choose ``count`` of the candidates so that each class (range of values) of the source has an equal part.

    Args:
        pixels: M candidates per image, in random order.
        bins: int64 (R, B, M), the class of each.
        count: K.
    """
    return take_pixels(pixels, balanced_sample(bins, pixels.valid, count))


def take_pixels(pixels: PixelLabels, index: Tensor) -> PixelLabels:
    """Take the candidates ``index``, int64 (R, B, K): each comparison has pixels of its own."""
    return PixelLabels(
        source=pixels.source,
        pixels=torch.take_along_dim(pixels.pixels, index[..., None], dim=2),
        pixel_id=torch.take_along_dim(pixels.pixel_id, index, dim=2),
        label=torch.take_along_dim(pixels.label, index[..., None], dim=2),
        valid=pixels.valid.gather(2, index),
        target_label=torch.take_along_dim(pixels.target_label, index[..., None], dim=2),
        bins=None if pixels.bins is None else pixels.bins.gather(2, index),
    )


def balanced_sample(bins: Tensor, valid: Tensor, count: int, num_bins: int = 256) -> Tensor:
    """Sample candidates so that each bin (class, range of values) that is present has an equal share.

    Invalid candidates are taken only where there is no valid one. A bin with few candidates has them repeated.

    Args:
        bins: int64 (..., M) in 0..num_bins - 1, in the candidates' (random) order.
        valid: bool (..., M).
        count: number of samples.
        num_bins: number of bins.

    Returns:
        indices into the candidates in ascending order, int64 (..., count).
    """
    weight = valid.float()
    counts = weight.new_zeros(*weight.shape[:-1], num_bins).scatter_add_(-1, bins, weight)
    weight = weight / counts.gather(-1, bins).clamp(min=1)
    weight = torch.where(valid.any(dim=-1, keepdim=True), weight, 1.0)
    cumulative = weight.cumsum(dim=-1)
    ticks = (torch.arange(count, device=weight.device) + 0.5) / count  # systematic: no further draw
    index = torch.searchsorted(cumulative, (ticks * cumulative[..., -1:]).contiguous())
    return index.clamp(max=bins.shape[-1] - 1)
