"""Optimisers and learning-rate schedules, from plain numbers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mtcl.errors import UserError
from mtcl.models import DenseModel
from mtcl.regularizers.weighting import linear_warmup

Schedule = Callable[[int], float]  # of the step: a factor of the learning rate, or the regulariser's lambda


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
) -> torch.optim.Optimizer:
    """AdamW, Adam (both with ``betas`` and ``eps``) or SGD (``momentum`` and ``nesterov``), with a learning rate of its
    own for the backbone (None: the same).

    Vectors (biases, norm scales) take no weight decay. All are torch's fused ones, which alone take the flag that a
    step is to be skipped (:class:`ScheduledOptimizer`) without a wait for the device.
    """
    backbone = {id(p) for p in model.backbone_parameters()}
    buckets: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            buckets.setdefault((id(parameter) in backbone, parameter.ndim > 1), []).append(parameter)
    groups = [
        {
            "params": parameters,
            "lr": lr if backbone_lr is None or not is_backbone else backbone_lr,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (is_backbone, decays), parameters in buckets.items()
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
    if name == "sgd":
        if nesterov and not momentum:
            raise UserError("optimizer.nesterov=true needs optimizer.momentum above 0")
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
        if momentum:  # else a skipped first step would leave them as the memory happened to be
            for parameter in (p for bucket in buckets.values() for p in bucket):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    raise UserError(f"optimizer.name={name} is not known; choose adamw, adam or sgd")


def build_schedule(name: str, max_steps: int, warmup_steps: int = 0, power: float = 0.9) -> Schedule:
    """``poly``: (1 - step / max_steps) ** power; ``cosine``: half a cosine to zero; ``constant``. All after a linear
    warm-up."""
    if name not in ("poly", "cosine", "constant"):
        raise UserError(f"schedule.name={name} is not known; choose poly, cosine or constant")

    def factor(step: int) -> float:
        progress = min(step / max(max_steps, 1), 1.0)
        decay = {
            "poly": (1 - progress) ** power,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "constant": 1.0,
        }[name]
        return decay * linear_warmup(step, warmup_steps)

    return factor


class ScheduledOptimizer:
    """An optimiser whose learning rates are its base rates times the schedule's factor of the step."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule):
        self.optimizer, self.schedule = optimizer, schedule
        self.base = [group["lr"] for group in optimizer.param_groups]

    def step(self, step: int, skip: torch.Tensor | None = None) -> None:
        """``skip``: 1.0 on the device where nothing is to happen; the host does not ask."""
        factor = self.schedule(step)
        for group, base in zip(self.optimizer.param_groups, self.base):
            group["lr"] = base * factor
        # The names under which fused optimisers (and SliceAdamW) expect what a GradScaler would tell them.
        self.optimizer.grad_scale, self.optimizer.found_inf = None, skip  # type: ignore[attr-defined]
        self.optimizer.step()

    def load(self, state: dict[str, Any]) -> None:
        """The moments of a state dict; learning rate, weight decay and the like stay those of this optimiser."""
        own, saved = self.optimizer.param_groups, state["param_groups"]
        groups = [{**group, "params": its["params"]} for group, its in zip(own, saved, strict=True)]
        self.optimizer.load_state_dict({**state, "param_groups": groups})
        for parameter, entry in self.optimizer.state.items():
            for name, value in entry.items():  # laid out as by a run in another memory format: fused steps mix them up
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    entry[name] = torch.empty_like(parameter).copy_(value)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
