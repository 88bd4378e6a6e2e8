"""Share what models that are built into the blocks of a plain ViT need."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from mtcl.errors import UserError
from mtcl.models.backbones import Backbone


def get_plain_vit(backbone: Backbone, reason: str) -> Any:
    """Return the ViT of timm inside the backbone.

    Args:
        backbone: of any family.
        reason: why the model needs a plain ViT, the beginning of the message.

    Raises:
        UserError: the backbone is another network.
    """
    vit = getattr(backbone.net, "model", None)
    plain = (
        isinstance(vit, VisionTransformer)
        and isinstance(vit.patch_embed, PatchEmbed)
        and vit.pos_embed is not None
        and all(type(block) is Block and _is_plain(block.attn) for block in vit.blocks)
    )
    if not plain:
        raise UserError(
            f"{reason}; choose one as backbone (backbone=vit_small, vit_base, vit_large, or another plain ViT of timm "
            "such as vit_small_patch14_dinov2)"
        )
    return vit


def _is_plain(attention: Any) -> bool:
    """Return whether timm's attention has no norm or gate between the attended values and their projection."""
    norm, gate = getattr(attention, "norm", None), getattr(attention, "gate", None)
    return type(attention) is Attention and gate is None and (norm is None or isinstance(norm, nn.Identity))


def resample_position_embedding(embedding: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """Resample a position embedding (1, N, C) of ``grid`` (rows, columns) to the grid ``size``, as timm does."""
    if tuple(grid) == tuple(size):
        return embedding
    maps = embedding.transpose(1, 2).unflatten(2, tuple(grid))
    maps = F.interpolate(maps, size=tuple(size), mode="bicubic", align_corners=False, antialias=True)
    return maps.flatten(2).transpose(1, 2)
