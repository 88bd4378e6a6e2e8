"""Draw the pixels of a regularizer at random, and sample maps at them, bilinear or nearest."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int]
ORDER_STREAM = 2**32 + 1  # of draw_order; 0 is that of sources, 1 to 2**32 are those of sample ids


class Draw(NamedTuple):
    """All randomness of one step, drawn on the host and moved to the device once."""

    sources: Tensor  # int64 (T, n): for each target its possible sources, in random order; the first is the draw
    pixels: Tensor  # float32 (B, M, 2): row and column of each sampled pixel as a fraction 0..1 of the image
    seeds: Tensor | None = None  # int64 (B,), 0..2**32 - 1: of noise that is computed on the device
    order: Tensor | None = None  # int64 (N,): a random order of a group's N pixels, where they stand in none

    def to(self, device: torch.device | str) -> "Draw":
        """Copy to a device without waiting for it."""
        return Draw(
            self.sources.to(device, non_blocking=True),
            self.pixels.to(device, non_blocking=True),
            None if self.seeds is None else self.seeds.to(device, non_blocking=True),
            None if self.order is None else self.order.to(device, non_blocking=True),
        )


def draw_nothing(ids: Sequence[str]) -> Draw:
    """Return a draw without a source or a pixel, for the images ``ids``."""
    return Draw(sources=torch.zeros(0, 0, dtype=torch.int64), pixels=torch.zeros(len(ids), 0, 2))


def draw_sources(
    seed: int, step: int, allowed: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None
) -> Tensor:
    """Draw the order of each target's sources, independent per target, as a function of (seed, step) and the weights.

    The first of any subset of a target's sources is drawn in proportion to its weight in that subset.

    Args:
        seed: of the regularizer.
        step: training step.
        allowed: per target the indices of its sources.
        weights: per target those of its sources, not all 0; sources of weight 0 are left out. None: equal ones.

    Returns:
        int64 (T, largest number of sources); a target with fewer has its sources repeated.
    """
    rng = _generator(seed, step, 0)
    length = max(map(len, allowed))
    if weights is None:
        orders = [rng.permutation(np.asarray(sources)) for sources in allowed]
    else:
        orders = [_draw_order(rng, np.asarray(s), np.asarray(w)) for s, w in zip(allowed, weights, strict=True)]
    return torch.from_numpy(np.stack([np.resize(order, length) for order in orders]))


def _draw_order(rng: np.random.Generator, items: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Order items by exponential waiting times of these rates (Plackett-Luce); those of rate 0 never come."""
    times = rng.exponential(size=len(items))
    comes = weights > 0
    return items[comes][np.argsort(times[comes] / weights[comes])]


def draw_pixels(seed: int, step: int, ids: Sequence[str], count: int) -> Tensor:
    """Draw ``count`` uniform positions per sample: float32 (B, count, 2), fractions of the image.

    Each is a function of (seed, step, sample id), wherever in whichever batch the sample stands.
    """
    rows = [_generator(seed, step, 1 + zlib.crc32(id.encode())).random((count, 2), dtype=np.float32) for id in ids]
    return torch.from_numpy(np.stack(rows))


def draw_order(seed: int, step: int, count: int) -> Tensor:
    """Draw a random order of ``count`` pixels, int64 (count,), as a function of (seed, step)."""
    return torch.from_numpy(_generator(seed, step, ORDER_STREAM).permutation(count))


def pixel_index(pixels: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Return row and column, int64 (..., K), of drawn positions (..., K, 2) in a map of ``size`` (height, width)."""
    row = (pixels[..., 0] * size[0]).long().clamp(max=size[0] - 1)
    column = (pixels[..., 1] * size[1]).long().clamp(max=size[1] - 1)
    return row, column


def flat_index(pixels: Tensor, size: Size) -> Tensor:
    """Return the row-major index of sampled pixels (..., K, 2) in a map of ``size``: int32 (..., K)."""
    row, column = pixel_index(pixels, size)
    return (row * size[1] + column).int()


def sample_labels(label: Tensor, pixels: Tensor, image: Tensor | None = None) -> Tensor:
    """Sample a label map (B, H, W) or (B, c, H, W) at the drawn pixels (B, K, 2), nearest: (B, K, c).

    With ``image``, int64 (B,), each row of pixels reads the map of that image of the batch, else its own.
    """
    flat = label.flatten(2) if label.ndim == 4 else label.flatten(1)[:, None]  # (B, c, H * W)
    height, width = label.shape[-2:]
    row, column = pixel_index(pixels, (height, width))
    index = row * width + column  # (B, K)
    if image is not None:
        return flat[image[:, None], :, index]
    return flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)


def as_label_map(read: Tensor, ndim: int) -> Tensor:
    """Lay out labels read at pixels (B, K, c) as a batch's label of K rows and one column.

    Args:
        read: result of :func:`sample_labels`.
        ndim: of the label map, 3 or 4.
    """
    return read.mT[..., None] if ndim == 4 else read


def sample_features(feature: Tensor, pixels: Tensor, size: Size, frame: Size) -> Tensor:
    """Sample a feature map bilinearly at the centres of drawn pixels.

    Four neighbours by one gather: unlike ``grid_sample`` its backward is deterministic on CUDA, too. Channels-last maps
    are read in whole rows, and neither layout is ever copied.

    Args:
        feature: (B, C, h, w).
        pixels: (B, K, 2), fractions of the image.
        size: height and width of the labels that the pixels belong to.
        frame: height and width in pixels that the feature map covers, at least ``size``.

    Returns:
        (B, K, C), fp32.
    """
    batch, channels, height, width = feature.shape
    row, column = pixel_index(pixels, size)
    y = ((row + 0.5) * (height / frame[0]) - 0.5).clamp(0, height - 1)
    x = ((column + 0.5) * (width / frame[1]) - 0.5).clamp(0, width - 1)
    y0, x0 = y.long(), x.long()
    y1, x1 = (y0 + 1).clamp(max=height - 1), (x0 + 1).clamp(max=width - 1)
    dy, dx = y - y0, x - x0
    corners = torch.stack([y0 * width + x0, y0 * width + x1, y1 * width + x0, y1 * width + x1], dim=1)
    weights = torch.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx], dim=1)  # (B, 4, K)
    if feature.is_contiguous(memory_format=torch.channels_last):
        image = torch.arange(batch, device=feature.device)[:, None, None] * (height * width)
        values = feature.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, (corners + image).flatten())
        values = values.float().view(*corners.shape, channels)  # (B, 4, K, C)
    else:
        index = corners.flatten(1)[:, None].expand(-1, channels, -1)  # (B, C, 4 K)
        values = feature.flatten(2).gather(2, index).float().unflatten(2, (4, -1)).permute(0, 2, 3, 1)
    return (values * weights[..., None]).sum(dim=1)


def _generator(seed: int, step: int, key: int) -> np.random.Generator:
    """Return a separate random stream.

    The leading constant keeps it apart from those of the data, which also start from (seed, number).
    """
    return np.random.default_rng([0x6D74636C, seed, step, key])
