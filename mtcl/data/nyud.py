"""NYUD-v2 in the field's ``NYUDv2`` archive: reading its files, checking them, and nothing random."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from mtcl.data.sample import Sample
from mtcl.data.transforms import nearest
from mtcl.errors import UserError
from mtcl.tasks import NYUD40

LAYOUT = (
    "images/<id>.png, segmentation/<id>.png, depth/<id>.npy, normals/<id>.png, edge/<id>.png and "
    "gt_sets/train.txt, gt_sets/val.txt"
)
IMAGES = ("images", ".png")
FILES = {  # task -> folder and suffix
    "semseg": ("segmentation", ".png"),
    "depth": ("depth", ".npy"),
    "normals": ("normals", ".png"),
    "edge": ("edge", ".png"),
}
SHORTEST_NORMAL = 0.5  # 8-bit files never decode to exactly zero; a shorter vector is no direction
_NORMAL_LEVELS = (2.0 * np.arange(256) / 255.0 - 1.0).astype(np.float32)


class NYUD:
    """The training or the validation list of NYUD-v2, or of anything in its layout.

    ``root`` is the ``NYUDv2`` folder or the folder that holds it. ``split="standard"`` reads
    ``gt_sets/train.txt`` and ``val.txt``, another name ``X`` reads ``X_train.txt`` and ``X_val.txt``; only
    the list of ``part`` is opened, and only the folders of the ``tasks`` in use have to exist. ``resize`` is
    (height, width) in pixels; ``limit`` keeps the first so many ids of the list.
    """

    def __init__(
        self,
        root: str | Path,
        part: Literal["train", "val"],
        tasks: Sequence[str],
        split: str = "standard",
        num_classes: int = 40,
        resize: tuple[int, int] | None = None,
        limit: int | None = None,
    ) -> None:
        if unknown := [name for name in tasks if name not in FILES]:
            raise UserError(f"NYUD-v2 has no labels for {unknown}; choose tasks among {list(FILES)}.")
        if part not in ("train", "val"):
            raise UserError(f"part={part!r} is not a part of NYUD-v2; choose 'train' or 'val'.")
        if resize is not None and min(resize) < 1:
            raise UserError(f"resize={tuple(resize)} leaves no pixels; give (height, width), each at least 1.")
        if limit is not None and limit < 1:
            raise UserError(f"limit={limit} leaves no picture; give at least 1, or None for all.")
        _check_classes(num_classes)
        self.root = _find_root(Path(root))
        self.tasks = tuple(tasks)
        self.num_classes = num_classes
        self.resize = None if resize is None else (int(resize[0]), int(resize[1]))
        self.ids: Sequence[str] = _read_list(self.root, part, split)[:limit]
        self._check_files()

    @classmethod
    def offered(cls, num_classes: int = 40, **options: Any) -> Mapping[str, Mapping[str, Any]]:
        """Task name -> options for ``mtcl.tasks.build_task``; other options of a reader change nothing."""
        _check_classes(num_classes)
        return {"semseg": {"class_names": NYUD40[:num_classes]}, "depth": {}, "normals": {}, "edge": {}}

    def read(self, index: int) -> Sample:
        """The picture and its labels in the NumPy layout of :class:`mtcl.tasks.base.Task`."""
        name = self.ids[index]
        image = read_image(self._path(IMAGES, name))
        labels = {}
        for task in self.tasks:
            path = self._path(FILES[task], name)
            label = self._read_label(task, path)
            if label.shape[:2] != image.shape[:2]:
                raise UserError(
                    f"{path} is {_size(label)} pixels (height x width), but its picture is {_size(image)}; "
                    "both must have one size."
                )
            labels[task] = label
        if self.resize is not None and self.resize != image.shape[:2]:
            image = resized_image(image, self.resize)
            labels = {
                task: resized_edges(label, self.resize) if task == "edge" else nearest(label, self.resize)
                for task, label in labels.items()
            }
        return Sample(name, image, labels)

    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of a SHA-256 that tells the list and its files, without reading them.

        It covers the ids, ``num_classes``, ``resize``, and the sizes in bytes of the first, middle and last
        id's files of every task, in use or not (-1 where absent), so that runs on different tasks agree.
        """
        probes = (self.ids[0], self.ids[len(self.ids) // 2], self.ids[-1])
        paths = [self._path(kind, name) for kind in (IMAGES, *FILES.values()) for name in probes]
        sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
        known = repr((self.ids, self.num_classes, self.resize, sizes))
        return hashlib.sha256(known.encode()).hexdigest()[:16]

    def _path(self, kind: tuple[str, str], name: str) -> Path:
        folder, suffix = kind
        return self.root / folder / f"{name}{suffix}"

    def _check_files(self) -> None:
        missing = []
        for folder, suffix in (IMAGES, *(FILES[task] for task in self.tasks)):
            there = {entry.name for entry in _entries(self.root / folder)}
            missing += [f"{folder}/{name}{suffix}" for name in self.ids if f"{name}{suffix}" not in there]
        if missing:
            raise UserError(
                f"{self.root} lacks {len(missing)} files of the tasks used, first {', '.join(missing[:3])}; "
                f"unpack the whole archive there (expected: {LAYOUT})."
            )

    def _read_label(self, task: str, path: Path) -> np.ndarray:
        match task:
            case "semseg":
                return read_classes(path, self.num_classes)
            case "depth":
                return read_depth(path)
            case "normals":
                return read_normals(path)
            case _:
                return read_edges(path)


def read_image(path: Path) -> np.ndarray:
    """A picture as uint8 RGB (H, W, 3)."""
    return cv2.cvtColor(_decode(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def read_classes(path: Path, num_classes: int) -> np.ndarray:
    """Classes as uint8 (H, W): file value 0 is void (255), v is class v - 1."""
    values = _decode_8_bit(path, channels=1)
    if (highest := int(values.max())) > num_classes:
        raise UserError(
            f"{path} holds the class id {highest}, but num_classes={num_classes} allows 0 to {num_classes}; "
            "raise num_classes or mend the file."
        )
    return values - np.uint8(1)  # wraps 0 around to 255


def read_depth(path: Path) -> np.ndarray:
    """Depth as float32 (H, W) in metres; 0 where the file has no finite positive value."""
    try:
        depth = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a readable .npy file ({error}); unpack it again.") from error
    if not isinstance(depth, np.ndarray) or depth.ndim != 2 or depth.dtype.kind != "f":
        raise UserError(
            f"{path} holds {_form(depth)}, but depth is one floating-point array (height, width) in metres."
        )
    return np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)


def read_normals(path: Path) -> np.ndarray:
    """Unit normals as float32 (H, W, 3), decoded by n = 2v/255 - 1; zero where that is no direction."""
    normals = _NORMAL_LEVELS[cv2.cvtColor(_decode_8_bit(path, channels=3), cv2.COLOR_BGR2RGB)]
    length = np.sqrt(np.einsum("hwc,hwc->hw", normals, normals))
    scale = np.where(length < SHORTEST_NORMAL, 0, 1 / length)  # no length is 0: see SHORTEST_NORMAL
    return normals * scale[..., None]


def read_edges(path: Path) -> np.ndarray:
    """Edges as uint8 (H, W) in {0, 1}: 1 where the 8-bit file is above 127."""
    return (_decode_8_bit(path, channels=1) > 127).astype(np.uint8)


def resized_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture at ``size`` (height, width): mean over the covered area, bilinear where both sides grow."""
    grows = size[0] >= image.shape[0] and size[1] >= image.shape[1]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR if grows else cv2.INTER_AREA)


def resized_edges(edges: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Edges (H, W) at ``size``: 1 where a pixel covers any edge, so that thin lines survive."""
    return _cell_maximum(_cell_maximum(edges, size[0], axis=0), size[1], axis=1)


def _cell_maximum(array: np.ndarray, count: int, axis: int) -> np.ndarray:
    """Maximum over each of ``count`` equal cells of an axis; a pixel partly in a cell belongs to it."""
    length = array.shape[axis]
    cells = np.arange(count)
    bounds = np.stack([cells * length // count, -((cells + 1) * -length // count)], axis=1).ravel()
    bounds = np.minimum(bounds, length)
    padded = np.concatenate([array, np.take(array, [-1], axis)], axis)  # an index of reduceat must lie inside
    return np.take(np.maximum.reduceat(padded, bounds, axis), 2 * cells, axis)


def _find_root(given: Path) -> Path:
    root = given / "NYUDv2" if (given / "NYUDv2").is_dir() else given
    if not _entries(root):
        state = "is empty" if root.is_dir() else "is not a folder"
        raise UserError(f"{root} {state}; give the folder that holds NYUD-v2, data.root=PATH (expected: {LAYOUT}).")
    if not (root / "gt_sets").is_dir():
        raise UserError(
            f"{root} has no folder gt_sets; give the folder that holds NYUD-v2, data.root=PATH (expected: {LAYOUT})."
        )
    return root


def _read_list(root: Path, part: str, split: str) -> list[str]:
    """The ids of one list; the other parts and splits stay closed."""
    path = root / "gt_sets" / (f"{part}.txt" if split == "standard" else f"{split}_{part}.txt")
    if not path.is_file():
        stems = sorted(entry.stem for entry in _entries(path.parent) if entry.suffix == ".txt")
        there = [stem.removesuffix(f"_{part}") for stem in stems if stem.endswith(f"_{part}")]
        there = ["standard"] * (part in stems) + there
        raise UserError(f"split={split!r} needs {path}, which is missing; the splits there are {there}.")
    ids = path.read_text().split()
    if not ids:
        raise UserError(f"{path} lists no picture; it must hold one id per line.")
    return ids


def _check_classes(num_classes: int) -> None:
    if not 1 <= num_classes <= len(NYUD40):
        raise UserError(f"num_classes={num_classes} is not possible; NYUD-v2 has 1 to {len(NYUD40)} classes.")


def _decode(path: Path, flag: int) -> np.ndarray:
    pixels = cv2.imread(str(path), flag)
    if pixels is None:
        raise UserError(f"{path} is not a readable picture (truncated or damaged); unpack it again.")
    return pixels


def _decode_8_bit(path: Path, channels: Literal[1, 3]) -> np.ndarray:
    pixels = _decode(path, cv2.IMREAD_UNCHANGED)
    if pixels.dtype != np.uint8 or pixels.shape[2:] != ((3,) if channels == 3 else ()):
        raise UserError(f"{path} holds {_form(pixels)}, but this label is an 8-bit file of {channels} channel(s).")
    return pixels


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _form(array: Any) -> str:
    return f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"
