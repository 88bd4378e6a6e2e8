"""Feature-wise contrastive consistency, measured: are a picture's pixels that some labels call alike nearer to each
other, as features, than those they call different? (Fig. 1 of "Contrastive Multi-Task Dense Prediction".)

All pairs of an anchor take part, no triplet is drawn, and every anchor counts the same: each number here is the
expectation over the triplets that the regulariser draws among the same pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BINS = 4096  # of a histogram, over the distances 0..4


class PairStatistics(NamedTuple):
    """Sums over anchors, which are pixels with a positive and a negative; tallies of other pictures are added."""

    anchors: Tensor  # int64, their number
    positives: Tensor  # int64, their pairs
    negatives: Tensor
    auc: Tensor  # float64, sums over anchors
    d_ap: Tensor
    d_an: Tensor
    histogram_ap: Tensor  # float64 (BINS,): each anchor's weight of 1, spread evenly over its pairs
    histogram_an: Tensor

    def __add__(self, other: "PairStatistics") -> "PairStatistics":  # type: ignore[override]
        return PairStatistics(*(a + b for a, b in zip(self, other)))


def squared_distances(features: Tensor) -> Tensor:
    """2 - 2 cos of each two of an image's vectors: (B, K, C) -> float64 (B, K, K), 0..4. A zero vector has cosine 0
    with all."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    distance = 2 - 2 * unit @ unit.transpose(1, 2)
    return distance.clamp(0, 4).round(decimals=9)  # so that equal features tie, whatever the rounding


def label_pairs(distance: Tensor, valid: Tensor, near: float, far: float) -> tuple[Tensor, Tensor]:
    """Positive and negative pairs, bool (B, K, K), by label distances (B, K, K) of pixels valid (B, K), as the
    regulariser defines them; no pixel is a pair with itself."""
    both = valid[:, :, None] & valid[:, None, :]
    itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    return both & (distance <= near) & ~itself, both & (distance >= far)


def anchor_auc(distance: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """For each anchor the probability that a random negative is farther than a random positive, ties counting half.

    (B, K, K) each -> float64 (B, K), NaN where there is no positive or no negative. The Mann-Whitney statistic: ranks
    by binary search, exact.
    """
    positives = distance.masked_fill(~positive, torch.inf).sort(dim=-1).values
    nearer = torch.searchsorted(positives, distance)  # of the anchor's positives, for each of its pixels
    not_farther = torch.searchsorted(positives, distance, right=True)
    won = ((nearer + not_farther) * negative).sum(dim=-1).double() / 2
    return won / (positive.sum(dim=-1) * negative.sum(dim=-1))


def compute_pair_statistics(distance: Tensor, positive: Tensor, negative: Tensor) -> PairStatistics:
    """All sums of some images: feature distances 0..4 and relations, (B, K, K) each."""
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


def summarize_pairs(found: PairStatistics) -> dict[str, float | int]:
    """``auc`` 0..1 (0.5: no separation), ``d_ap``, ``d_an`` and their difference ``gap``, means over anchors, NaN
    without any; the counts they stand on."""
    anchors = int(found.anchors)
    auc, d_ap, d_an = (
        float(value) / anchors if anchors else torch.nan for value in (found.auc, found.d_ap, found.d_an)
    )
    return {
        "auc": auc,
        "gap": d_an - d_ap,
        "d_ap": d_ap,
        "d_an": d_an,
        "anchors": anchors,
        "positives": int(found.positives),
        "negatives": int(found.negatives),
    }


class Histograms(NamedTuple):
    width: float  # of a bin; the first begins at 0
    ap: list[list[float]]  # for each tally the shares of its triplets, of the whole: what lies beyond the last bin
    an: list[list[float]]  # is missing from the sum


def build_histograms(tallies: list[PairStatistics], most: int = 64, within: float = 0.995) -> Histograms:
    """Histograms to be seen side by side: bins of one width, the least with which ``most`` of them hold the part
    ``within`` of each tally's distances."""
    weights = [h for t in tallies for h in (t.histogram_ap, t.histogram_an) if h.sum() > 0]
    last = max((int((h.cumsum(0) < within * h.sum()).sum()) for h in weights), default=0)
    fine = last // most + 1

    def shares(histogram: Tensor) -> list[float]:
        parts = torch.cat([histogram, histogram.new_zeros(fine * most)])[: fine * most] / histogram.sum().clamp(
            min=1e-12
        )
        return [round(value, 6) for value in parts.reshape(most, fine).sum(dim=1).tolist()]

    return Histograms(
        fine * 4 / BINS, [shares(t.histogram_ap) for t in tallies], [shares(t.histogram_an) for t in tallies]
    )
