"""Surface normal metrics: angular errors."""

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from mtcl.metrics.masked import PixelMetric, check_shapes, count, is_finite, row_bands, validate_protocol


class NormalsMetric(PixelMetric):
    """Angular errors, pooled over all valid pixels.

    ``mErr``, ``median`` and ``rmse`` are of the angles in degrees, ``within_11.25``, ``within_22.5`` and ``within_30``
    the fractions of smaller angles.

    mErr is the mean angle between prediction and label, both of length 1
    (InvPT/evaluation/eval_normals.py:33-51, atrc/src/data/metrics.py:235-289; the others as MTI-Net has them offline,
    MTI/evaluation/eval_normals.py:24-65). For unit vectors the literature writes it 2 atan2(|p - g|, |p + g|); here it
    is atan2(|p x g|, p . g), the same angle of vectors of any length, exact near 0 and 180 degrees, too.

    The median comes from a histogram of 0.01 degrees: it is off by at most 0.005 degrees. The three limits are edges of
    its bins.

    ``mtan`` is the protocol of MTAN and LibMTL (LibMTL/examples/nyu/utils.py, class ``NormalMetric``;
    mtan/im2im_pred/utils.py, ``normal_error``): the angle is acos of p . g clamped to -1..1, with p made a unit vector
    and g left as it is, over the pixels where the sum of g's components is not 0. A label that is shorter than 1 is
    thus further away, and one whose components cancel is void. The median is exact, from all angles at once, as in
    LibMTL: the metric keeps 4 bytes for every pixel, valid or not, on its device, and on every process those of all
    processes when it computes, which takes 16 bytes more for joining and sorting them.

    Args:
        protocol: ``standard`` or ``mtan``.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        UserError: the protocol is unknown.
    """

    task = "normals"
    PROTOCOLS = ("standard", "mtan")
    LIMITS = (11.25, 22.5, 30.0)
    BINS_PER_DEGREE = 100  # of which the limits are multiples
    BINS = 180 * BINS_PER_DEGREE
    degrees: Tensor  # float64
    squared: Tensor  # float64
    histogram: Tensor  # int64 (BINS,)
    angles: list[Tensor]  # only by mtan: float32 (pixels of a band,) in degrees, infinite where void

    def __init__(self, protocol: Literal["standard", "mtan"] = "standard", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.protocol = validate_protocol(self.task, protocol, self.PROTOCOLS)
        if protocol == "mtan":
            self.add_state("angles", [], dist_reduce_fx="cat")
        self.add_sums("degrees", "squared")
        self.add_counts("histogram", size=(self.BINS,))
        self.add_counts("not_finite", "out_of_range")

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: vectors (B, 3, H, W) of any length; one of length 0 is 90 degrees off, one with a NaN or
                infinite component counts as that, and as ``not_finite``.
            label: (B, 3, H, W) with components in -1..1, the zero vector where void.
        """
        check_shapes(self.task, prediction, (3,), label, (3,))
        for band in row_bands(prediction, label):
            self._add(*band)

    def _add(self, prediction: Tensor, label: Tensor) -> None:
        largest = label.abs().amax(dim=1)
        in_range = largest <= 1.001  # False for NaN
        if self.protocol == "mtan":
            valid = (label.sum(dim=1) != 0) & in_range
            angle, finite = angle_by_cosine(prediction.double(), label.double())
        else:
            valid = (largest > 0) & in_range
            angle, finite = angle_between(prediction.double().unbind(1), label.double().unbind(1))
        angle = torch.where(finite, angle.rad2deg_(), 90.0)
        if self.protocol == "mtan":  # the void among them: how many there are is not known without waiting
            self.angles.append(torch.where(valid, angle, torch.inf).float().flatten())
        cell = (angle * self.BINS_PER_DEGREE).int().clamp_(max=self.BINS - 1)
        cell -= self.BINS
        cell *= valid
        cell += self.BINS  # one more cell for the void
        self.histogram += count(cell, self.BINS + 1)[: self.BINS]
        angle *= valid
        self.degrees += angle.sum()
        self.squared += angle.square_().sum()
        self.not_finite += (valid & ~finite).sum()
        self.out_of_range += (~in_range).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of the class, and ``not_finite``."""
        self.check_labels("their components must be in -1..1")
        below = self.histogram.cumsum(0)
        pixels = below[-1]
        limits = [round(limit * self.BINS_PER_DEGREE) - 1 for limit in self.LIMITS]
        return {
            "mErr": self.degrees / pixels,
            "median": self._exact_median(pixels) if self.protocol == "mtan" else self._median(below),
            "rmse": (self.squared / pixels).sqrt(),
            **{f"within_{limit:g}": below[last].double() / pixels for limit, last in zip(self.LIMITS, limits)},
            "not_finite": self.not_finite.clone(),
        }

    def _median(self, below: Tensor) -> Tensor:
        """Return the mean of the two middle angles (of an odd number, twice one), each at the centre of its bin."""
        ranks = torch.stack([(below[-1] - 1) // 2, below[-1] // 2])
        middle = torch.searchsorted(below, ranks, right=True).double()
        return ((middle + 0.5) / self.BINS_PER_DEGREE).mean().masked_fill(below[-1] == 0, torch.nan)

    def _exact_median(self, pixels: Tensor) -> Tensor:
        """Return the mean of the two middle ones of all angles that were kept, of which ``pixels`` are valid."""
        if not len(self.angles):
            return torch.full_like(self.degrees, torch.nan)
        ascending = dim_zero_cat(self.angles).sort().values  # the void last
        ranks = torch.stack([(pixels - 1) // 2, pixels // 2]).clamp_(min=0)
        return ascending[ranks].double().mean().masked_fill(pixels == 0, torch.nan)


def angle_by_cosine(prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Compute acos of the dot product of unit predictions and labels, clamped to -1..1.

    Args:
        prediction: vectors (B, 3, H, W) of any length.
        label: the same shape, taken as they are.

    Returns:
        Radians (B, H, W), pi / 2 where a prediction is 0; and where they are defined: not where a component is NaN or
        infinite.
    """
    length = prediction.square().sum(dim=1).sqrt_()
    dot = (prediction * label).sum(dim=1)
    finite = is_finite(length) & is_finite(dot)
    cosine = torch.where(length > 0, dot / length.clamp(min=1e-300), 0.0)
    return cosine.clamp_(-1, 1).acos_(), finite


def angle_between(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Compute the angles between vectors.

    Args:
        a: the three components, each of any shape.
        b: the same.

    Returns:
        Radians, pi / 2 where a vector is 0; and where they are defined: not where a component is NaN or infinite, which
        the products with any vector but 0 inherit.
    """
    dot = (a[0] * b[0]).addcmul_(a[1], b[1]).addcmul_(a[2], b[2])
    squared = torch.zeros_like(dot)
    for i, j in ((1, 2), (2, 0), (0, 1)):
        component = (a[i] * b[j]).addcmul_(a[j], b[i], value=-1)
        squared.addcmul_(component, component)
    finite = squared < torch.inf  # False for NaN
    return squared.sqrt_().clamp_(min=1e-300).atan2_(dot), finite  # atan2(tiny, 0) is a right angle
