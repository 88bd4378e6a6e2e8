"""Tell which sampled pixels are positive or negative to each other, by discrete or continuous labels.

Every task embeds its labels in three dimensions so that Euclidean distance orders pairs as its label distance does
(``Task.embed_label``, ``Task.embedded_distance``). One batched distance then serves all sources of a step.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mtcl.errors import ParameterError
from mtcl.tasks.base import Task

EXACT = "donot_use_mm_for_euclid_dist"  # the faster mode cancels for labels close to each other


class PixelLabels(NamedTuple):
    """Labels at the K sampled pixels of each group (an image, or all images of a batch), for R comparisons."""

    source: Tensor  # int64 (R, B, 1 or K): the task whose labels these are
    pixels: Tensor  # float32 (R or 1, B, K, 2): row and column as fractions of the image
    pixel_id: Tensor  # int32 (R or 1, B, K): equal for a pixel that was sampled twice
    label: Tensor  # float32 (R, B, K, 3): embedded label of the source
    valid: Tensor  # bool (R, B, K): whether the source labels the pixel
    target_label: Tensor  # float32 (R, B, K, 3): embedded label of the target itself, NaN where void
    bins: Tensor | None = None  # int64 (R, B, K): class, range or direction of the source's label, if it is asked for


def find_labelled_groups(pixels: PixelLabels) -> Tensor | None:
    """Return which groups have a pixel with a label, bool (R, B), where the others can be left out; None: keep all.

    With partial labels most groups may have none, and a criterion over all pairs would compute nothing but zeros for
    them. Their number is known at once on a CPU alone: elsewhere the host would wait for it, and a compiled graph would
    have a shape that changes.
    """
    if pixels.valid.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    groups = pixels.valid.any(dim=-1)
    return None if groups.all() else groups


def take_groups(pixels: PixelLabels, groups: Tensor) -> PixelLabels:
    """Take the pixels of the N groups that ``groups`` (R, B) chooses, as N comparisons of one group: (N, 1, ...)."""
    fields = (None if x is None else x.expand(len(groups), *x.shape[1:])[groups][:, None] for x in pixels)
    return PixelLabels(*fields)  # type: ignore[arg-type]


class Pairs(NamedTuple):
    """Relations among the K pixels of each group: bool (R, B, K, K)."""

    positive: Tensor
    negative: Tensor


def make_pairs(pixels: PixelLabels, thresholds: Tensor) -> Pairs:
    """Relate pixels by their source labels: similar ones are positive pairs, dissimilar ones negative.

    Args:
        pixels: sampled pixels; a pixel that was sampled twice makes no pair with itself.
        thresholds: (S, 2), per source the largest distance of a positive and the least of a negative pair, embedded.
    """
    limit = thresholds[pixels.source]  # (R, B, 1 or K, 2)
    label = torch.where(pixels.valid[..., None], pixels.label, torch.nan)  # no comparison with NaN holds
    distance = pairwise_distances(label)
    different = pixels.pixel_id[..., :, None] != pixels.pixel_id[..., None, :]
    positive, negative = distance <= limit[..., 0, None], distance >= limit[..., 1, None]
    # A pixel that was sampled twice may have two labels where those of another image are used.
    return Pairs(positive & different, negative & different)


def pairwise_distances(label: Tensor) -> Tensor:
    """Compute Euclidean distances of embedded labels: (R, B, K, 3) -> (R, B, K, K)."""
    return torch.cdist(label, label, compute_mode=EXACT)


def choose_thresholds(
    tasks: Mapping[str, Task], overrides: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Return task -> (positive, negative) threshold, by default the task's own."""
    thresholds = {
        name: overrides.get(name) or (task.positive_threshold, task.negative_threshold) for name, task in tasks.items()
    }
    for name, (positive, negative) in thresholds.items():
        if not 0 <= positive < negative:
            raise ParameterError(f"thresholds.{name}", f"=[{positive}, {negative}] must be 0 <= positive < negative")
    return thresholds
