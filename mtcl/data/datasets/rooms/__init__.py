"""The built-in data set: procedural indoor scenes with exact labels for all six tasks, and no files.

A scene is a pure function of (seed, index): :mod:`scene` says what is in it, :mod:`render` takes its picture.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mtcl.data.datasets.rooms.render import render
from mtcl.data.datasets.rooms.scene import CLASS_NAMES
from mtcl.data.sample import Sample
from mtcl.errors import UserError

__all__ = ["CLASS_NAMES", "Rooms", "render"]

RENDER_VERSION = 1  # raised whenever any pixel of any scene changes

# Where each list's scenes begin in the endless row of a seed's scenes: far enough apart never to meet.
_FIRST_SCENE = {
    ("standard", "train"): 0,
    ("standard", "val"): 10_000_000,
    ("tune", "train"): 20_000_000,
    ("tune", "val"): 30_000_000,
}
_LONGEST = 10_000_000
CACHE_BYTES = 2**29  # that a reader keeps at most, in each process that reads; 1,900 scenes of 96x128


class Rooms:
    """One list of rooms, as a :class:`mtcl.data.sample.MultiTaskDataset`.

    ``length`` is the number of scenes for training and for validation, ``limit`` keeps only the first so many
    of this list; ``cache`` keeps what was read in memory, with the tasks asked for, up to :data:`CACHE_BYTES`.
    """

    def __init__(
        self,
        part: str,
        tasks: Sequence[str],
        size: tuple[int, int] = (96, 128),
        split: str = "standard",
        length: tuple[int, int] = (800, 100),
        seed: int = 0,
        limit: int | None = None,
        cache: bool = True,
    ):
        _require("part", part, ("train", "val"))
        _require("split", split, ("standard", "tune"))
        for task in tasks:
            _require("task", task, tuple(self.task_options()))
        count = length[0] if part == "train" else length[1]
        if not 0 < count <= _LONGEST:
            raise UserError(f"rooms: length {count} of the part {part!r} must be between 1 and {_LONGEST}.")
        if limit is not None and limit < 1:
            raise UserError(f"rooms: limit {limit} must be at least 1, or null for no limit.")
        if min(size) < 8:
            raise UserError(f"rooms: size {tuple(size)} (height, width) must be at least 8 pixels each way.")

        self._tasks, self._size, self._seed = tuple(tasks), (int(size[0]), int(size[1])), seed
        self._first = _FIRST_SCENE[split, part]
        self._name = f"{seed}-{part}" if split == "standard" else f"{seed}-{split}-{part}"
        self._cache: dict[int, Sample] = {}
        self._room = CACHE_BYTES if cache else 0
        self.ids: Sequence[str] = [
            f"rooms-{self._name}-{i:05d}" for i in range(count if limit is None else min(count, limit))
        ]

    @classmethod
    def task_options(cls, **options: Any) -> Mapping[str, Mapping[str, Any]]:
        """Task name -> options of the task; the same whatever the options of the data set."""
        return {
            "semseg": {"class_names": CLASS_NAMES},
            "human_parts": {},
            "sal": {},
            "depth": {},
            "normals": {},
            "edge": {},
        }

    def read(self, index: int, tasks: Collection[str] | None = None) -> Sample:
        """The picture and the labels of the tasks asked for; the arrays are the caller's to change."""
        kept = self._cache.get(index)
        if kept is None:
            kept = self._render(index)
            size = kept.image.nbytes + sum(label.nbytes for label in kept.labels.values())
            if size <= self._room:
                self._room -= size
                self._cache[index] = kept
        wanted = [task for task in kept.labels if tasks is None or task in tasks]
        return Sample(kept.id, kept.image.copy(), {task: kept.labels[task].copy() for task in wanted})

    def fingerprint(self) -> str:
        """A short hash of the list's scenes, their size and the renderer's version."""
        content = f"{RENDER_VERSION} {self._name} {len(self.ids)} {self._size}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def summary(self) -> str:
        """What is rendered, in one line for the log."""
        return f"procedural rooms, {len(self.ids)} scenes at {self._size[0]}x{self._size[1]}"

    def _render(self, index: int) -> Sample:
        arrays = render(self._seed, self._first + range(len(self.ids))[index], *self._size)
        return Sample(self.ids[index], arrays["image"], {task: arrays[task] for task in self._tasks})


def _require(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"rooms: unknown {what} {value!r}; choose one of {', '.join(choices)}.")
