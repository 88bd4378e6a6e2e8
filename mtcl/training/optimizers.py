"""Optimisers: building them, and steps at scheduled learning rates."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from torch import nn

from mtcl import distributed
from mtcl.errors import ParameterError, UserError, first_line, suggest
from mtcl.models import Backbone, DenseModel
from mtcl.models.trainable import number_layers
from mtcl.schedules import Schedule

FUSED = ("adamw", "adam", "sgd")  # torch's fused versions, which can skip a step by a flag on the device
LOOKAHEAD = "lookahead_"  # timm's prefix: weights are pulled towards their running mean every few steps
# Optimisers that treat each number of a weight by itself, so that they may work on a part of it.
ELEMENTWISE = (
    *FUSED, "adabelief", "adadelta", "adagrad", "adamax", "adamwlegacy", "lion", "momentum", "nadam", "nadamw",
    "nesterov", "nesterovw", "radam", "radamw", "rmsprop", "rmsproptf", "rmsproptfw", "sgdw",
)  # fmt: skip
COUNTERS = ("step", "lookahead_step")  # entries of a parameter group that count steps


def build_optimizer(
    model: DenseModel,
    name: str,
    lr: float,
    backbone_lr: float | None = None,
    weight_decay: float = 0.0,
    momentum: float | None = 0.9,
    nesterov: bool | None = False,
    betas: Sequence[float] | None = (0.9, 0.999),
    eps: float | None = 1e-8,
    layer_decay: float | None = None,
    options: Mapping[str, Any] | None = None,
    is_sharded: bool = False,
) -> torch.optim.Optimizer:
    """Build the optimiser of a model by timm's factory.

    Vectors (biases, norm scales) have no weight decay. ``adamw``, ``adam`` and ``sgd`` are torch's fused ones, except
    on Apple's GPUs, where it is not sure that these heed the flag by which :class:`ScheduledOptimizer` skips a step
    without a wait for the device.

    Args:
        model: only parameters that require gradients are trained.
        name: any of ``timm.optim.list_optimizers()``, or that with ``lookahead_`` before it.
        lr: learning rate.
        backbone_lr: learning rate of the backbone; None: ``lr``.
        weight_decay: of matrices and kernels.
        momentum: of optimisers that have one; None: timm's value for this optimiser, as below.
        nesterov: of optimisers that have it; needs a momentum.
        betas: decays of the running means, of optimisers that have them: as many numbers as theirs.
        eps: of optimisers that have one.
        layer_decay: layer i of the backbone's L layers learns at its learning rate * ``layer_decay`` ** (L - i), as in
            timm's ``param_groups_layer_decay``, the decoder being layer L; above 0 up to 1. None: all layers learn at
            the same rate.
        options: further arguments of the optimiser's class.
        is_sharded: whether the optimiser will get a part of each weight only.

    Raises:
        ParameterError: the name or an option is unknown, or parameters do not go together.
    """
    optimizer_class = _find_class(name, is_sharded)
    groups = _build_groups(model, lr, backbone_lr, weight_decay, layer_decay)
    parameters = inspect.signature(optimizer_class).parameters
    settings = {"momentum": momentum, "nesterov": nesterov, "betas": betas, "eps": eps}
    arguments: dict[str, Any] = {n: value for n, value in settings.items() if value is not None and n in parameters}
    if nesterov and momentum == 0 and "momentum" in parameters:
        raise ParameterError("nesterov", "=true needs a momentum above 0")
    if "betas" in arguments:
        num_betas = get_optimizer_info(name.removeprefix(LOOKAHEAD)).num_betas
        arguments["betas"] = tuple(arguments["betas"])
        if len(arguments["betas"]) != num_betas:
            raise ParameterError(
                "betas", f"={list(arguments['betas'])} must be {num_betas} numbers for {name}, or null"
            )
    reserved = {"self", "params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable", *settings}
    for key in options or {}:
        if key not in parameters or key in reserved:
            choices = [other for other in parameters if other not in reserved]
            available = f"it has {', '.join(choices)}" if choices else "it has none"
            raise ParameterError(f"options.{key}", f" is not an option of {name}{suggest(key, choices)}; {available}")
    arguments |= options or {}
    if name in FUSED:
        arguments["fused"] = all(p.device.type != "mps" for group in groups for p in group["params"])
    if "deterministic" in parameters and not arguments.get("deterministic") and distributed.world_size() > 1:
        problem = f"={name} draws other numbers in each process; give it the option deterministic: true"
        raise ParameterError("name", problem)
    try:
        optimizer = create_optimizer_v2(groups, name, lr=lr, **arguments)
    except (ImportError, AssertionError, TypeError, ValueError) as error:
        raise ParameterError("name", f"={name} can't be built with these settings: {first_line(error)}") from error
    if name == "sgd" and optimizer.defaults["momentum"]:  # else a skipped first step would leave them uninitialised
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _find_class(name: str, is_sharded: bool) -> type[torch.optim.Optimizer]:
    """Return the class of an optimiser that can be trained with."""
    names, base = [str(listed) for listed in list_optimizers()], name.removeprefix(LOOKAHEAD)
    if base not in names:
        problem = f"={name} is not known{suggest(base, names)}; choose adamw, adam, sgd or another optimiser of timm"
        raise ParameterError("name", f"{problem} (timm.optim.list_optimizers() lists them)")
    if get_optimizer_info(base).second_order:
        raise ParameterError("name", f"={name} needs second derivatives, which are not computed; choose another one")
    if is_sharded and name not in ELEMENTWISE:
        problem = f"={name} needs whole weights, of which FSDP leaves a part in each process; train with DDP"
        raise ParameterError("name", f"{problem}, or choose one of {', '.join(ELEMENTWISE)}")
    try:
        return get_optimizer_class(base, bind_defaults=False)  # type: ignore[return-value]
    except (ImportError, AssertionError) as error:
        raise ParameterError("name", f"={name} can't be used here: {first_line(error)}") from error


def _build_groups(
    model: DenseModel, lr: float, backbone_lr: float | None, weight_decay: float, layer_decay: float | None
) -> list[dict[str, Any]]:
    """Return parameter groups by learning rate and weight decay; their order is that of the moments in checkpoints."""
    backbone = {id(p) for p in model.backbone_parameters()}
    factors = {} if layer_decay is None else _compute_layer_factors(model.backbone, layer_decay)
    buckets: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (id(parameter) in backbone, parameter.ndim > 1, factors.get(id(parameter), 1.0))
            buckets.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": (lr if backbone_lr is None or not is_backbone else backbone_lr) * factor,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (is_backbone, decays, factor), parameters in buckets.items()
    ]


def _compute_layer_factors(backbone: Backbone, layer_decay: float) -> dict[int, float]:
    """Return the factor of the learning rate by a parameter's id."""
    try:
        numbers = number_layers(backbone)
    except UserError as error:
        raise ParameterError("layer_decay", f"={layer_decay} needs layers: {error}; use null") from error
    num_layers = max(numbers.values()) + 1
    return {id(backbone.net.get_parameter(name)): layer_decay ** (num_layers - i) for name, i in numbers.items()}


class ScheduledOptimizer:
    """An optimiser with a learning-rate schedule.

    Args:
        optimizer: its learning rates are the base rates.
        schedule: step -> factor of the base rates.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule):
        self.optimizer, self.schedule = optimizer, schedule
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        # What torch's fused optimisers and MaskedAdamW have: they read the values of a GradScaler on the device.
        self.reads_flag = getattr(optimizer, "_step_supports_amp_scaling", False)

    def step(self, step: int, skip: torch.Tensor | None = None) -> None:
        """Take step number ``step``, unless ``skip`` is 1.0 on the device.

        The host does not read ``skip``, except for optimisers that can't: neither fused nor a MaskedAdamW.
        """
        if not self.reads_flag and skip is not None and skip.item():
            return
        factor = self.schedule(step)
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs):
            group["lr"] = base_lr * factor
        if self.reads_flag:  # the attributes where these expect the values of a GradScaler; others refuse to have them
            self.optimizer.grad_scale, self.optimizer.found_inf = None, skip  # type: ignore[attr-defined]
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return moments and settings: tensors and plain containers, without settings that are types of tensors."""
        state = self.optimizer.state_dict()
        groups = [
            {key: value for key, value in group.items() if not isinstance(value, torch.dtype)}
            for group in state["param_groups"]
        ]
        return {**state, "param_groups": groups}

    def load(self, state: dict[str, Any]) -> None:
        """Load the moments of a state dict; learning rate, weight decay and the like stay those of this optimiser."""
        current, saved = self.optimizer.param_groups, state["param_groups"]
        groups = [
            {**group, **{key: other[key] for key in COUNTERS if key in other}, "params": other["params"]}
            for group, other in zip(current, saved, strict=True)
        ]
        self.optimizer.load_state_dict({**state, "param_groups": groups})
        for parameter, entry in getattr(self.optimizer, "_base_optimizer", self.optimizer).state.items():
            for name, value in entry.items():  # fused steps need moments in the memory format of their parameter
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    entry[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        self.optimizer.zero_grad(set_to_none=True)
