"""L1 and cosine loss of surface normals."""

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
        error = (make_units(prediction) - label.float()).abs().sum(dim=1)
        return masked_mean(error, find_valid(label), image_weight)


class NormalsCosineLoss(nn.Module):
    """Mean over valid pixels of 1 - sum_c p_c / |p| n_c.

    Source: LibMTL/examples/nyu/utils.py, class ``NormalLoss``; mtan/im2im_pred/utils.py, ``model_fit``.
    """

    def forward(self, prediction: Tensor, label: Tensor, image_weight: Tensor | None = None) -> Tensor:
        """Compute the loss; the arguments are those of :meth:`NormalsLoss.forward`, labels may be shorter than 1."""
        error = 1 - (make_units(prediction) * label.float()).sum(dim=1)
        return masked_mean(error, find_valid(label), image_weight)


def make_units(vectors: Tensor) -> Tensor:
    """Divide vectors (B, 3, H, W) by their lengths: float32."""
    vectors = vectors.float()
    # Not F.normalize: its norm over three channels takes most of the loss's time on the CPU. The floor bounds the
    # gradient of a head that starts at zero.
    return vectors * vectors.square().sum(dim=1, keepdim=True).clamp(min=MIN_LENGTH**2).rsqrt()


def find_valid(label: Tensor) -> Tensor:
    """Return where vectors (B, 3, H, W) are not zero: bool (B, H, W)."""
    x, y, z = (label != 0).unbind(dim=1)
    return x | y | z  # many times as fast as any(dim=1)
