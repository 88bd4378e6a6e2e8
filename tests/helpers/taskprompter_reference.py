"""Restate as plainly as possible what TaskPrompter's public code saves and computes.

Key names with their shapes, and the network as a function of a state dict under those names, in evaluation mode. Facts
from github.com/prismformore/Multi-Task-Transformer, TaskPrompter/models: transformers/taskprompter.py and
taskprompter_wrapper.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.invpt_reference import Reference as InvPTReference
from helpers.invpt_reference import published_shapes as invpt_shapes
from helpers.published_shapes import Shapes

LEVELS = 4


def published_shapes(
    tasks: dict[str, int],  # in their order
    size: tuple[int, int],
    dim: int,
    depth: int,
    heads: int,
    width: int,
    head_width: int,
    cross: bool,
) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of a state dict of TaskPrompter on a ViT/16; ``cross``: with reweighting across tasks."""
    pixels = size[0] // 16 * (size[1] // 16)
    # Of the class token only the position is saved.
    shapes = Shapes({k: v for k, v in invpt_shapes({}, size, dim, depth).items() if k.startswith("backbone.")})
    del shapes["backbone.cls_token"]

    shapes["backbone.task_prompts"] = (len(tasks), dim)
    for i in range(depth):
        shapes.layer(f"backbone.blocks.{i}.attn.token_trans", pixels, dim)
        shapes.layer(f"backbone.blocks.{i}.attn.token_trans1", dim, pixels)
    for task, channels in tasks.items():
        for level in range(LEVELS):
            shapes.layer(f"backbone.fea_decode_spa.{level}.{task}.0", width, dim, 1, 1)
            shapes.layer(f"backbone.fea_decode_chan.{level}.{task}.0", width, dim, 1, 1)
            shapes.layer(f"backbone.fea_fuse.{level}.{task}.0", head_width, 2 * width, 1, 1)
            shapes.layer(f"backbone.fea_fuse.{level}.{task}.1", head_width, head_width, 3, 3)
            shapes.norm(f"backbone.fea_fuse.{level}.{task}.2", head_width)
            shapes.layer(f"backbone.fea_fuse.{level}.{task}.4", head_width, head_width, 1, 1)
            if cross:
                shapes.layer(f"backbone.ctr_attn_conv.{level}.{task}.0", heads, heads, 1, 1)
                shapes.layer(f"backbone.ctr_attn_conv.{level}.{task}.2", 1, heads, 1, 1)
        shapes.layer(f"heads.{task}.mt_proj.0", head_width, head_width, 3, 3)
        shapes.norm(f"heads.{task}.mt_proj.1", head_width)
        shapes.layer(f"heads.{task}.linear_pred", channels, head_width, 1, 1)
    return shapes


class Reference(InvPTReference):
    """The public network; ``windows`` is the root of its ``chan_nheads``."""

    def __init__(self, state: dict[str, Tensor], tasks: list[str], vit_heads: int, windows: int):
        super().__init__(state, tasks, vit_heads)
        self.windows = windows

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """Each task's prediction, of the picture's size."""
        grid = (image.shape[2] // 16, image.shape[3] // 16)
        depth = sum(key.endswith("attn.qkv.weight") for key in self.state)
        x = self.conv("backbone.patch_embed.proj", image, stride=16).flatten(2).transpose(1, 2)
        x = x + self.state["backbone.pos_embed"][:, 1:]
        prompts = self.state["backbone.task_prompts"].expand(len(x), -1, -1)
        totals: dict[str, Tensor | float] = dict.fromkeys(self.tasks, 0.0)
        for i in range(depth):
            x, prompts, scores, products = self.prompted_block(f"backbone.blocks.{i}", x, prompts, grid)
            if (i + 1) % (depth // LEVELS):
                continue
            if i + 1 == depth:
                x = self.norm("backbone.norm", x, 1e-6)
            tokens = x.transpose(1, 2).unflatten(2, grid)
            for task, m in self.features((i + 1) // (depth // LEVELS) - 1, tokens, scores, products).items():
                totals[task] = totals[task] + m
        predictions = {}
        for task, total in totals.items():
            total = F.interpolate(total, scale_factor=4, mode="bilinear", align_corners=False)
            hidden = self.batch_norm(f"heads.{task}.mt_proj.1", self.conv(f"heads.{task}.mt_proj.0", total))
            predictions[task] = self.to(self.conv(f"heads.{task}.linear_pred", F.gelu(hidden)), image.shape[-2:])
        return predictions

    def prompted_block(
        self, block: str, x: Tensor, prompts: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor, list[Tensor], dict[tuple[int, int], Tensor]]:
        """A block over the patches x (B, N, C) and the prompts (B, T, C).

        Returns:
            Both after the block; for each head the products of the prompts' queries with all keys (B, T, T + N); for
            each window, by its row and column, those of the channel prompts with the patches (B, T, C).
        """
        count = len(self.tasks)
        normed_x, normed_prompts = (self.norm(f"{block}.norm1", tokens, 1e-6) for tokens in (x, prompts))
        joint = self.linear(f"{block}.attn.qkv", torch.cat([normed_prompts, normed_x], dim=1))
        scores, attended = [], []
        for q, k, v in zip(*(part.chunk(self.vit_heads, dim=-1) for part in joint.chunk(3, dim=-1))):
            raw = q @ k.transpose(1, 2)  # what features are weighted by is neither scaled nor normalised
            scores.append(raw[:, :count])
            attended.append((raw * q.shape[-1] ** -0.5).softmax(dim=-1) @ v)
        output = self.linear(f"{block}.attn.proj", torch.cat(attended, dim=-1))

        channel_prompts = self.linear(f"{block}.attn.token_trans", normed_prompts)  # (B, T, N)
        back = self.linear(f"{block}.attn.token_trans1", channel_prompts)
        queries, keys = channel_prompts.unflatten(2, grid), normed_x.transpose(1, 2).unflatten(2, grid)
        products = {}
        for row, column, part in self.list_windows(grid):
            products[row, column] = queries[part].flatten(2) @ keys[part].flatten(2).transpose(1, 2)

        x, prompts = x + output[:, count:], prompts + output[:, :count] + back
        x = x + self.mlp(f"{block}.mlp", self.norm(f"{block}.norm2", x, 1e-6))
        prompts = prompts + self.mlp(f"{block}.mlp", self.norm(f"{block}.norm2", prompts, 1e-6))
        return x, prompts, scores, products

    def list_windows(self, grid: tuple[int, int]) -> list[tuple[int, int, tuple[slice, ...]]]:
        """Row, column and slices of each window of a map (B, C, h, w)."""
        height, width = grid[0] // self.windows, grid[1] // self.windows
        everything = (slice(None), slice(None))
        return [
            (i, j, (*everything, slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)))
            for i in range(self.windows)
            for j in range(self.windows)
        ]

    def features(
        self, level: int, x: Tensor, scores: list[Tensor], products: dict[tuple[int, int], Tensor]
    ) -> dict[str, Tensor]:
        """Each task's features of a level, from the patches x (B, C, h, w)."""
        grid, count = x.shape[-2:], len(self.tasks)
        features = {}
        for t, task in enumerate(self.tasks):
            heads = []
            for part, raw in zip(x.chunk(self.vit_heads, dim=1), scores, strict=True):
                heads.append(part * raw[:, t, count:].unflatten(1, grid).unsqueeze(1))
            by_place = self.conv(f"backbone.fea_decode_spa.{level}.{task}.0", x + torch.cat(heads, dim=1))
            weighted = torch.zeros_like(x)
            for row, column, part in self.list_windows(grid):
                weighted[part] = x[part] * products[row, column][:, t, :, None, None]
            by_channel = self.conv(f"backbone.fea_decode_chan.{level}.{task}.0", x + weighted)
            name = f"backbone.fea_fuse.{level}.{task}"
            fused = self.conv(f"{name}.1", self.conv(f"{name}.0", torch.cat([by_place, by_channel], dim=1)))
            features[task] = self.conv(f"{name}.4", F.gelu(self.batch_norm(f"{name}.2", fused)))
        if f"backbone.ctr_attn_conv.{level}.{self.tasks[0]}.0.weight" not in self.state:
            return features
        mixed = {}
        for t, task in enumerate(self.tasks):
            name = f"backbone.ctr_attn_conv.{level}.{task}"
            pairs = torch.stack([raw[:, t : t + 1, :count] for raw in scores], dim=1)  # (B, heads, 1, T)
            weights = self.conv(f"{name}.2", F.gelu(self.conv(f"{name}.0", pairs)))
            mixed[task] = sum(weights[..., other, None] * features[source] for other, source in enumerate(self.tasks))
        return mixed
