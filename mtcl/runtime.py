"""Set up the process of a run: device, seeds, determinism, precision."""

import contextlib
import os
import sys
from collections.abc import Iterator

import cv2
import torch
from torch import nn

from mtcl.errors import ParameterError

OUT_OF_MEMORY_TEXTS = ("DefaultCPUAllocator", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")


def choose_device(name: str, parameter: str = "device") -> torch.device:
    """Return the device to run on; of several processes on one machine each gets its own GPU.

    Args:
        name: ``auto`` (CUDA if available, else the CPU), ``cpu`` or ``cuda``.
        parameter: what the user calls this setting, for the message.

    Raises:
        ParameterError: the name is unknown, or PyTorch sees no CUDA device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ParameterError(parameter, f"={name} is not known; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ParameterError(parameter, "=cuda, but PyTorch sees no CUDA device; use cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "LOCAL_RANK" in os.environ else torch.device("cuda")


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed torch: the initial weights and dropout; data and regularizer seed themselves from (seed, step).

    Args:
        seed: of PyTorch's generators.
        deterministic: make runs on CUDA bit-equal, at some cost in speed; on a CPU they always are.
    """
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)


def autocast(
    device: torch.device, precision: str, parameter: str = "precision"
) -> contextlib.AbstractContextManager[object]:
    """Return the context in which a model runs at ``precision``.

    Args:
        device: where the model runs.
        precision: ``bf16``, ``fp32``, or ``auto``: bf16 on a CUDA device that has it natively, else fp32.
        parameter: what the user calls this setting, for the message.

    Raises:
        ParameterError: the precision is unknown.
    """
    if uses_bf16(device, precision, parameter):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def uses_bf16(device: torch.device, precision: str, parameter: str = "precision") -> bool:
    """Return whether a model at this ``precision`` runs in bf16; for arguments and errors see :func:`autocast`."""
    if precision not in ("auto", "bf16", "fp32"):
        raise ParameterError(parameter, f"={precision} is not known; choose auto, bf16 or fp32")
    is_native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16" or (precision == "auto" and is_native)


@contextlib.contextmanager
def freeze_running_statistics(model: nn.Module) -> Iterator[None]:
    """Keep batch norms from updating their running statistics inside the context.

    Gradient checkpointing runs a block a second time, which would count its batch twice.
    """
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
    """Return the peak memory in GiB: of the CUDA allocator on CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of PyTorch's generators: ``cpu``, and ``cuda`` if ``device`` is a GPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore what :func:`rng_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the device or this machine has too little memory."""
    if isinstance(error, cv2.error):
        return error.code == cv2.Error.StsNoMem
    is_allocation = isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
    return is_allocation or isinstance(error, torch.OutOfMemoryError | MemoryError)
