"""L1 loss of surface normals."""

from torch import Tensor, nn

from mtcl.losses.masked import masked_mean

MIN_LENGTH = 1e-6  # shorter vectors are divided by it, not by their length


class NormalsLoss(nn.Module):
    """Mean over valid pixels of sum_c |p_c / |p| - n_c|, the sum being over the three channels.

    Source: InvPT/losses/loss_functions.py:15-88.
    """

    def forward(self, prediction: Tensor, label: Tensor, image_weight: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            prediction: vectors (B, 3, H, W) of any length.
            label: unit vectors (B, 3, H, W), the zero vector where void.
            image_weight: of each image's mean, (B,), see :func:`~mtcl.losses.masked.masked_mean`; None: the pixels of
                all images count alike.

        Returns:
            Scalar loss.
        """
        x, y, z = (label != 0).unbind(dim=1)
        valid = x | y | z  # many times as fast as any(dim=1)
        vectors = prediction.float()
        # Not F.normalize: its norm over three channels takes most of the loss's time on the CPU. The floor bounds the
        # gradient of a head that starts at zero.
        direction = vectors * vectors.square().sum(dim=1, keepdim=True).clamp(min=MIN_LENGTH**2).rsqrt()
        error = (direction - label.float()).abs().sum(dim=1)
        return masked_mean(error, valid, image_weight)
