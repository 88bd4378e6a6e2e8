"""Prototypes: positives across images, by a bank of running means of each (target, source) pair.

Each bin of a source's label (class, range of depth, direction; ``Task.sampling_bin``) has a prototype p, the running
mean of the target's projected features z at pixels of that bin in all images of a batch and all processes:

    p_bin  <- normalize(momentum * p_bin + (1 - momentum) * mean of z over the batch's pixels of the bin)
    L      =  mean over pixels of  -log(exp(z . p_own / temperature) / sum over bins exp(z . p_bin / temperature))

This is InfoNCE with one positive, the pixel's own bin, and the other bins as negatives. A loss reads the bank as
earlier batches made it, and no gradient passes through it. Running means of classes as in Zhou et al., "Rethinking
Semantic Segmentation: A Prototype View" (CVPR 2022); bins of continuous labels, and another task's labels, are ours.
"""

from collections.abc import MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.distributed import all_reduce_sum
from mtcl.regularizers.pairs import PixelLabels
from mtcl.regularizers.triplet import AnchorLosses, CriterionOutput, mean_over_anchors

NUM_BINS = 256  # of Task.sampling_bin
MOMENTUM = 0.99


class PrototypeBank(nn.Module):
    """A bank of prototypes per target and source, and the loss of pixels against it.

    It takes 4 * 256 S T D bytes (1 MiB for four tasks and D = 64), and so do the sums of each step. The logits of a
    step have 4 * 256 R B K bytes.

    Args:
        num_tasks: T = S, targets and sources.
        embed_dim: D.
        temperature: of InfoNCE.
    """

    prototypes: Tensor  # float32 (T, S, 256, D): unit vectors; zero for a bin of which there was no pixel yet

    def __init__(self, num_tasks: int, embed_dim: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.register_buffer("prototypes", torch.zeros(num_tasks, num_tasks, NUM_BINS, embed_dim))

    def forward(self, z: Tensor, pixels: PixelLabels, target: Tensor) -> CriterionOutput:
        """Compute the loss of each labelled pixel, then update the bank.

        A pixel has no loss while its bin has no prototype, or is the only one that has. It counts as active while its
        loss is above 0.1; d_ap is its distance 2 - 2 cos to the prototype of its bin, d_an the mean of those to others.

        Args:
            z: unit vectors (R, B, K, D).
            pixels: their source labels, with bins.
            target: int64 (R,), the target of each comparison.
        """
        assert pixels.bins is not None
        bins = torch.where(pixels.valid, pixels.bins, 0)[..., None]  # those of void labels mean nothing
        row = target[:, None] * self.prototypes.shape[1] + pixels.source[..., 0]  # (R, B)
        with torch.no_grad():
            bank = self.prototypes.flatten(0, 1)[row]  # (R, B, 256, D), a copy: the bank changes before the backward
            exists = (bank != 0).any(dim=-1)[..., None, :]  # (R, B, 1, 256)
            num_others = exists.sum(dim=-1) - 1
            anchor = pixels.valid & exists.expand(*bins.shape[:-1], -1).gather(-1, bins)[..., 0] & (num_others > 0)
        cosine = z @ bank.mT  # (R, B, K, 256)
        logits = torch.where(exists | (num_others[..., None] < 1), cosine / self.temperature, -torch.inf)
        own_cosine = cosine.gather(-1, bins)[..., 0]
        loss = logits.logsumexp(dim=-1) - own_cosine / self.temperature
        with torch.no_grad():
            others = (cosine * exists).sum(dim=-1) - own_cosine
            d_an = 2 - 2 * others / num_others.clamp(min=1)
            self._update(z.detach(), row, bins[..., 0], pixels.valid)
        return mean_over_anchors(AnchorLosses(loss, loss > 0.1, 2 - 2 * own_cosine, d_an, anchor))

    def _update(self, z: Tensor, row: Tensor, bins: Tensor, valid: Tensor) -> None:
        """Move each prototype towards the mean of the batch's features in its bin.

        Args:
            z: (R, B, K, D).
            row: int64 (R, B), the pair's row of the bank.
            bins: int64 (R, B, K).
            valid: bool (R, B, K).
        """
        old = self.prototypes.flatten(0, 2)
        values = torch.where(valid[..., None], F.pad(z, (0, 1), value=1.0), 0.0)  # features, and a count
        index = row[..., None] * NUM_BINS + bins
        sums = z.new_zeros(len(old), z.shape[-1] + 1).index_add_(0, index.flatten(), values.flatten(0, 2))
        sums = all_reduce_sum(sums)
        count = sums[:, -1:]
        mean = sums[:, :-1] / count.clamp(min=1)
        is_new = ~(old != 0).any(dim=-1, keepdim=True)
        moved = F.normalize(torch.where(is_new, mean, MOMENTUM * old + (1 - MOMENTUM) * mean), dim=-1)
        is_measured = (count > 0) & moved.isfinite().all(dim=-1, keepdim=True)  # a step that failed leaves no trace
        self.prototypes.copy_(torch.where(is_measured, moved, old).view_as(self.prototypes))

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any) -> None:
        """Load the bank; a state without one, of another criterion, leaves it empty."""
        state_dict.setdefault(f"{prefix}prototypes", torch.zeros_like(self.prototypes))
        super()._load_from_state_dict(state_dict, prefix, *args)
