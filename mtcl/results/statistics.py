"""Statistics over seeds: means, standard deviations, paired differences and their tests, on plain numbers."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from scipy.special import stdtr, stdtrit  # Student's t: scipy.stats would take most of a command's start

MIN_PAIRS = 3  # for a verdict: of two, one outlier makes any interval
CONFIDENCE_LEVEL = 0.95


class Summary(NamedTuple):
    """Mean and standard deviation (n - 1 in the denominator; NaN for fewer than two) of ``num`` values."""

    mean: float
    std: float
    num: int


class PairedDifference(NamedTuple):
    """Mean difference over ``pairs`` and its interval; ``low`` and ``high`` are NaN for fewer than two pairs."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def excludes_zero(self) -> bool:
        """Return whether the interval lies wholly on one side of 0."""
        return self.low > 0 or self.high < 0

    @property
    def has_enough_pairs(self) -> bool:
        """Return whether there are enough pairs for a verdict."""
        return self.pairs >= MIN_PAIRS

    @property
    def p_value(self) -> float:
        """Return the two-sided p-value of the paired t test; NaN for fewer than two pairs.

        The interval must be one of :data:`CONFIDENCE_LEVEL`.

        >>> f"{PairedDifference(1.0, 0.0, 2.0, 5).p_value:.4f}"
        '0.0500'
        """
        if self.pairs < 2:
            return math.nan
        half_width = (self.high - self.low) / 2
        if half_width == 0:
            return 0.0 if self.mean else 1.0
        dof = self.pairs - 1
        return float(2 * stdtr(dof, -abs(self.mean) / half_width * stdtrit(dof, (1 + CONFIDENCE_LEVEL) / 2)))


def summarize_values(values: Iterable[float]) -> Summary:
    """Compute mean and standard deviation of the values that are not NaN; the mean of none is NaN.

    >>> summarize_values([1.0, 3.0, float("nan")])
    Summary(mean=2.0, std=1.4142135623730951, num=2)
    """
    numbers = [value for value in values if not math.isnan(value)]
    num = len(numbers)
    mean = math.fsum(numbers) / num if num else math.nan  # exact sums: the order of seeds plays no part
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in numbers) / (num - 1)) if num > 1 else math.nan
    return Summary(mean, std, num)


def paired_difference(
    a: Mapping[Hashable, float], b: Mapping[Hashable, float], level: float = CONFIDENCE_LEVEL
) -> PairedDifference:
    """Compute the mean of a - b over the common seeds, and its interval of Student's t.

    The interval is mean -+ t s / sqrt(pairs), s the standard deviation of the differences, t the quantile
    with pairs - 1 degrees of freedom.

    Args:
        a: seed -> value; a NaN on either side takes no part.
        b: seed -> value.
        level: confidence level of the interval.
    """
    mean, std, pairs = summarize_values(value - b[seed] for seed, value in a.items() if seed in b)
    half_width = float(stdtrit(pairs - 1, (1 + level) / 2)) * std / math.sqrt(pairs) if pairs > 1 else math.nan
    return PairedDifference(mean, mean - half_width, mean + half_width, pairs)


def adjust_by_holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down method (Scand. J. Statist. 6, 1979).

    >>> [round(p, 3) for p in adjust_by_holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def minimum_detectable_effect(
    a: Mapping[Hashable, float], b: Mapping[Hashable, float], level: float = CONFIDENCE_LEVEL, power: float = 0.8
) -> float:
    """Compute the mean of a - b that a paired, two-sided t test of as many pairs detects with probability ``power``.

    It is (t_{(1 + level) / 2} + t_{power}) s / sqrt(pairs), s the standard deviation of the differences, taken
    for the true one, and t Student's quantiles with pairs - 1 degrees of freedom.

    Args:
        a: seed -> value, as for :func:`paired_difference`.
        b: seed -> value.
        level: confidence level of the test.
        power: probability of detecting the effect.

    Returns:
        The effect; NaN for fewer than two pairs.
    """
    _, std, pairs = summarize_values(value - b[seed] for seed, value in a.items() if seed in b)
    if pairs < 2:
        return math.nan
    quantiles = stdtrit(pairs - 1, (1 + level) / 2) + stdtrit(pairs - 1, power)
    return float(quantiles) * std / math.sqrt(pairs)
