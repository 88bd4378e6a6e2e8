"""MTAN on SegNet: each task attends to the maps of a shared SegNet, in the encoder and in the decoder.

Liu, Johns, Davison. End-to-End Multi-Task Learning with Attention. CVPR 2019, arXiv:1803.10704; layers and sizes as in
its code (github.com/lorenmt/mtan, im2im_pred/model_segnet_mtan.py). A stage has the maps of one stride; u and p are its
first and last map. In the encoder these are the backbone's (VGG-16 with batch norm: after the first and the last
convolution before a pooling), in the decoder the unpooled map and that after the convolutions of the level
(:class:`~mtcl.models.decoders.segnet.SegNet`). A task's map a passes through all stages:

    encoder, finest first:     a_k = pool(block_k(mask_k([u_k, a_(k-1)]) * p_k)),           mask_1(u_1) at the first
    decoder, coarsest first:   b = block_k(a upsampled bilinearly, corners aligned),    a = mask_k([u_k, b]) * p_k
    mask: 1x1 convolution, batch norm, ReLU, 1x1 convolution, batch norm, sigmoid
    block: 3x3 convolution, batch norm, ReLU, from p_k's channels to those of the next stage

Masks are a task's own; the blocks serve all tasks. The last map is ``attended``, from which SegNet's two convolutions
of the task predict. Where a stride has one map (not on VGG), it is both u and p.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.models.decoders.blocks import ConvBlock, SpatialNorm
from mtcl.models.decoders.segnet import Level, SegNet
from mtcl.models.output import DenseOutput, Size


class MTAN(SegNet):
    """SegNet's decoder with attention masks of every task.

    Features: ``final`` (each task's pre-logit map), ``attended`` (each task's map before its own convolutions),
    ``trunk`` (the shared decoder's last map, the same tensor for every task).

    Args:
        channels: see :class:`~mtcl.models.decoders.base.Decoder`.
        strides: see :class:`~mtcl.models.decoders.base.Decoder`.
        tasks: see :class:`~mtcl.models.decoders.base.Decoder`.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], tasks: Mapping[str, int]):
        stages = [[i for i, s in enumerate(strides) if s == stride] for stride in dict.fromkeys(strides)]
        firsts, lasts = [stage[0] for stage in stages], [stage[-1] for stage in stages]
        widths = [channels[index] for index in lasts]
        super().__init__(widths, [strides[index] for index in lasts], tasks)
        self.firsts, self.lasts, self.used_levels = firsts, lasts, {*firsts, *lasts}
        coarser, finer = [*widths[1:], widths[-1]], [widths[0], *widths[:-1]]
        self.encoder_blocks = nn.ModuleList(ConvBlock(a, b) for a, b in zip(widths, coarser))
        self.decoder_blocks = nn.ModuleList(ConvBlock(a, b) for a, b in zip(widths, finer))
        carried = [0, *widths[1:]]  # channels of a where it enters a stage of the encoder
        encoder_masks = [(channels[index] + a, width) for index, a, width in zip(firsts, carried, widths)]
        decoder_masks = [(width + b, b) for width, b in zip(widths, finer)]
        self.encoder_masks = nn.ModuleDict({task: _build_masks(encoder_masks) for task in self.tasks})
        self.decoder_masks = nn.ModuleDict({task: _build_masks(decoder_masks) for task in self.tasks})
        self.feature_channels["attended"] = dict.fromkeys(self.tasks, widths[0])

    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Decode the last maps once for all tasks, then attend to all maps for each task."""
        firsts, lasts = [features[i] for i in self.firsts], [features[i] for i in self.lasts]
        levels = self.decode_levels(lasts)
        attended = {task: self.attend(task, firsts, lasts, levels) for task in self.tasks}
        output = self.predict_from(attended, levels[-1].decoded, size)
        return output._replace(features={**output.features, "attended": attended})

    def attend(self, task: str, firsts: Sequence[Tensor], lasts: Sequence[Tensor], levels: Sequence[Level]) -> Tensor:
        """Return a task's map (B, C_0, h_0, w_0) behind all stages of the encoder and of the decoder.

        Args:
            task: name of the task.
            firsts: the first map of each stage of the encoder, finest first.
            lasts: the last map of each stage.
            levels: of the decoder, coarsest first.
        """
        encoder_masks = cast(nn.ModuleList, self.encoder_masks[task])
        decoder_masks = cast(nn.ModuleList, self.decoder_masks[task])
        x = firsts[0]
        for k, (last, mask, block) in enumerate(zip(lasts, encoder_masks, self.encoder_blocks)):
            if k > 0:
                x = torch.cat([firsts[k], x], dim=1)
            x = F.max_pool2d(block(mask(x) * last), self.poolings[k], ceil_mode=True)
        for level, mask, block in zip(levels, reversed(decoder_masks), reversed(self.decoder_blocks)):
            x = block(F.interpolate(x, size=level.decoded.shape[-2:], mode="bilinear", align_corners=True))
            x = mask(torch.cat([level.unpooled, x], dim=1)) * level.decoded
        return x

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of SegNet's levels and of the blocks, from the encoder's to the decoder's finest."""
        yield from self.encoder_blocks.parameters()
        yield from super().shared_parameters()
        for block in reversed(self.decoder_blocks):
            yield from block.parameters()


def _build_masks(sizes: Iterable[tuple[int, int]]) -> nn.ModuleList:
    """Return a mask per pair of input channels and channels of the map that it multiplies, finest first."""
    return nn.ModuleList(
        nn.Sequential(
            ConvBlock(inputs, width, kernel=1),
            nn.Conv2d(width, width, 1, bias=False),
            SpatialNorm(width),
            nn.Sigmoid(),
        )
        for inputs, width in sizes
    )
