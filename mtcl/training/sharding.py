"""Where a model's weights are: whole in every process, or shared out among them (FSDP2).

Optimiser, clipping and running mean see plain tensors in both cases, and a checkpoint is the same file.
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
from torch.distributed.tensor import DTensor

from mtcl import distributed
from mtcl.models import DenseModel, EncoderDecoder
from mtcl.training.optimizers import ScheduledOptimizer
from mtcl.training.train_step import CompiledModule, StepFunction, TrainingStep, wrap_parallel


class ReplicatedWeights:
    """The weights of ``model``, all of them here. ``parameters`` are what is optimised, in the model's order."""

    def __init__(self, model: DenseModel):
        self.parameters: list[nn.Parameter] = list(model.parameters())

    def wrap_parallel(self, step: TrainingStep, device: torch.device) -> nn.Module:
        """What runs a training step of this process."""
        return wrap_parallel(step, device)

    def compile(self, module: nn.Module) -> StepFunction:
        """The module through ``torch.compile``."""
        return CompiledModule(module)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimiser of the model's parameters, fresh from its constructor, work on ``parameters``."""

    def collect_gradients(self) -> None:
        """After the last backward pass of a step: ``parameters`` have their gradients, meaned over the processes."""

    def global_norm(self, norm: Tensor) -> Tensor:
        """The 2-norm of a tensor or list, from that of its part here: of ``parameters`` or of their gradients."""
        return norm

    def state(self, model: DenseModel) -> dict[str, Any]:
        """The state dict of the model, or of a copy, for a checkpoint. All processes call it, process 0 has it."""
        return model.state_dict()

    def load(self, model: DenseModel, state: Mapping[str, Any]) -> None:
        model.load_state_dict(state)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state dict of the model's optimiser, as :meth:`state`."""
        return optimizer.state_dict()

    def load_optimizer(self, optimizer: ScheduledOptimizer, state: Mapping[str, Any]) -> None:
        optimizer.load(dict(state))

    def unsharded_copy(self, model: DenseModel) -> DenseModel:
        """The model, or a copy, to be evaluated: processes may run it a different number of times."""
        return model


class ShardedWeights(ReplicatedWeights):
    """Every process keeps a part (along the first axis) of each weight, gradient and moment; a block's weights are
    brought together while it runs. What is not large stays whole: buffers, the regulariser.

    ``copies``: models like ``model`` that are not run (the running mean), shared out likewise. Process 0's weights
    become those of all.
    """

    def __init__(self, model: DenseModel, device: torch.device, *copies: DenseModel):
        self.device = device
        self.whole = copy.deepcopy(model).cpu()  # a form to be filled; it has the layouts of a run of one process
        if device.type == "cuda":  # torch has it on CUDA only
            convert_sync_batchnorm(model)
        if any(not p.is_contiguous() for p in model.parameters()):  # FSDP takes no other; inputs do as well
            model.register_forward_pre_hook(_channels_last)
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nobody writes into them
        self.mesh = init_device_mesh(device.type, (distributed.world_size(),))
        self.units = fsdp_units(model)
        for one in (model, *copies):
            for parameter in one.parameters():
                parameter.data = parameter.data.contiguous()
            _same_start(one)
            for unit in self.units if one is model else ():
                fully_shard(unit, mesh=self.mesh)
            fully_shard(one, mesh=self.mesh)
        self.spread = _spread(model)
        self.parameters = [nn.Parameter(p.to_local().detach(), p.requires_grad) for p in self.spread]
        self.regularizer: nn.Module | None = None

    def wrap_parallel(self, step: TrainingStep, device: torch.device) -> nn.Module:
        self.regularizer = step.regularizer
        if self.regularizer is not None:
            _same_start(self.regularizer)
        return step

    def compile(self, module: nn.Module) -> StepFunction:
        """Each block by itself: FSDP's own work lies between them. The regulariser is not compiled."""
        parts: list[CompiledModule] = []
        for unit in self.units:
            parts.append(CompiledModule(unit.forward, parts=parts))
            unit.forward = parts[-1]
        return module

    @torch.no_grad()
    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        own = {id(p): q for p, q in zip(self.spread, self.parameters, strict=True)}
        for group in optimizer.param_groups:
            group["params"] = [own[id(p)] for p in group["params"]]
        for p in [p for p in optimizer.state if id(p) in own]:
            entry = optimizer.state.pop(p)
            optimizer.state[own[id(p)]] = {n: v.to_local() if isinstance(v, DTensor) else v for n, v in entry.items()}

    @torch.no_grad()
    def collect_gradients(self) -> None:
        for parameter, spread in zip(self.parameters, self.spread, strict=True):
            parameter.grad = None if spread.grad is None else spread.grad.to_local()
            spread.grad = None
        grads = [p.grad for p in self.regularizer.parameters() if p.grad is not None] if self.regularizer else []
        if grads:
            joined = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(joined)
            parts = (joined / distributed.world_size()).split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads)])

    def global_norm(self, norm: Tensor) -> Tensor:
        return (
            distributed.all_reduce_sum(norm.double().square()).sqrt().to(norm)
        )  # a square may be beyond single precision

    @torch.no_grad()
    def state(self, model: DenseModel) -> dict[str, Any]:
        state, like = model.state_dict(), self.whole.state_dict()
        for name, value in state.items():
            if isinstance(value, DTensor):
                state[name] = _gather_full(value, like[name])
        return state

    @torch.no_grad()
    def load(self, model: DenseModel, state: Mapping[str, Any]) -> None:
        self.whole.load_state_dict(state)
        for own, value in zip(_spread(model), self.whole.parameters(), strict=True):
            own.to_local().copy_(_part(value))
        for mine, its in zip(model.buffers(), self.whole.buffers(), strict=True):
            mine.copy_(its)

    @torch.no_grad()
    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        place = {id(p): index for index, p in enumerate(self.parameters)}
        order = [place[id(p)] for group in optimizer.param_groups for p in group["params"]]
        like = list(self.whole.parameters())

        def gathered(value: Any, index: int) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0:  # a count of steps
                return value
            spread = self.spread[index]
            whole = DTensor.from_local(
                value, self.mesh, spread.placements, run_check=False, shape=spread.shape, stride=spread.stride()
            )
            return _gather_full(whole, like[index])

        entries = state["state"].items()
        return {**state, "state": {i: {n: gathered(v, order[i]) for n, v in entry.items()} for i, entry in entries}}

    def load_optimizer(self, optimizer: ScheduledOptimizer, state: Mapping[str, Any]) -> None:
        def part(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0:
                return value
            return _part(value).clone(memory_format=torch.contiguous_format)

        entries = state["state"].items()
        optimizer.load({**state, "state": {i: {n: part(v) for n, v in entry.items()} for i, entry in entries}})

    @torch.no_grad()
    def unsharded_copy(self, model: DenseModel) -> DenseModel:
        """A plain model beside it, gone after its use: a sharded one would wait for all processes at every batch."""
        whole = copy.deepcopy(self.whole).to(self.device)
        for parameter, spread in zip(whole.parameters(), _spread(model), strict=True):
            parameter.copy_(spread.full_tensor())
        for mine, its in zip(whole.buffers(), model.buffers(), strict=True):
            mine.copy_(its)
        return whole


def fsdp_units(model: DenseModel, share: float = 0.01) -> list[nn.Module]:
    """The parts of a model whose weights are brought together, and freed again, by themselves: elements of its lists
    and sequences (blocks of a transformer or of a residual stage, convolutions with their norms) that have this share
    of all weights. All others come and go as one.

    They must run as wholes. A model that reaches into its backbone's blocks has only their MLPs.
    """
    inside = isinstance(model, EncoderDecoder)
    found = _blocks(model) if inside else (module for module in model.modules() if isinstance(module, Mlp))
    return [unit for unit in found if _count(unit) >= share * _count(model)]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost elements that have parts of their own."""
    for child in module.children():
        plain = type(child) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        if isinstance(module, nn.Sequential | nn.ModuleList) and not plain and len(list(child.children())):
            yield child
        else:
            yield from _blocks(child)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _channels_last(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)


def _same_start(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.detach(), src=0)


def _spread(model: nn.Module) -> list[Any]:
    """Its parameters, which are DTensors."""
    return list(model.parameters())


def _gather_full(value: DTensor, like: Tensor) -> Tensor:
    """On the CPU of process 0, laid out in memory as ``like``; ``like`` itself elsewhere."""
    whole = value.full_tensor()
    return torch.empty_like(like).copy_(whole) if distributed.rank() == 0 else like


def _part(whole: Tensor) -> Tensor:
    """What of a weight is this process's, as FSDP has it: a chunk along the first axis; nothing where there are too
    few."""
    parts = whole.chunk(distributed.world_size())
    return parts[distributed.rank()] if distributed.rank() < len(parts) else whole[:0]
