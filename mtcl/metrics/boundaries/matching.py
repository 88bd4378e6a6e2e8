"""One-to-one matching of predicted to true boundary pixels within a distance.

The official benchmark (correspondPixels of BSDS500) solves an assignment: a pair costs its distance, an unmatched
pixel 100 times the largest distance allowed. So it pairs as many pixels as can be, the nearest ones.
"""

import math

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow, min_weight_full_bipartite_matching


def offsets_within(distance: float) -> np.ndarray:
    """int64 (N, 2): all (dy, dx) of length <= ``distance`` pixels, the shortest first."""
    radius = math.floor(distance)
    dy, dx = np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, -1)
    squared = dy * dy + dx * dx
    order = np.argsort(squared, kind="stable")
    return np.stack([dy, dx], 1)[order[squared[order] <= distance * distance]]


class DistanceGraph:
    """Which pixels of ``truth`` (bool (H, W)) lie within ``distance`` pixels of each of the places (``rows``,
    ``columns``): a graph of which :meth:`match` takes the places that a threshold leaves."""

    def __init__(self, rows: np.ndarray, columns: np.ndarray, truth: np.ndarray, distance: float):
        offsets = offsets_within(distance)
        margin = math.floor(distance)
        stride = truth.shape[1] + 2 * margin
        number = np.full((truth.shape[0] + 2 * margin, stride), -1, np.int32)
        inside = number[margin : truth.shape[0] + margin, margin : truth.shape[1] + margin]
        self.size = int(truth.sum())
        inside[truth] = np.arange(self.size, dtype=np.int32)
        place = (rows + margin) * stride + columns + margin
        found = number.ravel()[place[:, None] + offsets @ [stride, 1]]
        near = found >= 0
        self.distance = distance
        self.columns = found[near]
        lengths = np.sqrt((offsets * offsets).sum(1))
        self.lengths = np.broadcast_to(lengths, near.shape)[near]
        self.degree = near.sum(1, dtype=np.int32)
        self.start = np.concatenate([[0], np.cumsum(self.degree)])

    def match(self, rows: np.ndarray, nearest: bool = False) -> np.ndarray:
        """bool like ``rows``: which of these places (numbers, increasing) a largest one-to-one matching pairs.

        How many is certain, which ones is not, unless they are the ``nearest`` (ten times slower).
        """
        matched = np.zeros(rows.size, bool)
        degree = self.degree[rows]
        near = np.flatnonzero(degree)
        if not near.size:
            return matched
        rows, degree = rows[near], degree[near]
        pointer = np.concatenate([[0], np.cumsum(degree)])
        taken = np.repeat(self.start[rows] - pointer[:-1], degree) + np.arange(pointer[-1])
        used = np.zeros(self.size, bool)
        used[self.columns[taken]] = True
        number = np.cumsum(used) - 1
        columns, size = number[self.columns[taken]], int(number[-1]) + 1
        if nearest:
            matched[near] = _cheapest(pointer, columns, self.lengths[taken], size, 100 * self.distance)
        else:
            matched[near] = _unit_flow(pointer, columns, size)
        return matched


def _cheapest(pointer: np.ndarray, columns: np.ndarray, lengths: np.ndarray, size: int, outlier: float) -> np.ndarray:
    """bool (N,): which of the N rows (CSR form, ``size`` columns) the cheapest assignment pairs with a column.

    Each row may stay alone in a column of its own, at the cost ``outlier``. Costs grow by 1, for 0 would be no edge.
    """
    n = pointer.size - 1
    where = pointer[1:]  # after the last edge of each row
    heads = np.insert(columns, where, size + np.arange(n)).astype(np.int32)
    costs = np.insert(lengths, where, outlier) + 1
    ends = (pointer + np.arange(n + 1)).astype(np.int32)
    graph = csr_array((costs, heads, ends), shape=(n, size + n))
    return min_weight_full_bipartite_matching(graph)[1] < size


def _unit_flow(pointer: np.ndarray, columns: np.ndarray, size: int) -> np.ndarray:
    """bool (N,): which of the N rows (CSR form, ``size`` columns) a largest flow passes: Dinic's, all capacities 1.

    SciPy's Hopcroft-Karp would count the same, but takes minutes instead of milliseconds on some maps.
    """
    n = pointer.size - 1
    source, sink, edges = n + size, n + size + 1, pointer[-1]
    # nodes: rows, columns, source, sink; edges ordered by their first node
    heads = np.concatenate([columns + n, np.full(size, sink), np.arange(n)]).astype(np.int32)
    ends = np.concatenate([pointer, edges + np.arange(1, size + 1), [edges + size + n] * 2]).astype(np.int32)
    graph = csr_array((np.ones(heads.size, np.int32), heads, ends), shape=(sink + 1, sink + 1))
    flow = maximum_flow(graph, source, sink, method="dinic").flow
    first, last = flow.indptr[source], flow.indptr[source + 1]
    passes = np.zeros(n, bool)
    passes[flow.indices[first:last]] = flow.data[first:last] > 0
    return passes
