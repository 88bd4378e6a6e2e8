"""Draw a random positive and negative for each anchor, and compute the paper's triplet loss. Static shapes throughout.

Features z (R, B, K, D) are unit vectors of R comparisons in B groups (images) of K pixels. Distances are
d = 2 - 2 cos, so 0..4.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mtcl.distributed import all_reduce_sum, scale_for_ddp_mean
from mtcl.regularizers.pairs import Pairs


class CriterionOutput(NamedTuple):
    """Losses of a criterion, one per comparison."""

    losses: Tensor  # (R,): mean over a target's anchors; zero, but with a graph, where there is none
    has_anchor: Tensor  # bool (R,): whether the target has an anchor in any process
    stats: Tensor  # (R, B, 4), detached: number of anchors, of active ones, sum of d_ap, sum of d_an


class AnchorLosses(NamedTuple):
    """Loss and distances of each pixel as an anchor, (R, B, K)."""

    loss: Tensor
    active: Tensor  # bool
    d_ap: Tensor  # to its positives
    d_an: Tensor  # to its negatives
    anchor: Tensor  # bool: whether the pixel has both, and counts


def triplet(z: Tensor, pairs: Pairs, margin: float) -> CriterionOutput:
    """Compute max(0, margin + d_ap - d_an) with a random positive and a random negative of each anchor."""
    positive, has_positive = sample_related(pairs.positive)
    negative, has_negative = sample_related(pairs.negative)
    return triplet_hinge(z, positive, negative, has_positive & has_negative, margin)


def triplet_hinge(
    z: Tensor, positive: Tensor, negative: Tensor, anchor: Tensor, margin: float | Tensor
) -> CriterionOutput:
    """Compute the triplet loss of chosen positives and negatives.

    Args:
        z: unit vectors (R, B, K, D).
        positive: int64 (R, B, K), index of each anchor's positive in its group.
        negative: int64 (R, B, K), index of each anchor's negative in its group.
        anchor: bool (R, B, K), the pixels whose triplet counts.
        margin: scalar, or (R, B, K).
    """
    d_ap = 2 - 2 * (z * gather_rows(z, positive)).sum(dim=-1)
    d_an = 2 - 2 * (z * gather_rows(z, negative)).sum(dim=-1)
    loss = torch.relu(margin + d_ap - d_an)
    return mean_over_anchors(AnchorLosses(loss, loss > 0, d_ap, d_an, anchor))


def mean_over_anchors(anchors: AnchorLosses) -> CriterionOutput:
    """Average over the anchors of each target, which count the same in whichever image and process they lie."""
    loss, active, d_ap, d_an, anchor = anchors
    weight = anchor.to(loss)
    count = all_reduce_sum(weight.sum(dim=(1, 2)))  # of all processes, as in losses.masked.masked_mean
    losses = scale_for_ddp_mean((loss * weight).sum(dim=(1, 2)) / count.clamp(min=1))
    stats = torch.stack([torch.ones_like(loss), active.to(loss), d_ap, d_an], dim=-1).detach()
    return CriterionOutput(losses, count > 0, (stats * weight[..., None]).sum(dim=2))


def sample_related(relation: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one related pixel per row, uniformly.

    The choice is the first one after i in cyclic order: the pixels stand in random order, so this is uniform and needs
    no further draw.

    Args:
        relation: bool (..., K, K).

    Returns:
        the indices, int64 (..., K), and a mask of the rows that have any (other indices are undefined).
    """
    count = relation.shape[-1]
    index = torch.arange(count, device=relation.device)
    dtype = torch.int16 if count < 2**15 else torch.int32
    ahead = ((index[None, :] - index[:, None]) % count).to(dtype)  # (K, K): steps from i forward to j
    none = torch.full((), count, dtype=dtype, device=relation.device)
    nearest = torch.where(relation, ahead, none).amin(dim=-1)  # (..., K)
    return (index + nearest) % count, nearest < none


def gather_rows(z: Tensor, index: Tensor) -> Tensor:
    """Gather z (R, B, K, D) at ``index`` (R, B, K) of its third axis, in whole rows: (R, B, K, D)."""
    groups = torch.arange(z.shape[0] * z.shape[1], device=z.device).view(*z.shape[:2], 1)
    return z.flatten(0, 2).index_select(0, (groups * z.shape[2] + index).flatten()).view(*index.shape, z.shape[3])
