"""The standard training augmentation: scale, crop, flip, colour; evaluation only finalizes the labels.

That of ATRC, InvPT, TaskPrompter and their successors (InvPT/utils/common_config.py:57-82, InvPT/data/transforms.py;
atrc/src/data/pl_data.py:31-46).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from mtcl.data.sample import Sample
from mtcl.errors import UserError
from mtcl.tasks.base import Task

CROP_RETRIES = 10


class Window(NamedTuple):
    """A rectangle of pixels."""

    row: int  # of its top left pixel
    column: int
    height: int
    width: int

    def crop(self, array: np.ndarray) -> np.ndarray:
        """Return the window's part of an array (H, W[, C])."""
        return array[self.row : self.row + self.height, self.column : self.column + self.width]


@dataclass(frozen=True)
class Augment:
    """A random view of a training sample, drawn only from the generator that is passed in.

    The result is at most ``size`` and smaller where the scaled image is; collating pads it.

    Args:
        size: crop (height, width).
        scale: range of the scale factor, uniform and continuous.
        flip: probability of a horizontal flip.
        photometric: distort brightness, contrast, saturation and hue.
        class_cap: largest share of non-void pixels that one semseg class of a crop should fill.

    Raises:
        UserError: a parameter is out of range.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)  # continuous, uniform
    flip: float = 0.5  # probability
    photometric: bool = True
    class_cap: float = 0.75  # share of non-void pixels that the largest semseg class of a crop should stay below

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise UserError(
                f"The crop size {tuple(self.size)} leaves no pixels; give (height, width), each at least 1."
            )
        if not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"scale={tuple(self.scale)} is no range; give (low, high) with 0 < low <= high.")
        if not 0 <= self.flip <= 1:
            raise UserError(f"flip={self.flip} is no probability; give a number from 0 to 1.")
        if not 0 < self.class_cap <= 1:
            raise UserError(f"class_cap={self.class_cap} is no share of pixels; give a number above 0 and up to 1.")

    def __call__(
        self, sample: Sample, tasks: Mapping[str, Task], rng: np.random.Generator, with_image: bool = True
    ) -> Sample:
        """Return a random view of ``sample`` with finalized labels.

        Args:
            sample: an image and its labels.
            tasks: name -> task, for all labels that are returned.
            rng: source of all that is random.
            with_image: False: the labels alone, which are the same; the image has the view's height and width, but no
                channels.
        """
        if not with_image:
            sample = sample._replace(image=sample.image[..., :0])
        factor = rng.uniform(*self.scale)
        height, width = sample.image.shape[:2]
        scaled_size = (max(1, round(height * factor)), max(1, round(width * factor)))
        window = self._window(sample, tasks, scaled_size, rng)
        sample = scale_and_crop(sample, tasks, factor, scaled_size, window)
        if rng.random() < self.flip:
            sample = flip(sample, tasks)
        if self.photometric and with_image:
            sample = sample._replace(image=distort_colors(sample.image, rng))
        return finalize_labels(sample, tasks)

    def _window(
        self,
        sample: Sample,
        tasks: Mapping[str, Task],
        scaled_size: tuple[int, int],
        rng: np.random.Generator,
    ) -> Window:
        """Sample a crop of the scaled image, again while one class fills most of it."""
        window = sample_window(scaled_size, self.size, rng)
        if "semseg" not in tasks or (window.height, window.width) == scaled_size:
            return window
        classes, void = sample.labels["semseg"], int(tasks["semseg"].void)
        if (classes == void).all():  # an image without this label
            return window
        for _ in range(CROP_RETRIES):
            if has_varied_classes(resize_nearest(classes, scaled_size, window), void, self.class_cap):
                break
            window = sample_window(scaled_size, self.size, rng)
        return window


@dataclass(frozen=True)
class ResizedCrop:
    """A random part of an image, resized to one size: the augmentation of a training on images without labels.

    Area and aspect ratio are drawn as by torchvision's ``RandomResizedCrop``: the area uniformly, the logarithm of the
    ratio uniformly, ten times at most, and else the largest part in the middle whose ratio is allowed.

    Args:
        size: height and width of the result.
        area: range of the part of the image's area.
        ratio: range of width / height of the part.
        flip: probability of a horizontal flip.

    Raises:
        UserError: a parameter is out of range.
    """

    size: tuple[int, int]
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        for name, (low, high) in (("area", self.area), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise UserError(f"{name}=({low}, {high}) is no range; give (low, high) with 0 < low <= high.")
        if self.area[1] > 1:
            raise UserError(f"area={tuple(self.area)} is more than the image has; give parts up to 1.")

    def __call__(
        self, sample: Sample, tasks: Mapping[str, Task], rng: np.random.Generator, with_image: bool = True
    ) -> Sample:
        """Return a random view of an image without labels; the arguments are those of :class:`Augment`."""
        del with_image
        assert not tasks, "labels would have to be resized, too"
        part = self.draw_window((sample.image.shape[0], sample.image.shape[1]), rng).crop(sample.image)
        shrinks = part.shape[0] > self.size[0] and part.shape[1] > self.size[1]
        image = cv2.resize(part, self.size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        return Sample(sample.id, cv2.flip(image, 1) if rng.random() < self.flip else image, {})

    def draw_window(self, inside: tuple[int, int], rng: np.random.Generator) -> Window:
        """Draw a part of an image of ``inside`` (height, width) pixels."""
        for _ in range(CROP_RETRIES):
            area = inside[0] * inside[1] * rng.uniform(*self.area)
            ratio = np.exp(rng.uniform(*np.log(self.ratio)))
            width, height = max(round((area * ratio) ** 0.5), 1), max(round((area / ratio) ** 0.5), 1)
            if width <= inside[1] and height <= inside[0]:
                return sample_window(inside, (height, width), rng)
        height, width = inside
        height = min(height, max(round(width / self.ratio[0]), 1))
        width = min(width, max(round(height * self.ratio[1]), 1))
        return Window((inside[0] - height) // 2, (inside[1] - width) // 2, height, width)


def finalize_labels(sample: Sample, tasks: Mapping[str, Task]) -> Sample:
    """Convert every label to the form its loss expects; the last step of training and the only one of evaluation."""
    return sample._replace(labels={name: task.finalize_label(sample.labels[name]) for name, task in tasks.items()})


def sample_window(inside: tuple[int, int], size: tuple[int, int], rng: np.random.Generator) -> Window:
    """Sample a uniformly random window of at most ``size`` (height, width) inside an image."""
    height, width = min(inside[0], size[0]), min(inside[1], size[1])
    row = int(rng.integers(inside[0] - height, endpoint=True))
    column = int(rng.integers(inside[1] - width, endpoint=True))
    return Window(row, column, height, width)


def has_varied_classes(classes: np.ndarray, void: int, cap: float) -> bool:
    """Return whether classes uint8 (H, W) hold more than one class and none fills ``cap`` of the non-void pixels."""
    counts = cv2.calcHist([classes], [0], None, [256], [0, 256]).ravel().astype(np.int64)  # faster than bincount
    counts[void] = 0
    return bool(np.count_nonzero(counts) > 1 and counts.max() < cap * counts.sum())


def scale_and_crop(
    sample: Sample, tasks: Mapping[str, Task], factor: float, scaled_size: tuple[int, int], window: Window
) -> Sample:
    """Return ``window`` of the sample scaled by ``factor`` to ``scaled_size``: image bilinear, labels nearest."""
    image = sample.image
    if image.shape[-1] == 0:
        image = np.empty((*scaled_size, 0), image.dtype)
    elif image.shape[:2] != scaled_size:
        image = cv2.resize(image, scaled_size[::-1], interpolation=cv2.INTER_LINEAR)
    labels = {name: resize_nearest(sample.labels[name], scaled_size, window) for name in tasks}
    if factor != 1:
        labels = {name: task.scale_label(labels[name], factor) for name, task in tasks.items()}
    return Sample(sample.id, window.crop(image), labels)


def resize_nearest(label: np.ndarray, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
    """Resample ``window`` (default: all) of a label (H, W[, C]) to ``size`` by the values at pixel centres.

    Equal to resampling the full label and cropping, but reads the window's pixels only.
    """
    window = window or Window(0, 0, *size)
    if label.shape[:2] == size:
        return window.crop(label)
    rows = _centres(label.shape[0], size[0])[window.row : window.row + window.height]
    columns = _centres(label.shape[1], size[1])[window.column : window.column + window.width]
    if label.ndim == 2:
        return label[rows][:, columns]
    planes = label.transpose(2, 0, 1)  # NumPy is slow on a last axis of three
    return np.stack([plane[rows][:, columns] for plane in planes]).transpose(1, 2, 0)


def _centres(length: int, count: int) -> np.ndarray:
    """Return which of ``length`` pixels holds the centre of each of ``count`` equal cells (exact: integers)."""
    return (2 * np.arange(count) + 1) * length // (2 * count)


def flip(sample: Sample, tasks: Mapping[str, Task]) -> Sample:
    """Mirror a sample left to right."""
    labels = {name: task.flip_label(sample.labels[name][:, ::-1]) for name, task in tasks.items()}
    image = sample.image[:, ::-1] if sample.image.shape[-1] == 0 else cv2.flip(sample.image, 1)
    return Sample(sample.id, image, labels)


def distort_colors(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Distort brightness (+-32), contrast and saturation (0.5 to 1.5) and hue (+-18 of 180), each with p = 0.5.

    Contrast comes before or after saturation and hue, also at random. uint8 RGB in and out. Every step makes
    a new level from an old one, so the usual float arithmetic is done on the 256 levels and looked up.
    """

    def coin() -> bool:
        """Return True with p = 0.5."""
        return rng.random() < 0.5

    brightness = _line(1.0, rng.uniform(-32, 32)) if coin() else _IDENTITY
    contrast = _line(rng.uniform(0.5, 1.5), 0.0) if coin() else _IDENTITY
    saturation = _line(rng.uniform(0.5, 1.5), 0.0) if coin() else _IDENTITY
    shift = int(rng.integers(-18, 18, endpoint=True)) if coin() else 0
    if coin():
        return _recolour(_look_up(image, contrast[brightness]), saturation, shift)
    return _look_up(_recolour(_look_up(image, brightness), saturation, shift), contrast)


def _line(gain: float, offset: float) -> np.ndarray:
    """Return the table of level -> gain * level + offset, clipped to 0..255 and truncated: uint8 (256,)."""
    return np.clip(np.arange(256, dtype=np.float32) * gain + offset, 0, 255).astype(np.uint8)


_IDENTITY = _line(1.0, 0.0)


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Map every level of an image by a table."""
    return image if table is _IDENTITY else cv2.LUT(image, table)


def _recolour(image: np.ndarray, saturation: np.ndarray, shift: int) -> np.ndarray:
    """Apply the table ``saturation`` in HSV and rotate the hue by ``shift`` (180: full circle); RGB in and out."""
    if saturation is _IDENTITY and shift == 0:
        return image
    hue = ((np.arange(256) + shift) % 180).astype(np.uint8)
    table = np.stack([hue, saturation, _IDENTITY], axis=1)[None]
    return cv2.cvtColor(cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table), cv2.COLOR_HSV2RGB)
