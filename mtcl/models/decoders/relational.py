"""Relational contexts of ATRC: attention of a target task's pixels to the features of a source task.

    global   every pixel of the source, by attention that is linear in the pixels
    local    the source's pixels in a window around the target's pixel
    t_label  one prototype of the source's features per label of the target task
    s_label  one prototype of the source's features per label of the source task

After Brüggemann et al., "Exploring Relational Context for Multi-Task Dense Prediction", ICCV 2021
(https://arxiv.org/abs/2104.13874), and their public code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.models.decoders.blocks import ConvBlock, SpatialNorm


def prototypes(logits: Tensor, features: Tensor) -> Tensor:
    """Average features per label, weighted by a softmax of the label's logits over the *pixels*.

    Args:
        logits: (B, K, h, w), of K labels.
        features: (B, C, h, w).

    Returns:
        Prototypes (B, C, K).
    """
    weights = logits.flatten(2).softmax(dim=-1)
    return features.flatten(2) @ weights.transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
    """Return softmax(q k / sqrt(C)) v, channels last: (B, N, L, C), (B, N, M, C) -> (B, N, L, C).

    ATRC has an odd number of channels (33); the fused kernels need multiples of 8, and zero padding changes nothing.
    """
    channels = query.shape[-1]
    query, key, value = (F.pad(x, (0, -channels % 8)) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=channels**-0.5)
    return out[..., :channels]


class Context(nn.Module):
    """Project a target's features (B, inputs, h, w) to queries, a source's to keys and values of ``width`` channels.

    ``forward(target, source)`` returns the values that the target's pixels attend to: (B, width, h, w).
    """

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.query = self.projection(inputs, width)
        self.key = self.projection(inputs, width)
        self.value = ConvBlock(inputs, width, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def projection(self, inputs: int, width: int) -> nn.Module:
        """Return the layers that make queries or keys."""
        return nn.Sequential(ConvBlock(inputs, width, 1), ConvBlock(width, width, 1))


class GlobalContext(Context):
    """Attention of positive features, sum_j (q_i k_j) v_j / sum_j (q_i k_j), in time linear in the pixels."""

    eps = 1e-12

    def projection(self, inputs: int, width: int) -> nn.Module:
        """Return the layers that make positive queries or keys."""
        last = (nn.Conv2d(width, width, 1, bias=False), SpatialNorm(width), nn.Softplus())
        return nn.Sequential(ConvBlock(inputs, width, 1), *last)

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        """Attend to all pixels of the source."""
        query, key, value = self.query(target), self.key(source), self.value(source)
        with torch.autocast(query.device.type, enabled=False):  # sums over all pixels, small beside the projections
            q, k, v = (x.flatten(2).float() for x in (query, key, value))
            k = k / k.shape[-1]  # means, not sums: the ratio is the same
            summary = v @ k.transpose(1, 2)  # (B, values, keys)
            total = k.sum(dim=2).unsqueeze(1) @ q  # (B, 1, pixels)
            out = (summary @ q) / total.clamp_min(self.eps)
        return out.to(value.dtype).view_as(value)


class LocalContext(Context):
    """Attention to the ``window`` x ``window`` pixels around the target's pixel.

    As in the authors' kernel, pixels beyond the border count as keys and values of zero.

    Unfolding all windows would hold window^2 = 81 copies of the source, and the authors' kernel is for CUDA only. Here
    the map is split into tiles of ``tile`` x ``tile`` queries that share one field of (tile + window - 1)^2 keys, and a
    mask restricts each query to its window: 4 copies instead of 81, and one call of the fused attention.
    """

    visible: Tensor

    def __init__(self, inputs: int, width: int, window: int = 9, tile: int = 8):
        super().__init__(inputs, width)
        self.radius, self.tile, self.field = window // 2, tile, tile + window - 1
        offset = torch.arange(self.field) - torch.arange(tile)[:, None]  # of key and query, along one side
        within = (offset >= 0) & (offset < window)
        visible = within[:, None, :, None] & within[None, :, None, :]
        self.register_buffer("visible", visible.reshape(tile**2, self.field**2), persistent=False)

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        """Attend to the window of each pixel."""
        height, width = target.shape[-2:]
        down, right = -height % self.tile, -width % self.tile  # so that full tiles cover the map
        query = F.pad(self.query(target), (0, right, 0, down))
        border = (self.radius, self.radius + right, self.radius, self.radius + down)
        key, value = (F.pad(x, border) for x in (self.key(source), self.value(source)))
        out = attend(self._tiles(query, self.tile), self._tiles(key, self.field), self._tiles(value, self.field),
                     self.visible)  # fmt: skip
        out = out.unflatten(2, (self.tile, self.tile)).unflatten(1, (query.shape[-2] // self.tile, -1))
        return out.permute(0, 5, 1, 3, 2, 4).reshape(query.shape)[..., :height, :width]

    def _tiles(self, x: Tensor, side: int) -> Tensor:
        """Split (B, C, H, W) into squares of ``side``, one every ``tile`` pixels: (B, tiles, side^2, C)."""
        x = x.unfold(2, side, self.tile).unfold(3, side, self.tile)
        return x.permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(1, 2)


class LabelContext(Context):
    """Attention to prototypes: ``source`` is (B, inputs, K), one column per label."""

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        """Attend to the prototypes."""
        query = self.query(target)
        key, value = self.key(source.unsqueeze(-1)), self.value(source.unsqueeze(-1))
        q, k, v = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (query, key, value))
        return attend(q, k, v).squeeze(1).transpose(1, 2).reshape(query.shape)
