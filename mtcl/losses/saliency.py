"""Class-balanced cross-entropy of saliency."""

import torch
from torch import Tensor, nn

from mtcl.losses.masked import masked_fraction, masked_mean, pixel_cross_entropy


class SaliencyLoss(nn.Module):
    """Two-logit cross-entropy, balanced per batch (the batch of all processes together).

    With N valid pixels in the batch, N_neg of them 0: w_pos = N_neg / N, w_neg = 1 - w_pos; the
    weighted sum is divided by N, not by the sum of the weights. A batch of one class only therefore
    has loss 0. With ``image_weight`` each image is balanced by itself.

    Source: InvPT/losses/loss_functions.py:15-88.
    """

    def forward(self, prediction: Tensor, label: Tensor, image_weight: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            prediction: logits (B, 2, H, W).
            label: int64 (B, H, W), 0, 1, or 255 where void.
            image_weight: of each image's mean, (B,), see :func:`~mtcl.losses.masked.masked_mean`; None: the pixels of
                all images count alike.

        Returns:
            Scalar loss.
        """
        cross_entropy, valid = pixel_cross_entropy(prediction, label)
        negative = label == 0
        if image_weight is None:
            positive_weight = masked_fraction(negative, valid)
        else:
            counts = valid.sum(dim=(1, 2), keepdim=True).clamp(min=1)
            positive_weight = (negative & valid).sum(dim=(1, 2), keepdim=True) / counts
        weight = torch.where(negative, 1 - positive_weight, positive_weight)
        return masked_mean(weight * cross_entropy, valid, image_weight)
