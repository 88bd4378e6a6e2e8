"""Measurements of one image and its labels, as sums that add up over images."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mtcl.data.datasets.base import IMAGE, FileDataset
from mtcl.data.transforms import resize_nearest
from mtcl.data.verify import align
from mtcl.errors import UserError
from mtcl.tasks import Normals
from mtcl.tasks.base import Task

DISTINCT = 257  # depth levels that are kept: one more than 8 bits have
SHOWN = 3  # errors that are kept
# Bins of depth in metres: below the first edge, 100 per factor of ten, above the last.
DEPTH_EDGES = np.logspace(-4, 6, 1001)
BLANK = 1.0  # standard deviation of the levels below which an image shows nothing


class Item(NamedTuple):
    """One image to be measured."""

    subset: str
    name: str
    kinds: tuple[str, ...]  # "image" and the tasks whose files are there
    aligned: bool  # whether its labels are compared with it


@dataclass
class Measurements:
    """Sums over images; each key begins with the task."""

    sums: dict[str, np.ndarray | float] = field(default_factory=dict)
    sizes: dict[str, Counter[tuple[int, int]]] = field(default_factory=dict)  # kind -> (height, width) -> files
    errors: dict[str, list[str]] = field(default_factory=dict)  # kind -> the first errors
    failed: Counter[str] = field(default_factory=Counter)  # kind -> files that can't be read
    levels: frozenset[float] = frozenset()  # of depth, at most DISTINCT
    matches: dict[tuple[str, str], list[align.Match]] = field(default_factory=dict)  # (task, part)

    def add(self, other: "Measurements") -> None:
        """Add the measurements of the images after these."""
        for key, value in other.sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        for kind, sizes in other.sizes.items():
            self.sizes.setdefault(kind, Counter()).update(sizes)
        for kind, sentences in other.errors.items():
            self.errors[kind] = (self.errors.get(kind, []) + sentences)[:SHOWN]
        self.failed.update(other.failed)
        self.levels = frozenset(sorted(self.levels | other.levels)[:DISTINCT])
        for key2, matches in other.matches.items():
            self.matches.setdefault(key2, []).extend(matches)

    def number(self, key: str) -> float:
        """Return a sum of numbers; 0 if nothing was added."""
        return float(self.sums.get(key, 0.0))

    def values(self, task: str, subsets: Sequence[str] = ("train", "val")) -> np.ndarray:
        """Return how many pixels have each of the values 0 to 255, float64 (256,)."""
        return np.sum([self.vector(f"{task} {subset} values", 256) for subset in subsets], axis=0)

    def vector(self, key: str, length: int) -> np.ndarray:
        """Return a sum of vectors; zeros if nothing was added."""
        return np.broadcast_to(np.asarray(self.sums.get(key, 0.0)), (length,))


def measure(item: Item, dataset: FileDataset, tasks: Mapping[str, Task], floor: int | None) -> Measurements:
    """Read one image and its labels and measure them; read errors are part of the result."""
    result = Measurements()
    arrays = _read(item, dataset, result)
    image = arrays.pop(IMAGE, None)
    if image is not None:
        _count(result, "image", images=1, blank=image.std() < BLANK)
    labels: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        task = tasks[name]
        if isinstance(task, Normals):  # with their lengths
            result.sums |= _lengths(Normals(normals_valid="standard").finalize_label(array))
        labels[name] = task.finalize_label(array)
        result.sums |= _values(name, item.subset, labels[name], task)
        if labels[name].ndim == 2 and labels[name].dtype != np.uint8:
            result.levels = _levels(labels[name])
    if "normals" in labels:
        classes = labels.get("semseg")
        mask = None if classes is None or floor is None else classes == floor
        result.sums |= _directions(labels["normals"], mask)
    if item.aligned and image is not None:
        for name, label in labels.items():
            matched = align.match(image, resize_nearest(label, _size(image)))
            if matched is not None:
                result.matches[name, item.subset] = [matched]
    return result


def merge_measurements(results: Iterable[Measurements]) -> Measurements:
    """Return the sum of all measurements."""
    total = Measurements()
    for result in results:
        total.add(result)
    return total


def _read(item: Item, dataset: FileDataset, result: Measurements) -> dict[str, np.ndarray]:
    """Return the arrays that can be read, labels only if they fit their image."""
    arrays: dict[str, np.ndarray] = {}
    for kind in item.kinds:
        try:
            array = dataset.decode(kind, item.name)
            if IMAGE in arrays:
                dataset.check_aspect(kind, item.name, _size(array), _size(arrays[IMAGE]))
                _count(result, kind, resampled=_size(array) != _size(arrays[IMAGE]))
        except UserError as error:
            result.failed[kind] += 1
            result.errors[kind] = [str(error)]
            continue
        result.sizes[kind] = Counter([_size(array)])
        arrays[kind] = array
    return arrays


def _values(name: str, subset: str, label: np.ndarray, task: Task) -> dict[str, np.ndarray | float]:
    """Return histograms by the label's layout: of the 256 values, or of depth; normals are measured elsewhere."""
    sums: dict[str, np.ndarray | float] = {f"{name} images": 1.0}
    if label.ndim == 3:
        return sums
    if label.dtype == np.uint8:
        counts = np.bincount(label.ravel(), minlength=256).astype(np.float64)
        some = counts.copy()
        some[int(task.void)] = 0
        return sums | {
            f"{name} {subset} values": counts,
            f"{name} void images": float(not some.any()),
            f"{name} foreground images": float(some[1:].any()),
        }
    valid = label[label > 0]
    histogram = np.bincount(np.searchsorted(DEPTH_EDGES, valid), minlength=len(DEPTH_EDGES) + 1)
    return sums | {
        f"{name} pixels": float(label.size),
        f"{name} histogram": histogram.astype(np.float64),
        f"{name} total": float(valid.sum(dtype=np.float64)),
        f"{name} void images": float(not len(valid)),
    }


def _lengths(vectors: np.ndarray) -> dict[str, np.ndarray | float]:
    """Count stored vectors: zero (void), short, and of the others those of unit length."""
    nonzero = vectors.any(axis=2)
    length = np.linalg.norm(vectors, axis=2)
    long = nonzero & (length >= Normals.min_length)
    return {
        "normals pixels": float(nonzero.size),
        "normals zero": float((~nonzero).sum()),
        "normals short": float((nonzero & ~long).sum()),
        "normals units": float((long & (length >= 0.95) & (length <= 1.05)).sum()),
        "normals long": float(long.sum()),
    }


def _directions(normals: np.ndarray, floor: np.ndarray | None) -> dict[str, np.ndarray | float]:
    """Sum unit vectors (H, W, 3): all, those of the floor (a mask, if known), and x by the side of the image."""
    valid = normals.any(axis=2)
    sides = np.where(np.arange(valid.shape[1]) < valid.shape[1] / 2, -1.0, 1.0)
    sums: dict[str, np.ndarray | float] = {
        "normals vectors": normals.sum(axis=(0, 1), dtype=np.float64),
        "normals outwards": float((normals[..., 0] * sides).sum()),
        "normals void images": float(not valid.any()),
    }
    if floor is not None and floor.shape == valid.shape:
        sums["normals floor pixels"] = float((valid & floor).sum())
        sums["normals floor images"] = float((valid & floor).any())
        sums["normals floor vectors"] = normals[floor].sum(axis=0, dtype=np.float64)
    return sums


def _count(result: Measurements, name: str, **amounts: float) -> None:
    """Add numbers to the sums."""
    for key, amount in amounts.items():
        result.sums[f"{name} {key}"] = float(amount)


def _levels(depth: np.ndarray) -> frozenset[float]:
    """Return the distinct positive values of depth, at most DISTINCT of them."""
    return frozenset(np.unique(depth[depth > 0])[:DISTINCT].tolist())


def _size(array: np.ndarray) -> tuple[int, int]:
    """Return height and width of an array."""
    return array.shape[0], array.shape[1]
