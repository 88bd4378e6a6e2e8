"""From projected pixels and their relations to one loss per target. Static shapes throughout.

All take unit vectors z (T, B, K, D) of T targets in B groups of K pixels and give a :class:`CriterionOutput`; distances are
d = 2 - 2 cos, so 0..4.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtcl import distributed
from mtcl.regularizers.pairs import Pairs


class CriterionOutput(NamedTuple):
    losses: Tensor  # (T,): mean over a target's anchors; zero, with its graph, where there is none
    has_anchor: Tensor  # bool (T,): does the target have an anchor, in any process?
    stats: Tensor  # (T, B, 4), detached: number of anchors, of active ones, sum of d_ap, sum of d_an


def triplet(z: Tensor, pairs: Pairs, margin: float) -> CriterionOutput:
    """max(0, margin + d_ap - d_an) with a random positive and a random negative of each anchor."""
    p, has_positive = sample_related(pairs.positive)
    n, has_negative = sample_related(pairs.negative)
    return triplet_hinge(z, p, n, has_positive & has_negative, margin)


def semihard(z: Tensor, pairs: Pairs, margin: float) -> CriterionOutput:
    """As :func:`triplet`, with the nearest negative beyond the positive (FaceNet, Schroff et al. 2015); the
    farthest where all are nearer."""
    p, has_positive = sample_related(pairs.positive)
    with torch.no_grad():
        apart = 2 - 2 * z @ z.transpose(-1, -2)  # (T, B, K, K)
        outside = pairs.negative & (apart > apart.gather(-1, p[..., None]))
        nearest = torch.where(outside, apart, torch.inf).argmin(dim=-1)
        farthest = torch.where(pairs.negative, apart, -torch.inf).argmax(dim=-1)
        n = torch.where(outside.any(dim=-1), nearest, farthest)
        has_negative = pairs.negative.any(dim=-1)
    return triplet_hinge(z, p, n, has_positive & has_negative, margin)


def ranked_triplet(
    z: Tensor, number: Tensor, place: Tensor, valid: Tensor, top: Tensor, margin: float
) -> CriterionOutput:
    """Triplets of any three pixels: of two others, the one whose label is nearer is the positive; the margin grows with
    the difference of the label distances, up to ``margin`` at ``top`` (T, B).

    No pair needs a threshold; labels that are equal or different give the plain triplet loss. ``number`` (T or 1, B, K)
    is that of each pixel: none is compared with itself.
    """
    with torch.no_grad():
        order = torch.arange(z.shape[2], device=z.device)
        first, second = (order.roll(-shift).expand(z.shape[:3]) for shift in (1, 2))
        top = top[..., None]
        to_first, to_second = ((place - gather_rows(place, j)).norm(dim=-1).minimum(top) / top for j in (first, second))
        swap = to_first > to_second
        p, n = torch.where(swap, second, first), torch.where(swap, first, second)
        growth = (to_second - to_first).abs()
        anchor = valid & valid.gather(-1, first) & valid.gather(-1, second) & (growth > 0)
        anchor &= (number != number.roll(-1, dims=-1)) & (number != number.roll(-2, dims=-1))
        growth = torch.where(anchor, growth, 0.0)  # what stands for an invalid label may be NaN
    return triplet_hinge(z, p, n, anchor, margin * growth)


def infonce(z: Tensor, pairs: Pairs, temperature: float) -> CriterionOutput:
    """-log of each positive's share against all negatives, averaged over an anchor's positives (Khosla et al.,
    "Supervised contrastive learning", 2020, L_out, with the other positives left out of the denominator)."""
    cosine = z @ z.transpose(-1, -2)  # (T, B, K, K)
    similarity = cosine / temperature
    rest = torch.where(pairs.negative, similarity, -torch.inf)
    has = pairs.negative.any(dim=-1, keepdim=True)
    rest = torch.where(has, rest, 0.0).logsumexp(dim=-1, keepdim=True)  # without negatives: any finite number
    positives = pairs.positive.to(z)
    each = (F.softplus(rest - similarity) * positives).sum(dim=-1) / positives.sum(dim=-1).clamp(min=1)
    anchor = pairs.positive.any(dim=-1) & has[..., 0]
    with torch.no_grad():
        d = 2 - 2 * cosine
        negatives = pairs.negative.to(z)
        d_ap = (d * positives).sum(dim=-1) / positives.sum(dim=-1).clamp(min=1)
        d_an = (d * negatives).sum(dim=-1) / negatives.sum(dim=-1).clamp(min=1)
    return mean_over_anchors(each, each > 0.1, d_ap, d_an, anchor)


def triplet_hinge(z: Tensor, p: Tensor, n: Tensor, anchor: Tensor, margin: float | Tensor) -> CriterionOutput:
    """The triplet loss of chosen positives and negatives (T, B, K) where ``anchor``."""
    d_ap = 2 - 2 * (z * gather_rows(z, p)).sum(dim=-1)
    d_an = 2 - 2 * (z * gather_rows(z, n)).sum(dim=-1)
    each = torch.relu(margin + d_ap - d_an)
    return mean_over_anchors(each, each > 0, d_ap, d_an, anchor)


def mean_over_anchors(each: Tensor, active: Tensor, d_ap: Tensor, d_an: Tensor, anchor: Tensor) -> CriterionOutput:
    """Every anchor of a target counts the same, in whichever image it lies."""
    weight = anchor.to(each)
    count = distributed.all_reduce_sum(weight.sum(dim=(1, 2)))  # of all processes, as in losses.pixels.masked_mean
    losses = distributed.scale_for_ddp_mean((each * weight).sum(dim=(1, 2)) / count.clamp(min=1))
    stats = torch.stack([torch.ones_like(each), active.to(each), d_ap, d_an], dim=-1).detach()
    return CriterionOutput(losses, count > 0, (stats * weight[..., None]).sum(dim=2))


def sample_related(relation: Tensor) -> tuple[Tensor, Tensor]:
    """For each pixel one of those it is related to, at random: bool (..., K, K) -> int64 (..., K), and whether it has
    any (else the index means nothing).

    The choice is the first one after i in cyclic order: the sampled pixels stand in random order already, so this is
    uniform and needs no further draw.
    """
    count = relation.shape[-1]
    place = torch.arange(count, device=relation.device)
    ahead = ((place[None, :] - place[:, None]) % count).short()  # (K, K): steps from i forward to j
    none = torch.full((), count, dtype=torch.short, device=relation.device)
    nearest = torch.where(relation, ahead, none).amin(dim=-1)  # (..., K)
    return (place + nearest) % count, nearest < none


def gather_rows(z: Tensor, index: Tensor) -> Tensor:
    """z (T, B, K, D) at ``index`` (T, B, K) of its third axis, read in whole rows: (T, B, K, D)."""
    groups = torch.arange(z.shape[0] * z.shape[1], device=z.device).view(*z.shape[:2], 1)
    return z.flatten(0, 2).index_select(0, (groups * z.shape[2] + index).flatten()).view(*index.shape, z.shape[3])
