"""What every multi-task model promises, whatever is inside."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.models.backbones import Backbone
from mtcl.models.decoders.base import Decoder

Size = tuple[int, int]


class DenseOutput(NamedTuple):
    """What a forward pass in training gives.

    ``taps`` are the feature maps that a regulariser may look at: tap name -> task -> (B, C_t, h, w). Every model names
    its final pre-logit map ``final``. A tap covers ``frame`` (height, width in pixels), which is the picture, or a
    little more at its right and bottom where the model had to pad it.
    """

    predictions: dict[str, Tensor]  # raw, (B, C, H, W): logits, metres, unnormalised vectors
    features: dict[str, dict[str, Tensor]]
    intermediate: list[dict[str, Tensor]]  # further predictions to supervise; may be empty
    frame: Size


class DenseModel(nn.Module, ABC):
    """One network, many pixel-wise tasks. Takes a normalised picture (B, 3, H, W) of any height and width."""

    backbone: Backbone
    mean: tuple[float, float, float]  # of the normalisation it expects, pictures scaled to 0..1
    std: tuple[float, float, float]
    feature_channels: dict[str, dict[str, int]]  # tap -> task -> C_t, known before the first forward

    @abstractmethod
    def forward(self, image: Tensor) -> DenseOutput:
        """Predictions, taps and intermediate predictions of a normalised picture."""

    @abstractmethod
    def predict(self, image: Tensor) -> dict[str, Tensor]:
        """Task -> raw prediction (B, C, H, W): the inference and export path, with nothing of training in it."""

    def auxiliary_losses(self, output: DenseOutput, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Further losses of the model's own (heads of another kind, balance of experts): name -> scalar, weighted."""
        return {}

    @abstractmethod
    def backbone_parameters(self) -> Iterable[nn.Parameter]:
        """The pretrained part, which trains at a learning rate of its own."""

    @abstractmethod
    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """What all tasks share, for balancers that look at gradients."""


class EncoderDecoder(DenseModel):
    """A timm backbone and a decoder."""

    def __init__(self, backbone: Backbone, decoder: Decoder):
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        if decoder.used_levels is not None:
            backbone.freeze_unused(decoder.used_levels)
        self.mean, self.std = backbone.mean, backbone.std
        self.feature_channels = decoder.feature_channels

    def forward(self, image: Tensor) -> DenseOutput:
        size, frame, features = self._features(image)
        output = self.decoder(features, frame)
        intermediate = [crop_to_image(maps, size) for maps in output.intermediate]
        return DenseOutput(crop_to_image(output.predictions, size), output.features, intermediate, frame)

    def predict(self, image: Tensor) -> dict[str, Tensor]:
        size, frame, features = self._features(image)
        return crop_to_image(self.decoder.predict(features, frame), size)

    def _features(self, image: Tensor) -> tuple[Size, Size, list[Tensor]]:
        """The picture's size, the frame it was padded to, the backbone's maps of that frame."""
        height, width = image.shape[-2:]
        image, frame = pad_to_multiple(image, (self.backbone.multiple, self.backbone.multiple))
        return (height, width), frame, self.backbone(image)

    def backbone_parameters(self) -> Iterable[nn.Parameter]:
        return self.backbone.parameters()

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        yield from self.backbone.parameters()
        yield from self.decoder.shared_parameters()


def pad_to_multiple(image: Tensor, multiples: Size) -> tuple[Tensor, Size]:
    """A normalised picture (B, 3, H, W) padded at its right and bottom to such multiples, and the size it has then."""
    height, width = image.shape[-2:]
    frame = (-(-height // multiples[0]) * multiples[0], -(-width // multiples[1]) * multiples[1])
    if frame != (height, width):  # zero is the mean colour after normalisation
        image = F.pad(image, (0, frame[1] - width, 0, frame[0] - height))
    return image, frame


def crop_to_image(maps: dict[str, Tensor], size: Size) -> dict[str, Tensor]:
    """The part of maps (B, C, H, W) that shows the picture."""
    return {task: m[..., : size[0], : size[1]] for task, m in maps.items()}
