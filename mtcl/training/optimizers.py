"""Optimisers: building them, and steps at scheduled learning rates."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mtcl.errors import ParameterError, UserError
from mtcl.models import Backbone, DenseModel
from mtcl.models.trainable import number_layers
from mtcl.schedules import Schedule


def build_optimizer(
    model: DenseModel,
    name: str,
    lr: float,
    backbone_lr: float | None = None,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    nesterov: bool = False,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    layer_decay: float | None = None,
) -> torch.optim.Optimizer:
    """Build the optimiser of a model.

    Vectors (biases, norm scales) have no weight decay. All optimisers are torch's fused ones: only these can skip a
    step (:class:`ScheduledOptimizer`) without a wait for the device.

    Args:
        model: only parameters that require gradients are trained.
        name: ``adamw``, ``adam`` or ``sgd``.
        lr: learning rate.
        backbone_lr: learning rate of the backbone; None: ``lr``.
        weight_decay: of matrices and kernels.
        momentum: of ``sgd``.
        nesterov: of ``sgd``; needs a momentum.
        betas: of ``adamw`` and ``adam``.
        eps: of ``adamw`` and ``adam``.
        layer_decay: layer i of the backbone's L layers learns at its learning rate * ``layer_decay`` ** (L - i), as in
            timm's ``param_groups_layer_decay``, the decoder being layer L; above 0 up to 1. None: all layers learn at
            the same rate.

    Raises:
        ParameterError: the name is unknown, or parameters do not go together.
    """
    backbone = {id(p) for p in model.backbone_parameters()}
    factors = {} if layer_decay is None else _compute_layer_factors(model.backbone, layer_decay)
    buckets: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (id(parameter) in backbone, parameter.ndim > 1, factors.get(id(parameter), 1.0))
            buckets.setdefault(key, []).append(parameter)
    groups = [
        {
            "params": parameters,
            "lr": (lr if backbone_lr is None or not is_backbone else backbone_lr) * factor,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (is_backbone, decays, factor), parameters in buckets.items()
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
    if name == "sgd":
        if nesterov and not momentum:
            raise ParameterError("nesterov", "=true needs a momentum above 0")
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
        if momentum:  # else a skipped first step would leave them uninitialised
            for parameter in (p for bucket in buckets.values() for p in bucket):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    raise ParameterError("name", f"={name} is not known; choose adamw, adam or sgd")


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

    def step(self, step: int, skip: torch.Tensor | None = None) -> None:
        """Take step number ``step``, unless ``skip`` is 1.0 on the device; the host does not read it."""
        factor = self.schedule(step)
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs):
            group["lr"] = base_lr * factor
        # The attributes where fused optimisers (and MaskedAdamW) expect the values of a GradScaler.
        self.optimizer.grad_scale, self.optimizer.found_inf = None, skip  # type: ignore[attr-defined]
        self.optimizer.step()

    def load(self, state: dict[str, Any]) -> None:
        """Load the moments of a state dict; learning rate, weight decay and the like stay those of this optimiser."""
        current, saved = self.optimizer.param_groups, state["param_groups"]
        groups = [{**group, "params": other["params"]} for group, other in zip(current, saved, strict=True)]
        self.optimizer.load_state_dict({**state, "param_groups": groups})
        for parameter, entry in self.optimizer.state.items():
            for name, value in entry.items():  # fused steps need moments in the memory format of their parameter
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    entry[name] = torch.empty_like(parameter).copy_(value)

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        self.optimizer.zero_grad(set_to_none=True)
