"""SegNet's decoder with hard parameter sharing: one decoder for all tasks, which unpools by the encoder's indices.

Badrinarayanan, Kendall, Cipolla. SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation. PAMI
2017, arXiv:1511.00561. The sizes are those of MTAN's code (github.com/lorenmt/mtan, im2im_pred/model_segnet_split.py),
whose encoder is VGG-16 with batch norm (backbone vgg16_bn, the maps before its poolings):

    coarsest map -> max pooling -> per level, coarsest first: unpooling to where the level's map has its maxima
    -> 3x3 convolutions, of which the first leads to the next finer level's channels -> trunk
    per task: trunk -> 3x3 without norm and ReLU -> final -> 1x1 -> prediction

Of all maps but the coarsest only the positions of their maxima are used. Where two maps have the same stride (of a ViT,
of a dilated ResNet) there is no pooling between them, and nothing is unpooled.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.blocks import ConvBlock, predict_tasks
from mtcl.models.output import DenseOutput, Size

LAST_POOLING = 2  # of the coarsest map


class Level(NamedTuple):
    """Maps of a level of the decoder, at the stride of the backbone's map: after the unpooling, after the layers."""

    unpooled: Tensor
    decoded: Tensor


class SegNet(Decoder):
    """A decoder that all tasks share, and two convolutions per task.

    Features: ``final`` (each task's pre-logit map), ``trunk`` (the decoder's last map, the same tensor for every task).

    Args:
        channels: see :class:`Decoder`.
        strides: see :class:`Decoder`.
        tasks: see :class:`Decoder`.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], tasks: Mapping[str, int]):
        super().__init__(channels, strides, tasks)
        self.used_levels = {len(self.channels) - 1}  # of the others only indices: they get no gradient
        coarser = [*self.strides[1:], LAST_POOLING * self.strides[-1]]
        self.poolings = [max(1, round(b / a)) for a, b in zip(self.strides, coarser)]
        outputs = [self.channels[0], *self.channels[:-1]]
        self.levels = nn.ModuleList(
            _build_level(inputs, width, num_convolutions=2 if level < 2 else 3)
            for level, (inputs, width) in enumerate(zip(self.channels, outputs))
        )
        width = self.channels[0]
        self.heads = nn.ModuleDict({task: nn.Conv2d(width, width, 3, padding=1) for task in self.tasks})
        self.logits = nn.ModuleDict({task: nn.Conv2d(width, c, 1) for task, c in self.tasks.items()})
        self.feature_channels = {
            "final": dict.fromkeys(self.tasks, width),
            "trunk": dict.fromkeys(self.tasks, width),
        }

    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Decode the coarsest map along the maxima of the others."""
        trunk = self.decode_levels(features)[-1].decoded
        return self.predict_from(dict.fromkeys(self.tasks, trunk), trunk, size)

    def decode_levels(self, features: Sequence[Tensor]) -> list[Level]:
        """Return the maps of every level, the coarsest level first; ``features`` has one map per level."""
        levels = []
        x = F.max_pool2d(features[-1], self.poolings[-1], ceil_mode=True)
        for feature, pooling, layers in reversed(list(zip(features, self.poolings, self.levels))):
            unpooled = unpool(x, feature, pooling)
            x = layers(unpooled)
            levels.append(Level(unpooled, x))
        return levels

    def predict_from(self, maps: Mapping[str, Tensor], trunk: Tensor, size: Size) -> DenseOutput:
        """Run every task's convolutions on its map (B, channels[0], h, w)."""
        final = {task: head(maps[task]) for task, head in self.heads.items()}
        predictions = predict_tasks(self.logits, final, size)
        return DenseOutput(predictions, {"final": final, "trunk": dict.fromkeys(final, trunk)}, [], size)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the decoder's parameters but those of the tasks' convolutions, coarsest level first."""
        for layers in reversed(self.levels):
            yield from layers.parameters()


def unpool(x: Tensor, feature: Tensor, pooling: int) -> Tensor:
    """Put each value of x where ``feature`` has the maximum of its window, and zeros elsewhere.

    The same as ``max_unpool2d``, in operations that are deterministic on CUDA and that ONNX has.

    Args:
        x: (B, C, ceil(H / pooling), ceil(W / pooling)).
        feature: (B, C, H, W); no gradient flows to it.
        pooling: side of a window; 1: x is returned.
    """
    if pooling == 1:
        return x
    height, width = feature.shape[-2:]
    _, indices = F.max_pool2d(feature.detach(), pooling, ceil_mode=True, return_indices=True)
    pixels = torch.arange(height * width, device=x.device, dtype=torch.int32).view(height, width)
    is_maximum = _repeat(indices.int(), pooling)[..., :height, :width] == pixels
    return _repeat(x, pooling)[..., :height, :width] * is_maximum


def _repeat(x: Tensor, times: int) -> Tensor:
    """Repeat each pixel of (B, C, h, w) in a square of ``times`` x ``times``."""
    return x.repeat_interleave(times, dim=-2).repeat_interleave(times, dim=-1)


def _build_level(inputs: int, width: int, num_convolutions: int) -> nn.Sequential:
    return nn.Sequential(*(ConvBlock(width if i else inputs, width) for i in range(num_convolutions)))
