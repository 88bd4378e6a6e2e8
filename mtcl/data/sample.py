"""The forms in which a picture and its labels travel: from a reader, through the transforms, to a batch."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict

import numpy as np
from torch import Tensor


class Sample(NamedTuple):
    """One picture with its labels, all of one height and width."""

    id: str
    image: np.ndarray  # uint8 RGB (H, W, 3)
    labels: dict[str, np.ndarray]  # every task in use, NumPy layout of mtcl.tasks.Task; an unlabelled one is all void
    # Arrays may be read-only: a cache maps them from the disk.


class SampleMeta(NamedTuple):
    """Where a sample lies in its batch's frame; outside of ``offset + native_size`` there is padding."""

    id: str
    native_size: tuple[int, int]  # height, width of the picture before padding
    offset: tuple[int, int]  # top, left


class Batch(TypedDict):
    """Samples in frames of one size.

    Evaluation never resizes or crops, so cutting ``native_size`` at ``offset`` out of a frame gives back each label
    at the resolution at which it was read.
    """

    image: Tensor  # uint8 (B, 3, H, W), not normalised; padding is 0
    labels: dict[str, Tensor]  # task -> label in batch layout; padding is void
    meta: list[SampleMeta]
    unreadable: NotRequired[list[str]]  # why samples of this batch gave their places to others


class MultiTaskDataset(Protocol):
    """One list of a dataset (its training or its validation pictures), read without augmentation."""

    ids: Sequence[str]

    def read(self, index: int, tasks: Collection[str] | None = None) -> Sample:
        """A picture with its labels; those of ``tasks`` suffice if that is given."""
        ...

    def summary(self) -> str:
        """What was found, in one line for the log."""
        ...

    def fingerprint(self) -> str:
        """A short hash of what the list holds (ids and whatever else identifies the data), for ``run.json``."""
        ...


class ConfigurableDataset(MultiTaskDataset, Protocol):
    """A dataset that a config names: ``SomeDataset(part="train" | "val", split=..., tasks=names, **its own options)``.

    That raises :class:`mtcl.UserError` when what is on disk does not fit.
    """

    @classmethod
    def task_options(cls, **options: Any) -> Mapping[str, Mapping[str, Any]]:
        """Task name -> options for ``mtcl.tasks.build_task``, for a dataset of these options, without opening it."""
        ...
