"""Frozen networks whose feature maps a student learns to have: any timm model, before the norm of its last block."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.errors import ParameterError
from mtcl.models.backbones import Backbone, FinalNormFeatureGetter, build_backbone


class Teacher(nn.Module):
    """A frozen backbone that takes images normalised for another network, of any size.

    The images are renormalised to the backbone's own mean and deviation. Sides are resized (bicubic) to the nearest
    multiples that the backbone takes; or, with ``input_size``, the longer side to it, and padded to a square at the
    right and bottom, as SAM expects. Maps cover the image alone: cells of the padding are cut off.

    Args:
        backbone: frozen by this class, and without the norm of its last block from here on.
        input_size: side of the square, in pixels; None: images keep their size.
    """

    def __init__(self, backbone: Backbone, input_size: int | None = None):
        super().__init__()
        self.backbone, self.input_size = backbone, input_size
        if isinstance(backbone.net, FinalNormFeatureGetter):
            backbone.net.model.norm = nn.Identity()
        backbone.requires_grad_(False)
        backbone.is_frozen, backbone.frozen_modules = True, ("",)
        backbone.eval()

    def forward(self, image: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Tensor]:
        """Return the maps (B, C_i, h_i, w_i), finest first.

        Args:
            image: (B, 3, H, W), normalised by ``mean`` and ``std``.
            mean: RGB mean, for images scaled to 0..1.
            std: RGB standard deviation.
        """
        image = renormalize(image, (mean, std), (self.backbone.mean, self.backbone.std))
        height, width = image.shape[-2:]
        if self.input_size is None:
            multiple = self.backbone.multiple
            size = (round_to_multiple(height, multiple), round_to_multiple(width, multiple))
            return self.backbone(resize_bicubic(image, size))
        scale = self.input_size / max(height, width)
        size = (max(round(height * scale), 1), max(round(width * scale), 1))
        image = resize_bicubic(image, size)
        maps = self.backbone(F.pad(image, (0, self.input_size - size[1], 0, self.input_size - size[0])))
        return [m[..., : -(-size[0] // s), : -(-size[1] // s)] for m, s in zip(maps, self.backbone.strides)]


def renormalize(
    image: Tensor,
    source: tuple[Sequence[float], Sequence[float]],
    target: tuple[Sequence[float], Sequence[float]],
) -> Tensor:
    """Return images (B, 3, H, W) that were normalised by one (mean, std) as another one normalises them."""
    if tuple(map(tuple, source)) == tuple(map(tuple, target)):
        return image
    (mean, std), (target_mean, target_std) = source, target
    scale = [s / t for s, t in zip(std, target_std)]
    shift = [(m - n) / t for m, n, t in zip(mean, target_mean, target_std)]
    return image * _fill_channels(image, scale) + _fill_channels(image, shift)


def _fill_channels(image: Tensor, values: Sequence[float]) -> Tensor:
    """Return a tensor (C, 1, 1) like ``image`` of the C values; filled on the device, which nothing waits for."""
    return torch.cat([image.new_full((1, 1, 1), value) for value in values])


def round_to_multiple(side: int, multiple: int) -> int:
    """Return the multiple nearest to ``side``, at least one."""
    return max(int(side / multiple + 0.5), 1) * multiple


def resize_bicubic(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images (B, 3, H, W) bicubically, pixel centres aligned; return the input itself if it has that size."""
    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(image, size=size, mode="bicubic", align_corners=False)


def build_teacher(
    name: str,
    *,
    weights: str | Path | None = None,
    input_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out_indices: Sequence[int] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Teacher:
    """Build a teacher from the name of a timm model.

    Args:
        name: of a timm model.
        weights: see :func:`~mtcl.models.backbones.build_backbone`.
        input_size: see :class:`Teacher`; a model of a fixed size (SAM's) is built for it.
        mean: see :func:`~mtcl.models.backbones.build_backbone`.
        std: see :func:`~mtcl.models.backbones.build_backbone`.
        out_indices: see :func:`~mtcl.models.backbones.build_backbone`.
        kwargs: see :func:`~mtcl.models.backbones.build_backbone`.

    Raises:
        UserError: the name is unknown, or the weights do not fit.
        ParameterError: ``input_size`` is no multiple that the network takes.
    """
    options = dict(kwargs or {})
    if input_size is not None and name.startswith("samvit"):
        options.setdefault("img_size", [input_size, input_size])
    backbone = build_backbone(name, weights=weights, mean=mean, std=std, out_indices=out_indices, kwargs=options)
    if input_size is not None and input_size % backbone.multiple:
        problem = f"={input_size} of {name} must be a multiple of {backbone.multiple}"
        raise ParameterError("input_size", problem)
    return Teacher(backbone, input_size)


def read_teacher_channels(name: str, **options: Any) -> list[int]:
    """Return the channels of a teacher's maps, without weights; the options are those of :func:`build_teacher`."""
    with torch.device("meta"):
        return build_teacher(name, **{**options, "weights": None}).backbone.channels
