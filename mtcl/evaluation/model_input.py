"""From a batch to what a model takes: normalised images, or a frozen backbone's maps of them from a cache."""

import torch
from torch import Tensor

from mtcl.data import Batch, prepare_batch, prepare_features
from mtcl.models import DenseModel, EncodedImage, EncoderDecoder


def prepare_input(
    batch: Batch, model: DenseModel, device: torch.device | str
) -> tuple[Tensor | EncodedImage, dict[str, Tensor]]:
    """Copy a batch to ``device`` without waiting for it.

    Args:
        batch: a collated batch; its ``features`` are used where it has any.
        model: whose normalisation or padding applies.
        device: target device.

    Returns:
        The model's input, and the labels by task.
    """
    if "features" not in batch:
        return prepare_batch(batch, model.mean, model.std, device)
    assert isinstance(model, EncoderDecoder)  # others have no cache: see mtcl.training.feature_filling
    maps, labels = prepare_features(batch, device)
    height, width = batch["image"].shape[-2:]
    return EncodedImage(maps, (height, width), model.padded_size((height, width))), labels
