"""One loss per task: raw predictions (B, C, H, W) and a batch's label in, a scalar out.

All losses compute in fp32, give exactly no gradient at invalid pixels, return a zero that keeps the
graph when no pixel is valid, never make the host wait for the device, and use only operations that
are deterministic on CUDA (which rules out ``F.cross_entropy`` on maps). The formulas are those of the
literature; each file cites where it was read. The weights of the losses are in ``mtcl.tasks``.
"""

from mtcl.losses.cross_entropy import CrossEntropyLoss
from mtcl.losses.depth import DepthLoss
from mtcl.losses.edge import EdgeLoss
from mtcl.losses.normals import NormalsCosineLoss, NormalsLoss
from mtcl.losses.saliency import SaliencyLoss

__all__ = [
    "CrossEntropyLoss",
    "DepthLoss",
    "EdgeLoss",
    "NormalsCosineLoss",
    "NormalsLoss",
    "SaliencyLoss",
]
