"""The saliency task."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torchmetrics
from torch import Tensor, nn

from mtcl.losses import SaliencyLoss
from mtcl.metrics import SaliencyMetric
from mtcl.tasks.class_task import ClassTask
from mtcl.tasks.palette import RGB


@dataclass(frozen=True, kw_only=True)
class Saliency(ClassTask):
    """Saliency: salient (1) or not (0), as two classes with a logit each."""

    name: str = "sal"
    channels: int = 2
    primary_metric: str = "maxF"
    higher_is_better: bool = True
    weight: float = 5.0

    metric_class: ClassVar[type[torchmetrics.Metric]] = SaliencyMetric

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the two classes."""
        return ("not salient", "salient")

    @property
    def colours(self) -> tuple[RGB, ...]:
        """Return two greys."""
        return ((96, 96, 96), (240, 240, 240))

    def check_maps(self, maps: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> list[str]:  # noqa: ARG002
        """Check the values alone: maps are probabilities, not classes."""
        return self.check_values(maps)

    @cached_property
    def criterion(self) -> nn.Module:
        """Return the loss module."""
        return SaliencyLoss()

    def loss(self, prediction: Tensor, label: Tensor) -> Tensor:
        """Compute the loss of raw predictions."""
        return self.criterion(prediction, label)

    def metric(self, **options: Any) -> torchmetrics.Metric:
        """Build a new metric; ``options`` are those of :class:`mtcl.metrics.SaliencyMetric`."""
        return SaliencyMetric(**options)
