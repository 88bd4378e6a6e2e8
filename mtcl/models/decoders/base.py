"""The interface of a decoder: maps in, ``DenseOutput`` (``mtcl/models/output.py``) out."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from mtcl.errors import UserError
from mtcl.models.output import DenseOutput, Size


class Decoder(nn.Module, ABC):
    """Map a backbone's feature maps to the prediction of every task.

    Args:
        channels: number of channels of each backbone feature map, finest map first.
        strides: stride of each feature map, in pixels.
        tasks: task name -> number of channels of its prediction.

    A subclass takes its own options as further keyword arguments; they are the keys of its file in ``configs/decoder``.

    Attributes:
        feature_channels: feature name -> task -> C_t of the maps in :attr:`DenseOutput.features`.
        used_levels: indices of the backbone feature maps that the decoder reads; None: all of them.
        builds_features: False: :meth:`forward` may leave out features that cost time of their own.
        reads_labels: whether :meth:`forward` takes ``labels`` in training: task -> label in batch layout, of the image,
            as its last argument, None by default. Predictions in evaluation mode must not depend on them.
    """

    feature_channels: dict[str, dict[str, int]]
    used_levels: Collection[int] | None = None
    builds_features: bool = True
    reads_labels: bool = False

    def __init__(self, channels: Sequence[int], strides: Sequence[int], tasks: Mapping[str, int]):
        super().__init__()
        self.channels, self.strides, self.tasks = list(channels), list(strides), dict(tasks)

    @abstractmethod
    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Decode in training: predictions, features and intermediate predictions.

        Args:
            features: backbone maps (B, C_i, height / stride_i, width / stride_i), finest first.
            size: height and width of the predictions, which is the ``frame`` of the output.
        """

    def predict(self, features: list[Tensor], size: Size) -> dict[str, Tensor]:
        """Return task -> prediction (B, C, *size) alone, for inference and export.

        A decoder with heads that only training needs overrides this and leaves them out.
        """
        return self.forward(features, size).predictions

    def auxiliary_losses(self, output: DenseOutput, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return further losses of the decoder itself, which belong to no task: name -> weighted scalar.

        Args:
            output: of a model with this decoder, in training.
            labels: task -> label in batch layout, of the image.
        """
        del output, labels
        return {}

    def compute_task_errors(
        self, output: DenseOutput, labels: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Compute the decoder's own errors of tasks, whose means training adds to the tasks' losses.

        They are averaged over pixels and images by the rule of the losses, and count by the task's weight.

        Args:
            output: see :meth:`auxiliary_losses`.
            labels: see :meth:`auxiliary_losses`.

        Returns:
            task -> errors (B, h, w), and the bool mask (B, h, w) of those that count; by default none.
        """
        del output, labels
        return {}

    @abstractmethod
    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the decoder's parameters that serve more than one task."""

    def head_weight(self, task: str) -> nn.Parameter:
        """Return the first weight of a task's own layers before its logits, which its loss and its features depend on.

        Raises:
            UserError: the task has no such layers.
        """
        for name, parameter in self.named_parameters():
            parts = name.split(".")
            if task in parts and parameter.ndim > 1 and not any("logits" in part for part in parts):
                return parameter
        raise UserError(f"before its logits, this decoder has no layer that only {task} uses; choose another decoder")
