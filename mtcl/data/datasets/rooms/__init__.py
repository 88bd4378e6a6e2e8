"""The built-in dataset: procedural indoor scenes with exact labels for all six tasks, and no files.

A scene is a pure function of (seed, index): :mod:`scene` builds it, :mod:`render` renders it.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mtcl.data.datasets.rooms.render import render
from mtcl.data.datasets.rooms.scene import CLASS_NAMES
from mtcl.data.sample import Sample
from mtcl.errors import UserError

__all__ = ["CLASS_NAMES", "Rooms", "render"]

RENDER_VERSION = 1  # increased when any pixel of any scene changes

# Where each list's scenes begin in the endless row of a seed's scenes: far enough apart never to meet.
_FIRST_SCENE = {
    ("standard", "train"): 0,
    ("standard", "val"): 10_000_000,
    ("tune", "train"): 20_000_000,
    ("tune", "val"): 30_000_000,
}
_LONGEST = 10_000_000
CACHE_BYTES = 2**29  # of rendered scenes kept per process at most; 1,900 scenes of 96x128


class Rooms:
    """One list of rooms, as a :class:`mtcl.data.sample.MultiTaskDataset`.

    Args:
        subset: "train" or "val".
        tasks: names of the tasks in use.
        size: height and width of the images in pixels.
        split: "standard" or "tune"; their scenes are disjoint.
        length: number of scenes for training and for validation.
        seed: seed of the scenes.
        limit: keep the first so many scenes of this list.
        cache: keep rendered scenes in memory, up to :data:`CACHE_BYTES`.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        subset: str,
        tasks: Sequence[str],
        size: tuple[int, int] = (96, 128),
        split: str = "standard",
        length: tuple[int, int] = (800, 100),
        seed: int = 0,
        limit: int | None = None,
        cache: bool = True,
    ):
        _require("subset", subset, ("train", "val"))
        _require("split", split, ("standard", "tune"))
        for task in tasks:
            _require("task", task, tuple(self.task_options()))
        count = length[0] if subset == "train" else length[1]
        if not 0 < count <= _LONGEST:
            raise UserError(f"rooms: length {count} of the subset {subset!r} must be between 1 and {_LONGEST}.")
        if limit is not None and limit < 1:
            raise UserError(f"rooms: limit {limit} must be at least 1, or null for no limit.")
        if min(size) < 8:
            raise UserError(f"rooms: size {tuple(size)} (height, width) must be at least 8 pixels each way.")

        self._tasks, self._size, self._seed = tuple(tasks), (int(size[0]), int(size[1])), seed
        self._first = _FIRST_SCENE[split, subset]
        self._name = f"{seed}-{subset}" if split == "standard" else f"{seed}-{split}-{subset}"
        self._cache: dict[int, Sample] = {}
        self._free_bytes = CACHE_BYTES if cache else 0
        self.ids: Sequence[str] = [
            f"rooms-{self._name}-{i:05d}" for i in range(count if limit is None else min(count, limit))
        ]

    @classmethod
    def task_options(cls, **_options: Any) -> Mapping[str, Mapping[str, Any]]:
        """Return task name -> options of the task, whatever the dataset's options."""
        return {
            "semseg": {"class_names": CLASS_NAMES},
            "human_parts": {},
            "sal": {},
            "depth": {},
            "normals": {},
            "edge": {},
        }

    def read(self, index: int, tasks: Collection[str] | None = None) -> Sample:
        """Return the image and the labels of ``tasks`` (default: all in use); the caller may change the arrays."""
        sample = self._cache.get(index)
        if sample is None:
            sample = self._render(index)
            size = sample.image.nbytes + sum(label.nbytes for label in sample.labels.values())
            if size <= self._free_bytes:
                self._free_bytes -= size
                self._cache[index] = sample
        names = [task for task in sample.labels if tasks is None or task in tasks]
        return Sample(sample.id, sample.image.copy(), {task: sample.labels[task].copy() for task in names})

    def fingerprint(self) -> str:
        """Return a short hash of the list's scenes, their size and the renderer's version."""
        content = f"{RENDER_VERSION} {self._name} {len(self.ids)} {self._size}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def summary(self) -> str:
        """Describe the list in one line for the log."""
        return f"procedural rooms, {len(self.ids)} scenes at {self._size[0]}x{self._size[1]}"

    def _render(self, index: int) -> Sample:
        """Render a scene with the labels in use."""
        arrays = render(self._seed, self._first + range(len(self.ids))[index], *self._size)
        return Sample(self.ids[index], arrays["image"], {task: arrays[task] for task in self._tasks})


def _require(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ``UserError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UserError(f"rooms: unknown {name} {value!r}; choose one of {', '.join(choices)}.")
