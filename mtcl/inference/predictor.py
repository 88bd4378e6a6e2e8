"""A trained model, ready for any picture."""

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
from mtcl.errors import UserError
from mtcl.inference.image_reading import MAX_PIXELS, convert_array, convert_pil_image, load_image
from mtcl.models import DenseModel
from mtcl.runtime import autocast
from mtcl.tasks.base import Task

log = logging.getLogger(__name__)

Size = tuple[int, int]
ImageInput = str | Path | np.ndarray | Image.Image
LARGE = ("shrink", "slide", "whole")
RESIZE_THRESHOLD = 1.6  # times the area and the longer side of the training frame: pictures up to that are not touched
SIZE_MULTIPLE = 32  # a picture's sides are rounded up to it where it is larger than the frame, as in an evaluation
MAX_STRIP_VALUES = 2**24  # numbers that are decoded at once


class Predictor:
    """``predictor(picture) -> {task: array}``, arrays of the picture's height and width.

    semseg, human_parts, sal: uint8 (H, W), the class (sal: 1 is salient). depth: float32 (H, W), metres. normals:
    float32 (H, W, 3), unit vectors, x to the left, y up, z to the viewer. edge: float32 (H, W), the probability, 0..1.

    Args:
        size: (height, width) of the frame that the model was trained in. A picture of about that size or less is
            predicted as it is, exactly as ``evaluate.py`` does it.
        large: what becomes of larger ones. ``shrink``: to the frame, and the maps enlarged again. ``slide``: a window
            of the frame's size goes over the picture, neighbours overlap by half and are blended: finer, but slower,
            and blind to what is wider than the window. ``whole``: as they are, if the memory suffices.
        flip: the mean with the mirrored picture's prediction. ``scales``: the mean over enlarged and shrunk pictures.
        max_pixels: larger pictures are refused.

    Depth is right for pictures of about the frame's size, from cameras with the angle of view that the model was
    trained with. Where a larger picture is not shrunk, things look nearer in it than they are, and depth is multiplied
    by how much larger it is; smaller ones are not enlarged, as an evaluation would not, and things look farther away.
    """

    def __init__(
        self,
        model: DenseModel,
        tasks: Mapping[str, Task],
        size: Size,
        device: torch.device,
        precision: str = "auto",
        large: str = "shrink",
        flip: bool = False,
        scales: Sequence[float] | float = (1.0,),
        max_pixels: int = MAX_PIXELS,
    ):
        if large not in LARGE:
            raise UserError(f"large={large} is not known; choose {', '.join(LARGE)}")
        scales = (scales,) if isinstance(scales, int | float) else scales
        if not scales or not all(0.1 <= scale <= 4 for scale in scales):
            raise UserError(f"scales={list(scales)}: give factors from 0.1 to 4, such as 0.75,1,1.25")
        autocast(device, precision, "precision")  # says now if it is not known
        self.model, self.tasks, self.size, self.device = model.eval().to(device), dict(tasks), size, device
        self.precision, self.large, self.flip = precision, large, flip
        self.scales, self.max_pixels = tuple(scales), max_pixels
        self.overflowed: set[str] = set()  # tasks with predictions that were not finite

    def __call__(self, picture: ImageInput) -> dict[str, np.ndarray]:
        """All tasks of a picture: a file's path, a PIL picture, or an array uint8 RGB (H, W, 3)."""
        return self.batch([picture])[0]

    def batch(self, pictures: Sequence[ImageInput]) -> list[dict[str, np.ndarray]]:
        """Several pictures; neighbours of one size go through the model together."""
        arrays = [self.read(picture) for picture in pictures]
        found: list[dict[str, np.ndarray]] = []
        for group in _alike(arrays):
            found += self._predicted(group)
        return found

    def read(self, picture: ImageInput) -> np.ndarray:
        """As uint8 RGB (H, W, 3), upright."""
        if isinstance(picture, str | Path):
            return load_image(Path(picture), self.max_pixels)
        if isinstance(picture, Image.Image):
            return convert_pil_image(picture, self.max_pixels)
        if isinstance(picture, np.ndarray):
            return convert_array(picture, self.max_pixels)
        raise UserError(f"a picture is a file's path, a PIL picture or a NumPy array, not {type(picture).__name__}")

    @torch.inference_mode()
    def _predicted(self, pictures: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Of pictures of one size."""
        height, width = size = (pictures[0].shape[0], pictures[0].shape[1])
        (short, long), frame = sorted(size), sorted(self.size)
        if height * width <= RESIZE_THRESHOLD * frame[0] * frame[1] and long <= RESIZE_THRESHOLD * frame[1]:
            return self._decoded(self._raw(pictures), size)
        factor = min(1.0, frame[0] / short, frame[1] / long)  # which makes it as large as those of the training
        if self.large == "shrink":
            return self._decoded(self._raw([_resized(p, factor) for p in pictures]), size)
        if self.large == "whole":
            return self._decoded(self._raw(pictures, 1 / factor), size)
        return self._slid(pictures, 1 / factor)

    def _raw(self, pictures: list[np.ndarray], enlarged: float = 1.0) -> dict[str, Tensor]:
        """Task -> raw predictions float32 (B, C, H, W) of pictures of one size, averaged as asked for.

        ``enlarged``: by how much, against the pictures of the training.
        """
        sums: dict[str, Tensor] = {}
        size, count = pictures[0].shape[:2], len(self.scales) * (1 + self.flip)
        for scale in self.scales:
            scaled = [_resized(p, scale) for p in pictures] if scale != 1 else pictures
            for flipped in (False, True)[: 1 + self.flip]:
                views = [np.ascontiguousarray(p[:, ::-1]) for p in scaled] if flipped else scaled
                for name, raw in self._once(views).items():
                    raw = self.tasks[name].unflip_prediction(raw) if flipped else raw
                    raw = self.tasks[name].unscale_prediction(raw, scale * enlarged)
                    raw = self.tasks[name].to_averageable(raw) if count > 1 else raw
                    if raw.shape[-2:] != size:
                        raw = F.interpolate(raw, size, mode="bilinear", align_corners=False, antialias=scale > 1)
                    sums[name] = sums[name] + raw if name in sums else raw
        return {name: total / count for name, total in sums.items()}

    def _once(self, pictures: list[np.ndarray]) -> dict[str, Tensor]:
        """(B, C, H, W) of pictures of one size, in the frame that an evaluation would put them in."""
        batch = collate([Sample(str(i), p, {}) for i, p in enumerate(pictures)], {}, self.size, SIZE_MULTIPLE)
        image, _ = prepare_batch(batch, self.model.mean, self.model.std, self.device)
        with autocast(self.device, self.precision):
            raw = self.model.predict(image)
        (top, left), (height, width) = batch["meta"][0].offset, batch["meta"][0].native_size
        maps = {name: raw[name][..., top : top + height, left : left + width].float() for name in self.tasks}
        self._warn_of_overflow(maps)
        return maps

    def _warn_of_overflow(self, maps: Mapping[str, Tensor]) -> None:
        """Warn once per task of predictions that are NaN or infinite: files and panels would show them as ordinary."""
        for name, raw in maps.items():
            if name not in self.overflowed and not bool(torch.isfinite(raw).all()):
                self.overflowed.add(name)
                log.warning(
                    "the model's prediction of %s is not finite in places: these pixels mean nothing (are the weights "
                    "damaged, or does precision=fp32 help?)",
                    name,
                )

    def _decoded(self, raw: dict[str, Tensor], size: Size) -> list[dict[str, np.ndarray]]:
        """Raw maps (B, C, h, w), brought to ``size``, in label layout. In strips: those of a large picture are huge."""
        found: list[dict[str, np.ndarray]] = [{} for _ in next(iter(raw.values()))]
        for name, task in self.tasks.items():
            several = raw[name] if raw[name].shape[-2:] == size else task.to_averageable(raw[name])
            for maps, one in zip(found, several):
                strips = [task.decode(strip) for strip in _enlarged(one, size)]
                maps[name] = np.concatenate(strips) if len(strips) > 1 else strips[0]
        return found

    def _slid(self, pictures: list[np.ndarray], enlarged: float) -> list[dict[str, np.ndarray]]:
        """Windows row by row, the same one of all pictures together; what no later row reaches is decoded and let go.

        ``enlarged``: see :meth:`_raw`.
        """
        height, width = pictures[0].shape[:2]
        window = (min(self.size[0], height), min(self.size[1], width))
        tops, lefts = _starts(height, window[0]), _starts(width, window[1])
        weight = _hill(window, self.device)
        sums: dict[str, Tensor] = {}  # (B, C, window's height, W)
        weights = torch.zeros(window[0], width, device=self.device)
        strips: list[dict[str, list[np.ndarray]]] = [{name: [] for name in self.tasks} for _ in pictures]
        for top, following in zip(tops, [*tops[1:], height]):
            for left in lefts:
                area = (..., slice(left, left + window[1]))
                views = [np.ascontiguousarray(p[top : top + window[0], left : left + window[1]]) for p in pictures]
                for name, found in self._raw(views, enlarged).items():
                    raw = self.tasks[name].to_averageable(found)
                    if name not in sums:
                        sums[name] = raw.new_zeros(*raw.shape[:3], width)
                    sums[name][area] += weight * raw
                weights[area] += weight
            done = following - top
            for name, task in self.tasks.items():
                for parts, total in zip(strips, sums[name]):
                    parts[name].append(task.decode(total[:, :done] / weights[:done]))
                sums[name] = F.pad(sums[name][:, :, done:], (0, 0, 0, done))
            weights = F.pad(weights[done:], (0, 0, 0, done))
        return [{name: np.concatenate(rows) for name, rows in parts.items()} for parts in strips]


def _alike(arrays: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Runs of neighbours of one size."""
    group: list[np.ndarray] = []
    for array in arrays:
        if group and array.shape != group[0].shape:
            yield group
            group = []
        group.append(array)
    if group:
        yield group


def _resized(picture: np.ndarray, factor: float) -> np.ndarray:
    height, width = (max(1, round(side * factor)) for side in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)


def _enlarged(raw: Tensor, size: Size) -> Iterator[Tensor]:
    """(C, h, w) -> strips (C, rows, W) of the map brought to ``size``, bilinear, corners not aligned."""
    height, width = size
    rows = max(1, MAX_STRIP_VALUES // (len(raw) * width))
    if raw.shape[1:] == size:
        yield from raw.split(rows, dim=1)
        return
    place = (torch.arange(height, dtype=torch.float64) + 0.5) * (raw.shape[1] / height) - 0.5
    place = place.clamp(0, raw.shape[1] - 1)
    low = place.long()
    high, part = (low + 1).clamp(max=raw.shape[1] - 1), (place - low).float()[:, None].to(raw.device)
    for i in range(0, height, rows):
        strip = slice(i, i + rows)
        first, last = int(low[i]), int(high[strip][-1])
        near = raw[None, :, first : last + 1]  # the rows that this strip lies between
        near = F.interpolate(near, (near.shape[2], width), mode="bilinear", align_corners=False)[0]
        above, below = ((place[strip] - first).to(raw.device) for place in (low, high))
        yield torch.lerp(near[:, above], near[:, below], part[strip])


def _starts(length: int, window: int) -> list[int]:
    """Where windows begin so that neighbours overlap by half at least, evenly."""
    steps = -(-2 * (length - window) // window)
    return sorted({round(i * (length - window) / steps) for i in range(steps + 1)}) if steps else [0]


def _hill(size: Size, device: torch.device) -> Tensor:
    """Weights (h, w) of a window: 1 in the middle, falling to the borders, nowhere 0."""
    sides = [1 - ((torch.arange(n, device=device) + 0.5) / n * 2 - 1).abs() for n in size]
    return sides[0][:, None] * sides[1]
