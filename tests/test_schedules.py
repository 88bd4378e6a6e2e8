"""Learning-rate schedules and the warm-up, by hand."""

import math

import pytest
import torch

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
        ("step", {"step_size": 40}, {0: 1, 39: 1, 40: 0.5, 79: 0.5, 80: 0.25, 100: 0.25, 130: 0.125}),
        ("step", {"step_size": 40, "gamma": 0.1, "warmup_steps": 50}, {0: 0.02, 49: 0.1, 99: 0.01}),
    ],
)
def test_schedules_by_hand(name, options, expected):
    schedule = build_schedule(name, 100, **options)
    assert {step: schedule(step) for step in expected} == pytest.approx(expected, abs=1e-12)


def test_linear_warmup():
    assert [linear_warmup(step, 0) for step in (0, 5)] == [1, 1]
    assert [linear_warmup(step, 2) for step in range(4)] == [0.5, 1, 1, 1]


def test_step_is_torchs_step_lr():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    schedule = build_schedule("step", 10, step_size=3, gamma=0.5)
    for step in range(12):
        assert schedule(step) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        reference.step()


def test_a_schedule_of_no_steps_is_finite():
    options = {"poly": {}, "cosine": {}, "constant": {}, "step": {"step_size": 5}}
    assert all(math.isfinite(build_schedule(name, 0, **more)(0)) for name, more in options.items())


def test_unknown_schedule():
    with pytest.raises(UserError, match=r"^name=exponential .*poly, cosine, step or constant"):
        build_schedule("exponential", 10)


def test_step_needs_its_length():
    with pytest.raises(UserError, match=r"^step_size=null: name=step needs the number of steps"):
        build_schedule("step", 10)
