"""The order of shards and samples: who reads what, how often, and what does not depend on what."""

from itertools import pairwise

import numpy as np
import pytest

from mtcl.data.shards.order import ShardOrder, shuffle
from mtcl.errors import ParameterError

SIZES = (5, 4, 6, 5, 4, 5, 7)
BOUNDS = np.cumsum((0, *SIZES))
SHARDS = [list(range(low, high)) for low, high in pairwise(BOUNDS.tolist())]


def make_order(rank: int = 0, processes: int = 1, streams: int = 1, seed: int = 0, buffer: int = 4) -> ShardOrder:
    return ShardOrder(SHARDS, 2 * processes, seed, buffer, streams, (rank, processes))


@pytest.mark.parametrize(("processes", "streams"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_every_worker_reads_its_own_shards_and_all_take_equally_many_steps(processes, streams):
    orders = [make_order(rank, processes, streams) for rank in range(processes)]
    assert len({order.batches_per_epoch for order in orders}) == 1
    for epoch in range(3):
        pairs = [(order, stream) for order in orders for stream in range(streams)]
        shards = [order.list_shards(epoch, stream) for order, stream in pairs]
        assert len({shard for part in shards for shard in part}) == sum(map(len, shards))
        assert {len(part) for part in shards} == {len(SIZES) // (processes * streams)}
        for part, (order, stream) in zip(shards, pairs):
            samples = order.list_samples(epoch, stream)
            assert len(samples) * streams == order.batches_per_epoch * 2
            assert len(set(samples)) == len(samples)
            assert set(samples) <= {index for shard in part for index in SHARDS[shard]}


def test_one_stream_shows_every_sample_of_an_even_number_once():
    order = make_order()
    assert sorted(order.list_samples(0, 0)) == list(range(sum(SIZES)))
    assert order.batches_per_epoch == sum(SIZES) // 2


def test_the_order_is_a_function_of_seed_and_epoch():
    first, again, other = make_order(), make_order(), make_order(seed=1)
    assert first.list_samples(3, 0) == again.list_samples(3, 0)
    assert first.list_samples(3, 0) != first.list_samples(4, 0)
    assert first.list_shards(3, 0) != other.list_shards(3, 0)
    assert first.list_samples(3, 0) != other.list_samples(3, 0)


@pytest.mark.parametrize("buffer", [1, 2, 5, 12, 40])
def test_a_shuffle_buffer_never_has_more_samples_than_its_size(buffer):
    items = list(range(100, 112))
    order = shuffle(items, buffer, np.random.default_rng(0))
    assert sorted(order) == items
    if buffer == 1:
        assert order == items
    for position, item in enumerate(order):
        assert items.index(item) <= position + buffer - 1


def test_a_full_buffer_gives_every_order_equally_often():
    rng = np.random.default_rng(0)
    orders = [tuple(shuffle([0, 1, 2], 3, rng)) for _ in range(3000)]
    counts = [orders.count(order) for order in sorted(set(orders))]
    assert len(counts) == 6
    assert min(counts) > 400  # expected: 500, of a standard deviation of 20


def test_too_few_shards_or_samples_are_one_sentence():
    with pytest.raises(ParameterError, match=r"^shards names 7 shards, but 4 processes x 2 workers .*: make 8 or more"):
        make_order(processes=4, streams=2)
    with pytest.raises(ParameterError, match=r"^shards names shards of which 1 may have 4 samples, fewer than .* 5 "):
        ShardOrder(SHARDS, 5, 0, 4, streams=7)
