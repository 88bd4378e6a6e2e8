"""Building blocks of several decoders."""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_PRODUCT_SIDE = 80  # of maps that are resized faster by matrix products, in pixels


class SpatialNorm(nn.BatchNorm2d):
    """Batch norm that uses its running statistics where a channel has a single value (a 1x1 map, batch of one)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, H, W)."""
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class ConvBlock(nn.Sequential):
    """Convolution with "same" padding, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, dilation: int = 1):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False),
            SpatialNorm(outputs),
            nn.ReLU(inplace=True),
        )


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (B, C, h, w) bilinearly, pixel centres aligned; return the input itself if it has that size."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def predict_fp32(head: nn.Module, x: Tensor) -> Tensor:
    """Run a head in single precision, on doubles in double: bf16 would round a depth of 3 m to steps of 16 mm."""
    with torch.autocast(x.device.type, enabled=False):
        return head(x if x.dtype == torch.float64 else x.float())


def predict_tasks(heads: nn.ModuleDict, maps: Mapping[str, Tensor], size: Sequence[int]) -> dict[str, Tensor]:
    """Run every task's head on its map and resize the prediction to ``size``: task -> (B, C, *size)."""
    return {task: resize_trained(predict_fp32(heads[task], m), size) for task, m in maps.items()}


def resize_trained(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps as :func:`resize`; in training on the CPU by two matrix products, whose backward pass is fast.

    torch's own backward pass takes seven times as long from 28x36 to 448x576, and half as long from large maps.
    """
    is_slow = x.requires_grad and x.device.type == "cpu" and max(x.shape[-2:]) <= MAX_PRODUCT_SIDE
    if not is_slow or tuple(x.shape[-2:]) == tuple(size):
        return resize(x, size)
    rows, columns = (interpolation_matrix(side, count, x) for side, count in zip(x.shape[-2:], size))
    with torch.autocast("cpu", enabled=False):
        return rows @ (x @ columns.T)


def interpolation_matrix(side: int, count: int, like: Tensor) -> Tensor:
    """Return the matrix (count, side) that resizes a column of pixels as :func:`resize` does.

    Args:
        side: number of pixels.
        count: number of pixels after it.
        like: gives the type and device.
    """
    return resize(torch.eye(side, dtype=like.dtype, device=like.device)[None, None], (count, side))[0, 0]


class Fusion(nn.Module):
    """Fuse maps of several scales into one (B, width, h, w): concatenation, 1x1 convolution, BN, ReLU.

    A 1x1 convolution and bilinear resizing commute, so each scale is projected at its own resolution and the
    projections are added: the wide concatenation at the finest resolution is never built.
    """

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(c, width, 1, bias=False) for c in channels)
        self.norm = SpatialNorm(width)

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Return the fused map at ``size`` (height, width)."""
        total = None
        for feature, project in zip(features, self.project):
            part = resize(project(feature), size)
            total = part if total is None else total + part
        return F.relu(self.norm(total), inplace=True)


def projection_shortcut(inputs: int, outputs: int) -> nn.Sequential | None:
    """Return the shortcut of a residual block that changes the number of channels; None if it does not."""
    if inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), SpatialNorm(outputs))


class Distillation(nn.Module):
    """Multi-modal distillation: add to each task's map (B, C, h, w) a gated message from every other task's map.

        out_k = F_k + sum over l != k of  (W_kl * F_l) x sigmoid(G_kl * F_l)        (*: a 3x3 convolution, no bias)

    A single task keeps its map unchanged.
    """

    def __init__(self, tasks: Iterable[str], channels: int):
        super().__init__()
        names = list(tasks)
        self.messages = nn.ModuleDict(
            {
                task: nn.ModuleDict({other: self._message(channels) for other in names if other != task})
                for task in names
            }
        )

    @staticmethod
    def _message(channels: int) -> nn.Sequential:
        # GLU(a, b) = a x sigmoid(b): W and G in one convolution
        return nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False), nn.GLU(dim=1))

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return task -> refined map."""
        refined = {}
        for task, messages in self.messages.items():
            total = maps[task]
            for other, message in messages.items():  # type: ignore[operator]
                total = total + message(maps[other])
            refined[task] = total
        return refined
