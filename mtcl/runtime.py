"""Set up the process of a run: device, seeds, determinism, precision."""

import contextlib
import os
import sys
from collections.abc import Iterator

import cv2
import torch
from torch import nn

from mtcl.errors import ParameterError

OUT_OF_MEMORY_TEXTS = (
    "DefaultCPUAllocator",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
PRECISIONS = ("auto", "bf16", "fp16", "fp32")


def choose_device(name: str, parameter: str = "device") -> torch.device:
    """Return the device to run on; of several processes on one machine each gets its own GPU.

    Args:
        name: ``auto`` (CUDA if available, else the CPU), ``cpu``, ``cuda``, or ``mps`` (the GPU of an Apple computer).
        parameter: what the user calls this setting, for the message.

    Raises:
        ParameterError: the name is unknown, PyTorch sees no such device, or several processes would share it.
    """
    if name not in ("auto", "cpu", "cuda", "mps"):
        raise ParameterError(parameter, f"={name} is not known; choose auto, cpu, cuda or mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ParameterError(parameter, "=mps, but PyTorch sees no GPU of an Apple computer; use cpu or auto")
    if name == "mps" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ParameterError(parameter, "=mps works in one process; start without torchrun or use cpu")
    if name == "mps":
        return torch.device("mps")
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
        precision: ``bf16``, ``fp16``, ``fp32``, or ``auto``: on CUDA bf16 where the device has it natively, else
            fp16; fp32 on other devices.
        parameter: what the user calls this setting, for the message.

    Raises:
        ParameterError: the precision is unknown.
    """
    chosen = choose_precision(device, precision, parameter)
    if chosen == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if chosen == "bf16" else torch.float16)


def choose_precision(device: torch.device, precision: str, parameter: str = "precision") -> str:
    """Return ``bf16``, ``fp16`` or ``fp32``; for arguments and errors see :func:`autocast`."""
    if precision not in PRECISIONS:
        raise ParameterError(parameter, f"={precision} is not known; choose auto, bf16, fp16 or fp32")
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def choose_float64_device(device: torch.device) -> torch.device:
    """Return where sums in float64 are computed: on the device, or on the CPU for Apple's GPUs, which lack it."""
    return torch.device("cpu") if device.type == "mps" else device


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
    """Return the states of PyTorch's generators: ``cpu``, and ``cuda`` or ``mps`` if ``device`` is a GPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore what :func:`rng_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"].cpu())


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the device or this machine has too little memory."""
    if isinstance(error, cv2.error):
        return error.code == cv2.Error.StsNoMem
    is_allocation = isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
    return is_allocation or isinstance(error, torch.OutOfMemoryError | MemoryError)
