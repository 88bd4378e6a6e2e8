"""Saliency."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torchmetrics
from torch import Tensor, nn

from mtcl.losses import build_loss
from mtcl.metrics import build_metric
from mtcl.tasks.class_task import ClassTask
from mtcl.tasks.palette import RGB


@dataclass(frozen=True, kw_only=True)
class Saliency(ClassTask):
    """Salient (1) or not (0), as two classes with a logit each."""

    name: str = "sal"
    channels: int = 2
    primary_metric: str = "maxF"
    higher_is_better: bool = True
    weight: float = 5.0

    @property
    def classes(self) -> tuple[str, ...]:
        return ("not salient", "salient")

    @property
    def colours(self) -> tuple[RGB, ...]:
        return ((96, 96, 96), (240, 240, 240))

    def check_maps(self, maps: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> list[str]:
        """Maps are probabilities, not classes."""
        return self.check_values(maps)

    @cached_property
    def criterion(self) -> nn.Module:
        return build_loss("sal")

    def loss(self, prediction: Tensor, label: Tensor) -> Tensor:
        return self.criterion(prediction, label)

    def metric(self, **options: Any) -> torchmetrics.Metric:
        return build_metric("sal", **options)
