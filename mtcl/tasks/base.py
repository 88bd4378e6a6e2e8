"""The interface of a task: everything that the rest of the code needs to know about it, in one frozen object."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from mtcl.tasks.names import SCORES

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True)
class Task(ABC):
    """A pixel-wise task. Datasets, decoders, trainer and regularizer ask it and never test its name.

    A label has two layouts. In the data pipeline it is a NumPy array of the image's height and width: uint8 (H, W)
    for classes, edges and saliency, float32 (H, W) for depth, float32 (H, W, 3) for normals. In a batch it is the
    tensor that :meth:`collate` returns. Both mark invalid pixels with :attr:`void`.

    Attributes:
        name: key of the task in configs, batches and results.
        channels: of the prediction.
        weight: of the loss; the default is that of the literature.
        prediction_type: what a pixel of a prediction is: ``class``, ``metres``, ``inverse_depth``, ``direction``,
            ``probability``.
        void: the value of an invalid pixel, and of padding.
        positive_threshold: label distances up to it make a positive pair for the regularizer.
        negative_threshold: label distances from it on make a negative pair.
        error_label: what an error map calls a pixel that is ``negative_threshold`` or more from its label.
    """

    name: str
    channels: int
    weight: float

    prediction_type: ClassVar[str]
    void: ClassVar[float] = 255.0
    positive_threshold: ClassVar[float] = 0.0
    negative_threshold: ClassVar[float] = 1.0
    error_label: ClassVar[str] = "wrong"

    @abstractmethod
    def loss(self, prediction: Tensor, label: Tensor, image_weight: Tensor | None = None) -> Tensor:
        """Compute the loss of raw predictions.

        Args:
            prediction: (B, C, H, W).
            label: as in a batch.
            image_weight: of each image's mean loss, (B,); None: all valid pixels of the batch count alike. Training
                gives it only where ``loss.image_weighting`` asks for it.

        Returns:
            Scalar; a zero that keeps the graph when no pixel is valid.
        """

    @property
    def primary_metric(self) -> str:
        """Return the key of ``metric().compute()`` that tables and the monitored metric of a run use."""
        return SCORES[self.name].primary_metric

    @property
    def higher_is_better(self) -> bool:
        """Return whether a higher primary metric is better."""
        return SCORES[self.name].higher_is_better

    @property
    def units(self) -> Mapping[str, str]:
        """Return metric -> unit; the metrics that are not listed are fractions, shown in percent."""
        return SCORES[self.name].units

    @staticmethod
    @abstractmethod
    def metric_class() -> "type[Metric]":
        """Return the class that :meth:`metric` builds, which is imported only here."""

    def metric(self, **options: Any) -> "Metric":
        """Build a new metric of this task.

        Args:
            **options: of :attr:`metric_class`.

        Returns:
            A metric whose ``update(prediction, label)`` takes raw predictions and whose ``compute()`` returns
            {name: value} in fractions, degrees, metres.
        """
        return self.metric_class()(**options)

    def choose_metric(self, available: Collection[str]) -> tuple[str, bool]:
        """Return the metric that represents the task among the ``available`` ones, and whether higher is better."""
        return SCORES[self.name].choose_metric(available)

    @abstractmethod
    def valid(self, label: Tensor) -> Tensor:
        """Return the mask of labelled pixels of a batch's label: bool (B, H, W)."""

    @abstractmethod
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Compute the pairwise distances of sampled labels, in the task's natural unit.

        Classes: 0 equal, 1 different; depth: |log ratio|; normals: degrees.

        Args:
            a: labels (B, K, c).
            b: labels (B, L, c).

        Returns:
            (B, K, L); undefined where a label is invalid.
        """

    @abstractmethod
    def embed_label(self, label: Tensor) -> Tensor:
        """Map sampled labels to points whose Euclidean distance orders pairs as :meth:`distance` does.

        Args:
            label: (..., K, c).

        Returns:
            float32 (..., K, 3), :meth:`embedded_distance` apart; undefined, possibly NaN, where a label is invalid.
        """

    def embedded_distance(self, distance: float) -> float:
        """Return the Euclidean distance of two points (see :meth:`embed_label`) whose labels are ``distance`` apart."""
        return distance

    @abstractmethod
    def sampling_bin(self, label: Tensor) -> Tensor:
        """Assign sampled labels to bins (classes, ranges) of which a balanced sample holds equal parts.

        Args:
            label: (..., K, c).

        Returns:
            int64 (..., K) in 0..255.
        """

    @abstractmethod
    def draw(self, array: np.ndarray) -> np.ndarray:
        """Colour a label, or a prediction after :meth:`decode`, in label layout: uint8 RGB (H, W, 3)."""

    @abstractmethod
    def decode(self, prediction: Tensor) -> np.ndarray:
        """Convert one raw prediction (C, H, W) to label layout: class, metres, unit vector, or probability."""

    def to_label(self, prediction: Tensor) -> Tensor:
        """Convert raw predictions at sampled pixels (..., K, C) to what labels say there, (..., K, c)."""
        return prediction

    def predict_label(self, prediction: Tensor, confidence: float) -> Tensor:  # noqa: ARG002
        """Convert raw predictions to the label that they say, as a target of :meth:`loss`.

        Args:
            prediction: (B, C, H, W), NaN in padding.
            confidence: of tasks with classes: least probability, 0 to 1, below which a pixel is void.

        Returns:
            as in a batch; undefined where the prediction is NaN.
        """
        return self.to_averageable(prediction)

    @abstractmethod
    def collate(self, labels: np.ndarray) -> Tensor:
        """Convert stacked labels of equal size to the layout of a batch.

        Args:
            labels: (B, H, W), or (B, 3, H, W) of vectors.

        Returns:
            int64 (B, H, W) for classes, float32 (B, c, H, W) for the others.
        """

    def check_values(self, arrays: Sequence[np.ndarray]) -> list[str]:  # noqa: ARG002
        """Describe what looks wrong about the values of some images' labels or maps, such as their unit or code.

        Args:
            arrays: in the layout of the data pipeline, as they are read (before :meth:`finalize_label`).

        Returns:
            The ends of sentences that begin with what holds the values; usually none.
        """
        return []

    def check_maps(self, maps: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> list[str]:  # noqa: ARG002
        """Describe what looks wrong about predicted maps beside the labels of their images.

        Args:
            maps: predictions in label layout.
            labels: of the same images.

        Returns:
            As :meth:`check_values`.
        """
        return self.check_values(maps)

    def empty_label(self, height: int, width: int) -> np.ndarray:
        """Return a label without a valid pixel, in the layout of the data pipeline."""
        return np.full((height, width), self.void, np.uint8)

    def to_drawable(self, prediction: np.ndarray) -> np.ndarray:
        """Return a decoded prediction in which nothing finite is void, for :meth:`draw` and :meth:`legend`."""
        return prediction

    def legend(self, arrays: list[np.ndarray]) -> list[tuple[str, tuple[int, int, int]]]:  # noqa: ARG002
        """Return rows (text, colour) that explain the colours of ``arrays`` in label layout."""
        return []

    # Geometry of the label in the data pipeline; resampling itself is nearest for every task.

    def scale_label(self, label: np.ndarray, factor: float) -> np.ndarray:  # noqa: ARG002
        """Adapt the label's values to an image that was enlarged by ``factor`` about the camera's centre."""
        return label

    def flip_label(self, label: np.ndarray) -> np.ndarray:
        """Adapt the label's values after its pixels were flipped left to right."""
        return label

    # The inverse for raw predictions (B, C, H, W), for averages over several views of an image.

    def unflip_prediction(self, prediction: Tensor) -> Tensor:
        """Convert the prediction for a flipped image to one for the original image."""
        return prediction.flip(-1)

    def to_averageable(self, prediction: Tensor) -> Tensor:
        """Convert a prediction so that it may be averaged with others of the same pixels."""
        return prediction

    def unscale_prediction(self, prediction: Tensor, factor: float) -> Tensor:  # noqa: ARG002
        """Convert the values predicted for an image enlarged by ``factor`` to those of the original image.

        The size of the map does not change.
        """
        return prediction

    def finalize_label(self, label: np.ndarray) -> np.ndarray:
        """Return the label as the loss needs it after all augmentation, with the ignore regions of the literature."""
        return label
