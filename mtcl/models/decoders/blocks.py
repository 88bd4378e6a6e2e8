"""Building blocks that several decoders share."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBlock(nn.Sequential):
    """Convolution ("same" size), batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, pixel centres aligned; the input itself where the size already fits."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def predict_fp32(head: nn.Module, x: Tensor) -> Tensor:
    """A head's prediction in single precision: bf16 would round a depth of 3 m to steps of 16 mm."""
    with torch.autocast(x.device.type, enabled=False):
        return head(x.float())


class Fusion(nn.Module):
    """Feature maps of several scales -> one map (B, width, h, w): BN and ReLU of a 1x1 convolution of their
    concatenation.

    A 1x1 convolution and bilinear resizing commute, so each scale is projected at its own resolution and the
    projections are added: the wide concatenation at the finest resolution is never built.
    """

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(c, width, 1, bias=False) for c in channels)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        total = None
        for feature, project in zip(features, self.project):
            part = resize(project(feature), size)
            total = part if total is None else total + part
        return F.relu(self.norm(total), inplace=True)
