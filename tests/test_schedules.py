"""Learning-rate schedules and the warm-up, by hand."""

import math

import pytest

from mtcl import UserError
from mtcl.schedules import build_schedule, linear_warmup


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("poly", {}, {0: 1, 25: 0.75**0.9, 50: 0.5**0.9, 99: 0.01**0.9, 100: 0, 150: 0}),
        ("poly", {"power": 2}, {0: 1, 50: 0.25, 100: 0}),
        ("cosine", {}, {0: 1, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 75: (1 - math.sqrt(0.5)) / 2, 100: 0, 130: 0}),
        ("constant", {}, {0: 1, 99: 1, 100: 1}),
        ("constant", {"warmup_steps": 4}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 4: 1, 50: 1}),
        ("poly", {"warmup_steps": 50}, {0: 0.02, 24: 0.5 * 0.76**0.9, 50: 0.5**0.9}),
        ("cosine", {"warmup_steps": 1}, {0: 1, 50: 0.5}),
    ],
)
def test_schedules_by_hand(name, options, expected):
    schedule = build_schedule(name, 100, **options)
    assert {step: schedule(step) for step in expected} == pytest.approx(expected, abs=1e-12)


def test_linear_warmup():
    assert [linear_warmup(step, 0) for step in (0, 5)] == [1, 1]
    assert [linear_warmup(step, 2) for step in range(4)] == [0.5, 1, 1, 1]


def test_a_schedule_of_no_steps_is_finite():
    assert all(math.isfinite(build_schedule(name, 0)(0)) for name in ("poly", "cosine", "constant"))


def test_unknown_schedule():
    with pytest.raises(UserError, match=r"^name=step .*poly, cosine or constant"):
        build_schedule("step", 10)
