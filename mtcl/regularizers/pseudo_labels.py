"""Pseudo-labels of a teacher: the plain baseline for images that lack the labels of some tasks.

Where an image has no label of task t, the running mean of the model (Tarvainen and Valpola, "Mean teachers are better
role models", NeurIPS 2017) predicts one, and the task's ordinary loss L_t trains the model to agree:

    y   = the label that the teacher's prediction of t says, at each pixel; classes: none below a confidence
    l_t = sum of L_t(p, y) over pixels with such a label / number of pixels of the images without a label of t
    L   = sum_t w_t L_task_t + lambda * sum_t w_t l_t

The confidence, the hard classes and the mean over all pixels, confident or not, are those of FixMatch (Sohn et al.,
NeurIPS 2020; google-research/fixmatch, fixmatch.py) and of its version for segmentation in UniMatch (Yang et al., CVPR
2023; LiheYoung/UniMatch, fixmatch.py), without their second, strongly augmented view. What is theirs and what is our
choice is said in ``configs/regularizer/pseudo_labels.yaml``.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtcl.distributed import all_reduce_sum
from mtcl.errors import ParameterError
from mtcl.losses.masked import masked_fraction
from mtcl.models.base import DenseOutput
from mtcl.regularizers.base import Regularizer, RegularizerOutput
from mtcl.regularizers.sampling import Draw, draw_nothing
from mtcl.regularizers.task_loss import compute_task_loss
from mtcl.tasks.base import Task


class PseudoLabels(Regularizer):
    """Train each task on a teacher's predictions in the images that have no label of it.

    >>> from mtcl.tasks import build_task
    >>> tasks = {name: build_task(name) for name in ("depth", "edge")}
    >>> labels = {"depth": torch.ones(2, 1, 8, 8), "edge": torch.full((2, 1, 8, 8), 255.0)}  # no edges
    >>> output = DenseOutput({name: torch.randn(2, 1, 8, 8, requires_grad=True) for name in tasks}, {}, [], (8, 8))
    >>> teacher = {name: torch.randn(2, 1, 8, 8) for name in tasks}  # from a running mean of the model

    >>> regularizer = PseudoLabels(tasks)
    >>> draw = regularizer.sample(0, ["first", "second"])
    >>> result = regularizer.compute_loss(output, labels, draw, teacher)
    >>> result.losses["depth"].item(), bool(result.losses["edge"] > 0)
    (0.0, True)

    An image has a label of a task where any pixel is valid; void pixels of such an image stay void. Intermediate
    predictions are trained as in the task's loss. The pixels count alike whatever ``image_weighting`` says, which is a
    rule for images with labels. Without a teacher, or with all labels, the loss is a zero that keeps the graph.

    Args:
        tasks: name -> task; each loss is that of the task, times its weight.
        channels: ignored; other regularizers read feature maps of that width.
        seed: ignored: nothing is drawn.
        feature: at which of a model's features the log compares gradients; the loss reads none.
        confidence: least probability of a predicted class that counts as its pixel's label, 0 to 1; 0: all count.
    """

    min_tasks = 1
    uses_teacher = True

    def __init__(
        self,
        tasks: Mapping[str, Task],
        channels: Mapping[str, int] | None = None,  # noqa: ARG002
        *,
        seed: int = 0,  # noqa: ARG002
        feature: str = "final",
        confidence: float = 0.95,
    ):
        super().__init__()
        if not 0 <= confidence <= 1:
            raise ParameterError("confidence", f"={confidence} must be a probability, from 0 to 1")
        self.tasks, self.feature = dict(tasks), feature
        self.confidences = dict.fromkeys(self.tasks, confidence)
        for task in self.tasks.values():
            getattr(task, "criterion", None)  # builds the loss module: torch.compile can't, within a step
        self.sums: Tensor  # per task: steps with an image without its label, their losses, pseudo-labels' shares
        self.register_buffer("sums", torch.zeros(len(self.tasks), 3), persistent=False)

    def sample(self, step: int, ids: Sequence[str]) -> Draw:  # noqa: ARG002
        """Draw nothing."""
        return draw_nothing(ids)

    def compute_loss(
        self,
        output: DenseOutput,
        labels: Mapping[str, Tensor],
        draw: Draw,  # noqa: ARG002
        teacher: Mapping[str, Tensor] | None = None,
    ) -> RegularizerOutput:
        """Compute w_t l_t of each task and their sum; see the module's formulas."""
        losses, stats = {}, []
        for name, task in self.tasks.items():
            with torch.no_grad():
                target, is_missing = self._predict_labels(
                    name, labels[name], None if teacher is None else teacher[name]
                )
                share = masked_fraction(task.valid(target), is_missing)
            task_loss = compute_task_loss(name, task, output, target, self.task_loss.intermediate_weight)
            loss = task.weight * share * task_loss
            losses[name] = loss
            with torch.no_grad():
                has_missing = all_reduce_sum(is_missing.sum()) > 0
                stats.append(torch.stack([has_missing.to(share), loss, share]))
        with torch.no_grad():
            self.sums += torch.stack(stats)
        return RegularizerOutput(torch.stack(list(losses.values())).sum(), losses)

    def _predict_labels(self, name: str, label: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return pseudo-labels, void in labelled images, and the pixels of images without a label, bool (B, H, W)."""
        task = self.tasks[name]
        if teacher is None:
            target = torch.full_like(label, task.void)
            return target, torch.zeros_like(task.valid(label))
        is_missing = ~task.valid(label).flatten(1).any(dim=1)[:, None, None] & teacher.isfinite().all(dim=1)
        predicted = task.predict_label(teacher.float(), self.confidences[name]).to(label)
        mask = is_missing if label.ndim == 3 else is_missing[:, None]
        return torch.where(mask, predicted, torch.full_like(label, task.void)), is_missing

    def summary(self) -> dict[str, float]:
        """Return per task the mean of w_t l_t and the share of pixels with a pseudo-label, since the last call.

        Tasks whose labels no image lacked, or that had no teacher, are left out.
        """
        sums = self.sums.tolist()
        self.sums.zero_()
        means: dict[str, float] = {}
        for name, (steps, loss, share) in zip(self.tasks, sums):
            if steps:
                means |= {f"{name}/loss": loss / steps, f"{name}/share": share / steps}
        return means
