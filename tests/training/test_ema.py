"""The running mean of the weights against its formula and against timm's class."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtcl import UserError
from mtcl.config.schema import check_config
from mtcl.training.ema import ModelEma


class OperationRecorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []  # name, number of tensors that are written

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        num_tensors = len(args[0]) if isinstance(args[0], list) else 1
        self.calls.append((operation._schema.name.removeprefix("aten::"), num_tensors))
        return operation(*args, **(kwargs or {}))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    model[0].requires_grad_(False)
    return model


def train_step(model: nn.Module) -> None:
    """Change all weights that are trained, and the running statistics."""
    model(torch.randn(2, 3, 4, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)


@pytest.mark.parametrize("use_warmup", [False, True])
def test_the_average_against_its_formula_and_against_timm(use_warmup):
    model = make_model()
    ema, theirs = ModelEma(model, 0.7, use_warmup), ModelEmaV3(model, 0.7, use_warmup=use_warmup, exclude_buffers=True)
    want = {}
    for step in range(1, 8):
        train_step(model)
        decay = min(1 - step ** (-2 / 3), 0.7) if use_warmup else 0.7
        for name, parameter in model.named_parameters():
            value = parameter.detach().double()
            want[name] = value if step == 1 else decay * want[name] + (1 - decay) * value
        ema.update(model)
        theirs.update(model, step)
        for name, parameter in ema.model.named_parameters():
            torch.testing.assert_close(parameter.double(), want[name], rtol=1e-5, atol=1e-6)
            assert torch.equal(parameter, theirs.module.get_parameter(name)), name
    assert not any(torch.equal(p, q) for p, q in zip(ema.model[1:].parameters(), model[1:].parameters()))
    ema.copy_buffers(model)
    for name, buffer in ema.model.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
        assert torch.equal(buffer, theirs.module.get_buffer(name)), name


def test_where_timms_update_costs_more():
    """It copies each buffer, and writes the frozen weights anew: the reasons for an update of our class."""
    model = make_model()
    ema, theirs = ModelEma(model, 0.9), ModelEmaV3(model, 0.9, exclude_buffers=True)
    calls = []
    for average in (ema, theirs):
        average.update(model, step=1)
        with OperationRecorder() as recorder:
            average.update(model, step=2)
        calls.append(recorder.calls)
    assert calls == [[("_foreach_lerp_", 4)], [("_foreach_lerp_", 6), *[("copy_", 1)] * 3]]


def test_a_model_without_trained_weights_is_left_alone():
    model = make_model().requires_grad_(False)
    ema = ModelEma(model, 0.9)
    for _ in range(2):
        ema.update(model)
    assert ema.updates == 2
    assert all(torch.equal(p, q) for p, q in zip(ema.model.parameters(), model.parameters()))


def test_a_mean_that_would_never_move_is_refused():
    with pytest.raises(UserError, match=r"trainer\.ema=1\.0 must be a number from 0 to below 1, or null"):
        check_config({"trainer": {"ema": 1.0}})


def test_a_continued_average_is_that_of_the_uncut_one():
    model = make_model()
    ema = ModelEma(model, 0.9, use_warmup=True)
    for step in range(6):
        train_step(model)
        ema.update(model)
        if step == 2:
            continued = ModelEma(make_model(), 0.9, use_warmup=True)
            continued.model.load_state_dict(copy.deepcopy(ema.model.state_dict()))
            continued.updates = ema.updates
        if step > 2:
            continued.update(model)
    assert all(torch.equal(p, q) for p, q in zip(ema.model.parameters(), continued.model.parameters()))
