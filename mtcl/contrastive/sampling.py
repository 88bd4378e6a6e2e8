"""What is random in the regulariser, and how maps are read at the drawn places."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int]


class Draw(NamedTuple):
    """The randomness of one step, made on the host, moved once."""

    sources: Tensor  # int64 (T, T - 1): for each target the other tasks, in random order; the first is the draw
    pixels: Tensor  # float32 (B, K, 2): row and column of each sampled pixel as a fraction 0..1 of the picture

    def to(self, device: torch.device | str) -> "Draw":
        return Draw(
            self.sources.to(device, non_blocking=True),
            self.pixels.to(device, non_blocking=True),
        )


def draw_sources(seed: int, step: int, num_tasks: int) -> Tensor:
    """Each target's other tasks in uniformly random order, independent per target: f(seed, step)."""
    rng = _generator(seed, step, 0)
    orders = [rng.permutation(np.delete(np.arange(num_tasks), target)) for target in range(num_tasks)]
    return torch.from_numpy(np.stack(orders))


def draw_pixels(seed: int, step: int, ids: Sequence[str], count: int) -> Tensor:
    """``count`` uniform positions for each sample: f(seed, step, sample id), wherever in whichever batch it stands."""
    rows = [_generator(seed, step, 1 + zlib.crc32(id.encode())).random((count, 2), dtype=np.float32) for id in ids]
    return torch.from_numpy(np.stack(rows))


def pixel_index(pixels: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Row and column, int64 (B, K), of drawn positions in a map of ``size`` (height, width)."""
    row = (pixels[..., 0] * size[0]).long().clamp(max=size[0] - 1)
    column = (pixels[..., 1] * size[1]).long().clamp(max=size[1] - 1)
    return row, column


def read_labels(label: Tensor, pixels: Tensor) -> Tensor:
    """A label map (B, H, W) or (B, c, H, W) at the drawn pixels: (B, K, c)."""
    flat = label.flatten(2) if label.ndim == 4 else label.flatten(1)[:, None]  # (B, c, H * W)
    height, width = label.shape[-2:]
    row, column = pixel_index(pixels, (height, width))
    index = (row * width + column)[:, None].expand(-1, flat.shape[1], -1)
    return flat.gather(2, index).transpose(1, 2)


def read_features(feature: Tensor, pixels: Tensor, size: Size, frame: Size) -> Tensor:
    """A feature map (B, C, h, w) that covers ``frame``, read bilinearly where the drawn pixels of ``size`` lie: (B,
    K, C), fp32.

    Four neighbours in a single gather: unlike ``grid_sample`` its backward is deterministic on CUDA, too.
    """
    height, width = feature.shape[-2:]
    row, column = pixel_index(pixels, size)
    y = ((row + 0.5) * (height / frame[0]) - 0.5).clamp(0, height - 1)
    x = ((column + 0.5) * (width / frame[1]) - 0.5).clamp(0, width - 1)
    top, left = y.long(), x.long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    dy, dx = y - top, x - left
    corners = torch.stack([top * width + left, top * width + right, bottom * width + left, bottom * width + right])
    weights = torch.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx])  # (4, B, K)
    index = corners.permute(1, 0, 2).flatten(1)[:, None].expand(-1, feature.shape[1], -1)  # (B, C, 4 K)
    values = feature.flatten(2).gather(2, index).float().unflatten(2, (4, -1))  # (B, C, 4, K)
    return (values * weights.permute(1, 0, 2)[:, None]).sum(dim=2).transpose(1, 2)


def _generator(seed: int, step: int, key: int) -> np.random.Generator:
    """A stream of its own: the leading constant keeps it apart from the data's, which also start from (seed,
    number)."""
    return np.random.default_rng([0x6D74636C, seed, step, key])
