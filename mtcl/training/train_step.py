"""The forward pass of a training step as one module: compiled, or in several processes."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._functorch.config
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtcl import distributed
from mtcl.models import DenseModel, DenseOutput, EncodedImage
from mtcl.regularizers import Regularizer, RegularizerOutput
from mtcl.regularizers.sampling import Draw

log = logging.getLogger(__name__)


class TrainingStep(nn.Module):
    """Model and regulariser in one module, which is compiled or wrapped in DDP.

    So the projectors are synchronised, too. Checkpoints hold the two separately.
    """

    def __init__(self, model: DenseModel, regularizer: Regularizer | None):
        super().__init__()
        self.model, self.regularizer = model, regularizer
        if regularizer is None:
            model.leave_out_features()

    def forward(
        self,
        image: Tensor | EncodedImage,
        labels: Mapping[str, Tensor],
        draw: Draw | None,
        needs_grad: bool,
        teacher: DenseOutput | None = None,
    ) -> tuple[DenseOutput, RegularizerOutput | None]:
        """Run the model, and the regulariser on its output.

        Args:
            image: normalised batch (B, 3, H, W), or a frozen backbone's maps of it.
            labels: task -> label in batch layout.
            draw: the regulariser's random choices; None: without it.
            needs_grad: False where the regulariser's loss is only reported.
            teacher: the teacher's predictions and features, for a regulariser that uses them.

        Returns:
            the model's output and the regulariser's, None without a ``draw``.
        """
        output = self.model(image, labels) if self.model.reads_labels else self.model(image)
        if self.regularizer is None or draw is None:
            return output, None
        # Where lambda is 0 the model's graph, and so its gradient, stays unchanged. This comes before the
        # tasks' losses: the backward pass has the reverse order, and the contrast's gradient maps then fit below the
        # peak of the tasks'.
        with torch.set_grad_enabled(needs_grad), torch.autocast(output.device.type, enabled=False):
            if teacher is None:
                return output, self.regularizer.compute_loss(output, labels, draw)
            features = {f"teacher_{name}": maps for name, maps in teacher.features.items()}
            with_teacher = output._replace(features={**output.features, **features})
            return output, self.regularizer.compute_loss(with_teacher, labels, draw, teacher.predictions)


StepFunction = Callable[..., tuple[DenseOutput, RegularizerOutput | None]]


def wrap_parallel(step: TrainingStep, device: torch.device) -> nn.Module:
    """Wrap ``step`` in DDP, with synchronised batch norms on CUDA; in a run of one process return it as it is."""
    if distributed.world_size() == 1:
        return step
    if device.type == "cuda":  # torch supports it on CUDA only
        # timm's function: torch's own drops the activations of timm's norms
        step.model = convert_sync_batchnorm(step.model)
    return DistributedDataParallel(
        step,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def _compile_errors() -> tuple[type[Exception], ...]:
    """Return what torch raises where it can't compile: subclasses of one class, and those that it passes on unchanged.

    See ``torch/_dynamo/convert_frame.py``. An assertion or an index that is the module's mistake fails eagerly, too.
    """
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

    dynamo = torch._dynamo.exc.TorchDynamoException
    return dynamo, GuardOnDataDependentSymNode, ConstraintViolationError, AssertionError, IndexError


class CompiledModule:
    """Runs a module through ``torch.compile``, or eagerly after one warning where that fails.

    The backward pass is compiled with the forward pass, not when it is first needed, where its failure could not be
    caught.

    Args:
        module: the module or function.
        parts: the compiled modules of the same model; where one fails, all are run eagerly.
    """

    backend = "inductor"

    def __init__(self, module: StepFunction, parts: "Sequence[CompiledModule]" = ()):
        self.eager, self.parts = module, parts
        self.call: StepFunction = torch.compile(module, backend=self.backend)
        self.works = True

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run the module."""
        if not self.works:
            return self.eager(*args, **options)
        try:
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                return self.call(*args, **options)
        except _compile_errors() as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            log.warning("torch.compile failed (%s); training continues without it", reason)
            for part in (self, *self.parts):
                part.works = False
            return self.eager(*args, **options)


def broadcast_buffers(model: nn.Module) -> None:
    """Copy process 0's buffers to all: without SyncBatchNorm every process has running statistics of its own images."""
    if distributed.world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def no_gradient_sync(module: nn.Module) -> contextlib.AbstractContextManager:
    """Return a context in which DDP does not average gradients, as more batches of the step will add to them."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()
