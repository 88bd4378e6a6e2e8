"""A linear probe for every task, as the DINOv2 and DINOv3 evaluations have it.

    features -> resized to the finest map and concatenated -> per task: batch norm -> final -> 1x1 -> prediction

The 1x1 convolution begins at N(0, 0.01), bias 0 (dinov2/eval/segmentation/models/decode_heads/linear_head.py on
mmsegmentation's head; dinov3/eval/segmentation/models/heads/linear_head.py).
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.blocks import SpatialNorm, resize, resize_trained
from mtcl.models.output import DenseOutput, Size

INIT_STD = 0.01


class Linear(Decoder):
    """Batch norm and a 1x1 convolution per task; nothing is shared between the tasks but the backbone.

    The mean and the variance of a channel are the same for every task, so they are computed once; a task's scale and
    shift of the channels are folded into its convolution. The normalised maps of a task are built for the features
    alone (:attr:`builds_features`), and without a loss on them no gradient of their size exists.

    Features: ``final`` (each task's normalised maps: all that a task has of its own before its logits, so a loss on
    them trains the task's scale and shift, and the backbone where that is not frozen).

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
        self.norm = SpatialNorm(width, affine=False)
        self.logits = nn.ModuleDict({task: Probe(width, c) for task, c in self.tasks.items()})
        self.feature_channels = {"final": dict.fromkeys(self.tasks, width)}

    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Concatenate the features, normalise and project them for every task."""
        normed = self._normalise(features)
        maps = {}
        if self.builds_features:
            maps["final"] = {task: probe.rescale(normed) for task, probe in self.logits.items()}  # type: ignore[operator]
        return DenseOutput(self._predict(normed, size), maps, [], size)

    def predict(self, features: list[Tensor], size: Size) -> dict[str, Tensor]:
        """Return task -> prediction (B, C, *size), without the maps that only a regulariser needs."""
        return self._predict(self._normalise(features), size)

    def _normalise(self, features: list[Tensor]) -> Tensor:
        """Return the concatenated maps at the finest map's size, each channel with mean 0 and variance 1."""
        finest = features[0].shape[-2:]
        return self.norm(self.dropout(torch.cat([resize(x, finest) for x in features], dim=1)))

    def _predict(self, normed: Tensor, size: Size) -> dict[str, Tensor]:
        """Project the normalised maps for all tasks in one convolution, and resize each task's part to ``size``."""
        weights, biases = zip(*(probe() for probe in self.logits.values()))
        with torch.autocast(normed.device.type, enabled=False):
            logits = F.conv2d(normed.float(), torch.cat(weights), torch.cat(biases))
        parts = logits.split(list(self.tasks.values()), dim=1)
        return {task: resize_trained(part, size) for task, part in zip(self.tasks, parts)}

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return nothing: the tasks share the backbone alone."""
        return iter(())


class Probe(nn.Module):
    """A scale and a shift of normalised channels, then a 1x1 convolution, as one convolution.

    Args:
        inputs: channels of the normalised maps.
        outputs: channels of the prediction.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(inputs)), nn.Parameter(torch.zeros(inputs))
        self.weight, self.bias = nn.Parameter(torch.empty(outputs, inputs)), nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.weight, std=INIT_STD)

    def rescale(self, normed: Tensor) -> Tensor:
        """Return the scaled and shifted maps (B, C, h, w): the output of a batch norm."""
        zeros, ones = torch.zeros_like(self.shift), torch.ones_like(self.scale)
        return F.batch_norm(normed, zeros, ones, self.scale, self.shift, eps=0.0)  # the fastest scale and shift

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return weight (outputs, inputs, 1, 1) and bias of the convolution of :meth:`rescale`.

        So the rescaled maps need not be computed, and one convolution serves all tasks.
        """
        return (self.weight * self.scale)[:, :, None, None], self.bias + self.weight @ self.shift
