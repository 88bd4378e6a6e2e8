"""The check itself: each kind of mistake is planted, and found."""

import pytest
import torch
import torch.nn.functional as F
from helpers.fake_cuda import (
    CUDA,
    NO_DETERMINISTIC_KERNEL,
    HostWaitError,
    differentiate,
    fake_cuda,
    list_low_precision,
)
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
)
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

MISTAKES = {
    "a tensor on the CPU": (lambda x: x + torch.ones(4), FakeTensorDeviceMismatchError),
    "an index of a CPU tensor": (lambda x: torch.ones(4)[x.long()], RuntimeError),
    "item": (lambda x: x.sum().item(), DataDependentOutputException),
    "tolist": (lambda x: x.tolist(), DataDependentOutputException),
    "a branch on data": (lambda x: x if x.sum() > 0 else -x, DataDependentOutputException),
    "nonzero": (lambda x: x[x > 0], DynamicOutputShapeException),
    "a class count from data": (lambda x: F.one_hot(x.long()), DataDependentOutputException),
    "a copy to the host": (lambda x: x.cpu(), HostWaitError),
    "numbers of the host": (lambda x: x * torch.tensor([1.0, 2, 3, 4], device=CUDA), HostWaitError),
    "new numbers of the host": (lambda x: x * x.new_tensor([1.0, 2, 3, 4]), HostWaitError),
    "an index of the host": (lambda x: x[[0, 1]], HostWaitError),
    "a copy that waits": (lambda x: x.copy_(torch.ones(4)), HostWaitError),
    "a masked write of several values": (lambda x: x.__setitem__(x > 0, torch.ones(4, device=CUDA)), HostWaitError),
    "types that autocast makes differ": (
        lambda x: x.index_add_(0, torch.arange(4, device=CUDA), nn.Linear(4, 4, device=CUDA)(x)),
        TypeError,
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name):
    mistake, error = MISTAKES[name]
    with fake_cuda():
        x = torch.ones(4, device=CUDA)
        with torch.autocast("cuda", dtype=torch.bfloat16), pytest.raises(error):
            mistake(x)


def test_what_does_not_wait_passes():
    with fake_cuda() as device:
        x = torch.ones(4, device=CUDA)
        y = torch.ones(4).to(CUDA, non_blocking=True)
        x.copy_(y)
        x.copy_(torch.ones(4), non_blocking=True)
        x[x > 0] = 0.0
        x[2] = 1.0
        x = torch.where(x > 0, x, torch.nan) * torch.tensor(2.0)
        assert x.dtype == torch.float32
        with device.may_wait():
            assert x.cpu().device.type == "cpu"
        with pytest.raises(HostWaitError):
            x.cpu()


def test_autocast_is_that_of_cuda():
    with fake_cuda(), torch.autocast("cuda", dtype=torch.bfloat16):
        x = nn.Linear(4, 4, device=CUDA)(torch.ones(4, device=CUDA))
        assert x.dtype == torch.bfloat16
        assert x.softmax(0).dtype == x.norm().dtype == torch.float32


def test_a_layer_that_rounds_is_listed():
    """Behind the last layer bf16 is allowed, unless the whole graph is asked for."""
    with fake_cuda(), torch.autocast("cuda", dtype=torch.bfloat16):
        rounded = nn.Linear(4, 4, device=CUDA)(torch.ones(2, 4, device=CUDA))
        with torch.autocast("cuda", enabled=False):
            x = nn.Linear(4, 4, device=CUDA)(rounded.float()).square().mean()
    assert list_low_precision(x, up_to_layers=True) == []
    assert list_low_precision(rounded.float(), up_to_layers=True) == ["AddmmBackward0"]
    assert "AddmmBackward0" in list_low_precision(x)


class Halved(torch.autograd.Function):
    """Returns a gradient on the host: a planted mistake."""

    @staticmethod
    def forward(context, x):
        return x / 2

    @staticmethod
    def backward(context, gradient):
        return torch.ones(gradient.shape)


def test_the_backward_pass_is_checked_too():
    with fake_cuda() as device:
        x = torch.ones(1, 1, 4, 4, device=CUDA, requires_grad=True)
        F.interpolate(x, (8, 8), mode="bilinear").sum().backward()
        assert x.grad.shape == x.shape
        assert set(device.check.counts) & NO_DETERMINISTIC_KERNEL == {"upsample_bilinear2d_backward"}
        with pytest.raises(AssertionError, match="gets a gradient on cpu"):
            Halved.apply(x).sum().backward()


def test_the_stand_in_for_the_engine_computes_its_gradients():
    """On the CPU, with numbers: a shared layer, an unused output, a view, a checkpoint and two roots."""
    torch.manual_seed(0)
    first, second = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.Linear(4, 3)
    x = torch.randn(2, 2, 6, 6, requires_grad=True)
    features = checkpoint(first, x, use_reentrant=False)
    rows = features.flatten(2).transpose(1, 2)
    parts = (second(rows) + second(rows.detach())).split([1, 2], dim=-1)
    roots, weights = [parts[0].square().mean(), features.sum(dim=1)], [None, torch.randn(2, 4, 4)]
    sought = [x, features, *first.parameters(), *second.parameters()]
    results = differentiate(roots, weights, [get_gradient_edge(one) for one in sought])
    expected = torch.autograd.grad(roots, sought, [torch.ones(()), weights[1]])
    for result, correct in zip(results, expected, strict=True):
        torch.testing.assert_close(result, correct)
