"""Depth."""

from typing import Any

import torch
import torchmetrics
from torch import Tensor


class DepthMetric(torchmetrics.Metric):
    """``rmse`` in metres, ``abs_rel`` and ``delta1``, pooled over all valid pixels
    (InvPT/evaluation/eval_depth.py:30-63).

    With p the prediction clamped at 0 and z the label: sqrt(mean (p - z)^2), mean |p - z| / z, and the
    fraction of pixels with max(p / z, z / p) < 1.25. No upper limit of depth, no median scaling.

    update: predictions (B, 1, H, W), labels (B, 1, H, W) in metres, valid where positive and finite.
    """

    full_state_update = False
    squared: Tensor  # float64
    relative: Tensor  # float64
    close: Tensor  # int64
    pixels: Tensor  # int64

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, dtype in [
            ("squared", torch.float64),
            ("relative", torch.float64),
            ("close", torch.int64),
            ("pixels", torch.int64),
        ]:
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, label: Tensor) -> None:
        valid = (label > 0) & label.isfinite()
        target = torch.where(valid, label.double(), 1.0)
        depth = torch.where(valid, prediction.double().clamp(min=0), 1.0)  # invalid pixels: an error of 0
        error = (depth - target).abs()
        self.squared += error.square().sum()
        self.relative += (error / target).sum()
        self.close += ((torch.maximum(depth / target, target / depth) < 1.25) & valid).sum()
        self.pixels += valid.sum()

    def compute(self) -> dict[str, Tensor]:
        return {
            "rmse": (self.squared / self.pixels).sqrt(),
            "abs_rel": self.relative / self.pixels,
            "delta1": self.close.double() / self.pixels,
        }
