"""Saliency."""

from typing import Any

import torch
import torchmetrics
from torch import Tensor


class SaliencyMetric(torchmetrics.Metric):
    """``maxF``, the largest F-measure over 19 thresholds t = 0.05, 0.10, ..., 0.95
    (atrc/src/data/metrics.py:131-232).

    A pixel is taken as salient when its probability (softmax of the two logits, once) is >= t. Pixels are
    pooled over the split, then F = (1 + b2) P R / (b2 P + R) with b2 = 0.3, which is
    (1 + b2) TP / (b2 positives + predicted); 0 / 0 counts as 0.

    update: logits (B, 2, H, W), labels int64 (B, H, W), 0, 1 or 255.
    """

    full_state_update = False
    BETA2 = 0.3
    thresholds: Tensor  # float32 (19,)
    histogram: Tensor  # int64 (2, 20): pixels by label and by the number of thresholds they reach

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("thresholds", torch.arange(1, 20) / 20, persistent=False)
        self.add_state("histogram", torch.zeros(2, 20, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, label: Tensor) -> None:
        probability = prediction.float().softmax(dim=1)[:, 1].contiguous()
        reached = torch.bucketize(probability, self.thresholds, right=True)
        cell = torch.where(label != 255, label * 20 + reached, 40)  # one more cell for the void
        self.histogram += torch.bincount(cell.flatten(), minlength=41)[:40].view(2, 20)

    def compute(self) -> dict[str, Tensor]:
        at_least = self.histogram.flip(1).cumsum(1).flip(1).double()  # column k: pixels that reach k thresholds or more
        predicted, hit, positives = at_least[:, 1:].sum(0), at_least[1, 1:], at_least[1, 0]
        # The smallest denominator other than 0 is that of one positive and no prediction.
        f = (1 + self.BETA2) * hit / (self.BETA2 * positives + predicted).clamp(min=self.BETA2)
        return {"maxF": f.max().masked_fill(self.histogram.sum() == 0, torch.nan)}
