"""The standard multi-task baseline: task-specific heads on fused multi-scale features.

    features (strides 4..32) -> Fusion at 1/4 -> trunk -> per task: convolutions -> final -> 1x1 -> prediction

PAD-Net, MTI-Net, ATRC and InvPT call this the multi-task baseline (HRNet's fusion by concatenation, then a head for
each task); with one task it is their single-task baseline.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.blocks import ConvBlock, Fusion, predict_tasks
from mtcl.models.output import DenseOutput, Size


class MultiHead(Decoder):
    """Convolutional heads on one shared feature map.

    Features: ``final`` (each task's pre-logit map), ``trunk`` (the shared map, the same tensor for every task).

    Args:
        channels: see :class:`Decoder`.
        strides: see :class:`Decoder`.
        tasks: see :class:`Decoder`.
        width: channels of the shared map.
        head_width: channels of a head's convolutions and of the pre-logit map.
        depth: number of 3x3 convolutions of a head.
        stride: stride of the shared map and of the heads, in pixels.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        tasks: Mapping[str, int],
        width: int = 128,
        head_width: int = 64,
        depth: int = 2,
        stride: int = 4,
    ):
        super().__init__(channels, strides, tasks)
        self.stride = stride
        self.fusion = Fusion(channels, width)
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(*(ConvBlock(width if i == 0 else head_width, head_width) for i in range(depth)))
                for task in self.tasks
            }
        )
        self.logits = nn.ModuleDict({task: nn.Conv2d(head_width, c, 1) for task, c in self.tasks.items()})
        self.feature_channels = {
            "final": dict.fromkeys(self.tasks, head_width),
            "trunk": dict.fromkeys(self.tasks, width),
        }

    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Fuse the features, run the heads."""
        trunk = self.fusion(features, [-(-s // self.stride) for s in size])
        final = {task: head(trunk) for task, head in self.heads.items()}
        predictions = predict_tasks(self.logits, final, size)
        return DenseOutput(predictions, {"final": final, "trunk": dict.fromkeys(final, trunk)}, [], size)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the fusion."""
        return self.fusion.parameters()
