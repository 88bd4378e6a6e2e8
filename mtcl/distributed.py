"""The process group of a run (``torchrun``): world size, rank, and sums and gathers over all processes.

Most runs have one process; then everything here is the identity and costs nothing. In a run of several
processes all of them must make the same calls in the same order.
"""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtcl.errors import PeerLost


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; 0 is the one that writes files."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """Return the sum of ``x`` over all processes, without gradient; ``x`` itself in a run of one process."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def scale_for_ddp_mean(x: Tensor) -> Tensor:
    """Multiply this process's share of a sum by the world size.

    DDP averages gradients over processes; of shares scaled like this the average is the gradient of the
    full sum.
    """
    return x if world_size() == 1 else x * world_size()


def all_reduce_sum_for_ddp(x: Tensor) -> Tensor:
    """Return the sum of ``x`` over all processes, for losses that every process computes from it alike.

    Its gradient is such that DDP's average over processes is the gradient of the loss; ``x`` itself in a run of one
    process.
    """
    if world_size() == 1:
        return x
    share = scale_for_ddp_mean(x)
    return all_reduce_sum(x) + (share - share.detach())


def all_gather_object(x: Any) -> Any:
    """Return every process's ``x`` in a list; ``x`` itself, not in a list, in a run of one process.

    Args:
        x: plain containers and CPU tensors.
    """
    if world_size() == 1:
        return x
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, x)
    return objects


def broadcast_object(x: Any) -> Any:
    """Return the ``x`` of process 0 in every process.

    Args:
        x: plain containers; ignored in the other processes.
    """
    if world_size() == 1:
        return x
    objects = [x]
    dist.broadcast_object_list(objects, src=0)
    return objects[0]


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def init_process_group(device: torch.device) -> None:
    """Join the other processes that ``torchrun`` started; do nothing in a run of one, or when called again.

    Args:
        device: of this process. Tensors on a GPU are exchanged by NCCL, those on the CPU by gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    options = find_fresh_store()
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        # With device_id NCCL connects now, not in the first collective, and a barrier knows which GPU to use.
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)


def find_fresh_store() -> dict[str, Any]:
    """Return what ``init_process_group`` needs to find the others where ``torchrun`` may have started them before.

    ``torchrun`` keeps one store through all restarts, so that gloo and NCCL may read addresses of processes that have
    ended (pytorch issues 135712 and 167288). A prefix that is new at each start hides them. The number of restarts
    would not do: nodes count for themselves.

    Returns:
        ``store``, ``rank`` and ``world_size``; nothing where no such store is in use.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store, rank_here, num_processes = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(agree_on_prefix(store, rank_here, num_processes), store)
    return {"store": store, "rank": rank_here, "world_size": num_processes}


def agree_on_prefix(
    store: dist.Store, rank_here: int, num_processes: int, timeout: timedelta = dist.default_pg_timeout
) -> str:
    """Return a prefix that process 0 has chosen now, in all processes, whatever earlier ones left in the store.

    Each other process writes a word of its own and waits for the answer to that word, which no earlier process can have
    got. Process 0 answers until all have confirmed: the first word that it reads may be an earlier process's.

    Args:
        store: shared by all processes.
        rank_here: of this process.
        num_processes: the world size.
        timeout: how long to wait for the others.

    Raises:
        DistError: another process did not appear in this time.
    """
    store.set_timeout(timeout)
    word = secrets.token_hex(16)
    if rank_here > 0:
        store.set(f"mtcl/asks/{rank_here}", word)
        prefix = store.get(f"mtcl/answer/{word}").decode()
        store.set(f"mtcl/confirms/{prefix}/{rank_here}", "")
        return prefix
    missing = set(range(1, num_processes))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for rank_asking in missing:
            if store.check([f"mtcl/asks/{rank_asking}"]):
                store.set(f"mtcl/answer/{store.get(f'mtcl/asks/{rank_asking}').decode()}", word)
        missing = {other for other in missing if not store.check([f"mtcl/confirms/{word}/{other}"])}
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"processes {sorted(missing)} of {num_processes} did not start")
        time.sleep(0.01)
    return word


def destroy_process_group() -> None:
    """Leave the process group at the end of a run; without this torch warns."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def convert_lost_peers() -> Iterator[None]:
    """Convert what gloo, NCCL and the store raise when another process of the run has ended to ``PeerLost``."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        is_gloo = "gloo" in text.lower() and ("onnection" in text or "ocket" in text)
        if world_size() == 1 or not (is_gloo or isinstance(error, dist.DistError)):
            raise
        raise PeerLost from error
