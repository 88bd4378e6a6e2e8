"""The surface normal estimation task."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl import metrics
from mtcl.errors import ParameterError
from mtcl.losses import NormalsCosineLoss, NormalsLoss
from mtcl.tasks.base import Task
from mtcl.tasks.palette import RGB, VOID_COLOUR, rgb

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True, kw_only=True)
class Normals(Task):
    """Surface normal estimation: unit vectors, x to the left, y up, z to the viewer; the zero vector is void.

    Arrays are float32 (H, W, 3), before :meth:`finalize_label` also the uint8 codes of the datasets' files: v stands
    for 2 v / 255 - 1, three zeros for void. Batches are float32 (B, 3, H, W).

    Attributes:
        normals_valid: ``length`` takes a vector shorter than 0.5 for void (8-bit files never decode to zero) and
            makes the others unit vectors; ``standard`` takes every vector as it is, and only zero for void.
        distance_loss: what the loss is the mean of: ``l1`` distances of the components, or ``cosine``, 1 - p . n.
    """

    normals_valid: Literal["length", "standard"] = "length"
    distance_loss: Literal["l1", "cosine"] = "l1"

    name: str = "normals"
    channels: int = 3
    weight: float = 10.0

    prediction_type: ClassVar[str] = "direction"
    void: ClassVar[float] = 0.0
    positive_threshold: ClassVar[float] = 15.0  # degrees
    negative_threshold: ClassVar[float] = 40.0
    error_label: ClassVar[str] = "40 deg off"
    min_length: ClassVar[float] = 0.5
    max_encoded_mean: ClassVar[float] = 0.25  # half of the mean of (n + 1) / 2

    def __post_init__(self) -> None:
        if self.normals_valid not in ("length", "standard"):
            raise ParameterError("normals_valid", f"={self.normals_valid} is not known; choose length or standard.")
        if self.distance_loss not in ("l1", "cosine"):
            raise ParameterError("distance_loss", f"={self.distance_loss} is not known; choose l1 or cosine.")

    @cached_property
    def criterion(self) -> nn.Module:
        """Return the loss module."""
        return NormalsCosineLoss() if self.distance_loss == "cosine" else NormalsLoss()

    def loss(self, prediction: Tensor, label: Tensor, image_weight: Tensor | None = None) -> Tensor:
        """Compute the loss of raw predictions."""
        return self.criterion(prediction, label, image_weight)

    @staticmethod
    def metric_class() -> "type[Metric]":
        """Return :class:`mtcl.metrics.NormalsMetric`."""
        return metrics.NormalsMetric

    def valid(self, label: Tensor) -> Tensor:
        """Return the mask of pixels whose vector is not zero: bool (B, H, W)."""
        return (label != self.void).any(dim=1)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Compute degrees as 2 atan2(|a - b|, |a + b|), unlike acos(a . b) exact near 0 and 180 degrees."""
        a, b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
        exact = "donot_use_mm_for_euclid_dist"  # the faster mode cancels for vectors close to each other
        apart, across = torch.cdist(a, b, compute_mode=exact), torch.cdist(a, -b, compute_mode=exact)
        return torch.rad2deg(2 * torch.atan2(apart, across))

    def embed_label(self, label: Tensor) -> Tensor:
        """Map labels to points on the unit sphere."""
        return F.normalize(label.float(), dim=-1)

    def embedded_distance(self, distance: float) -> float:
        """Return the chord of an angle in degrees; infinity beyond 180."""
        return 2 * math.sin(math.radians(distance) / 2) if distance <= 180 else math.inf

    def sampling_bin(self, label: Tensor) -> Tensor:
        """Return the nearest axis: left, right, up, down, to or from the viewer."""
        _, axis = label.float().abs().max(dim=-1)
        return 2 * axis + (label.gather(-1, axis[..., None])[..., 0] < 0)

    def to_label(self, prediction: Tensor) -> Tensor:
        """Normalize vectors (..., K, 3) to length 1."""
        return F.normalize(prediction.float(), dim=-1)

    def collate(self, labels: np.ndarray) -> Tensor:
        """Convert stacked labels (B, 3, H, W) to float32."""
        return torch.from_numpy(labels).float()

    def decode(self, prediction: Tensor) -> np.ndarray:
        """Convert a prediction (3, H, W) to unit vectors (H, W, 3)."""
        return F.normalize(prediction.detach().float(), dim=0).permute(1, 2, 0).contiguous().cpu().numpy()

    def draw(self, array: np.ndarray) -> np.ndarray:
        """Draw (n + 1) / 2 as red, green, blue."""
        colours = np.round(255 * ((array + 1) / 2).clip(0, 1)).astype(np.uint8)
        return np.where((array != self.void).any(axis=-1, keepdims=True), colours, np.array(VOID_COLOUR, np.uint8))

    def legend(self, arrays: list[np.ndarray]) -> list[tuple[str, RGB]]:
        """Return the colours of the three axes, and void if it occurs."""
        axes = zip(("left", "up", "to the viewer"), self.draw(np.eye(3, dtype=np.float32)[None])[0])
        rows = [(text, rgb(colour)) for text, colour in axes]
        return rows + [("void", VOID_COLOUR)] * any((array == self.void).all(axis=-1).any() for array in arrays)

    def check_values(self, arrays: Sequence[np.ndarray]) -> list[str]:
        """Describe labels that look like (n + 1) / 2.

        Then no component is negative and the first two are near one half on average; normals would have to face left
        and up everywhere.
        """
        standard = replace(self, normals_valid="standard")
        vectors = [standard.finalize_label(array) for array in arrays]
        valid = np.concatenate([v[np.isfinite(v).all(axis=2) & v.any(axis=2)] for v in vectors])
        if not len(valid) or valid.min() < 0 or valid[:, :2].mean(axis=0).min() < self.max_encoded_mean:
            return []
        return ["have no negative component: this looks like (n + 1) / 2 that was not decoded, n = 2 v - 1"]

    def empty_label(self, height: int, width: int) -> np.ndarray:
        """Return a label without a valid pixel: float32 (H, W, 3)."""
        return np.full((height, width, 3), self.void, np.float32)

    def flip_label(self, label: np.ndarray) -> np.ndarray:
        """Change the sign of x, for left and right change places."""
        if label.dtype != np.uint8:
            return label * np.array([-1, 1, 1], np.float32)
        planes = label.transpose(2, 0, 1).copy()
        black = _is_black(planes)
        planes[0] ^= 255  # 255 - v stands for the opposite of v
        planes[0][_is_black(planes)] = 1  # not void, but the code beside it
        planes[0][black] = 0
        return planes.transpose(1, 2, 0)

    def unflip_prediction(self, prediction: Tensor) -> Tensor:
        """Flip the map (B, 3, H, W) back and change the sign of x."""
        x, rest = prediction.flip(-1).split([1, 2], dim=1)
        return torch.cat([-x, rest], dim=1)

    def to_averageable(self, prediction: Tensor) -> Tensor:
        """Normalize to length 1: the loss leaves the length free, and the longest vectors would count most."""
        return F.normalize(prediction.float(), dim=-3)

    def finalize_label(self, label: np.ndarray) -> np.ndarray:
        """Decode 8-bit codes, and make vectors unit or void as :attr:`normals_valid` says."""
        if label.dtype != np.uint8 and self.normals_valid == "standard":
            return label
        planes = np.empty((3, *label.shape[:2]), np.float32)
        for top in range(0, len(label), _ROWS):
            self._finalize_rows(label[top : top + _ROWS], planes[:, top : top + _ROWS])
        return planes.transpose(1, 2, 0)

    def _finalize_rows(self, label: np.ndarray, planes: np.ndarray) -> None:
        """Finalize some rows of a label (H, W, 3) into ``planes`` float32 (3, H, W)."""
        if label.dtype != np.uint8:
            planes[:] = label.transpose(2, 0, 1)
            void: np.ndarray | np.bool_ = np.False_
        else:
            void = _decode_uint8(label, planes)
        if self.normals_valid == "standard":
            planes[:, void] = 0
            return
        square = planes[0] ** 2
        for component in planes[1:]:
            square += component**2
        void = void | ~(square >= self.min_length**2)
        np.copyto(square, np.inf, where=void)
        planes *= 1 / np.sqrt(square)


_ROWS = 32  # of a label that are finalized at once, so that the intermediate arrays stay in the cache
_LEVELS = (2.0 * np.arange(256) / 255.0 - 1.0).astype(np.float32)


def _decode_uint8(codes: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """Decode 8-bit codes (H, W, 3) into vectors float32 (3, H, W), and return where the code is black: bool (H, W)."""
    interleaved = codes.strides[2] == codes.itemsize
    levels = cv2.split(codes) if interleaved else codes.transpose(2, 0, 1)
    for level, plane in zip(levels, planes):
        cv2.LUT(level, _LEVELS, dst=plane)
    return _is_black(levels)


def _is_black(planes: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Return where all three of (3, H, W) are 0: bool (H, W)."""
    return (planes[0] | planes[1] | planes[2]) == 0
