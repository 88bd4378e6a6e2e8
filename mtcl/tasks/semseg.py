"""The semantic segmentation task."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mtcl import metrics
from mtcl.losses import CrossEntropyLoss
from mtcl.tasks.class_task import ClassTask

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True, kw_only=True)
class SemSeg(ClassTask):
    """Semantic segmentation: every pixel is one of ``class_names``, whose order is that of the label values."""

    class_names: tuple[str, ...]
    name: str = "semseg"
    channels: int = field(init=False)
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))  # a config gives a list
        object.__setattr__(self, "channels", len(self.class_names))

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes, in the order of the label values."""
        return self.class_names

    @cached_property
    def criterion(self) -> nn.Module:
        """Return the loss module."""
        return CrossEntropyLoss()

    def loss(self, prediction: Tensor, label: Tensor, image_weight: Tensor | None = None) -> Tensor:
        """Compute the loss of raw predictions."""
        return self.criterion(prediction, label, image_weight)

    @staticmethod
    def metric_class() -> "type[Metric]":
        """Return :class:`mtcl.metrics.SegmentationMetric`."""
        return metrics.SegmentationMetric

    def metric(self, **options: Any) -> "Metric":
        """Build a new metric; ``options`` are those of :class:`mtcl.metrics.SegmentationMetric`."""
        return metrics.SegmentationMetric(num_classes=self.channels, class_names=self.classes, **options)
