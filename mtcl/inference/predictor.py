"""Predict images of any size with a trained model."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mtcl.data import Sample, prepare_batch
from mtcl.data.loader import collate
from mtcl.errors import ParameterError, UserError
from mtcl.inference.image_reading import MAX_PIXELS, convert_array, convert_pil_image, load_image
from mtcl.models import DenseModel
from mtcl.runtime import autocast
from mtcl.tasks.base import Task

log = logging.getLogger(__name__)

Size = tuple[int, int]
ImageInput = str | Path | np.ndarray | Image.Image
MODES = ("resize", "sliding_window", "full")  # of predicting images larger than the training frame
RESIZE_THRESHOLD = 1.6  # times the area and the longer side of the training frame; smaller images are not changed
SIZE_MULTIPLE = 32  # sides of an image larger than the frame are rounded up to a multiple, as in an evaluation
MAX_STRIP_VALUES = 2**24  # numbers decoded at once


class Predictor:
    """Predict all tasks of an image: ``predictor(image) -> {task: array}``.

    Arrays have the height and width of the image:

    - semseg, human_parts, sal: uint8 (H, W), the class (sal: 1 is salient);
    - depth: float32 (H, W), in metres;
    - normals: float32 (H, W, 3), unit vectors, x to the left, y up, z to the viewer;
    - edge: float32 (H, W), the probability, 0..1.

    Depth is correct for images of about the size of the training frame, from cameras with the angle of view of the
    training data. In a larger image that is not resized, things look closer than they are, so depth is multiplied by
    the ratio of the sizes. Smaller images are not enlarged, as in an evaluation, and things look farther away.

    Args:
        model: a trained model.
        tasks: name -> task, those to predict.
        size: height and width of the training frame. An image of about that size or smaller is predicted as it is,
            exactly as in ``evaluate.py``.
        device: where to predict; the model is moved there.
        precision: ``auto``, ``bf16``, ``fp16`` or ``fp32``.
        mode: how to predict larger images. ``resize``: shrink them to the frame and enlarge the maps.
            ``sliding_window``: move a window of the frame's size over the image, with half overlap, and blend: finer
            but slower, and without context beyond the window. ``full``: as they are, if memory suffices.
        flip: whether to average with the prediction of the mirrored image.
        scales: average over the image resized by these factors, each from 0.1 to 4.
        max_pixels: larger images are refused.

    Raises:
        UserError: a parameter has a value that it cannot have.
    """

    def __init__(
        self,
        model: DenseModel,
        tasks: Mapping[str, Task],
        size: Size,
        device: torch.device,
        precision: str = "auto",
        mode: str = "resize",
        flip: bool = False,
        scales: Sequence[float] | float = (1.0,),
        max_pixels: int = MAX_PIXELS,
    ):
        if mode not in MODES:
            raise ParameterError("mode", f"={mode} is not known; choose {', '.join(MODES)}")
        scales = (scales,) if isinstance(scales, int | float) else scales
        if not scales or not all(0.1 <= scale <= 4 for scale in scales):
            raise ParameterError("scales", f"={list(scales)}: give factors from 0.1 to 4, such as 0.75,1,1.25")
        autocast(device, precision, "precision")  # raises now if it is not known
        self.model, self.tasks, self.size, self.device = model.eval().to(device), dict(tasks), size, device
        self.precision, self.mode, self.flip = precision, mode, flip
        self.scales, self.max_pixels = tuple(scales), max_pixels
        self.overflowed: set[str] = set()  # tasks with predictions that were not finite

    def __call__(self, image: ImageInput) -> dict[str, np.ndarray]:
        """Predict all tasks of an image.

        Args:
            image: the path of a file, a PIL image, or an array uint8 RGB (H, W, 3).

        Returns:
            task -> array of the image's height and width.

        Raises:
            UserError: the image can't be read, or has more than ``max_pixels``.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[ImageInput]) -> list[dict[str, np.ndarray]]:
        """Predict several images; consecutive images of equal size go through the model together.

        Args:
            images: as for a call with one image.

        Returns:
            task -> array, for each image.
        """
        arrays = [self.read_image(image) for image in images]
        predictions: list[dict[str, np.ndarray]] = []
        for group in _group_by_size(arrays):
            predictions += self._predict_group(group)
        return predictions

    def read_image(self, image: ImageInput) -> np.ndarray:
        """Read or convert an image to uint8 RGB (H, W, 3), upright."""
        if isinstance(image, str | Path):
            return load_image(Path(image), self.max_pixels)
        if isinstance(image, Image.Image):
            return convert_pil_image(image, self.max_pixels)
        if isinstance(image, np.ndarray):
            return convert_array(image, self.max_pixels)
        raise UserError(f"an image is the path of a file, a PIL image or a NumPy array, not {type(image).__name__}")

    @torch.inference_mode()
    def _predict_group(self, images: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Predict images of equal size."""
        height, width = size = (images[0].shape[0], images[0].shape[1])
        (short, long), frame = sorted(size), sorted(self.size)
        if height * width <= RESIZE_THRESHOLD * frame[0] * frame[1] and long <= RESIZE_THRESHOLD * frame[1]:
            return self._decode(self._predict_raw(images), size)
        factor = min(1.0, frame[0] / short, frame[1] / long)  # to the size of the training images
        if self.mode == "resize":
            return self._decode(self._predict_raw([_resize(x, factor) for x in images]), size)
        if self.mode == "full":
            return self._decode(self._predict_raw(images, 1 / factor), size)
        return self._predict_windows(images, 1 / factor)

    def _predict_raw(self, images: list[np.ndarray], magnification: float = 1.0) -> dict[str, Tensor]:
        """Predict images of equal size, averaged over scales and flips.

        Args:
            images: uint8 RGB (H, W, 3).
            magnification: how much larger things appear than in the training images.

        Returns:
            task -> raw predictions float32 (B, C, H, W).
        """
        sums: dict[str, Tensor] = {}
        size, count = images[0].shape[:2], len(self.scales) * (1 + self.flip)
        for scale in self.scales:
            scaled = [_resize(x, scale) for x in images] if scale != 1 else images
            for flipped in (False, True)[: 1 + self.flip]:
                views = [np.ascontiguousarray(x[:, ::-1]) for x in scaled] if flipped else scaled
                for name, raw in self._forward(views).items():
                    raw = self.tasks[name].unflip_prediction(raw) if flipped else raw
                    raw = self.tasks[name].unscale_prediction(raw, scale * magnification)
                    raw = self.tasks[name].to_averageable(raw) if count > 1 else raw
                    if raw.shape[-2:] != size:
                        raw = F.interpolate(raw, size, mode="bilinear", align_corners=False, antialias=scale > 1)
                    sums[name] = sums[name] + raw if name in sums else raw
        return {name: total / count for name, total in sums.items()}

    def _forward(self, images: list[np.ndarray]) -> dict[str, Tensor]:
        """Run the model on images of equal size, framed as in an evaluation: task -> (B, C, H, W)."""
        batch = collate([Sample(str(i), x, {}) for i, x in enumerate(images)], {}, self.size, SIZE_MULTIPLE)
        image, _ = prepare_batch(batch, self.model.mean, self.model.std, self.device)
        with autocast(self.device, self.precision):
            raw = self.model.predict(image)
        (y, x), (height, width) = batch["meta"][0].offset, batch["meta"][0].native_size
        maps = {name: raw[name][..., y : y + height, x : x + width].float() for name in self.tasks}
        self._warn_of_overflow(maps)
        return maps

    def _warn_of_overflow(self, maps: Mapping[str, Tensor]) -> None:
        """Warn once per task of predictions that are NaN or infinite, which files and panels would not show."""
        for name, raw in maps.items():
            if name not in self.overflowed and not bool(torch.isfinite(raw).all()):
                self.overflowed.add(name)
                log.warning(
                    "the model's prediction of %s has NaN or infinite pixels; do not use them (the weights may be "
                    "damaged; try precision=fp32)",
                    name,
                )

    def _decode(self, raw: dict[str, Tensor], size: Size) -> list[dict[str, np.ndarray]]:
        """Resize raw maps (B, C, h, w) to ``size`` and decode them, in strips to bound the memory of large images."""
        predictions: list[dict[str, np.ndarray]] = [{} for _ in next(iter(raw.values()))]
        for name, task in self.tasks.items():
            several = raw[name] if raw[name].shape[-2:] == size else task.to_averageable(raw[name])
            for maps, one in zip(predictions, several):
                strips = [task.decode(strip) for strip in _resize_in_strips(one, size)]
                maps[name] = np.concatenate(strips) if len(strips) > 1 else strips[0]
        return predictions

    def _predict_windows(self, images: list[np.ndarray], magnification: float) -> list[dict[str, np.ndarray]]:
        """Predict images of equal size window by window and blend the overlaps.

        Windows go row by row; rows of pixels that no later window reaches are decoded and freed. ``magnification``: see
        :meth:`_predict_raw`.
        """
        height, width = images[0].shape[:2]
        window = (min(self.size[0], height), min(self.size[1], width))
        y_starts, x_starts = _window_starts(height, window[0]), _window_starts(width, window[1])
        weight = _blending_weights(window, self.device)
        sums: dict[str, Tensor] = {}  # (B, C, window's height, W)
        weights = torch.zeros(window[0], width, device=self.device)
        strips: list[dict[str, list[np.ndarray]]] = [{name: [] for name in self.tasks} for _ in images]
        for y, next_y in zip(y_starts, [*y_starts[1:], height]):
            for x in x_starts:
                area = (..., slice(x, x + window[1]))
                views = [np.ascontiguousarray(image[y : y + window[0], x : x + window[1]]) for image in images]
                for name, prediction in self._predict_raw(views, magnification).items():
                    raw = self.tasks[name].to_averageable(prediction)
                    if name not in sums:
                        sums[name] = raw.new_zeros(*raw.shape[:3], width)
                    sums[name][area] += weight * raw
                weights[area] += weight
            num_rows = next_y - y  # that are complete
            for name, task in self.tasks.items():
                for parts, total in zip(strips, sums[name]):
                    parts[name].append(task.decode(total[:, :num_rows] / weights[:num_rows]))
                sums[name] = F.pad(sums[name][:, :, num_rows:], (0, 0, 0, num_rows))
            weights = F.pad(weights[num_rows:], (0, 0, 0, num_rows))
        return [{name: np.concatenate(rows) for name, rows in parts.items()} for parts in strips]


def _group_by_size(arrays: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Yield runs of consecutive images of equal size."""
    group: list[np.ndarray] = []
    for array in arrays:
        if group and array.shape != group[0].shape:
            yield group
            group = []
        group.append(array)
    if group:
        yield group


def _resize(image: np.ndarray, factor: float) -> np.ndarray:
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)


def _resize_in_strips(raw: Tensor, size: Size) -> Iterator[Tensor]:
    """Yield strips (C, rows, W) of a map (C, h, w) resized to ``size``, bilinear, corners not aligned."""
    height, width = size
    rows = max(1, MAX_STRIP_VALUES // (len(raw) * width))
    if raw.shape[1:] == size:
        yield from raw.split(rows, dim=1)
        return
    position = (torch.arange(height, dtype=torch.float64) + 0.5) * (raw.shape[1] / height) - 0.5
    position = position.clamp(0, raw.shape[1] - 1)
    low = position.long()
    high, fraction = (low + 1).clamp(max=raw.shape[1] - 1), (position - low).float()[:, None].to(raw.device)
    for i in range(0, height, rows):
        strip = slice(i, i + rows)
        first, last = int(low[i]), int(high[strip][-1])
        rows_used = raw[None, :, first : last + 1]
        rows_used = F.interpolate(rows_used, (rows_used.shape[2], width), mode="bilinear", align_corners=False)[0]
        above, below = ((index[strip] - first).to(raw.device) for index in (low, high))
        yield torch.lerp(rows_used[:, above], rows_used[:, below], fraction[strip])


def _window_starts(length: int, window: int) -> list[int]:
    """Return evenly spaced starts of windows that overlap by at least half."""
    steps = -(-2 * (length - window) // window)
    return sorted({round(i * (length - window) / steps) for i in range(steps + 1)}) if steps else [0]


def _blending_weights(size: Size, device: torch.device) -> Tensor:
    """Return the weights (h, w) of a window: 1 in the centre, falling towards the borders, nowhere 0."""
    sides = [1 - ((torch.arange(n, device=device) + 0.5) / n * 2 - 1).abs() for n in size]
    return sides[0][:, None] * sides[1]
