"""Saliency metrics: maximal F-measure and IoU over thresholds."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from mtcl.metrics.masked import VOID, PixelMetric, check_shapes, count_by_label, is_finite, validate_protocol

STEPS = tuple(k / 20 for k in range(1, 20))  # 0.05, 0.10, ..., 0.95


class SaliencyMetric(PixelMetric):
    """``maxF`` and ``mIoU``, each the largest over the thresholds t on the probability of being salient.

    The IoU of an image with neither a salient pixel nor a predicted one is 1 in all protocols, since the two agree
    (MTI/evaluation/jaccard.py; SAK divides by zero there). Images without a valid pixel do not count.

    Args:
        protocol: one of the three measures of the literature, which are not comparable:

            - ``standard``: t = 0.05, 0.10, ..., 0.95, salient where >= t. maxF: pixels pooled over the split, then
              F = (1 + b2) P R / (b2 P + R) with b2 = 0.3, which is (1 + b2) TP / (b2 positives + predicted), and 0
              where nothing is predicted or salient (atrc/src/data/metrics.py:131-232). mIoU: TP / (TP + FP + FN) of
              each image, mean over images (SAK/evaluation/eval_sal.py:5-69).
            - ``invpt``: the same, but the probability passes a second sigmoid before it is compared with t, so that
              only the four t = 0.55, ..., 0.70 have an effect, at probabilities of 0.2007, 0.4055, 0.6190 and 0.8473;
              up to 0.50 everything is salient, from 0.75 nothing (InvPT/utils/utils.py:37-39 and
              InvPT/evaluation/eval_sal.py:30,41-43; also TaskPrompter, MLoRE, MTMamba, BridgeNet, DiffusionMTL).
              InvPT itself prints no mIoU.
            - ``mtinet``: t = 0.20, 0.25, ..., 0.90, salient where > t; precision, recall and IoU of each image, mean
              over images, then maxF = 2 P R / (P + R) of the mean P and R (MTI/evaluation/eval_sal.py:21-121,
              astmt/fblib/evaluation/eval_sal.py:18-62). P is 0 where nothing is predicted, R is 0 where nothing is
              salient.
        **kwargs: of ``torchmetrics.Metric``.
    """

    task = "sal"
    PROTOCOLS = ("standard", "invpt", "mtinet")
    BETA2 = 0.3
    thresholds: Tensor  # float32 (K,), of the probability, increasing
    histogram: Tensor  # int64 (2, K + 2), by label: pixels not finite, and pixels that reach 0, 1, ..., K thresholds
    precision: Tensor  # float64 (K,), sum over images, as the next two
    recall: Tensor
    iou: Tensor
    num_images: Tensor  # int64

    def __init__(self, protocol: Literal["standard", "invpt", "mtinet"] = "standard", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.protocol = validate_protocol(self.task, protocol, self.PROTOCOLS)
        values = {"standard": STEPS, "invpt": tuple(logit(t) for t in STEPS), "mtinet": STEPS[3:18]}[protocol]
        self.register_buffer("thresholds", torch.tensor(values, dtype=torch.float32), persistent=False)
        self.add_counts("histogram", size=(2, len(values) + 2))
        self.add_counts("num_images", "out_of_range")
        self.add_sums("precision", "recall", "iou", size=(len(values),))

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add a batch.

        A pixel whose prediction is NaN or infinite is not predicted salient, and counts as ``not_finite``.

        Args:
            prediction: logits (B, 2, H, W), of which a softmax is taken, or probabilities (B, 1, H, W), for instance
                of saved maps.
            label: integers (B, H, W), 0, 1, or 255 where void.
        """
        check_shapes(self.task, prediction, (1, 2), label, ())
        columns = len(self.thresholds) + 2
        score = prediction[:, 0].float()
        if prediction.shape[1] == 2:
            score = prediction[:, 1].float() - score
        finite = is_finite(score)
        probability = score.sigmoid() if prediction.shape[1] == 2 else score.contiguous()
        reached = count_thresholds_reached(probability, self.thresholds, inclusive=self.protocol != "mtinet")
        counts = count_by_label(label, (reached + 1) * finite, columns)
        pixels = counts[:, 1:3]
        self.histogram += pixels.sum(0)
        self.out_of_range += counts.sum() - counts[:, 1:3].sum() - counts[:, 1 + VOID].sum()
        self._add_images(pixels)

    def _add_images(self, pixels: Tensor) -> None:
        """Add images by their histograms int64 (B, 2, K + 2)."""
        predicted, true_positives, positives = cumulative_counts(pixels)
        union = predicted + positives - true_positives
        has_valid = (pixels.sum((1, 2)) > 0).unsqueeze(1)
        self.precision += (true_positives / predicted.clamp(min=1)).sum(0)
        self.recall += (true_positives / positives.clamp(min=1)).sum(0)
        self.iou += (((true_positives + (union == 0)) / union.clamp(min=1)) * has_valid).sum(0)
        self.num_images += has_valid.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return ``maxF``, ``mIoU`` and ``not_finite``."""
        self.check_labels(f"allowed are 0, 1 and {VOID} for void")
        nothing_salient = self.histogram[1].sum() == 0  # then there is neither precision nor recall
        return {
            "maxF": self._f().max().masked_fill(nothing_salient, torch.nan),
            "mIoU": (self.iou / self.num_images).max(),
            "not_finite": self.histogram[:, 0].sum(),
        }

    def _f(self) -> Tensor:
        """Compute the F-measure at every threshold: float64 (K,)."""
        if self.protocol == "mtinet":
            precision, recall = self.precision / self.num_images, self.recall / self.num_images
            return 2 * precision * recall / (precision + recall + 1e-12)
        predicted, true_positives, positives = cumulative_counts(self.histogram)
        # The smallest denominator other than 0 is that of one positive and no prediction.
        return (1 + self.BETA2) * true_positives / (self.BETA2 * positives + predicted).clamp(min=self.BETA2)


def logit(value: float) -> float:
    """Return the input for which a sigmoid gives ``value``.

    As a threshold on probabilities it is below 0 if all exceed it, above 1 if none does.
    """
    return math.log(value / (1 - value))


def count_thresholds_reached(probability: Tensor, thresholds: Tensor, inclusive: bool) -> Tensor:
    """Count the increasing ``thresholds`` that each probability reaches.

    The same as ``torch.bucketize``, which searches: here a probability's cell of 1 / 64 decides all thresholds but
    the next one. Thresholds must be further apart than a cell.

    Args:
        probability: any shape.
        thresholds: float (K,), increasing.
        inclusive: a threshold is reached by its own value, too.

    Returns:
        int32, same shape as ``probability``.
    """
    cells = 64  # a power of two: the product below is exact
    starts = torch.arange(cells + 1, device=thresholds.device) / cells
    below = torch.bucketize(starts, thresholds, right=inclusive, out_int32=True)
    next_threshold = torch.cat([thresholds, thresholds.new_full((1,), math.inf)])[below]
    cell = (probability * cells).int().clamp_(0, cells).flatten()
    limit = next_threshold.index_select(0, cell).view_as(probability)
    more = probability >= limit if inclusive else probability > limit
    return below.index_select(0, cell).view_as(probability) + more


def cumulative_counts(histogram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count pixels per threshold from histograms.

    Args:
        histogram: (..., 2, K + 2), see :attr:`SaliencyMetric.histogram`.

    Returns:
        Predicted pixels float64 (..., K), true positives (..., K), and positives (..., 1).
    """
    upwards = histogram.flip(-1).cumsum(-1).flip(-1).double()  # column 1 + k: pixels that reach k thresholds or more
    return upwards[..., 2:].sum(-2), upwards[..., 1, 2:], upwards[..., 1, :1]
