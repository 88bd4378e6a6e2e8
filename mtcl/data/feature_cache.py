"""A cache of a frozen backbone's feature maps on disk, by view and image.

An entry holds the maps of one view of one image, in one array that is mapped into memory; it belongs to the content of
the files that the view is made from. All that the maps depend on besides (weights, sizes, augmentation, ...) is in the
name of the cache's folder, as a hash: a cache of other settings is never read.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtcl.atomic import write_json
from mtcl.data.cache import ArrayCache, CacheEntry
from mtcl.data.datasets.base import FileDataset
from mtcl.data.sample import MultiTaskDataset
from mtcl.errors import ParameterError, UserError

DTYPES: dict[str, np.dtype] = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class FeatureFormat:
    """Lay out the maps of one frame in one array.

    Args:
        channels: of each map.
        strides: of each map, in pixels; a frame's height and width are multiples of them.
        channels_last: whether a map is kept as (h, w, C), as the backbone computes it; else as (C, h, w).
        precision: ``fp16`` or ``fp32``.

    Raises:
        ParameterError: the precision is unknown.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    channels_last: tuple[bool, ...]
    precision: str = "fp16"

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ParameterError("feature_precision", f"={self.precision} is not known; choose fp16 or fp32")

    @property
    def dtype(self) -> np.dtype:
        """Type of the values."""
        return DTYPES[self.precision]

    def map_shapes(self, frame: tuple[int, int]) -> list[tuple[int, int, int]]:
        """Return the shapes (C, h, w) of the maps of a ``frame`` (height, width)."""
        return [(c, frame[0] // s, frame[1] // s) for c, s in zip(self.channels, self.strides)]

    def num_bytes(self, frame: tuple[int, int]) -> int:
        """Return the bytes of one entry."""
        return sum(int(np.prod(shape)) for shape in self.map_shapes(frame)) * self.dtype.itemsize

    def pack(self, maps: Sequence[np.ndarray]) -> np.ndarray:
        """Return the maps (C, h, w) of one frame as one array of the cache's type."""
        parts = [m.transpose(1, 2, 0) if last else m for m, last in zip(maps, self.channels_last)]
        with np.errstate(over="ignore"):  # what fp16 can't hold becomes infinite, which `FeatureCache.write` refuses
            return np.concatenate([np.ascontiguousarray(part).ravel().astype(self.dtype) for part in parts])

    def unpack(self, packed: np.ndarray, frame: tuple[int, int]) -> list[np.ndarray]:
        """Return the maps (C, h, w) in an array that :meth:`pack` returned, without copying."""
        maps, start = [], 0
        for (c, h, w), last in zip(self.map_shapes(frame), self.channels_last):
            part = packed[start : start + c * h * w]
            maps.append(part.reshape(h, w, c).transpose(2, 0, 1) if last else part.reshape(c, h, w))
            start += c * h * w
        return maps


class FeatureCache:
    """The feature maps of views of images, in a folder of their own below ``root``.

    Any number of processes may write and read at once: an entry appears as a whole.

    Args:
        root: folder of all caches; created when it is written to.
        name: beginning of the folder's name, for people.
        settings: all that the maps depend on besides the images: plain containers.
        feature_format: how the maps are laid out.
        dataset: the images; of one of files, an entry whose files have changed since is computed anew.
        kinds: what the views are made from: "image", and tasks whose labels decide on the views.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        settings: Mapping[str, Any],
        feature_format: FeatureFormat,
        dataset: MultiTaskDataset,
        kinds: Sequence[str] = ("image",),
    ) -> None:
        self.format = feature_format
        self.settings = json.loads(json.dumps({**settings, "format": asdict(feature_format)}))
        self.root = root
        self.folder = root / f"{name}-{hash_settings(self.settings)}"
        self.dataset, self.kinds = dataset, tuple(kinds)
        self.arrays = ArrayCache(self.folder, create=False)

    def read(self, view: int, name: str) -> list[np.ndarray]:
        """Return the maps (C, h, w) of a view of the image ``name``; they may be read-only.

        Raises:
            UserError: there is no intact entry.
        """
        entry = self.arrays.find(f"view{view}", name, self._sources(name))
        if entry is None:
            raise UserError(
                f"the feature cache {self.folder} has no intact features of {name}; start again, which computes them"
            )
        return self.format.unpack(entry.array, entry.native_size)

    def contains(self, view: int, name: str) -> bool:
        """Return whether there is an entry that is intact and made from the files as they are now."""
        return self.arrays.find(f"view{view}", name, self._sources(name)) is not None

    def write(self, view: int, name: str, maps: Sequence[np.ndarray], frame: tuple[int, int]) -> None:
        """Write the maps (C, h, w) of a view of the image ``name``.

        Args:
            view: number of the view.
            name: id of the image.
            maps: the backbone's maps.
            frame: height and width of the padded image that the maps cover.

        Raises:
            UserError: a value is not finite in the cache's precision, or the disk refuses it.
        """
        shapes = [tuple(m.shape) for m in maps]
        if shapes != self.format.map_shapes(frame):
            raise ValueError(f"maps of shapes {shapes} for a frame of {frame}")
        packed = self.format.pack(maps)
        if not np.isfinite(packed).all():
            largest = max(float(np.abs(m).max()) for m in maps)
            raise UserError(
                f"the features of {name} are not finite in {self.format.precision} (largest value {largest:g}); "
                + ("keep them in fp32" if np.isfinite(largest) else "are the backbone's weights intact?")
            )
        self.arrays.put(f"view{view}", name, self._sources(name), CacheEntry(packed, frame))

    def create(self) -> None:
        """Create the folder and write down what the features depend on.

        Raises:
            UserError: the folder can't be created.
        """
        self.arrays.create_folder()
        if not (self.folder / SETTINGS_FILE).is_file():
            write_json(self.folder / SETTINGS_FILE, self.settings)

    def check_space(self, num_missing: int, frame: tuple[int, int]) -> None:
        """Refuse to fill the cache where the disk is too small.

        Args:
            num_missing: number of entries to be written.
            frame: height and width of a padded image.

        Raises:
            UserError: the disk has too little space.
        """
        needed = num_missing * self.format.num_bytes(frame)
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise UserError(
                f"the feature cache {self.folder} needs {format_bytes(needed)} more, but its disk has "
                f"{format_bytes(free)} left; use fewer views, fp16 or another folder"
            )

    def describe_others(self) -> str | None:
        """Name the caches of the same name and other settings beside this one, and in what the nearest differs."""
        differences = {}
        for path in sorted(self.root.glob(f"{self.folder.name.rpartition('-')[0]}-*/{SETTINGS_FILE}")):
            if path.parent != self.folder and (settings := _read_settings(path)) is not None:
                differences[path.parent] = find_differences(settings, self.settings)
        if not differences:
            return None
        nearest = min(differences, key=lambda path: len(differences[path]))
        return f"{nearest} was made with another {', '.join(differences[nearest]) or 'version'}"

    def _sources(self, name: str) -> list[Path]:
        """Return the files that a view of an image is made from, as far as the dataset names them."""
        if not isinstance(self.dataset, FileDataset):
            return []
        return [path for kind in self.kinds for path in self.dataset.source_files(kind, name) if path.is_file()]


def hash_settings(settings: Mapping[str, Any]) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of plain containers."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def find_differences(settings: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings in which two caches differ."""
    return [name for name in sorted({*settings, *others}) if settings.get(name) != others.get(name)]


def _read_settings(path: Path) -> dict[str, Any] | None:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def stack_maps(maps: Sequence[np.ndarray]) -> Tensor:
    """Stack one map (C, h, w) of several images to (B, C, h, w), in the memory format of the maps."""
    if len({m.shape for m in maps}) > 1:
        raise UserError("images of a batch have features of frames of different sizes; compute the features again")
    if maps[0].flags.c_contiguous:
        return torch.from_numpy(np.stack(maps))
    return torch.from_numpy(np.stack([m.transpose(1, 2, 0) for m in maps])).permute(0, 3, 1, 2)


def format_bytes(count: float) -> str:
    """Return a number of bytes for people: ``1.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
