"""Edges."""

from typing import Any

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor


class EdgeMetric(torchmetrics.Metric):
    """``loss``: the class-balanced cross-entropy of :class:`mtcl.losses.EdgeLoss`, over all valid pixels.

    Not the field's odsF, which needs thinned predictions and a matching of boundaries.

    update: logits (B, 1, H, W), labels (B, 1, H, W), 0, 1 or 255 = void.
    """

    full_state_update = False
    total: Tensor  # float64
    pixels: Tensor  # int64

    def __init__(self, positive_weight: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.positive_weight = positive_weight
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pixels", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, label: Tensor) -> None:
        logit, w = prediction.double(), self.positive_weight
        cost = torch.where(label == 1, -w * F.logsigmoid(logit), -(1 - w) * F.logsigmoid(-logit))
        valid = label != 255
        self.total += torch.where(valid, cost, 0.0).sum()
        self.pixels += valid.sum()

    def compute(self) -> dict[str, Tensor]:
        return {"loss": self.total / self.pixels}
