"""Copy a batch to the device and normalise its images, without waiting for the device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import cv2
import numpy as np
import torch
from torch import Tensor

from mtcl.data.sample import Batch, SampleMeta


def prepare_batch(
    batch: Batch, mean: Sequence[float], std: Sequence[float], device: torch.device | str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Copy a batch to ``device`` and normalise its images; nothing here waits for the device.

    A CUDA device copies the batch on a stream of its own while it still computes the previous step.

    Args:
        batch: a collated batch.
        mean: per channel, on the 0..1 scale.
        std: per channel, on the 0..1 scale.
        device: target device.

    Returns:
        Images float32 (B, 3, H, W), exactly 0 in padding, and the labels by task.
    """

    def to_device(tensor: Tensor) -> Tensor:
        """Copy a tensor to the device without waiting."""
        return tensor.to(device, non_blocking=True)

    with _copy_stream_context(torch.device(device)) as wait_for:
        image, labels = to_device(batch["image"]), {name: to_device(label) for name, label in batch["labels"].items()}
    wait_for(image, *labels.values())
    constants = 255 * to_device(torch.tensor([mean, std], dtype=torch.float32))[:, None, :, None, None]
    if image.is_cpu:
        return _normalize_by_table(image, constants, batch["meta"]), labels
    image = image.float().sub_(constants[0]).div_(constants[1])
    image.masked_fill_(~image_mask(batch["meta"], image.shape[-2:], to_device), 0.0)
    return image, labels


def _normalize_by_table(image: Tensor, constants: Tensor, meta: Sequence[SampleMeta]) -> Tensor:
    """Normalise on the CPU by a table of the 256 levels, which reads the memory once and gives the same bits.

    Args:
        image: uint8 (B, 3, H, W).
        constants: mean and deviation on the 0..255 scale, (2, 1, 3, 1, 1).
        meta: of the B images; pixels outside of them become 0.
    """
    levels = torch.arange(256).float().sub(constants[0].view(-1, 1)).div(constants[1].view(-1, 1)).numpy()
    normalized = np.zeros(image.shape, np.float32)
    for source, target, sample in zip(image.numpy(), normalized, meta):
        (row, column), (height, width) = sample.offset, sample.native_size
        window = (slice(row, row + height), slice(column, column + width))
        for plane, result, table in zip(source, target, levels):
            cv2.LUT(plane[window], table, dst=result[window])
    return torch.from_numpy(normalized)


def prepare_features(batch: Batch, device: torch.device | str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Copy a batch's features and labels to ``device``; nothing here waits for the device.

    Args:
        batch: a collated batch with ``features``.
        device: target device.

    Returns:
        Maps float32 (B, C, h, w), finest first, and the labels by task.
    """
    with _copy_stream_context(torch.device(device)) as wait_for:
        maps = [m.to(device, non_blocking=True) for m in batch["features"]]
        labels = {name: label.to(device, non_blocking=True) for name, label in batch["labels"].items()}
    wait_for(*maps, *labels.values())
    return [m.float() for m in maps], labels


@contextmanager
def _copy_stream_context(device: torch.device) -> Iterator[Callable[..., None]]:
    """Run the enclosed copies on a separate CUDA stream, so that they do not queue behind the last step's work.

    Yields:
        A function that, called with the results, makes the device's main stream wait for them.
    """
    if device.type != "cuda":
        yield lambda *_tensors: None
        return
    stream, main = _copy_stream(device), torch.cuda.current_stream(device)

    def wait_for(*tensors: Tensor) -> None:
        """Make the main stream wait for the copies."""
        main.wait_stream(stream)
        for tensor in tensors:
            tensor.record_stream(main)  # else the memory could be given away while `main` still reads it

    with torch.cuda.stream(stream):
        yield wait_for


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the copy stream of a device, created once."""
    return torch.cuda.Stream(device)


def image_mask(meta: Sequence[SampleMeta], frame: torch.Size, to_device: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mask of a batch's pixels that belong to an image, not to padding: bool (B, 1, H, W)."""
    corners = torch.tensor([[m.offset, (m.offset[0] + m.native_size[0], m.offset[1] + m.native_size[1])] for m in meta])
    corners = to_device(corners)  # (B, first or one past the last, row or column)
    rows = torch.arange(frame[0], device=corners.device)
    columns = torch.arange(frame[1], device=corners.device)
    in_rows = (rows >= corners[:, 0, :1]) & (rows < corners[:, 1, :1])
    in_columns = (columns >= corners[:, 0, 1:]) & (columns < corners[:, 1, 1:])
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]
