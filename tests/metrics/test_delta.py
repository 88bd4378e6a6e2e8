"""Delta_MTL against published rows and its definition."""

import pytest
from helpers.published import HIGHER, PUBLISHED, SINGLE
from hypothesis import given
from hypothesis import strategies as st

from mtcl import UserError
from mtcl.metrics.delta import delta_mtl

POSITIVE = st.floats(0.01, 100)


@pytest.mark.parametrize(("method", "tasks", "values", "published"), PUBLISHED)
def test_delta_mtl_of_the_published_rows_is_the_published_one(method, tasks, values, published):
    delta = delta_mtl(dict(zip(tasks, values)), dict(zip(tasks, SINGLE[tasks])), HIGHER)
    assert f"{delta:.2f}" == f"{published:.2f}"


@given(st.dictionaries(st.sampled_from(sorted(HIGHER)), POSITIVE, min_size=1))
def test_delta_mtl_of_the_baseline_itself_is_zero(values):
    assert delta_mtl(values, values, HIGHER) == 0


@pytest.mark.parametrize("task", sorted(HIGHER))
def test_a_tenth_better_is_plus_ten_percent_in_either_direction(task):
    better = 1.1 if HIGHER[task] else 0.9
    assert delta_mtl({task: better * 3}, {task: 3.0}, HIGHER) == pytest.approx(10)


@given(st.dictionaries(st.sampled_from(sorted(HIGHER)), st.tuples(POSITIVE, POSITIVE), min_size=1), POSITIVE)
def test_delta_mtl_is_a_plain_mean_and_knows_no_units(pairs, unit):
    values, base = ({t: p[i] for t, p in pairs.items()} for i in (0, 1))
    total = 0.0
    for task in values:
        gain = (values[task] - base[task]) / base[task]
        total += gain if HIGHER[task] else -gain
    expected = 100 * total / len(values)
    scaled = ({t: unit * v for t, v in d.items()} for d in (values, base))
    assert delta_mtl(values, base, HIGHER) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert delta_mtl(*scaled, HIGHER) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "base", "word"),
    [({"depth": 1.0}, {"sal": 1.0}, "same tasks"), ({}, {}, "same tasks"), ({"sal": 1.0}, {"sal": 0.0}, "sal is 0")],
)
def test_delta_mtl_complains_about_what_it_cannot_divide(values, base, word):
    with pytest.raises(UserError, match=word):
        delta_mtl(values, base, HIGHER)
