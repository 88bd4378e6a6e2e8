"""Parts of the human body."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torchmetrics
from torch import Tensor, nn

from mtcl.losses import build_loss
from mtcl.metrics import build_metric
from mtcl.tasks.class_names import HUMAN_PARTS
from mtcl.tasks.class_task import ClassTask


@dataclass(frozen=True, kw_only=True)
class HumanParts(ClassTask):
    """Six parts and the background, which counts as a class."""

    name: str = "human_parts"
    channels: int = len(HUMAN_PARTS)
    primary_metric: str = "mIoU"
    higher_is_better: bool = True
    weight: float = 2.0

    @property
    def classes(self) -> tuple[str, ...]:
        return HUMAN_PARTS

    @cached_property
    def criterion(self) -> nn.Module:
        return build_loss("human_parts")

    def loss(self, prediction: Tensor, label: Tensor) -> Tensor:
        return self.criterion(prediction, label)

    def metric(self, **options: Any) -> torchmetrics.Metric:
        return build_metric("human_parts", num_classes=self.channels, class_names=self.classes, **options)

    def finalize_label(self, label: np.ndarray) -> np.ndarray:
        """A picture without any part is ignored as a whole, in training and in evaluation
        (InvPT/data/transforms.py:291-295)."""
        if ((label > 0) & (label != self.void)).any():
            return label
        return np.full_like(label, self.void)
