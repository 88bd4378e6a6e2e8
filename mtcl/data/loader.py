"""Loaders from datasets to batches: randomness, order and frame of each sample.

Sample ``i`` of an epoch is augmented by f(seed, epoch, i) and the order of an epoch is f(seed, epoch). No
generator lives in a worker or in the process, so the number of workers, a resumed run and other users of
torch's global generator change nothing. With a limited number of views, sample ``i`` shows view v = f(seed, epoch, i)
of them, which is augmented by f(views_seed, v, i); the features of a frozen backbone are then kept by (v, i).

With several views per step a batch has the first view of each of its images, which is the one that it would have alone,
then the second of each, augmented by f(seed, epoch, i, 1): row r of n images is view r // n of image r % n.
"""

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.queues import Queue
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mtcl.data.feature_cache import FeatureCache, stack_maps
from mtcl.data.sample import Batch, MultiTaskDataset, Sample, SampleMeta
from mtcl.data.shards.dataset import ShardBatches, find_shards
from mtcl.data.shards.order import ShardOrder
from mtcl.data.transforms import Augment, ResizedCrop, finalize_labels
from mtcl.errors import ParameterError, UserError
from mtcl.tasks.base import Task

WORKER_DIED_MESSAGE = "DataLoader worker"  # in what torch raises then
LOST_BATCH_MESSAGE = "a process that reads data can't send its batch"
TOO_MANY_OPEN_FILES_MESSAGE = (
    "too many open files for the processes that read data; raise the limit (ulimit -n 4096) or use fewer data workers "
    "(0 reads in the main process)"
)
_NO_FILES = (errno.EMFILE, errno.ENFILE)


class AugmentedDataset(Dataset[list[Sample] | UserError]):
    """The augmented views of samples by (epoch, index); without ``augment`` the labels are only finalized.

    A ``UserError`` is returned, not raised: a DataLoader would bury its message in a worker's traceback.

    Args:
        dataset: images and labels.
        tasks: tasks in use, by name.
        augment: random augmentation; None: none.
        seed: of the augmentation, or where ``views`` is given of the view that an image shows in an epoch.
        views: number of different views of an image; None: a new one in each epoch.
        views_seed: seed of the augmentation of a limited number of views.
        features: where the backbone's features of the views are; the samples then have features, and an image only
            where there is no augmentation.
        views_per_step: number of views of an image, all different, that an item consists of; 1 without ``augment``.

    Raises:
        ParameterError: an item has more views than there are.
    """

    def __init__(
        self,
        dataset: MultiTaskDataset,
        tasks: Mapping[str, Task],
        augment: Augment | ResizedCrop | None,
        seed: int,
        views: int | None = None,
        views_seed: int = 0,
        features: FeatureCache | None = None,
        views_per_step: int = 1,
    ) -> None:
        if views is not None and views_per_step > views:
            raise ParameterError(
                "views",
                f"={views} is fewer than the different views that a step shows of an image (views_per_step="
                f"{views_per_step}); give {views_per_step} or more, or null",
            )
        self.dataset, self.tasks, self.augment, self.seed = dataset, dict(tasks), augment, seed
        self.views, self.views_seed, self.features, self.views_per_step = views, views_seed, features, views_per_step

    def __len__(self) -> int:
        return len(self.dataset.ids)

    def __getitem__(self, key: tuple[int, int]) -> list[Sample] | UserError:
        epoch, index = key
        try:
            sample = self.dataset.read(index)
            return [self._make_view(sample, epoch, index, number) for number in range(self.views_per_step)]
        except UserError as error:
            return error

    def _make_view(self, sample: Sample, epoch: int, index: int, number: int) -> Sample:
        """Return the view of this number that an image shows in an epoch."""
        if self.augment is None:
            # Copies: a mapped array keeps its file open until the batch is made, and batches can be large.
            labels = {name: np.array(label) for name, label in sample.labels.items()}
            features = self._read_features(0, sample.id)
            sample = finalize_labels(Sample(sample.id, np.array(sample.image), labels), self.tasks)
            return sample._replace(features=features)
        view, entropy = epoch, [self.seed, epoch, index, *([number] if number else [])]
        if self.views is not None:
            view = choose_view(self.seed, epoch, index, self.views, number)
            entropy = [self.views_seed, view, index]
        features = self._read_features(view, sample.id)
        sample = self.augment(sample, self.tasks, np.random.default_rng(entropy), with_image=features is None)
        return sample._replace(features=features, view=number)

    def _read_features(self, view: int, name: str) -> list[np.ndarray] | None:
        """Return the cached features of an image's view; None without a cache."""
        return None if self.features is None else self.features.read(view, name)


def choose_view(seed: int, epoch: int, index: int, views: int, number: int = 0) -> int:
    """Return which of ``views`` views a sample shows in an epoch: every one once in each ``views`` epochs.

    Where it shows several at a time, those of different ``number`` (0 for the first) differ in every epoch.
    """
    cycle, position = divmod(epoch, views)
    # Three numbers would be those of an augmentation.
    order = np.random.default_rng([seed, cycle, index, views]).permutation(views)
    return int(order[(position + number) % views])


class EpochBatchSampler:
    """Endless batches of (epoch, index); each epoch is a new permutation without its incomplete last batch.

    Iteration begins at batch ``start_step`` of the stream, so a resumed run continues the stream of the interrupted
    one.

    Args:
        num_samples: length of the dataset.
        batch_size: samples per batch, summed over all processes.
        seed: seed of the permutations; not negative.
        start_step: number of batches to skip.
        shard: (index, count); yield only the index-th of count equal shards of every batch, one per process.

    Raises:
        UserError: the batch size does not fit the dataset or the number of processes, or the seed is negative.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, start_step: int = 0, shard: tuple[int, int] = (0, 1)
    ) -> None:
        check_batch_size(batch_size, num_samples, seed, shard[1])
        self.shard = shard
        self.num_samples, self.batch_size, self.seed, self.start_step = num_samples, batch_size, seed, start_step
        self.batches_per_epoch = num_samples // batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first = divmod(self.start_step, self.batches_per_epoch)
        while True:
            order = self._order(epoch)
            for start in range(first * self.batch_size, self.batches_per_epoch * self.batch_size, self.batch_size):
                batch = order[start : start + self.batch_size]
                yield [(epoch, index) for index in batch[self.shard[0] :: self.shard[1]]]
            epoch, first = epoch + 1, 0

    def _order(self, epoch: int) -> list[int]:
        """Return the permutation of one epoch."""
        # `num_samples` is no sample's index; NumPy pads seeds with zeros, so [seed, epoch] would be sample 0's.
        return np.random.default_rng([self.seed, epoch, self.num_samples]).permutation(self.num_samples).tolist()


def check_batch_size(batch_size: int, num_samples: int, seed: int, num_processes: int) -> None:
    """Raise ``UserError`` unless the batch size fits the dataset and the number of processes, and the seed is valid."""
    if batch_size % num_processes:
        raise ParameterError(
            "batch_size",
            f"={batch_size} is the total of {num_processes} processes; choose a multiple of {num_processes}",
        )
    if not 1 <= batch_size <= num_samples:
        raise UserError(
            f"A batch of {batch_size} cannot be drawn from {num_samples} training images; "
            f"choose a batch size from 1 to {num_samples}."
        )
    if seed < 0:
        raise UserError(f"seed={seed} is negative; give 0 or a positive number.")


def collate(samples: Sequence[Sample], tasks: Mapping[str, Task], size: tuple[int, int] | None, multiple: int) -> Batch:
    """Pad samples around their centres to one frame: the image with 0, labels with ``task.void``.

    Args:
        samples: samples of any sizes.
        tasks: tasks whose labels the batch contains.
        size: smallest frame (height, width), itself not rounded; None for the samples' largest size.
        multiple: the samples' largest height and width are rounded up to multiples of this.
    """
    native = [sample.image.shape[:2] for sample in samples]
    largest = [-(-max(side) // multiple) * multiple for side in zip(*native)]
    frame = (max(largest[0], size[0]), max(largest[1], size[1])) if size else (largest[0], largest[1])
    offsets = [((frame[0] - height) // 2, (frame[1] - width) // 2) for height, width in native]

    batch: Batch = {
        "image": torch.from_numpy(_pad_to_frames([sample.image for sample in samples], frame, offsets, 0)),
        "labels": {
            name: task.collate(_pad_to_frames([sample.labels[name] for sample in samples], frame, offsets, task.void))
            for name, task in tasks.items()
        },
        "meta": [SampleMeta(s.id, (h, w), offset, s.view) for s, (h, w), offset in zip(samples, native, offsets)],
    }
    if all(sample.features is not None for sample in samples) and samples:
        batch["features"] = [stack_maps(maps) for maps in zip(*(sample.features or () for sample in samples))]
    return batch


def train_loader(
    dataset: MultiTaskDataset,
    tasks: Mapping[str, Task],
    augment: Augment | ResizedCrop,
    batch_size: int,
    seed: int,
    workers: int,
    start_step: int = 0,
    pin_memory: bool = False,
    shard: tuple[int, int] = (0, 1),
    skip_unreadable: bool = False,
    views: int | None = None,
    views_seed: int = 0,
    features: FeatureCache | None = None,
    views_per_step: int = 1,
    shuffle_buffer: int = 512,
) -> DataLoader:
    """Return an endless stream of augmented batches in frames of ``augment.size``.

    Args:
        dataset: images and labels to train on; of shards each worker reads its own, see :class:`ShardOrder`.
        tasks: tasks in use, by name.
        augment: random augmentation; its ``size`` is the frame.
        batch_size: images per batch, summed over all processes.
        seed: seed of the order and of the augmentation.
        workers: number of worker processes; 0 loads in this process.
        start_step: number of batches to skip, for a resumed run.
        pin_memory: allocate batches in page-locked memory, for copies to a CUDA device.
        shard: see :class:`EpochBatchSampler`.
        skip_unreadable: replace an image that can't be read by another one of its batch and list the reason under
            ``unreadable``; by default its ``UserError`` ends the stream.
        views: see :class:`AugmentedDataset`.
        views_seed: see :class:`AugmentedDataset`.
        features: see :class:`AugmentedDataset`.
        views_per_step: rows of a batch per image, each another view of it, see the module.
        shuffle_buffer: see :class:`ShardOrder`; only for shards.
    """
    samples = AugmentedDataset(dataset, tasks, augment, seed, views, views_seed, features, views_per_step)
    collate_samples = partial(
        _collate_or_error, tasks=dict(tasks), size=augment.size, multiple=1, skip_unreadable=skip_unreadable
    )
    options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pin_memory}
    if (shards := find_shards(dataset)) is not None:
        check_batch_size(batch_size, len(dataset.ids), seed, shard[1])
        stored = list(shards.samples_by_shard.values())
        order = ShardOrder(stored, batch_size, seed, shuffle_buffer, max(workers, 1), shard)
        order.log_rule()
        stream = ShardBatches(samples, shards, order, collate_samples, start_step)
        return _Loader(stream, batch_size=None, collate_fn=_pass_on, **options)
    sampler = EpochBatchSampler(len(dataset.ids), batch_size, seed, start_step, shard)
    return _Loader(samples, batch_sampler=sampler, collate_fn=collate_samples, **options)


def eval_loader(
    dataset: MultiTaskDataset,
    tasks: Mapping[str, Task],
    size: tuple[int, int] | None,
    batch_size: int,
    workers: int,
    multiple: int = 32,
    pin_memory: bool = False,
    shard: tuple[int, int] = (0, 1),
    features: FeatureCache | None = None,
    batches: Sequence[Sequence[int]] | None = None,
) -> DataLoader:
    """Return a loader of every sample once, in order and without augmentation; the last batch may be smaller.

    Args:
        dataset: images and labels to evaluate on.
        tasks: tasks in use, by name.
        size: smallest frame (height, width); see :func:`collate`.
        batch_size: samples per batch.
        workers: number of worker processes; 0 loads in this process.
        multiple: see :func:`collate`.
        pin_memory: allocate batches in page-locked memory, for copies to a CUDA device.
        shard: (index, count); process ``index`` of ``count`` gets every count-th batch.
        features: the backbone's features of the frames, which are added to the batches.
        batches: for each batch the indices of its samples; None: all samples, ``batch_size`` at a time.
    """
    if batch_size < 1:
        raise UserError(f"A batch of {batch_size} images is not possible; choose a batch size of at least 1.")
    if batches is None:
        batches = split_batches(range(len(dataset.ids)), batch_size)
    return _Loader(
        AugmentedDataset(dataset, tasks, None, seed=0, features=features),
        batch_sampler=[[(0, index) for index in batch] for batch in batches[shard[0] :: shard[1]]],
        collate_fn=partial(_collate_or_error, tasks=dict(tasks), size=size, multiple=multiple),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )


def split_batches(indices: Sequence[int], batch_size: int) -> list[list[int]]:
    """Split indices into batches in their order; the last one may be smaller."""
    return [list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]


def view_loader(
    dataset: MultiTaskDataset,
    tasks: Mapping[str, Task],
    augment: Augment,
    batches: Sequence[Sequence[tuple[int, int]]],
    views_seed: int,
    workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of given views of given images, as :func:`train_loader` with ``views`` shows them.

    Args:
        dataset: images and labels to train on.
        tasks: tasks in use, by name.
        augment: random augmentation; its ``size`` is the frame.
        batches: for each batch the (view, index) of its samples.
        views_seed: seed of the augmentation.
        workers: number of worker processes; 0 loads in this process.
        pin_memory: allocate batches in page-locked memory, for copies to a CUDA device.
    """
    return _Loader(
        AugmentedDataset(dataset, tasks, augment, views_seed),
        batch_sampler=[list(batch) for batch in batches],
        collate_fn=partial(_collate_or_error, tasks=dict(tasks), size=augment.size, multiple=1),
        num_workers=workers,
        pin_memory=pin_memory,
    )


class _Loader(DataLoader):
    """A DataLoader that raises errors returned by workers and leaves torch's global generator alone."""

    def __init__(self, dataset: AugmentedDataset | ShardBatches, **kwargs: Any) -> None:
        # Workers are seeded from this generator, though nothing of ours draws from their global state.
        super().__init__(dataset, worker_init_fn=_init_worker, generator=torch.Generator(), **kwargs)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        """Yield batches; convert failures of workers to ``UserError``."""
        try:
            batches: Iterator[Batch | UserError] = super().__iter__()
            if self.num_workers and not self.pin_memory:  # where torch pins memory it has a thread of its own
                batches = read_ahead(batches)
            yield from map(_raise_error, batches)
        except RuntimeError as error:
            if (sentence := explain_worker_error(error)) is None:
                raise
            raise UserError(sentence) from error
        except (OSError, EOFError) as error:
            if getattr(error, "errno", None) in _NO_FILES:
                raise UserError(TOO_MANY_OPEN_FILES_MESSAGE) from error
            if self.num_workers and isinstance(error, EOFError | ConnectionError):  # its batch was on its way
                raise UserError(explain_worker_error(RuntimeError(f"{WORKER_DIED_MESSAGE} is gone"))) from error
            raise


def read_ahead(batches: Iterator[Batch | UserError]) -> Iterator[Batch | UserError]:
    """Yield batches, each received from its worker in a thread while the caller still uses the one before.

    To receive a batch takes milliseconds, as every tensor's file is asked for and mapped.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read ahead") as thread:
        pending = thread.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = thread.submit(next, batches, None)
            yield batch


def _raise_error(batch: Batch | UserError) -> Batch:
    """Raise the error that a worker returned in place of a batch."""
    if isinstance(batch, UserError):
        # A new error: one that this frame knows by name would keep the loader and its workers in a cycle.
        raise UserError(*batch.args) from batch
    return batch


def _pass_on(batch: Batch | UserError) -> Batch | UserError:
    """Return a batch that a worker has collated."""
    return batch


def _collate_or_error(
    images: list[list[Sample] | UserError],
    tasks: Mapping[str, Task],
    size: tuple[int, int] | None,
    multiple: int,
    skip_unreadable: bool = False,
) -> Batch | UserError:
    """Collate the views of the readable images, or return the error of an unreadable one."""
    good = [image for image in images if not isinstance(image, UserError)]
    errors = [image for image in images if isinstance(image, UserError)]
    if errors and not (skip_unreadable and good):
        return errors[0]
    good += [good[i % len(good)] for i in range(len(errors))]
    batch = collate([sample for view in zip(*good) for sample in view], tasks, size, multiple)
    if errors:
        batch["unreadable"] = [str(error) for error in errors]
    return batch


def _init_worker(_worker: int) -> None:
    """Set up a worker process: one thread, since the workers are the parallelism.

    A scheduler sends SIGTERM to all processes of a run. The main process decides what it means, so a worker obeys
    only a SIGTERM from its parent.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    _report_lost_batches()
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey, daemon=True).start()


def _report_lost_batches() -> None:
    """Report when a worker can't send a batch, for lack of open files or shared memory.

    Python's queue would only print a traceback while the process that waits for the batch waits for ever; the thread
    that passes open files on would retry without end and fill the log.
    """

    def answer(queue: Queue, error: Exception, item: tuple[int, Any]) -> None:
        lacks_files = getattr(error, "errno", None) in _NO_FILES or os.strerror(errno.EMFILE) in str(error)
        remedy = "give it more shared memory (docker run --shm-size=8g, a larger /dev/shm), or use 0 data workers"
        reason = (
            TOO_MANY_OPEN_FILES_MESSAGE
            if lacks_files
            else f"{LOST_BATCH_MESSAGE} ({str(error).splitlines()[0]}); {remedy}"
        )
        queue.put((item[0], UserError(reason)))

    def end(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if getattr(error, "errno", None) in _NO_FILES:
            os._exit(1)
        sys.__excepthook__(kind, error, trace)

    Queue._on_queue_feeder_error = answer  # type: ignore[attr-defined]
    sys.excepthook = end


def explain_worker_error(error: RuntimeError) -> str | None:
    """Return a message for an error of torch's loader; None if it is another kind of error."""
    text = str(error)
    if "Too many open files" in text or "ancdata" in text:
        return TOO_MANY_OPEN_FILES_MESSAGE
    if WORKER_DIED_MESSAGE not in text:
        return None
    return (
        f"a process that reads data was killed, maybe for lack of memory, shared memory (/dev/shm) or open files "
        f"({text.splitlines()[0]}); use fewer data workers or a smaller batch size"
    )


def _pad_to_frames(
    arrays: list[np.ndarray], frame: tuple[int, int], offsets: list[tuple[int, int]], void: float
) -> np.ndarray:
    """Place arrays (h, w[, C]) at ``offsets`` in frames filled with void: (B[, C], *frame), channels first."""
    shape = (len(arrays), *arrays[0].shape[2:], *frame)
    is_filled = all(array.shape[:2] == frame for array in arrays)
    framed = np.empty(shape, arrays[0].dtype) if is_filled else np.full(shape, void, arrays[0].dtype)
    for target, array, (row, column) in zip(framed, arrays, offsets):
        window = target[..., row : row + array.shape[0], column : column + array.shape[1]]
        if array.ndim == 3 and array.dtype == np.uint8 and array.shape[2] > 1:
            cv2.split(array, list(window))  # four times as fast as NumPy
        else:
            window[...] = array if array.ndim == 2 else array.transpose(2, 0, 1)
    return framed
