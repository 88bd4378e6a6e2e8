"""Device, seeds and precision of a run."""

import os

import pytest
import torch
from torch import nn

from mtcl import UserError
from mtcl.runtime import autocast, choose_device, peak_memory, seed_everything

CPU = torch.device("cpu")


def test_choose_device(monkeypatch):
    for present in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        assert choose_device("cpu").type == "cpu"
        assert choose_device("auto").type == ("cuda" if present else "cpu")
    assert choose_device("cuda").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^device=cuda, but PyTorch sees no CUDA device"):
        choose_device("cuda")
    with pytest.raises(UserError, match=r"^device=gpu is not known; choose auto, cpu, cuda or mps"):
        choose_device("gpu")


def test_seeding(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    try:
        seed_everything(3, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        first = torch.rand(3)
        seed_everything(3)
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.equal(first, torch.rand(3))
        seed_everything(4)
        assert not torch.equal(first, torch.rand(3))
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", "float32"), ("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")]
)
def test_autocast_on_a_cpu(precision, dtype):
    layer = nn.Linear(3, 2)
    with autocast(CPU, precision):
        assert layer(torch.ones(1, 3)).dtype == getattr(torch, dtype)
    assert layer(torch.ones(1, 3)).dtype == torch.float32


def test_autocast_of_unknown_precision():
    with pytest.raises(UserError, match=r"^precision=fp8 is not known; choose auto, bf16, fp16 or fp32"):
        autocast(CPU, "fp8")


def test_peak_memory_is_in_gib():
    assert 0.05 < peak_memory(CPU) < 1000
