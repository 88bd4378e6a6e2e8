"""Schedules: learning rates over the course of a training, and the linear warm-up that lambda shares with them."""

import math
from collections.abc import Callable

from mtcl.errors import ParameterError

Schedule = Callable[[int], float]  # step -> factor of the learning rate


def build_schedule(
    name: str,
    max_steps: int,
    warmup_steps: int = 0,
    power: float = 0.9,
    step_size: int | None = None,
    gamma: float = 0.5,
) -> Schedule:
    """Build a learning-rate schedule.

    Args:
        name: ``poly``: (1 - step / max_steps) ** power; ``cosine``: half a cosine to zero; ``step``:
            gamma ** (step // step_size), as ``torch.optim.lr_scheduler.StepLR``; or ``constant``.
        max_steps: length of the training.
        warmup_steps: over so many steps the factor grows linearly; 0: none.
        power: of ``poly``.
        step_size: of ``step``: number of steps between two drops; ``step`` needs it.
        gamma: of ``step``: factor of each drop.

    Returns:
        step -> factor of the learning rate.

    Raises:
        ParameterError: the name is unknown, or ``step`` has no ``step_size``.
    """
    if name not in ("poly", "cosine", "step", "constant"):
        raise ParameterError("name", f"={name} is not known; choose poly, cosine, step or constant")
    if name == "step" and step_size is None:
        raise ParameterError("step_size", "=null: name=step needs the number of steps between two drops")

    def factor(step: int) -> float:
        progress = min(step / max(max_steps, 1), 1.0)
        decay = {
            "poly": (1 - progress) ** power,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "step": gamma ** (step // (step_size or max_steps or 1)),
            "constant": 1.0,
        }[name]
        return decay * linear_warmup(step, warmup_steps)

    return factor


def linear_warmup(step: int, warmup_steps: int) -> float:
    """Return a factor that grows linearly from 1 / ``warmup_steps`` at step 0 to 1; 1 where ``warmup_steps`` is 0."""
    return min((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
