"""Cross-entropy of semantic segmentation and human parts."""

from torch import Tensor, nn

from mtcl.losses.masked import masked_mean, pixel_cross_entropy


class CrossEntropyLoss(nn.Module):
    """Mean of -log softmax(p)[y] over the pixels with y != 255.

    Source: InvPT/losses/loss_functions.py:15-88.
    """

    def forward(self, prediction: Tensor, label: Tensor, image_weight: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            prediction: logits (B, C, H, W).
            label: int64 (B, H, W) in 0..C-1, 255 where void.
            image_weight: of each image's mean, (B,), see :func:`~mtcl.losses.masked.masked_mean`; None: the pixels of
                all images count alike.

        Returns:
            Scalar loss.
        """
        return masked_mean(*pixel_cross_entropy(prediction, label), image_weight)
