"""What runs in one training step between a batch and its losses, as one module."""

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
from mtcl.models import DenseModel, DenseOutput
from mtcl.regularizers import Regularizer, RegularizerOutput
from mtcl.regularizers.sampling import Draw

log = logging.getLogger(__name__)


class TrainingStep(nn.Module):
    """Model and regulariser together: what is compiled, and what DDP wraps, so that projectors are synchronised, too.

    It owns nothing: both live on as they are, under their own names.
    """

    def __init__(self, model: DenseModel, regularizer: Regularizer | None):
        super().__init__()
        self.model, self.regularizer = model, regularizer

    def forward(
        self, image: Tensor, labels: Mapping[str, Tensor], draw: Draw | None, contrasts: bool
    ) -> tuple[DenseOutput, RegularizerOutput | None]:
        """A normalised batch and its labels -> what the model says, what the regulariser says of it (None without a
        ``draw``). ``contrasts``: false where the regulariser only watches, and sends no gradient."""
        output = self.model(image)
        if self.regularizer is None or draw is None:
            return output, None
        # With weight 0 the model's graph, and so its gradient, stays untouched. Before the tasks' losses: backward goes
        # the other way round, and the contrast's gradient maps then fit below the peak of the tasks'.
        with torch.set_grad_enabled(contrasts), torch.autocast(image.device.type, enabled=False):
            return output, self.regularizer.compute_loss(output, labels, draw)


StepFunction = Callable[..., tuple[DenseOutput, RegularizerOutput | None]]


def wrap_parallel(step: TrainingStep, device: torch.device) -> nn.Module:
    """``step`` under DDP in a run of several processes; itself in one. On CUDA batch norms are then synchronised."""
    if distributed.world_size() == 1:
        return step
    if device.type == "cuda":  # torch has it on CUDA only
        step.model = convert_sync_batchnorm(step.model)  # timm's: torch's own drops what timm's norms do beside
    return DistributedDataParallel(
        step,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


class CompiledModule:
    """``module`` through ``torch.compile``; as it is, after one warning, where that fails. All ``parts`` of one model
    are compiled or none.

    The backward pass is compiled with the forward pass, not when it is first needed: there nobody could step in.
    """

    backend = "inductor"

    def __init__(self, module: StepFunction, parts: "Sequence[CompiledModule]" = ()):
        self.eager, self.parts = module, parts
        self.call: StepFunction = torch.compile(module, backend=self.backend)
        self.works = True

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not self.works:
            return self.eager(*args, **options)
        try:
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                return self.call(*args, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().split("\n")[0]
            log.warning("torch.compile failed (%s); training goes on without it, trainer.compile=false", reason)
            for part in (self, *self.parts):
                part.works = False
            return self.eager(*args, **options)


def broadcast_buffers(model: nn.Module) -> None:
    """Process 0's buffers for all: without SyncBatchNorm every process has running statistics of its own pictures."""
    if distributed.world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def no_gradient_sync(module: nn.Module) -> contextlib.AbstractContextManager:
    """DDP leaves the gradients of backward passes inside to this process: there is more to add to them."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()
