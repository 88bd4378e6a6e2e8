"""What the metrics share: the check of sizes, counting without waiting for the device, and errors of labels."""

from collections.abc import Iterator

import torch
import torchmetrics
from torch import Tensor

from mtcl.errors import UserError

VOID = 255  # of class and saliency labels
LABELS = VOID + 3  # rows of by_label: below 0, 0, 1, ..., 255, above 255
BAND = 2**16  # pixels whose temporary arrays of float64 stay in a CPU's cache, and in memory already mapped


def check_shapes(
    task: str, prediction: Tensor, channels: tuple[int, ...], label: Tensor, like: tuple[int, ...]
) -> None:
    """``UserError`` unless prediction is (B, one of ``channels``, H, W) and label (B, *``like``, H, W)."""
    if prediction.ndim != 4 or prediction.shape[1] not in channels:
        wanted = " or ".join(str(count) for count in channels)
        raise UserError(f"{task}: the prediction is {_size(prediction)}, not batch x {wanted} x height x width.")
    expected = (prediction.shape[0], *like, *prediction.shape[2:])
    if tuple(label.shape) != expected:
        raise UserError(
            f"{task}: the prediction is {_size(prediction)} and its label {_size(label)}; "
            f"bring the prediction to the label's size, {'x'.join(str(side) for side in expected)} is expected."
        )


def _size(array: Tensor) -> str:
    return "x".join(str(side) for side in array.shape)


def row_bands(prediction: Tensor, label: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same pictures (B, C, H, W) in bands of rows on a CPU, where that is two times faster; elsewhere as one."""
    batch, _, height, width = prediction.shape
    rows = max(1, BAND // max(1, batch * width)) if prediction.is_cpu else max(1, height)
    for top in range(0, height, rows):
        yield prediction[:, :, top : top + rows], label[:, :, top : top + rows]


def is_finite(values: Tensor) -> Tensor:
    """``values.isfinite()`` in half the time."""
    return values.abs() < torch.inf


def count(cells: Tensor, number: int) -> Tensor:
    """How often each of 0..number-1 occurs in ``cells`` (integers, any shape): int64 (number,).

    The host never waits for the device, which it would in ``torch.bincount`` anywhere but on a CPU.
    """
    if cells.is_cpu:
        return torch.bincount(cells.flatten(), minlength=number)
    return scattered(cells, number)


def scattered(cells: Tensor, number: int) -> Tensor:
    """:func:`count` by adding ones, which are whole numbers: the same in any order."""
    index = cells.flatten().long()
    zeros = torch.zeros(number, dtype=torch.int64, device=index.device)
    return zeros.scatter_add_(0, index, torch.ones_like(index))


def count_by_label(label: Tensor, column: Tensor, columns: int) -> Tensor:
    """Pixels of every picture by their label and by ``column`` (int32, 0..columns-1): int64 (B, LABELS, columns).

    label: integers (B, H, W), column: (B, H, W). Row 1 + y holds the pixels of label y. The first and the last row
    hold what is neither 0..254 nor void: no label is ever filed under another one.
    """
    batch = len(label)
    cell = label.long().clamp(-1, VOID + 1).int()
    cell += 1 + LABELS * torch.arange(batch, dtype=torch.int32, device=cell.device).view(-1, 1, 1)
    cell *= columns
    cell += column
    return count(cell, batch * LABELS * columns).view(batch, LABELS, columns)


class PixelMetric(torchmetrics.Metric):
    """The two counts that every metric keeps beside its own.

    ``not_finite``: valid pixels whose prediction is NaN or infinite; ``out_of_range``: pixels whose label is none.
    """

    task: str
    full_state_update = False
    not_finite: Tensor  # int64
    out_of_range: Tensor  # int64

    def add_counts(self, *names: str, size: tuple[int, ...] = ()) -> None:
        """States of int64 that add up over ranks: exact up to 9e18 pixels."""
        for name in names:
            self.add_state(name, torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    def add_sums(self, *names: str, size: tuple[int, ...] = ()) -> None:
        """States of float64 that add up over ranks."""
        for name in names:
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def check_labels(self, allowed: str) -> None:
        """``UserError`` if any label was out of range; waits for the device, so only ``compute`` calls it."""
        wrong = int(self.out_of_range)
        if wrong:
            pixels = "1 pixel has a label" if wrong == 1 else f"{wrong} pixels have labels"
            raise UserError(f"{self.task}: {pixels} out of range; {allowed}. Check the label files and the class list.")


def validate_protocol(task: str, protocol: str, known: tuple[str, ...]) -> str:
    """``protocol`` if it is one of ``known``, else ``UserError``."""
    if protocol not in known:
        raise UserError(f"{task}: protocol={protocol!r} is not known; choose one of {', '.join(known)}.")
    return protocol
