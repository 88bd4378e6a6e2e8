"""The depth estimation task."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from mtcl import metrics
from mtcl.errors import ParameterError
from mtcl.losses import DepthLoss
from mtcl.tasks.base import Task
from mtcl.tasks.class_task import embed_scalar
from mtcl.tasks.palette import RGB, VOID_COLOUR, rgb

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True, kw_only=True)
class Depth(Task):
    """Depth estimation: metres from the camera; arrays float32 (H, W), batches float32 (B, 1, H, W), 0 is void.

    Attributes:
        inverse: labels and predictions are inverse depth from 0 to 1, in a unit of the dataset; near is large. Then
            only the metrics of ``protocol="mtan"`` are defined. The loss is the same, L1.
    """

    inverse: bool = False

    name: str = "depth"
    channels: int = 1
    weight: float = 1.0

    prediction_type: ClassVar[str] = "metres"
    void: ClassVar[float] = 0.0
    positive_threshold: ClassVar[float] = 0.05  # |log ratio|
    negative_threshold: ClassVar[float] = 0.2
    error_label: ClassVar[str] = "22 % off"  # exp(0.2)
    max_plausible_median: ClassVar[float] = 100.0  # metres: a median beyond it is of another unit
    min_drawn_depth: ClassVar[float] = 1e-6  # metres: drawn for a prediction of 0 or less, since 0 itself is void
    max_drawn_depth: ClassVar[float] = 10.0  # metres: the same in all images, so that colours can be compared
    max_drawn_inverse_depth: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        if self.inverse:
            object.__setattr__(self, "prediction_type", "inverse_depth")

    @cached_property
    def criterion(self) -> nn.Module:
        """Return the loss module."""
        return DepthLoss()

    def loss(self, prediction: Tensor, label: Tensor, image_weight: Tensor | None = None) -> Tensor:
        """Compute the loss of raw predictions."""
        return self.criterion(prediction, label, image_weight)

    @staticmethod
    def metric_class() -> "type[Metric]":
        """Return :class:`mtcl.metrics.DepthMetric`."""
        return metrics.DepthMetric

    def metric(self, **options: Any) -> "Metric":
        """Build a new metric; ``options`` are those of :class:`mtcl.metrics.DepthMetric`.

        Raises:
            ParameterError: the protocol is for metres, and the task for inverse depth.
        """
        protocol = options.get("protocol", "standard")
        if self.inverse and protocol in ("standard", "astmt"):
            raise ParameterError(
                "protocol",
                f"={protocol} scores metres, but the depth of this dataset is inverse depth; choose mtan (for all "
                "tasks: evaluation=mtan)",
            )
        return super().metric(**options)

    @property
    def units(self) -> Mapping[str, str]:
        """Return metric -> unit; inverse depth has none."""
        return dict.fromkeys(super().units, "") if self.inverse else super().units

    def valid(self, label: Tensor) -> Tensor:
        """Return the mask of pixels that are positive and finite: bool (B, H, W)."""
        return ((label > 0) & label.isfinite())[:, 0]

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Compute |ln a - ln b|: (B, K, L)."""
        return (_log(a) - _log(b).transpose(1, 2)).abs()

    def embed_label(self, label: Tensor) -> Tensor:
        """Map depths to their logarithms on a line."""
        return embed_scalar(_log(label))

    def sampling_bin(self, label: Tensor) -> Tensor:
        """Bin the logarithm in steps of :attr:`negative_threshold`, from 0.1 m (of inverse depth, 0.0001) on."""
        return (
            ((_log(label)[..., 0] - math.log(1e-4 if self.inverse else 0.1)) / self.negative_threshold)
            .long()
            .clamp(0, 255)
        )

    def collate(self, labels: np.ndarray) -> Tensor:
        """Convert stacked labels to float32 (B, 1, H, W)."""
        return torch.from_numpy(labels).float().unsqueeze(1)

    def decode(self, prediction: Tensor) -> np.ndarray:
        """Convert a prediction (1, H, W) to metres, or inverse depth, (H, W); negative ones are clamped to 0."""
        return prediction.detach()[0].float().clamp(min=0).cpu().numpy()

    def draw(self, array: np.ndarray) -> np.ndarray:
        """Colour near warm and far cold: the colour map Turbo from 0 to :attr:`max_drawn_depth` metres.

        Inverse depth: from 0 to :attr:`max_drawn_inverse_depth`.
        """
        valid = (array > 0) & np.isfinite(array)
        largest = self.max_drawn_inverse_depth if self.inverse else self.max_drawn_depth
        fraction = np.where(valid, array, 0).clip(0, largest) / largest
        nearness = fraction if self.inverse else 1 - fraction
        index = np.round(28 + 212 * nearness).astype(np.uint8)  # without the two ends, nearly as dark as the void
        turbo = cv2.applyColorMap(index, cv2.COLORMAP_TURBO)[..., ::-1]
        return np.where(valid[..., None], turbo, np.array(VOID_COLOUR, np.uint8))

    def to_drawable(self, prediction: np.ndarray) -> np.ndarray:
        """Raise depths of 0 or less to the nearest that is drawn; NaN stays void."""
        return np.maximum(prediction, np.float32(self.min_drawn_depth))

    def legend(self, arrays: list[np.ndarray]) -> list[tuple[str, RGB]]:
        """Return a scale of metres or of inverse depth, and void if it occurs."""
        steps = [0.02, 0.05, 0.1, 0.2, 0.3, 0.4] if self.inverse else [1, 2, 3, 4, 6, 8]
        largest, unit = (self.max_drawn_inverse_depth, "") if self.inverse else (self.max_drawn_depth, " m")
        ticks = np.array([[self.min_drawn_depth, *steps, largest]], np.float32)
        texts = [f"0{unit} or less", *(f"{tick:g}{unit}" for tick in ticks[0, 1:])]
        rows = [(text, rgb(colour)) for text, colour in zip(texts, self.draw(ticks)[0])]
        rows = rows if any((array == ticks[0, 0]).any() for array in arrays) else rows[1:]
        return rows + [("void", VOID_COLOUR)] * any((array == self.void).any() for array in arrays)

    def check_values(self, arrays: Sequence[np.ndarray]) -> list[str]:
        """Describe a median beyond :attr:`max_plausible_median`, which half of the pixels of any scene are below.

        The median of inverse depth is at most 1.
        """
        values = np.concatenate([array[(array > 0) & np.isfinite(array)] for array in arrays])
        median = float(np.median(values)) if values.size else 0.0
        if median <= (1 if self.inverse else self.max_plausible_median):
            return []
        if self.inverse:
            return [f"have a median of {median:.4g}: inverse depth is from 0 to 1, this looks like another unit"]
        return [f"have a median of {median:.4g}: depth is in metres, this looks like millimetres"]

    def empty_label(self, height: int, width: int) -> np.ndarray:
        """Return a label without a valid pixel: float32 (H, W)."""
        return np.full((height, width), self.void, np.float32)

    def scale_label(self, label: np.ndarray, factor: float) -> np.ndarray:
        """Divide the depth by ``factor`` (multiply its inverse): an enlarged object looks that much nearer."""
        return label * np.float32(factor) if self.inverse else label / np.float32(factor)

    def unscale_prediction(self, prediction: Tensor, factor: float) -> Tensor:
        """Multiply the depth by ``factor`` (divide its inverse), the inverse of :meth:`scale_label`."""
        return prediction / factor if self.inverse else prediction * factor

    def to_averageable(self, prediction: Tensor) -> Tensor:
        """Clamp the depth to 0, as every prediction is scored."""
        return prediction.clamp(min=0)


def _log(depth: Tensor) -> Tensor:
    """Compute the logarithm, finite also for the void 0."""
    return depth.float().clamp(1e-6, 1e6).log()
