"""AdamW for stacked parameters of which only some slices are in use at a step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mtcl.runtime import choose_float64_device


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW in which a slice (first axis) whose gradient is all zero takes no step at all.

    Equal to ``torch.optim.AdamW`` over separate parameters of which the unused ones have no gradient: no moment decays,
    no weight decay, no count. The projectors of source tasks that were not drawn stay as they are (and so does one
    that was drawn when none of its triplets was active). No host synchronisation.
    ``found_inf`` is a scalar on the device, as in torch's fused optimizers: where it is not 0 nothing takes a step.
    """

    _step_supports_amp_scaling = True  # torch's name for optimizers that read ``found_inf``

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        self.found_inf: Tensor | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return the result of ``closure``, if there is one."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return result

    def _step(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        column = (-1,) + (1,) * (parameter.ndim - 1)  # shape of a value per slice, to broadcast
        if not state:
            # Not named "step": torch would leave that on the CPU when a checkpoint is loaded.
            state["steps"] = torch.zeros(parameter.shape[0], device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        live = grad.reshape(grad.shape[0], -1).ne(0).any(dim=1)
        if self.found_inf is not None:
            live = live & (self.found_inf == 0)
        state["steps"] += live
        live = live.view(column)
        (beta1, beta2), lr = group["betas"], group["lr"]
        mean = torch.where(live, state["exp_avg"].lerp(grad, 1 - beta1), state["exp_avg"])
        square = state["exp_avg_sq"]
        square = torch.where(live, square * beta2 + grad * grad * (1 - beta2), square)
        state["exp_avg"], state["exp_avg_sq"] = mean, square
        scale1, scale2 = _correct_bias(state["steps"].clamp(min=1).view(column), lr, beta1, beta2, grad.dtype)
        denominator = square.sqrt() / scale2 + group["eps"]
        update = parameter * (1 - lr * group["weight_decay"]) - scale1 * mean / denominator
        parameter.copy_(torch.where(live, update, parameter))


def _correct_bias(step: Tensor, lr: float, beta1: float, beta2: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return lr / (1 - beta1 ** step) and sqrt(1 - beta2 ** step), whose differences cancel in single precision."""
    if choose_float64_device(step.device) != step.device:
        first, second = (
            -torch.expm1(step * math.log(beta)) if beta else torch.ones_like(step) for beta in (beta1, beta2)
        )
    else:
        first, second = (1 - beta ** step.double() for beta in (beta1, beta2))
    return (lr / first).to(dtype), second.sqrt().to(dtype)
