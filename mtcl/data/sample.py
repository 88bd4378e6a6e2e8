"""Types in which an image and its labels travel from a dataset, through the transforms, to a batch."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict

import numpy as np
from torch import Tensor


class Sample(NamedTuple):
    """One image with its labels, all of the same height and width."""

    id: str
    image: np.ndarray  # uint8 RGB (H, W, 3)
    labels: dict[str, np.ndarray]  # every task in use, NumPy layout of mtcl.tasks.Task; an unlabelled one is all void
    # Arrays may be read-only: a cache maps them from the disk.
    features: list[np.ndarray] | None = None  # maps of a frozen backbone, each (C, h, w), in place of an image
    view: int = 0  # number among the views of the image that a batch has


class SampleMeta(NamedTuple):
    """Position of a sample in its batch's frame; pixels outside ``offset + native_size`` are padding."""

    id: str
    native_size: tuple[int, int]  # height, width of the image before padding
    offset: tuple[int, int]  # top, left
    view: int = 0  # number among the views of the image in this batch

    @property
    def row_id(self) -> str:
        """The image's id, for other views than the first with their number: different random draws for each."""
        return f"{self.id}#{self.view}" if self.view else self.id


class Batch(TypedDict):
    """Samples padded to frames of one size.

    With several views per image all first views come first, then all second ones in the same order of images: of B rows
    with V views, row i is view i // (B / V) (``view`` in ``meta``) of image i % (B / V).

    Evaluation never resizes or crops, so cutting ``native_size`` at ``offset`` out of a frame restores each label at
    the resolution at which it was read.
    """

    image: Tensor  # uint8 (B, 3, H, W), not normalised; padding is 0. (B, 0, H, W) where only ``features`` are needed
    labels: dict[str, Tensor]  # task -> label in batch layout; padding is void
    meta: list[SampleMeta]
    features: NotRequired[list[Tensor]]  # the frozen backbone's maps of the frames, each (B, C, h, w), from a cache
    unreadable: NotRequired[list[str]]  # errors of samples that were replaced by others of the batch


class MultiTaskDataset(Protocol):
    """One list of a dataset (its training or validation images), read without augmentation."""

    ids: Sequence[str]

    def read(self, index: int, tasks: Collection[str] | None = None) -> Sample:
        """Return an image with its labels.

        Args:
            index: position in ``ids``.
            tasks: load the labels of these tasks only; the default is every task in use.
        """
        ...

    def summary(self) -> str:
        """Describe the dataset in one line for the log."""
        ...

    def fingerprint(self) -> str:
        """Return a short hash of the list's contents (ids and whatever identifies the data), for ``run.json``."""
        ...


class ConfigurableDataset(MultiTaskDataset, Protocol):
    """A dataset class that a config can name.

    It is built as ``SomeDataset(subset="train" | "val", split=..., tasks=names, **its own options)`` and raises
    :class:`mtcl.UserError` when the files on disk do not fit.
    """

    @classmethod
    def task_options(cls, **options: Any) -> Mapping[str, Mapping[str, Any]]:
        """Return the options of each task that a dataset with these options has labels for, without opening it.

        Returns:
            Task name -> keyword arguments for ``mtcl.tasks.build_task``.
        """
        ...
