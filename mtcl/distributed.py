"""The processes of one run (``torchrun``): how many there are, which one this is, and sums over all of them.

A run of one process is the rule: then everything here is the identity and costs nothing.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 is the one that writes."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes, without gradient; ``x`` itself in a single one. All of them must call it."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def scale_for_ddp_mean(x: Tensor) -> Tensor:
    """A part of a sum over all processes, times their number: what gradients are averaged over then gives the sum."""
    return x if world_size() == 1 else x * world_size()


def all_gather_object(x: Any) -> Any:
    """``x`` of every process, in a list; ``x`` itself in a single one. Plain containers and CPU tensors."""
    if world_size() == 1:
        return x
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, x)
    return found


def broadcast_object(x: Any) -> Any:
    """``x`` of process 0, in every process. Plain containers."""
    if world_size() == 1:
        return x
    found = [x]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def init_process_group(device: torch.device) -> None:
    """Meet the other processes that ``torchrun`` started; nothing happens in a run of one. May be called again."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def destroy_process_group() -> None:
    """The end of it; without this torch complains."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
