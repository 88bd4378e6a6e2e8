"""The edge detection task."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mtcl import metrics
from mtcl.losses import EdgeLoss
from mtcl.tasks.class_task import DiscreteTask
from mtcl.tasks.palette import RGB

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True, kw_only=True)
class Edge(DiscreteTask):
    """Edge detection: edge (1) or not (0), one logit.

    Arrays are uint8 (H, W), batches float32 (B, 1, H, W); 255 is void.
    """

    positive_weight: float = 0.95  # of the loss, see EdgeLoss
    name: str = "edge"
    channels: int = 1
    weight: float = 50.0

    prediction_type: ClassVar[str] = "probability"
    void_colour: ClassVar[RGB] = (222, 205, 170)  # the shared near-black would look like a line

    @cached_property
    def criterion(self) -> nn.Module:
        """Return the loss module."""
        return EdgeLoss(positive_weight=self.positive_weight)

    def loss(self, prediction: Tensor, label: Tensor, image_weight: Tensor | None = None) -> Tensor:
        """Compute the loss of raw predictions."""
        return self.criterion(prediction, label, image_weight)

    @staticmethod
    def metric_class() -> "type[Metric]":
        """Return :class:`mtcl.metrics.EdgeMetric`."""
        return metrics.EdgeMetric

    def metric(self, **options: Any) -> "Metric":
        """Build a new metric; ``options`` are those of :class:`mtcl.metrics.EdgeMetric`."""
        return metrics.EdgeMetric(positive_weight=self.positive_weight, **options)

    def valid(self, label: Tensor) -> Tensor:
        """Return the mask of pixels that are not void: bool (B, H, W)."""
        return label[:, 0] != self.void

    def to_label(self, prediction: Tensor) -> Tensor:
        """Convert logits (..., K, 1) to 1 where an edge is more probable than not, else 0."""
        return (prediction > 0).to(prediction)

    def predict_label(self, prediction: Tensor, confidence: float) -> Tensor:  # noqa: ARG002
        """Return the probability of an edge, (B, 1, H, W), for which the loss has its minimum at the prediction.

        The logit that minimizes the loss is that of an edge's frequency plus that of :attr:`positive_weight`, which is
        subtracted. Hard labels, at whichever threshold, would make edges wider or fewer from teacher to student.
        """
        weight = min(max(self.positive_weight, 1e-6), 1 - 1e-6)
        return (prediction - math.log(weight / (1 - weight))).sigmoid()

    def collate(self, labels: np.ndarray) -> Tensor:
        """Convert stacked labels to float32 (B, 1, H, W)."""
        return torch.from_numpy(labels).float().unsqueeze(1)

    def decode(self, prediction: Tensor) -> np.ndarray:
        """Convert a logit (1, H, W) to the probability of an edge: float32 (H, W), unlike a label's uint8."""
        return prediction.detach()[0].float().sigmoid().cpu().numpy()

    def draw(self, array: np.ndarray) -> np.ndarray:
        """Draw dark lines on white, darker where an edge is more probable."""
        void = array == self.void
        ink = np.where(void, 0, array).astype(np.float32)
        grey = np.round(255 - 225 * ink).astype(np.uint8)
        return np.where(void[..., None], np.array(self.void_colour, np.uint8), grey[..., None])

    def legend(self, arrays: list[np.ndarray]) -> list[tuple[str, RGB]]:
        """Return the rows for edge, no edge, and void if it occurs."""
        rows: list[tuple[str, RGB]] = [("edge", (30, 30, 30)), ("no edge", (255, 255, 255))]
        return rows + [("void", self.void_colour)] * any((array == self.void).any() for array in arrays)
