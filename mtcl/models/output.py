"""Define what passes from backbone to decoder, and what a decoder or model returns: predictions and features."""

from typing import NamedTuple

import torch
from torch import Tensor

Size = tuple[int, int]  # height, width in pixels


class EncodedImage(NamedTuple):
    """The backbone's maps of a batch of images, from which a model predicts as from the images.

    Attributes:
        maps: finest first, each (B, C_i, frame / stride_i).
        size: height and width of the images, in pixels.
        frame: height and width of the padded images that the maps cover.
    """

    maps: list[Tensor]
    size: Size
    frame: Size


class DenseOutput(NamedTuple):
    """Output of ``forward`` of a decoder, and of a whole model.

    A decoder returns maps of the padded image that the backbone saw; :class:`~mtcl.models.EncoderDecoder` crops the
    predictions to the image. Features are not cropped, so ``frame`` says which area they cover.

    Attributes:
        predictions: task -> raw prediction (B, C, H, W): logits, metres, unnormalised vectors.
        features: feature name -> task -> map (B, C_t, h, w), for the regularizer. Every model has ``final``, the maps
            before the logits; the other names are the decoder's own. Without a regulariser they may be left out.
        intermediate: further predictions to supervise, each task -> (B, C, H, W); may be empty.
        frame: height and width of the padded image, in pixels, that a feature map covers.
    """

    predictions: dict[str, Tensor]
    features: dict[str, dict[str, Tensor]]
    intermediate: list[dict[str, Tensor]]
    frame: Size

    @property
    def device(self) -> torch.device:
        """Return the device of the predictions, or of the features of a model without tasks."""
        maps = self.predictions or {name: m for maps in self.features.values() for name, m in maps.items()}
        return next(iter(maps.values())).device
