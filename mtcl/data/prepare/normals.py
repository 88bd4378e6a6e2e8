"""Surface normals from a depth map: planes fitted to windows, so that noise averages out and steps stay sharp."""

from dataclasses import dataclass

import cv2
import numpy as np

# Half widths of the square windows, in pixels of a 480x640 frame. 10 keeps the mean error on a wall at 3 m below
# 3 degrees with a Kinect's noise and steps (see the test); 4 is for thinner things.
RADII = (4, 10)
# 1/m. A Kinect counts disparity in eighths of a pixel, 1 / (8 * 580 px * 0.075 m) of inverse depth, whatever the
# distance: that step over sqrt(12). Windows that fit better than this are equally good.
NOISE = 8.3e-4
SHARPNESS = 4  # power of the windows' weights: 1 smears more, larger ones use less of the data
MIN_SHARE = 0.3  # of a window's pixels that must have depth


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: focal lengths and principal point in pixels; the centre of the first pixel is (0, 0)."""

    fx: float
    fy: float
    cx: float
    cy: float


# The colour camera at 640x480 by NYU Depth v2's toolbox (camera_params.m), which counts pixels from 1.
KINECT = Camera(518.857901, 519.469611, 325.582449 - 1, 253.736166 - 1)


def estimate_normals(
    depth: np.ndarray, camera: Camera = KINECT, radii: tuple[int, ...] = RADII, noise: float = NOISE
) -> np.ndarray:
    """Estimate unit normals from depth.

    A plane is linear in inverse depth, 1/Z = a x + b y + c with x = (u - cx)/fx, y = (v - cy)/fy, and (a, b, c) is
    its normal in these axes. A Kinect measures disparity, so the noise of 1/Z is the same at any distance, and
    ordinary least squares is right. A pixel takes the mean of the fits of all windows of ``radii`` that hold it, each
    weighted by the power ``SHARPNESS`` of the certainty of its slopes: a window across a step fits badly and counts
    for nothing beside one that ends there.

    Args:
        depth: depth (H, W) in metres; not positive or not finite where unknown.
        camera: intrinsics of the depth map.
        radii: half widths of the windows in pixels.
        noise: standard deviation of 1/Z in 1/m.

    Returns:
        Normals float32 (H, W, 3), axes x left, y up, z to the viewer; zero where unknown.
    """
    depth = depth.astype(np.float64)
    valid = np.isfinite(depth) & (depth > 0)
    inverse = np.divide(1, depth, out=np.zeros_like(depth), where=valid)
    planes = np.zeros((*depth.shape, 3))
    for radius in radii:
        weighted = _weighted_fits(inverse, valid, radius, noise)
        # New sums at every pixel: a running sum would leave traces of large weights where all are small.
        ones = np.ones(2 * radius + 1)
        planes += cv2.sepFilter2D(weighted, cv2.CV_64F, ones, ones, borderType=cv2.BORDER_CONSTANT)
    return _directions(planes, valid, camera)


def encode_normals(normals: np.ndarray) -> np.ndarray:
    """Encode unit normals as uint8 (H, W, 3), round((n + 1) / 2 * 255); the zero vector, no direction, is black."""
    has_direction = normals.any(axis=-1, keepdims=True)
    return np.where(has_direction, np.rint((normals + 1) * 127.5), 0).astype(np.uint8)


def _weighted_fits(inverse: np.ndarray, valid: np.ndarray, radius: int, noise: float) -> np.ndarray:
    """Fit least-squares planes (H, W, 3) to the windows around every pixel, times their weights; zero if there is none.

    A plane is 1/Z = a u + b v + c in pixels, so that its weights need no camera.
    """
    side = 2 * radius + 1

    def sums(values: np.ndarray) -> np.ndarray:
        """Sum values over each pixel's window."""
        return cv2.boxFilter(values, cv2.CV_64F, (side, side), normalize=False, borderType=cv2.BORDER_CONSTANT)

    mask = valid.astype(np.float64)
    height, width = mask.shape
    # Counted from the middle of the frame: smaller squares, less cancellation.
    v, u = np.meshgrid(np.arange(height) - height / 2, np.arange(width) - width / 2, indexing="ij")
    v, u, d = v * mask, u * mask, inverse
    count = sums(mask)
    n = np.maximum(count, 1)
    mean_u, mean_v, mean_d = sums(u) / n, sums(v) / n, sums(d) / n
    uu, vv, uv = sums(u * u) / n - mean_u**2, sums(v * v) / n - mean_v**2, sums(u * v) / n - mean_u * mean_v
    ud, vd, dd = sums(u * d) / n - mean_u * mean_d, sums(v * d) / n - mean_v * mean_d, sums(d * d) / n - mean_d**2
    determinant = uu * vv - uv**2
    spread = uu + vv
    # Pixels on one line tell one slope only: their determinant is 0; that of 2x2 pixels is 1/16.
    has_plane = (count >= MIN_SHARE * side**2) & (determinant > 0.01)
    determinant = np.where(has_plane, determinant, 1)
    a, b = (ud * vv - vd * uv) / determinant, (vd * uu - ud * uv) / determinant
    c = mean_d - a * (mean_u + width / 2) - b * (mean_v + height / 2)
    residual = np.maximum(dd - a * ud - b * vd, 0) + noise**2
    # The variance of the slopes, var(a) + var(b), is residual * spread / (count * determinant).
    certainty = np.where(has_plane, count * determinant / (residual * np.maximum(spread, 1e-9)), 0)
    return np.stack([a, b, c], axis=-1) * (certainty**SHARPNESS)[..., None]


def _directions(planes: np.ndarray, valid: np.ndarray, camera: Camera) -> np.ndarray:
    """Return unit normals of planes (H, W, 3) in pixels, zero where a pixel is not ``valid`` or has no plane."""
    a, b, c = np.moveaxis(planes, -1, 0)
    normals = np.stack([a * camera.fx, b * camera.fy, a * camera.cx + b * camera.cy + c], axis=-1)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    has_normal = valid[..., None] & (length > 0)
    return np.divide(normals, length, out=np.zeros_like(normals), where=has_normal).astype(np.float32)
