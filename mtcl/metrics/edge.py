"""Edge metrics: boundary F-measure and cross-entropy."""

import multiprocessing
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtcl.errors import UserError
from mtcl.metrics.boundaries import Preset, best_image_counts, compute_scores, get_preset
from mtcl.metrics.masked import PixelMetric, check_shapes, is_finite

MIN_PIXELS_FOR_WORKERS = 2_000_000  # with fewer, processes take longer to start than to work


class EdgeMetric(PixelMetric):
    """``odsF``, ``oisF`` and ``ap`` of the boundary benchmark, see :mod:`mtcl.metrics.boundaries`, and ``loss``.

    The loss is the class-balanced cross-entropy of :class:`mtcl.losses.EdgeLoss` over all valid pixels. Without
    ``score_boundaries`` it is the only result. ``threshold`` is that of odsF.

    The prediction is the sigmoid times 255, truncated to 8 bits (InvPT/evaluation/evaluate_utils.py:69-106), the ground
    truth every pixel of label 1. Void pixels have no ground truth, and predictions there (after the suppression) are
    dropped. Every image is scored at its own size, so padding must be cut off.

    Args:
        positive_weight: of the loss.
        score_boundaries: compute the boundary scores, too.
        preset: the toolchain, one of :data:`mtcl.metrics.boundaries.PRESETS`.
        max_distance: a fraction of the diagonal (NYUD 0.011, PASCAL 0.0075).
        thresholds: number of even thresholds; None: those of the preset. Fewer are faster.
        every: score every n-th image only.
        workers: processes that score while the network goes on (0: this one). This process scores the first
            :data:`MIN_PIXELS_FOR_WORKERS` pixels.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        UserError: ``every``, ``max_distance``, ``thresholds`` or ``preset`` is out of range.
    """

    task = "edge"
    total: Tensor  # float64
    pixels: Tensor  # int64
    counts: Tensor  # int64 (thresholds, 4): cntR, sumR, cntP, sumP over the images
    best: Tensor  # int64 (4,): the same at each image's best threshold

    def __init__(
        self,
        positive_weight: float = 0.95,
        score_boundaries: bool = True,
        preset: str = "default",
        max_distance: float = 0.011,
        thresholds: int | None = None,
        every: int = 1,
        workers: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if every < 1:
            raise UserError(f"every={every} of the edge metric scores no image; take 1 (all) or more.")
        if not 0 < max_distance < 1:
            raise UserError(
                f"max_distance={max_distance} of the edge metric is not a fraction of the diagonal in 0..1."
            )
        self.positive_weight = positive_weight
        self.score_boundaries, self.max_distance = score_boundaries, max_distance
        self.every, self.workers = every, workers
        self.preset: Preset = get_preset(preset, thresholds)
        self.num_images = self.num_scored_pixels = 0  # on this rank
        self._pool: ProcessPoolExecutor | None = None
        self._pending: deque[Future[np.ndarray]] = deque()
        self.add_sums("total")
        self.add_counts("pixels", "not_finite", "out_of_range")
        if score_boundaries:
            self.add_counts("counts", size=(len(self.preset.thresholds), 4))
            self.add_counts("best", size=(4,))

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: logits (B, 1, H, W); NaN or infinity counts as no edge and, with ``score_boundaries``, as
                ``not_finite``.
            label: (B, 1, H, W), 0, 1, or 255 where void.
        """
        check_shapes(self.task, prediction, (1,), label, (1,))
        logit, w = prediction.double(), self.positive_weight
        cost = torch.where(label == 1, -w * F.logsigmoid(logit), -(1 - w) * F.logsigmoid(-logit))
        valid = label != 255
        self.total += torch.where(valid, cost, 0.0).sum()
        self.pixels += valid.sum()
        self.not_finite += (valid & ~is_finite(prediction)).sum()
        self.out_of_range += (valid & (label != 0) & (label != 1)).sum()
        if self.score_boundaries:
            rows = [row for row in range(len(label)) if (self.num_images + row) % self.every == 0]
            self.num_images += len(label)
            self._score(prediction[rows], label[rows])

    def _score(self, prediction: Tensor, label: Tensor) -> None:
        valid = label != 255
        levels = (prediction.float().sigmoid() * 255).masked_fill(~is_finite(prediction), 0).to(torch.uint8)
        for image in zip(*(t[:, 0].cpu().numpy() for t in (levels, label == 1, valid)), strict=True):
            job = (self.preset, *image, self.max_distance)
            self.num_scored_pixels += image[0].size
            if self.workers == 0 or self.num_scored_pixels <= MIN_PIXELS_FOR_WORKERS:
                self._add(_counts(*job))
                continue
            if len(self._pending) >= 4 * self.workers:  # no more images than that wait in memory
                self._add(self._result())
            self._pending.append(self._processes().submit(_counts, *job))

    def compute(self) -> dict[str, Tensor]:
        """Return ``loss``, and with ``score_boundaries`` also the scores, ``threshold`` and ``not_finite``."""
        self.check_labels("0 is none, 1 an edge, 255 void")
        results = {"loss": self.total / self.pixels}
        if self.score_boundaries:
            self._gather()
            boundary_scores = compute_scores(
                self.counts.cpu().numpy(),
                self.best.cpu().numpy(),
                np.array(self.preset.thresholds),
                self.preset.interpolate,
            )
            for name in ("odsF", "oisF", "ap", "threshold"):
                results[name] = torch.tensor(
                    getattr(boundary_scores, name), dtype=torch.float64, device=self.total.device
                )
            results["not_finite"] = self.not_finite.clone()
        return results

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Synchronize as torchmetrics does, after the images that are still being scored."""
        self._gather()
        super().sync(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Update and compute as torchmetrics does, which replaces the state: images still being scored belong to it."""
        self._gather()
        return super().forward(*args, **kwargs)

    def reset(self) -> None:
        """Reset as torchmetrics does; drop the images still being scored and end the processes."""
        for future in self._pending:
            future.cancel()
        self._pending.clear()
        self._end()
        self.num_images = self.num_scored_pixels = 0
        super().reset()

    def __getstate__(self) -> dict[str, Any]:
        self._gather()
        return {**super().__getstate__(), "_pool": None}

    def _processes(self) -> ProcessPoolExecutor:
        if self._pool is None:  # forked locks of torch can hang
            self._pool = ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("spawn"))
        return self._pool

    def _gather(self) -> None:
        while self._pending:
            self._add(self._result())
        self._end()

    def _result(self) -> np.ndarray:
        try:
            return self._pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a process that scores edges was killed, maybe for memory; try fewer workers.") from error

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _add(self, counts: np.ndarray) -> None:
        self.counts += torch.from_numpy(counts).to(self.counts.device)
        self.best += torch.from_numpy(best_image_counts(counts)).to(self.best.device)


def _counts(
    preset: Preset, prediction: np.ndarray, truth: np.ndarray, valid: np.ndarray, max_distance: float
) -> np.ndarray:
    return preset.counts(prediction, [truth], max_distance, valid)
