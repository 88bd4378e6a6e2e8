"""Surface normals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

from mtcl.errors import UserError
from mtcl.losses import build_loss
from mtcl.metrics import build_metric
from mtcl.tasks.base import Task
from mtcl.tasks.palette import RGB, VOID_COLOUR, rgb


@dataclass(frozen=True, kw_only=True)
class Normals(Task):
    """Unit vectors, x to the left, y up, z to the viewer; the zero vector is void.

    Arrays float32 (H, W, 3), before :meth:`finished` also the uint8 codes of the field's files: v stands for
    2 v / 255 - 1, three zeros for void. Batches float32 (B, 3, H, W).

    ``normals_valid``: ``length`` takes a vector shorter than 0.5 for void (8-bit files never decode to zero) and makes the
    others units; ``standard`` takes every vector as it is, and only zero for void.
    """

    normals_valid: Literal["length", "standard"] = "length"

    name: str = "normals"
    channels: int = 3
    primary_metric: str = "mErr"
    higher_is_better: bool = False
    weight: float = 10.0

    prediction_type: ClassVar[str] = "direction"
    void: ClassVar[float] = 0.0
    positive_threshold: ClassVar[float] = 15.0  # degrees
    negative_threshold: ClassVar[float] = 40.0
    error_label: ClassVar[str] = "40 deg off"
    units: ClassVar[Mapping[str, str]] = {"mErr": "deg", "median": "deg", "rmse": "deg", "not_finite": ""}
    min_length: ClassVar[float] = 0.5
    max_encoded_mean: ClassVar[float] = 0.25  # half of what (n + 1) / 2 has on average

    def __post_init__(self) -> None:
        if self.normals_valid not in ("length", "standard"):
            raise UserError(f"data.normals_valid={self.normals_valid} is not known; choose length or standard.")

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

    def embed_label(self, label: Tensor) -> Tensor:
        return F.normalize(label.float(), dim=-1)

    def embedded_distance(self, distance: float) -> float:
        """The chord of an angle; beyond 180 degrees there is none."""
        return 2 * math.sin(math.radians(distance) / 2) if distance <= 180 else math.inf

    def sampling_bin(self, label: Tensor) -> Tensor:
        """The axis that is nearest: left, right, up, down, to and from the viewer."""
        _, axis = label.float().abs().max(dim=-1)
        return 2 * axis + (label.gather(-1, axis[..., None])[..., 0] < 0)

    def collate(self, labels: np.ndarray) -> Tensor:
        return torch.from_numpy(labels).float()

    def decode(self, prediction: Tensor) -> np.ndarray:
        return F.normalize(prediction.detach().float(), dim=0).permute(1, 2, 0).contiguous().cpu().numpy()

    def draw(self, array: np.ndarray) -> np.ndarray:
        """(n + 1) / 2 as red, green, blue."""
        colours = np.round(255 * ((array + 1) / 2).clip(0, 1)).astype(np.uint8)
        return np.where((array != self.void).any(axis=-1, keepdims=True), colours, np.array(VOID_COLOUR, np.uint8))

    def legend(self, arrays: list[np.ndarray]) -> list[tuple[str, RGB]]:
        axes = zip(("left", "up", "to the viewer"), self.draw(np.eye(3, dtype=np.float32)[None])[0])
        rows = [(text, rgb(colour)) for text, colour in axes]
        return rows + [("void", VOID_COLOUR)] * any((array == self.void).all(axis=-1).any() for array in arrays)

    def check_values(self, arrays: Sequence[np.ndarray]) -> list[str]:
        """Look for (n + 1) / 2: no component is negative, the first two are near one half on average; normals
        would have to face left and up everywhere."""
        vectors = [_decoded(a).transpose(1, 2, 0) if a.dtype == np.uint8 else a for a in arrays]
        valid = np.concatenate([v[np.isfinite(v).all(axis=2) & v.any(axis=2)] for v in vectors])
        if not len(valid) or valid.min() < 0 or valid[:, :2].mean(axis=0).min() < self.max_encoded_mean:
            return []
        return ["have no negative component: this looks like (n + 1) / 2 that was not decoded, n = 2 v - 1"]

    def empty_label(self, height: int, width: int) -> np.ndarray:
        return np.full((height, width, 3), self.void, np.float32)

    def flip_label(self, label: np.ndarray) -> np.ndarray:
        """Left and right change places, so x changes its sign."""
        if label.dtype != np.uint8:
            return label * np.array([-1, 1, 1], np.float32)
        planes = label.transpose(2, 0, 1).copy()
        black = _black(planes)
        planes[0] ^= 255  # 255 - v stands for the opposite of v
        planes[0][_black(planes)] = 1  # not void, but the code beside it
        planes[0][black] = 0
        return planes.transpose(1, 2, 0)

    def unflip_prediction(self, prediction: Tensor) -> Tensor:
        return prediction.flip(-1) * prediction.new_tensor([-1.0, 1.0, 1.0])[:, None, None]

    def to_averageable(self, prediction: Tensor) -> Tensor:
        """Of length 1: the loss leaves the length free, and the longest would count most."""
        return F.normalize(prediction.float(), dim=-3)

    def finalize_label(self, label: np.ndarray) -> np.ndarray:
        """Decoded, and void or a unit; see the class."""
        planes = _decoded(label) if label.dtype == np.uint8 else label.transpose(2, 0, 1)
        if self.normals_valid == "length":
            square = planes[0] ** 2 + planes[1] ** 2 + planes[2] ** 2
            scale = np.zeros_like(square)
            np.divide(1, np.sqrt(square), out=scale, where=square >= self.min_length**2)
            planes = planes * scale
        return planes.transpose(1, 2, 0)


_LEVELS = (2.0 * np.arange(256) / 255.0 - 1.0).astype(np.float32)


def _decoded(codes: np.ndarray) -> np.ndarray:
    """Vectors float32 (3, H, W) of 8-bit codes (H, W, 3); zero where the code is black."""
    planes = np.ascontiguousarray(codes.transpose(2, 0, 1))  # NumPy is slow on a last axis of three
    vectors = cv2.LUT(planes.reshape(-1, planes.shape[2]), _LEVELS).reshape(planes.shape)
    vectors[:, _black(planes)] = 0
    return vectors


def _black(planes: np.ndarray) -> np.ndarray:
    """Where all three of (3, H, W) are 0: bool (H, W)."""
    return (planes[0] | planes[1] | planes[2]) == 0
