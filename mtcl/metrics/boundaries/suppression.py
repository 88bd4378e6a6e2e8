"""Non-maximum suppression of edge maps, after Dollar and Zitnick's Structured Edge Detection Toolbox."""

from typing import NamedTuple

import numpy as np
from scipy.ndimage import correlate1d


class SuppressionConfig(NamedTuple):
    """Parameters of :func:`nms`.

    Attributes:
        smoothing: radius of a triangle filter that is applied to the map first; 0: none.
        radius: pixels compared to either side.
        border: pixels at the image's border that are faded out.
        multiplier: a pixel is removed only if a neighbour is larger than this times its value.
    """

    smoothing: int
    radius: int
    border: int = 5
    multiplier: float = 1.01


SAK = SuppressionConfig(smoothing=1, radius=4)  # innovator-zero/seism/nms_process.m
INVPT = SuppressionConfig(smoothing=0, radius=1)  # BDET/seism/src/io/read_one_cont_png.m


def triangle(image: np.ndarray, radius: int) -> np.ndarray:
    """Smooth along both axes by [1..r r+1 r..1] / (r+1)^2, mirrored at the border: float32 (H, W).

    Source: pdollar/toolbox/channels/convTri.m.
    """
    if radius == 0:
        return image
    ramp = np.arange(1, radius + 1)
    weights = np.concatenate([ramp, [radius + 1], ramp[::-1]]) / (radius + 1) ** 2
    for axis in (0, 1):
        image = correlate1d(image, weights, axis, mode="reflect")
    return image


def orientation(image: np.ndarray) -> np.ndarray:
    """Compute the direction across an edge, in 0..pi: float32 (H, W).

    From second derivatives of the map smoothed with radius 4 (pdollar/edges/edgesDetect.m:68-70). Differences are
    central, one-sided at the border.
    """
    dy, dx = np.gradient(triangle(image, 4))
    dxx = np.gradient(dx, axis=1)
    dyy, dxy = np.gradient(dy)
    with np.errstate(divide="ignore", invalid="ignore"):
        angle = np.mod(np.arctan(dyy * np.sign(-dxy) / (dxx + np.float32(1e-5))), np.float32(np.pi))
    return np.nan_to_num(angle, copy=False)  # 0 / 0 has no direction


def nms(edges: np.ndarray, smoothing: int, radius: int, border: int = 5, multiplier: float = 1.01) -> np.ndarray:
    """Suppress pixels that are not maximal across their edge.

    A pixel is removed if ``multiplier`` times its value is below the map, interpolated linearly, at one of the whole
    distances 1..``radius`` to either side; at d < ``border`` pixels from the image's border the rest is multiplied by
    d / ``border`` (pdollar/edges/private/edgesNmsMex.cpp).

    Args:
        edges: map (H, W), float in 0..1.
        smoothing: see :class:`SuppressionConfig`, as for the others.
        radius: compared to either side.
        border: that is faded out.
        multiplier: of a pixel's value.

    Returns:
        float32 (H, W), smoothed, 0 where a pixel was removed.
    """
    edges = triangle(np.asarray(edges, np.float32), smoothing)
    if min(edges.shape) < 2:
        return edges  # there is no across
    out = edges.copy()
    angle = orientation(edges)
    y, x = np.nonzero(edges)
    cosine, sine = np.cos(angle[y, x]), np.sin(angle[y, x])
    bound = edges[y, x] * np.float32(multiplier)
    for step in (s * d for d in range(1, radius + 1) for s in (1, -1)):
        removed = bound < _interpolated(edges, x + np.float32(step) * cosine, y + np.float32(step) * sine)
        out[y[removed], x[removed]] = 0
        rest = np.flatnonzero(~removed)
        y, x, cosine, sine, bound = y[rest], x[rest], cosine[rest], sine[rest], bound[rest]
    return out * np.outer(_fade(out.shape[0], out.shape, border), _fade(out.shape[1], out.shape, border))


def _interpolated(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolate ``image`` linearly at (x, y), clipped to the image: float32 (N,)."""
    height, width = image.shape
    x = np.clip(x.astype(np.float32), np.float32(0), np.float32(width - 1.001))
    y = np.clip(y.astype(np.float32), np.float32(0), np.float32(height - 1.001))
    column, row = x.astype(np.intp), y.astype(np.intp)
    dx, dy = x - column.astype(np.float32), y - row.astype(np.float32)
    flat, index = image.ravel(), row * width + column
    upper = flat[index] * (1 - dx) + flat[index + 1] * dx
    lower = flat[index + width] * (1 - dx) + flat[index + width + 1] * dx
    return upper * (1 - dy) + lower * dy


def _fade(length: int, shape: tuple[int, ...], border: int) -> np.ndarray:
    """Return the weights 0, 1/s, 2/s, ... 1 ... 1, ... 1/s, 0: float32 (length,)."""
    s = min(border, shape[0] // 2, shape[1] // 2)
    near = np.minimum(np.arange(length), np.arange(length)[::-1])
    return (np.minimum(near, s) / max(s, 1)).astype(np.float32) if s else np.ones(length, np.float32)
