"""Depth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn

from mtcl.losses import build_loss
from mtcl.metrics import build_metric
from mtcl.tasks.base import Task
from mtcl.tasks.class_task import embed_scalar
from mtcl.tasks.palette import RGB, VOID_COLOUR, rgb


@dataclass(frozen=True, kw_only=True)
class Depth(Task):
    """Metres from the camera; arrays float32 (H, W), batches float32 (B, 1, H, W), 0 is void."""

    name: str = "depth"
    channels: int = 1
    primary_metric: str = "rmse"
    higher_is_better: bool = False
    weight: float = 1.0

    prediction_type: ClassVar[str] = "metres"
    void: ClassVar[float] = 0.0
    positive_threshold: ClassVar[float] = 0.05  # |log ratio|
    negative_threshold: ClassVar[float] = 0.2
    error_label: ClassVar[str] = "22 % off"  # exp(0.2)
    units: ClassVar[Mapping[str, str]] = {"rmse": "m", "abs_rel": "", "sq_rel": "m", "log_rmse": "", "not_finite": ""}
    max_plausible_median: ClassVar[float] = 100.0  # metres: a median beyond it is of another unit
    min_drawn_depth: ClassVar[float] = (
        1e-6  # metres: what stands for a prediction of 0 or less in pictures, where 0 is void
    )
    max_drawn_depth: ClassVar[float] = 10.0  # metres; pictures have one range, so that colours can be compared

    @cached_property
    def criterion(self) -> nn.Module:
        return build_loss("depth")

    def loss(self, prediction: Tensor, label: Tensor) -> Tensor:
        return self.criterion(prediction, label)

    def metric(self, **options: Any) -> torchmetrics.Metric:
        return build_metric("depth", **options)

    def valid(self, label: Tensor) -> Tensor:
        """Positive and finite."""
        return ((label > 0) & label.isfinite())[:, 0]

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        return (_log(a) - _log(b).transpose(1, 2)).abs()

    def embed_label(self, label: Tensor) -> Tensor:
        return embed_scalar(_log(label))

    def sampling_bin(self, label: Tensor) -> Tensor:
        """Steps of :attr:`far`, from 0.1 m on."""
        return ((_log(label)[..., 0] - math.log(0.1)) / self.negative_threshold).long().clamp(0, 255)

    def collate(self, labels: np.ndarray) -> Tensor:
        return torch.from_numpy(labels).float().unsqueeze(1)

    def decode(self, prediction: Tensor) -> np.ndarray:
        """Metres, negative ones clamped to 0 as in the metric."""
        return prediction.detach()[0].float().clamp(min=0).cpu().numpy()

    def draw(self, array: np.ndarray) -> np.ndarray:
        """Warm is near, cold is far: the colour map Turbo from 0 to :attr:`farthest` metres."""
        valid = (array > 0) & np.isfinite(array)
        nearness = 1 - np.where(valid, array, 0).clip(0, self.max_drawn_depth) / self.max_drawn_depth
        index = np.round(28 + 212 * nearness).astype(np.uint8)  # without the two ends, nearly as dark as the void
        turbo = cv2.applyColorMap(index, cv2.COLORMAP_TURBO)[..., ::-1]
        return np.where(valid[..., None], turbo, np.array(VOID_COLOUR, np.uint8))

    def to_drawable(self, prediction: np.ndarray) -> np.ndarray:
        """Give what was clipped the nearest colour; what is no number stays void."""
        return np.maximum(prediction, np.float32(self.min_drawn_depth))

    def legend(self, arrays: list[np.ndarray]) -> list[tuple[str, RGB]]:
        ticks = np.array([[self.min_drawn_depth, 1, 2, 3, 4, 6, 8, self.max_drawn_depth]], np.float32)
        texts = ["0 m or less", *(f"{tick:g} m" for tick in ticks[0, 1:])]
        rows = [(text, rgb(colour)) for text, colour in zip(texts, self.draw(ticks)[0])]
        rows = rows if any((array == ticks[0, 0]).any() for array in arrays) else rows[1:]
        return rows + [("void", VOID_COLOUR)] * any((array == self.void).any() for array in arrays)

    def check_values(self, arrays: Sequence[np.ndarray]) -> list[str]:
        """Half of the pixels are nearer than :attr:`implausible` in any scene of metres, also outdoors."""
        values = np.concatenate([array[(array > 0) & np.isfinite(array)] for array in arrays])
        median = float(np.median(values)) if values.size else 0.0
        if median <= self.max_plausible_median:
            return []
        return [f"have a median of {median:.4g}: depth is in metres, this looks like millimetres"]

    def empty_label(self, height: int, width: int) -> np.ndarray:
        return np.full((height, width), self.void, np.float32)

    def scale_label(self, label: np.ndarray, factor: float) -> np.ndarray:
        """Enlarged by ``factor``, a thing looks as if it were that much nearer."""
        return label / np.float32(factor)

    def unscale_prediction(self, prediction: Tensor, factor: float) -> Tensor:
        return prediction * factor

    def to_averageable(self, prediction: Tensor) -> Tensor:
        """Clamped to 0, as every prediction is scored."""
        return prediction.clamp(min=0)


def _log(depth: Tensor) -> Tensor:
    """A void 0 stays finite."""
    return depth.float().clamp(1e-6, 1e6).log()
