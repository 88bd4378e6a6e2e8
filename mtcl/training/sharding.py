"""Hold a model's weights replicated in every process, or sharded among them (FSDP2).

Optimiser, clipping and averaging use plain tensors in both cases, and the checkpoint is the same file.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import Mlp, convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor

from mtcl import distributed
from mtcl.models import DenseModel, EncoderDecoder
from mtcl.training.optimizers import ScheduledOptimizer
from mtcl.training.train_step import CompiledModule, StepFunction, TrainingStep, wrap_parallel


class ReplicatedWeights:
    """The weights of a model, all of them in every process.

    ``parameters`` are the tensors to optimise, in the model's order.
    """

    def __init__(self, model: DenseModel):
        self.parameters: list[nn.Parameter] = list(model.parameters())

    def wrap_parallel(self, step: TrainingStep, device: torch.device) -> nn.Module:
        """Return the module that runs this process's training step."""
        return wrap_parallel(step, device)

    def compile(self, module: nn.Module) -> StepFunction:
        """Return the module through ``torch.compile``."""
        return CompiledModule(module)

    def build_scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Return a gradient scaler for fp16. All processes skip the same steps, as DDP averages the gradients."""
        return torch.amp.GradScaler(device.type)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Make a newly constructed optimiser of the model's parameters work on ``parameters``."""

    def collect_gradients(self) -> None:
        """Give ``parameters`` their gradients, averaged over the processes, after a step's last backward pass."""

    def global_norm(self, norm: Tensor) -> Tensor:
        """Return the 2-norm over all processes from that of this process's part."""
        return norm

    def state(self, model: DenseModel) -> dict[str, Any]:
        """Return the full state dict of the model, or of a copy. All processes must call it, process 0 gets it."""
        return model.state_dict()

    def load(self, model: DenseModel, state: Mapping[str, Any]) -> None:
        """Load a full state dict into the model, or a copy of it."""
        model.load_state_dict(state)

    def optimizer_state(self, optimizer: ScheduledOptimizer) -> dict[str, Any]:
        """Return the full state dict of the model's optimiser. All processes must call it, process 0 gets it."""
        return optimizer.state_dict()

    def load_optimizer(self, optimizer: ScheduledOptimizer, state: Mapping[str, Any]) -> None:
        """Load a full state dict into the model's optimiser."""
        optimizer.load(dict(state))

    def unsharded_copy(self, model: DenseModel) -> DenseModel:
        """Return the model, or a copy, that processes may run a different number of times."""
        return model


class ShardedWeights(ReplicatedWeights):
    """The weights of a model, of which each process keeps a part along the first axis.

    So it does of gradients and moments. A block's weights are gathered while it runs. Buffers and the regulariser,
    which are small, are replicated.

    Args:
        model: sharded in place; process 0's weights become those of all processes.
        device: of this process.
        copies: models like ``model`` that are not run (the averaged weights), sharded likewise.
    """

    def __init__(self, model: DenseModel, device: torch.device, *copies: DenseModel):
        self.device = device
        self.template = copy.deepcopy(model).cpu()  # has the shapes and memory formats of a single process
        if device.type == "cuda":  # torch supports it on CUDA only
            convert_sync_batchnorm(model)
        if any(
            not p.is_contiguous() for p in model.parameters()
        ):  # FSDP needs contiguous ones; the inputs keep the format
            model.register_forward_pre_hook(_channels_last)
        warnings.filterwarnings(
            "ignore", message="FSDP2-wrapped module .* returned a view"
        )  # these views are not written to
        self.mesh = init_device_mesh(device.type, (distributed.world_size(),))
        self.units = fsdp_units(model)
        for module in (model, *copies):
            for parameter in module.parameters():
                parameter.data = parameter.data.contiguous()
            _broadcast_state(module)
            for unit in self.units if module is model else ():
                fully_shard(unit, mesh=self.mesh)
            fully_shard(module, mesh=self.mesh)
        self.sharded = _sharded_parameters(model)
        self.parameters = [nn.Parameter(p.to_local().detach(), p.requires_grad) for p in self.sharded]
        self.regularizer: nn.Module | None = None

    def wrap_parallel(self, step: TrainingStep, device: torch.device) -> nn.Module:  # noqa: ARG002
        """Return the step itself: FSDP works inside the model. The regulariser starts as that of process 0."""
        self.regularizer = step.regularizer
        if self.regularizer is not None:
            _broadcast_state(self.regularizer)
        return step

    def compile(self, module: nn.Module) -> StepFunction:
        """Compile each block by itself, as FSDP's own work lies between them. The regulariser is not compiled."""
        parts: list[CompiledModule] = []
        for unit in self.units:
            parts.append(CompiledModule(unit.forward, parts=parts))
            unit.forward = parts[-1]
        return module

    def build_scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Return a gradient scaler for fp16, by which all processes skip a step that one has to skip."""
        return ShardedGradScaler(device.type)

    @torch.no_grad()
    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Replace the model's sharded parameters in the optimiser by this process's parts."""
        local = {id(p): q for p, q in zip(self.sharded, self.parameters, strict=True)}
        for group in optimizer.param_groups:
            group["params"] = [local[id(p)] for p in group["params"]]
        for p in [p for p in optimizer.state if id(p) in local]:
            entry = optimizer.state.pop(p)
            optimizer.state[local[id(p)]] = {n: v.to_local() if isinstance(v, DTensor) else v for n, v in entry.items()}

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Take the gradients from the sharded parameters; average those of the regulariser."""
        for parameter, sharded in zip(self.parameters, self.sharded, strict=True):
            parameter.grad = None if sharded.grad is None else sharded.grad.to_local()
            sharded.grad = None
        grads = [p.grad for p in self.regularizer.parameters() if p.grad is not None] if self.regularizer else []
        if grads:
            joined = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(joined)
            parts = (joined / distributed.world_size()).split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads)])

    def global_norm(self, norm: Tensor) -> Tensor:
        """Return the 2-norm over all processes."""
        return (
            distributed.all_reduce_sum(norm.double().square()).sqrt().to(norm)
        )  # a square may be beyond single precision

    @torch.no_grad()
    def state(self, model: DenseModel) -> dict[str, Any]:
        """Return the model's full state dict, on the CPU of process 0."""
        state, like = model.state_dict(), self.template.state_dict()
        for name, value in state.items():
            if isinstance(value, DTensor):
                state[name] = _gather_full(value, like[name])
        return state

    @torch.no_grad()
    def load(self, model: DenseModel, state: Mapping[str, Any]) -> None:
        """Load a full state dict: each process takes its part."""
        self.template.load_state_dict(state)
        for parameter, value in zip(_sharded_parameters(model), self.template.parameters(), strict=True):
            parameter.to_local().copy_(_local_part(value))
        for target, source in zip(model.buffers(), self.template.buffers(), strict=True):
            target.copy_(source)

    @torch.no_grad()
    def optimizer_state(self, optimizer: ScheduledOptimizer) -> dict[str, Any]:
        """Return the optimiser's full state dict, on the CPU of process 0."""
        state = optimizer.state_dict()
        index_of = {id(p): index for index, p in enumerate(self.parameters)}
        order = [index_of[id(p)] for group in optimizer.optimizer.param_groups for p in group["params"]]
        like = list(self.template.parameters())

        def gather(value: Any, index: int) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0:  # a count of steps
                return value
            sharded = self.sharded[index]
            full = DTensor.from_local(
                value, self.mesh, sharded.placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
            )
            return _gather_full(full, like[index])

        entries = state["state"].items()
        return {**state, "state": {i: {n: gather(v, order[i]) for n, v in entry.items()} for i, entry in entries}}

    def load_optimizer(self, optimizer: ScheduledOptimizer, state: Mapping[str, Any]) -> None:
        """Load a full state dict: each process takes its part."""

        def part(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0:
                return value
            return _local_part(value).clone(memory_format=torch.contiguous_format)

        entries = state["state"].items()
        optimizer.load({**state, "state": {i: {n: part(v) for n, v in entry.items()} for i, entry in entries}})

    @torch.no_grad()
    def unsharded_copy(self, model: DenseModel) -> DenseModel:
        """Return an unsharded copy; evaluating the sharded model would synchronise all processes at every batch."""
        full = copy.deepcopy(self.template).to(self.device)
        for parameter, sharded in zip(full.parameters(), _sharded_parameters(model), strict=True):
            parameter.copy_(sharded.full_tensor())
        for target, source in zip(full.buffers(), model.buffers(), strict=True):
            target.copy_(source)
        return full


def fsdp_units(model: DenseModel, min_fraction: float = 0.01) -> list[nn.Module]:
    """Return the submodules whose weights FSDP gathers, and frees again, one by one; all other weights form one group.

    These are the elements of its lists and sequences (blocks of a transformer or of a residual stage, convolutions with
    their norms) with at least ``min_fraction`` of all weights. Each must be run by calling it. In a model that runs
    parts of its backbone's blocks they are only the blocks' MLPs.
    """
    calls_blocks = isinstance(model, EncoderDecoder)
    units = _blocks(model) if calls_blocks else (module for module in model.modules() if isinstance(module, Mlp))
    return [unit for unit in units if _count(unit) >= min_fraction * _count(model)]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost elements of lists and sequences that have submodules."""
    for child in module.children():
        plain = type(child) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        if isinstance(module, nn.Sequential | nn.ModuleList) and not plain and len(list(child.children())):
            yield child
        else:
            yield from _blocks(child)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _channels_last(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    image, *labels = inputs
    return (image.contiguous(memory_format=torch.channels_last), *labels)


def _broadcast_state(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.detach(), src=0)


def _sharded_parameters(model: nn.Module) -> list[Any]:
    """Return the parameters, which are DTensors."""
    return list(model.parameters())


def _gather_full(value: DTensor, like: Tensor) -> Tensor:
    """Return the full tensor on the CPU of process 0, in the memory format of ``like``; ``like`` itself elsewhere."""
    full = value.full_tensor()
    return torch.empty_like(like).copy_(full) if distributed.rank() == 0 else like


def _local_part(weight: Tensor) -> Tensor:
    """Return this process's part of a weight as FSDP shards it along the first axis; it may be empty."""
    parts = weight.chunk(distributed.world_size())
    return parts[distributed.rank()] if distributed.rank() < len(parts) else weight[:0]
