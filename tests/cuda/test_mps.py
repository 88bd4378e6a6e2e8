"""Apple's GPUs, of which none is at hand: choices by the name, recorders, and no float64 on the device."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.common import TINY, composed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtcl import UserError
from mtcl.cli import consistency
from mtcl.config import build_training
from mtcl.config.build_data import build_tasks
from mtcl.profiling.timing import synchronize
from mtcl.regularizers import masked_adamw
from mtcl.runtime import choose_device, choose_float64_device, choose_precision, rng_state, set_rng_state
from mtcl.training.balancing_torchjd import private_randomness
from mtcl.training.optimizers import ScheduledOptimizer, build_optimizer

MPS, CPU = torch.device("mps"), torch.device("cpu")


def test_the_device_is_chosen_by_its_name_only(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == MPS
    assert choose_device("auto").type != "mps"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^device=mps works in one process"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^device=mps, but PyTorch sees no GPU of an Apple computer; use cpu or auto"):
        choose_device("mps")


def test_precision_and_the_device_of_sums():
    assert [choose_precision(MPS, name) for name in ("auto", "fp16", "bf16")] == ["fp32", "fp16", "bf16"]
    assert choose_float64_device(MPS) == CPU
    assert choose_float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


@pytest.fixture
def calls(monkeypatch):
    recorder = mock.MagicMock()
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "synchronize"):
        monkeypatch.setattr(torch.mps, name, getattr(recorder, name))
    return recorder


def test_generators_and_waits(calls):
    calls.get_rng_state.return_value = torch.ones(4, dtype=torch.uint8)
    state = rng_state(MPS)
    assert state["mps"] is calls.get_rng_state.return_value
    set_rng_state(state, MPS)
    set_rng_state({"cpu": state["cpu"]}, MPS)  # of a run on a CPU
    synchronize(MPS)
    assert calls.mock_calls == [
        mock.call.get_rng_state(),
        mock.call.set_rng_state(state["mps"]),
        mock.call.synchronize(),
    ]


def test_an_aggregator_has_private_randomness(calls):
    with private_randomness(1, 7, MPS):
        seed = torch.initial_seed()
    calls.manual_seed.assert_called_with(seed)
    assert calls.mock_calls[-1] == mock.call.set_rng_state(calls.get_rng_state.return_value)


def test_optimisers_are_not_fused():
    """So the host reads whether to skip a step."""
    parameters = [mock.MagicMock(spec=nn.Parameter, requires_grad=True, ndim=2, device=MPS)]
    model = SimpleNamespace(parameters=lambda: parameters, backbone_parameters=lambda: [])
    with mock.patch("mtcl.training.optimizers.create_optimizer_v2") as create:
        build_optimizer(model, "adamw", 0.1)
    assert create.call_args.kwargs["fused"] is False
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = ScheduledOptimizer(torch.optim.AdamW([weight], lr=0.1, fused=False), lambda _: 1.0)
    optimizer.step(0, torch.ones(()))
    assert weight.tolist() == [1, 1]
    optimizer.step(0, torch.zeros(()))
    assert weight.tolist() != [1, 1]


class NoFloat64(TorchDispatchMode):
    """Refuses tensors in float64, which Apple's GPUs lack."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert all(x.dtype != torch.float64 for x in tree_leaves(result) if isinstance(x, torch.Tensor)), func
        return result


def test_a_training_step_has_no_float64(tmp_path, monkeypatch):
    """The corrections of the projectors' AdamW are those that it has with float64; metrics are on the CPU."""
    step = torch.tensor([1.0, 10.0, 20000.0])
    correct = masked_adamw._correct_bias(step, 0.1, 0.9, 0.999, torch.float32)
    monkeypatch.setattr(masked_adamw, "choose_float64_device", lambda _: torch.device("meta"))
    torch.testing.assert_close(masked_adamw._correct_bias(step, 0.1, 0.9, 0.999, torch.float32), correct)
    config = composed(*TINY, "tasks.names=[depth,normals]", "trainer.max_steps=2")
    trainer = build_training.build_training_run(config, build_tasks(config), tmp_path, CPU).trainer
    batch = next(iter(trainer.batches))
    with NoFloat64():
        trainer.train_step(batch, with_diagnostics=True)
        with pytest.raises(AssertionError):
            torch.zeros(1).double()


def test_what_needs_float64_is_refused(tmp_path, monkeypatch):
    config = composed(*TINY, "tasks.names=[depth,normals]", "regularizer.options.source_weights=auto")
    tasks, model = build_tasks(config), build_training.build_model(config, build_tasks(config), False)
    with pytest.raises(UserError, match=r"source_weights=auto sums in float64, which trainer\.device=mps lacks"):
        build_training.build_trainer(config, tasks, model, None, None, tmp_path, MPS)
    monkeypatch.setattr(consistency, "choose_device", lambda *_: MPS)
    with pytest.raises(UserError, match="mps lacks float64, in which distances are measured"):
        consistency.choose_float64_capable_device("mps")
