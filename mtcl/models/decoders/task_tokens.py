"""Hierarchical task tokens: a token per task finds the task's features, a token per label its predictions.

Zhang, Ye, Li, Wang, Xu. Multi-Task Label Discovery via Hierarchical Task Tokens for Partially Annotated Dense
Predictions. ACM Multimedia 2025, arXiv:2411.18823; layers and sizes from the authors' public code (Evergreen0929/EEMTL,
HiTTs/models), where the network is called MTMSPrompter.

    global tokens: one vector per task, learned
    per scale:     tokens, projected -> task's map = scale's map x sigmoid(token . map); maps and tokens of all tasks
                   are mixed by softmax(q(token) . k(token)) -> per task 3x3
    per task:      all scales at the finest one's size, concatenated -> 1x1 -> map (B, C, h, w); sum of the tokens
    per task:      map -> ASPP -> 3x3 -> attention among the map's cells, halved, and the token -> final (B, D, h, w)
    per task:      token + embedding of each label -> MLP -> fine-grained tokens (D, K)
                   (1x1 of final) x softplus(fine-grained tokens . final) -> 3x3 -> scores of K labels -> prediction

The labels of depth are bins, those of normals directions, and the prediction is their expectation (``kinds``).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.models.decoders.atrc import Expectation, build_label_space
from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.blocks import ConvBlock, resize, resize_trained
from mtcl.models.decoders.deeplab import ASPP
from mtcl.models.output import DenseOutput, Size


class TaskTokens(Decoder):
    """Task features and predictions that learned tokens select, global ones per task and fine-grained ones per label.

    Features, all at the size of the finest backbone map: ``final`` (each task's map before its scores), ``labels``
    (scores of each task's labels), ``relevance`` (logit of how much the task's token selects each cell of ``final``).

    Args:
        channels: see :class:`Decoder`.
        strides: see :class:`Decoder`.
        tasks: see :class:`Decoder`.
        width: channels D of each task's final map and token.
        trunk_width: channels C of each task's map before its head, and of the global tokens; None: those of the
            coarsest backbone map.
        head_width: channels inside the MLP of the fine-grained tokens.
        rates: dilations of the spatial pyramid pooling.
        dropout: probability, after the pyramid.
        kinds: task -> how its prediction is divided into labels; see
            :func:`mtcl.models.decoders.atrc.build_label_space`. Without an entry the channels are the labels.
        bin_weights: task of ``kinds`` -> weight, relative to the task's, of the cross-entropy of its labels; without an
            entry none.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        tasks: Mapping[str, int],
        width: int = 256,
        trunk_width: int | None = None,
        head_width: int = 128,
        rates: Sequence[int] = (12, 24, 36),
        dropout: float = 0.5,
        kinds: Mapping[str, Mapping[str, Any]] | None = None,
        bin_weights: Mapping[str, float | None] | None = None,
    ):
        super().__init__(channels, strides, tasks)
        trunk_width = trunk_width or channels[-1]
        divided = {task: kind for task, kind in (kinds or {}).items() if task in self.tasks and kind is not None}
        spaces = {task: build_label_space(task, self.tasks[task], kind) for task, kind in divided.items()}
        counts = {task: spaces[task][0] if task in spaces else c for task, c in self.tasks.items()}
        self.bin_weights = {task: weight for task, weight in (bin_weights or {}).items() if task in spaces and weight}
        self.decode = nn.ModuleDict({task: expectation for task, (_, expectation) in spaces.items()})
        self.tokens = nn.Parameter(torch.empty(len(self.tasks), trunk_width))
        self.levels = nn.ModuleList(GlobalTokens(self.tasks, c, trunk_width) for c in channels)
        self.fuse = nn.ModuleDict({task: ScaleFusion(channels, trunk_width) for task in self.tasks})
        self.restore = nn.ModuleDict(
            {task: nn.ModuleList(nn.Linear(c, width) for c in channels) for task in self.tasks}
        )
        self.heads = nn.ModuleDict({task: TokenHead(trunk_width, width, rates, dropout) for task in self.tasks})
        self.logits = nn.ModuleDict({task: FineGrainedTokens(width, k, head_width) for task, k in counts.items()})
        self.feature_channels = {
            "final": dict.fromkeys(self.tasks, width),
            "labels": counts,
            "relevance": dict.fromkeys(self.tasks, 1),
        }
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.tokens)

    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Decode with the scores of all labels and the cells' relevance among the features."""
        final, tokens = self._select(features)
        labels = self._score_labels(final, tokens)
        relevance = {task: torch.einsum("bchw,bc->bhw", x, tokens[task])[:, None] for task, x in final.items()}
        maps = {"final": final, "labels": labels, "relevance": relevance}
        return DenseOutput(self._predict(labels, size), maps, [], size)

    def predict(self, features: list[Tensor], size: Size) -> dict[str, Tensor]:
        """Return the predictions alone."""
        return self._predict(self._score_labels(*self._select(features)), size)

    def compute_task_errors(
        self, output: DenseOutput, labels: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Compute the weighted cross-entropy of the nearest label at each cell of the maps of ``bin_weights``.

        A cell has the value of the pixel in its middle; values of zero are void, and so are cells beyond the image.
        """
        errors = {}
        for task, weight in self.bin_weights.items():
            scores = output.features["labels"][task].float()
            value = sample_cells(labels[task], scores.shape[-2:], output.frame)
            is_valid = (value != 0).any(dim=1) & value.isfinite().all(dim=1)
            values: Tensor = self.decode[task].values  # type: ignore[assignment]
            nearest = torch.cdist(value.flatten(2).transpose(1, 2).float(), values).argmin(dim=-1)
            # Not F.nll_loss: on maps it has no deterministic CUDA implementation.
            error = -scores.log_softmax(dim=1).gather(1, nearest.view_as(is_valid)[:, None])[:, 0]
            errors[task] = (weight * error, is_valid)
        return errors

    def _select(self, features: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return each task's final map (B, D, h, w) and its token in each image (B, D)."""
        levels = [level(x, self.tokens) for level, x in zip(self.levels, features)]
        final, tokens = {}, {}
        for i, task in enumerate(self.tasks):
            fused = self.fuse[task]([maps[task] for maps, _ in levels])
            layers: Iterable[nn.Module] = self.restore[task]  # type: ignore[assignment]
            restored = [layer(mixed[i]) for layer, (_, mixed) in zip(layers, levels)]
            final[task], tokens[task] = self.heads[task](fused, torch.stack(restored).sum(dim=0))
        return final, tokens

    def _score_labels(self, final: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the scores (B, K, h, w) of each task's labels, in single precision as bf16 would round depths."""
        with torch.autocast(self.tokens.device.type, enabled=False):
            return {task: head(final[task].float(), tokens[task].float()) for task, head in self.logits.items()}

    def _predict(self, labels: Mapping[str, Tensor], size: Size) -> dict[str, Tensor]:
        with torch.autocast(self.tokens.device.type, enabled=False):
            values = {task: self.decode[task](x) if task in self.decode else x for task, x in labels.items()}
            return {task: resize_trained(self._normalize(task, x), size) for task, x in values.items()}

    def _normalize(self, task: str, values: Tensor) -> Tensor:
        """Make the expectation of directions a unit vector, as published; leave other values as they are."""
        is_direction = task in self.decode and isinstance(self.decode[task], Expectation) and values.shape[1] > 1
        return F.normalize(values, dim=1) if is_direction else values

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the global tokens and what projects and compares them; with one task they are its own."""
        if len(self.tasks) > 1:
            yield self.tokens
            for level in self.levels:
                yield from level.shared_parameters()  # type: ignore[operator]


def sample_cells(label: Tensor, grid: Sequence[int], frame: Size) -> Tensor:
    """Sample a label (B, C, H, W) at the middle of each cell of a map, 0 beyond the label: (B, C, *grid).

    Args:
        label: of an image.
        grid: height and width of the map.
        frame: height and width in pixels that the map covers, from the image's upper left corner.
    """
    for dim, cells, side in ((2, grid[0], frame[0]), (3, grid[1], frame[1])):
        index = ((torch.arange(cells, device=label.device) + 0.5) * (side / cells)).long()
        is_inside = (index < label.shape[dim]).view(-1, *(1,) * (3 - dim))
        sampled = label.index_select(dim, index.clamp(max=label.shape[dim] - 1))
        label = torch.where(is_inside, sampled, torch.zeros_like(sampled))
    return label


class GlobalTokens(nn.Module):
    """Select every task's map from one of the backbone's by the tasks' tokens, and mix the tasks.

    Args:
        tasks: names.
        width: channels C_i of the backbone's map.
        token_width: channels C of the tokens.
    """

    def __init__(self, tasks: Iterable[str], width: int, token_width: int):
        super().__init__()
        self.names = list(tasks)
        self.project = nn.ModuleList(nn.Linear(token_width, width) for _ in self.names)
        self.scale = nn.Conv2d(width, width, 1, groups=width)
        several = len(self.names) > 1
        self.query = nn.Linear(width, width) if several else None
        self.key = nn.Linear(width, width) if several else None
        self.layers = nn.ModuleDict({task: ConvBlock(width, width) for task in self.names})

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return task -> map (B, C_i, h, w), and the tokens (T, C_i) of this scale.

        Args:
            x: (B, C_i, h, w).
            tokens: (T, C).
        """
        projected = torch.stack([layer(token) for layer, token in zip(self.project, tokens)])
        attention = torch.einsum("bchw,tc->tbhw", self.scale(x), projected).sigmoid()
        if self.query is not None and self.key is not None:
            scores = self.query(projected) @ self.key(projected).T * projected.shape[1] ** -0.5
            affinity = scores.softmax(dim=-1)
            # The tasks' maps are one map times their attention, so that mixing the attention mixes the maps.
            attention = torch.einsum("ts,sbhw->tbhw", affinity, attention)
            projected = affinity @ projected
        return {task: layer(x * a[:, None]) for (task, layer), a in zip(self.layers.items(), attention)}, projected

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that bear on several tasks, if there are several."""
        for module in (self.project, self.scale, self.query, self.key):
            if module is not None:
                yield from module.parameters()


class ScaleFusion(nn.Module):
    """Concatenate maps at the finest one's size and project them: (B, width, h, w).

    Each scale is projected at its own size and the projections are added, which is equal.
    """

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(c, width, 1, bias=i == 0) for i, c in enumerate(channels))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the fused map of maps (B, C_i, h_i, w_i), finest first."""
        size = maps[0].shape[-2:]
        return torch.stack([resize(layer(x), size) for layer, x in zip(self.project, maps)]).sum(dim=0)


class TokenHead(nn.Module):
    """Refine a task's map together with its token: spatial pyramid, then attention among cells and token.

    Args:
        inputs: channels C of the map.
        width: channels D of the result and of the token.
        rates: dilations of the pyramid.
        dropout: probability, after the pyramid.
    """

    def __init__(self, inputs: int, width: int, rates: Sequence[int], dropout: float):
        super().__init__()
        self.aspp = ASPP(inputs, width, rates, dropout)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.reduce = nn.ModuleList(nn.Conv2d(width, width, 2, stride=2, groups=width, bias=False) for _ in range(3))
        self.project = nn.ModuleList(nn.Linear(width, width) for _ in range(3))  # query, key, value
        self.restore, self.restore_token = nn.Linear(width, width), nn.Linear(width, width)
        self.mix = ConvBlock(width, width)

    def forward(self, x: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Return the refined map (B, D, h, w) and the token in each image (B, D).

        Args:
            x: (B, C, h, w).
            token: (D,).
        """
        x = self.conv(self.aspp(x))
        height, width = x.shape[-2:]
        even = F.pad(x, (0, width % 2, 0, height % 2))
        grid = [even.shape[-2] // 2, even.shape[-1] // 2]
        query, key, value = (
            project(torch.cat([reduce(even).flatten(2).transpose(1, 2), token.expand(x.shape[0], 1, -1)], dim=1))
            for reduce, project in zip(self.reduce, self.project)
        )
        attended = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        cells = self.restore(attended[:, :-1]).transpose(1, 2).unflatten(2, grid)
        return self.mix(resize(cells, [height, width]) + x), self.restore_token(attended[:, -1])


class FineGrainedTokens(nn.Module):
    """Score a task's labels: a token for each, made from the task's token, gates the label's channel.

    Args:
        width: channels D of the task's map and token.
        labels: number K of labels.
        hidden: channels inside the MLP.
    """

    def __init__(self, width: int, labels: int, hidden: int):
        super().__init__()
        self.embedding = nn.Linear(labels, width)
        self.mlp = nn.Sequential(
            *(nn.Linear(labels, hidden), nn.LayerNorm(hidden), nn.GELU()),
            *(nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.GELU()),
            nn.Linear(hidden, labels),
        )
        self.scale = nn.Conv2d(width, width, 1, groups=width)
        self.channels = nn.Conv2d(width, labels, 1)
        self.refine = nn.Conv2d(labels, labels, 3, padding=1)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """Return the scores (B, K, h, w) of a map (B, D, h, w) and its token (B, D)."""
        embedded = self.embedding(torch.eye(self.embedding.in_features, device=x.device)).T  # (D, K)
        fine = self.mlp(token[:, :, None] + embedded)  # (B, D, K)
        gate = F.softplus(torch.einsum("bchw,bck->bkhw", self.scale(x), fine))
        return self.refine(self.channels(x) * gate)
