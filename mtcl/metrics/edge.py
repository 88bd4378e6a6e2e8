"""Edges."""

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

MIN_PIXELS_FOR_WORKERS = 2_000_000  # pixels; with fewer than that, processes take longer to start than to work


class EdgeMetric(PixelMetric):
    """The field's ``odsF``, ``oisF`` and ``ap``, see :mod:`mtcl.metrics.boundaries`, but not without ``boundaries``;
    and ``loss``: the class-balanced cross-entropy of :class:`mtcl.losses.EdgeLoss`, over all valid pixels.

    The prediction is the sigmoid times 255, truncated to 8 bits (InvPT/evaluation/evaluate_utils.py:69-106), the ground
    truth every pixel of label 1. Void pixels have no ground truth, and what is predicted
    there (after the suppression) is dropped. Every image is scored at the size given, so padding must be cut off.
    A prediction that is NaN or infinite counts as no edge and, with ``boundaries``, as ``not_finite``. ``threshold`` is
    that of odsF.

    ``preset`` names the toolchain, ``max_distance`` is a fraction of the diagonal (NYUD 0.011, PASCAL 0.0075). For a
    quick look: fewer ``thresholds`` (even ones; None: the preset's), and only ``every`` n-th image. ``workers``
    processes score while the network goes on (0: this one); the first images are this one's, see ``PATIENCE``.

    update: logits (B, 1, H, W), labels (B, 1, H, W), 0, 1 or 255 = void.
    """

    task = "edge"
    total: Tensor  # float64
    pixels: Tensor  # int64
    counts: Tensor  # int64 (thresholds, 4): cntR, sumR, cntP, sumP over the images
    best: Tensor  # int64 (4,): the same at each image's best threshold

    def __init__(
        self,
        positive_weight: float = 0.95,
        boundaries: bool = True,
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
        self.boundaries, self.max_distance, self.every, self.workers = boundaries, max_distance, every, workers
        self.preset: Preset = get_preset(preset, thresholds)
        self.seen = self.scored = 0  # images, and pixels of those that were scored, on this rank
        self._pool: ProcessPoolExecutor | None = None
        self._pending: deque[Future[np.ndarray]] = deque()
        self.add_sums("total")
        self.add_counts("pixels", "not_finite", "out_of_range")
        if boundaries:
            self.add_counts("counts", size=(len(self.preset.thresholds), 4))
            self.add_counts("best", size=(4,))

    def update(self, prediction: Tensor, label: Tensor) -> None:
        check_shapes(self.task, prediction, (1,), label, (1,))
        logit, w = prediction.double(), self.positive_weight
        cost = torch.where(label == 1, -w * F.logsigmoid(logit), -(1 - w) * F.logsigmoid(-logit))
        valid = label != 255
        self.total += torch.where(valid, cost, 0.0).sum()
        self.pixels += valid.sum()
        self.not_finite += (valid & ~is_finite(prediction)).sum()
        self.out_of_range += (valid & (label != 0) & (label != 1)).sum()
        if self.boundaries:
            rows = [row for row in range(len(label)) if (self.seen + row) % self.every == 0]
            self.seen += len(label)
            self._score(prediction[rows], label[rows])

    def _score(self, prediction: Tensor, label: Tensor) -> None:
        valid = label != 255
        levels = (prediction.float().sigmoid() * 255).masked_fill(~is_finite(prediction), 0).to(torch.uint8)
        for image in zip(*(t[:, 0].cpu().numpy() for t in (levels, label == 1, valid)), strict=True):
            job = (self.preset, *image, self.max_distance)
            self.scored += image[0].size
            if self.workers == 0 or self.scored <= MIN_PIXELS_FOR_WORKERS:
                self._add(_counts(*job))
                continue
            if len(self._pending) >= 4 * self.workers:  # no more images than that wait in memory
                self._add(self._result())
            self._pending.append(self._processes().submit(_counts, *job))

    def compute(self) -> dict[str, Tensor]:
        self.check_labels("0 is none, 1 an edge, 255 void")
        found = {"loss": self.total / self.pixels}
        if self.boundaries:
            self._gather()
            result = compute_scores(
                self.counts.cpu().numpy(),
                self.best.cpu().numpy(),
                np.array(self.preset.thresholds),
                self.preset.interpolate,
            )
            for name in ("odsF", "oisF", "ap", "threshold"):
                found[name] = torch.tensor(getattr(result, name), dtype=torch.float64, device=self.total.device)
            found["not_finite"] = self.not_finite.clone()
        return found

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As torchmetrics', after the images under way."""
        self._gather()
        super().sync(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As torchmetrics', which sets the state aside: the images under way belong to it."""
        self._gather()
        return super().forward(*args, **kwargs)

    def reset(self) -> None:
        """As torchmetrics'; images under way are dropped, and the processes end."""
        for future in self._pending:
            future.cancel()
        self._pending.clear()
        self._end()
        self.seen = self.scored = 0
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
