"""Surface normals."""

from typing import Any

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor


class NormalsMetric(torchmetrics.Metric):
    """``mErr``, the mean angle in degrees, and ``within_11.25``, ``within_22.5``, ``within_30``, the
    fractions of smaller angles, pooled over all valid pixels.

    The angle of unit vectors p and g is 2 atan2(|p - g|, |p + g|), exact near 0 and 180 degrees
    (InvPT/evaluation/eval_normals.py:33-51); a prediction of length 0 is 90 degrees off.

    update: predictions (B, 3, H, W) of any length, labels (B, 3, H, W), the zero vector where there is none.
    """

    full_state_update = False
    LIMITS = (11.25, 22.5, 30.0)
    degrees: Tensor  # float64
    within: Tensor  # int64 (3,)
    pixels: Tensor  # int64

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("degrees", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("within", torch.zeros(len(self.LIMITS), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("pixels", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, label: Tensor) -> None:
        valid = (label != 0).any(dim=1)
        p, g = F.normalize(prediction.double(), dim=1), F.normalize(label.double(), dim=1)
        angle = torch.rad2deg(2 * torch.atan2((p - g).norm(dim=1), (p + g).norm(dim=1)))
        self.degrees += torch.where(valid, angle, 0.0).sum()
        self.within += torch.stack([((angle < limit) & valid).sum() for limit in self.LIMITS])
        self.pixels += valid.sum()

    def compute(self) -> dict[str, Tensor]:
        within = self.within.double() / self.pixels
        return {
            "mErr": self.degrees / self.pixels,
            **{f"within_{limit:g}": part for limit, part in zip(self.LIMITS, within)},
        }
