"""Conversion of NYU Depth v2's official files to the standard ``NYUDv2`` layout, in full or small."""

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import h5py
import numpy as np

from mtcl.data import image_io as files
from mtcl.data.prepare import jobs
from mtcl.data.prepare.normals import encode_normals, estimate_normals
from mtcl.data.prepare.regions import close_seams, label_regions, region_edges
from mtcl.data.transforms import Window, resize_nearest
from mtcl.data.worker_pool import run_jobs
from mtcl.errors import UserError

OFFICIAL = (795, 654)  # frames to train on and to validate with
FRAME = (480, 640)  # height, width
NUM_CLASSES = 40
OTHERPROP = 40  # void in the small editions
PIXELS = {"images": (3,), "depths": (), "labels": (), "instances": ()}  # variable -> channels
TYPES = {"images": "uint8", "depths": "float", "labels": "uint", "instances": "uint"}  # how their types' names begin
OUTPUTS = {"images": ".png", "segmentation": ".png", "depth": ".npy", "normals": ".png", "edge": ".png"}


@dataclass(frozen=True)
class Edition:
    """The output of a frame: a window, resized to ``size`` (height, width), and the classes 1 to ``num_classes``."""

    window: Window
    size: tuple[int, int]
    num_classes: int

    def __str__(self) -> str:
        return f"{self.size[1]}x{self.size[0]}"


# Gupta et al.'s valid part of a frame, MATLAB's I(46:470, 41:600), the standard crop.
FULL_EDITION = Edition(Window(45, 40, 425, 560), (425, 560), NUM_CLASSES)
WINDOW_4_TO_3 = Window(47, 41, 420, 560)  # one column further right than WHOLE, within the toolbox's valid part


class RawFrame(NamedTuple):
    """One frame of nyu_depth_v2_labeled.mat."""

    image: np.ndarray  # uint8 RGB (H, W, 3)
    depth: np.ndarray  # float32 (H, W), metres
    labels: np.ndarray  # uint16 (H, W), 0: unlabelled
    instances: np.ndarray  # uint8 (H, W), counts the objects of one label


@dataclass(frozen=True)
class Plan:
    """Source, destination and edition of a conversion."""

    labeled: Path
    out: Path
    classes: np.ndarray  # uint8, classes[label]: 0 is void
    edition: Edition


def parse_edition(size: str) -> Edition:
    """Return the edition for ``size``, "WIDTHxHEIGHT": 4:3 (to a pixel) and no larger than its window."""
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if match is None:
        raise UserError(f"--size {size} is not a size; give WIDTHxHEIGHT in pixels, e.g. 256x192.")
    width, height = int(match[1]), int(match[2])
    largest = WINDOW_4_TO_3
    if abs(3 * width - 4 * height) > 3 or not (0 < width <= largest.width and 0 < height <= largest.height):
        raise UserError(
            f"--size {size} is not possible; give a width and a height of 4:3, up to {largest.width}x{largest.height}, "
            "e.g. 256x192."
        )
    return Edition(WINDOW_4_TO_3, (height, width), OTHERPROP - 1)


def prepare_nyud(
    labeled: Path, splits: Path, classes: Path, out: Path, size: str | None = None, workers: int = 4
) -> jobs.Prepared:
    """Write the layout to ``out`` from the official .mat files.

    Frames whose files exist are kept; the lists are written last.

    Args:
        labeled: nyu_depth_v2_labeled.mat.
        splits: splits.mat.
        classes: classMapping40.mat.
        out: folder to write.
        size: None for the standard 425x560 pixels and 40 classes, or a size for :func:`parse_edition`.
        workers: see :func:`mtcl.data.worker_pool.run_jobs`.

    Returns:
        A summary to print, and the config group and options that read the result.
    """
    if workers < 0:
        raise UserError(f"--workers {workers} is not possible; give the number of processes, 0 for none besides this.")
    edition = FULL_EDITION if size is None else parse_edition(size)
    train, val = read_splits(splits, check_labeled(labeled))
    plan = Plan(labeled, out, read_classes(classes), edition)
    try:
        jobs.start_output(out, {"made": "NYUDv2", "size": str(edition)} | describe_sources(labeled, splits, classes))
        run_jobs(functools.partial(_convert, plan), _missing_frames(out, sorted(train + val)), workers, "NYUD-v2")
        _write_lists(out, train, val)
    except OSError as error:  # of the result: what can't be read is a UserError
        raise UserError(
            f"{out} can't be written ({error.strerror or error}); solve that, then repeat the command, which "
            "continues where it stopped."
        ) from error
    finally:
        close_labeled()
    return _summarize(out, edition, len(train), len(val))


def check_labeled(path: Path) -> int:
    """Return the number of frames of nyu_depth_v2_labeled.mat after a check of its variables' shapes and types."""
    with _open(path) as file:
        if lacks := [name for name in PIXELS if name not in file]:
            raise UserError(
                f"{path} has no variable {lacks[0]}; give the official nyu_depth_v2_labeled.mat, --labeled."
            )
        for name in PIXELS:
            files.read_dataset(file, name, path, max_bytes=2**40)
        count = int(file["images"].shape[0]) if file["images"].ndim else 0
        for name, channels in PIXELS.items():
            expected = (count, *channels, *FRAME[::-1])  # MATLAB stores columns first
            if file[name].shape != expected or not file[name].dtype.name.startswith(TYPES[name]):
                raise UserError(
                    f"{name} in {path} is {file[name].dtype} {file[name].shape}, not {TYPES[name]} {expected} as HDF5 "
                    "sees the official file; download nyu_depth_v2_labeled.mat again."
                )
    return count


def read_splits(path: Path, count: int) -> tuple[list[int], list[int]]:
    """Return the sorted frame numbers, from 1 to ``count``, of the training and the test list of splits.mat."""
    train, test = (sorted(_whole_numbers(path, key).tolist()) for key in ("trainNdxs", "testNdxs"))
    numbers = train + test
    if not train or not test or len(set(numbers)) < len(numbers):
        raise UserError(f"{path} does not split the frames: a list is empty or a frame is listed twice; get it again.")
    if min(numbers) < 1 or max(numbers) > count:
        raise UserError(
            f"{path} lists frames {min(numbers)} to {max(numbers)}, but the labelled file has 1 to {count}; give the "
            "two files of one release."
        )
    return train, test


def read_classes(path: Path) -> np.ndarray:
    """Return the class, 1 to 40, of every label as uint8 from classMapping40.mat; label 0, void, is class 0."""
    classes = _whole_numbers(path, "mapClass")
    if not classes.size or classes.min() < 1 or classes.max() > NUM_CLASSES:
        raise UserError(f"mapClass in {path} is not classes from 1 to {NUM_CLASSES}; give the one of 40 classes.")
    return np.concatenate([[0], classes]).astype(np.uint8)


def read_frame(path: Path, number: int) -> RawFrame:
    """Return frame ``number`` (from 1) of the labelled file, rows first."""
    file = _open_cached(path)
    try:
        return RawFrame(*(np.ascontiguousarray(file[name][number - 1].T) for name in PIXELS))
    except OSError as error:
        raise UserError(f"{path} is damaged at frame {number} ({error}); download it again.") from error


def close_labeled() -> None:
    """Close the labelled file that :func:`read_frame` keeps open in this process."""
    _open_cached.cache_clear()


def convert_frame(frame: RawFrame, classes: np.ndarray, edition: Edition) -> dict[str, np.ndarray]:
    """Return output folder -> array of one frame.

    Normals and regions are computed on the full frame, edges after the resizing, so that they stay one pixel thin.
    """

    def resize(array: np.ndarray) -> np.ndarray:
        return resize_nearest(edition.window.crop(array), edition.size)

    classes = np.where(classes > edition.num_classes, 0, classes).astype(np.uint8)
    regions = close_seams(label_regions(frame.labels, frame.instances))
    image = edition.window.crop(frame.image)
    return {
        "images": cv2.resize(image, edition.size[::-1], interpolation=cv2.INTER_AREA),
        "segmentation": resize(classes[frame.labels]),
        "depth": resize(frame.depth),
        "normals": resize(encode_normals(estimate_normals(frame.depth))),
        "edge": region_edges(resize(regions)),
    }


def _convert(plan: Plan, number: int) -> None:
    """Write the files of one frame."""
    frame = read_frame(plan.labeled, number)
    if (highest := int(frame.labels.max())) >= len(plan.classes):
        raise UserError(
            f"Frame {number} of {plan.labeled} has the label {highest}, but mapClass has 1 to "
            f"{len(plan.classes) - 1}; give the classMapping40.mat of this release."
        )
    for folder, array in convert_frame(frame, plan.classes, plan.edition).items():
        path = plan.out / folder / _file_name(folder, number)
        if path.suffix == ".npy":
            jobs.write_array(path, array)
        else:
            jobs.write_image(path, array)


def _open(path: Path) -> h5py.File:
    """Open the labelled file."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; give nyu_depth_v2_labeled.mat, --labeled.")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(
            f"{path} is not a complete file of MATLAB's format 7.3 ({error}); give the official "
            "nyu_depth_v2_labeled.mat (2.8 GB), --labeled."
        ) from error


_open_cached = functools.lru_cache(maxsize=1)(_open)  # one per process: a frame is quick to read, the file slow to open


def _whole_numbers(path: Path, key: str) -> np.ndarray:
    """Read a variable of integers as int64 (N,)."""
    array = files.read_mat(path, key).ravel()
    if array.dtype.kind not in "uif" or (array != np.rint(array)).any():
        raise UserError(f"{key} in {path} is not a list of whole numbers; download the file again.")
    return array.astype(np.int64)


def describe_sources(labeled: Path, splits: Path, classes: Path) -> dict[str, list[str | int]]:
    """Return name and size of each source file, for the stamp."""
    paths = {"labeled": labeled, "splits": splits, "classes": classes}
    return {key: [path.name, path.stat().st_size] for key, path in paths.items()}


def _id(number: int) -> str:
    """Return the id of a frame."""
    return f"{number:04d}"


def _file_name(folder: str, number: int) -> str:
    """Return the file name of a frame in an output folder."""
    return f"{_id(number)}{OUTPUTS[folder]}"


def _missing_frames(out: Path, numbers: Sequence[int]) -> list[int]:
    """Return the frames that lack a file."""
    existing = {folder: set(os.listdir(out / folder)) if (out / folder).is_dir() else set() for folder in OUTPUTS}
    return [n for n in numbers if any(_file_name(folder, n) not in existing[folder] for folder in OUTPUTS)]


def _write_lists(out: Path, train: Sequence[int], val: Sequence[int]) -> None:
    """Write the lists; the training list, which completes the result, comes last."""
    ids = [_id(number) for number in train]
    tune_train, tune_val = jobs.split_tuning_ids(ids)
    lists = {"tune_train": tune_train, "tune_val": tune_val, "val": [_id(number) for number in val], "train": ids}
    for name, lines in lists.items():
        jobs.write_lines(out / "gt_sets" / f"{name}.txt", lines)


def _summarize(out: Path, edition: Edition, train: int, val: int) -> jobs.Prepared:
    """Describe what ``out`` holds."""
    official = "" if (train, val) == OFFICIAL else f" (official: {OFFICIAL[0]} and {OFFICIAL[1]})"
    config = "nyud" if edition == FULL_EDITION else "nyud_small"
    height, width = edition.size
    size = {} if edition in (FULL_EDITION, parse_edition("256x192")) else {"size": f"[{height},{width}]"}
    summary = (
        f"{out} has {train} training and {val} validation frames{official} of {edition} pixels, "
        f"{edition.num_classes} classes."
    )
    return jobs.Prepared(summary, config, {"root": out, **size})
