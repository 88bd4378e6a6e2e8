"""The human parts task."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from mtcl import metrics
from mtcl.losses import CrossEntropyLoss
from mtcl.tasks.class_names import HUMAN_PARTS
from mtcl.tasks.class_task import ClassTask

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True, kw_only=True)
class HumanParts(ClassTask):
    """Human part segmentation: six parts and the background, which counts as a class."""

    name: str = "human_parts"
    channels: int = len(HUMAN_PARTS)
    weight: float = 2.0

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes, in the order of the label values."""
        return HUMAN_PARTS

    @cached_property
    def criterion(self) -> nn.Module:
        """Return the loss module."""
        return CrossEntropyLoss()

    def loss(self, prediction: Tensor, label: Tensor, image_weight: Tensor | None = None) -> Tensor:
        """Compute the loss of raw predictions."""
        return self.criterion(prediction, label, image_weight)

    @staticmethod
    def metric_class() -> "type[Metric]":
        """Return :class:`mtcl.metrics.HumanPartsMetric`."""
        return metrics.HumanPartsMetric

    def metric(self, **options: Any) -> "Metric":
        """Build a new metric; ``options`` are those of :class:`mtcl.metrics.HumanPartsMetric`."""
        return metrics.HumanPartsMetric(num_classes=self.channels, class_names=self.classes, **options)

    def finalize_label(self, label: np.ndarray) -> np.ndarray:
        """Make the label all void if it has no part, in training and in evaluation.

        Source: InvPT/data/transforms.py:291-295.
        """
        if ((label > 0) & (label != self.void)).any():
            return label
        return np.full_like(label, self.void)
