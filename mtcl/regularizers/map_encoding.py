"""Encode what predictions and labels of a task say in one layout, for networks that read either: MTPSL's and JTR's.

Classes are probabilities or one-hot, an edge is its probability, a normal is a unit vector, depth is in metres. Inverse
depth, from 0 to about 0.5, is multiplied by 20, so that what is meant for metres up to about 10 fits it, too.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mtcl.errors import UserError
from mtcl.tasks.base import Task

DEPTH_FACTORS = {"metres": 1.0, "inverse_depth": 20.0}  # prediction type -> factor of its values
_ENCODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "class": lambda x: x.softmax(dim=1),
    "probability": lambda x: x.sigmoid(),
    "direction": lambda x: F.normalize(x, dim=1, eps=1e-6),
    "metres": lambda x: x,
    "inverse_depth": lambda x: DEPTH_FACTORS["inverse_depth"] * x,
}


def check_encodable(tasks: Mapping[str, Task]) -> None:
    """Raise ``UserError`` if a task's predictions are of a type without an encoding."""
    for name, task in tasks.items():
        if task.prediction_type not in _ENCODERS:
            raise UserError(
                f"this regularizer encodes predictions of the types {', '.join(_ENCODERS)}, and those of {name} are "
                f"{task.prediction_type}; leave {name} out or choose another regularizer"
            )


def encode_prediction(task: Task, x: Tensor) -> Tensor:
    """Encode raw predictions (B, C, h, w), fp32."""
    return _ENCODERS[task.prediction_type](x)


def encode_label(task: Task, label: Tensor) -> Tensor:
    """Encode a batch's label as :func:`encode_prediction` does, one-hot for classes; zero where it is void."""
    if task.prediction_type == "class":  # no class is as large as the void
        return (label[:, None] == torch.arange(task.channels, device=label.device)[:, None, None]).float()
    values = torch.where(task.valid(label)[:, None], label.float(), 0.0)
    return DEPTH_FACTORS.get(task.prediction_type, 1.0) * values
