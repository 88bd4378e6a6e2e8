"""The interface of all regularizers: a training-only loss on the output of any dense model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtcl.models.base import DenseOutput
from mtcl.regularizers.sampling import Draw
from mtcl.regularizers.task_loss import TaskLossOptions


class RegularizerOutput(NamedTuple):
    """Losses of one batch."""

    loss: Tensor  # scalar: ``losses`` as the regularizer combines them; contrastive: the mean over those with an anchor
    losses: dict[str, Tensor]  # comparison, a target or target<-source, -> scalar; without an anchor zero with a graph


class Regularizer(nn.Module, ABC):
    """A training-only loss on a model's output. Its parameters live here, never in the model."""

    feature: str = "final"  # the decoder feature that it reads
    task_loss: TaskLossOptions = TaskLossOptions()  # how the tasks' losses are computed; the trainer sets its own
    min_tasks: int = 2  # with fewer tasks it compares nothing
    uses_teacher: bool = False  # whether compute_loss takes the predictions of a running mean of the model, too
    reads_teacher_features: bool = False  # whether its output has that model's features, too, NAME as teacher_NAME

    @classmethod
    def method_name(cls) -> str:
        """Return the name of the method, which is that of its module and of its file in configs/regularizer."""
        return cls.__module__.rpartition(".")[2]

    def build_optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Build the optimizer of the regularizer's own parameters."""
        group = {"params": list(self.parameters())}  # may be empty
        return torch.optim.AdamW([group], lr=lr, weight_decay=weight_decay, fused=True)

    @abstractmethod
    def sample(self, step: int, ids: Sequence[str]) -> Draw:
        """Draw all randomness of one training step.

        Args:
            step: training step, 0 for the first.
            ids: sample ids of the batch, in order.

        Returns:
            a function of (seed, step, ids) on the CPU; the data order never depends on it.
        """

    def observe_labels(self, labels: Mapping[str, Tensor], draw: Draw) -> None:
        """Take in the labels of a training batch, before its loss is computed; by default nothing is.

        Args:
            labels: task -> label in batch layout.
            draw: result of :meth:`sample`, on the device of the labels.
        """

    def run_teachers(self, image: Tensor, mean: Sequence[float], std: Sequence[float]) -> DenseOutput | None:
        """Run the regularizer's own teacher networks on images; None if it has none, which is the default.

        The features of what is returned reach :meth:`compute_loss` among those of its output, NAME as teacher_NAME.

        Args:
            image: (B, 3, H, W), normalised by ``mean`` and ``std``.
            mean: RGB mean of the model's normalisation, for images scaled to 0..1.
            std: RGB standard deviation of that normalisation.
        """

    @abstractmethod
    def compute_loss(
        self,
        output: DenseOutput,
        labels: Mapping[str, Tensor],
        draw: Draw,
        teacher: Mapping[str, Tensor] | None = None,
    ) -> RegularizerOutput:
        """Compute the loss of a model's output.

        Args:
            output: a forward pass in training.
            labels: task -> label in batch layout, (B, H, W) or (B, c, H, W).
            draw: result of :meth:`sample`, on the device of the labels.
            teacher: task -> raw prediction (B, C, H, W) of a running mean of the model, NaN in padding, where
                :attr:`uses_teacher`; None while the loss is only reported.
        """

    @abstractmethod
    def summary(self) -> dict[str, float]:
        """Return diagnostics since the last call, name -> value.

        This synchronizes with the device: call it when logging, not at every step.
        """
