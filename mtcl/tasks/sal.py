"""The saliency task."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from mtcl import metrics
from mtcl.losses import SaliencyLoss
from mtcl.tasks.class_task import ClassTask
from mtcl.tasks.palette import RGB

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True, kw_only=True)
class Saliency(ClassTask):
    """Saliency: salient (1) or not (0), as two classes with a logit each."""

    name: str = "sal"
    channels: int = 2
    weight: float = 5.0

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

    def loss(self, prediction: Tensor, label: Tensor, image_weight: Tensor | None = None) -> Tensor:
        """Compute the loss of raw predictions."""
        return self.criterion(prediction, label, image_weight)

    @staticmethod
    def metric_class() -> "type[Metric]":
        """Return :class:`mtcl.metrics.SaliencyMetric`."""
        return metrics.SaliencyMetric
