"""Depth."""

from torch import Tensor, nn

from mtcl.losses.masked import masked_mean


class DepthLoss(nn.Module):
    """Mean of |p - z| in metres over the pixels with a label (InvPT/losses/loss_functions.py:15-88).

    prediction: (B, 1, H, W), unconstrained; label: (B, 1, H, W) in metres, valid where positive and finite.
    """

    def forward(self, prediction: Tensor, label: Tensor) -> Tensor:
        valid = (label > 0) & label.isfinite()
        return masked_mean((prediction.float() - label.float()).abs(), valid)
