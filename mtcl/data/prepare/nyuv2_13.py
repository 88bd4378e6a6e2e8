"""Conversion of NYU Depth v2's official files to the layout of MTAN's release: 288x384, 13 classes, numbered .npy.

MTAN's own preprocessing is lost (mtan's issue 10): it cropped the invalid border, shrank the frames, took the 13
classes of SceneNet's table (issue 11) and the normals of Eigen and Fergus. The crop, the filters and the normals here
are those of :mod:`mtcl.data.prepare.nyud`, so the result has the same layout and meaning, not the same numbers.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from mtcl.data.prepare import jobs, nyud
from mtcl.data.prepare.normals import estimate_normals
from mtcl.data.transforms import resize_nearest
from mtcl.data.worker_pool import run_jobs
from mtcl.errors import UserError
from mtcl.tasks.class_names import NYUD13_OF_NYUD40

SIZE = (288, 384)  # height, width
FOLDERS = ("image", "label", "depth", "normal")


class Item(NamedTuple):
    """One image of the result, and the frame (from 1) that it is made from."""

    subset: str
    number: int
    frame: int


@dataclass(frozen=True)
class Plan:
    """Source and destination of a conversion."""

    labeled: Path
    out: Path
    classes: np.ndarray  # int8, classes[label]: -1 is void


def prepare_nyuv2_13(labeled: Path, splits: Path, classes: Path, out: Path, workers: int = 4) -> jobs.Prepared:
    """Write the layout to ``out`` from the official .mat files.

    Image n of a list is its n-th frame by number, counted from 0; the release's own order is not known. Images whose
    files exist are kept. Image 0 of each list is written last: a folder without it is incomplete.

    Args:
        labeled: nyu_depth_v2_labeled.mat.
        splits: splits.mat.
        classes: classMapping40.mat.
        out: folder to write.
        workers: see :func:`mtcl.data.worker_pool.run_jobs`.

    Returns:
        A summary to print, and the config group and options that read the result.

    Raises:
        UserError: an official file is not what it should be, or ``out`` can't be written.
    """
    if workers < 0:
        raise UserError(f"--workers {workers} is not possible; give the number of processes, 0 for none besides this.")
    train, val = nyud.read_splits(splits, nyud.check_labeled(labeled))
    plan = Plan(labeled, out, map_labels(nyud.read_classes(classes)))
    items = [
        Item(subset, number, frame)
        for subset, frames in (("train", train), ("val", val))
        for number, frame in enumerate(frames)
    ]
    try:
        jobs.start_output(out, {"made": "nyuv2_13"} | nyud.describe_sources(labeled, splits, classes))
        missing = _missing_items(out, items)
        convert = functools.partial(_convert, plan)
        run_jobs(convert, [item for item in missing if item.number > 0], workers, "NYUv2")
        for item in missing:
            if item.number == 0:
                convert(item)
    except OSError as error:  # of the result: what can't be read is a UserError
        raise UserError(
            f"{out} can't be written ({error.strerror or error}); solve that, then repeat the command, which "
            "continues where it stopped."
        ) from error
    finally:
        nyud.close_labeled()
    official = "" if (len(train), len(val)) == nyud.OFFICIAL else " (official: {} and {})".format(*nyud.OFFICIAL)
    summary = (
        f"{out} has {len(train)} training and {len(val)} validation images{official} of {SIZE[1]}x{SIZE[0]} pixels, "
        "13 classes."
    )
    return jobs.Prepared(summary, "nyuv2_13", {"root": out})


def map_labels(classes: np.ndarray) -> np.ndarray:
    """Return the class, 0 to 12 and -1 for void, of every label as int8.

    Args:
        classes: uint8, the class of each label among the 40, 0 for void.
    """
    return np.array([-1, *(number - 1 for number in NYUD13_OF_NYUD40)], np.int8)[classes]


def convert_frame(frame: nyud.RawFrame, classes: np.ndarray) -> dict[str, np.ndarray]:
    """Return folder -> array of one frame.

    The image is shrunk by area averaging, everything else by nearest neighbour. Normals are planes fitted to the depth
    of the full frame, axes x left, y up, z to the viewer, the zero vector where unknown.

    Args:
        frame: the official frame.
        classes: int8, ``classes[label]`` is -1 (void) or 0 to 12.
    """

    def resize(array: np.ndarray) -> np.ndarray:
        return resize_nearest(nyud.WINDOW_4_TO_3.crop(array), SIZE)

    image = cv2.resize(nyud.WINDOW_4_TO_3.crop(frame.image), SIZE[::-1], interpolation=cv2.INTER_AREA)
    return {
        "image": image.astype(np.float32) / 255,
        "label": resize(classes[frame.labels]),
        "depth": resize(frame.depth).astype(np.float32)[..., None],
        "normal": np.ascontiguousarray(resize(estimate_normals(frame.depth))),
    }


def _convert(plan: Plan, item: Item) -> None:
    """Write the files of one image."""
    frame = nyud.read_frame(plan.labeled, item.frame)
    if (highest := int(frame.labels.max())) >= len(plan.classes):
        raise UserError(
            f"Frame {item.frame} of {plan.labeled} has the label {highest}, but mapClass has 1 to "
            f"{len(plan.classes) - 1}; give the classMapping40.mat of this release."
        )
    for folder, array in convert_frame(frame, plan.classes).items():
        jobs.write_array(plan.out / item.subset / folder / f"{item.number}.npy", array)


def _missing_items(out: Path, items: Sequence[Item]) -> list[Item]:
    """Return the images that lack a file."""
    existing = {
        (subset, folder): set(os.listdir(path)) if (path := out / subset / folder).is_dir() else set()
        for subset in ("train", "val")
        for folder in FOLDERS
    }
    return [item for item in items if any(f"{item.number}.npy" not in existing[item.subset, f] for f in FOLDERS)]
