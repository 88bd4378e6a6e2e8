"""The base of all metrics: checks of sizes and labels, and counting without waiting for the device."""

from collections.abc import Iterator

import torch
import torchmetrics
from torch import Tensor

from mtcl.errors import UserError

VOID = 255  # of class and saliency labels
LABELS = VOID + 3  # rows of by_label: below 0, 0, 1, ..., 255, above 255
BAND = 2**16  # pixels whose temporary arrays of float64 stay in a CPU's cache, and in memory already mapped


def check_shapes(
    task: str, prediction: Tensor, channels: tuple[int, ...], label: Tensor, label_channels: tuple[int, ...]
) -> None:
    """Check the shapes of a batch.

    Args:
        task: name for the message.
        prediction: must be (B, one of ``channels``, H, W).
        channels: allowed numbers of channels.
        label: must be (B, *``label_channels``, H, W).
        label_channels: the middle of the label's shape: ``()`` or ``(n,)``.

    Raises:
        UserError: a shape is another.
    """
    if prediction.ndim != 4 or prediction.shape[1] not in channels:
        expected_channels = " or ".join(str(count) for count in channels)
        raise UserError(
            f"{task}: the prediction is {_size(prediction)}, not batch x {expected_channels} x height x width."
        )
    expected = (prediction.shape[0], *label_channels, *prediction.shape[2:])
    if tuple(label.shape) != expected:
        raise UserError(
            f"{task}: the prediction is {_size(prediction)} and its label {_size(label)}; "
            f"bring the prediction to the label's size, {'x'.join(str(side) for side in expected)} is expected."
        )


def _size(array: Tensor) -> str:
    return "x".join(str(side) for side in array.shape)


def row_bands(prediction: Tensor, label: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images (B, C, H, W) in bands of rows on a CPU, where that is twice as fast; elsewhere whole."""
    batch, _, height, width = prediction.shape
    rows = max(1, BAND // max(1, batch * width)) if prediction.is_cpu else max(1, height)
    for top in range(0, height, rows):
        yield prediction[:, :, top : top + rows], label[:, :, top : top + rows]


def is_finite(values: Tensor) -> Tensor:
    """Compute ``values.isfinite()`` in half the time."""
    return values.abs() < torch.inf


def count(cells: Tensor, number: int) -> Tensor:
    """Count how often each of 0..number-1 occurs in ``cells`` (integers, any shape): int64 (number,).

    The host never waits for the device, as it does in ``torch.bincount`` anywhere but on a CPU.
    """
    if cells.is_cpu:
        return torch.bincount(cells.flatten(), minlength=number)
    return count_by_scatter(cells, number)


def count_by_scatter(cells: Tensor, number: int) -> Tensor:
    """Count as :func:`count`, by adding integers, which gives the same in any order."""
    index = cells.flatten().long()
    zeros = torch.zeros(number, dtype=torch.int64, device=index.device)
    return zeros.scatter_add_(0, index, torch.ones_like(index))


def count_by_label(label: Tensor, column: Tensor, columns: int) -> Tensor:
    """Count the pixels of every image by their label and by ``column``.

    Args:
        label: integers (B, H, W).
        column: int32 (B, H, W) in 0..columns-1.
        columns: the number of columns.

    Returns:
        int64 (B, LABELS, columns). Row 1 + y holds the pixels of label y; the first and the last row hold labels that
        are neither 0..254 nor void, so that no label is counted as another.
    """
    batch = len(label)
    cell = label.long().clamp(-1, VOID + 1).int()
    cell += 1 + LABELS * torch.arange(batch, dtype=torch.int32, device=cell.device).view(-1, 1, 1)
    cell *= columns
    cell += column
    return count(cell, batch * LABELS * columns).view(batch, LABELS, columns)


class PixelMetric(torchmetrics.Metric):
    """Base of the metrics, with the two counts that every one has.

    ``not_finite``: valid pixels whose prediction is NaN or infinite; ``out_of_range``: pixels whose label is neither
    valid nor void.
    """

    task: str
    full_state_update = False
    not_finite: Tensor  # int64
    out_of_range: Tensor  # int64

    def add_counts(self, *names: str, size: tuple[int, ...] = ()) -> None:
        """Add int64 states that are summed over ranks: exact up to 9e18 pixels."""
        for name in names:
            self.add_state(name, torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    def add_sums(self, *names: str, size: tuple[int, ...] = ()) -> None:
        """Add float64 states that are summed over ranks."""
        for name in names:
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def check_labels(self, allowed: str) -> None:
        """Check that no label was out of range; waits for the device, so only ``compute`` calls it.

        Args:
            allowed: the allowed labels, for the message.

        Raises:
            UserError: some were.
        """
        num_wrong = int(self.out_of_range)
        if num_wrong:
            pixels = "1 pixel has a label" if num_wrong == 1 else f"{num_wrong} pixels have labels"
            raise UserError(f"{self.task}: {pixels} out of range; {allowed}. Check the label files and the class list.")


def validate_protocol(task: str, protocol: str, choices: tuple[str, ...]) -> str:
    """Return ``protocol`` if it is one of ``choices``.

    Raises:
        UserError: it is not.
    """
    if protocol not in choices:
        raise UserError(f"{task}: protocol={protocol!r} is not known; choose one of {', '.join(choices)}.")
    return protocol
