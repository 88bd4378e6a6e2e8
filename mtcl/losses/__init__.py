"""One loss per task: raw predictions (B, C, H, W) and a batch's label in, a scalar out.

All of them compute in fp32, give exactly no gradient at invalid pixels, return a zero that keeps the graph
when no pixel is valid, never make the host wait for the device, and use only operations that are
deterministic on CUDA (which rules out ``F.cross_entropy`` on maps). The formulas are the field's; each file
names where it was read. Their weights are the tasks' (``mtcl.tasks``).
"""

from typing import Any

from torch import nn

from mtcl.errors import UserError
from mtcl.losses.cross_entropy import CrossEntropyLoss
from mtcl.losses.depth import DepthLoss
from mtcl.losses.edge import EdgeLoss
from mtcl.losses.normals import NormalsLoss
from mtcl.losses.saliency import SaliencyLoss

LOSSES: dict[str, type[nn.Module]] = {
    "semseg": CrossEntropyLoss,
    "human_parts": CrossEntropyLoss,
    "sal": SaliencyLoss,
    "depth": DepthLoss,
    "normals": NormalsLoss,
    "edge": EdgeLoss,
}


def build_loss(task: str, **options: Any) -> nn.Module:
    """The loss of the task of that name; ``options`` go to its constructor. ``UserError``: an unknown name.

    >>> build_loss("edge", positive_weight=0.8)
    EdgeLoss()
    """
    if task not in LOSSES:
        raise UserError(f"No loss for a task {task!r}: choose one of {', '.join(LOSSES)}.")
    return LOSSES[task](**options)


__all__ = [
    "LOSSES",
    "CrossEntropyLoss",
    "DepthLoss",
    "EdgeLoss",
    "NormalsLoss",
    "SaliencyLoss",
    "build_loss",
]
