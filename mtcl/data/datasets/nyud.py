"""NYUD-v2 in every archive in circulation: which files there are, and what their numbers mean."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mtcl.data import image_io as files
from mtcl.data.datasets.base import IMAGE, FileDataset, find_dataset_root, list_folder, read_id_list
from mtcl.errors import UserError
from mtcl.tasks import NYUD40

LAYOUT = (
    "images/<id>.png or .jpg, segmentation/<id>.png or .mat, depth/<id>.npy or .mat, normals/<id>.png, .jpg or .npy, "
    "edge/<id>.png or .npy, and gt_sets/train.txt, gt_sets/val.txt"
)
ROOTS = ("NYUDv2", "NYUD_MT")  # the archives' own folders
FOLDERS = {  # kind -> folder, and its files' suffixes in the archives: NYUDv2, NYUD_MT of MTI-Net, NYUD_MT of ASTMT
    IMAGE: ("images", (".png", ".jpg")),
    "semseg": ("segmentation", (".png", ".mat")),
    "depth": ("depth", (".npy", ".mat")),
    "normals": ("normals", (".png", ".npy", ".jpg")),
    "edge": ("edge", (".png", ".npy")),
}


class NYUD(FileDataset):
    """The training or the validation list of NYUD-v2, or of anything in the layout of one of its archives.

    Only the list of ``subset`` is opened, and only the folders of the ``tasks`` in use have to exist. The kind of
    their files is seen from what is there.

    Args:
        root: the archive's folder or the folder that holds it.
        subset: "train" or "val".
        tasks: names of the tasks in use.
        split: "standard" for ``gt_sets/train.txt`` and ``val.txt``, X for ``X_train.txt`` and ``X_val.txt``.
        num_classes: number of semseg classes; the files' ids run from 1.
        resize: size (height, width) in pixels of images and labels; None keeps the files'.
        limit: keep the first so many ids of the list.
        cache: see :meth:`FileDataset.open_cache`.
        memory_map: see :meth:`FileDataset.open_cache`.
        missing_labels: whether files of labels may be missing, see :meth:`FileDataset.list_present_labels`.

    Raises:
        UserError: what is on disk does not fit.
    """

    def __init__(
        self,
        root: str | Path,
        subset: Literal["train", "val"],
        tasks: Sequence[str],
        split: str = "standard",
        num_classes: int = 40,
        resize: tuple[int, int] | None = None,
        limit: int | None = None,
        cache: str | Path | None = None,
        memory_map: bool = True,
        missing_labels: bool = False,
    ) -> None:
        if unknown := [name for name in tasks if name not in FOLDERS or name == IMAGE]:
            raise UserError(f"NYUD-v2 has no labels for {unknown}; choose tasks among {list(FOLDERS)[1:]}.")
        if resize is not None and min(resize) < 1:
            raise UserError(f"resize={tuple(resize)} leaves no pixels; give (height, width), each at least 1.")
        _check_classes(num_classes)
        super().__init__()
        self.root = find_dataset_root(Path(root), ROOTS, "gt_sets", "NYUD-v2", LAYOUT)
        self.tasks, self.missing_labels = tuple(tasks), missing_labels
        self.num_classes = num_classes
        self.resize = None if resize is None else (int(resize[0]), int(resize[1]))
        self.ids = read_id_list(self.root / "gt_sets", subset, split, limit)
        self.suffixes = {kind: self._suffix(kind) for kind in FOLDERS}
        self.check_files(LAYOUT)
        self.open_cache(cache, memory_map)

    @classmethod
    def task_options(cls, num_classes: int = 40, **_options: Any) -> Mapping[str, Mapping[str, Any]]:
        """Return task name -> options for ``mtcl.tasks.build_task``; other options of the dataset change nothing."""
        _check_classes(num_classes)
        return {"semseg": {"class_names": NYUD40[:num_classes]}, "depth": {}, "normals": {}, "edge": {}}

    def summary(self) -> str:
        """Describe the files in one line for the log."""
        height, width = self.decode(IMAGE, self.ids[0]).shape[:2]
        kinds = [f"{FOLDERS[kind][0]} {self.suffixes[kind]}" for kind in (IMAGE, *self.tasks)]
        caching = "decoded at each access"
        if self.array_cache is not None and self.memory_map:
            caching = f"decoded once, kept in {self.array_cache.folder}"
        return f"{self.root}: {', '.join(kinds)}, images {height}x{width}; {caching}"

    def source_files(self, kind: str, name: str) -> tuple[Path, ...]:
        """Return the single file of an array."""
        return (self.root / FOLDERS[kind][0] / f"{name}{self.suffixes[kind]}",)

    def decode_settings(self) -> Mapping[str, Any]:
        """Return the number of classes."""
        return {"num_classes": self.num_classes}

    def array_kinds(self) -> Sequence[str]:
        """Return "image" and the four tasks."""
        return list(FOLDERS)

    def decode(self, kind: str, name: str) -> np.ndarray:
        """Return the array at the size of its file."""
        (path,) = self.source_files(kind, name)
        match kind, path.suffix:
            case "image", _:
                return files.read_image(path)
            case "semseg", ".mat":
                return files.validate_classes(files.read_mat(path, "segmentation"), path, self.num_classes)
            case "semseg", _:
                return files.validate_classes(files.read_label_image(path), path, self.num_classes)
            case "depth", ".mat":
                return files.validate_depth(files.read_mat(path, "depth"), path)
            case "depth", _:
                return files.validate_depth(files.read_npy(path), path)
            case "normals", ".npy":
                return files.validate_normals(files.read_npy(path), path)
            case "normals", _:
                return files.read_color_label(path)
            case _, ".npy":
                return files.validate_edges(files.read_npy(path), path)
            case _:
                return files.validate_edges(files.read_label_image(path), path)

    def _suffix(self, kind: str) -> str:
        """Return, of the suffixes a folder may have, the one that covers most ids of the list."""
        folder, suffixes = FOLDERS[kind]
        names = {entry.name for entry in list_folder(self.root / folder)}
        return max(suffixes, key=lambda suffix: sum(f"{name}{suffix}" in names for name in self.ids))


def _check_classes(num_classes: int) -> None:
    """Raise ``UserError`` for an impossible number of classes."""
    if not 1 <= num_classes <= len(NYUD40):
        raise UserError(f"num_classes={num_classes} is not possible; NYUD-v2 has 1 to {len(NYUD40)} classes.")
