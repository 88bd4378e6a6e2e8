"""TaskPrompter: task prompts learnt inside the layers of a vision transformer.

Ye and Xu, "TaskPrompter: Spatial-Channel Multi-Task Prompting for Dense Scene Understanding", ICLR 2023.

    picture -> patches (B, N, C), one prompt per task (T, C)
    every block of the ViT: self-attention and MLP over [prompts, patches]; beside it, each prompt becomes a map over
        the patches (its channel prompt) and back, and what comes back is added to the prompt
    after each of the chosen blocks, for every task:
        patches weighted by their affinity to the task's prompt, head by head          -> 1x1 \
        channels weighted by their affinity to its channel prompt, window by window    -> 1x1 / -> fuse
        then a sum of all tasks' maps, weighted by the prompts' affinities to each other (cross-task reweighting)
    sum over the chosen blocks, x4 -> 3x3, BN, GELU -> final -> 1x1 -> prediction

An affinity is the plain product of query and key, as in the authors' code: neither scaled nor put through a softmax.

The authors' model is made for one size of picture. Here each channel prompt is a map over the grid of that size, which
is resampled for pictures of another (and its affinities brought to the same number of pixels): the same model at the
size it was made for. What their code computes and never uses is left out: the channels' attended features of each
block, and the last block's way from channel prompt to prompt.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtcl.errors import UserError
from mtcl.models.backbones import Backbone
from mtcl.models.base import DenseModel, DenseOutput, Size, crop_to_image, pad_to_multiple
from mtcl.models.decoders.blocks import SpatialNorm, predict_tasks, resize


class TaskPrompter(DenseModel):
    """Takes over a plain ViT of timm, without its class and register tokens, its position embedding made for ``size``.

    ``size``: height and width of the pictures it is made for. ``width``: of a task's features of each kind in a level;
    ``head_width``: of the fused ones. ``windows``: channel affinities are of windows x windows parts of the picture.
    ``cross_task``: reweighting between tasks. The levels are those of the backbone (``out_indices``).

    Tap: ``final`` (each task's pre-logit map, four times finer than the patches).
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
        vit = plain_vit(backbone)
        self.backbone = backbone
        self.mean, self.std = backbone.mean, backbone.std
        self.tasks = dict(tasks)
        self.feature_channels = {"final": dict.fromkeys(self.tasks, head_width)}
        self.windows = windows
        self.patch = vit.patch_embed.patch_size
        self.grid = (-(-size[0] // self.patch[0]), -(-size[1] // self.patch[1]))
        dim, depth = vit.embed_dim, len(vit.blocks)
        info: Any = backbone.net.feature_info
        self.levels_after = sorted(int(index) for index in info.out_indices)

        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        position = resample(vit.pos_embed.detach()[:, prefix:], vit.patch_embed.grid_size, self.grid)
        vit.pos_embed = nn.Parameter(position.clone())
        vit.cls_token = vit.reg_token = None

        self.prompts = nn.Parameter(torch.empty(len(self.tasks), dim))
        nn.init.trunc_normal_(self.prompts, mean=1.0, std=1.0)
        last = self.levels_after[-1]  # no block comes after it
        self.channel_prompts = nn.ModuleList(ChannelPrompts(dim, self.grid, back=i < last) for i in range(depth))
        self.levels = nn.ModuleList(
            TaskFeatures(dim, vit.blocks[i].attn.num_heads, self.tasks, width, head_width, cross_task)
            for i in self.levels_after
        )
        self.heads = nn.ModuleDict({task: head(head_width) for task in self.tasks})
        self.logits = nn.ModuleDict({task: nn.Conv2d(head_width, c, 1) for task, c in self.tasks.items()})

    def forward(self, image: Tensor) -> DenseOutput:
        height, width = image.shape[-2:]
        image, frame = pad_to_multiple(image, self.patch)
        final = {task: self.heads[task](m) for task, m in self._task_maps(image).items()}
        predictions = crop_to_image(predict_tasks(self.logits, final, frame), (height, width))
        return DenseOutput(predictions, {"final": final}, [], frame)

    def predict(self, image: Tensor) -> dict[str, Tensor]:
        return self.forward(image).predictions

    def _task_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Every task's features (B, head_width, 4h, 4w), summed over the levels; h x w patches."""
        vit: Any = self.backbone.net.model
        x = vit.patch_embed.proj(image)
        size = (x.shape[2], x.shape[3])
        x = vit.patch_embed.norm(x.flatten(2).transpose(1, 2)) + resample(vit.pos_embed, self.grid, size)
        x = vit.norm_pre(vit.pos_drop(x))
        tokens = torch.cat([self.prompts.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)  # (B, T + N, C)

        sums: list[Tensor] = []
        for index in range(self.levels_after[-1] + 1):
            chosen = index in self.levels_after
            if vit.grad_checkpointing and torch.is_grad_enabled():
                tokens, *affinities = checkpoint(self._block, index, tokens, size, chosen, use_reentrant=False)
            else:
                tokens, *affinities = self._block(index, tokens, size, chosen)
            if chosen:
                x = tokens[:, len(self.tasks) :]
                x = vit.norm(x) if index == self.levels_after[-1] else x
                level = self.levels[self.levels_after.index(index)]
                maps = level(x.transpose(1, 2).unflatten(2, size), *affinities)
                sums = [a + b for a, b in zip(sums, maps)] if sums else maps
        finer = (4 * size[0], 4 * size[1])
        return {task: resize(m, finer) for task, m in zip(self.tasks, sums)}

    def _block(self, index: int, tokens: Tensor, size: Size, chosen: bool) -> tuple[Tensor, ...]:
        """One layer over [prompts, patches]; after a chosen one also the affinities that TaskFeatures takes."""
        vit: Any = self.backbone.net.model
        block: Any = vit.blocks[index]
        channel: Any = self.channel_prompts[index]
        count = len(self.tasks)
        normed = block.norm1(tokens)
        attended, spatial = attend(block.attn, normed, count if chosen else 0)
        maps = channel(normed[:, :count])  # (B, T, h0 * w0)
        if channel.gather is not None:
            attended = torch.cat([attended[:, :count] + channel.gather(maps), attended[:, count:]], dim=1)
        # A dropped path is dropped for prompts and patches alike, as one layer of the network.
        tokens = tokens + block.drop_path1(block.ls1(attended))
        tokens = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
        if not chosen:
            return (tokens,)
        patches = normed[:, count:].transpose(1, 2).unflatten(2, size)
        return tokens, spatial, channel_affinity(maps.unflatten(2, self.grid), patches, self.windows)

    def backbone_parameters(self) -> Iterable[nn.Parameter]:
        return self.backbone.parameters()

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """The ViT, and the prompts: each of them attends to all others."""
        yield from self.backbone.parameters()
        yield self.prompts
        yield from self.channel_prompts.parameters()


def plain_vit(backbone: Backbone) -> Any:
    """timm's ViT inside the backbone, or UserError."""
    vit = getattr(backbone.net, "model", None)
    plain = (
        isinstance(vit, VisionTransformer)
        and isinstance(vit.patch_embed, PatchEmbed)
        and vit.pos_embed is not None
        and all(type(block) is Block and _is_plain(block.attn) for block in vit.blocks)
    )
    if not plain:
        raise UserError(
            "decoder=taskprompter puts its prompts into the blocks of a plain ViT; choose one as backbone "
            "(vit_small, vit_base, vit_large, backbone.name=vit_small_patch14_dinov2)"
        )
    return vit


def _is_plain(attention: Any) -> bool:
    """Without what timm's attention may have between the attended values and their projection."""
    norm, gate = getattr(attention, "norm", None), getattr(attention, "gate", None)
    return type(attention) is Attention and gate is None and (norm is None or isinstance(norm, nn.Identity))


def resample(embedding: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """A position embedding (1, N, C) of ``grid`` for another one, as timm does it."""
    if tuple(grid) == tuple(size):
        return embedding
    maps = embedding.transpose(1, 2).unflatten(2, tuple(grid))
    maps = F.interpolate(maps, size=tuple(size), mode="bicubic", align_corners=False, antialias=True)
    return maps.flatten(2).transpose(1, 2)


def attend(attention: Any, x: Tensor, prompts: int) -> tuple[Tensor, Tensor]:
    """Self-attention of timm's module over x (B, T + N, C), and the first ``prompts`` tokens' affinities to all tokens
    (B, heads, prompts, T + N)."""
    qkv = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = attention.q_norm(qkv[0]), attention.k_norm(qkv[1]), qkv[2]
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)
    return attention.proj_drop(attention.proj(out)), q[:, :, :prompts] @ k.transpose(2, 3)


class ChannelPrompts(nn.Module):
    """Each prompt as a map over the grid: (B, T, C) -> (B, T, h0 * w0). ``gather`` takes such maps back to prompts."""

    def __init__(self, dim: int, grid: Size, back: bool):
        super().__init__()
        self.spread = nn.Linear(dim, grid[0] * grid[1])
        self.gather = nn.Linear(grid[0] * grid[1], dim) if back else None
        for layer in (self.spread, self.gather):
            if layer is not None:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, prompts: Tensor) -> Tensor:
        return self.spread(prompts)


def channel_affinity(maps: Tensor, patches: Tensor, windows: int) -> Tensor:
    """Each channel prompt's (B, T, h0, w0) product with each channel of the patches (B, C, h, w), summed over the
    windows x windows parts of the picture -> (B, T, C, windows, windows).

    Parts of a grid that can't be divided evenly end at the same pixels as those of the grid filled up at its right and
    bottom. Sums over a grid of another size are brought to the number of pixels of h0 x w0.
    """
    scale = maps.shape[2] * maps.shape[3] / (patches.shape[2] * patches.shape[3])
    q = _parts(resize(maps.to(patches.dtype), patches.shape[2:]), windows)
    k = _parts(patches, windows)
    return torch.einsum("btihjw,bcihjw->btcij", q, k) * scale


def _parts(x: Tensor, windows: int) -> Tensor:
    """(B, C, h, w) -> (B, C, windows, rows, windows, columns), zeros at the right and bottom where it must."""
    rows, columns = (math.ceil(side / windows) for side in x.shape[2:])
    x = F.pad(x, (0, windows * columns - x.shape[3], 0, windows * rows - x.shape[2]))
    return x.unflatten(3, (windows, columns)).unflatten(2, (windows, rows))


def _over_parts(weights: Tensor, size: Sequence[int]) -> Tensor:
    """One weight per part (B, C, windows, windows) -> one per pixel (B, C, h, w)."""
    for dim, side in zip((2, 3), size):
        part = math.ceil(side / weights.shape[dim])
        weights = weights.repeat_interleave(part, dim).narrow(dim, 0, side)
    return weights


class TaskFeatures(nn.Module):
    """Every task's features out of one layer's patches and affinities."""

    def __init__(self, dim: int, heads: int, tasks: Iterable[str], width: int, head_width: int, cross_task: bool):
        super().__init__()
        self.tasks = list(tasks)
        self.spatial = nn.ModuleDict({task: nn.Conv2d(dim, width, 1) for task in self.tasks})
        self.channel = nn.ModuleDict({task: nn.Conv2d(dim, width, 1) for task in self.tasks})
        self.fuse = nn.ModuleDict({task: fuse(2 * width, head_width) for task in self.tasks})
        self.cross = nn.ModuleDict({task: weigh(heads) for task in self.tasks}) if cross_task else None

    def forward(self, x: Tensor, spatial: Tensor, channel: Tensor) -> list[Tensor]:
        """x (B, C, h, w), spatial (B, heads, T, T + h * w), channel (B, T, C, parts, parts) -> (B, C_t, h, w) each."""
        size, heads, count = x.shape[2:], spatial.shape[1], len(self.tasks)
        by_head = x.unflatten(1, (heads, -1))
        maps = []
        for index, task in enumerate(self.tasks):
            pixels = spatial[:, :, index, count:].unflatten(2, size).unsqueeze(2)  # (B, heads, 1, h, w)
            first = self.spatial[task]((by_head * (1 + pixels)).flatten(1, 2))
            second = self.channel[task](x * (1 + _over_parts(channel[:, index], size)))
            maps.append(self.fuse[task](torch.cat([first, second], dim=1)))
        if self.cross is None:
            return maps
        stacked = torch.stack(maps, dim=1)  # (B, T, C_t, h, w)
        mixed = []
        for index, task in enumerate(self.tasks):
            weights = self.cross[task](spatial[:, :, index : index + 1, :count])[:, 0, 0]  # (B, T)
            mixed.append(torch.einsum("bt,btchw->bchw", weights, stacked))
        return mixed


def fuse(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, width, 1),
        nn.Conv2d(width, width, 3, padding=1),
        SpatialNorm(width),
        nn.GELU(),
        nn.Conv2d(width, width, 1),
    )


def weigh(heads: int) -> nn.Sequential:
    """The heads' affinities between prompts -> one weight."""
    return nn.Sequential(nn.Conv2d(heads, heads, 1), nn.GELU(), nn.Conv2d(heads, 1, 1))


def head(width: int) -> nn.Sequential:
    conv = nn.Conv2d(width, width, 3, padding=1)
    nn.init.trunc_normal_(conv.weight, std=0.02)
    return nn.Sequential(conv, SpatialNorm(width), nn.GELU())
