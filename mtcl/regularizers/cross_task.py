"""Set up what the contrast and its control with auxiliary heads share: sources, pixels, optimizer, mean."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from mtcl.errors import UserError
from mtcl.regularizers.base import Regularizer, RegularizerOutput
from mtcl.regularizers.masked_adamw import MaskedAdamW
from mtcl.regularizers.sampling import Draw, draw_pixels, draw_sources
from mtcl.regularizers.sources import list_allowed_sources, list_comparisons
from mtcl.tasks.base import Task


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

    Attributes:
        comparisons: what has a loss: each target, or each pair of a target and a source.
        target: int64 (R,), the index of each comparison's target.
    """

    target: Tensor

    def __init__(
        self,
        tasks: Mapping[str, Task],
        seed: int,
        feature: str,
        num_pixels: int,
        source_tasks: str,
        excluded_pairs: Collection[str],
        targets: Collection[str] | None,
        all_sources: bool,
    ):
        super().__init__()
        if len(tasks) < 2:
            raise UserError("cross-task regularizers need at least two tasks; switch the regularizer off for one")
        self.tasks, self.task_names = dict(tasks), list(tasks)
        self.seed, self.feature, self.num_pixels = seed, feature, num_pixels
        allowed = list_allowed_sources(self.task_names, source_tasks, excluded_pairs)
        self.comparisons = list_comparisons(self.task_names, allowed, targets, all_sources)
        target = torch.tensor([self.task_names.index(c.target) for c in self.comparisons])
        self.register_buffer("target", target, persistent=False)

    @property
    def num_candidates(self) -> int:
        """Return how many pixels are drawn per image: K, or more where K of them are chosen later."""
        return self.num_pixels

    def sample(self, step: int, ids: Sequence[str]) -> Draw:
        """Draw the step's sources (equal on every rank) and each image's pixels."""
        sources = draw_sources(self.seed, step, [c.sources for c in self.comparisons])
        return Draw(sources, draw_pixels(self.seed, step, ids, self.num_candidates))

    def build_optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Build an optimizer in which parameters of sources that were not drawn take no step."""
        group = {"params": list(self.parameters())}  # may be empty: without projectors there is nothing to train
        return MaskedAdamW([group], lr=lr, weight_decay=weight_decay)

    def combine(self, losses: Tensor, has_loss: Tensor) -> RegularizerOutput:
        """Return the losses (R,) of the comparisons by name, and their mean over those with a loss, bool (R,)."""
        present = has_loss.to(losses)
        mean = (losses * present).sum() / present.sum().clamp(min=1)
        return RegularizerOutput(mean, {c.name: loss for c, loss in zip(self.comparisons, losses.unbind())})
