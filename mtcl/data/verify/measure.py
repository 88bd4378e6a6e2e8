"""What is measured on one picture and its labels, as sums that add up over pictures."""

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

DISTINCT = 257  # depth levels that are remembered: one more than 8 bits have
SHOWN = 3  # complaints that are remembered
# Bins of depth in metres: below the first edge, 100 per factor of ten, above the last.
DEPTH_EDGES = np.logspace(-4, 6, 1001)
BLANK = 1.0  # standard deviation of the levels below which a picture shows nothing


class Item(NamedTuple):
    """One picture to be measured."""

    part: str
    name: str
    kinds: tuple[str, ...]  # "image" and the tasks whose files are there
    aligned: bool  # whether its labels are compared with it


@dataclass
class Measurements:
    """Sums over pictures; each key begins with the task."""

    sums: dict[str, np.ndarray | float] = field(default_factory=dict)
    sizes: dict[str, Counter[tuple[int, int]]] = field(default_factory=dict)  # kind -> (height, width) -> files
    errors: dict[str, list[str]] = field(default_factory=dict)  # kind -> the first complaints
    failed: Counter[str] = field(default_factory=Counter)  # kind -> files that can't be read
    levels: frozenset[float] = frozenset()  # of depth, at most DISTINCT
    matches: dict[tuple[str, str], list[align.Match]] = field(default_factory=dict)  # (task, part)

    def add(self, other: "Measurements") -> None:
        """Take in what was measured on the pictures after these."""
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
        """A sum of numbers; 0 if nothing was added."""
        return float(self.sums.get(key, 0.0))

    def values(self, task: str, parts: Sequence[str] = ("train", "val")) -> np.ndarray:
        """How many pixels have each of the values 0 to 255, float64 (256,)."""
        return np.sum([self.vector(f"{task} {part} values", 256) for part in parts], axis=0)

    def vector(self, key: str, length: int) -> np.ndarray:
        """A sum of vectors; zeros if nothing was added."""
        return np.broadcast_to(np.asarray(self.sums.get(key, 0.0)), (length,))


def measure(item: Item, reader: FileDataset, tasks: Mapping[str, Task], floor: int | None) -> Measurements:
    """Read one picture and its labels and measure them; complaints of the reader are part of the result."""
    result = Measurements()
    arrays = _read(item, reader, result)
    image = arrays.pop(IMAGE, None)
    if image is not None:
        _count(result, "image", pictures=1, blank=image.std() < BLANK)
    labels: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        task = tasks[name]
        if isinstance(task, Normals):  # with their lengths
            result.sums |= _lengths(Normals(normals_valid="standard").finalize_label(array))
        labels[name] = task.finalize_label(array)
        result.sums |= _values(name, item.part, labels[name], task)
        if labels[name].ndim == 2 and labels[name].dtype != np.uint8:
            result.levels = _levels(labels[name])
    if "normals" in labels:
        classes = labels.get("semseg")
        mask = None if classes is None or floor is None else classes == floor
        result.sums |= _directions(labels["normals"], mask)
    if item.aligned and image is not None:
        for name, label in labels.items():
            found = align.match(image, resize_nearest(label, _size(image)))
            if found is not None:
                result.matches[name, item.part] = [found]
    return result


def merge_measurements(results: Iterable[Measurements]) -> Measurements:
    """The sum of all."""
    total = Measurements()
    for result in results:
        total.add(result)
    return total


def _read(item: Item, reader: FileDataset, result: Measurements) -> dict[str, np.ndarray]:
    """The arrays that can be read, labels only if they fit their picture."""
    arrays: dict[str, np.ndarray] = {}
    for kind in item.kinds:
        try:
            array = reader.decode(kind, item.name)
            if IMAGE in arrays:
                reader.check_aspect(kind, item.name, _size(array), _size(arrays[IMAGE]))
                _count(result, kind, resampled=_size(array) != _size(arrays[IMAGE]))
        except UserError as error:
            result.failed[kind] += 1
            result.errors[kind] = [str(error)]
            continue
        result.sizes[kind] = Counter([_size(array)])
        arrays[kind] = array
    return arrays


def _values(name: str, part: str, label: np.ndarray, task: Task) -> dict[str, np.ndarray | float]:
    """Histograms by the label's layout: of the 256 values, or of depth; normals are measured elsewhere."""
    sums: dict[str, np.ndarray | float] = {f"{name} pictures": 1.0}
    if label.ndim == 3:
        return sums
    if label.dtype == np.uint8:
        counts = np.bincount(label.ravel(), minlength=256).astype(np.float64)
        some = counts.copy()
        some[int(task.void)] = 0
        return sums | {
            f"{name} {part} values": counts,
            f"{name} void pictures": float(not some.any()),
            f"{name} foreground pictures": float(some[1:].any()),
        }
    valid = label[label > 0]
    histogram = np.bincount(np.searchsorted(DEPTH_EDGES, valid), minlength=len(DEPTH_EDGES) + 1)
    return sums | {
        f"{name} pixels": float(label.size),
        f"{name} histogram": histogram.astype(np.float64),
        f"{name} total": float(valid.sum(dtype=np.float64)),
        f"{name} void pictures": float(not len(valid)),
    }


def _lengths(vectors: np.ndarray) -> dict[str, np.ndarray | float]:
    """Of the vectors as they are stored: how many, how many short, how many of the others units; zeros are void."""
    known = vectors.any(axis=2)
    length = np.linalg.norm(vectors, axis=2)
    long = known & (length >= Normals.min_length)
    return {
        "normals pixels": float(known.size),
        "normals zero": float((~known).sum()),
        "normals short": float((known & ~long).sum()),
        "normals units": float((long & (length >= 0.95) & (length <= 1.05)).sum()),
        "normals long": float(long.sum()),
    }


def _directions(normals: np.ndarray, floor: np.ndarray | None) -> dict[str, np.ndarray | float]:
    """Sums of unit vectors (H, W, 3): of all, of the floor (a mask, if known), of x by the side of the picture."""
    known = normals.any(axis=2)
    sides = np.where(np.arange(known.shape[1]) < known.shape[1] / 2, -1.0, 1.0)
    sums: dict[str, np.ndarray | float] = {
        "normals vectors": normals.sum(axis=(0, 1), dtype=np.float64),
        "normals outwards": float((normals[..., 0] * sides).sum()),
        "normals void pictures": float(not known.any()),
    }
    if floor is not None and floor.shape == known.shape:
        sums["normals floor pixels"] = float((known & floor).sum())
        sums["normals floor pictures"] = float((known & floor).any())
        sums["normals floor vectors"] = normals[floor].sum(axis=0, dtype=np.float64)
    return sums


def _count(result: Measurements, name: str, **amounts: float) -> None:
    for key, amount in amounts.items():
        result.sums[f"{name} {key}"] = float(amount)


def _levels(depth: np.ndarray) -> frozenset[float]:
    """The distinct positive values of depth, at most DISTINCT of them."""
    return frozenset(np.unique(depth[depth > 0])[:DISTINCT].tolist())


def _size(array: np.ndarray) -> tuple[int, int]:
    return array.shape[0], array.shape[1]
