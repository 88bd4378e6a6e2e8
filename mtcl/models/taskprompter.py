"""TaskPrompter: task prompts that are learnt inside the layers of a vision transformer.

Ye and Xu, "TaskPrompter: Spatial-Channel Multi-Task Prompting for Dense Scene Understanding", ICLR 2023.

    image -> patches (B, N, C), one prompt per task (T, C)
    every block of the ViT: self-attention and MLP over [prompts, patches]; in parallel, each prompt is projected to a
        map over the patches (its channel prompt) and back, and the result is added to the prompt
    after each of the selected blocks, for every task:
        patches weighted by their affinity to the task's prompt, head by head          -> 1x1 \
        channels weighted by their affinity to its channel prompt, window by window    -> 1x1 / -> fuse
        then a sum of all tasks' maps, weighted by the prompts' affinities to each other (cross-task reweighting)
    sum over the selected blocks, x4 -> 3x3, BN, GELU -> final -> 1x1 -> prediction

An affinity is the product of query and key, without scaling or softmax, as in the authors' code.

The authors' model takes images of one size. Here each channel prompt is a map over the grid of that size, which is
resampled for images of another size (and its affinities are scaled to the same number of pixels): at the original size
the model is the same. Omitted is what their code computes and never uses: the attended channel features of each block,
and the last block's projection from channel prompt to prompt.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtcl.models.backbones import Backbone
from mtcl.models.base import DenseModel, crop_to_image, pad_to_multiple
from mtcl.models.decoders.blocks import SpatialNorm, predict_tasks, resize
from mtcl.models.output import DenseOutput, EncodedImage, Size
from mtcl.models.plain_vit import get_plain_vit, resample_position_embedding


class TaskPrompter(DenseModel):
    """A plain timm ViT with task prompts in its blocks, and heads on the features of several blocks.

    The ViT loses its class and register tokens. The blocks whose features are used are the backbone's
    ``out_indices``.

    Features: ``final`` (each task's pre-logit map, four times finer than the patches).

    Args:
        backbone: a plain ViT of timm.
        tasks: task name -> number of channels of its prediction.
        size: height and width of the images that position embedding and channel prompts are made for.
        width: channels of a task's spatial, and of its channel features of a block.
        head_width: channels of the fused features and of the pre-logit map.
        windows: channel affinities are computed in windows x windows parts of the image.
        cross_task: whether tasks are reweighted by the affinities between their prompts.

    Raises:
        UserError: the backbone is not a plain ViT.
    """

    def __init__(
        self,
        backbone: Backbone,
        tasks: Mapping[str, int],
        size: Sequence[int] = (512, 512),
        width: int = 300,
        head_width: int = 350,
        windows: int = 1,
        cross_task: bool = True,
    ):
        super().__init__()
        vit = get_plain_vit(backbone, "TaskPrompter puts its prompts into the blocks of a plain ViT")
        self.backbone = backbone
        self.mean, self.std = backbone.mean, backbone.std
        self.tasks = dict(tasks)
        self.feature_channels = {"final": dict.fromkeys(self.tasks, head_width)}
        self.windows = windows
        self.patch = vit.patch_embed.patch_size
        self.grid = (-(-size[0] // self.patch[0]), -(-size[1] // self.patch[1]))
        dim, depth = vit.embed_dim, len(vit.blocks)
        info: Any = backbone.net.feature_info
        self.level_blocks = sorted(int(index) for index in info.out_indices)

        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        position = resample_position_embedding(vit.pos_embed.detach()[:, prefix:], vit.patch_embed.grid_size, self.grid)
        vit.pos_embed = nn.Parameter(position.clone())
        vit.cls_token = vit.reg_token = None

        self.prompts = nn.Parameter(torch.empty(len(self.tasks), dim))
        nn.init.trunc_normal_(self.prompts, mean=1.0, std=1.0)
        last = self.level_blocks[-1]  # later blocks are not run
        self.channel_prompts = nn.ModuleList(ChannelPrompts(dim, self.grid, returns=i < last) for i in range(depth))
        self.levels = nn.ModuleList(
            TaskFeatures(dim, vit.blocks[i].attn.num_heads, self.tasks, width, head_width, cross_task)
            for i in self.level_blocks
        )
        self.heads = nn.ModuleDict({task: _build_head(head_width) for task in self.tasks})
        self.logits = nn.ModuleDict({task: nn.Conv2d(head_width, c, 1) for task, c in self.tasks.items()})

    def forward(self, image: Tensor | EncodedImage) -> DenseOutput:
        """Return predictions cropped to the image, and the final maps as features."""
        assert isinstance(image, Tensor), "the prompts need the image: maps of the backbone alone do not serve"
        height, width = image.shape[-2:]
        image, frame = pad_to_multiple(image, self.patch)
        final = {task: self.heads[task](m) for task, m in self._task_maps(image).items()}
        predictions = crop_to_image(predict_tasks(self.logits, final, frame), (height, width))
        return DenseOutput(predictions, {"final": final}, [], frame)

    def predict(self, image: Tensor | EncodedImage) -> dict[str, Tensor]:
        """Return task -> raw prediction (B, C, H, W)."""
        return self.forward(image).predictions

    def _task_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Return every task's features (B, head_width, 4h, 4w), summed over the selected blocks; h x w patches."""
        vit: Any = self.backbone.net.model
        x = vit.patch_embed.proj(image)
        size = (x.shape[2], x.shape[3])
        x = vit.patch_embed.norm(x.flatten(2).transpose(1, 2)) + resample_position_embedding(
            vit.pos_embed, self.grid, size
        )
        x = vit.norm_pre(vit.pos_drop(x))
        tokens = torch.cat([self.prompts.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)  # (B, T + N, C)

        sums: list[Tensor] = []
        for index in range(self.level_blocks[-1] + 1):
            selected = index in self.level_blocks
            if vit.grad_checkpointing and torch.is_grad_enabled():
                tokens, *affinities = checkpoint(self._block, index, tokens, size, selected, use_reentrant=False)
            else:
                tokens, *affinities = self._block(index, tokens, size, selected)
            if selected:
                x = tokens[:, len(self.tasks) :]
                x = vit.norm(x) if index == self.level_blocks[-1] else x
                level = self.levels[self.level_blocks.index(index)]
                maps = level(x.transpose(1, 2).unflatten(2, size), *affinities)
                sums = [a + b for a, b in zip(sums, maps)] if sums else maps
        finer = (4 * size[0], 4 * size[1])
        return {task: resize(m, finer) for task, m in zip(self.tasks, sums)}

    def _block(self, index: int, tokens: Tensor, size: Size, selected: bool) -> tuple[Tensor, ...]:
        """Run one block over [prompts, patches]; a selected one also returns the affinities for TaskFeatures."""
        vit: Any = self.backbone.net.model
        block: Any = vit.blocks[index]
        channel: Any = self.channel_prompts[index]
        count = len(self.tasks)
        normed = block.norm1(tokens)
        attended, spatial = attend(block.attn, normed, count if selected else 0)
        maps = channel(normed[:, :count])  # (B, T, h0 * w0)
        if channel.gather is not None:
            attended = torch.cat([attended[:, :count] + channel.gather(maps), attended[:, count:]], dim=1)
        # Stochastic depth drops a block's branch for prompts and patches together.
        tokens = tokens + block.drop_path1(block.ls1(attended))
        tokens = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
        if not selected:
            return (tokens,)
        patches = normed[:, count:].transpose(1, 2).unflatten(2, size)
        return tokens, spatial, channel_affinity(maps.unflatten(2, self.grid), patches, self.windows)

    def backbone_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the ViT."""
        return self.backbone.parameters()

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the ViT and the prompts, each of which attends to all others."""
        yield from self.backbone.parameters()
        yield self.prompts
        yield from self.channel_prompts.parameters()


def attend(attention: Any, x: Tensor, prompts: int) -> tuple[Tensor, Tensor]:
    """Run timm's self-attention.

    Args:
        attention: a plain ``Attention`` of timm.
        x: tokens (B, T + N, C).
        prompts: how many of the first tokens to return affinities of.

    Returns:
        The output (B, T + N, C), and the affinities (B, heads, prompts, T + N) of the first tokens to all tokens.
    """
    qkv = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = attention.q_norm(qkv[0]), attention.k_norm(qkv[1]), qkv[2]
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)
    return attention.proj_drop(attention.proj(out)), q[:, :, :prompts] @ k.transpose(2, 3)


class ChannelPrompts(nn.Module):
    """Project each prompt to a map over the grid: (B, T, C) -> (B, T, h0 * w0).

    Args:
        dim: C.
        grid: (h0, w0).
        returns: whether there is a layer ``gather`` that projects such maps back to prompts.
    """

    def __init__(self, dim: int, grid: Size, returns: bool):
        super().__init__()
        self.spread = nn.Linear(dim, grid[0] * grid[1])
        self.gather = nn.Linear(grid[0] * grid[1], dim) if returns else None
        for layer in (self.spread, self.gather):
            if layer is not None:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, prompts: Tensor) -> Tensor:
        """Return the maps (B, T, h0 * w0)."""
        return self.spread(prompts)


def channel_affinity(maps: Tensor, patches: Tensor, windows: int) -> Tensor:
    """Multiply channel prompts with the channels of the patches, summed within parts of the image.

    A grid that can't be divided evenly is padded at its right and bottom. Sums over a grid of another size are scaled
    to the number of pixels of h0 x w0.

    Args:
        maps: channel prompts (B, T, h0, w0).
        patches: (B, C, h, w).
        windows: the image is divided into windows x windows parts.

    Returns:
        Affinities (B, T, C, windows, windows).
    """
    scale = maps.shape[2] * maps.shape[3] / (patches.shape[2] * patches.shape[3])
    q = _parts(resize(maps.to(patches.dtype), patches.shape[2:]), windows)
    k = _parts(patches, windows)
    return torch.einsum("btihjw,bcihjw->btcij", q, k) * scale


def _parts(x: Tensor, windows: int) -> Tensor:
    """Split (B, C, h, w) into (B, C, windows, rows, windows, columns), padded with zeros at the right and bottom."""
    rows, columns = (math.ceil(side / windows) for side in x.shape[2:])
    x = F.pad(x, (0, windows * columns - x.shape[3], 0, windows * rows - x.shape[2]))
    return x.unflatten(3, (windows, columns)).unflatten(2, (windows, rows))


def _over_parts(weights: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat the weights of the parts (B, C, windows, windows) for their pixels: (B, C, h, w)."""
    for dim, side in zip((2, 3), size):
        part = math.ceil(side / weights.shape[dim])
        weights = weights.repeat_interleave(part, dim).narrow(dim, 0, side)
    return weights


class TaskFeatures(nn.Module):
    """Compute every task's features from the patches and affinities of one block."""

    def __init__(self, dim: int, heads: int, tasks: Iterable[str], width: int, head_width: int, cross_task: bool):
        super().__init__()
        self.tasks = list(tasks)
        self.spatial = nn.ModuleDict({task: nn.Conv2d(dim, width, 1) for task in self.tasks})
        self.channel = nn.ModuleDict({task: nn.Conv2d(dim, width, 1) for task in self.tasks})
        self.fuse = nn.ModuleDict({task: _build_fusion(2 * width, head_width) for task in self.tasks})
        self.cross = nn.ModuleDict({task: _build_reweighting(heads) for task in self.tasks}) if cross_task else None

    def forward(self, x: Tensor, spatial: Tensor, channel: Tensor) -> list[Tensor]:
        """Weight the patches by their affinities and fuse them.

        Args:
            x: patches (B, C, h, w).
            spatial: affinities of prompts to all tokens (B, heads, T, T + h * w).
            channel: affinities of channel prompts (B, T, C, parts, parts).

        Returns:
            Each task's features (B, head_width, h, w).
        """
        size, heads, count = x.shape[2:], spatial.shape[1], len(self.tasks)
        by_head = x.unflatten(1, (heads, -1))
        maps = []
        for index, task in enumerate(self.tasks):
            pixels = spatial[:, :, index, count:].unflatten(2, size).unsqueeze(2)  # (B, heads, 1, h, w)
            by_pixel = self.spatial[task]((by_head * (1 + pixels)).flatten(1, 2))
            by_channel = self.channel[task](x * (1 + _over_parts(channel[:, index], size)))
            maps.append(self.fuse[task](torch.cat([by_pixel, by_channel], dim=1)))
        if self.cross is None:
            return maps
        stacked = torch.stack(maps, dim=1)  # (B, T, C_t, h, w)
        mixed = []
        for index, task in enumerate(self.tasks):
            weights = self.cross[task](spatial[:, :, index : index + 1, :count])[:, 0, 0]  # (B, T)
            mixed.append(torch.einsum("bt,btchw->bchw", weights, stacked))
        return mixed


def _build_fusion(inputs: int, width: int) -> nn.Sequential:
    """Return the layers that fuse spatial and channel features."""
    return nn.Sequential(
        nn.Conv2d(inputs, width, 1),
        nn.Conv2d(width, width, 3, padding=1),
        SpatialNorm(width),
        nn.GELU(),
        nn.Conv2d(width, width, 1),
    )


def _build_reweighting(heads: int) -> nn.Sequential:
    """Return the layers that map the affinities of all heads to one weight."""
    return nn.Sequential(nn.Conv2d(heads, heads, 1), nn.GELU(), nn.Conv2d(heads, 1, 1))


def _build_head(width: int) -> nn.Sequential:
    """Return the layers of a task's head."""
    conv = nn.Conv2d(width, width, 3, padding=1)
    nn.init.trunc_normal_(conv.weight, std=0.02)
    return nn.Sequential(conv, SpatialNorm(width), nn.GELU())
