"""Processes that torchrun starts again find each other, whatever earlier ones left in the store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from mtcl.distributed import agree_on_prefix, find_fresh_store

WAIT = timedelta(seconds=20)


def start_all(store: dist.Store, num_processes: int) -> list[str]:
    with ThreadPoolExecutor(num_processes) as pool:
        return list(pool.map(lambda rank: agree_on_prefix(store, rank, num_processes, WAIT), range(num_processes)))


def test_a_prefix_is_new_at_each_start():
    store = dist.HashStore()
    store.set("mtcl/asks/1", "word of a process that was killed before it got its answer")
    prefixes = [start_all(store, 3) for _ in range(3)]
    assert all(len(set(of_start)) == 1 for of_start in prefixes)
    assert len({of_start[0] for of_start in prefixes}) == 3


def test_process_0_names_those_that_do_not_start():
    with pytest.raises(dist.DistStoreError, match=r"processes \[1, 2\] of 3 did not start"):
        agree_on_prefix(dist.HashStore(), 0, 3, timedelta(seconds=0.05))


def test_without_the_store_of_torchrun_nothing_is_agreed(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert find_fresh_store() == {}
