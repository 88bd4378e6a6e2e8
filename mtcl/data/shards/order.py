"""Decide which process and worker reads which sample of which shard when: a function of (seed, epoch).

Nothing of it depends on what was read, so a resumed run continues in mid-epoch without any stored state.
"""

import logging
from collections.abc import Sequence

import numpy as np

from mtcl.data.shards.tar_files import PARAMETER
from mtcl.errors import ParameterError

log = logging.getLogger(__name__)


class ShardOrder:
    """Deal shards to streams and shuffle the samples of each stream; a stream is what one worker of a process reads.

    In each epoch the shards are permuted and dealt to the streams, the same number to each; what is left waits for
    another epoch. A stream reads its shards one after the other through a shuffle buffer. All streams give the
    same number of batches, that of a stream of the smallest shards, so that every process takes the same number of
    steps; the last samples of a stream of larger shards are not shown in this epoch.

    Args:
        shards: for each shard the indices of its samples, in their order in the file.
        batch_size: samples per batch, summed over all processes.
        seed: of the order.
        shuffle_buffer: samples that a stream chooses the next one from; 1 keeps the order within the shards.
        streams: of each process: its number of workers, 1 where it reads in the main process.
        shard: (index, count) of this process.

    Raises:
        ParameterError: there are fewer shards than streams, or too few samples in them for a batch.
    """

    def __init__(
        self,
        shards: Sequence[Sequence[int]],
        batch_size: int,
        seed: int,
        shuffle_buffer: int,
        streams: int = 1,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.shards, self.seed, self.shuffle_buffer, self.streams = shards, seed, shuffle_buffer, streams
        self.rank, num_processes = shard
        self.num_streams = num_processes * streams
        self.num_samples = sum(map(len, shards))
        self.batch_size = batch_size // num_processes  # of this process
        self.shards_per_stream = len(shards) // self.num_streams
        if self.shards_per_stream == 0:
            raise ParameterError(
                PARAMETER,
                f" names {len(shards)} shards, but {num_processes} processes x {streams} workers need one each: "
                f"make {self.num_streams} or more, or use fewer workers",
            )
        smallest = sum(sorted(map(len, shards))[: self.shards_per_stream])
        batches_per_stream = smallest // self.batch_size
        if batches_per_stream == 0:
            raise ParameterError(
                PARAMETER,
                f" names shards of which {self.shards_per_stream} may have {smallest} samples, fewer than the batch of "
                f"{self.batch_size} of the worker that reads them; use fewer workers or a smaller batch",
            )
        self.batches_per_epoch = batches_per_stream * streams
        self.samples_per_stream = batches_per_stream * self.batch_size

    def log_rule(self) -> None:
        """Log how the shards are read, and how many samples an epoch leaves out."""
        log.info(
            "%d workers in all read %d of %d shards each per epoch, which shows %d of %d images",
            self.num_streams,
            self.shards_per_stream,
            len(self.shards),
            self.samples_per_stream * self.num_streams,
            self.num_samples,
        )

    def list_shards(self, epoch: int, stream: int) -> list[int]:
        """Return the shards that a stream of this process reads in an epoch, in order."""
        order = np.random.default_rng([self.seed, epoch, self.num_samples]).permutation(len(self.shards))
        start = self.rank * self.streams + stream
        return order[start :: self.num_streams][: self.shards_per_stream].tolist()

    def list_samples(self, epoch: int, stream: int) -> list[int]:
        """Return the indices of the samples that a stream of this process shows in an epoch, in order."""
        indices = [index for shard in self.list_shards(epoch, stream) for index in self.shards[shard]]
        # Four numbers whose last is above 0 are no seed of a shard order; `num_samples` is no sample's index.
        seeds = [self.seed, epoch, self.num_samples, self.rank * self.streams + stream + 1]
        return shuffle(indices, self.shuffle_buffer, np.random.default_rng(seeds))[: self.samples_per_stream]


def shuffle(items: Sequence[int], shuffle_buffer: int, rng: np.random.Generator) -> list[int]:
    """Return the order in which a shuffle buffer gives out ``items``: each time a random one of those in the buffer.

    Args:
        items: in the order in which they enter the buffer.
        shuffle_buffer: size of the buffer; item i is given out at position i - shuffle_buffer + 1 or later.
        rng: of the choices.
    """
    order, buffer = [], list(items[: shuffle_buffer - 1])
    choices = rng.random(len(items))
    for position, choice in enumerate(choices.tolist()):
        entering = position + shuffle_buffer - 1
        if entering < len(items):
            buffer.append(items[entering])
        chosen = int(choice * len(buffer))
        order.append(buffer[chosen])
        buffer[chosen] = buffer[-1]
        buffer.pop()
    return order
