"""Alignment of labels with images: boundaries of the one against gradients of the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import scipy.fft

LONGEST = 256  # larger images are compared at this length of their longer side
REACH = 8  # shifts that are tried, in pixels of that size
WINDOW = 12  # half the side of the squares that are looked at for symmetry, see `_centre`
NEAR = 2  # shifts up to this count as none
MIN_IMAGES = 5  # images from which something can be said
DRAWS = 50  # of the bootstrap
SURE = 0.8  # share of its draws that must agree; with labels of other images at most 0.65 did, with true ones 0.9
APART = 3.0  # standard errors between labels and their mirror images


@dataclass(frozen=True)
class Match:
    """How well one image's label fits at each shift, and its mirror image at its best one."""

    surface: np.ndarray  # float32 (2 E + 1, 2 E + 1): correlation by (rows, columns) from -E; E = REACH + WINDOW
    mirrored: float


@dataclass(frozen=True)
class Fit:
    """The matches of many images together."""

    count: int
    shift: tuple[int, int]  # rows, columns: of the labels from their images, at LONGEST
    clear: bool  # whether other draws of images give this shift, too, up to NEAR
    correlation: float  # mean correlation at the best shift of each image
    mirrored: float  # the same of the mirrored labels
    sided: float  # standard errors of the mean by which they differ

    @property
    def displaced(self) -> bool:
        """Whether the labels are shifted by more than NEAR."""
        return max(map(abs, self.shift)) > NEAR


def boundaries(label: np.ndarray) -> np.ndarray:
    """Return where a label changes, float32 (H, W).

    Classes give 1, depth |log ratio| up to 0.5, normals 1 - cosine up to 1. The label is in the layout of its task
    after ``finalize_label``: uint8 (H, W), float32 (H, W) or float32 (H, W, 3).
    """
    strength = np.zeros(label.shape[:2], np.float32)
    for axis in (0, 1):
        first = np.take(label, np.arange(label.shape[axis] - 1), axis)
        second = np.take(label, np.arange(1, label.shape[axis]), axis)
        step = _step(first, second)
        pad_after, pad_before = [(0, 0), (0, 0)], [(0, 0), (0, 0)]
        pad_after[axis], pad_before[axis] = (0, 1), (1, 0)
        strength += np.pad(step, pad_after) + np.pad(
            step, pad_before
        )  # on both sides, so that nothing moves by half a pixel
    return strength


def gradients(image: np.ndarray) -> np.ndarray:
    """Return the size of the grey value's gradient (Sobel) of uint8 RGB (H, W, 3): float32 (H, W)."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))


def match(image: np.ndarray, label: np.ndarray) -> Match | None:
    """Correlate an image with one label of its size; None if either has no structure."""
    edges, marks = (_unit(_shrunk(array)) for array in (gradients(image), boundaries(label)))
    if edges is None or marks is None:
        return None
    mirrored = _surface(edges, np.ascontiguousarray(marks[:, ::-1]))
    return Match(_surface(edges, marks), _best(mirrored))


def fit(matches: Sequence[Match]) -> Fit | None:
    """Combine the matches of several images; None for fewer than MIN_IMAGES."""
    if len(matches) < MIN_IMAGES:
        return None
    surfaces = np.stack([match.surface for match in matches])
    shift = _centre(surfaces.mean(axis=0))
    rng = np.random.default_rng(0)
    draws = rng.multinomial(len(matches), np.full(len(matches), 1 / len(matches)), size=DRAWS)
    drawn = [_centre(mean) for mean in np.einsum("dn,nyx->dyx", draws / len(matches), surfaces)]
    agree = np.abs(np.array(drawn) - shift).max(axis=1) <= NEAR
    correlations, mirrored = (np.array(v) for v in ([_best(m.surface) for m in matches], [m.mirrored for m in matches]))
    error = (correlations - mirrored).std(ddof=1) / np.sqrt(len(matches))
    return Fit(
        count=len(matches),
        shift=shift,
        clear=bool(agree.mean() >= SURE),
        correlation=float(correlations.mean()),
        mirrored=float(mirrored.mean()),
        sided=float((correlations - mirrored).mean() / max(error, 1e-12)),
    )


def _step(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the size of the change between neighbouring pixels."""
    if first.dtype == np.uint8:
        return (first != second).astype(np.float32)
    if first.ndim == 3:
        valid = first.any(axis=2) & second.any(axis=2)
        return np.where(valid, np.clip(1 - np.einsum("hwc,hwc->hw", first, second), 0, 1), 0)
    valid = (first > 0) & (second > 0)
    ratio = np.divide(first, second, out=np.ones_like(first), where=valid)
    return np.minimum(np.abs(np.log(ratio)), 0.5)


def _shrunk(array: np.ndarray) -> np.ndarray:
    """Shrink an array to LONGEST."""
    scale = LONGEST / max(array.shape)
    return array if scale >= 1 else cv2.resize(array, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def _unit(array: np.ndarray) -> np.ndarray | None:
    """Return an array of zero mean and unit norm; None if it is constant."""
    centred = array - array.mean()
    length = float(np.linalg.norm(centred))
    return centred / length if length > 1e-6 else None


def _surface(image: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """Return the sum over x of image(x) marks(x + d) for every shift d of up to REACH + WINDOW."""
    extent = REACH + WINDOW
    size = [scipy.fft.next_fast_len(length + extent, real=True) for length in image.shape]
    spectrum = np.conj(scipy.fft.rfft2(image, size)) * scipy.fft.rfft2(marks, size)
    shifts = np.arange(-extent, extent + 1)
    return scipy.fft.irfft2(spectrum, size)[np.ix_(shifts, shifts)].astype(np.float32)


def _best(surface: np.ndarray) -> float:
    """Return the largest correlation within REACH."""
    return float(surface[WINDOW:-WINDOW, WINDOW:-WINDOW].max())


def _centre(surface: np.ndarray) -> tuple[int, int]:
    """Return the shift (rows, columns) about which a surface is most symmetric.

    There it covaries most with itself rotated by 180 degrees. A sharp peak is its own centre; but normals that were
    fitted to windows change at both sides of an edge, and their surface is a ring around the true shift.
    """
    side = 2 * WINDOW + 1
    patches = np.lib.stride_tricks.sliding_window_view(surface, (side, side))
    mean = patches.mean(axis=(2, 3))
    score = np.einsum("ijyx,ijyx->ij", patches, patches[:, :, ::-1, ::-1]) - side * side * mean * mean
    row, column = np.unravel_index(score.argmax(), score.shape)
    return int(row) - REACH, int(column) - REACH
