"""Semantic segmentation."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torchmetrics
from torch import Tensor, nn

from mtcl.losses import build_loss
from mtcl.metrics import build_metric
from mtcl.tasks.class_task import ClassTask


@dataclass(frozen=True, kw_only=True)
class SemSeg(ClassTask):
    """Every pixel one of ``class_names``, whose order is that of the label values."""

    class_names: tuple[str, ...]
    name: str = "semseg"
    channels: int = field(init=False)
    primary_metric: str = "mIoU"
    higher_is_better: bool = True
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))  # a config gives a list
        object.__setattr__(self, "channels", len(self.class_names))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.class_names

    @cached_property
    def criterion(self) -> nn.Module:
        return build_loss("semseg")

    def loss(self, prediction: Tensor, label: Tensor) -> Tensor:
        return self.criterion(prediction, label)

    def metric(self, **options: Any) -> torchmetrics.Metric:
        return build_metric("semseg", num_classes=self.channels, class_names=self.classes, **options)
