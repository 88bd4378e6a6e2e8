"""The process a run lives in: device, seeds, determinism, precision."""

import contextlib
import os
import sys
from collections.abc import Iterator

import torch
from torch import nn

from mtcl.errors import UserError


def choose_device(name: str, key: str = "trainer.device") -> torch.device:
    """``auto`` (CUDA where there is one), ``cpu`` or ``cuda``; of several processes on one machine each has its own.

    ``key``: what a user calls it.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"{key}={name} is not known; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}=cuda, but PyTorch sees no CUDA device; use {key}=cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "LOCAL_RANK" in os.environ else torch.device("cuda")


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed torch (the model's start and dropout); data and regulariser draw from (seed, step) on their own.

    ``deterministic``: bit-equal runs on CUDA, too, at some cost in speed; on a CPU they are so anyway.
    """
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)


def autocast(device: torch.device, precision: str, key: str = "trainer.precision") -> contextlib.AbstractContextManager:
    """``auto``: bf16 on a CUDA device that has it, fp32 elsewhere; ``bf16``; ``fp32``. ``key``: as users call it."""
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"{key}={precision} is not known; choose auto, bf16 or fp32")
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" or (precision == "auto" and native):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def freeze_running_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms leave their running statistics alone inside: a block that gradient checkpointing runs a second time
    would count its batch twice."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum


def peak_memory(device: torch.device) -> float:
    """GiB: of the CUDA allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
