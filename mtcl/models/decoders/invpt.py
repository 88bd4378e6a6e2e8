"""InvPT: Ye and Xu, *Inverted Pyramid Multi-task Transformer for Dense Scene Understanding*, ECCV 2022.

    last encoder map -> 1/32 -> per task: two 3x3 convolutions -> preliminary prediction (supervised, too)
    per task: (features, preliminary prediction) -> 1x1 -> stage 0 (1/32) -> stage 1 (1/16) -> stage 2 (1/8)
    a stage:  per task: twice as large, half as wide (the UP of stages 1 and 2), plus an encoder map of that scale; then
              self-attention among all positions of all tasks, fused with the scores of the stage before; an MLP
    per task: all stages' features, normalised, brought to one width, resized to 1/4, added -> 3x3 -> final -> 1x1

Facts (shapes, orders, constants) are those of the authors' public code. Its sizes are fixed; here every size follows
from that of the last encoder map, whatever it is, and equals the published one where that is even.

Shapes: B pictures, T tasks, C channels, H heads, Q queries and K keys of all tasks together.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.errors import UserError
from mtcl.models.decoders.base import Decoder, DecoderOutput
from mtcl.models.decoders.blocks import ConvBlock, SpatialNorm, predict_fp32, predict_tasks, resize

STAGES = 3
FIRST_STRIDE = 32  # of the first stage, in pixels of the picture
Size = tuple[int, int]


class InvPT(Decoder):
    """``width``: of the preliminary features; stage s is (width + prediction_width) / 2^s wide, with ``heads``.

    ``downsample``: from the last encoder map to the first stage; null: to stride 32 or what comes nearest.
    ``aggregate_first``: the first stage, too, takes an encoder map and a 1x1 convolution on its way out, as the others
    do. The public code makes these layers, and the published 423 M parameters count them, but its forward leaves them
    idle: false is the network of the public checkpoints.

    Taps: ``final`` (each task's pre-logit map, at 1/4), ``preliminary`` (the first features of a task's own, at 1/32).
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        tasks: Mapping[str, int],
        width: int = 512,
        prediction_width: int = 64,
        heads: int = 2,
        mlp_ratio: float = 4.0,
        downsample: int | None = None,
        aggregate_first: bool = True,
    ):
        super().__init__(channels, strides, tasks)
        names = list(self.tasks)
        wide = width + prediction_width
        widths = [wide // 2**s for s in range(STAGES)]
        if any(w % heads for w in widths):
            raise UserError(
                f"decoder.heads={heads} must divide the stages' widths {widths}, which are decoder.width + "
                "decoder.prediction_width, its half and its quarter"
            )
        self.downsample = downsample or max(1, round(FIRST_STRIDE / self.strides[-1]))
        self.first = 0 if aggregate_first else 1  # of the stages that take an encoder map and are reduced
        self.sources = select_encoder_levels(self.strides, self.downsample)
        self.used_levels = {len(self.channels) - 1, *self.sources[self.first :]}
        self.preliminary = nn.ModuleDict(
            {t: nn.Sequential(ConvBlock(self.channels[-1], self.channels[-1]), ConvBlock(self.channels[-1], width))
             for t in names}
        )  # fmt: skip
        self.preliminary_logits = nn.ModuleDict({t: nn.Conv2d(width, c, 1) for t, c in self.tasks.items()})
        self.mix = nn.ModuleDict({t: nn.Conv2d(width + c, wide, 1) for t, c in self.tasks.items()})
        self.skips = nn.ModuleDict(
            {
                str(s): Skip(self.channels[source], widths[s], grows=self.strides[source] > stride)
                for s, (source, stride) in enumerate(zip(self.sources, stage_strides(self.strides, self.downsample)))
                if s >= self.first
            }
        )
        self.stages = nn.ModuleList(
            Stage(names, widths[max(s - 1, 0)], widths[s], heads, mlp_ratio, index=s) for s in range(STAGES)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(len(names) * w) for w in widths)
        self.reduce = nn.ModuleDict(
            {
                str(s): nn.ModuleDict({t: nn.Conv2d(widths[s], wide, 1) for t in names})
                for s in range(self.first, STAGES)
            }
        )
        self.project = nn.ModuleDict(
            {t: nn.Sequential(nn.Conv2d(wide, wide, 3, padding=1), SpatialNorm(wide), nn.ReLU(inplace=True))
             for t in names}
        )  # fmt: skip
        self.logits = nn.ModuleDict({t: nn.Conv2d(wide, c, 1) for t, c in self.tasks.items()})
        self.feature_channels = {"final": dict.fromkeys(names, wide), "preliminary": dict.fromkeys(names, width)}
        for module in self.project.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, features: list[Tensor], size: Size) -> DecoderOutput:
        preliminary, first, final = self._decode(features)
        predictions = self._predictions(final, size)
        intermediate = {t: resize(p, size) for t, p in first.items()}
        return DecoderOutput(predictions, {"final": final, "preliminary": preliminary}, [intermediate])

    def predict(self, features: list[Tensor], size: Size) -> dict[str, Tensor]:
        return self._predictions(self._decode(features)[2], size)

    def _predictions(self, final: dict[str, Tensor], size: Size) -> dict[str, Tensor]:
        return predict_tasks(self.logits, final, size)

    def _decode(self, features: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Each task's preliminary features, its preliminary prediction, its final map."""
        *sizes, final_size = self._sizes(features[-1])
        base = resize(features[-1], sizes[0])
        preliminary = {t: decoder(base) for t, decoder in self.preliminary.items()}
        first = {t: predict_fp32(self.preliminary_logits[t], f) for t, f in preliminary.items()}
        maps = {t: self.mix[t](torch.cat([f, first[t].to(f.dtype)], dim=1)) for t, f in preliminary.items()}
        total: dict[str, Tensor] = {}
        scores = None
        for s, stage in enumerate(self.stages):
            skip = self.skips[str(s)](features[self.sources[s]], sizes[s]) if s >= self.first else None
            x, scores = stage(maps, skip, scores, sizes[s])
            maps = {t: x[:, i].permute(0, 3, 1, 2) for i, t in enumerate(self.tasks)}
            # One normalisation over all tasks' channels at a place.
            normed = self.norms[s](x.permute(0, 2, 3, 1, 4).flatten(3)).chunk(len(self.tasks), dim=-1)
            for task, part in zip(self.tasks, normed):
                part = part.permute(0, 3, 1, 2)
                if s >= self.first:
                    part = self.reduce[str(s)][task](part)  # type: ignore[index]
                part = resize(part, final_size)
                total[task] = total[task] + part if s else part
        return preliminary, first, {t: block(total[t]) for t, block in self.project.items()}

    def _sizes(self, last: Tensor) -> list[Size]:
        """Height and width of the three stages and of the final maps."""
        height, width = last.shape[-2:]
        return [(-(-height * 2**s // self.downsample), -(-width * 2**s // self.downsample)) for s in range(STAGES + 1)]

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """All but what comes after the last exchange between tasks: by the attention, nearly all serves every task."""
        last_queries: Any = self.stages[-1].attention.shrink  # type: ignore[union-attr]
        own = {id(p) for part in (self.reduce, self.project, self.logits, last_queries) for p in part.parameters()}
        return (p for p in self.parameters() if id(p) not in own)


def stage_strides(strides: Sequence[int], downsample: int) -> list[float]:
    return [strides[-1] * downsample / 2**s for s in range(STAGES)]


def select_encoder_levels(strides: Sequence[int], downsample: int) -> list[int]:
    """Which encoder map each stage takes.

    Of a ViT, whose maps all have one stride, the later stages take the earlier ones (published: 2, 1, 0 of 0..3). Of a
    pyramid (ours; there is no public code for one) the map of the stage's own scale.
    """
    count = len(strides)
    if len(set(strides)) == 1:
        return [max(count - 2 - s, 0) for s in range(STAGES)]

    def distance(index: int, stride: float) -> float:
        return max(strides[index] / stride, stride / strides[index])

    return [
        min(range(count - 1, -1, -1), key=lambda i: distance(i, stride))
        for stride in stage_strides(strides, downsample)
    ]


class Skip(nn.Module):
    """An encoder map (B, C_in, h, w) -> (B, C, size): its way into a stage. ``grows``: by a transposed convolution."""

    def __init__(self, inputs: int, outputs: int, grows: bool):
        super().__init__()
        self.conv: nn.Module = (
            nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)
            if grows
            else nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.grows = grows

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return resize(self.conv(x), size) if self.grows else self.conv(resize(x, size))


class Stage(nn.Module):
    """One resolution: UP (but for the first), attention among the tasks, MLP. Stage ``index`` is ``width`` wide."""

    def __init__(self, tasks: Sequence[str], inputs: int, width: int, heads: int, mlp_ratio: float, index: int):
        super().__init__()
        ups = {
            t: nn.Sequential(ConvBlock(inputs, width, dilation=2), ConvBlock(width, width, dilation=2)) for t in tasks
        }
        self.up = nn.ModuleDict(ups if index else {})
        self.norm1 = nn.LayerNorm(width)
        # Keys at 1/64 of the picture in every stage, so that scores of one stage can be added to those of the next.
        self.attention = TaskAttention(tasks, width, heads, pool=2 ** (index + 1), hears=index > 0)
        self.norm2 = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, maps: dict[str, Tensor], skip: Tensor | None, scores: Tensor | None, size: Size
    ) -> tuple[Tensor, Tensor]:
        """Maps (B, C_in, h', w') of every task -> (B, T, h, w, C) and the attention's scores."""
        parts = [self.up[t](resize(m, size)) if len(self.up) else m for t, m in maps.items()]
        if skip is not None:
            parts = [part + skip for part in parts]
        x = torch.stack([part.permute(0, 2, 3, 1) for part in parts], dim=1)
        attended, scores = self.attention(self.norm1(x), scores)
        coarse = attended.permute(0, 1, 4, 2, 3).flatten(0, 1)
        x = x + resize(coarse, size).unflatten(0, x.shape[:2]).permute(0, 1, 3, 4, 2)
        return x + self.mlp(self.norm2(x)), scores


class TaskAttention(nn.Module):
    """Self-attention among all positions of all tasks: queries at half the resolution, keys and values at 1 / ``pool``.

    A stage that ``hears`` mixes, by a 1x1 convolution over heads, its scores with those of the stage before (attention
    message passing), resized over the queries' places; its own, mixed, are what the next one hears.
    """

    def __init__(self, tasks: Sequence[str], width: int, heads: int, pool: int, hears: bool):
        super().__init__()
        self.heads, self.pool = heads, pool
        self.scale = width**-0.5  # of the whole width, not of a head's
        self.shrink = nn.ModuleDict(
            {
                t: nn.Sequential(
                    nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width, bias=False), SpatialNorm(width)
                )
                for t in tasks
            }
        )
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.fuse = nn.Conv2d(2 * heads, heads, 1) if hears else None
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x`` (B, T, h, w, C), ``scores`` (B, H, T, h', w', K) of the stage before -> (B, T, h / 2, w / 2, C), and
        this stage's scores before the softmax (B, H, T, h / 2, w / 2, K)."""
        maps = x.permute(0, 1, 4, 2, 3)
        shrunk = torch.stack([shrink(maps[:, i]) for i, shrink in enumerate(self.shrink.values())], dim=1)
        grid = (shrunk.shape[1], *shrunk.shape[-2:])  # T, h / 2, w / 2
        pooled = F.avg_pool2d(maps.flatten(0, 1), self.pool, ceil_mode=True).unflatten(0, x.shape[:2])
        pooled = _tokens(pooled)
        query = self._split(self.query(_tokens(shrunk))) * self.scale
        own = query @ self._split(self.key(pooled)).transpose(-2, -1)  # (B, H, Q, K)
        if self.fuse is not None and scores is not None:
            heard = upsample_scores(scores, grid[1:]).flatten(2, 4)
            own = self.fuse(torch.cat([own, heard.to(own.dtype)], dim=1))
        # Written out: torch's scaled_dot_product_attention does not give the scores away.
        attended = own.softmax(dim=-1).to(own.dtype) @ self._split(self.value(pooled))
        return self.out(attended.transpose(1, 2).flatten(2)).unflatten(1, grid), own.unflatten(2, grid)

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, H, N, C / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """(B, T, C, h, w) -> (B, T h w, C)."""
    return x.permute(0, 1, 3, 4, 2).flatten(1, 3)


def upsample_scores(scores: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H, T, h, w, K) -> (B, H, T, size, K): each task's and key's scores, bilinearly over the queries' places."""
    flat = scores.permute(0, 1, 2, 5, 3, 4).flatten(0, 2)
    return resize(flat, size).unflatten(0, scores.shape[:3]).permute(0, 1, 2, 4, 5, 3)
