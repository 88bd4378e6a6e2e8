"""Evaluate a student on held-out images: how near its maps are to its teachers'."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mtcl import distributed
from mtcl.evaluation.evaluator import EvaluationResult, Evaluator, PredictionCallback
from mtcl.evaluation.model_input import prepare_input
from mtcl.models import DenseModel
from mtcl.progress import progress_bar
from mtcl.regularizers import Distillation
from mtcl.runtime import autocast, choose_float64_device

DISTILLATION = "distillation"  # stands for a task's name in the metrics
MONITOR = f"{DISTILLATION}/loss"


class DistillationEvaluator(Evaluator):
    """Measures a distillation's loss and cosines on a list of images, in place of tasks' metrics.

    Metrics: ``loss`` (the sum over teachers, which is trained on) and for each teacher ``loss/TEACHER`` and
    ``cosine/TEACHER``, means over the images.

    Args:
        distillation: with its teachers loaded.
        loader: gives evaluation batches.
        device: where the model is.
        precision: of model and teachers, see :func:`mtcl.runtime.autocast`.
    """

    def __init__(
        self, distillation: Distillation, loader: DataLoader, device: torch.device, precision: str = "auto"
    ) -> None:
        super().__init__({}, loader, device, precision)
        self.distillation = distillation

    @torch.no_grad()
    def run(
        self,
        model: DenseModel,
        on_prediction: PredictionCallback | None = None,  # noqa: ARG002
        fast: bool = False,  # noqa: ARG002
    ) -> EvaluationResult:
        """Compare a student, which keeps its mode (training or evaluation), with its teachers on all images."""
        was_training = model.training
        model.eval()
        names = list(self.distillation.levels)
        device = choose_float64_device(self.device)
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
        count = torch.zeros((), dtype=torch.float64, device=device)
        for batch in progress_bar(self.loader, desc="evaluate", leave=False, disable=distributed.rank() > 0):
            image, _ = prepare_input(batch, model, self.device)
            assert isinstance(image, Tensor)
            with autocast(self.device, self.precision):
                student = model(image)
                teachers = self.distillation.run_teachers(image, model.mean, model.std)
            feature = self.distillation.feature
            terms = self.distillation.compare(student.features[feature], teachers.features[feature])
            sums += len(image) * torch.stack([torch.stack(terms[name]) for name in names]).to(device)
            count += len(image)
        model.train(was_training)
        sums, count = distributed.all_reduce_sum(sums), distributed.all_reduce_sum(count)
        means = (sums / count).tolist()
        metrics = {"loss": sum(loss for loss, _ in means)}
        for name, (loss, cosine) in zip(names, means):
            metrics |= {f"loss/{name}": loss, f"cosine/{name}": cosine}
        return EvaluationResult({DISTILLATION: metrics}, [], int(count))

    def is_comparable(self, monitor: str) -> bool:  # noqa: ARG002
        """Return true: all evaluations are on all images."""
        return True
