"""L1 loss of depth."""

from torch import Tensor, nn

from mtcl.losses.masked import masked_mean


class DepthLoss(nn.Module):
    """Mean of |p - z| in metres over the pixels with a label.

    Source: InvPT/losses/loss_functions.py:15-88.
    """

    def forward(self, prediction: Tensor, label: Tensor, image_weight: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            prediction: metres (B, 1, H, W), unconstrained.
            label: metres (B, 1, H, W), valid where positive and finite.
            image_weight: of each image's mean, (B,), see :func:`~mtcl.losses.masked.masked_mean`; None: the pixels of
                all images count alike.

        Returns:
            Scalar loss.
        """
        valid = (label > 0) & label.isfinite()
        return masked_mean((prediction.float() - label.float()).abs(), valid, image_weight)
