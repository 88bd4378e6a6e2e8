"""Training in fp16 with a gradient scaler: on the CPU, where torch has both."""

import json
import logging
import math
from unittest import mock

import pytest
import torch
from helpers.common import TINY, composed
from helpers.toy_objectives import CPU, WEIGHTS, Toy
from torch import nn

from mtcl import UserError
from mtcl.config.build_data import build_tasks
from mtcl.config.build_training import build_training_run
from mtcl.regularizers.diagnostics import compare_feature_gradients
from mtcl.regularizers.weighting import GradientNormWeight
from mtcl.schedules import build_schedule
from mtcl.training.balancing import FixedWeights
from mtcl.training.balancing_avg_norm import AverageNorm
from mtcl.training.balancing_db_mtl import DualBalancing
from mtcl.training.balancing_scalarizers import build_scalarization
from mtcl.training.balancing_torchjd import GradientAggregation
from mtcl.training.checkpoint import Checkpoint
from mtcl.training.checkpoint_file import read_checkpoint_file, write_checkpoint_file
from mtcl.training.measurements import Throughput
from mtcl.training.nonfinite import NonFiniteGuard
from mtcl.training.trainer import Trainer

SCALE = torch.tensor(2.0**12)

BALANCERS = {
    "fixed": lambda _: FixedWeights(WEIGHTS),
    "avg_norm": lambda toy: AverageNorm(WEIGHTS, [toy.trunk]),
    "db_mtl": lambda _: DualBalancing(WEIGHTS, CPU),
    "torchjd": lambda _: GradientAggregation(WEIGHTS, CPU, "UPGrad"),
    "uncertainty": lambda _: build_scalarization(WEIGHTS, CPU, "UW", schedule=build_schedule("constant", 9), lr=0.1),
    "stch": lambda _: build_scalarization(
        WEIGHTS, CPU, "STCH", options={"mu": 0.5}, schedule=build_schedule("constant", 9)
    ),
}


@pytest.mark.parametrize("name", BALANCERS)
def test_gradients_have_the_scale_and_balancing_does_not_see_it(name):
    """Two steps, with a loss that is no objective; a power of two changes no bit."""
    results = []
    for scale in (None, SCALE):
        toy = Toy()
        balancer = BALANCERS[name](toy)
        balancer.loss_scale = scale
        for number in range(2):
            gradients = toy.step(balancer, number, "abcd")
        results.append(({n: g if scale is None else g / scale for n, g in gradients.items()}, balancer.summary()))
    for plain, scaled in zip(*results):
        assert plain.keys() == scaled.keys()
        for key, value in plain.items():
            torch.testing.assert_close(torch.as_tensor(scaled[key]), torch.as_tensor(value), rtol=1e-6, atol=0)


def test_norms_of_scaled_losses():
    """The weight of the contrast is a ratio; what is logged has no scale. A norm that overflows is left out."""
    feature = torch.randn(3, 4, requires_grad=True)
    task, contrast = feature.square().sum(), feature.exp().sum()
    weights = []
    for scale in (1.0, SCALE):
        weights.append(GradientNormWeight(["a"]))
        weights[-1].measure(scale * task, {"a": scale * contrast}, {"a": feature})
    assert weights[0].factor == weights[1].factor
    weights[0].update({"a": torch.tensor(1.0)}, {"a": torch.tensor(math.inf)})
    assert weights[0].factor == weights[1].factor > 0
    plain, scaled = (compare_feature_gradients(task, contrast, {"a": feature}, scale) for scale in (None, SCALE))
    torch.testing.assert_close(plain, scaled)


def test_overflows_are_no_failures():
    """They neither count nor interrupt a row; what the scale does not explain is a failure."""
    guard, yes, no = NonFiniteGuard(nn.Module(), 3), torch.tensor(True), torch.tensor(False)
    steps = [(no, yes), (no, no), (no, yes), (no, no), (yes, yes), (no, no), (no, yes), (no, no)]
    for step, (finite, may_overflow) in enumerate(steps):
        assert guard.record(step, ["a"], {"gradient": finite}, may_overflow) == float(not finite)
    assert [skipped.step for skipped in guard.flush()] == [1, 3, 5, 7]
    assert (guard.count, guard.num_overflows, guard.num_consecutive) == (4, 3, 2)
    guard.record(8, ["a"], {"gradient": no}, no)
    guard.flush()
    with pytest.raises(UserError, match=r"3 steps in a row .* from step 5 on"):
        guard.check()


def make_trainer(folder, *overrides, start_step=0) -> Trainer:
    config = composed(*TINY, "trainer.num_panels=0", "tasks.names=[depth,normals]", "trainer.max_steps=9", *overrides)
    torch.manual_seed(0)
    trainer = build_training_run(config, build_tasks(config), folder, CPU, start_step=start_step).trainer
    trainer.model.train()
    return trainer


@pytest.mark.slow
def test_steps_in_fp16(tmp_path, caplog):
    """Scaled too much a step is skipped and written down, else it is about that of fp32, clipped as there."""
    trainer, reference = (make_trainer(tmp_path, f"trainer.precision={name}") for name in ("fp16", "fp32"))
    values_before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    state = trainer.scaler.state_dict()
    trainer.scaler.load_state_dict(state | {"scale": 2.0**40})
    batches = [batch for batch, _ in zip(trainer.batches, range(2))]
    trainer.train_step(batches[0])
    assert trainer.scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, values_before[name]) for name, p in trainer.model.named_parameters())
    with caplog.at_level(logging.INFO):
        trainer._report_problems()
        trainer._report_problems()
    (message,) = (record.message for record in caplog.records)
    assert message.startswith("1 steps up to step 0 were skipped because gradients overflowed in fp16 (1 since the")
    assert trainer.num_skipped_steps == 0
    trainer.scaler.load_state_dict(state | {"scale": 2.0**10})
    one, two = (t.train_step(batches[1], with_diagnostics=True) for t in (trainer, reference))
    trainer._log(one, mock.MagicMock(), Throughput())
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"step": 0, "kind": "loss_scale", "scale": 1024.0, "skipped_steps": 1} in logged
    for name in ("depth", "normals", "gradient/depth/norm_task", "gradient/depth/norm_regularizer"):
        torch.testing.assert_close(one[name], two[name], rtol=0.1, atol=1e-3)
    moments = [t.optimizer.optimizer.state[next(t.model.parameters())]["exp_avg"].norm() for t in (trainer, reference)]
    torch.testing.assert_close(*moments, rtol=0.1, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [["balancing=torchjd"], ["trainer.accumulate_grad_batches=2", "balancing=famo"]])
def test_a_resumed_run_in_fp16_goes_on_bit_for_bit(overrides, tmp_path):
    """With the scale, and with the steps without an overflow after which it grows."""
    overrides = ["trainer.precision=fp16", *overrides]
    uncut = make_trainer(tmp_path, *overrides)
    uncut.scaler.set_growth_interval(3)
    uncut.scaler.load_state_dict(uncut.scaler.state_dict() | {"scale": 2.0**9})
    for step, batches in zip(range(4), uncut.batches_per_step()):
        uncut.train_step(*batches)
        uncut.step += 1
        if step == 1:
            write_checkpoint_file(tmp_path / "last.pt", uncut.checkpoint().to_dict())
    resumed = make_trainer(tmp_path, *overrides, start_step=2)
    resumed.restore(Checkpoint.from_dict(read_checkpoint_file(tmp_path / "last.pt")))
    for _, batches in zip(range(2), resumed.batches_per_step()):
        resumed.train_step(*batches)
        resumed.step += 1
    assert uncut.scaler.state_dict() == resumed.scaler.state_dict()
    assert uncut.scaler.get_scale() == 2.0**10
    states = [one.checkpoint().to_dict() for one in (uncut, resumed)]
    for part in ("model", "regularizer", "optimizer"):
        torch.testing.assert_close(states[1][part], states[0][part], rtol=0, atol=0)


def test_what_differentiates_in_the_forward_pass_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"regularizer=rep_mtl .*set trainer.precision=fp32 or bf16"):
        make_trainer(tmp_path, "regularizer=rep_mtl", "trainer.precision=fp16")
