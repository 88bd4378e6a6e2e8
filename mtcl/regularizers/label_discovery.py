"""Label discovery: a teacher supervises the predictions and the features of tasks that an image has no label of.

The training of hierarchical task tokens (Zhang, Ye, Li, Wang, Xu, ACM Multimedia 2025, arXiv:2411.18823), as their
public code (Evergreen0929/EEMTL, HiTTs/losses/loss_schemes.py) has it. With T tasks, of an image i and a task t

    without a label:  T (w_t l_it + mean over cells and channels of s (f - f')^2)
    with a label:     T mean over cells and channels of (f - f')^2
    L = sum_t w_t L_task_t + lambda * mean over images of the sum over tasks

l_it is the task's loss at confident pixels of the teacher's prediction, as in
:class:`~mtcl.regularizers.pseudo_labels.PseudoLabels`, f the task's feature and f' the teacher's, s the relevance 0..1
that the teacher's task token gives each cell. What is the code's and what is our choice is said in
``configs/regularizer/label_discovery.yaml``.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mtcl.errors import ParameterError
from mtcl.losses.masked import masked_fraction
from mtcl.models.base import DenseOutput
from mtcl.regularizers.base import RegularizerOutput
from mtcl.regularizers.pseudo_labels import PseudoLabels
from mtcl.regularizers.sampling import Draw
from mtcl.tasks.base import Task

SHARPNESS = 5.0  # times the scores of a value's labels, before the softmax that gives their confidence


class LabelDiscovery(PseudoLabels):
    """Train tasks on a teacher's predictions where labels are missing, and on its features everywhere.

    Features ``labels`` and ``relevance`` of the decoder ``task_tokens`` give the confidence of values and the weight of
    cells; with a decoder that lacks them every value is confident and every cell counts.

    Args:
        tasks: name -> task.
        channels: ignored; other regularizers read feature maps of that width.
        seed: ignored: nothing is drawn.
        feature: which of a model's features the teacher's supervises.
        confidence: least probability of a predicted class that is a label, 0 to 1.
        value_confidence: least probability, 0 to 1, of the most probable bin of a depth or direction of a normal.
        task_confidences: task -> least probability in place of these two; tasks that are not there, or None: these.
        prediction_weight: of the terms of predictions.
        feature_weight: of the terms of features.
    """

    min_tasks = 2  # a method for several tasks, although nothing in its formulas compares them
    reads_teacher_features = True

    def __init__(
        self,
        tasks: Mapping[str, Task],
        channels: Mapping[str, int] | None = None,
        *,
        seed: int = 0,
        feature: str = "final",
        confidence: float = 0.9,
        value_confidence: float = 0.85,
        task_confidences: Mapping[str, float | None] | None = None,
        prediction_weight: float = 1.0,
        feature_weight: float = 1.0,
    ):
        super().__init__(tasks, channels, seed=seed, feature=feature, confidence=confidence)
        overrides = {name: value for name, value in (task_confidences or {}).items() if value is not None}
        values = {"value_confidence": value_confidence} | {f"task_confidences.{n}": v for n, v in overrides.items()}
        for key, value in values.items():
            if not 0 <= value <= 1:
                raise ParameterError(key, f"={value} must be a probability, from 0 to 1")
        self.confidences |= overrides
        self.value_confidences = dict.fromkeys(self.tasks, value_confidence) | overrides
        self.prediction_weight, self.feature_weight = prediction_weight, feature_weight

    def compute_loss(
        self,
        output: DenseOutput,
        labels: Mapping[str, Tensor],
        draw: Draw,
        teacher: Mapping[str, Tensor] | None = None,
    ) -> RegularizerOutput:
        """Compute both terms of each task, and their sum; see the module's formulas."""
        confident = teacher
        if teacher is not None:
            with torch.no_grad():
                confident = {name: self._mask_unconfident(name, output, teacher[name]) for name in self.tasks}
        losses = {}
        for name, loss in super().compute_loss(output, labels, draw, confident).losses.items():
            with torch.no_grad():
                is_missing = ~self.tasks[name].valid(labels[name]).flatten(1).any(dim=1)  # (B,)
                share = masked_fraction(is_missing, torch.ones_like(is_missing))
                if teacher is not None and confident is not None:
                    is_predicted, is_confident = (maps[name].isfinite().all(dim=1) for maps in (teacher, confident))
                    share = share * masked_fraction(is_confident, is_predicted & is_missing[:, None, None])
            difference = self._compare_features(name, output, is_missing)
            terms = self.prediction_weight * share * loss + self.feature_weight * difference
            losses[name] = len(self.tasks) * terms
        return RegularizerOutput(torch.stack(list(losses.values())).sum(), losses)

    def _mask_unconfident(self, name: str, output: DenseOutput, prediction: Tensor) -> Tensor:
        """Return a teacher's prediction (B, C, H, W), NaN where the value's most probable label is not confident."""
        scores = output.features.get("teacher_labels", {}).get(name)
        if scores is None or scores.shape[1] == self.tasks[name].channels:  # the labels are the prediction's channels
            return prediction
        probability = (SHARPNESS * scores.float()).softmax(dim=1).amax(dim=1, keepdim=True)
        height, width = prediction.shape[-2:]
        probability = F.interpolate(probability, size=output.frame, mode="bilinear", align_corners=False)
        return prediction.masked_fill(probability[..., :height, :width] < self.value_confidences[name], math.nan)

    def _compare_features(self, name: str, output: DenseOutput, is_missing: Tensor) -> Tensor:
        """Return the mean over images of the squared difference of features, weighted by relevance where missing."""
        feature = output.features[self.feature][name].float()
        target = output.features.get(f"teacher_{self.feature}")
        if target is None:
            return 0.0 * feature.sum()
        error = (feature - target[name].detach().float()).square().mean(dim=1)  # (B, h, w)
        relevance = output.features.get("teacher_relevance")
        if relevance is not None:
            weight = relevance[name][:, 0].detach().float().sigmoid()
            error = torch.where(is_missing[:, None, None], weight, 1.0) * error
        return error.mean()
