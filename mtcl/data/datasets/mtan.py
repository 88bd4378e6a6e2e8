"""Datasets in the layout of MTAN's preprocessed releases, which LibMTL and many balancing papers train on.

An image is four files of one number: ``ROOT/{train,val}/image/<n>.npy``, ``label/<n>.npy``, ``depth/<n>.npy`` and, of
NYUv2, ``normal/<n>.npy``, with n = 0, 1, ...; there are no lists. Facts: mtan/im2im_pred/create_dataset.py,
LibMTL/examples/{nyu,cityscapes}/create_dataset.py (names, shapes, void), mtan's issues 15, 25 and 41 (inverse depth).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from mtcl.data import image_io as files
from mtcl.data.datasets.base import IMAGE, FileDataset, list_folder
from mtcl.errors import ParameterError, UserError
from mtcl.tasks.class_names import CITYSCAPES7, CITYSCAPES19
from mtcl.tasks.class_names import NYUD13 as NYUD13_NAMES

SUBSETS = ("train", "val")
VOID_LABEL = -1
RANGE_TOLERANCE = 1e-3
TUNE_BLOCK, TUNE_TRAIN = 80, 64  # of each so many training images in a row, so many remain for training by split=tune


class NumberedArrays(FileDataset):
    """The training or the validation images of a folder in MTAN's layout.

    An image's id is ``<folder>_<n>``, such as ``train_0``, so that the ids of both lists differ. Images are stored as
    fractions 0..1 and read as 8 bits, rounded; classes are stored from 0 with -1 for void.

    Args:
        root: the folder that holds train and val, or the folder that holds it under one of ``roots``.
        subset: "train" or "val".
        tasks: names of the tasks in use.
        split: "standard": train and val; "tune": parts of train, to choose settings (of each 80 images in a row, the
            last 16 are the validation list).
        num_classes: number of semseg classes.
        limit: keep the first so many images.
        cache: see :meth:`FileDataset.open_cache`.
        memory_map: see :meth:`FileDataset.open_cache`.

    Raises:
        UserError: what is on disk does not fit.
    """

    title: ClassVar[str]
    roots: ClassVar[tuple[str, ...]]
    folders: ClassVar[Mapping[str, str]]  # kind -> folder
    class_lists: ClassVar[Mapping[int, tuple[str, ...]]]  # num_classes -> names
    depth_unit: ClassVar[str] = "metres"

    def __init__(
        self,
        root: str | Path,
        subset: Literal["train", "val"],
        tasks: Sequence[str],
        split: str,
        num_classes: int,
        limit: int | None,
        cache: str | Path | None,
        memory_map: bool,
    ) -> None:
        if unknown := [name for name in tasks if name not in self.folders or name == IMAGE]:
            raise UserError(f"{self.title} has no labels for {unknown}; choose tasks among {list(self.folders)[1:]}.")
        if subset not in SUBSETS:
            raise UserError(f"subset={subset!r} is unknown; choose 'train' or 'val'.")
        if split not in ("standard", "tune"):
            raise ParameterError("split", f"={split} does not exist: {self.title} has standard and tune")
        if limit is not None and limit < 1:
            raise UserError(f"limit={limit} leaves no image; give at least 1, or None for all.")
        self.check_num_classes(num_classes)
        super().__init__()
        self.root, self.tasks, self.num_classes = self._find_root(Path(root)), tuple(tasks), num_classes
        self.subset = "train" if split == "tune" else subset  # the folder
        numbers = self._list_numbers()
        if split == "tune":
            numbers = [n for n in numbers if (n % TUNE_BLOCK < TUNE_TRAIN) == (subset == "train")]
            if not numbers:
                raise UserError(
                    f"{self.root / 'train'} has too few images for split=tune, whose validation list begins with "
                    f"image {TUNE_TRAIN}; use split=standard."
                )
        self.ids = [f"{self.subset}_{number}" for number in numbers[:limit]]
        self.check_files(self.describe_layout())
        self.open_cache(cache, memory_map)

    @classmethod
    def describe_layout(cls) -> str:
        """Return the expected files, for messages."""
        kinds = ",".join(cls.folders.values())
        return f"train/{{{kinds}}}/0.npy, 1.npy, ..., and the same in val"

    @classmethod
    def check_num_classes(cls, num_classes: int) -> None:
        """Raise ``ParameterError`` for a number of classes that the release does not have."""
        if num_classes not in cls.class_lists:
            choices = " or ".join(map(str, cls.class_lists))
            raise ParameterError("num_classes", f"={num_classes} is not possible; {cls.title} has {choices} classes")

    def summary(self) -> str:
        """Describe the files in one line for the log."""
        height, width = self.decode(IMAGE, self.ids[0]).shape[:2]
        kinds = ", ".join(self.source_files(kind, self.ids[0])[0].parent.name for kind in (IMAGE, *self.tasks))
        caching = "decoded at each access"
        if self.array_cache is not None and self.memory_map:
            caching = f"decoded once, kept in {self.array_cache.folder}"
        return f"{self.root}: {kinds} .npy, images {height}x{width}; {caching}"

    def source_files(self, kind: str, name: str) -> tuple[Path, ...]:
        """Return the single file of an array."""
        return (self.root / self.subset / self.folder(kind) / f"{name.removeprefix(f'{self.subset}_')}.npy",)

    def folder(self, kind: str) -> str:
        """Return the name of the folder of a kind of arrays."""
        return self.folders[kind]

    def decode_settings(self) -> Mapping[str, Any]:
        """Return the number of classes."""
        return {"num_classes": self.num_classes}

    def array_kinds(self) -> Sequence[str]:
        """Return "image" and the tasks."""
        return list(self.folders)

    def decode(self, kind: str, name: str) -> np.ndarray:
        """Return the array at the size of its file."""
        (path,) = self.source_files(kind, name)
        array = files.read_npy(path)
        match kind:
            case "image":
                return decode_fractions(array, path)
            case "semseg":
                return decode_numbered_classes(array, path, self.num_classes)
            case "depth":
                return files.validate_depth(_squeeze(array), path, self.depth_unit)
            case _:
                vectors = files.validate_normals(array, path)
                if np.abs(vectors).max() > 1 + RANGE_TOLERANCE:
                    raise UserError(
                        f"{path} holds components beyond -1..1, but normals are vectors of length 1 or 0; unpack it "
                        "again."
                    )
                return vectors

    def _find_root(self, folder: Path) -> Path:
        """Return the folder that holds train and val."""
        root = next((folder / name for name in self.roots if (folder / name / SUBSETS[0]).is_dir()), folder)
        advice = f"give the folder that holds {self.title} (expected: {self.describe_layout()})."
        if not list_folder(root):
            raise UserError(f"{root} {'is empty' if root.is_dir() else 'is not a folder'}; {advice}")
        if not any((root / subset).is_dir() for subset in SUBSETS):
            raise UserError(f"{root} has no folder train or val; {advice}")
        return root

    def _list_numbers(self) -> list[int]:
        """Return 0, 1, ... of the images; ``UserError`` if there are none or one is missing in between."""
        folder = self.root / self.subset / self.folders[IMAGE]
        numbers = list_numbers(folder)
        if not numbers:
            raise UserError(
                f"{folder} holds no image 0.npy, 1.npy, ...; give the folder that holds {self.title} (expected: "
                f"{self.describe_layout()})."
            )
        return numbers


def list_numbers(folder: Path) -> list[int]:
    """Return 0, 1, ... of the files 0.npy, 1.npy, ... of a folder; none if there are none.

    Raises:
        UserError: one is missing in between.
    """
    stems = {path.stem for path in list_folder(folder) if path.suffix == ".npy"}
    numbers = sorted(int(stem) for stem in stems if stem.isascii() and stem.isdecimal() and str(int(stem)) == stem)
    gap = next((number for number in range(len(numbers)) if numbers[number] != number), None)
    if gap is not None:
        raise UserError(f"{folder} lacks {gap}.npy, but has {numbers[-1]}.npy; unpack the full archive there.")
    return numbers


class NYUD13(NumberedArrays):
    """NYUv2 as MTAN released it: 288x384, 13 classes, depth in metres, normals; 795 and 654 images.

    Normals are used as they are stored: the zero vector is void, the axes are those of the release (only that the first
    one is horizontal is used, by flips), and interpolated vectors are shorter than 1 (``data.normals_valid=standard``).
    """

    title = "NYUv2 in MTAN's layout"
    roots = ("nyuv2", "nyuv2_13")
    folders: ClassVar[Mapping[str, str]] = {
        IMAGE: "image",
        "semseg": "label",
        "depth": "depth",
        "normals": "normal",
    }
    class_lists: ClassVar[Mapping[int, tuple[str, ...]]] = {len(NYUD13_NAMES): NYUD13_NAMES}

    def __init__(
        self,
        root: str | Path,
        subset: Literal["train", "val"],
        tasks: Sequence[str],
        split: str = "standard",
        limit: int | None = None,
        cache: str | Path | None = None,
        memory_map: bool = True,
    ) -> None:
        super().__init__(root, subset, tasks, split, len(NYUD13_NAMES), limit, cache, memory_map)

    @classmethod
    def task_options(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return task name -> options for ``mtcl.tasks.build_task``."""
        return {"semseg": {"class_names": NYUD13_NAMES}, "depth": {}, "normals": {}}


class CityscapesMTL(NumberedArrays):
    """Cityscapes as MTAN released it: 128x256, 7 or 19 classes and inverse depth; 2,975 and 500 images.

    The inverse depth is the official disparity, 16 bits, divided by 65,535 (mtan's issue 25: 0 to 0.4922, where the
    official files have 0 to 32,257); 0 is void. It is neither metres nor their inverse. Classes are in ``label_7`` and
    ``label_19``; where there is no folder of that name, in ``label``, as LibMTL reads them.
    """

    title = "Cityscapes in MTAN's layout"
    roots = ("cityscapes2", "cityscapes_mtl", "cityscapes")
    folders: ClassVar[Mapping[str, str]] = {IMAGE: "image", "semseg": "label", "depth": "depth"}
    class_lists: ClassVar[Mapping[int, tuple[str, ...]]] = {7: CITYSCAPES7, 19: CITYSCAPES19}
    depth_unit = "inverse depth"

    def __init__(
        self,
        root: str | Path,
        subset: Literal["train", "val"],
        tasks: Sequence[str],
        split: str = "standard",
        num_classes: int = 7,
        limit: int | None = None,
        cache: str | Path | None = None,
        memory_map: bool = True,
    ) -> None:
        super().__init__(root, subset, tasks, split, num_classes, limit, cache, memory_map)

    @classmethod
    def task_options(cls, num_classes: int = 7) -> Mapping[str, Mapping[str, Any]]:
        """Return task name -> options for ``mtcl.tasks.build_task``."""
        cls.check_num_classes(num_classes)
        return {"semseg": {"class_names": cls.class_lists[num_classes]}, "depth": {"inverse": True}}

    def folder(self, kind: str) -> str:
        """Return the name of the folder of a kind of arrays."""
        numbered = f"label_{self.num_classes}"
        if kind == "semseg" and (self.root / self.subset / numbered).is_dir():
            return numbered
        return self.folders[kind]


def decode_fractions(array: np.ndarray, path: Path) -> np.ndarray:
    """Return an image (H, W, 3) of fractions 0..1, or of 8 bits, as uint8.

    Raises:
        UserError: the array is of another form, or its values are beyond 0..1.
    """
    if (
        array.ndim != 3
        or array.shape[2] != 3
        or not array.size
        or (array.dtype.kind != "f" and array.dtype != np.uint8)
    ):
        raise UserError(
            f"{path} holds {files.describe_array(array)}, but an image is an array (height, width, 3) of fractions or "
            "of 8 bits; unpack it again."
        )
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # also for NaN
        raise UserError(
            f"{path} holds values from {low:g} to {high:g}, but an image is stored as fractions from 0 to 1."
        )
    return np.rint(255 * array.clip(0, 1)).astype(np.uint8)


def decode_numbered_classes(array: np.ndarray, path: Path, num_classes: int) -> np.ndarray:
    """Return classes -1 (void), 0 ... ``num_classes`` - 1 as uint8 (H, W), 255 where void.

    Raises:
        UserError: the array is of another form or holds another number.
    """
    array = _squeeze(array)
    if array.ndim != 2 or not array.size or array.dtype.kind not in "uif" or (array != np.floor(array)).any():
        raise UserError(
            f"{path} holds {files.describe_array(array)}, but classes are one array (height, width) of whole numbers."
        )
    low, high = float(array.min()), float(array.max())
    if not (low >= VOID_LABEL and high < num_classes):
        raise UserError(
            f"{path} holds the class {low if low < VOID_LABEL else high:g}, but {num_classes} classes are numbered "
            f"from 0 to {num_classes - 1}, with -1 for void; set num_classes to that of the folder, or unpack it again."
        )
    return np.where(array == VOID_LABEL, 255, array).astype(np.uint8)


def _squeeze(array: np.ndarray) -> np.ndarray:
    """Return (H, W) of an array (H, W, 1); others as they are."""
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
