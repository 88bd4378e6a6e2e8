"""Feature-wise contrastive consistency (Fig. 1 of "Contrastive Multi-Task Dense Prediction").

Are the features of an image's pixels that some labels call similar nearer to each other than of those they call
different? All pairs of an anchor take part, no triplet is drawn, and every anchor counts the same: each number here is
the expectation over the triplets that the regularizer draws among the same pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BINS = 4096  # of a histogram, over the distances 0..4


class PairStatistics(NamedTuple):
    """Sums over anchors (pixels with a positive and a negative pair); ``+`` adds those of further images."""

    anchors: Tensor  # int64, number of anchors
    positives: Tensor  # int64, number of their pairs
    negatives: Tensor
    auc: Tensor  # float64, sums over anchors
    d_ap: Tensor
    d_an: Tensor
    histogram_ap: Tensor  # float64 (BINS,): each anchor's weight of 1, spread evenly over its pairs
    histogram_an: Tensor

    def __add__(self, other: "PairStatistics") -> "PairStatistics":  # type: ignore[override]
        return PairStatistics(*(a + b for a, b in zip(self, other)))


def squared_distances(features: Tensor) -> Tensor:
    """Compute 2 - 2 cos of all pairs of an image's vectors: (B, K, C) -> float64 (B, K, K), 0..4.

    A zero vector has cosine 0 with all.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    distance = 2 - 2 * unit @ unit.transpose(1, 2)
    return distance.clamp(0, 4).round(decimals=9)  # so that equal features tie, whatever the rounding


def label_pairs(
    distance: Tensor, valid: Tensor, positive_threshold: float, negative_threshold: float
) -> tuple[Tensor, Tensor]:
    """Make positive and negative pairs as the regularizer defines them; no pixel is a pair with itself.

    Args:
        distance: label distances (B, K, K).
        valid: bool (B, K).
        positive_threshold: largest distance of a positive pair.
        negative_threshold: least distance of a negative pair.

    Returns:
        two relations, bool (B, K, K).
    """
    both = valid[:, :, None] & valid[:, None, :]
    same = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    return both & (distance <= positive_threshold) & ~same, both & (distance >= negative_threshold)


def anchor_auc(distance: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Compute each anchor's probability that a random negative is farther than a random positive; ties count half.

    This is the Mann-Whitney statistic, exact, with ranks by binary search: (B, K, K) each -> float64 (B, K), NaN where
    there is no positive or no negative.
    """
    positives = distance.masked_fill(~positive, torch.inf).sort(dim=-1).values
    nearer = torch.searchsorted(positives, distance)  # of the anchor's positives, for each of its pixels
    not_farther = torch.searchsorted(positives, distance, right=True)
    won = ((nearer + not_farther) * negative).sum(dim=-1).double() / 2
    return won / (positive.sum(dim=-1) * negative.sum(dim=-1))


def compute_pair_statistics(distance: Tensor, positive: Tensor, negative: Tensor) -> PairStatistics:
    """Sum over some images' anchors: feature distances 0..4 and relations, (B, K, K) each."""
    num_p, num_n = positive.sum(dim=-1), negative.sum(dim=-1)  # (B, K)
    anchor = (num_p > 0) & (num_n > 0)
    share_p = positive * (anchor / num_p.clamp(min=1).double())[..., None]  # rows sum to 1
    share_n = negative * (anchor / num_n.clamp(min=1).double())[..., None]
    bins = (distance * (BINS / 4)).long().clamp(max=BINS - 1).flatten()
    return PairStatistics(
        anchor.sum(),
        num_p[anchor].sum(),
        num_n[anchor].sum(),
        anchor_auc(distance, positive, negative)[anchor].sum(),
        (share_p * distance).sum(),
        (share_n * distance).sum(),
        torch.bincount(bins, share_p.flatten(), BINS),
        torch.bincount(bins, share_n.flatten(), BINS),
    )


def summarize_pairs(statistics: PairStatistics) -> dict[str, float | int]:
    """Return means over anchors, NaN without any, and the counts they are based on.

    ``auc`` is in 0..1 (0.5: no separation), ``gap`` the difference of ``d_an`` and ``d_ap``.
    """
    anchors = int(statistics.anchors)
    auc, d_ap, d_an = (
        float(value) / anchors if anchors else torch.nan for value in (statistics.auc, statistics.d_ap, statistics.d_an)
    )
    return {
        "auc": auc,
        "gap": d_an - d_ap,
        "d_ap": d_ap,
        "d_an": d_an,
        "anchors": anchors,
        "positives": int(statistics.positives),
        "negatives": int(statistics.negatives),
    }


class Histograms(NamedTuple):
    """Distances of positive and negative pairs, with bins of one width."""

    width: float  # of a bin; the first begins at 0
    ap: list[list[float]]  # for each statistics the fractions of its triplets; those beyond the last bin are
    an: list[list[float]]  # missing from the sum


def build_histograms(statistics: list[PairStatistics], max_bins: int = 64, coverage: float = 0.995) -> Histograms:
    """Build histograms to be compared side by side.

    Args:
        statistics: one per histogram.
        max_bins: number of bins.
        coverage: fraction of each statistics' distances that the bins must hold; they are as narrow as it allows.
    """
    weights = [h for t in statistics for h in (t.histogram_ap, t.histogram_an) if h.sum() > 0]
    last = max((int((h.cumsum(0) < coverage * h.sum()).sum()) for h in weights), default=0)
    merged_bins = last // max_bins + 1  # fine bins per bin
    length = merged_bins * max_bins

    def fractions(histogram: Tensor) -> list[float]:
        padded = torch.cat([histogram, histogram.new_zeros(length)])[:length]
        parts = padded / histogram.sum().clamp(min=1e-12)
        return [round(value, 6) for value in parts.reshape(max_bins, merged_bins).sum(dim=1).tolist()]

    return Histograms(
        merged_bins * 4 / BINS,
        [fractions(t.histogram_ap) for t in statistics],
        [fractions(t.histogram_an) for t in statistics],
    )
