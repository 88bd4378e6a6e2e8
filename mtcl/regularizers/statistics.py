"""Diagnostics of a regularizer, summed per (target, source) pair until they are read."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtcl.regularizers.pairs import PixelLabels


class PairSums(nn.Module):
    """Sums per (target, source) pair since the last read-out, on the device; not part of a state dict."""

    def __init__(self, task_names: Sequence[str], num_values: int):
        """Start at zero.

        Args:
            task_names: targets, which are the sources as well.
            num_values: number of values summed per pair.
        """
        super().__init__()
        self.task_names = list(task_names)
        self.sums: Tensor
        self.register_buffer("sums", torch.zeros(len(task_names), len(task_names), num_values), persistent=False)

    @torch.no_grad()
    def add(self, target: Tensor, source: Tensor, values: Tensor) -> None:
        """Add values to the pairs they belong to.

        Args:
            target: int64 (R,), the target of each comparison.
            source: int64 (R, N), the source of each of its N rows.
            values: (R, N, num_values).
        """
        sources = torch.arange(len(self.task_names), device=source.device)
        drawn = (source[..., None] == sources).to(values)  # (R, N, S); one_hot would wait for the device
        # Not a matrix product: under autocast that would count in bf16.
        self.sums.index_add_(0, target, (drawn[..., None] * values[:, :, None]).sum(dim=1))

    def pop(self) -> dict[str, list[float]]:
        """Return ``target<-source`` -> sums of all pairs and start again at zero; synchronizes with the device."""
        rows = self.sums.tolist()
        self.sums.zero_()
        return {
            f"{target}<-{source}": values
            for target, row in zip(self.task_names, rows)
            for source, values in zip(self.task_names, row)
        }


class TripletStats(PairSums):
    """Counts and distances of a contrastive criterion."""

    def __init__(self, task_names: Sequence[str]):
        """Start at zero for these targets and sources."""
        # pixels, those with a label, anchors, active triplets, sum of d_ap, sum of d_an
        super().__init__(task_names, num_values=6)

    @torch.no_grad()
    def accumulate(self, target: Tensor, pixels: PixelLabels, stats: Tensor) -> None:
        """Accumulate the ``stats`` (R, B, 4) of a criterion on comparisons of the targets ``target`` (R,).

        One group of all images counts for the source of its first pixel.
        """
        labelled = pixels.valid.sum(dim=-1, keepdim=True).to(stats)
        count = torch.full_like(labelled, float(pixels.valid.shape[2]))
        self.add(target, pixels.source[..., 0], torch.cat([count, labelled, stats], dim=-1))

    def summary(self) -> dict[str, float]:
        """Return means per pair since the last call.

        Per ``target<-source``: ``anchors``, the fraction of pixels with a label of the source that were anchors, 0
        where no pixel has one; ``active``, the fraction of triplets inside the margin; ``d_ap`` and ``d_an``, the mean
        distances to positives and negatives.
        """
        summary = {}
        for pair, (pixels, labelled, anchors, active, d_ap, d_an) in self.pop().items():
            if pixels:
                summary[f"{pair}/anchors"] = anchors / max(1.0, labelled)
            if anchors:
                summary[f"{pair}/active"] = active / anchors
                summary[f"{pair}/d_ap"] = d_ap / anchors
                summary[f"{pair}/d_an"] = d_an / anchors
        return summary
