"""Surface normals."""

import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.losses.masked import masked_mean


class NormalsLoss(nn.Module):
    """Mean over valid pixels of sum_c |p_c / |p| - n_c|, a sum over the three channels
    (InvPT/losses/loss_functions.py:15-88).

    prediction: (B, 3, H, W), any length; label: unit vectors (B, 3, H, W), the zero vector where void.
    """

    def forward(self, prediction: Tensor, label: Tensor) -> Tensor:
        valid = (label != 0).any(dim=1)
        # The floor bounds the gradient of a head that starts at zero.
        direction = F.normalize(prediction.float(), dim=1, eps=1e-6)
        error = (direction - label.float()).abs().sum(dim=1)
        return masked_mean(error, valid)
