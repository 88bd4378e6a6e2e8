"""InvPT: Ye and Xu, *Inverted Pyramid Multi-task Transformer for Dense Scene Understanding*, ECCV 2022.

    last encoder map -> 1/32 -> per task: two 3x3 convolutions -> preliminary prediction (supervised, too)
    per task: (features, preliminary prediction) -> 1x1 -> stage 0 (1/32) -> stage 1 (1/16) -> stage 2 (1/8)
    a stage:  per task: twice the resolution, half the channels (UP, stages 1 and 2), plus an encoder map of that scale;
              then self-attention among all positions of all tasks, fused with the previous stage's scores; an MLP
    per task: all stages' features, normalised, brought to one width, resized to 1/4, added -> 3x3 -> final -> 1x1

Shapes, orders and constants are those of the authors' public code. Its sizes are fixed; here every size follows from
that of the last encoder map, and equals the published one where that is even.

Shapes: B images, T tasks, C channels, H heads, Q queries and K keys of all tasks together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.errors import ParameterError
from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.blocks import ConvBlock, SpatialNorm, predict_fp32, predict_tasks, resize
from mtcl.models.output import DenseOutput, Size

STAGES = 3
FIRST_STRIDE = 32  # of the first stage, in pixels of the image


class InvPT(Decoder):
    """Preliminary predictions per task, then three transformer stages over the tokens of all tasks.

    Features: ``final`` (each task's pre-logit map, at 1/4), ``preliminary`` (the first task-specific features, at
    1/32).

    Args:
        channels: see :class:`Decoder`.
        strides: see :class:`Decoder`.
        tasks: see :class:`Decoder`.
        width: channels of the preliminary features.
        prediction_width: added to it; stage s has (width + prediction_width) / 2^s channels.
        heads: number of attention heads in every stage.
        mlp_ratio: hidden channels of a stage's MLP, relative to the stage.
        downsample: factor from the last encoder map to the first stage; None: to the stride closest to 32.
        aggregate_first: whether the first stage also takes an encoder map and ends in a 1x1 convolution, as the others
            do. The public code builds these layers, and the published 423 M parameters count them, but its forward
            does not use them: false is the network of the public checkpoints.
        make_attention: what builds the attention of a stage; None: :class:`TaskAttention`. A subclass sets it, a config
            does not.
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
        make_attention: "Callable[..., TaskAttention] | None" = None,
    ):
        super().__init__(channels, strides, tasks)
        names = list(self.tasks)
        wide = width + prediction_width
        widths = [wide // 2**s for s in range(STAGES)]
        if any(w % heads for w in widths):
            raise ParameterError(
                "heads",
                f"={heads} must divide the widths of the stages {widths}, which are width + prediction_width, its half "
                "and its quarter",
            )
        self.downsample = downsample or max(1, round(FIRST_STRIDE / self.strides[-1]))
        self.first = 0 if aggregate_first else 1  # first stage that takes an encoder map and is reduced
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
                str(s): Skip(self.channels[source], widths[s], upsamples=self.strides[source] > stride)
                for s, (source, stride) in enumerate(zip(self.sources, stage_strides(self.strides, self.downsample)))
                if s >= self.first
            }
        )
        self.stages = nn.ModuleList(
            Stage(names, widths[max(s - 1, 0)], widths[s], heads, mlp_ratio, s, make_attention or TaskAttention)
            for s in range(STAGES)
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

    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Decode with the preliminary predictions as intermediate ones."""
        preliminary, first, final = self._decode(features)
        predictions = self._predictions(final, size)
        intermediate = {t: resize(p, size) for t, p in first.items()}
        return DenseOutput(predictions, {"final": final, "preliminary": preliminary}, [intermediate], size)

    def predict(self, features: list[Tensor], size: Size) -> dict[str, Tensor]:
        """Return the final predictions."""
        return self._predictions(self._decode(features)[2], size)

    def _predictions(self, final: dict[str, Tensor], size: Size) -> dict[str, Tensor]:
        return predict_tasks(self.logits, final, size)

    def _decode(self, features: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Return each task's preliminary features, preliminary predictions and final maps."""
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
            # One normalisation over all tasks' channels of a pixel.
            normed = self.norms[s](x.permute(0, 2, 3, 1, 4).flatten(3)).chunk(len(self.tasks), dim=-1)
            for task, part in zip(self.tasks, normed):
                part = part.permute(0, 3, 1, 2)
                if s >= self.first:
                    part = self.reduce[str(s)][task](part)  # type: ignore[index]
                part = resize(part, final_size)
                total[task] = total[task] + part if s else part
        return preliminary, first, {t: block(total[t]) for t, block in self.project.items()}

    def _sizes(self, last: Tensor) -> list[Size]:
        """Return the height and width of the three stages and of the final maps."""
        height, width = last.shape[-2:]
        return [(-(-height * 2**s // self.downsample), -(-width * 2**s // self.downsample)) for s in range(STAGES + 1)]

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return all parameters before the last attention between tasks: they serve every task."""
        last_queries: Any = self.stages[-1].attention.shrink  # type: ignore[union-attr]
        task_specific = {
            id(p) for part in (self.reduce, self.project, self.logits, last_queries) for p in part.parameters()
        }
        return (p for p in self.parameters() if id(p) not in task_specific)


def stage_strides(strides: Sequence[int], downsample: int) -> list[float]:
    """Return the stride of each stage, in pixels."""
    return [strides[-1] * downsample / 2**s for s in range(STAGES)]


def select_encoder_levels(strides: Sequence[int], downsample: int) -> list[int]:
    """Return the index of the encoder map that each stage takes.

    For a ViT, whose maps all have one stride, later stages take earlier maps (published: 2, 1, 0 of 0..3). For a
    pyramid (our choice; there is no public code for one) each stage takes the map of the closest stride.
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
    """Convolve and resize an encoder map (B, C_in, h, w) for a stage: (B, C, *size).

    Args:
        inputs: C_in.
        outputs: C.
        upsamples: whether the convolution is a transposed one of stride 2.
    """

    def __init__(self, inputs: int, outputs: int, upsamples: bool):
        super().__init__()
        self.conv: nn.Module = (
            nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)
            if upsamples
            else nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.upsamples = upsamples

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Return the map at ``size`` (height, width)."""
        return resize(self.conv(x), size) if self.upsamples else self.conv(resize(x, size))


class Stage(nn.Module):
    """One resolution: UP (except in stage 0), attention among the tasks, MLP; ``width`` channels."""

    def __init__(
        self,
        tasks: Sequence[str],
        inputs: int,
        width: int,
        heads: int,
        mlp_ratio: float,
        index: int,
        make_attention: "Callable[..., TaskAttention]",
    ):
        super().__init__()
        ups = {
            t: nn.Sequential(ConvBlock(inputs, width, dilation=2), ConvBlock(width, width, dilation=2)) for t in tasks
        }
        self.up = nn.ModuleDict(ups if index else {})
        self.norm1 = nn.LayerNorm(width)
        # Keys at 1/64 of the image in every stage, so that scores of one stage can be added to those of the next.
        self.attention = make_attention(tasks, width, heads, pool=2 ** (index + 1), fuses_scores=index > 0)
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
        """Map every task's (B, C_in, h', w') to (B, T, h, w, C); return it and the attention scores."""
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

    With ``fuses_scores`` the scores are mixed, by a 1x1 convolution over heads, with those of the previous stage
    (attention message passing), which are resized over the query positions. The mixed scores go on to the next stage.
    """

    def __init__(self, tasks: Sequence[str], width: int, heads: int, pool: int, fuses_scores: bool):
        super().__init__()
        self.heads, self.pool = heads, pool
        self.scale = width**-0.5  # of all channels, not of one head's
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
        self.fuse = nn.Conv2d(2 * heads, heads, 1) if fuses_scores else None
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attend among all positions of all tasks.

        Args:
            x: tokens (B, T, h, w, C).
            scores: (B, H, T, h', w', K) of the previous stage.

        Returns:
            The attended values (B, T, h / 2, w / 2, C), and the scores before the softmax (B, H, T, h / 2, w / 2, K).
        """
        maps = x.permute(0, 1, 4, 2, 3)
        shrunk = torch.stack([shrink(maps[:, i]) for i, shrink in enumerate(self.shrink.values())], dim=1)
        grid = (shrunk.shape[1], *shrunk.shape[-2:])  # T, h / 2, w / 2
        pooled = F.avg_pool2d(maps.flatten(0, 1), self.pool, ceil_mode=True).unflatten(0, x.shape[:2])
        pooled = _tokens(pooled)
        query = self._split(self.query(_tokens(shrunk))) * self.scale
        stage_scores = query @ self._split(self.key(pooled)).transpose(-2, -1)
        previous = None if scores is None else upsample_scores(scores, grid[1:]).flatten(2, 4).to(stage_scores.dtype)
        combined, passed = self.combine(stage_scores, previous)
        # Not torch's scaled_dot_product_attention, which does not return the scores.
        attended = combined.softmax(dim=-1).to(stage_scores.dtype) @ self._split(self.value(pooled))
        return self.out(attended.transpose(1, 2).flatten(2)).unflatten(1, grid), passed.unflatten(2, grid)

    def combine(self, scores: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """Combine this stage's scores with the previous stage's.

        Args:
            scores: (B, H, Q, K) of this stage.
            previous: the same of the previous stage, resized to these queries; None in the first stage.

        Returns:
            The scores that the softmax takes, and those that the next stage gets.
        """
        if self.fuse is not None and previous is not None:
            scores = self.fuse(torch.cat([scores, previous], dim=1))
        return scores, scores

    def _split(self, x: Tensor) -> Tensor:
        """Split heads: (B, N, C) -> (B, H, N, C / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """Flatten maps (B, T, C, h, w) to tokens (B, T h w, C)."""
    return x.permute(0, 1, 3, 4, 2).flatten(1, 3)


def upsample_scores(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Resize scores (B, H, T, h, w, K) bilinearly over the query positions: (B, H, T, *size, K)."""
    flat = scores.permute(0, 1, 2, 5, 3, 4).flatten(0, 2)
    return resize(flat, size).unflatten(0, scores.shape[:3]).permute(0, 1, 2, 4, 5, 3)
