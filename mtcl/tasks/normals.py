"""Surface normals."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

from mtcl.losses import build_loss
from mtcl.metrics import build_metric
from mtcl.tasks.base import Task
from mtcl.tasks.colours import RGB, VOID_COLOUR, rgb


@dataclass(frozen=True, kw_only=True)
class Normals(Task):
    """Unit vectors, x to the left, y up, z to the viewer; the zero vector is void.

    Arrays float32 (H, W, 3), batches float32 (B, 3, H, W).
    """

    name: str = "normals"
    channels: int = 3
    primary: str = "mErr"
    higher_is_better: bool = False
    weight: float = 10.0

    void: ClassVar[float] = 0.0
    near: ClassVar[float] = 15.0  # degrees
    far: ClassVar[float] = 40.0
    units: ClassVar[Mapping[str, str]] = {"mErr": "deg"}

    @cached_property
    def criterion(self) -> nn.Module:
        return build_loss("normals")

    def loss(self, prediction: Tensor, label: Tensor) -> Tensor:
        return self.criterion(prediction, label)

    def metric(self, **options: Any) -> torchmetrics.Metric:
        return build_metric("normals", **options)

    def valid(self, label: Tensor) -> Tensor:
        return (label != self.void).any(dim=1)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """2 atan2(|a - b|, |a + b|): unlike the arc cosine of a . b, exact near 0 and 180 degrees."""
        a, b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
        exact = "donot_use_mm_for_euclid_dist"  # the faster mode cancels for vectors close to each other
        apart, across = torch.cdist(a, b, compute_mode=exact), torch.cdist(a, -b, compute_mode=exact)
        return torch.rad2deg(2 * torch.atan2(apart, across))

    def collated(self, labels: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(labels)).float().permute(0, 3, 1, 2).contiguous()

    def decoded(self, prediction: Tensor) -> np.ndarray:
        return F.normalize(prediction.detach().float(), dim=0).permute(1, 2, 0).contiguous().cpu().numpy()

    def draw(self, array: np.ndarray) -> np.ndarray:
        """(n + 1) / 2 as red, green, blue."""
        colours = np.round(255 * ((array + 1) / 2).clip(0, 1)).astype(np.uint8)
        return np.where((array != self.void).any(axis=-1, keepdims=True), colours, np.array(VOID_COLOUR, np.uint8))

    def legend(self, arrays: list[np.ndarray]) -> list[tuple[str, RGB]]:
        axes = zip(("left", "up", "to the viewer"), self.draw(np.eye(3, dtype=np.float32)[None])[0])
        rows = [(text, rgb(colour)) for text, colour in axes]
        return rows + [("void", VOID_COLOUR)] * any((array == self.void).all(axis=-1).any() for array in arrays)

    def flipped(self, label: np.ndarray) -> np.ndarray:
        """Left and right change places, so x changes its sign."""
        return label * np.array([-1, 1, 1], np.float32)
