"""Measure how much each source's labels say about each target's, from labels alone.

Agreement is the share of triplets (anchor, positive, negative) by the source's labels whose order is right in the
target's: its label distance anchor-positive is below that anchor-negative. A tie counts a half: 0.5 is no information.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtcl.regularizers.null_labels import DISTANCE_THRESHOLDS, embed_positions
from mtcl.regularizers.pairs import PixelLabels, make_pairs
from mtcl.regularizers.sampling import draw_pixels, flat_index, sample_labels
from mtcl.regularizers.triplet import gather_rows, sample_related
from mtcl.tasks.base import Task

TIE = 1e-3  # of the target's negative threshold: label distances that differ by less are equal but for rounding


class Agreement(NamedTuple):
    """Shares of triplets whose order is right in the target's labels, 0..1; NaN where there is no triplet."""

    source: Tensor  # float64 (T, S): by the source's labels of the image
    other_image: Tensor  # float64 (T, S): by the source's labels of another image at the same positions: the layout
    distance: Tensor  # float64 (T,): by mere distance in the image

    @property
    def information(self) -> Tensor:
        """Return what sources say about targets beyond the layout, not below 0: (T, S); NaN where it is unknown."""
        return (self.source - self.other_image).clamp(min=0)


def measure_agreement(
    batches: Iterable[tuple[Sequence[str], Mapping[str, Tensor]]],
    tasks: Mapping[str, Task],
    thresholds: Mapping[str, tuple[float, float]],
    num_pixels: int = 256,
    seed: int = 0,
) -> Agreement:
    """Measure the agreement of all pairs of tasks on one triplet per sampled pixel, as the regularizer draws them.

    Args:
        batches: sample ids and labels, task -> label in batch layout; the other image is the one before in its batch.
        tasks: name -> task; each is a target and a source.
        thresholds: task -> (positive, negative), of :func:`~mtcl.regularizers.pairs.choose_thresholds`.
        num_pixels: K, uniform per image, a function of the seed and the sample's id.
        seed: of the pixels.
    """
    embedded = [[task.embedded_distance(d) for d in thresholds[name]] for name, task in tasks.items()]
    sums = torch.zeros(2 * len(tasks) + 1, len(tasks), 2, dtype=torch.float64)
    for ids, labels in batches:
        sums += count_right_orders(labels, draw_pixels(seed, 0, ids, num_pixels), tasks, embedded)
    return summarize_agreement(sums)


def summarize_agreement(sums: Tensor) -> Agreement:
    """Return the shares of right triplets among those counted by :func:`count_right_orders`, (2 S + 1, T, 2)."""
    share = (sums[..., 0] / sums[..., 1]).T  # (T, 2 S + 1)
    count = len(share)
    return Agreement(share[:, :count], share[:, count:-1], share[:, -1])


def count_right_orders(
    labels: Mapping[str, Tensor],
    pixels: Tensor,
    tasks: Mapping[str, Task],
    embedded_thresholds: Sequence[Sequence[float]],
) -> Tensor:
    """Count the triplets of a batch, one per pixel and relation, in the labels of all targets.

    Args:
        labels: task -> label in batch layout; the other image is the one before in the batch.
        pixels: (B, K, 2), fractions of the image.
        tasks: name -> task; each is a target and a source.
        embedded_thresholds: (S, 2), among embedded labels.

    Returns:
        float64 (2 S + 1, T, 2), right triplets and all; by the sources, by those of the other image, by distance.
    """
    count, device = len(tasks), pixels.device
    size = next(iter(labels.values())).shape[-2:]
    read = {name: sample_labels(labels[name], pixels) for name in tasks}  # (B, K, c)
    label, valid = _embed(tasks, labels, pixels)
    other_labels = {name: labels[name].roll(1, dims=0) for name in tasks}  # the maps: positions stay the same
    other, other_valid = _embed(tasks, other_labels, pixels)
    position = embed_positions(pixels)[None]
    relating = PixelLabels(
        source=torch.arange(2 * count + 1, device=device)[:, None, None].expand(-1, len(pixels), 1),
        pixels=pixels[None],
        pixel_id=flat_index(pixels, (size[0], size[1]))[None],
        label=torch.cat([label, other, position]),
        valid=torch.cat([valid, other_valid & (len(pixels) > 1), torch.ones_like(valid[:1])]),
        target_label=label,
    )
    limits = torch.tensor([*embedded_thresholds, *embedded_thresholds, DISTANCE_THRESHOLDS], device=device)
    return _count(relating, tasks, read, valid, limits)


def _embed(tasks: Mapping[str, Task], labels: Mapping[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return all tasks' embedded labels at pixels (B, K, 2), (S, B, K, 3), and which are valid, (S, B, K)."""
    label = torch.stack([task.embed_label(sample_labels(labels[name], pixels)) for name, task in tasks.items()])
    valid = torch.stack([sample_labels(task.valid(labels[name]), pixels)[..., 0] for name, task in tasks.items()])
    return label, valid


def _count(
    relating: PixelLabels, tasks: Mapping[str, Task], read: Mapping[str, Tensor], valid: Tensor, thresholds: Tensor
) -> Tensor:
    """Count triplets by each of R relations in the labels of each of T targets: (R, T, 2), right ones and all."""
    pairs = make_pairs(relating, thresholds)
    positive, has_positive = sample_related(pairs.positive)
    negative, has_negative = sample_related(pairs.negative)
    rows = []
    for (name, task), is_valid in zip(tasks.items(), valid):
        valids = is_valid.expand(len(positive), -1, -1)
        labels = read[name].expand(len(positive), -1, -1, -1)  # (R, B, K, c)
        anchor = labels.reshape(-1, 1, labels.shape[-1])
        near, far = (
            task.distance(anchor, gather_rows(labels, j).reshape(anchor.shape)).view(valids.shape)
            for j in (positive, negative)
        )
        counts = has_positive & has_negative & valids & valids.gather(-1, positive) & valids.gather(-1, negative)
        tie = (near - far).abs() < TIE * task.negative_threshold
        right = torch.where(tie, 0.5, (near < far).double()) * counts
        rows.append(torch.stack([right.sum(dim=(1, 2)), counts.double().sum(dim=(1, 2))], dim=-1))
    return torch.stack(rows, dim=1)
