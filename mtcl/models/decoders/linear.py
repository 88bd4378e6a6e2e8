"""A linear probe for every task, as the DINOv2 and DINOv3 evaluations have it.

    features -> resized to the finest map and concatenated -> per task: batch norm -> final -> 1x1 -> prediction

The 1x1 convolution begins at N(0, 0.01), bias 0 (dinov2/eval/segmentation/models/decode_heads/linear_head.py on
mmsegmentation's head; dinov3/eval/segmentation/models/heads/linear_head.py).
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.blocks import SpatialNorm, predict_tasks, resize
from mtcl.models.output import DenseOutput, Size

INIT_STD = 0.01


class Linear(Decoder):
    """Batch norm and a 1x1 convolution per task; nothing is shared between the tasks but the backbone.

    Features: ``final`` (each task's normalised maps: all that a task has of its own before its logits, so a loss on
    them trains the task's batch norm, and the backbone where that is not frozen).

    Args:
        channels: see :class:`Decoder`.
        strides: see :class:`Decoder`.
        tasks: see :class:`Decoder`.
        dropout: probability with which a channel of the concatenated maps is left out.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], tasks: Mapping[str, int], dropout: float = 0.0):
        super().__init__(channels, strides, tasks)
        width = sum(channels)
        self.dropout = nn.Dropout2d(dropout)
        self.norms = nn.ModuleDict({task: SpatialNorm(width) for task in self.tasks})
        self.logits = nn.ModuleDict({task: nn.Conv2d(width, c, 1) for task, c in self.tasks.items()})
        for layer in self.logits.values():
            assert isinstance(layer, nn.Conv2d)
            assert layer.bias is not None
            nn.init.normal_(layer.weight, std=INIT_STD)
            nn.init.zeros_(layer.bias)
        self.feature_channels = {"final": dict.fromkeys(self.tasks, width)}

    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Concatenate the features, normalise and project them for every task."""
        finest = features[0].shape[-2:]
        maps = self.dropout(torch.cat([resize(x, finest) for x in features], dim=1))
        final = {task: norm(maps) for task, norm in self.norms.items()}
        return DenseOutput(predict_tasks(self.logits, final, size), {"final": final}, [], size)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return nothing: the tasks share the backbone alone."""
        return iter(())
