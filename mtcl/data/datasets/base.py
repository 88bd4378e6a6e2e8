"""Shared parts of datasets of files on disk: finding files, sizes, the cache, a fingerprint."""

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

IMAGE = "image"  # the kind of array besides the tasks'
DECODE_VERSION = 1  # increased when decoding changes, which empties the cache


class FileDataset(ABC):
    """A list of images and labels in files below ``root``.

    A subclass names the files (:meth:`source_files`) and decodes them (:meth:`decode`); it sets ``ids`` and ``tasks``
    before :meth:`open_cache`. Labels of another size than their image are resampled to it by nearest if their aspect
    ratios agree (as is standard, except that others interpolate normals); else reading them is a UserError.
    """

    root: Path
    ids: Sequence[str]
    tasks: tuple[str, ...]
    resize: tuple[int, int] | None = None  # height, width: images and labels are made this small when decoded
    array_cache: ArrayCache | None = None
    memory_map: bool = False
    missing_labels: bool = False  # whether files of labels may be missing; those of images never may

    def __init__(self) -> None:
        self._cache_folders: dict[str, str] = {}

    @abstractmethod
    def source_files(self, kind: str, name: str) -> tuple[Path, ...]:
        """Return the files that the array ``kind`` ("image" or a task) of the image ``name`` is made from."""

    @abstractmethod
    def decode(self, kind: str, name: str) -> np.ndarray:
        """Return the array at the size of its file: uint8 RGB (H, W, 3) for "image", else the task's NumPy layout."""

    @abstractmethod
    def summary(self) -> str:
        """Describe the files in one line for the log."""

    @abstractmethod
    def decode_settings(self) -> Mapping[str, Any]:
        """Return the settings that, besides the files, determine the result of :meth:`decode`."""

    @abstractmethod
    def array_kinds(self) -> Sequence[str]:
        """Return "image" and every task of the dataset, in use or not."""

    def read(self, index: int, tasks: Collection[str] | None = None) -> Sample:
        """Return the image and its labels in the NumPy layout of :class:`mtcl.tasks.base.Task`.

        Args:
            index: position in ``ids``.
            tasks: load the labels of these tasks only; the default is every task in use.

        Raises:
            UserError: a file can't be read, or a label has another aspect ratio than its image.
        """
        name = self.ids[index]
        image = self._load(IMAGE, name)
        labels = {}
        for task in self.tasks if tasks is None else [task for task in self.tasks if task in tasks]:
            label = self._load(task, name)
            self.check_aspect(task, name, label.native_size, image.native_size)
            labels[task] = resize_nearest(label.array, _size(image.array))
        return Sample(name, image.array, labels)

    def cached_label(self, kind: str, name: str, sources: Sequence[Path], make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return ``make()``, computed once if there is a cache; for labels that are costly to derive."""

        def make_entry() -> CacheEntry:
            """Compute the cache entry."""
            array = make()
            return CacheEntry(array, _size(array))

        cached_as_array = self.memory_map and kind in self.tasks
        if self.array_cache is None or cached_as_array:
            return make()
        return self.array_cache.get(
            self._cache_folder(f"derived-{kind}"), name, sources, make_entry, compressed=True
        ).array

    def open_cache(self, cache: str | Path | None, memory_map: bool) -> None:
        """Open this dataset's folder below ``cache``, unless that is None.

        It keeps derived labels and, with ``memory_map``, every decoded array.
        """
        self.memory_map = memory_map
        if cache is None:
            return
        folder = Path(cache).resolve()
        if folder.is_relative_to(self.root.resolve()):
            raise UserError(f"the cache {folder} lies in the dataset {self.root}; choose a cache outside of it.")
        self.array_cache = ArrayCache(folder / type(self).__name__.lower())

    def fingerprint(self) -> str:
        """Return the first 16 hexadecimal digits of a SHA-256 of the list and its files, without reading them.

        It covers the ids, the settings, and the sizes in bytes of the first, middle and last id's files of every
        task, in use or not (-1 where absent), so that runs on different tasks agree.
        """
        probes = (self.ids[0], self.ids[len(self.ids) // 2], self.ids[-1])
        paths = [path for kind in self.array_kinds() for name in probes for path in self.source_files(kind, name)]
        sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
        content = repr((list(self.ids), self.decode_settings(), self.resize, sizes))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def check_files(self, layout: str) -> None:
        """Raise ``UserError`` if a file of the tasks in use is missing; ``layout`` describes what is expected.

        With ``missing_labels``, only images must be there.
        """
        kinds = (IMAGE,) if self.missing_labels else (IMAGE, *self.tasks)
        is_there = self._file_finder()
        paths = (path for kind in kinds for name in self.ids for path in self.source_files(kind, name))
        missing = [str(path.relative_to(self.root)) for path in paths if not is_there(path)]
        if missing:
            missing = list(dict.fromkeys(missing))
            first = self.root / missing[0]
            other_files = describe_other_files(first.parent, {Path(path).stem for path in missing})
            raise UserError(
                f"{self.root} lacks {len(missing)} files of the tasks used, first {', '.join(missing[:3])}"
                f"{other_files}; "
                f"unpack the full archive there (expected: {layout})."
            )

    def list_present_labels(self) -> dict[str, frozenset[str]]:
        """Return image id -> the tasks in use whose files are all there."""
        is_there = self._file_finder()
        return {
            name: frozenset(task for task in self.tasks if all(map(is_there, self.source_files(task, name))))
            for name in self.ids
        }

    @staticmethod
    def _file_finder() -> Callable[[Path], bool]:
        """Return a function that says whether a file exists; it lists each folder once."""
        folders: dict[Path, set[str]] = {}

        def is_there(path: Path) -> bool:
            """Say whether ``path`` exists."""
            if path.parent not in folders:
                folders[path.parent] = {entry.name for entry in list_folder(path.parent)}
            return path.name in folders[path.parent]

        return is_there

    def _load(self, kind: str, name: str) -> CacheEntry:
        """Return the decoded array, from the cache if it is in use."""
        if self.array_cache is None or not self.memory_map:
            return self._decode_resized(kind, name)
        return self.array_cache.get(
            self._cache_folder(kind), name, self.source_files(kind, name), lambda: self._decode_resized(kind, name)
        )

    def _cache_folder(self, kind: str) -> str:
        """Return the cache folder of a kind of arrays: one for each archive and each set of settings.

        An archive is identified by the content of three of its files, so that two that differ in one kind share the
        others, wherever they lie.
        """
        if kind not in self._cache_folders:
            sums = [zlib.crc32(read_bytes(path)) if path.is_file() else 0 for path in self._probes(kind)]
            content = repr((DECODE_VERSION, self.decode_settings(), self.resize, sums))
            self._cache_folders[kind] = f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
        return self._cache_folders[kind]

    def _probes(self, kind: str) -> list[Path]:
        """Return files of a kind, or of the images, that tell one archive from another."""
        (example,) = self.source_files(IMAGE, "x")
        names = sorted(path.stem for path in list_folder(example.parent) if path.suffix == example.suffix)
        chosen = kind if kind in self.array_kinds() else IMAGE
        return [path for i in (0, len(names) // 2, -1) for path in self.source_files(chosen, names[i])]

    def _decode_resized(self, kind: str, name: str) -> CacheEntry:
        """Decode an array and resize it to ``resize``."""
        array = self.decode(kind, name)
        native = _size(array)
        if self.resize is not None and self.resize != native:
            resized = {IMAGE: resize_image, "edge": resize_edges}.get(kind, resize_nearest)
            array = resized(array, self.resize)
        return CacheEntry(array, native)

    def check_aspect(self, task: str, name: str, label: tuple[int, int], image: tuple[int, int]) -> None:
        """Raise ``UserError`` if a label of this size can't be resampled to its image."""
        if not same_aspect(label, image):
            raise UserError(
                f"{self.source_files(task, name)[0]} is {label[0]}x{label[1]} pixels (height x width), but its image "
                f"is {image[0]}x{image[1]}; both must show the same view."
            )


def same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two sizes (height, width) can be of the same view.

    Their aspect ratios must be equal, but for the smaller one's rounding: a frame of 480x640 pixels is not its valid
    part of 425x560.
    """
    small, large = sorted((size, other))
    return abs(small[0] * large[1] - small[1] * large[0]) < max(large)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image to ``size`` (height, width): mean over the covered area, bilinear where both sides grow."""
    grows = size[0] >= image.shape[0] and size[1] >= image.shape[1]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR if grows else cv2.INTER_AREA)


def resize_edges(edges: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize edges (H, W) to ``size``: 1 where a pixel covers any edge, so that thin lines survive."""
    return _cell_maximum(_cell_maximum(edges, size[0], axis=0), size[1], axis=1)


def list_folder(folder: Path) -> list[Path]:
    """Return the entries of a folder; none if it does not exist."""
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise file_error(folder, error) from error


def describe_other_files(folder: Path, stems: Set[str]) -> str:
    """Name the files of other endings that ``folder`` holds, to be added to an error; empty if there are none.

    Args:
        folder: where files are missing.
        stems: the names of the missing files, without their ending.
    """
    suffixes = Counter(path.suffix for path in list_folder(folder) if path.stem in stems)
    listed = ", ".join(f"{count} {suffix or 'without an ending'}" for suffix, count in suffixes.most_common(3))
    return f" (of them there are {escape_control_characters(listed)}, which are not read)" if suffixes else ""


def find_dataset_root(folder: Path, names: Sequence[str], lists: str, title: str, layout: str) -> Path:
    """Return the dataset's folder.

    Args:
        folder: the dataset's folder or its parent.
        names: names that the dataset's folder may have in its parent.
        lists: subfolder of the lists, which must exist.
        title: name of the dataset, for errors.
        layout: expected files, for errors.
    """
    root = next((folder / name for name in names if (folder / name).is_dir()), folder)
    advice = f"give the folder that holds {title} (expected: {layout})."
    if not list_folder(root):
        raise UserError(f"{root} {'is empty' if root.is_dir() else 'is not a folder'}; {advice}")
    if not (root / lists).is_dir():
        raise UserError(f"{root} has no folder {lists}; {advice}")
    return root


def read_id_list(folder: Path, subset: str, split: str, limit: int | None) -> list[str]:
    """Read the ids of one list; the lists of other subsets and splits stay closed.

    Args:
        folder: folder of the lists.
        subset: "train" or "val".
        split: "standard" for ``<subset>.txt``, else ``<split>_<subset>.txt``.
        limit: keep the first so many ids.

    Raises:
        UserError: there is no such list, or it is faulty.
    """
    if subset not in ("train", "val"):
        raise UserError(f"subset={subset!r} is unknown; choose 'train' or 'val'.")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} leaves no image; give at least 1, or None for all.")
    path = folder / (f"{subset}.txt" if split == "standard" else f"{split}_{subset}.txt")
    try:
        exists = path.is_file()
    except OSError as error:  # a name too long
        raise file_error(path, error) from error
    if not exists:
        stems = sorted(entry.stem for entry in list_folder(folder) if entry.suffix == ".txt")
        splits = [stem.removesuffix(f"_{subset}") for stem in stems if stem.endswith(f"_{subset}")]
        splits = ["standard"] * (subset in stems) + splits
        raise UserError(f"split={split!r} needs {path}, which is missing; the available splits are {splits}.")
    return read_ids(path, f"the list of split {split!r}")[:limit]


def _cell_maximum(array: np.ndarray, count: int, axis: int) -> np.ndarray:
    """Return the maximum over each of ``count`` equal cells of an axis; a pixel partly in a cell belongs to it."""
    length = array.shape[axis]
    cells = np.arange(count)
    bounds = np.stack([cells * length // count, -((cells + 1) * -length // count)], axis=1).ravel()
    bounds = np.minimum(bounds, length)
    padded = np.concatenate([array, np.take(array, [-1], axis)], axis)  # an index of reduceat must lie inside
    return np.take(np.maximum.reduceat(padded, bounds, axis), 2 * cells, axis)


def _size(array: np.ndarray) -> tuple[int, int]:
    """Return height and width of an array."""
    height, width = array.shape[:2]
    return height, width
