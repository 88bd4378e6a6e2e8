"""Restate as plainly as possible what InvPT's public code saves and computes.

Key names with their shapes, and the network as functions of a state dict under those names. For even sizes only, as
there; evaluation mode.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.published_shapes import Shapes

DECODER = "multi_task_decoder"
IDLE = (f"{DECODER}.scale_embed.2.", f"{DECODER}.invpt.norm_mt.", f"{DECODER}.invpt.redu_chan.0.",
        f"{DECODER}.invpt.invpt_stages.0.blocks.0.attn.fuse_attn.")  # fmt: skip


def published_shapes(
    tasks: dict[str, int],  # in their order
    size: tuple[int, int],
    dim: int = 1024,
    depth: int = 24,
    width: int = 512,
    extra: int = 64,
) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of a state dict of InvPT on a ViT/16. The defaults are the published ViT-L."""
    shapes = Shapes()

    shapes["backbone.cls_token"] = (1, 1, dim)
    shapes["backbone.pos_embed"] = (1, size[0] // 16 * (size[1] // 16) + 1, dim)
    shapes.layer("backbone.patch_embed.proj", dim, 3, 16, 16)
    for i in range(depth):
        block = f"backbone.blocks.{i}"
        shapes.layer(f"{block}.norm1", dim)
        shapes.layer(f"{block}.attn.qkv", 3 * dim, dim)
        shapes.layer(f"{block}.attn.proj", dim, dim)
        shapes.layer(f"{block}.norm2", dim)
        shapes.layer(f"{block}.mlp.fc1", 4 * dim, dim)
        shapes.layer(f"{block}.mlp.fc2", dim, 4 * dim)
    shapes.layer("backbone.norm", dim)

    wide = width + extra
    widths = [wide, wide // 2, wide // 4]
    for task, channels in tasks.items():
        shapes.layer(f"{DECODER}.intermediate_head.{task}", channels, width, 1, 1)
        for i, outputs in enumerate((dim, width)):
            shapes.layer(f"{DECODER}.preliminary_decoder.{task}.{i}.conv", outputs, dim, 3, 3, bias=False)
            shapes.norm(f"{DECODER}.preliminary_decoder.{task}.{i}.bn1", outputs)
        shapes.layer(f"{DECODER}.invpt.mix_proj.{task}.0", wide, width + channels, 1, 1)
        shapes.layer(f"{DECODER}.invpt.mt_proj.{task}.0", wide, wide, 3, 3)
        shapes.norm(f"{DECODER}.invpt.mt_proj.{task}.1", wide)
        shapes.layer(f"heads.{task}.linear_pred", channels, wide, 1, 1)
    shapes.layer(f"{DECODER}.scale_embed.0", dim, widths[2], 3, 3, outputs=widths[2])  # transposed
    shapes.layer(f"{DECODER}.scale_embed.1", widths[1], dim, 3, 3)
    shapes.layer(f"{DECODER}.scale_embed.2", widths[0], dim, 3, 3)
    for s, w in enumerate(widths):
        stage, block = f"{DECODER}.invpt.invpt_stages.{s}", f"{DECODER}.invpt.invpt_stages.{s}.blocks.0"
        for i in range(len(tasks)):
            if s:
                shapes.layer(f"{stage}.patch_embed.{i}.proj.1", w, widths[s - 1], 3, 3, bias=False)
                shapes.norm(f"{stage}.patch_embed.{i}.proj.2", w)
                shapes.layer(f"{stage}.patch_embed.{i}.proj.4", w, w, 3, 3, bias=False)
                shapes.norm(f"{stage}.patch_embed.{i}.proj.5", w)
            shapes.layer(f"{block}.attn.conv_proj_q.{i}.conv", w, 1, 3, 3, bias=False)
            shapes.norm(f"{block}.attn.conv_proj_q.{i}.bn", w)
            shapes.layer(f"{DECODER}.invpt.redu_chan.{s}.{i}", wide, w, 1, 1)
        shapes.layer(f"{block}.norm1", w)
        shapes.layer(f"{block}.norm2", w)
        shapes.layer(f"{block}.mlp.fc1", 4 * w, w)
        shapes.layer(f"{block}.mlp.fc2", w, 4 * w)
        for name in ("proj_q", "proj_k", "proj_v", "proj"):
            shapes.layer(f"{block}.attn.{name}", w, w)
        shapes.layer(f"{block}.attn.fuse_attn", 2, 4, 1, 1)
        shapes.layer(f"{DECODER}.invpt.norm_mts.{s}", len(tasks) * w)
    shapes.layer(f"{DECODER}.invpt.norm_mt", len(tasks) * widths[2])
    return shapes


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Every tensor different from every other, and of a size that keeps the network's numbers near one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for i, (key, shape) in enumerate(shapes.items()):
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(1000 + i)
        elif key.endswith("running_var"):
            state[key] = 0.5 + torch.rand(shape, generator=generator)
        elif len(shape) == 1:
            state[key] = (1.0 if key.endswith("weight") else 0.0) + 0.3 * torch.randn(shape, generator=generator)
        else:
            fan_in = torch.Size(shape[1:]).numel()
            state[key] = torch.randn(shape, generator=generator) * 1.5 / fan_in**0.5
    return state


class Reference:
    """The public network's forward, in evaluation mode."""

    def __init__(self, state: dict[str, Tensor], tasks: list[str], vit_heads: int):
        self.state, self.tasks, self.vit_heads = state, tasks, vit_heads

    def __call__(self, image: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Predictions and preliminary predictions, of the picture's size."""
        size = image.shape[-2:]
        grid = (size[0] // 16, size[1] // 16)
        features = [tokens.transpose(1, 2).unflatten(2, grid) for tokens in self.vit(image)]
        finals, preliminary = self.decode(features)
        heads = {t: self.conv(f"heads.{t}.linear_pred", finals[t]) for t in self.tasks}
        return {t: self.to(p, size) for t, p in heads.items()}, {t: self.to(p, size) for t, p in preliminary.items()}

    def vit(self, image: Tensor) -> list[Tensor]:
        """Tokens of the patches after each quarter of the blocks; the last ones normalised. A class token is one of the
        tokens where the state has one; its position is in the embedding in any case."""
        prefix = int("backbone.cls_token" in self.state)
        depth = sum(key.endswith("attn.qkv.weight") for key in self.state)
        x = self.conv("backbone.patch_embed.proj", image, stride=16).flatten(2).transpose(1, 2)
        if prefix:
            x = torch.cat([self.state["backbone.cls_token"].expand(len(x), -1, -1), x], dim=1)
        x = x + self.state["backbone.pos_embed"][:, 1 - prefix :]
        features = []
        for i in range(depth):
            x = self.vit_block(f"backbone.blocks.{i}", x)
            if (i + 1) % (depth // 4) == 0 and i + 1 < depth:
                features.append(x[:, prefix:])
        return [*features, self.norm("backbone.norm", x, 1e-6)[:, prefix:]]

    def vit_block(self, block: str, x: Tensor) -> Tensor:
        q, k, v = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, dim=-1)
        heads = []
        for a, b, c in zip(*(part.chunk(self.vit_heads, dim=-1) for part in (q, k, v))):
            heads.append((a @ b.transpose(1, 2) * a.shape[-1] ** -0.5).softmax(-1) @ c)
        x = x + self.linear(f"{block}.attn.proj", torch.cat(heads, dim=-1))
        return x + self.mlp(f"{block}.mlp", self.norm(f"{block}.norm2", x, 1e-6))

    def decode(self, features: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        height, width = (side // 2 for side in features[3].shape[-2:])
        base = self.to(features[3], (height, width))
        skips = {1: self.conv(f"{DECODER}.scale_embed.1", features[1])}
        up = f"{DECODER}.scale_embed.0"
        skips[2] = F.conv_transpose2d(
            features[0], self.state[f"{up}.weight"], self.state[f"{up}.bias"], stride=2, padding=1, output_padding=1
        )
        preliminary, maps = {}, []
        for t in self.tasks:
            x = base
            for i in range(2):
                name = f"{DECODER}.preliminary_decoder.{t}.{i}"
                x = self.batch_norm(f"{name}.bn1", self.conv(f"{name}.conv", x, padding=1, bias=False)).relu()
            preliminary[t] = self.conv(f"{DECODER}.intermediate_head.{t}", x)
            maps.append(self.conv(f"{DECODER}.invpt.mix_proj.{t}.0", torch.cat([x, preliminary[t]], dim=1)))
        totals = [0.0] * len(self.tasks)
        scores = None
        for s in range(3):
            stage = f"{DECODER}.invpt.invpt_stages.{s}"
            if s:
                maps = [self.up(f"{stage}.patch_embed.{i}.proj", x) + skips[s] for i, x in enumerate(maps)]
            maps, scores = self.block(f"{stage}.blocks.0", s, maps, scores)
            joint = torch.cat(maps, dim=1).permute(0, 2, 3, 1)
            joint = self.norm(f"{DECODER}.invpt.norm_mts.{s}", joint, 1e-5).permute(0, 3, 1, 2)
            for i, x in enumerate(joint.chunk(len(self.tasks), dim=1)):
                x = self.conv(f"{DECODER}.invpt.redu_chan.{s}.{i}", x) if s else x
                totals[i] = totals[i] + self.to(x, (8 * height, 8 * width))
        finals = {}
        for t, total in zip(self.tasks, totals):
            name = f"{DECODER}.invpt.mt_proj.{t}"
            finals[t] = self.batch_norm(f"{name}.1", self.conv(f"{name}.0", total)).relu()
        return finals, preliminary

    def up(self, name: str, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        for conv, norm in ((1, 2), (4, 5)):
            x = self.conv(f"{name}.{conv}", x, padding=2, dilation=2, bias=False)
            x = self.batch_norm(f"{name}.{norm}", x).relu()
        return x

    def block(self, name: str, s: int, maps: list[Tensor], heard: list[Tensor] | None) -> tuple[list, list]:
        """Attention and MLP of stage ``s``; ``heard``: of the stage before, each task's scores (B, H, h, w, K)."""
        attn, width = f"{name}.attn", maps[0].shape[1]
        normed = [self.norm(f"{name}.norm1", x.permute(0, 2, 3, 1), 1e-5).permute(0, 3, 1, 2) for x in maps]
        pool = 2 ** (s + 1)
        pooled = torch.cat([F.avg_pool2d(x, pool).flatten(2) for x in normed], dim=2).transpose(1, 2)
        keys, values = self.linear(f"{attn}.proj_k", pooled), self.linear(f"{attn}.proj_v", pooled)
        scores, outputs = [], []
        for i, x in enumerate(normed):  # the queries of one task, the keys of all
            shrunk = self.conv(f"{attn}.conv_proj_q.{i}.conv", x, stride=2, padding=1, groups=width, bias=False)
            shrunk = self.batch_norm(f"{attn}.conv_proj_q.{i}.bn", shrunk)
            grid = shrunk.shape[-2:]
            query = self.linear(f"{attn}.proj_q", shrunk.flatten(2).transpose(1, 2))
            products = [
                q @ k.transpose(1, 2) * width**-0.5 for q, k in zip(query.chunk(2, dim=-1), keys.chunk(2, dim=-1))
            ]
            products = torch.stack(products, dim=1)  # (B, H, Q, K)
            if heard is not None:
                grown = torch.empty(*products.shape[:2], *grid, products.shape[-1])
                for h in range(2):
                    for k in range(products.shape[-1]):
                        grown[:, h, ..., k] = self.to(heard[i][:, h, ..., k].unsqueeze(1), grid).squeeze(1)
                products = self.conv(f"{attn}.fuse_attn", torch.cat([products, grown.flatten(2, 3)], dim=1))
            scores.append(products.unflatten(2, grid))
            mixed = [a @ v for a, v in zip(products.softmax(-1).unbind(1), values.chunk(2, dim=-1))]
            x = self.linear(f"{attn}.proj", torch.cat(mixed, dim=-1)).transpose(1, 2).unflatten(2, grid)
            outputs.append(self.to(x, maps[i].shape[-2:]))
        features = []
        for x, attended in zip(maps, outputs):
            x = (x + attended).permute(0, 2, 3, 1)
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x, 1e-5))
            features.append(x.permute(0, 3, 1, 2))
        return features, scores

    # --- Single layers by name

    def conv(self, name: str, x: Tensor, bias: bool = True, **options: int) -> Tensor:
        weight = self.state[f"{name}.weight"]
        options.setdefault("padding", 0 if "stride" in options else weight.shape[-1] // 2)
        return F.conv2d(x, weight, self.state[f"{name}.bias"] if bias else None, **options)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x)))

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        parts = (self.state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    @staticmethod
    def to(x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=False)
