"""Depth metrics: errors in metres, relative and logarithmic errors, threshold accuracies."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from mtcl.errors import UserError
from mtcl.metrics.masked import PixelMetric, check_shapes, is_finite, row_bands, validate_protocol


class DepthMetric(PixelMetric):
    """``rmse``, ``abs_rel``, ``sq_rel``, ``log_rmse`` and ``delta1..3``, or by ``protocol="mtan"`` two others.

    All are pooled over all valid pixels.

    With p the prediction in metres clamped at 0, q = max(p, 1e-9) where a logarithm or a ratio needs it, z the label:
    rmse = sqrt(mean (p - z)^2) and sq_rel = mean (p - z)^2 / z in metres, abs_rel = mean |p - z| / z,
    log_rmse = sqrt(mean (ln q - ln z)^2), delta_k the fraction of pixels with max(q / z, z / q) < 1.25^k. No crop, no
    median scaling, and no upper limit unless ``max_depth`` gives one.

    Sources: InvPT/evaluation/eval_depth.py:30-63, MTI/evaluation/eval_depth.py:19-55,
    atrc/src/data/metrics.py:292-343.

    ``mtan`` is the protocol of MTAN and LibMTL, for depth in metres or inverse depth of any unit:
    abs_err = mean |p - z| in the unit of the label, rel_err = mean |p - z| / z, over the pixels whose label is not 0.
    The prediction is not clamped. LibMTL weights the mean of a batch by its valid pixels, which is the pooled mean
    (LibMTL/examples/nyu/utils.py, class ``DepthMetric``); MTAN's own code takes the plain mean of its batches' means
    (mtan/im2im_pred/utils.py, ``depth_error``), which depends on the batches and is not computed here.

    Args:
        protocol: ``standard``; ``mtan``, see above; or ``astmt``, whose rmse is the mean over images of each one's own
            (astmt/fblib/evaluation/eval_depth.py:16-56), without the images that have no valid pixel; the other
            numbers stay pooled.
        max_depth: labels of this many metres and more are void; 80 in TaskPrompter and SAK
            (TaskPrompter/evaluation/eval_depth.py:20-54, SAK/evaluation/eval_depth.py:7-32).
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        UserError: the protocol is unknown, or ``max_depth`` is not above 0.
    """

    task = "depth"
    PROTOCOLS = ("standard", "astmt", "mtan")
    RATIOS = (1.25, 1.25**2, 1.25**3)
    # float64 (4,): of (p - z)^2, |p - z| / z, (p - z)^2 / z, (ln q - ln z)^2; by mtan (2,): of |p - z|, |p - z| / z
    sums: Tensor
    counts: Tensor  # int64 (5,): valid pixels, those within the three ratios, those not finite; by mtan without ratios
    sum_image_rmse: Tensor  # float64
    num_images: Tensor  # int64

    def __init__(
        self,
        protocol: Literal["standard", "astmt", "mtan"] = "standard",
        max_depth: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if max_depth is not None and not max_depth > 0:
            raise UserError(f"{self.task}: max_depth={max_depth} leaves no pixel; give metres above 0, or none.")
        self.protocol = validate_protocol(self.task, protocol, self.PROTOCOLS)
        self.max_depth = math.inf if max_depth is None else max_depth  # exclusive
        self.add_sums("sums", size=(2 if protocol == "mtan" else 4,))
        self.add_counts("counts", size=(2 if protocol == "mtan" else 2 + len(self.RATIOS),))
        self.add_sums("sum_image_rmse")
        self.add_counts("num_images")

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: metres (B, 1, H, W); NaN or infinity counts as 0 m and as ``not_finite``.
            label: metres (B, 1, H, W), valid where positive and finite; by ``mtan`` where not 0 and finite.
        """
        check_shapes(self.task, prediction, (1,), label, (1,))
        measure = self._measure_mtan if self.protocol == "mtan" else self._measure
        measured = [measure(*band) for band in row_bands(prediction, label)]
        sums, counts = (torch.stack(parts).sum(0) for parts in zip(*measured))
        squared, pixels = sums[0], counts[0]
        self.sum_image_rmse += (squared / pixels.clamp(min=1)).sqrt().sum()
        self.num_images += (pixels > 0).sum()
        self.sums += sums.sum(1)
        self.counts += counts.sum(1)

    def _measure(self, prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what each image adds to :attr:`sums` and :attr:`counts`: float64 (4, B) and int64 (5, B)."""
        valid = (label > 0) & (label < self.max_depth)
        finite = is_finite(prediction)
        # An invalid pixel is 1 m deep and predicted so, an error of 0.
        target = torch.where(valid, label, 1.0).double()
        depth = torch.where(valid, torch.where(finite, prediction, 0.0).clamp_(min=0), 1.0).double()
        error, positive = (depth - target).abs_(), depth.clamp_(min=1e-9)
        ratio, relative = positive / target, error / target
        sums = [error.square(), relative, relative * error, ratio.log().square_()]
        ratio = torch.maximum(ratio, target.div_(positive))
        invalid = ~valid
        close = [(ratio < limit) ^ invalid for limit in self.RATIOS]  # an invalid pixel is close
        counts = [valid, *close, valid & ~finite]
        return (
            torch.stack([array.sum((1, 2, 3)) for array in sums]),
            torch.stack([array.sum((1, 2, 3)) for array in counts]),
        )

    def _measure_mtan(self, prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what each image adds by the protocol ``mtan``: float64 (2, B) and int64 (2, B)."""
        valid = (label != 0) & is_finite(label) & (label < self.max_depth)
        finite = is_finite(prediction)
        target = torch.where(valid, label, 1.0).double()
        depth = torch.where(valid, torch.where(finite, prediction, 0.0), 1.0).double()
        error = (depth - target).abs_()
        counts = [valid, valid & ~finite]
        return (
            torch.stack([array.sum((1, 2, 3)) for array in (error, error / target)]),
            torch.stack([array.sum((1, 2, 3)) for array in counts]),
        )

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of the class, and ``not_finite``."""
        if self.protocol == "mtan":
            absolute, relative = self.sums / self.counts[0]
            return {"abs_err": absolute, "rel_err": relative, "not_finite": self.counts[1].clone()}
        squared, relative, squared_relative, squared_log = self.sums / self.counts[0]
        close = self.counts[1:4].double() / self.counts[0]
        return {
            "rmse": self.sum_image_rmse / self.num_images if self.protocol == "astmt" else squared.sqrt(),
            "abs_rel": relative,
            "sq_rel": squared_relative,
            "log_rmse": squared_log.sqrt(),
            **{f"delta{k}": fraction for k, fraction in enumerate(close, start=1)},
            "not_finite": self.counts[4].clone(),
        }
