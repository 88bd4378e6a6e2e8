"""Weighted binary cross-entropy of edges."""

import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.losses.masked import VOID, masked_mean


class EdgeLoss(nn.Module):
    """Mean over valid pixels of -(w y log s(p) + (1 - w) (1 - y) log(1 - s(p))), s the sigmoid.

    Source: InvPT/losses/loss_functions.py:15-88, which writes it as pos_weight w / (1 - w), then
    times 1 - w.

    Args:
        positive_weight: w; 0.95 in most of the literature, 0.8 in ATRC's NYUD settings.
    """

    def __init__(self, positive_weight: float = 0.95) -> None:
        super().__init__()
        self.positive_weight = positive_weight

    def forward(self, prediction: Tensor, label: Tensor, image_weight: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            prediction: logits (B, 1, H, W).
            label: (B, 1, H, W), 0, 1, or 255 where void.
            image_weight: of each image's mean, (B,), see :func:`~mtcl.losses.masked.masked_mean`; None: the pixels of
                all images count alike.

        Returns:
            Scalar loss.
        """
        logit, target = prediction.float(), label.float()
        positive = self.positive_weight * target * F.logsigmoid(logit)
        negative = (1 - self.positive_weight) * (1 - target) * F.logsigmoid(-logit)
        return masked_mean(-(positive + negative), label != VOID, image_weight)
