"""Means, paired differences and corrected p-values against the definitions and SciPy."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from mtcl.results.statistics import adjust_by_holm, paired_difference, summarize_values

SEEDS = st.dictionaries(st.integers(0, 20), st.floats(-100, 100), min_size=1, max_size=8)


@given(st.lists(st.floats(-100, 100), max_size=8), st.integers(0, 3))
def test_summary_is_that_of_the_statistics_module_without_nan(values, nans):
    mean, std, count = summarize_values([*values, *[math.nan] * nans])
    assert count == len(values)
    assert mean == pytest.approx(statistics.fmean(values), abs=1e-9) if values else math.isnan(mean)
    assert std == pytest.approx(statistics.stdev(values), abs=1e-9) if len(values) > 1 else math.isnan(std)


@given(SEEDS, SEEDS)
def test_paired_differences_are_antisymmetric_and_over_common_seeds_only(a, b):
    one, other = paired_difference(a, b), paired_difference(b, a)
    common = sorted(set(a) & set(b))
    assert one.pairs == other.pairs == len(common)
    if common:
        assert one.mean == pytest.approx(statistics.fmean(a[s] - b[s] for s in common), abs=1e-9)
        assert one.mean == -other.mean
    if len(common) > 1:
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
        assert one.excludes_zero == other.excludes_zero
    else:
        assert math.isnan(one.low)
        assert not one.excludes_zero


@pytest.mark.parametrize("differences", [[1.0, 2.0], [0.5, 0.1, -0.3], [1.0, 1.2, 0.9, 1.4, 0.7]])
def test_the_interval_holds_95_percent_of_students_t(differences):
    difference = paired_difference(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))
    dof = len(differences) - 1
    t = (difference.high - difference.mean) * math.sqrt(len(differences)) / statistics.stdev(differences)
    scale = math.gamma((dof + 1) / 2) / math.sqrt(dof * math.pi) / math.gamma(dof / 2)
    inside, _ = integrate.quad(lambda x: scale * (1 + x * x / dof) ** (-(dof + 1) / 2), -t, t)
    assert inside == pytest.approx(0.95, abs=1e-6)


def test_a_constant_difference_excludes_zero_and_a_nan_is_no_pair():
    a, b = {0: 2.0, 1: 3.0, 2: math.nan}, {0: 1.0, 1: 2.0, 2: 0.0}
    assert paired_difference(a, b) == (1.0, 1.0, 1.0, 2)
    assert paired_difference(a, b).excludes_zero


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holms_values_are_those_of_the_definition(values):
    adjusted, order = adjust_by_holm(values), sorted(values)
    for value, adjusted_value in zip(values, adjusted):
        rank = max(i for i, other in enumerate(order) if other == value)
        expected = max((min(1, (len(values) - i) * order[i]) for i in range(rank + 1)), default=0)
        first = order.index(value)
        assert (
            min(1, max((len(values) - i) * order[i] for i in range(first + 1))) - 1e-12
            <= adjusted_value
            <= expected + 1e-12
        )


def test_p_values_are_those_of_scipys_paired_test():
    a, b = {0: 1.0, 1: 2.5, 2: 2.0, 3: 4.0}, {0: 0.5, 1: 1.0, 2: 2.5, 3: 2.0}
    expected = stats.ttest_rel(list(a.values()), list(b.values())).pvalue
    assert paired_difference(a, b).p_value == pytest.approx(expected)
    assert paired_difference(a, a).p_value == 1
