"""Semantic segmentation and human parts."""

from typing import Any

import torch
import torchmetrics
from torch import Tensor


class SegmentationMetric(torchmetrics.Metric):
    """``mIoU`` and ``pixel_accuracy`` of one confusion matrix over the split
    (InvPT/evaluation/eval_semseg.py).

    IoU_c = TP / max(TP + FP + FN, 1e-8); mIoU is its plain mean over all classes, so a class that occurs
    neither in the labels nor in the predictions counts as 0.

    update: logits (B, num_classes, H, W), labels int64 (B, H, W) in 0..num_classes-1 or 255.
    """

    full_state_update = False
    confusion: Tensor  # int64 (label, prediction)

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, label: Tensor) -> None:
        n = self.num_classes
        cell = torch.where(label != 255, label * n + prediction.argmax(dim=1), n * n)  # one more cell for the void
        self.confusion += torch.bincount(cell.flatten(), minlength=n * n + 1)[: n * n].view(n, n)

    def iou_per_class(self) -> Tensor:
        """float64 (num_classes,); of this rank's pixels only, unless called in ``sync_context()``."""
        hit = self.confusion.diagonal().double()
        return hit / (self.confusion.sum(0) + self.confusion.sum(1) - hit).clamp(min=1e-8)

    def compute(self) -> dict[str, Tensor]:
        pixels = self.confusion.sum()
        return {
            "mIoU": self.iou_per_class().mean().masked_fill(pixels == 0, torch.nan),
            "pixel_accuracy": self.confusion.diagonal().sum().double() / pixels,
        }
