"""The ViT inside published checkpoints: timm's names of 2022, which are those of today."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtcl.errors import UserError
from mtcl.models.published.table import Rule

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

VIT = tuple(
    Rule(f"backbone.{name}", f"backbone.net.model.{name}")
    for name in ("cls_token", "pos_embed", "patch_embed.proj.*", "blocks.{n}.*", "norm.*")
)


def vit_settings(state: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Any]:
    """The picture's normalisation of the field, and the grid that the position embedding was trained for."""
    embedding, patches = state.get("backbone.pos_embed"), state.get("backbone.patch_embed.proj.weight")
    if embedding is None or patches is None:
        raise UserError("the checkpoint has no backbone.pos_embed or backbone.patch_embed: its backbone is no ViT")
    patch, positions = patches.shape[-1], embedding.shape[1] - 1
    grid = (size[0] // patch, size[1] // patch)
    if grid[0] * grid[1] != positions:
        raise UserError(
            f"the checkpoint's position embedding has {positions} places, pictures of {size[0]}x{size[1]} have "
            f"{grid[0]}x{grid[1]}; give the size it was trained at, data.size=[H,W]"
        )
    return {
        "backbone.mean": IMAGENET_MEAN,
        "backbone.std": IMAGENET_STD,
        # Made for that grid, and resampled for pictures of any other size.
        "backbone.kwargs": {"img_size": list(size), "dynamic_img_size": True, "dynamic_img_pad": True},
    }
