"""Criteria other than the paper's triplet loss, for ablations.

Shapes and distances are those of :mod:`mtcl.regularizers.triplet`.
"""

import torch
from torch import Tensor

from mtcl.errors import ParameterError
from mtcl.regularizers.pairs import Pairs, PixelLabels
from mtcl.regularizers.triplet import (
    AnchorLosses,
    CriterionOutput,
    gather_rows,
    sample_related,
    triplet_hinge,
)

CRITERIA = ("triplet", "semihard", "ranked", "infonce", "boundary", "prototypes")
PAIR_OPTIONS = ("window", "drop_conflicting_positives", "drop_conflicting_negatives", "across_images")
REFUSALS = {  # criterion -> what it compares, and the options that it cannot have
    "ranked": ("any three pixels of an image", PAIR_OPTIONS),
    "boundary": ("all pairs of a patch with its centre", (*PAIR_OPTIONS, "class_balanced", "mispredicted_fraction")),
    "prototypes": ("each pixel by itself", PAIR_OPTIONS),
}
MIN_TEMPERATURE = 0.025  # of infonce: exp(-2 / temperature), of opposite vectors, is 0 in fp32 below 0.023
RANKED_MAX_FACTOR = 5.0  # of the negative threshold: "ranked" clips label distances there


def check_criterion(criterion: str, temperature: float, **options: bool | float | None) -> None:
    """Refuse an unknown criterion, and options of :class:`~mtcl.regularizers.contrastive.Contrastive` it can't have.

    Args:
        criterion: one of :data:`CRITERIA`.
        temperature: of ``infonce``, at least :data:`MIN_TEMPERATURE`.
        **options: those of :data:`REFUSALS`, None or False where they are off.
    """
    if criterion not in CRITERIA:
        raise ParameterError("criterion", f"={criterion} is not known; choose {', '.join(CRITERIA)}")
    compared, refused = REFUSALS.get(criterion, ("", ()))
    if any(options[name] is not None and options[name] is not False for name in refused):
        raise ParameterError("criterion", f"={criterion} takes {compared}; leave out {', '.join(refused)}")
    if criterion == "infonce" and temperature < MIN_TEMPERATURE:
        problem = f"={temperature} underflows in float32 with criterion=infonce; give {MIN_TEMPERATURE} or more"
        raise ParameterError("temperature", problem)


def semihard(z: Tensor, pairs: Pairs, margin: float) -> CriterionOutput:
    """Compute the triplet loss with the nearest negative beyond a random positive.

    FaceNet, Schroff et al. 2015. Where all negatives are nearer than the positive, the farthest is taken.
    """
    positive, has_positive = sample_related(pairs.positive)
    with torch.no_grad():
        distance = 2 - 2 * z @ z.transpose(-1, -2)  # (R, B, K, K)
        beyond = pairs.negative & (distance > distance.gather(-1, positive[..., None]))
        nearest = torch.where(beyond, distance, torch.inf).argmin(dim=-1)
        farthest = torch.where(pairs.negative, distance, -torch.inf).argmax(dim=-1)
        negative = torch.where(beyond.any(dim=-1), nearest, farthest)
        has_negative = pairs.negative.any(dim=-1)
    return triplet_hinge(z, positive, negative, has_positive & has_negative, margin)


def ranked_max_distance(positive_threshold: float, negative_threshold: float) -> float:
    """Return the label distance at which :func:`ranked_triplet` clips; labels with one threshold need no scale."""
    return negative_threshold if positive_threshold == 0 else RANKED_MAX_FACTOR * negative_threshold


def ranked_triplet(z: Tensor, pixels: PixelLabels, max_distance: Tensor, margin: float) -> CriterionOutput:
    """Compute the triplet loss of any three pixels, with a margin that grows with the difference of label distances.

    Of two other pixels, the one whose label is nearer is the positive. The margin is up to ``margin``, reached at
    ``max_distance`` (R, B). No pair needs a threshold; labels that are equal or different give the plain triplet loss.
    No pixel is compared with itself.
    """
    label, valid, pixel_id = pixels.label, pixels.valid, pixels.pixel_id
    with torch.no_grad():
        order = torch.arange(z.shape[2], device=z.device)
        first, second = (order.roll(-shift).expand(z.shape[:3]) for shift in (1, 2))
        top = max_distance[..., None]
        to_first, to_second = ((label - gather_rows(label, j)).norm(dim=-1).minimum(top) / top for j in (first, second))
        swap = to_first > to_second
        positive, negative = torch.where(swap, second, first), torch.where(swap, first, second)
        growth = (to_second - to_first).abs()
        anchor = valid & valid.gather(-1, first) & valid.gather(-1, second) & (growth > 0)
        anchor &= (pixel_id != pixel_id.roll(-1, dims=-1)) & (pixel_id != pixel_id.roll(-2, dims=-1))
        growth = torch.where(anchor, growth, 0.0)  # the embedding of an invalid label may be NaN
    return triplet_hinge(z, positive, negative, anchor, margin * growth)


def infonce(z: Tensor, pairs: Pairs, temperature: float) -> AnchorLosses:
    """Compute -log of each positive's share against all negatives, averaged over an anchor's positives.

    Khosla et al., "Supervised contrastive learning", 2020, L_out, without the other positives in the denominator. An
    anchor counts as active while its loss is above 0.1.
    """
    cosine = z @ z.transpose(-1, -2)  # (R, B, K, K)
    positive, negative = pairs.positive.to(z), pairs.negative.to(z)
    num_positives, num_negatives = positive.sum(dim=-1), negative.sum(dim=-1)
    # exp(cos / temperature) and a single logarithm, of a cosine less its largest value 1, so that neither overflows;
    # from MIN_TEMPERATURE on it does not underflow either
    scaled = (cosine - 1) / temperature
    similarity = scaled.exp()
    of_negatives = (similarity * negative).sum(dim=-1, keepdim=True) + torch.finfo(z.dtype).tiny
    losses = (similarity + of_negatives).log() - scaled
    loss = (losses * positive).sum(dim=-1) / num_positives.clamp(min=1)
    with torch.no_grad():
        d_ap = 2 - 2 * torch.linalg.vecdot(cosine, positive) / num_positives.clamp(min=1)
        d_an = 2 - 2 * torch.linalg.vecdot(cosine, negative) / num_negatives.clamp(min=1)
    return AnchorLosses(loss, loss > 0.1, d_ap, d_an, (num_positives > 0) & (num_negatives > 0))
