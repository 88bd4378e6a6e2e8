"""Delta_MTL, and what several seeds tell: means, standard deviations, paired differences. Plain numbers, no files."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from scipy import stats

from mtcl.errors import UserError

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
        return self.low > 0 or self.high < 0

    @property
    def has_enough_pairs(self) -> bool:
        """Are there pairs enough for a verdict?"""
        return self.pairs >= MIN_PAIRS

    @property
    def p_value(self) -> float:
        """The two-sided p-value of the paired t test, from an interval of :data:`CONFIDENCE_LEVEL`; NaN for fewer than two pairs.

        >>> f"{Paired(1.0, 0.0, 2.0, 5).p_value:.4f}"
        '0.0500'
        """
        if self.pairs < 2:
            return math.nan
        half = (self.high - self.low) / 2
        if half == 0:
            return 0.0 if self.mean else 1.0
        dof = self.pairs - 1
        return float(2 * stats.t.sf(abs(self.mean) / half * stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, dof), dof))


def delta_mtl(
    values: Mapping[str, float], baseline: Mapping[str, float], higher_is_better: Mapping[str, bool]
) -> float:
    """(100 / T) sum_t s_t (M_t - B_t) / B_t in percent, s_t = 1 where higher is better, else -1
    (MTI/evaluation/evaluate_utils.py:38-63).

    ``values`` M and ``baseline`` B: task -> its one metric, both over the same T tasks, in the same unit.
    ``UserError`` where the tasks differ, there are none, or a baseline is 0 or less. NaN in, NaN out.

    >>> delta_mtl({"semseg": 0.75, "depth": 0.5}, {"semseg": 0.5, "depth": 0.5}, {"semseg": True, "depth": False})
    25.0
    """
    if not values or set(values) != set(baseline):
        told = [", ".join(sorted(tasks)) or "none" for tasks in (values, baseline)]
        raise UserError(f"Delta_MTL needs the same tasks on both sides, not {told[0]} against {told[1]}.")
    for task, value in baseline.items():
        if value <= 0:
            raise UserError(f"The baseline of {task} is {value:g}: a relative difference needs one above 0.")
    signed = [(1 if higher_is_better[t] else -1) * (values[t] - baseline[t]) / baseline[t] for t in values]
    return 100 * math.fsum(signed) / len(signed) if all(map(math.isfinite, signed)) else math.nan


def summarize_values(values: Iterable[float]) -> Summary:
    """Of the values that are not NaN; a mean of NaN where there are none.

    >>> summary([1.0, 3.0, float("nan")])
    Summary(mean=2.0, std=1.4142135623730951, num=2)
    """
    known = [value for value in values if not math.isnan(value)]
    num = len(known)
    mean = math.fsum(known) / num if num else math.nan  # exact sums: the order of seeds plays no part
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (num - 1)) if num > 1 else math.nan
    return Summary(mean, std, num)


def paired_difference(
    a: Mapping[Hashable, float], b: Mapping[Hashable, float], level: float = CONFIDENCE_LEVEL
) -> PairedDifference:
    """Mean of a - b over the seeds that both have, and its interval of Student's t with pairs - 1 degrees of freedom.

    ``a``, ``b``: seed -> value; a NaN on either side takes no part. The interval is mean -+ t s / sqrt(pairs), s the
    standard deviation of the differences.
    """
    mean, std, pairs = summarize_values(value - b[seed] for seed, value in a.items() if seed in b)
    half = float(stats.t.ppf((1 + level) / 2, pairs - 1)) * std / math.sqrt(pairs) if pairs > 1 else math.nan
    return PairedDifference(mean, mean - half, mean + half, pairs)


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
    """The mean of a - b that a paired, two-sided t test of as many pairs would find with probability ``power``.

    ``a``, ``b``: as :func:`paired_difference`'s. (t_{(1 + level) / 2} + t_{power}) s / sqrt(pairs), s the standard
    deviation of the differences, taken for the true one, and t Student's quantiles; NaN for fewer than two pairs.
    """
    _, std, pairs = summarize_values(value - b[seed] for seed, value in a.items() if seed in b)
    if pairs < 2:
        return math.nan
    both = stats.t.ppf((1 + level) / 2, pairs - 1) + stats.t.ppf(power, pairs - 1)
    return float(both) * std / math.sqrt(pairs)
