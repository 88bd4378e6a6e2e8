"""Counts of one image over thresholds, and the scores of counts."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from mtcl.errors import UserError
from mtcl.metrics.boundaries.matching import DistanceGraph
from mtcl.metrics.boundaries.thinning import WORD, thin_words

EPS = np.finfo(float).eps


def linspace_thresholds(number: int) -> np.ndarray:
    """float64 (N,): k / (N + 1) for k = 1..N, rounded as MATLAB's linspace does (pdollar/edges/edgesEvalImg.m:53), for
    8-bit maps have values on some of them. ``UserError``: fewer than one."""
    if number < 1:
        raise UserError(f"{number} thresholds give no score; take 1 or more, the field takes 99.")
    return np.linspace(1 / (number + 1), 1 - 1 / (number + 1), number)


def boundary_counts(
    prediction: np.ndarray,
    truths: Sequence[np.ndarray],
    thresholds: np.ndarray,
    max_distance: float,
    strict: bool = False,
) -> np.ndarray:
    """int64 (K, 4) for K thresholds: cntR, sumR, cntP, sumP (pdollar/edges/edgesEvalImg.m:61-78).

    ``prediction`` (H, W) is uint8 (divided by 255) or float in 0..1. It is binarised at ``>=`` each of the increasing
    ``thresholds`` (> 0), or at ``>`` if ``strict``, thinned, and matched one to one to each annotator's ``truths``
    (bool (H, W)), within ``max_distance`` times the image's diagonal. cntR of sumR true pixels, summed over the
    annotators, and cntP of sumP predicted ones, with any annotator, are matched. Of several annotators each is matched
    to its nearest pixels, for which ones are matched decides cntP.

    ``UserError``: thresholds do not increase; sizes differ; a prediction is NaN.
    """
    if np.any(np.diff(thresholds) <= 0):
        raise UserError("The thresholds of edges do not increase; sort them and drop doubles.")
    for truth in truths:
        if truth.shape != prediction.shape:
            raise UserError(f"An edge map of {_size(prediction)} has a ground truth of {_size(truth)}; use one size.")
    truths = [np.asarray(truth, bool) for truth in truths]
    counts = np.zeros((len(thresholds), 4), np.int64)
    counts[:, 1] = sum(int(truth.sum()) for truth in truths)
    rows, columns, words = _thinned(prediction, thresholds, strict)
    distance = max_distance * float(np.hypot(*prediction.shape))
    graphs = [DistanceGraph(rows, columns, truth, distance) for truth in truths]
    last = np.zeros(0, np.intp)
    for k in range(len(thresholds)):
        left = np.flatnonzero(words[k // WORD] & np.uint64(1 << k % WORD))
        counts[k, 3] = left.size
        if k and np.array_equal(left, last):
            counts[k] = counts[k - 1]
        elif left.size and graphs:
            matched = [graph.match(left, nearest=len(graphs) > 1) for graph in graphs]
            counts[k, 0] = sum(int(m.sum()) for m in matched)
            counts[k, 2] = np.any(matched, axis=0).sum()
        last = left
    return counts


def _thinned(
    prediction: np.ndarray, thresholds: np.ndarray, strict: bool
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Rows and columns of the N pixels that reach any threshold, and for each 64 thresholds words uint64 (N,): the bits
    of the thinned maps in which a pixel is set."""
    side: Literal["left", "right"] = "left" if strict else "right"
    if prediction.dtype == np.uint8:
        passed = np.searchsorted(thresholds, np.arange(256) / 255, side=side)[prediction]
    elif np.isnan(prediction).any():
        raise UserError(f"{int(np.isnan(prediction).sum())} pixels of an edge map are NaN; look for the cause there.")
    else:
        passed = np.searchsorted(np.asarray(thresholds, prediction.dtype), prediction, side=side)
    rows, columns = np.nonzero(passed)
    passed = passed[rows, columns]
    words = []
    for start in range(0, len(thresholds), WORD):
        ones = np.clip(passed - start, 0, WORD)  # a pixel that passes a threshold passes the lower ones, too
        full = np.uint64(2**64 - 1) >> (WORD - np.maximum(ones, 1)).astype(np.uint64)
        some = np.flatnonzero(ones)
        word = np.zeros(rows.size, np.uint64)
        word[some] = thin_words(rows[some], columns[some], full[some], prediction.shape)
        words.append(word)
    return rows, columns, words


class Scores(NamedTuple):
    """Fractions; NaN if there was no true boundary at all."""

    odsF: float
    oisF: float
    ap: float
    threshold: float
    precision: float
    recall: float


def recall_precision_f(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Recall, precision and F of counts (..., 4); 0 where nothing is counted (pdollar/edges/edgesEvalDir.m:112-115)."""
    recall = counts[..., 0] / np.maximum(EPS, counts[..., 1])
    precision = counts[..., 2] / np.maximum(EPS, counts[..., 3])
    return recall, precision, 2 * precision * recall / np.maximum(EPS, precision + recall)


def best_image_counts(counts: np.ndarray) -> np.ndarray:
    """int64 (4,): the counts (K, 4) of one image at its best threshold, the lowest of equals."""
    return counts[np.argmax(recall_precision_f(counts)[2])]


def compute_scores(counts: np.ndarray, best: np.ndarray, thresholds: np.ndarray, interpolate: bool) -> Scores:
    """The scores of ``counts`` (K, 4), summed over the images, and of ``best`` (4,), :func:`best_image_counts` summed.

    odsF is the largest F over thresholds, with ``interpolate`` also at 100 steps between neighbours, of recall and
    precision in straight lines (edgesEvalDir.m:117-127; seism's general_ods.m takes the thresholds themselves). ap is
    the mean of precision, in straight lines over recall, at recall 0, 0.01 ... 1, with 0 outside what was measured and,
    as there, a divisor of 100 (edgesEvalDir.m:95-98).
    """
    if not counts[:, 1].any():
        return Scores(*[float("nan")] * 6)
    recall, precision, _ = recall_precision_f(counts)
    line = np.stack([recall, precision, np.asarray(thresholds, float)])
    if interpolate and len(thresholds) > 1:
        share = np.linspace(0, 1, 100)
        line = (line[:, :-1, None] * (1 - share) + line[:, 1:, None] * share).reshape(3, -1)
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
