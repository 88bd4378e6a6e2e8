"""Segmentation metrics of semantic segmentation and human parts, from one confusion matrix."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mtcl.errors import UserError
from mtcl.metrics.masked import (
    BAND,
    VOID,
    PixelMetric,
    check_shapes,
    count_by_label,
    is_finite,
    validate_protocol,
)


class SegmentationMetric(PixelMetric):
    """``mIoU``, ``mIoU_present``, ``pixel_accuracy`` and each class's ``IoU/<name>``.

    All come from one confusion matrix of the split (InvPT/evaluation/eval_semseg.py, class ``SemsegMeter``;
    atrc/src/data/metrics.py:61-128 is equivalent).

    IoU_c = TP / max(TP + FP + FN, 1e-8), sums over all valid pixels of the split; mIoU is its plain mean over all
    classes of the list, the background too where it is one (PASCAL's semseg, human parts; NYUD-v2's 40 classes have
    none). A class that occurs neither in the labels nor in the predictions counts as 0, as in the literature; so on a
    list that lacks classes no prediction reaches 1. ``mIoU_present`` is the mean over the classes that occur in the
    labels, ``absent_classes`` the number of those that do not. pixel_accuracy is the fraction of valid pixels with the
    right class.

    Args:
        num_classes: 1 to 255; 255 is void.
        class_names: in the order of the classes; they give the keys ``IoU/<name>``, which are ``IoU/<index>`` without.
        protocol: ``standard``, or ``mtan``, which differs only where a class occurs neither in the labels nor in the
            predictions: its IoU is 0 / 0, and so mIoU is NaN (LibMTL/examples/nyu/utils.py, class ``SegMetric``;
            mtan/im2im_pred/utils.py, class ``ConfMatrix``).
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        UserError: the number of classes or their names do not fit, or the protocol is unknown.
    """

    task = "semseg"
    PROTOCOLS = ("standard", "mtan")
    confusion: Tensor  # int64 (label, prediction); the last column: no class predicted

    def __init__(
        self,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        protocol: Literal["standard", "mtan"] = "standard",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.protocol = validate_protocol(self.task, protocol, self.PROTOCOLS)
        if not 1 <= num_classes <= VOID:
            raise UserError(f"{self.task}: num_classes={num_classes}; give 1 to {VOID} classes, {VOID} is void.")
        names = tuple(str(index) for index in range(num_classes)) if class_names is None else tuple(class_names)
        if len(names) != num_classes or len(set(names)) != num_classes:
            raise UserError(
                f"{self.task}: class_names has {len(set(names))} different names for num_classes={num_classes}; "
                f"give every class a different one."
            )
        self.num_classes, self.class_names = num_classes, names
        self.add_counts("confusion", size=(num_classes, num_classes + 1))
        self.add_counts("out_of_range")

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add a batch.

        The prediction is the class with the largest logit, the first one of equals. Where that logit is NaN or infinite
        no class is predicted: the pixel is a miss of its label's class, no false positive, and counts as
        ``not_finite``.

        Args:
            prediction: logits (B, num_classes, H, W).
            label: integers (B, H, W) in 0..num_classes-1, 255 where void.
        """
        n = self.num_classes
        check_shapes(self.task, prediction, (n,), label, ())
        largest, index = max_and_argmax(prediction)
        size = BAND if label.is_cpu else max(1, label.numel())
        # A finite sum has finite terms; it is not asked of a device, which would have to be waited for.
        all_finite = largest.is_cpu and math.isfinite(largest.sum())
        for parts in zip(*(array.flatten().split(size) for array in (largest, index, label))):
            self._add(all_finite, *parts)

    def _add(self, all_finite: bool, largest: Tensor, index: Tensor, label: Tensor) -> None:
        """Add pixels (N,): their largest logits, the classes of those, and their labels."""
        n = self.num_classes
        guess = index.int()
        if not all_finite:
            guess += (~is_finite(largest)).int() * (n - guess)
        counts = count_by_label(label.view(1, 1, -1), guess.view(1, 1, -1), n + 1)[0]
        self.confusion += counts[1 : 1 + n]
        self.out_of_range += counts[0].sum() + counts[1 + n : 1 + VOID].sum() + counts[2 + VOID].sum()

    def iou_per_class(self) -> Tensor:
        """Compute the IoU of each class: float64 (num_classes,).

        It is of this rank's pixels only, unless called in ``sync_context()``.
        """
        true_positives = self.confusion.diagonal().double()
        predicted, labelled = self.confusion[:, : self.num_classes].sum(0), self.confusion.sum(1)
        union = predicted + labelled - true_positives
        return true_positives / (union if self.protocol == "mtan" else union.clamp(min=1e-8))

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of the class, ``absent_classes`` and ``not_finite``."""
        self.check_labels(f"allowed are 0..{self.num_classes - 1} and {VOID} for void")
        pixels = self.confusion.sum()
        iou = self.iou_per_class().masked_fill(pixels == 0, torch.nan)
        present = self.confusion.sum(1) > 0
        return {
            "mIoU": iou.mean(),
            "mIoU_present": torch.where(present, iou, 0.0).sum() / present.sum(),
            "absent_classes": (~present).sum().double().masked_fill(pixels == 0, torch.nan),
            "pixel_accuracy": self.confusion.diagonal().sum().double() / pixels,
            **{f"IoU/{name}": value for name, value in zip(self.class_names, iou)},
            "not_finite": self.confusion[:, self.num_classes].sum(),
        }


class HumanPartsMetric(SegmentationMetric):
    """Segmentation metrics of human parts, whose background is a class.

    Labels of images without any part must be all void (InvPT/data/transforms.py:291-295), which the task's
    ``finalize_label`` ensures.

    Source: InvPT/evaluation/eval_human_parts.py:18-75.
    """

    task = "human_parts"


def max_and_argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum over channels and the index of its first occurrence; NaN wins.

    Pooling over channels is the same and, on a CPU, several times faster than ``max`` or ``argmax`` over a dimension
    that is not the last: it reads the memory once, in order.

    Args:
        logits: (B, C, H, W).

    Returns:
        Values and indices, (B, H, W) each.
    """
    if not logits.is_cpu or not logits.is_contiguous() or not logits.numel():
        value, index = logits.max(dim=1)
        return value, index
    batch, channels, height, width = logits.shape
    pixels_last = logits.view(batch, channels, 1, height * width).permute(0, 3, 1, 2)  # (B, HW, C, 1): channels_last
    value, index = F.max_pool2d(pixels_last, (channels, 1), return_indices=True)
    return value.reshape(batch, height, width), index.reshape(batch, height, width)
