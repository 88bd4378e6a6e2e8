"""L1 loss of surface normals."""

import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.losses.masked import masked_mean


class NormalsLoss(nn.Module):
    """Mean over valid pixels of sum_c |p_c / |p| - n_c|, the sum being over the three channels.

    Source: InvPT/losses/loss_functions.py:15-88.
    """

    def forward(self, prediction: Tensor, label: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            prediction: vectors (B, 3, H, W) of any length.
            label: unit vectors (B, 3, H, W), the zero vector where void.

        Returns:
            Scalar loss.
        """
        valid = (label != 0).any(dim=1)
        # The floor bounds the gradient of a head that starts at zero.
        direction = F.normalize(prediction.float(), dim=1, eps=1e-6)
        error = (direction - label.float()).abs().sum(dim=1)
        return masked_mean(error, valid)
