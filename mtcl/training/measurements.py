"""Measure a training beside its losses: images per second, memory, learning rates. No step waits for the device."""

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch

from mtcl import distributed
from mtcl.data import Batch
from mtcl.models import DenseModel


class Throughput:
    """Images and steps per second between two readings; pauses, such as validations, do not count.

    Read it right after the host has read a value from the device: then the steps counted are the steps computed.
    """

    def __init__(self) -> None:
        self.start: float | None = None  # of the interval; None before the first reading
        self.num_images = self.num_steps = 0

    def count(self, batches: Sequence[Batch]) -> None:
        """Count a step; a further view of an image is no image."""
        self.num_steps += 1
        self.num_images += sum(meta.view == 0 for batch in batches for meta in batch["meta"])

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out the time inside the context."""
        pause_start = time.perf_counter()
        yield
        if self.start is not None:
            self.start += time.perf_counter() - pause_start

    def read(self) -> dict[str, float]:
        """Return the means since the last reading, images of all processes; nothing at the first, which warms up."""
        now, start = time.perf_counter(), self.start
        num_images, num_steps = self.num_images * distributed.world_size(), self.num_steps
        self.start, self.num_images, self.num_steps = now, 0, 0
        if start is None or not num_steps or now <= start:
            return {}
        seconds = now - start
        return {"images_per_second": num_images / seconds, "seconds_per_step": seconds / num_steps}


def read_learning_rates(
    model: DenseModel, optimizer: torch.optim.Optimizer, regularizer_optimizer: torch.optim.Optimizer | None = None
) -> dict[str, float]:
    """Return the current learning rates: of the backbone (with layer decay its highest and lowest), the rest, ...

    Returns:
        ``backbone``, ``backbone_lowest`` where that differs, ``decoder``, ``regularizer``; those that are trained.
    """
    backbone = {id(parameter) for parameter in model.backbone_parameters()}
    rates: dict[str, list[float]] = {}
    for group in optimizer.param_groups:
        part = "backbone" if any(id(parameter) in backbone for parameter in group["params"]) else "decoder"
        rates.setdefault(part, []).append(float(group["lr"]))
    if regularizer_optimizer is not None and regularizer_optimizer.param_groups:
        rates["regularizer"] = [float(regularizer_optimizer.param_groups[0]["lr"])]
    result = {part: max(values) for part, values in rates.items()}
    if (lowest := min(rates.get("backbone", [0.0]))) < result.get("backbone", 0.0):
        result["backbone_lowest"] = lowest
    return result
