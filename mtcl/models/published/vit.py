"""Rules for the ViT inside published checkpoints: timm's names of 2022, which are still its names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtcl.errors import UserError
from mtcl.models.published.translation import Rule

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

VIT_RULES = tuple(
    Rule(f"backbone.{name}", f"backbone.net.model.{name}")
    for name in ("cls_token", "pos_embed", "patch_embed.proj.*", "blocks.{n}.*", "norm.*")
)


def get_vit_overrides(state: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Any]:
    """Return the config keys of the backbone: ImageNet's normalisation, and the image size of the position embedding.

    Raises:
        UserError: the backbone is no ViT, or was trained at another ``size`` (height, width).
    """
    embedding, patches = state.get("backbone.pos_embed"), state.get("backbone.patch_embed.proj.weight")
    if embedding is None or patches is None:
        raise UserError("the checkpoint has no position or patch embedding: its backbone is no ViT")
    patch, positions = patches.shape[-1], embedding.shape[1] - 1
    grid = (size[0] // patch, size[1] // patch)
    if grid[0] * grid[1] != positions:
        raise UserError(
            f"the checkpoint's position embedding has {positions} patches, images of {size[0]}x{size[1]} have "
            f"{grid[0]}x{grid[1]}; give the image size that it was trained at"
        )
    return {
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        # Built for that grid, and resampled for images of any other size.
        "kwargs": {"img_size": list(size), "dynamic_img_size": True, "dynamic_img_pad": True},
    }
