"""DPT: a plain vision transformer's maps reassembled to several scales and fused.

Ranftl, Bochkovskiy, Koltun, "Vision Transformers for Dense Prediction", ICCV 2021; sizes as in DINOv2's depth head
(dinov2/eval/depth/models/decode_heads/dpt_head.py).

    maps of a ViT (one stride) -> reassemble: 1x1, then x4, x2, x1, x1/2        (of a pyramid: 1x1 alone)
    -> 3x3 to one width -> from coarse to fine: residual units, finer, plus the next map -> 3x3, ReLU -> trunk
    per task: 3x3 -> 3x3, ReLU -> final -> 1x1 -> prediction

The backbone's maps come without the class token: its readout is left out ("ignore"). Bilinear resizing aligns pixel
centres throughout, and a fusion block's 1x1 convolution, which commutes with it, comes before it.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.errors import ParameterError
from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.blocks import SpatialNorm, predict_tasks, resize
from mtcl.models.output import DenseOutput, Size

VIT_LEVELS = 4


class DPT(Decoder):
    """Reassemble and fuse the backbone's maps, once or for every task, then a head per task.

    Features: ``final`` (each task's pre-logit map), ``trunk`` (the fused map; with a shared neck the same tensor for
    every task).

    Args:
        channels: see :class:`Decoder`.
        strides: see :class:`Decoder`; four equal ones (a ViT), or ascending ones (a pyramid).
        tasks: see :class:`Decoder`.
        width: channels of the fused maps.
        level_widths: channels of the reassembled maps, one for each map of the backbone.
        head_width: channels of the first convolution of a head.
        final_width: channels of the second one, of the pre-logit map.
        stride: stride of the fused map and of the heads, in pixels.
        shared_neck: whether all tasks share the fused map; else each has a neck of its own.
        use_bn: batch norm in the residual units.

    Raises:
        ParameterError: ``level_widths`` does not fit the backbone's maps.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        tasks: Mapping[str, int],
        width: int = 256,
        level_widths: Sequence[int] = (96, 192, 384, 768),
        head_width: int = 128,
        final_width: int = 64,
        stride: int = 2,
        shared_neck: bool = True,
        use_bn: bool = False,
    ):
        super().__init__(channels, strides, tasks)
        if len(level_widths) != len(channels):
            raise ParameterError(
                "level_widths", f"={list(level_widths)} must have a number for each of the {len(channels)} feature maps"
            )
        is_vit = len(set(strides)) == 1
        if is_vit and len(strides) != VIT_LEVELS:
            raise ParameterError(
                "level_widths", f" is for the {VIT_LEVELS} maps of a ViT, but the backbone gives {len(strides)}"
            )
        self.stride, self.shared_neck = stride, shared_neck
        names = ["shared"] if shared_neck else list(self.tasks)
        self.necks = nn.ModuleDict({name: Neck(channels, level_widths, width, is_vit, use_bn) for name in names})
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(
                    nn.Conv2d(width, head_width, 3, padding=1),
                    nn.Conv2d(head_width, final_width, 3, padding=1),
                    nn.ReLU(inplace=True),
                )
                for task in self.tasks
            }
        )
        self.logits = nn.ModuleDict({task: nn.Conv2d(final_width, c, 1) for task, c in self.tasks.items()})
        self.feature_channels = {
            "final": dict.fromkeys(self.tasks, final_width),
            "trunk": dict.fromkeys(self.tasks, width),
        }

    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Run the necks and the heads."""
        finest = [-(-side // self.stride) for side in size]
        fused = {name: neck(features, finest) for name, neck in self.necks.items()}
        trunk = {task: fused["shared" if self.shared_neck else task] for task in self.tasks}
        final = {task: head(trunk[task]) for task, head in self.heads.items()}
        return DenseOutput(predict_tasks(self.logits, final, size), {"final": final, "trunk": trunk}, [], size)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the shared neck, if there is one."""
        return self.necks["shared"].parameters() if self.shared_neck and len(self.tasks) > 1 else iter(())


class Neck(nn.Module):
    """Reassemble the backbone's maps and fuse them from coarse to fine: maps -> (B, width, h, w).

    Args:
        channels: channels of the backbone's maps, finest first.
        level_widths: channels of the reassembled maps.
        width: channels of the fused maps.
        is_vit: the maps have one stride, and are resampled by 4, 2, 1 and 1/2; else they are a pyramid already.
        use_bn: batch norm in the residual units.
    """

    def __init__(
        self, channels: Sequence[int], level_widths: Sequence[int], width: int, is_vit: bool, use_bn: bool
    ) -> None:
        super().__init__()
        self.projects = nn.ModuleList(nn.Conv2d(c, level, 1) for c, level in zip(channels, level_widths))
        self.resamples = nn.ModuleList(
            build_resampling(index, level) if is_vit else nn.Identity() for index, level in enumerate(level_widths)
        )
        self.convs = nn.ModuleList(nn.Conv2d(level, width, 3, padding=1, bias=False) for level in level_widths)
        self.fusions = nn.ModuleList(  # coarsest first
            FusionBlock(width, use_bn, has_skip=index > 0) for index in range(len(level_widths))
        )
        self.output = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True))

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Return the fused map at ``size`` (height, width)."""
        maps = [
            conv(resample(project(x)))
            for x, project, resample, conv in zip(features, self.projects, self.resamples, self.convs)
        ]
        fused = None
        for index, fusion in enumerate(self.fusions):
            is_last = index == len(maps) - 1
            finer = size if is_last else maps[-index - 2].shape[-2:]
            fused = fusion(maps[-index - 1], fused, finer)
        assert fused is not None
        return self.output(fused)


def build_resampling(index: int, channels: int) -> nn.Module:
    """Return what resamples the ``index``-th of a ViT's four maps: x4, x2, x1, x1/2, learned."""
    if index < 2:
        factor = 4 // 2**index
        return nn.ConvTranspose2d(channels, channels, factor, stride=factor)
    return nn.Identity() if index == 2 else nn.Conv2d(channels, channels, 3, stride=2, padding=1)


class FusionBlock(nn.Module):
    """Add a map to what was fused of the coarser ones, refine the sum and resize it to the next finer map.

    Args:
        width: channels.
        use_bn: batch norm in the residual units.
        has_skip: false for the coarsest map, to which nothing is added.
    """

    def __init__(self, width: int, use_bn: bool, has_skip: bool) -> None:
        super().__init__()
        self.skip_unit = ResidualUnit(width, use_bn) if has_skip else None
        self.unit = ResidualUnit(width, use_bn)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, fused: Tensor | None, size: Sequence[int]) -> Tensor:
        """Return the fused map (B, width, *size) of the map x and the coarser ones."""
        if self.skip_unit is not None and fused is not None:
            x = fused + self.skip_unit(x)
        return resize(self.project(self.unit(x)), size)


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, around a shortcut.

    Args:
        width: channels.
        use_bn: a batch norm after each convolution.
    """

    def __init__(self, width: int, use_bn: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = SpatialNorm(width) if use_bn else nn.Identity()
        self.norm2 = SpatialNorm(width) if use_bn else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Refine x (B, width, h, w)."""
        y = self.norm1(self.conv1(F.relu(x)))
        return x + self.norm2(self.conv2(F.relu(y)))
