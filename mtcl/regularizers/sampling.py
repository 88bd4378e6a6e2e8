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

    sources: Tensor  # int64 (T, n): for each target its possible sources, in random order; the first is the draw
    pixels: Tensor  # float32 (B, M, 2): row and column of each sampled pixel as a fraction 0..1 of the picture

    def to(self, device: torch.device | str) -> "Draw":
        return Draw(
            self.sources.to(device, non_blocking=True),
            self.pixels.to(device, non_blocking=True),
        )


def draw_sources(seed: int, step: int, allowed: Sequence[Sequence[int]]) -> Tensor:
    """Each target's ``allowed`` sources in uniformly random order, independent per target: int64 (T, most), f(seed,
    step). A target with fewer than the others has its own repeated."""
    rng = _generator(seed, step, 0)
    most = max(map(len, allowed))
    return torch.from_numpy(np.stack([np.resize(rng.permutation(np.asarray(own)), most) for own in allowed]))


def draw_pixels(seed: int, step: int, ids: Sequence[str], count: int) -> Tensor:
    """``count`` uniform positions for each sample: f(seed, step, sample id), wherever in whichever batch it stands."""
    rows = [_generator(seed, step, 1 + zlib.crc32(id.encode())).random((count, 2), dtype=np.float32) for id in ids]
    return torch.from_numpy(np.stack(rows))


def pixel_index(pixels: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Row and column, int64 (B, K), of drawn positions in a map of ``size`` (height, width)."""
    row = (pixels[..., 0] * size[0]).long().clamp(max=size[0] - 1)
    column = (pixels[..., 1] * size[1]).long().clamp(max=size[1] - 1)
    return row, column


def sample_labels(label: Tensor, pixels: Tensor) -> Tensor:
    """A label map (B, H, W) or (B, c, H, W) at the drawn pixels: (B, K, c)."""
    flat = label.flatten(2) if label.ndim == 4 else label.flatten(1)[:, None]  # (B, c, H * W)
    height, width = label.shape[-2:]
    row, column = pixel_index(pixels, (height, width))
    index = (row * width + column)[:, None].expand(-1, flat.shape[1], -1)
    return flat.gather(2, index).transpose(1, 2)


def sample_features(feature: Tensor, pixels: Tensor, size: Size, frame: Size) -> Tensor:
    """A feature map (B, C, h, w) that covers ``frame``, read bilinearly where the drawn pixels of ``size`` lie: (B,
    K, C), fp32.

    Four neighbours by one gather: unlike ``grid_sample`` its backward is deterministic on CUDA, too. Channels-last maps
    are read in whole rows, and neither layout is ever copied.
    """
    batch, channels, height, width = feature.shape
    row, column = pixel_index(pixels, size)
    y = ((row + 0.5) * (height / frame[0]) - 0.5).clamp(0, height - 1)
    x = ((column + 0.5) * (width / frame[1]) - 0.5).clamp(0, width - 1)
    top, left = y.long(), x.long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    dy, dx = y - top, x - left
    corners = torch.stack(
        [top * width + left, top * width + right, bottom * width + left, bottom * width + right], dim=1
    )
    weights = torch.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx], dim=1)  # (B, 4, K)
    if feature.is_contiguous(memory_format=torch.channels_last):
        image = torch.arange(batch, device=feature.device)[:, None, None] * (height * width)
        values = feature.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, (corners + image).flatten())
        values = values.float().view(*corners.shape, channels)  # (B, 4, K, C)
    else:
        index = corners.flatten(1)[:, None].expand(-1, channels, -1)  # (B, C, 4 K)
        values = feature.flatten(2).gather(2, index).float().unflatten(2, (4, -1)).permute(0, 2, 3, 1)
    return (values * weights[..., None]).sum(dim=1)


def balanced_sample(stratum: Tensor, valid: Tensor, count: int, strata: int = 256) -> Tensor:
    """Of M candidates the indices of ``count`` in which each stratum (class, range) present has an equal share: int64
    (..., count), in the candidates' (random) order.

    ``stratum`` int64 (..., M) in 0..strata - 1; invalid candidates are taken only where there is no valid one. A
    stratum with few candidates has them repeated.
    """
    weight = valid.float()
    counts = weight.new_zeros(*weight.shape[:-1], strata).scatter_add_(-1, stratum, weight)
    weight = weight / counts.gather(-1, stratum).clamp(min=1)
    weight = torch.where(valid.any(dim=-1, keepdim=True), weight, 1.0)
    upto = weight.cumsum(dim=-1)
    ticks = (torch.arange(count, device=weight.device) + 0.5) / count  # systematic: no further draw
    found = torch.searchsorted(upto, (ticks * upto[..., -1:]).contiguous())
    return found.clamp(max=stratum.shape[-1] - 1)


def _generator(seed: int, step: int, key: int) -> np.random.Generator:
    """A stream of its own: the leading constant keeps it apart from the data's, which also start from (seed,
    number)."""
    return np.random.default_rng([0x6D74636C, seed, step, key])
