"""Count the matches of one image over thresholds, and compute the scores of counts."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from mtcl.errors import UserError
from mtcl.metrics.boundaries.matching import DistanceGraph
from mtcl.metrics.boundaries.thinning import WORD, thin_bitmaps

EPS = np.finfo(float).eps


def linspace_thresholds(number: int) -> np.ndarray:
    """Return k / (N + 1) for k = 1..N: float64 (N,).

    Rounded as MATLAB's linspace does (pdollar/edges/edgesEvalImg.m:53), for 8-bit maps have values on some of them.

    Raises:
        UserError: there are fewer than one.
    """
    if number < 1:
        raise UserError(f"{number} thresholds give no score; use 1 or more (99 is usual).")
    return np.linspace(1 / (number + 1), 1 - 1 / (number + 1), number)


def boundary_counts(
    prediction: np.ndarray,
    truths: Sequence[np.ndarray],
    thresholds: np.ndarray,
    max_distance: float,
    strict: bool = False,
) -> np.ndarray:
    """Count the matched boundary pixels of one image at K thresholds (pdollar/edges/edgesEvalImg.m:61-78).

    The prediction is binarised, thinned, and matched one to one to each annotator's truth. Of several annotators each
    is matched to its nearest pixels, for which ones are matched decides cntP.

    Args:
        prediction: (H, W), uint8 (divided by 255) or float in 0..1.
        truths: true boundaries of the annotators, bool (H, W).
        thresholds: (K,), increasing, > 0; pixels ``>=`` a threshold are boundary.
        max_distance: of a match, times the image's diagonal.
        strict: pixels ``>`` a threshold are boundary.

    Returns:
        int64 (K, 4): cntR, sumR, cntP, sumP. cntR of sumR true pixels, summed over the annotators, and cntP of sumP
        predicted ones, with any annotator, are matched.

    Raises:
        UserError: thresholds do not increase, sizes differ, or a prediction is NaN.
    """
    if np.any(np.diff(thresholds) <= 0):
        raise UserError("The thresholds of edges do not increase; sort them and drop duplicates.")
    for truth in truths:
        if truth.shape != prediction.shape:
            raise UserError(f"An edge map of {_size(prediction)} has a ground truth of {_size(truth)}; use one size.")
    truths = [np.asarray(truth, bool) for truth in truths]
    counts = np.zeros((len(thresholds), 4), np.int64)
    counts[:, 1] = sum(int(truth.sum()) for truth in truths)
    rows, columns, bitmaps = _thin_at_thresholds(prediction, thresholds, strict)
    distance = max_distance * float(np.hypot(*prediction.shape))
    graphs = [DistanceGraph(rows, columns, truth, distance) for truth in truths]
    previous = np.zeros(0, np.intp)
    for k in range(len(thresholds)):
        pixels = np.flatnonzero(bitmaps[k // WORD] & np.uint64(1 << k % WORD))
        counts[k, 3] = pixels.size
        if k and np.array_equal(pixels, previous):
            counts[k] = counts[k - 1]
        elif pixels.size and graphs:
            matched = [graph.match(pixels, nearest=len(graphs) > 1) for graph in graphs]
            counts[k, 0] = sum(int(m.sum()) for m in matched)
            counts[k, 2] = np.any(matched, axis=0).sum()
        previous = pixels
    return counts


def _thin_at_thresholds(
    prediction: np.ndarray, thresholds: np.ndarray, strict: bool
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Binarise a map at all thresholds and thin the binary maps.

    Returns:
        Rows and columns of the N pixels that reach any threshold, and for each 64 thresholds bitmaps uint64 (N,): the
        bits of the thinned maps in which a pixel is set.
    """
    side: Literal["left", "right"] = "left" if strict else "right"
    if prediction.dtype == np.uint8:
        passed = np.searchsorted(thresholds, np.arange(256) / 255, side=side)[prediction]
    elif np.isnan(prediction).any():
        raise UserError(f"{int(np.isnan(prediction).sum())} pixels of an edge map are NaN; correct what made this map.")
    else:
        passed = np.searchsorted(np.asarray(thresholds, prediction.dtype), prediction, side=side)
    rows, columns = np.nonzero(passed)
    passed = passed[rows, columns]
    bitmaps = []
    for start in range(0, len(thresholds), WORD):
        ones = np.clip(passed - start, 0, WORD)  # a pixel that passes a threshold also passes the lower ones
        full = np.uint64(2**64 - 1) >> (WORD - np.maximum(ones, 1)).astype(np.uint64)
        some = np.flatnonzero(ones)
        bitmap = np.zeros(rows.size, np.uint64)
        bitmap[some] = thin_bitmaps(rows[some], columns[some], full[some], prediction.shape)
        bitmaps.append(bitmap)
    return rows, columns, bitmaps


class Scores(NamedTuple):
    """Boundary scores as fractions; NaN if there was no true boundary at all."""

    odsF: float  # noqa: N815
    oisF: float  # noqa: N815
    ap: float
    threshold: float
    precision: float
    recall: float


def recall_precision_f(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute recall, precision and F of counts (..., 4); 0 where nothing is counted.

    Source: pdollar/edges/edgesEvalDir.m:112-115.
    """
    recall = counts[..., 0] / np.maximum(EPS, counts[..., 1])
    precision = counts[..., 2] / np.maximum(EPS, counts[..., 3])
    return recall, precision, 2 * precision * recall / np.maximum(EPS, precision + recall)


def best_image_counts(counts: np.ndarray) -> np.ndarray:
    """Return the counts (K, 4) of one image at its best threshold, the lowest of equals: int64 (4,)."""
    return counts[np.argmax(recall_precision_f(counts)[2])]


def compute_scores(counts: np.ndarray, best: np.ndarray, thresholds: np.ndarray, interpolate: bool) -> Scores:
    """Compute the scores of a set of images.

    odsF is the largest F over thresholds, with ``interpolate`` also at 100 steps between neighbours, of recall and
    precision in straight lines (edgesEvalDir.m:117-127; seism's general_ods.m takes the thresholds themselves). ap is
    the mean of precision, in straight lines over recall, at recall 0, 0.01 ... 1, with 0 outside the measured range
    and, as in the source, a divisor of 100 (edgesEvalDir.m:95-98).

    Args:
        counts: (K, 4), summed over the images.
        best: (4,), :func:`best_image_counts` summed over the images.
        thresholds: (K,).
        interpolate: compute odsF also between the thresholds.
    """
    if not counts[:, 1].any():
        return Scores(*[float("nan")] * 6)
    recall, precision, _ = recall_precision_f(counts)
    line = np.stack([recall, precision, np.asarray(thresholds, float)])
    if interpolate and len(thresholds) > 1:
        fraction = np.linspace(0, 1, 100)
        line = (line[:, :-1, None] * (1 - fraction) + line[:, 1:, None] * fraction).reshape(3, -1)
    f = 2 * line[0] * line[1] / np.maximum(EPS, line[0] + line[1])
    at = int(np.argmax(f))
    return Scores(
        odsF=float(f[at]),
        oisF=float(recall_precision_f(best)[2]),
        ap=_average_precision(recall, precision),
        threshold=float(line[2, at]),
        precision=float(line[1, at]),
        recall=float(line[0, at]),
    )


def _average_precision(recall: np.ndarray, precision: np.ndarray) -> float:
    recall, first = np.unique(recall, return_index=True)
    if recall.size < 2:
        return 0.0
    return float(np.interp(np.linspace(0, 1, 101), recall, precision[first], left=0, right=0).sum() / 100)


def _size(image: np.ndarray) -> str:
    return "x".join(str(n) for n in image.shape)
