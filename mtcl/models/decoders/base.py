"""What a decoder is given and what it gives back."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn


class DecoderOutput(NamedTuple):
    predictions: dict[str, Tensor]  # raw, (B, C, H, W)
    features: dict[str, dict[str, Tensor]]  # tap -> task -> (B, C_t, h, w); "final" is always there
    intermediate: list[dict[str, Tensor]]


class Decoder(nn.Module, ABC):
    """From a backbone's feature maps to every task's prediction.

    A subclass is made as ``SomeDecoder(channels, strides, tasks, **its own options)``: ``channels`` and ``strides``
    of the feature maps, finest first; ``tasks`` maps each task's name to the channels of its prediction.
    """

    feature_channels: dict[str, dict[str, int]]
    used_levels: Collection[int] | None = None  # which of the feature maps; None: all

    def __init__(self, channels: Sequence[int], strides: Sequence[int], tasks: Mapping[str, int]):
        super().__init__()
        self.channels, self.strides, self.tasks = list(channels), list(strides), dict(tasks)

    @abstractmethod
    def forward(self, features: list[Tensor], size: tuple[int, int]) -> DecoderOutput:
        """``features`` (B, C_i, size / stride_i), finest first -> predictions of ``size`` (height, width)."""

    def predict(self, features: list[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """The predictions alone. A decoder with heads for training only leaves them out here."""
        return self.forward(features, size).predictions

    @abstractmethod
    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """The decoder's parameters that serve more than one task."""
