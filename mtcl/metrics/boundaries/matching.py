"""One-to-one matching of predicted to true boundary pixels within a distance.

The official benchmark (correspondPixels of BSDS500) solves an assignment: a pair costs its distance, an unmatched
pixel 100 times the largest distance allowed. So it pairs as many pixels as possible, the nearest ones.
"""

import math

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow, min_weight_full_bipartite_matching


def offsets_within(distance: float) -> np.ndarray:
    """Return all (dy, dx) of length <= ``distance`` pixels, the shortest first: int64 (N, 2)."""
    radius = math.floor(distance)
    dy, dx = np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, -1)
    squared = dy * dy + dx * dx
    order = np.argsort(squared, kind="stable")
    return np.stack([dy, dx], 1)[order[squared[order] <= distance * distance]]


class DistanceGraph:
    """The pixels of ``truth`` within ``distance`` of each candidate pixel.

    :meth:`match` matches the candidates that a threshold leaves.

    Args:
        rows: of the candidates, int (N,).
        columns: of the candidates, int (N,).
        truth: true boundary, bool (H, W).
        distance: in pixels.
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray, truth: np.ndarray, distance: float):
        offsets = offsets_within(distance)
        margin = math.floor(distance)
        stride = truth.shape[1] + 2 * margin
        number = np.full((truth.shape[0] + 2 * margin, stride), -1, np.int32)
        inside = number[margin : truth.shape[0] + margin, margin : truth.shape[1] + margin]
        self.size = int(truth.sum())
        inside[truth] = np.arange(self.size, dtype=np.int32)
        position = (rows + margin) * stride + columns + margin
        neighbours = number.ravel()[position[:, None] + offsets @ [stride, 1]]
        near = neighbours >= 0
        self.distance = distance
        self.columns = neighbours[near]
        lengths = np.sqrt((offsets * offsets).sum(1))
        self.lengths = np.broadcast_to(lengths, near.shape)[near]
        self.degree = near.sum(1, dtype=np.int32)
        self.start = np.concatenate([[0], np.cumsum(self.degree)])

    def match(self, rows: np.ndarray, nearest: bool = False) -> np.ndarray:
        """Match some of the candidates to true pixels, one to one, as many as possible.

        Args:
            rows: numbers of the candidates, increasing, int (M,).
            nearest: choose the nearest pairs (ten times slower). Without it the number of pairs is certain, but not
                which candidates they hold.

        Returns:
            bool (M,): which of them are matched.
        """
        matched = np.zeros(rows.size, bool)
        degree = self.degree[rows]
        near = np.flatnonzero(degree)
        if not near.size:
            return matched
        rows, degree = rows[near], degree[near]
        pointer = np.concatenate([[0], np.cumsum(degree)])
        edges = np.repeat(self.start[rows] - pointer[:-1], degree) + np.arange(pointer[-1])
        used = np.zeros(self.size, bool)
        used[self.columns[edges]] = True
        number = np.cumsum(used) - 1
        columns, size = number[self.columns[edges]], int(number[-1]) + 1
        if nearest:
            matched[near] = _cheapest(pointer, columns, self.lengths[edges], size, 100 * self.distance)
        else:
            matched[near] = _unit_flow(pointer, columns, size)
        return matched


def _cheapest(pointer: np.ndarray, columns: np.ndarray, lengths: np.ndarray, size: int, outlier: float) -> np.ndarray:
    """Return which of the N rows the cheapest assignment pairs with a column: bool (N,).

    The graph is in CSR form with ``size`` columns. Each row may remain unmatched at the cost ``outlier``. Costs grow
    by 1, for 0 would be no edge.
    """
    n = pointer.size - 1
    row_ends = pointer[1:]
    heads = np.insert(columns, row_ends, size + np.arange(n)).astype(np.int32)
    costs = np.insert(lengths, row_ends, outlier) + 1
    ends = (pointer + np.arange(n + 1)).astype(np.int32)
    graph = csr_array((costs, heads, ends), shape=(n, size + n))
    return min_weight_full_bipartite_matching(graph)[1] < size


def _unit_flow(pointer: np.ndarray, columns: np.ndarray, size: int) -> np.ndarray:
    """Return which of the N rows a maximum flow passes, by Dinic's algorithm with all capacities 1: bool (N,).

    The graph is in CSR form with ``size`` columns. SciPy's Hopcroft-Karp would count the same, but
    takes minutes instead of milliseconds on some maps.
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
