"""Set up what the contrast and its control with auxiliary heads share: sources, pixels, optimizer, mean."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from mtcl.errors import ParameterError, UserError
from mtcl.regularizers.base import Regularizer, RegularizerOutput
from mtcl.regularizers.masked_adamw import MaskedAdamW
from mtcl.regularizers.pairs import choose_thresholds
from mtcl.regularizers.sampling import Draw, draw_pixels, draw_sources
from mtcl.regularizers.source_weights import (
    EstimatedSourceWeights,
    SourceWeights,
    read_source_weights,
    select_weighted_sources,
)
from mtcl.regularizers.sources import list_allowed_sources, list_comparisons
from mtcl.tasks.base import Task

SourceWeightsOption = str | Mapping[str, Mapping[str, float]] | None


class CrossTaskRegularizer(Regularizer):
    """A regularizer that teaches each target by sources' labels at K pixels of each image.

    Args:
        tasks: name -> task, at least two; each is a source.
        seed: of every draw; torch's global generator is never touched.
        feature: which of a model's features it reads.
        num_pixels: K, sampled per image at label resolution.
        source_tasks: see :func:`~mtcl.regularizers.sources.list_allowed_sources`.
        excluded_pairs: pairs ``target<-source`` that are never drawn.
        targets: tasks that are targets; None: all.
        all_sources: at each step every allowed source of a target, each with its loss; else one that is drawn.
        source_weights: target -> source -> weight, relative ones by which sources are drawn, or by which the losses of
            a target are averaged where all of its sources have one; pairs that are not named have 0. ``auto``: they are
            estimated from labels, see :class:`~mtcl.regularizers.source_weights.EstimatedSourceWeights`. None: equal.
        source_weight_batches: number of batches that ``auto`` reads.
        thresholds: task -> (positive, negative) in the units of its label distance, for ``auto``; default: the task's.

    Attributes:
        comparisons: what has a loss: each target, or each pair of a target and a source.
        target: int64 (R,), the index of each comparison's target.
    """

    target: Tensor

    def __init__(
        self,
        tasks: Mapping[str, Task],
        *,
        seed: int,
        feature: str,
        num_pixels: int,
        source_tasks: str,
        excluded_pairs: Collection[str],
        targets: Collection[str] | None,
        all_sources: bool,
        source_weights: SourceWeightsOption,
        source_weight_batches: int,
        thresholds: Mapping[str, tuple[float, float]] | None = None,
    ):
        super().__init__()
        if len(tasks) < 2:
            raise UserError("cross-task regularizers need at least two tasks; switch the regularizer off for one")
        self.tasks, self.task_names = dict(tasks), list(tasks)
        self.seed, self.feature, self.num_pixels = seed, feature, num_pixels
        allowed = list_allowed_sources(self.task_names, source_tasks, excluded_pairs)
        table = None
        if isinstance(source_weights, Mapping):
            table = read_source_weights(source_weights, self.task_names, allowed)
            allowed = select_weighted_sources(table, self.task_names, allowed, targets or self.task_names)
        elif source_weights not in (None, "auto"):
            problem = f"={source_weights} must be auto or a mapping {{target: {{source: weight}}}}, or null"
            raise ParameterError("source_weights", problem)
        self.comparisons = list_comparisons(self.task_names, allowed, targets, all_sources)
        self.thresholds = choose_thresholds(tasks, thresholds or {})
        self.source_weights: SourceWeights | None = None
        if table is not None:
            self.source_weights = SourceWeights(self.comparisons, self.task_names, table)
        elif source_weights == "auto":
            self.source_weights = EstimatedSourceWeights(
                self.comparisons, tasks, self.thresholds, source_weight_batches
            )
        target = torch.tensor([self.task_names.index(c.target) for c in self.comparisons])
        self.register_buffer("target", target, persistent=False)

    @property
    def num_candidates(self) -> int:
        """Return how many pixels are drawn per image: K, or more where K of them are chosen later."""
        return self.num_pixels

    def sample(self, step: int, ids: Sequence[str]) -> Draw:
        """Draw the step's sources (equal on every rank) and each image's pixels."""
        weights = self.source_weights.rows if self.source_weights is not None else None
        sources = draw_sources(self.seed, step, [c.sources for c in self.comparisons], weights)
        return Draw(sources, draw_pixels(self.seed, step, ids, self.num_candidates))

    def observe_labels(self, labels: Mapping[str, Tensor], draw: Draw) -> None:
        """Take in the labels of a training batch, for an estimate of the sources' weights."""
        if self.source_weights is not None:
            self.source_weights.observe_labels(labels, draw.pixels)

    def build_optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Build an optimizer in which parameters of sources that were not drawn take no step."""
        group = {"params": list(self.parameters())}  # may be empty: without projectors there is nothing to train
        return MaskedAdamW([group], lr=lr, weight_decay=weight_decay)

    def read_share(self) -> Tensor:
        """Return the part of each comparison among those of its target, float32 (R,), which may change in training."""
        assert self.source_weights is not None
        return self.source_weights.share

    def combine(self, losses: Tensor, has_loss: Tensor) -> RegularizerOutput:
        """Return the losses (R,) of the comparisons by name, and their mean over those with a loss, bool (R,)."""
        if self.source_weights is not None and len(self.comparisons) > len({c.target for c in self.comparisons}):
            mean = self.source_weights.average(losses, has_loss)
        else:
            present = has_loss.to(losses)
            mean = (losses * present).sum() / present.sum().clamp(min=1)
        return RegularizerOutput(mean, {c.name: loss for c, loss in zip(self.comparisons, losses.unbind())})
