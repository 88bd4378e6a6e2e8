"""Class-balanced cross-entropy of saliency."""

import torch
from torch import Tensor, nn

from mtcl.losses.masked import masked_fraction, masked_mean, pixel_cross_entropy


class SaliencyLoss(nn.Module):
    """Two-logit cross-entropy, balanced per batch (the batch of all processes together).

    With N valid pixels in the batch, N_neg of them 0: w_pos = N_neg / N, w_neg = 1 - w_pos; the
    weighted sum is divided by N, not by the sum of the weights. A batch of one class only therefore
    has loss 0.

    Source: InvPT/losses/loss_functions.py:15-88.
    """

    def forward(self, prediction: Tensor, label: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            prediction: logits (B, 2, H, W).
            label: int64 (B, H, W), 0, 1, or 255 where void.

        Returns:
            Scalar loss.
        """
        cross_entropy, valid = pixel_cross_entropy(prediction, label)
        positive_weight = masked_fraction(label == 0, valid)
        weight = torch.where(label == 0, 1 - positive_weight, positive_weight)
        return masked_mean(weight * cross_entropy, valid)
