"""What readers of files on a disk have in common: finding files, sizes, the cache, a fingerprint."""

import hashlib
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mtcl.data.cache import ArrayCache, CacheEntry
from mtcl.data.image_io import file_error, read_bytes, read_ids
from mtcl.data.sample import Sample
from mtcl.data.transforms import resize_nearest
from mtcl.errors import UserError, escape_control_characters

IMAGE = "image"  # the kind of array beside the tasks'
DECODE_VERSION = 1  # raised whenever files are decoded in another way: the cache begins anew


class FileDataset(ABC):
    """A list of pictures and labels that lie in files below ``root``.

    A subclass says which files there are (:meth:`sources`) and decodes them (:meth:`decode`); it sets ``ids`` and
    ``tasks`` before :meth:`open_store`. Labels of another size than their picture are resampled to it if their aspects
    agree, by nearest (the field does so, but for normals, which it interpolates); else that is a UserError when read.
    """

    root: Path
    ids: Sequence[str]
    tasks: tuple[str, ...]
    resize: tuple[int, int] | None = None  # height, width: pictures and labels are made this small when decoded
    array_cache: ArrayCache | None = None
    memory_map: bool = False

    def __init__(self) -> None:
        self._places: dict[str, str] = {}

    @abstractmethod
    def source_files(self, kind: str, name: str) -> tuple[Path, ...]:
        """The files that the array ``kind`` ("image" or a task) of the picture ``name`` is made from."""

    @abstractmethod
    def decode(self, kind: str, name: str) -> np.ndarray:
        """The array at the size of its file: uint8 RGB (H, W, 3) for "image", else the task's NumPy layout."""

    @abstractmethod
    def decode_settings(self) -> Mapping[str, Any]:
        """What, besides the files, decides what :meth:`decode` gives."""

    @abstractmethod
    def array_kinds(self) -> Sequence[str]:
        """ "image" and every task of the dataset, in use or not."""

    def read(self, index: int, tasks: Collection[str] | None = None) -> Sample:
        """The picture and its labels (of ``tasks``; default: all in use) in the NumPy layout of
        :class:`mtcl.tasks.base.Task`."""
        name = self.ids[index]
        image = self._load(IMAGE, name)
        labels = {}
        for task in self.tasks if tasks is None else [task for task in self.tasks if task in tasks]:
            label = self._load(task, name)
            self.check_aspect(task, name, label.native_size, image.native_size)
            labels[task] = resize_nearest(label.array, _size(image.array))
        return Sample(name, image.array, labels)

    def cached_label(self, kind: str, name: str, sources: Sequence[Path], make: Callable[[], np.ndarray]) -> np.ndarray:
        """``make()``, computed once where there is a cache; for labels that are costly to derive."""

        def made() -> CacheEntry:
            array = make()
            return CacheEntry(array, _size(array))

        kept_anyway = self.memory_map and kind in self.tasks
        if self.array_cache is None or kept_anyway:
            return make()
        return self.array_cache.get(self._place(f"derived-{kind}"), name, sources, made, compressed=True).array

    def open_cache(self, cache: str | Path | None, memory_map: bool) -> None:
        """Keep derived labels, with ``memory_map`` every decoded array, in a folder of this dataset below ``cache``."""
        self.memory_map = memory_map
        if cache is None:
            return
        folder = Path(cache).resolve()
        if folder.is_relative_to(self.root.resolve()):
            raise UserError(
                f"the cache {folder} lies in the dataset {self.root}; give a folder outside, data.cache=PATH."
            )
        self.array_cache = ArrayCache(folder / type(self).__name__.lower())

    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of a SHA-256 that tells the list and its files, without reading them.

        It covers the ids, the settings, and the sizes in bytes of the first, middle and last id's files of every
        task, in use or not (-1 where absent), so that runs on different tasks agree.
        """
        probes = (self.ids[0], self.ids[len(self.ids) // 2], self.ids[-1])
        paths = [path for kind in self.array_kinds() for name in probes for path in self.source_files(kind, name)]
        sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
        known = repr((list(self.ids), self.decode_settings(), self.resize, sizes))
        return hashlib.sha256(known.encode()).hexdigest()[:16]

    def check_files(self, layout: str) -> None:
        """UserError if a file of the tasks in use is missing; ``layout`` tells what is expected."""
        folders: dict[Path, set[str]] = {}
        missing = []
        for kind in (IMAGE, *self.tasks):
            for name in self.ids:
                for path in self.source_files(kind, name):
                    if path.parent not in folders:
                        folders[path.parent] = {entry.name for entry in list_folder(path.parent)}
                    if path.name not in folders[path.parent]:
                        missing.append(str(path.relative_to(self.root)))
        if missing:
            missing = list(dict.fromkeys(missing))
            first = self.root / missing[0]
            others = describe_other_files(first.parent, {Path(path).stem for path in missing})
            raise UserError(
                f"{self.root} lacks {len(missing)} files of the tasks used, first {', '.join(missing[:3])}{others}; "
                f"unpack the whole archive there (expected: {layout})."
            )

    def _load(self, kind: str, name: str) -> CacheEntry:
        if self.array_cache is None or not self.memory_map:
            return self._decoded(kind, name)
        return self.array_cache.get(
            self._place(kind), name, self.source_files(kind, name), lambda: self._decoded(kind, name)
        )

    def _place(self, kind: str) -> str:
        """The folder of a kind of arrays in the store: one for each archive and each set of settings.

        An archive is told by the content of three of its files, so that two that differ in one kind share the others,
        wherever they lie.
        """
        if kind not in self._places:
            sums = [zlib.crc32(read_bytes(path)) if path.is_file() else 0 for path in self._probes(kind)]
            known = repr((DECODE_VERSION, self.decode_settings(), self.resize, sums))
            self._places[kind] = f"{kind}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
        return self._places[kind]

    def _probes(self, kind: str) -> list[Path]:
        """Files of a kind, or of the pictures, that tell one archive from another."""
        (example,) = self.source_files(IMAGE, "x")
        names = sorted(path.stem for path in list_folder(example.parent) if path.suffix == example.suffix)
        chosen = kind if kind in self.array_kinds() else IMAGE
        return [path for i in (0, len(names) // 2, -1) for path in self.source_files(chosen, names[i])]

    def _decoded(self, kind: str, name: str) -> CacheEntry:
        array = self.decode(kind, name)
        native = _size(array)
        if self.resize is not None and self.resize != native:
            resized = {IMAGE: resize_image, "edge": resize_edges}.get(kind, resize_nearest)
            array = resized(array, self.resize)
        return CacheEntry(array, native)

    def check_aspect(self, task: str, name: str, label: tuple[int, int], image: tuple[int, int]) -> None:
        """UserError if a label of this size can't be resampled to its picture."""
        if not same_aspect(label, image):
            raise UserError(
                f"{self.source_files(task, name)[0]} is {label[0]}x{label[1]} pixels (height x width), but its picture is "
                f"{image[0]}x{image[1]}; both must show the same."
            )


def same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (height, width) can be of the same view: equal aspects, but for the smaller one's rounding.

    So a frame of 480x640 pixels is not its valid part of 425x560.
    """
    small, large = sorted((size, other))
    return abs(small[0] * large[1] - small[1] * large[0]) < max(large)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture at ``size`` (height, width): mean over the covered area, bilinear where both sides grow."""
    grows = size[0] >= image.shape[0] and size[1] >= image.shape[1]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR if grows else cv2.INTER_AREA)


def resize_edges(edges: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Edges (H, W) at ``size``: 1 where a pixel covers any edge, so that thin lines survive."""
    return _cell_maximum(_cell_maximum(edges, size[0], axis=0), size[1], axis=1)


def list_folder(folder: Path) -> list[Path]:
    """What a folder holds; nothing where there is none."""
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise file_error(folder, error) from error


def describe_other_files(folder: Path, stems: Set[str]) -> str:
    """Name the files of other endings that ``folder`` holds, to be added to a complaint; empty where there are none.

    Args:
        folder: where files are missing.
        stems: the names of the missing files, without their ending.
    """
    suffixes = Counter(path.suffix for path in list_folder(folder) if path.stem in stems)
    listed = ", ".join(f"{count} {suffix or 'without an ending'}" for suffix, count in suffixes.most_common(3))
    return f" (of them there are {escape_control_characters(listed)}, which are not read)" if suffixes else ""


def find_dataset_root(given: Path, names: Sequence[str], lists: str, what: str, layout: str) -> Path:
    """The dataset's folder: ``given`` or one of the ``names`` in it; it must hold the folder ``lists``."""
    root = next((given / name for name in names if (given / name).is_dir()), given)
    advice = f"give the folder that holds {what}, data.root=PATH (expected: {layout})."
    if not list_folder(root):
        raise UserError(f"{root} {'is empty' if root.is_dir() else 'is not a folder'}; {advice}")
    if not (root / lists).is_dir():
        raise UserError(f"{root} has no folder {lists}; {advice}")
    return root


def read_id_list(folder: Path, part: str, split: str, limit: int | None) -> list[str]:
    """The ids of one list in ``folder``; the other parts and splits stay closed."""
    if part not in ("train", "val"):
        raise UserError(f"part={part!r} is not a part of a dataset; choose 'train' or 'val'.")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} leaves no picture; give at least 1, or None for all.")
    path = folder / (f"{part}.txt" if split == "standard" else f"{split}_{part}.txt")
    try:
        listed = path.is_file()
    except OSError as error:  # a name too long
        raise file_error(path, error) from error
    if not listed:
        stems = sorted(entry.stem for entry in list_folder(folder) if entry.suffix == ".txt")
        there = [stem.removesuffix(f"_{part}") for stem in stems if stem.endswith(f"_{part}")]
        there = ["standard"] * (part in stems) + there
        raise UserError(f"split={split!r} needs {path}, which is missing; the splits there are {there}.")
    return read_ids(path, f"the list of split {split!r}")[:limit]


def _cell_maximum(array: np.ndarray, count: int, axis: int) -> np.ndarray:
    """Maximum over each of ``count`` equal cells of an axis; a pixel partly in a cell belongs to it."""
    length = array.shape[axis]
    cells = np.arange(count)
    bounds = np.stack([cells * length // count, -((cells + 1) * -length // count)], axis=1).ravel()
    bounds = np.minimum(bounds, length)
    padded = np.concatenate([array, np.take(array, [-1], axis)], axis)  # an index of reduceat must lie inside
    return np.take(np.maximum.reduceat(padded, bounds, axis), 2 * cells, axis)


def _size(array: np.ndarray) -> tuple[int, int]:
    height, width = array.shape[:2]
    return height, width
