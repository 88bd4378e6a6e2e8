"""Controls of the contrast: what relates the pixels in place of the labels of the image itself.

Each keeps the sources, the projectors and the loss of the method and takes away a part of what the labels tell:

- ``other_image``: another image's labels at the same positions. What all images share, the floor at the bottom, stays.
- ``random``: another image's labels at that image's own random positions. Nothing about the pixels stays.
- ``distance``: the distance of two pixels in the image. Which pixels the source labels still decides which ones take
  part, so that images and counts are those of the method; no label's value is read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtcl.errors import ParameterError

SOURCE_LABELS = ("true", "other_image", "random", "distance")
DISTANCE_THRESHOLDS = [0.15, 0.3]  # positive up to the first, negative from the second, of the image's height and width


def normalize_source_labels(value: bool | str) -> str:
    """Return one of :data:`SOURCE_LABELS`; the bool True, as YAML reads ``true``, is the text."""
    name = "true" if value is True else value
    if name not in SOURCE_LABELS:
        raise ParameterError("source_labels", f"={value} is not known; choose {', '.join(SOURCE_LABELS)}")
    return str(name)


def choose_other_image(has_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Choose another image of the batch that has a task's labels: the next one in cyclic order.

    A batch's images stand in random order already, so that this needs no further draw.

    Args:
        has_labels: bool (S, B).

    Returns:
        per task and image the index of the other image, int64 (S, B), and whether there is one (elsewhere the index is
        that of any image).
    """
    count = has_labels.shape[1]
    image = torch.arange(count, device=has_labels.device)
    order = (image[:, None] + torch.arange(1, max(count, 2), device=has_labels.device)) % count  # (B, B - 1)
    available = has_labels[:, order] & (order != image[:, None])  # a batch of one has no other image
    nearest = available.to(torch.uint8).argmax(dim=-1)  # (S, B)
    return order[image, nearest], available.any(dim=-1)


def embed_positions(pixels: Tensor) -> Tensor:
    """Map positions (..., 2), fractions of the image's height and width, to points (..., 3) like those of labels."""
    return F.pad(pixels, (0, 1))
