"""Auxiliary heads, a control of the contrast: small heads predict the source's labels from the target's features.

Whatever the labels of a source s could teach the features of a target t, they teach it here, without any contrast:

    p = A_ts(F_t)                                   at the K pixels that the contrast would sample
    L_t = w_s L_s(p, labels of s)                   L_s: the loss of task s, w_s: its weight
    L   = sum_t w_t L_task_t + lambda * mean_t L_t

Sources and pixels are drawn as for :class:`~mtcl.regularizers.contrastive.Contrastive`, whose projectors have the
layers of these heads but for the width of the last one.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from mtcl.distributed import all_reduce_sum
from mtcl.models.base import DenseOutput
from mtcl.regularizers.base import RegularizerOutput
from mtcl.regularizers.cross_task import CrossTaskRegularizer, SourceWeightsOption
from mtcl.regularizers.projector import StackedLayers
from mtcl.regularizers.sampling import (
    Draw,
    as_label_map,
    sample_features,
    sample_labels,
)
from mtcl.regularizers.source_labels import fill_missing_labels
from mtcl.regularizers.sources import choose_available_source
from mtcl.regularizers.statistics import PairSums
from mtcl.tasks.base import Task

Size = tuple[int, int]


class AuxiliaryHeads(CrossTaskRegularizer):
    """Prediction of a source's labels from each target's features.

    Where images of a batch differ in their source (partial labels), L_t is the mean over the labelled pixels of all.

    Args:
        tasks: name -> task, at least two; each is a target and a source.
        channels: task -> channels C_t of its feature map.
        seed: of the heads' initialization and of every draw; torch's global generator is never touched.
        feature: which of a model's features :meth:`compute_loss` reads.
        num_pixels: K, sampled per image at label resolution.
        hidden_dim: width inside a head; None: a linear head.
        source_tasks: see :class:`~mtcl.regularizers.contrastive.Contrastive`.
        excluded_pairs: pairs ``target<-source`` that are never drawn.
        targets: tasks whose features have such heads; the others are sources only. None: all.
        all_sources: at each step every allowed source of a target, each with a loss of its own; else one that is drawn.
        source_weights: see :class:`~mtcl.regularizers.contrastive.Contrastive`.
        source_weight_batches: number of batches that ``source_weights=auto`` reads.
        teacher: see :class:`~mtcl.regularizers.contrastive.Contrastive`.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        channels: Mapping[str, int],
        *,
        seed: int = 0,
        feature: str = "final",
        num_pixels: int = 256,
        hidden_dim: int | None = 64,
        source_tasks: str = "other",
        excluded_pairs: Collection[str] = (),
        targets: Collection[str] | None = None,
        all_sources: bool = False,
        source_weights: SourceWeightsOption = None,
        source_weight_batches: int = 32,
        teacher: bool = False,
    ):
        super().__init__(
            tasks,
            seed=seed,
            feature=feature,
            num_pixels=num_pixels,
            source_tasks=source_tasks,
            excluded_pairs=excluded_pairs,
            targets=targets,
            all_sources=all_sources,
            source_weights=source_weights,
            source_weight_batches=source_weight_batches,
        )
        self.uses_teacher = teacher
        generator = torch.Generator().manual_seed(seed)
        # A source reads the first outputs, as many as it has channels.
        widest = max(task.channels for task in self.tasks.values())
        self.heads = nn.ModuleDict(
            {name: StackedLayers(len(tasks), channels[name], hidden_dim, widest, generator) for name in self.task_names}
        )
        for task in self.tasks.values():
            getattr(task, "criterion", None)  # builds the loss module: torch.compile can't, within a step
        self.stats = PairSums(self.task_names, num_values=2)  # steps, loss

    def compute_loss(
        self,
        output: DenseOutput,
        labels: Mapping[str, Tensor],
        draw: Draw,
        teacher: Mapping[str, Tensor] | None = None,
    ) -> RegularizerOutput:
        """Compute the loss of the heads on a model's features, see :meth:`forward`."""
        return self(output.features[self.feature], labels, draw, output.frame, teacher)

    def forward(
        self,
        features: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        draw: Draw,
        frame: Size | None = None,
        teacher: Mapping[str, Tensor] | None = None,
    ) -> RegularizerOutput:
        """Compute L_t of all comparisons, one per target or per pair, and their mean over those with a labelled pixel.

        Args:
            features: task -> F_t (B, C_t, h, w).
            labels: task -> label in batch layout, (B, H, W) or (B, c, H, W).
            draw: result of :meth:`sample`.
            frame: height and width in pixels that the features cover; None: those of the labels.
            teacher: task -> raw prediction (B, C, H, W) of a running mean of the model, without gradient and NaN in
                padding, which stands for a source's labels in images that have none.
        """
        height, width = next(iter(labels.values())).shape[-2:]
        sampled_labels = {name: sample_labels(label, draw.pixels) for name, label in labels.items()}  # (B, K, c)
        if teacher is not None:
            sampled_labels = fill_missing_labels(self.tasks, sampled_labels, labels, teacher, draw.pixels)
        # the pixels alone: a label of K rows and one column
        read = {name: as_label_map(sampled_labels[name], label.ndim) for name, label in labels.items()}
        valid = torch.stack([task.valid(read[name])[..., 0] for name, task in self.tasks.items()])  # (S, B, K)
        source = choose_available_source(draw.sources, valid.any(dim=2))  # (R, B)
        tasks = torch.arange(len(self.tasks), device=source.device)
        is_source = source[:, None] == tasks[:, None]  # (R, S, B)
        counts = all_reduce_sum((valid.sum(dim=2) * is_source).sum(dim=2))  # (R, S): pixels of all processes
        size = (height, width)
        sampled = {
            name: sample_features(features[name], draw.pixels, size, frame or size)  # (B, K, C_t)
            for name in dict.fromkeys(c.target for c in self.comparisons)
        }
        losses = torch.stack(
            [
                self._predict(c.target, sampled[c.target], read, source[i], is_source[i])
                for i, c in enumerate(self.comparisons)
            ]
        )  # (R, S)
        total = counts.sum(dim=1)
        self._accumulate_stats(counts, losses)
        target_losses = (losses * counts).sum(dim=1) / total.clamp(min=1)  # (R,)
        return self.combine(target_losses, total > 0)

    def _predict(
        self,
        target: str,
        sampled: Tensor,
        read: Mapping[str, Tensor],
        source: Tensor,
        is_source: Tensor,
    ) -> Tensor:
        """Compute w_s L_s (S,) of the target's heads, each over the images of that source (``is_source``, (S, B))."""
        prediction = self.heads[target](sampled, source).mT[..., None]  # (B, widest, K, 1)
        losses = []
        for (name, task), chosen in zip(self.tasks.items(), is_source):
            label = read[name]
            chosen = chosen.view(-1, *[1] * (label.ndim - 1))
            masked = torch.where(chosen, label, torch.full((), task.void, dtype=label.dtype, device=label.device))
            losses.append(task.weight * task.loss(prediction[:, : task.channels], masked))
        return torch.stack(losses)

    @torch.no_grad()
    def _accumulate_stats(self, counts: Tensor, losses: Tensor) -> None:
        """Add the losses (R, S) of the pairs that have a labelled pixel."""
        has_label = (counts > 0).to(losses)
        sources = torch.arange(len(self.tasks), device=losses.device).expand(len(self.target), -1)
        self.stats.add(self.target, sources, torch.stack([has_label, losses * has_label], dim=-1))

    def summary(self) -> dict[str, float]:
        """Return the mean of w_s L_s (``loss``) of each pair ``target<-source`` drawn since the last call."""
        return {f"{pair}/loss": loss / steps for pair, (steps, loss) in self.stats.pop().items() if steps}
