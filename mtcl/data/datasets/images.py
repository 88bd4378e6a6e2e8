"""A folder of images without labels, for distillation."""

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mtcl.data.image_io import file_error, read_image
from mtcl.data.sample import Sample
from mtcl.errors import ParameterError, UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})  # and in capitals; what image_io reads


class Images:
    """The images of a folder and of all its subfolders, some of them held out for validation.

    The files are sorted by their path; of these ``num_val``, evenly spaced, are the validation list, and all others the
    training list. Files whose names begin with a dot, and of other endings than .jpg, .jpeg and .png, are ignored.

    Args:
        subset: "train" or "val".
        tasks: must be empty: there are no labels.
        root: the folder.
        size: height and width of validation images: scaled so that they cover it, and cut in the middle.
        split: "standard", the only one.
        limit: use only the first N images of the list.
        num_val: number of images that are held out.

    Raises:
        UserError: the folder can't be read or has too few images.
    """

    def __init__(
        self,
        subset: str,
        tasks: Sequence[str],
        root: str | Path,
        size: Sequence[int],
        split: str = "standard",
        limit: int | None = None,
        num_val: int = 256,
    ) -> None:
        if tasks:
            raise UserError(f"a folder of images has no labels of {', '.join(tasks)}")
        if split != "standard":
            raise ParameterError("split", f"={split} does not exist: a folder of images has one split, standard")
        self.root, self.subset, self.size = Path(root), subset, (size[0], size[1])
        paths = list_images(self.root)
        if len(paths) < 2 or num_val >= len(paths):
            raise ParameterError(
                "num_val",
                f"={num_val} leaves nothing to train on: {self.root} has {len(paths)} images (.jpg, .jpeg, .png); give "
                "another folder, or hold out fewer",
            )
        held_out = {index * len(paths) // num_val for index in range(num_val)}
        chosen = [path for index, path in enumerate(paths) if (index in held_out) == (subset == "val")]
        self.ids = chosen[:limit]

    @classmethod
    def task_options(cls, **options: Any) -> Mapping[str, Mapping[str, Any]]:
        """Return nothing: there are no labels."""
        del options
        return {}

    def read(self, index: int, tasks: Collection[str] | None = None) -> Sample:  # noqa: ARG002
        """Return an image, without labels.

        Args:
            index: position in ``ids``.
            tasks: ignored.

        Raises:
            UserError: the file can't be read.
        """
        name = self.ids[index]
        image = read_image(self.root / name)
        return Sample(name, cover(image, self.size) if self.subset == "val" else image, {})

    def summary(self) -> str:
        """Return the folder and the number of images in one line."""
        return f"images without labels in {self.root}: {len(self.ids)} for {self.subset}"

    def fingerprint(self) -> str:
        """Return the first 16 hexadecimal digits of a SHA-256 of the paths, and of the sizes of three of the files."""
        probes = (self.ids[0], self.ids[len(self.ids) // 2], self.ids[-1])
        sizes = [path.stat().st_size if (path := self.root / name).is_file() else -1 for name in probes]
        return hashlib.sha256(repr((list(self.ids), self.size, sizes)).encode()).hexdigest()[:16]


def list_images(root: Path) -> list[str]:
    """Return the paths of the images below a folder, relative to it and with forward slashes, sorted.

    Raises:
        UserError: the folder does not exist or can't be read.
    """
    if not root.is_dir():
        raise ParameterError("root", f"={root} is not a folder; give the folder of the images")

    def stop(error: OSError) -> None:
        raise file_error(Path(str(error.filename)), error)

    paths: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=stop, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path.relative_to(root).as_posix() for path in paths if path.suffix.lower() in SUFFIXES)


def cover(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale an image uint8 (H, W, 3) so that it covers ``size`` (height, width), and cut out its middle."""
    height, width = image.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    scaled = (max(round(height * scale), size[0]), max(round(width * scale), size[1]))
    if scaled != (height, width):
        image = cv2.resize(image, scaled[::-1], interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    row, column = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return np.ascontiguousarray(image[row : row + size[0], column : column + size[1]])
