"""A training list whose samples lie in shards, and the batches that are read from them one shard after the other."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mtcl import safe_files
from mtcl.data.feature_cache import format_bytes
from mtcl.data.partial_labels import PartiallyLabeledDataset
from mtcl.data.sample import Batch, MultiTaskDataset, Sample
from mtcl.data.shards.encoding import decode_sample
from mtcl.data.shards.index import Shard, parse_index
from mtcl.data.shards.order import ShardOrder
from mtcl.data.shards.tar_files import (
    MAX_INDEX_BYTES,
    PARAMETER,
    Members,
    expand_pattern,
    local_path,
    locate_index,
    read_all,
    read_shard,
)
from mtcl.errors import ParameterError, UserError


class ShardDataset:
    """The training list that shards were made from.

    Args:
        shards: pattern of the shards; the index lies beside them.
        tasks: names of the tasks in use.
        settings: dataset class, split and options of this run, which must be those that the shards were made with.
        limit: keep the first so many ids of the list.

    Raises:
        UserError: the index or a local shard is missing or damaged, or they do not fit the run.
    """

    def __init__(
        self, shards: str, tasks: Sequence[str], settings: Mapping[str, Any], limit: int | None = None
    ) -> None:
        self.pattern, self.tasks = shards, tuple(tasks)
        self.urls = expand_pattern(shards)
        self.index_url = locate_index(next(iter(self.urls.values())))
        self.index = parse_index(self._read_index(), self.index_url)
        self._check_settings(settings)
        self._check_shards()
        self.ids: Sequence[str] = self.index.list_ids()[:limit]
        self.samples_by_shard: dict[str, list[int]] = {}  # shard with samples in use -> their indices, in file order
        for shard in self.index.shards:
            if indices := [index for index in shard.indices if index < len(self.ids)]:
                self.samples_by_shard[shard.name] = indices
        self._shard_of = {index: shard for shard in self.index.shards for index in shard.indices}
        self._pending: dict[int, Members] = {}  # samples of the stream that wait for their batch

    def read(self, index: int, tasks: Collection[str] | None = None) -> Sample:
        """Return an image with its labels; one that does not come from the stream costs reading its shard up to it.

        Args:
            index: position in ``ids``.
            tasks: decode the labels of these tasks only; the default is every task in use.

        Raises:
            UserError: the shard can't be read, or a file of the sample is missing or damaged.
        """
        shard, name = self._shard_of[index], self.ids[index]
        members = self._pending.pop(index, None)
        if members is None:
            members = next(files for number, files in self._read_samples(shard, {index}) if number == index)
        chosen = [task for task in self.tasks if tasks is None or task in tasks]
        return decode_sample(name, members, chosen, self.urls[shard.name])

    def stream(self, names: Sequence[str], requested: Collection[int]) -> Iterator[int]:
        """Read shards one after the other, and yield the index of each requested sample when :meth:`read` has it ready.

        Args:
            names: file names of the shards; those without a requested sample are not opened.
            requested: indices of samples.
        """
        by_name = {shard.name: shard for shard in self.index.shards}
        self._pending.clear()
        for name in names:
            for index, members in self._read_samples(by_name[name], requested):
                self._pending[index] = members
                yield index

    def summary(self) -> str:
        """Describe the shards in one line for the log."""
        size = format_bytes(sum(shard.num_bytes for shard in self.index.shards))
        return f"{self.pattern}: {len(self.ids)} images in {len(self.samples_by_shard)} shards ({size})"

    def fingerprint(self) -> str:
        """Return a short hash of the index and the ids in use."""
        content = json.dumps([self.index.to_json(), len(self.ids)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _read_samples(self, shard: Shard, requested: Collection[int]) -> Iterator[tuple[int, Members]]:
        """Yield index and files of the requested samples of a shard, which is read no further than the last of them."""
        missing = set(shard.indices).intersection(requested)
        if not missing:
            return
        url, indices, count = self.urls[shard.name], dict(zip(shard.ids, shard.indices)), 0
        for name, members in read_shard(url):
            if name not in indices:
                raise UserError(
                    f"{url} has a sample {name!r} that {self.index_url} does not list for it; make the shards anew."
                )
            count += 1
            if indices[name] in missing:
                missing.remove(indices[name])
                yield indices[name], members
                if not missing:
                    return
        raise UserError(
            f"{url} ends after {count} of its {len(shard.ids)} samples; it is truncated or damaged, copy it again."
        )

    def _read_index(self) -> bytes:
        """Return the content of the index file."""
        path = local_path(self.index_url)
        if path is None:
            return read_all(self.index_url, MAX_INDEX_BYTES)
        if not path.exists():
            raise ParameterError(
                PARAMETER,
                f"={self.pattern} matches nothing: {path} does not exist; correct the path, or make the shards with "
                "scripts/make_shards.py",
            )
        return safe_files.read_bytes(path, MAX_INDEX_BYTES)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise ``ParameterError`` if the shards were made with other settings, or lack a task."""
        of_shards = self.index.settings
        for key in {**of_shards, **settings}:
            if of_shards.get(key) != settings.get(key):
                raise ParameterError(
                    PARAMETER,
                    f"={self.pattern} were made with {key}={of_shards.get(key)}, but this run has {settings.get(key)}; "
                    "set the same, or make shards for this run",
                )
        if missing := [task for task in self.tasks if task not in self.index.tasks]:
            raise ParameterError(
                PARAMETER,
                f"={self.pattern} have labels of {', '.join(self.index.tasks)}, but not of {', '.join(missing)}; set "
                "other tasks, or make shards with them",
            )

    def _check_shards(self) -> None:
        """Raise ``UserError`` if pattern and index name other shards, or a local one is missing or has another size."""
        listed = {shard.name for shard in self.index.shards}
        if unknown := [name for name in self.urls if name not in listed]:
            raise UserError(f"{self.index_url} does not list the shard {unknown[0]}; correct the pattern.")
        if omitted := [shard.name for shard in self.index.shards if shard.name not in self.urls]:
            raise ParameterError(
                PARAMETER,
                f"={self.pattern} names {len(self.urls)} of {len(listed)} shards, not {omitted[0]}; name all of them "
                "(a limit uses fewer samples)",
            )
        for shard in self.index.shards:
            path = local_path(self.urls[shard.name])
            if path is None:
                continue
            if not path.is_file():
                raise UserError(f"the shard {path} is missing; copy or make it again.")
            if (size := path.stat().st_size) != shard.num_bytes:
                raise UserError(f"{path} has {size:,} bytes, not {shard.num_bytes:,}; copy or make it again.")


class ShardBatches(IterableDataset[Batch | UserError]):
    """The endless batches of one process, each worker reading its own shards; batch b comes from worker b mod count.

    Iteration begins at batch ``start_step``, in mid-epoch by reading only shards with samples that are still to come.

    Args:
        samples: (epoch, index) -> the views of an image, read from ``dataset``.
        dataset: the shards.
        order: the order of all samples.
        collate: samples -> batch, or the error of one.
        start_step: number of batches to skip.
    """

    def __init__(
        self,
        samples: Dataset[list[Sample] | UserError],
        dataset: ShardDataset,
        order: ShardOrder,
        collate: Callable[[list[list[Sample] | UserError]], Batch | UserError],
        start_step: int = 0,
    ) -> None:
        self.samples, self.dataset, self.order = samples, dataset, order
        self.collate, self.start_step = collate, start_step

    def __iter__(self) -> Iterator[Batch | UserError]:
        worker = get_worker_info()
        first_step = self.start_step + (0 if worker is None else worker.id)
        epoch, position = divmod(first_step, self.order.batches_per_epoch)
        first_batch, stream = divmod(position, self.order.streams)
        try:
            while True:
                yield from self._read_epoch(epoch, stream, first_batch)
                epoch, first_batch = epoch + 1, 0
        except UserError as error:  # a DataLoader would bury it in a worker's traceback
            yield error

    def _read_epoch(self, epoch: int, stream: int, first_batch: int) -> Iterator[Batch | UserError]:
        """Yield the batches of a stream in an epoch from ``first_batch`` on."""
        size = self.order.batch_size
        indices = self.order.list_samples(epoch, stream)[first_batch * size :]
        names = list(self.dataset.samples_by_shard)
        arriving = self.dataset.stream([names[i] for i in self.order.list_shards(epoch, stream)], set(indices))
        ready: set[int] = set()
        for start in range(0, len(indices), size):
            samples = []
            for index in indices[start : start + size]:
                while index not in ready:
                    ready.add(next(arriving))
                samples.append(self.samples[epoch, index])
            yield self.collate(samples)


def find_shards(dataset: MultiTaskDataset) -> ShardDataset | None:
    """Return the shards that a dataset reads, all or some of its labels; None if it reads no shards."""
    base = dataset.dataset if isinstance(dataset, PartiallyLabeledDataset) else dataset
    return base if isinstance(base, ShardDataset) else None
