"""What a task is: everything the rest of the house needs to know about it, in one frozen object."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torchmetrics
from torch import Tensor


@dataclass(frozen=True)
class Task(ABC):
    """One pixel-wise task. One file per task; readers, decoders, trainer and regulariser ask it, never its name.

    A label has two layouts. In the data pipeline it is a NumPy array of the picture's height and width: uint8 (H, W)
    for classes, edges and saliency, float32 (H, W) for depth, float32 (H, W, 3) for normals. In a batch it is the
    tensor that :meth:`collated` describes. Both mark invalid pixels with :attr:`void`.
    """

    name: str
    channels: int  # of the prediction
    primary_metric: str  # the key of metric().compute() that tables and `trainer.monitor` use
    higher_is_better: bool
    weight: float  # the field's loss weight

    prediction_type: ClassVar[str]  # what a prediction's pixel is: class, metres, direction, probability
    void: ClassVar[float] = 255.0  # the value of an invalid pixel, and of padding
    # Label distances up to `near` make a positive pair for the regulariser, from `far` on a negative one.
    positive_threshold: ClassVar[float] = 0.0
    negative_threshold: ClassVar[float] = 1.0
    error_label: ClassVar[str] = "wrong"  # what an error map calls a pixel that is `far` from its label, or farther
    units: ClassVar[Mapping[str, str]] = {}  # metric -> unit; the others are fractions, shown in percent
    fallback_metric: ClassVar[str | None] = None  # for `primary` where that is not computed; lower is better

    @abstractmethod
    def loss(self, prediction: Tensor, label: Tensor) -> Tensor:
        """Scalar loss of raw predictions (B, C, H, W); a zero that keeps the graph when no pixel is valid."""

    @abstractmethod
    def metric(self, **options: Any) -> torchmetrics.Metric:
        """A fresh metric; ``update(prediction, label)``, ``compute() -> {name: value}`` in fractions, degrees,
        metres."""

    def choose_metric(self, found: Collection[str]) -> tuple[str, bool]:
        """The metric that stands for the task among those ``found``, and whether higher is better."""
        if self.primary_metric in found or self.fallback_metric is None:
            return self.primary_metric, self.higher_is_better
        return self.fallback_metric, False

    @abstractmethod
    def valid(self, label: Tensor) -> Tensor:
        """Which pixels of a batch's label carry one: bool (B, H, W)."""

    @abstractmethod
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of sampled labels in the task's natural unit: (B, K, c), (B, L, c) -> (B, K, L).

        Classes: 0 equal, 1 different; depth: |log ratio|; normals: degrees. Meaningless where a label is invalid.
        """

    @abstractmethod
    def embed_label(self, label: Tensor) -> Tensor:
        """Sampled labels (..., K, c) as points (..., K, 3), float32: Euclidean distance orders pairs as
        :meth:`distance` does, and is :meth:`span` of it. Meaningless, but finite, where a label is invalid."""

    def embedded_distance(self, distance: float) -> float:
        """The distance of two points (see :meth:`place`) whose labels are ``distance`` apart."""
        return distance

    @abstractmethod
    def sampling_bin(self, label: Tensor) -> Tensor:
        """Sampled labels (..., K, c) as one of up to 256 groups (classes, ranges) of which a sample should hold equal
        parts: int64 (..., K)."""

    @abstractmethod
    def draw(self, array: np.ndarray) -> np.ndarray:
        """Colour a label, or a prediction after :meth:`decoded`, in label layout: uint8 RGB (H, W, 3)."""

    @abstractmethod
    def decode(self, prediction: Tensor) -> np.ndarray:
        """One raw prediction (C, H, W) as an array in label layout (classes, metres, unit vectors, probability of an
        edge)."""

    @abstractmethod
    def collate(self, labels: np.ndarray) -> Tensor:
        """Labels of equal size, (B, H, W) or of vectors (B, 3, H, W), as a batch: int64 (B, H, W) for classes, float32
        (B, c, H, W) for the others."""

    def check_values(self, arrays: Sequence[np.ndarray]) -> list[str]:
        """Say what looks wrong about the values of some images' labels, or of maps of them: their unit, their code.

        Args:
            arrays: in the layout of the data pipeline, as they are read (before :meth:`finished`).

        Returns:
            the ends of sentences that begin with what holds the values; usually none.
        """
        return []

    def check_maps(self, maps: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> list[str]:
        """Say what looks wrong about predicted maps beside the labels of their images; as :meth:`check_values`."""
        return self.check_values(maps)

    def empty_label(self, height: int, width: int) -> np.ndarray:
        """A label without a valid pixel, in the layout of the data pipeline."""
        return np.full((height, width), self.void, np.uint8)

    def to_drawable(self, prediction: np.ndarray) -> np.ndarray:
        """Return a decoded prediction as :meth:`draw` and :meth:`legend` take it: nothing finite in it is void."""
        return prediction

    def legend(self, arrays: list[np.ndarray]) -> list[tuple[str, tuple[int, int, int]]]:
        """(text, colour) rows that explain the colours of the given arrays (label layout)."""
        return []

    # Geometry of the label in the data pipeline; resampling itself is nearest for every task.

    def scale_label(self, label: np.ndarray, factor: float) -> np.ndarray:
        """The label's values after the picture was enlarged by ``factor`` about the camera's centre."""
        return label

    def flip_label(self, label: np.ndarray) -> np.ndarray:
        """The label's values after its pixels were mirrored left to right."""
        return label

    # The same of raw predictions (B, C, H, W), for averages over several views of a picture.

    def unflip_prediction(self, prediction: Tensor) -> Tensor:
        """What was predicted for a mirrored picture, for the picture."""
        return prediction.flip(-1)

    def to_averageable(self, prediction: Tensor) -> Tensor:
        """A prediction as it may be averaged with others of the same pixels."""
        return prediction

    def unscale_prediction(self, prediction: Tensor, factor: float) -> Tensor:
        """What was predicted for a picture enlarged by ``factor``, as values for the picture (of unchanged size)."""
        return prediction

    def finalize_label(self, label: np.ndarray) -> np.ndarray:
        """The label as the loss sees it, after all augmentation (the field's ignore regions)."""
        return label
