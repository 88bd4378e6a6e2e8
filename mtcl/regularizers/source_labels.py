"""Read the labels that relate a target's pixels: those of its source, or what a control puts in their place."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtcl.errors import ParameterError
from mtcl.regularizers import null_labels, sampling_ablations
from mtcl.regularizers.mispredicted import read_predictions
from mtcl.regularizers.pairs import PixelLabels
from mtcl.regularizers.sampling import Draw, as_label_map, flat_index, sample_labels
from mtcl.regularizers.sources import choose_available_source
from mtcl.tasks.base import Task

Size = tuple[int, int]


class SourceLabelReader:
    """Reads labels at the drawn pixels, and chooses each image's source among the tasks that label it.

    Args:
        tasks: name -> task; sources and targets are indices into it.
        source_labels: see :class:`~mtcl.regularizers.contrastive.Contrastive`.
        num_balanced: K, so many of the drawn pixels are chosen with equal parts of the source's classes; None: all.
        with_bins: whether the bins of the source's labels are returned.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        source_labels: bool | str,
        num_balanced: int | None = None,
        with_bins: bool = False,
    ):
        self.tasks = dict(tasks)
        self.source_labels = null_labels.normalize_source_labels(source_labels)
        self.num_balanced, self.with_bins = num_balanced, with_bins
        if self.source_labels == "distance" and num_balanced is not None:
            raise ParameterError("class_balanced", "=true needs labels, which source_labels=distance has none of")
        if self.source_labels == "distance" and with_bins:
            raise ParameterError("criterion", "=prototypes needs labels, which source_labels=distance has none of")

    def choose_thresholds(self, embedded: Sequence[list[float]]) -> Sequence[list[float]]:
        """Return per source the thresholds of what :meth:`read` relates pixels by: those of labels, or of distances."""
        return [null_labels.DISTANCE_THRESHOLDS] * len(embedded) if self.source_labels == "distance" else embedded

    def read(
        self,
        labels: Mapping[str, Tensor],
        draw: Draw,
        target: Tensor,
        size: Size,
        teacher: Mapping[str, Tensor] | None = None,
    ) -> PixelLabels:
        """Read the source's labels of each comparison.

        Args:
            labels: task -> label in batch layout, (B, H, W) or (B, c, H, W).
            draw: the sources, a row per comparison, and the pixels.
            target: int64 (R,), the target of each comparison.
            size: height and width of the labels.
            teacher: task -> raw prediction (B, C, H, W), which stands for a source's label where an image has none.
        """
        read = {name: sample_labels(labels[name], draw.pixels) for name in self.tasks}  # (B, M, c)
        ndims = {name: labels[name].ndim for name in self.tasks}
        valid, label, bins = self._embed(read, ndims)
        target_label = torch.where(valid[..., None], label, torch.nan)
        if teacher is not None:
            valid, label, bins = self._embed(fill_missing_labels(self.tasks, read, labels, teacher, draw.pixels), ndims)
        has_labels = valid.any(dim=2)  # (S, B)
        if self.source_labels == "random":
            valid, label, bins = (x.roll(1, dims=1) for x in (valid, label, bins))
            valid = valid & (valid.shape[1] > 1)  # a single image has no other one
            has_labels = valid.any(dim=2)
        elif self.source_labels == "other_image":
            donor, has_donor = null_labels.choose_other_image(has_labels)
            read = {n: sample_labels(labels[n], draw.pixels, image) for n, image in zip(self.tasks, donor)}
            valid, label, bins = self._embed(read, ndims)
            has_labels = has_labels & has_donor
            valid = valid & has_labels[..., None]
        elif self.source_labels == "distance":
            label = null_labels.embed_positions(draw.pixels).expand_as(label)
        source = choose_available_source(draw.sources, has_labels)  # (R, B)
        images = torch.arange(source.shape[1], device=source.device)
        pixels = PixelLabels(
            source=source[..., None],
            pixels=draw.pixels[None],  # the same for all comparisons
            pixel_id=flat_index(draw.pixels, size)[None],
            label=label[source, images],
            valid=valid[source, images],
            target_label=target_label[target],
            bins=bins[source, images] if self.with_bins else None,
        )
        if self.num_balanced is not None:
            pixels = sampling_ablations.balance_classes(pixels, bins[source, images], self.num_balanced)
        return pixels

    def _embed(self, read: Mapping[str, Tensor], ndims: Mapping[str, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return which labels at pixels (task -> (B, M, c)) are valid (S, B, M), embedded (S, B, M, 3), their bins."""
        valid = torch.stack(
            [task.valid(as_label_map(read[name], ndims[name]))[..., 0] for name, task in self.tasks.items()]
        )
        label = torch.stack([task.embed_label(read[name]) for name, task in self.tasks.items()])
        bins = torch.zeros_like(valid, dtype=torch.long)
        if self.num_balanced is not None or self.with_bins:
            bins = torch.stack([task.sampling_bin(read[name]) for name, task in self.tasks.items()])
        return valid, label, bins


def fill_missing_labels(
    tasks: Mapping[str, Task],
    read: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    pixels: Tensor,
) -> dict[str, Tensor]:
    """Return labels at pixels, those that a teacher predicts in images without a labelled pixel.

    Args:
        tasks: name -> task.
        read: task -> labels at the pixels (B, M, c).
        labels: task -> label in batch layout.
        teacher: task -> raw prediction (B, C, H, W), NaN in padding, which stays void.
        pixels: (B, M, 2), see :class:`~mtcl.regularizers.sampling.Draw`.
    """
    filled = {}
    for name, task in tasks.items():
        raw = read_predictions(teacher[name], pixels)
        predicted = torch.where(raw.isfinite().all(dim=-1, keepdim=True), task.to_label(raw), task.void)
        is_labelled = task.valid(labels[name]).flatten(1).any(dim=1)
        filled[name] = torch.where(is_labelled[:, None, None], read[name], predicted.to(read[name]))
    return filled
