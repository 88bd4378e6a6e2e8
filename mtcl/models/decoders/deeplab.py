"""DeepLab heads: the standard multi-task baseline on (dilated) ResNets; with one task the single-task baseline.

Chen et al. Rethinking Atrous Convolution for Semantic Image Segmentation. 2017, arXiv:1706.05587 (v3).
Chen et al. Encoder-Decoder with Atrous Separable Convolution. ECCV 2018, arXiv:1802.02611 (v3+, the skip).

    per task:  coarsest feature -> ASPP -> [with a skip: upsampled, and the finest feature through a 1x1] -> 3x3
    convolutions -> final -> 1x1 -> prediction

Only the backbone is shared. The baseline of Vandenhende et al. (PAMI 2021) and of MTI-Net is v3 on a backbone
dilated to stride 8: ``skip_width`` 0, ``depth`` 1.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.blocks import ConvBlock, predict_tasks, resize
from mtcl.models.output import DenseOutput, Size


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: (B, inputs, h, w) -> (B, width, h, w).

    A 1x1 convolution, 3x3 convolutions with the dilations ``rates`` and the mean over the map are concatenated and
    projected. The branch of the mean has a bias in place of batch norm, which cannot train on one image's 1x1 map.
    """

    def __init__(self, inputs: int, width: int, rates: Sequence[int], dropout: float):
        super().__init__()
        self.branches = nn.ModuleList(
            [ConvBlock(inputs, width, 1), *(ConvBlock(inputs, width, dilation=r) for r in rates)]
        )
        self.pooled = nn.Conv2d(inputs, width, 1)
        self.project = nn.Sequential(ConvBlock((2 + len(rates)) * width, width, 1), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches and project them."""
        mean = F.relu(self.pooled(x.mean((2, 3), keepdim=True)))
        return self.project(torch.cat([*(b(x) for b in self.branches), mean.expand(-1, -1, *x.shape[-2:])], dim=1))


class DeepLabHead(nn.Module):
    """The layers of one task, from the backbone's maps to its pre-logit map (B, width, h, w)."""

    def __init__(
        self,
        channels: Sequence[int],
        width: int,
        rates: Sequence[int],
        depth: int,
        skip_width: int,
        dropout: float,
    ):
        super().__init__()
        self.aspp = ASPP(channels[-1], width, rates, dropout)
        self.skip = ConvBlock(channels[0], skip_width, 1) if skip_width else None
        self.layers = nn.Sequential(*(ConvBlock(width if i else width + skip_width, width) for i in range(depth)))

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return the pre-logit map of backbone features, finest first."""
        x = self.aspp(features[-1])
        if self.skip is not None:
            x = torch.cat([resize(x, features[0].shape[-2:]), self.skip(features[0])], dim=1)
        return self.layers(x)


class DeepLab(Decoder):
    """One DeepLab head per task.

    Features: ``final`` (each task's pre-logit map), ``trunk`` (the backbone's coarsest map, on which all pyramids work:
    the same tensor for every task).

    Args:
        channels: see :class:`Decoder`.
        strides: see :class:`Decoder`.
        tasks: see :class:`Decoder`.
        width: channels of a head.
        rates: dilations of the spatial pyramid pooling.
        depth: number of 3x3 convolutions after the pyramid.
        skip_width: channels taken from the finest feature map; the head then ends at its stride. 0: no skip, and the
            head ends at the stride of the coarsest map.
        dropout: probability, after the pyramid.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        tasks: Mapping[str, int],
        width: int = 256,
        rates: Sequence[int] = (12, 24, 36),
        depth: int = 2,
        skip_width: int = 48,
        dropout: float = 0.5,
    ):
        super().__init__(channels, strides, tasks)
        self.used_levels = {0, len(self.channels) - 1} if skip_width else {len(self.channels) - 1}
        self.heads = nn.ModuleDict(
            {task: DeepLabHead(channels, width, rates, depth, skip_width, dropout) for task in self.tasks}
        )
        self.logits = nn.ModuleDict({task: nn.Conv2d(width, c, 1) for task, c in self.tasks.items()})
        self.feature_channels = {
            "final": dict.fromkeys(self.tasks, width),
            "trunk": dict.fromkeys(self.tasks, self.channels[-1]),
        }

    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Run every task's head on the backbone's maps."""
        final = {task: head(features) for task, head in self.heads.items()}
        predictions = predict_tasks(self.logits, final, size)
        return DenseOutput(predictions, {"final": final, "trunk": dict.fromkeys(final, features[-1])}, [], size)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return nothing: tasks share the backbone only."""
        return iter(())
