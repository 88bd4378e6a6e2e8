"""MTI-Net: tasks exchange features at every scale, and propagate them from coarse to fine.

Vandenhende, Georgoulis, Van Gool. MTI-Net: Multi-Scale Task Interaction Networks for Multi-Task Learning. ECCV 2020,
arXiv:2001.06902.

    coarsest to finest scale, per task:  [feature, the task's map propagated from the coarser scale] -> 2 residual
    blocks -> initial map -> 1x1 -> initial prediction;  initial maps of all tasks -> Propagation -> next finer scale
    per scale:  initial maps of all tasks -> Distillation -> refined maps
    per task:  refined maps of all scales -> Fusion (the paper's feature aggregation) -> final -> 1x1 -> prediction

The initial predictions of all scales are supervised, and left out at inference.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from timm.layers import SqueezeExcite
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from mtcl.errors import ParameterError
from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.blocks import Distillation, Fusion, predict_tasks, projection_shortcut, resize
from mtcl.models.output import DenseOutput, Size

ATTENTION_OVER = ("tasks", "neighbouring_channels")


class Propagation(nn.Module):
    """The feature propagation module: task -> map (B, C, h, w) to task -> map of the same shape, for the finer scale.

    A non-linear function of all tasks' maps gives each pixel and channel a softmax over the tasks. The maps, weighted
    by it, are reduced to one map of C channels, which every task scales by its own squeeze-and-excitation and adds to
    its map.

    Args:
        tasks: names of the T tasks.
        channels: C.
        attention_over: what the softmax runs over. ``tasks``: channel c of every task, as the paper says;
            ``neighbouring_channels``: each T successive channels of the T C concatenated ones, as in the public code.

    Raises:
        ParameterError: ``attention_over`` is neither.
    """

    def __init__(self, tasks: Iterable[str], channels: int, attention_over: str = "tasks"):
        super().__init__()
        if attention_over not in ATTENTION_OVER:
            raise ParameterError("attention_over", f"={attention_over} must be one of {', '.join(ATTENTION_OVER)}")
        names = list(tasks)
        self.attention_over = attention_over
        total = len(names) * channels
        if len(names) > 1:  # the softmax over a single task is 1
            hidden = max(1, total // 4)
            self.attention = nn.Sequential(
                BasicBlock(total, hidden, downsample=projection_shortcut(total, hidden)),
                BasicBlock(hidden, hidden),
                nn.Conv2d(hidden, total, 1),
            )
        self.reduction = BasicBlock(total, channels, downsample=projection_shortcut(total, channels))
        self.excitation = nn.ModuleDict(
            {task: SqueezeExcite(channels, rd_channels=max(1, channels // 16)) for task in names}
        )

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return every task's map with what the tasks share added."""
        shared = torch.cat([maps[task] for task in self.excitation], dim=1)
        if len(self.excitation) > 1:
            num_tasks = len(self.excitation)
            shape, dim = ((num_tasks, -1), 1) if self.attention_over == "tasks" else ((-1, num_tasks), 2)
            weights = self.attention(shared).unflatten(1, shape).softmax(dim=dim)
            shared = (weights * shared.unflatten(1, shape)).flatten(1, 2)
        shared = self.reduction(shared)
        return {task: excite(shared) + maps[task] for task, excite in self.excitation.items()}


class MTINet(Decoder):
    """Maps of every task at every scale of the backbone, with as many channels as the backbone's map of that scale.

    Features: ``final`` (each task's pre-logit map, all scales together), ``initial`` (its map of the finest scale,
    before the distillation).

    Args:
        channels: see :class:`Decoder`.
        strides: see :class:`Decoder`.
        tasks: see :class:`Decoder`.
        pyramid_width: channels of a feature pyramid (FPN) before the decoder, as the paper uses for ResNets; None: no
            pyramid, for the narrow branches of HRNet.
        attention_over: see :class:`Propagation`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        tasks: Mapping[str, int],
        pyramid_width: int | None = None,
        attention_over: str = "tasks",
    ):
        super().__init__(channels, strides, tasks)
        self.pyramid = None if pyramid_width is None else FeaturePyramidNetwork(list(channels), pyramid_width)
        widths = list(channels) if pyramid_width is None else [pyramid_width] * len(channels)
        coarser = [*widths[1:], 0]  # channels that the next coarser scale propagates to a scale
        # All lists go from the finest scale to the coarsest, as the features do.
        self.initial = nn.ModuleList(
            nn.ModuleDict({task: _residual(width + further, width) for task in self.tasks})
            for width, further in zip(widths, coarser)
        )
        self.initial_logits = nn.ModuleList(
            nn.ModuleDict({task: nn.Conv2d(width, c, 1) for task, c in self.tasks.items()}) for width in widths
        )
        self.propagation = nn.ModuleList(Propagation(self.tasks, width, attention_over) for width in widths[1:])
        self.distillation = nn.ModuleList(Distillation(self.tasks, width) for width in widths)
        self.aggregation = nn.ModuleDict({task: Fusion(widths, sum(widths)) for task in self.tasks})
        self.logits = nn.ModuleDict({task: nn.Conv2d(sum(widths), c, 1) for task, c in self.tasks.items()})
        self.feature_channels = {
            "final": dict.fromkeys(self.tasks, sum(widths)),
            "initial": dict.fromkeys(self.tasks, widths[0]),
        }

    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Decode with the initial predictions of all scales as intermediate ones."""
        scales = self._initial_maps(features)
        final = self._final_maps(scales)
        intermediate = [self._predictions(logits, maps, size) for logits, maps in zip(self.initial_logits, scales)]
        predictions = self._predictions(self.logits, final, size)
        return DenseOutput(predictions, {"final": final, "initial": scales[0]}, intermediate, size)

    def predict(self, features: list[Tensor], size: Size) -> dict[str, Tensor]:
        """Return the final predictions; the initial heads are not run."""
        return self._predictions(self.logits, self._final_maps(self._initial_maps(features)), size)

    def _initial_maps(self, features: list[Tensor]) -> list[dict[str, Tensor]]:
        """Return each scale's initial maps, finest first."""
        if self.pyramid is not None:
            features = list(self.pyramid(OrderedDict((str(i), f) for i, f in enumerate(features))).values())
        scales: list[dict[str, Tensor]] = []
        for i in reversed(range(len(features))):
            feature = features[i]
            inputs = dict.fromkeys(self.tasks, feature)
            if scales:
                propagated = self.propagation[i](scales[0])
                inputs = {t: torch.cat([feature, resize(m, feature.shape[-2:])], dim=1) for t, m in propagated.items()}
            layers = self.initial[i]
            scales.insert(0, {task: layers[task](inputs[task]) for task in self.tasks})  # type: ignore[index]
        return scales

    def _final_maps(self, scales: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        refined = [distil(maps) for distil, maps in zip(self.distillation, scales)]
        return {
            task: fuse([maps[task] for maps in refined], refined[0][task].shape[-2:])
            for task, fuse in self.aggregation.items()
        }

    @staticmethod
    def _predictions(logits: nn.Module, maps: dict[str, Tensor], size: Size) -> dict[str, Tensor]:
        return predict_tasks(cast(nn.ModuleDict, logits), maps, size)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return all up to the distillation, which feeds every task's maps into those of every other."""
        if self.pyramid is not None:
            yield from self.pyramid.parameters()
        yield from self.initial.parameters()
        yield from self.propagation.parameters()


def _residual(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(inputs, outputs, downsample=projection_shortcut(inputs, outputs)), BasicBlock(outputs, outputs)
    )
