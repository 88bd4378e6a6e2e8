"""The interface of a multi-task model, and the common one: a backbone followed by a decoder."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.models.backbones import Backbone
from mtcl.models.decoders.base import Decoder
from mtcl.models.output import DenseOutput, EncodedImage, Size


class DenseModel(nn.Module, ABC):
    """One network for several dense prediction tasks; takes a normalised image (B, 3, H, W) of any height and width.

    Attributes:
        backbone: the pretrained part.
        mean: RGB mean of the normalisation that the model expects, for images scaled to 0..1.
        std: RGB standard deviation of that normalisation.
        feature_channels: feature name -> task -> C_t of the maps in :attr:`DenseOutput.features`.
        reads_labels: whether :meth:`forward` takes a training batch's labels as well, as an :class:`EncoderDecoder`'s
            does for its decoder (:attr:`Decoder.reads_labels`).
    """

    backbone: Backbone
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    feature_channels: dict[str, dict[str, int]]
    reads_labels: bool = False

    @abstractmethod
    def forward(self, image: Tensor | EncodedImage) -> DenseOutput:
        """Return the predictions, features and intermediate predictions, for training.

        Args:
            image: normalised (B, 3, H, W); or the backbone's maps of it, which an :class:`EncoderDecoder` alone takes.
        """

    @abstractmethod
    def predict(self, image: Tensor | EncodedImage) -> dict[str, Tensor]:
        """Return task -> raw prediction (B, C, H, W): the path of inference and export, without training-only heads."""

    def auxiliary_losses(self, output: DenseOutput, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return further losses of the model itself (load balancing of experts, ...): name -> weighted scalar."""
        del output, labels
        return {}

    def compute_task_errors(
        self, output: DenseOutput, labels: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Compute the model's own errors of tasks; see :meth:`~mtcl.models.decoders.Decoder.compute_task_errors`."""
        del output, labels
        return {}

    def leave_out_features(self) -> None:
        """Let :meth:`forward` leave out features that cost time of their own, for a training without a regulariser."""
        return

    @abstractmethod
    def backbone_parameters(self) -> Iterable[nn.Parameter]:
        """Return the pretrained parameters, which have a learning rate of their own."""

    @abstractmethod
    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that all tasks share, for gradient-based balancers."""


class EncoderDecoder(DenseModel):
    """A timm backbone followed by a decoder.

    Args:
        backbone: gives feature maps; padding of the image follows its ``multiple``.
        decoder: built for the backbone's channels and strides.
    """

    def __init__(self, backbone: Backbone, decoder: Decoder):
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        if decoder.used_levels is not None:
            backbone.freeze_unused(decoder.used_levels)
        self.mean, self.std = backbone.mean, backbone.std
        self.feature_channels = decoder.feature_channels
        self.reads_labels = decoder.reads_labels

    def forward(self, image: Tensor | EncodedImage, labels: Mapping[str, Tensor] | None = None) -> DenseOutput:
        """Return the decoder's output with predictions cropped to the image.

        Args:
            image: normalised (B, 3, H, W), or the backbone's maps of it.
            labels: task -> label in batch layout, for a decoder that reads labels in training; None: without.
        """
        encoded = self.encode(image) if isinstance(image, Tensor) else image
        more = (labels,) if self.reads_labels else ()
        output = self.decoder(encoded.maps, encoded.frame, *more)
        return output._replace(
            predictions=crop_to_image(output.predictions, encoded.size),
            intermediate=[crop_to_image(maps, encoded.size) for maps in output.intermediate],
        )

    def predict(self, image: Tensor | EncodedImage) -> dict[str, Tensor]:
        """Return task -> raw prediction (B, C, H, W); ``image``: see :meth:`forward`."""
        encoded = self.encode(image) if isinstance(image, Tensor) else image
        return crop_to_image(self.decoder.predict(encoded.maps, encoded.frame), encoded.size)

    def encode(self, image: Tensor) -> EncodedImage:
        """Return the backbone's maps of a normalised image (B, 3, H, W), which is padded to the backbone's multiple."""
        height, width = image.shape[-2:]
        image, frame = pad_to_multiple(image, (self.backbone.multiple, self.backbone.multiple))
        return EncodedImage(self.backbone(image), (height, width), frame)

    def auxiliary_losses(self, output: DenseOutput, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the decoder's own losses."""
        return self.decoder.auxiliary_losses(output, labels)

    def compute_task_errors(
        self, output: DenseOutput, labels: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Compute the decoder's own errors of tasks."""
        return self.decoder.compute_task_errors(output, labels)

    def padded_size(self, size: Size) -> Size:
        """Return the height and width of the padded image for an image of this ``size``."""
        return pad_size(size, (self.backbone.multiple, self.backbone.multiple))

    def leave_out_features(self) -> None:
        """Let the decoder leave out features that cost time of their own."""
        self.decoder.builds_features = False

    def backbone_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the backbone."""
        return self.backbone.parameters()

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the backbone's parameters and those that the decoder shares between tasks."""
        yield from self.backbone.parameters()
        yield from self.decoder.shared_parameters()


def pad_to_multiple(image: Tensor, multiples: Size) -> tuple[Tensor, Size]:
    """Pad a normalised image (B, 3, H, W) at its right and bottom to multiples of ``multiples``.

    Returns:
        The padded image and its height and width.
    """
    height, width = image.shape[-2:]
    frame = pad_size((height, width), multiples)
    if frame != (height, width):  # zero is the mean colour after normalisation
        image = F.pad(image, (0, frame[1] - width, 0, frame[0] - height))
    return image, frame


def pad_size(size: Size, multiples: Size) -> Size:
    """Round height and width up to multiples of ``multiples``."""
    return (-(-size[0] // multiples[0]) * multiples[0], -(-size[1] // multiples[1]) * multiples[1])


def crop_to_image(maps: dict[str, Tensor], size: Size) -> dict[str, Tensor]:
    """Crop maps (B, C, H, W) of a padded image to the ``size`` (height, width) of the image."""
    return {task: m[..., : size[0], : size[1]] for task, m in maps.items()}
