"""MQTransformer: tasks attend to each other through a few queries per task, not pixel by pixel.

Xu, Li, Yuan, Yang and Zhang, "Multi-Task Learning with Multi-Query Transformer for Dense Prediction", arXiv 2205.14354.

    all scales at 1/4, concatenated -> per task: 1x1 -> its features (B, width, h, w)
    encoder, shared: each task's queries read its features (attention, linear mixing, MLP)
    cross-task query attention: the queries of all tasks attend to each other (attention, MLP)
    decoder, shared: each pixel reads its task's queries (attention, MLP), then two linear maps and an MLP -> GELU
    per task: 3x3, BN, ReLU -> final -> 1x1 -> prediction

The two linear maps equal the decoder's self-attention of the authors' code for a single image: theirs runs over the
images of a batch (sequence and batch are exchanged), and a prediction here does not depend on the other images.
Omitted is what their code computes and never uses: a patch embedding, relative positions, a third attention.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from mtcl.errors import ParameterError
from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.blocks import ConvBlock, predict_tasks, resize
from mtcl.models.output import DenseOutput, Size


class MQTransformer(Decoder):
    """Learned queries per task that read its features, attend to each other and are read by its pixels.

    Features: ``final`` (each task's pre-logit map, at the stride of the finest backbone map).

    Args:
        channels: see :class:`Decoder`.
        strides: see :class:`Decoder`.
        tasks: see :class:`Decoder`.
        width: channels of features and queries, a multiple of ``heads``.
        head_width: channels of the pre-logit maps.
        queries: number of queries per task.
        heads: number of attention heads.
        drop_path: probability of dropping a residual branch.
        query_drop_path: the same for the attention between the tasks' queries.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        tasks: Mapping[str, int],
        width: int = 256,
        head_width: int = 64,
        queries: int = 64,
        heads: int = 4,
        drop_path: float = 0.1,
        query_drop_path: float = 0.5,
    ):
        super().__init__(channels, strides, tasks)
        self.feature_channels = {"final": dict.fromkeys(self.tasks, head_width)}
        # A 1x1 convolution of a concatenation is a sum of 1x1 convolutions, each at its own scale.
        self.project = nn.ModuleDict(
            {t: nn.ModuleList(nn.Conv2d(c, width, 1, bias=i == 0) for i, c in enumerate(channels)) for t in self.tasks}
        )
        if width % heads:
            raise ParameterError("heads", f"={heads} must divide the width {width}")
        count = len(self.tasks)
        self.queries = nn.Parameter(torch.empty(count, queries, width))
        self.query_position = nn.Parameter(torch.empty(count, queries, width // heads))  # the same for every head
        self.key_position = nn.Parameter(torch.empty(count, queries, width // heads))
        for parameter in (self.queries, self.query_position, self.key_position):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.read = CrossAttention(width, heads)
        self.mix = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        self.read_mlp = mlp(width, width)
        self.reason = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.reason_mlp = mlp(width, width)
        self.write = CrossAttention(width, heads)
        self.write_mlp = mlp(width, 3 * width)
        self.refine = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        self.refine_mlp = mlp(width, 3 * width)
        self.drop, self.query_drop = DropPath(drop_path), DropPath(query_drop_path)
        self.heads = nn.ModuleDict({task: ConvBlock(width, head_width) for task in self.tasks})
        self.logits = nn.ModuleDict({task: nn.Conv2d(head_width, c, 1) for task, c in self.tasks.items()})

    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Encode queries, let them attend to each other, decode the pixels."""
        grid = features[0].shape[-2:]
        pixels = [self._task_features(task, features) for task in self.tasks]  # (B, h * w, C) each
        queries = [self._encode(x, index) for index, x in enumerate(pixels)]  # (B, Q, C) each
        queries = list(self._reason(torch.cat(queries, dim=1)).chunk(len(pixels), dim=1))
        final = {}
        for index, task in enumerate(self.tasks):
            x = self._decode(pixels[index], queries[index], index)
            final[task] = self.heads[task](x.transpose(1, 2).unflatten(2, grid))
        predictions = predict_tasks(self.logits, final, size)
        return DenseOutput(predictions, {"final": final}, [], size)

    def _task_features(self, task: str, features: list[Tensor]) -> Tensor:
        """Return a task's features as tokens (B, h * w, C)."""
        layers: Iterable[nn.Module] = self.project[task]  # type: ignore[assignment]
        parts = [resize(layer(x), features[0].shape[-2:]) for layer, x in zip(layers, features)]
        return torch.stack(parts).sum(dim=0).flatten(2).transpose(1, 2)

    def _encode(self, x: Tensor, index: int) -> Tensor:
        """Return the queries (B, Q, C) of a task after reading its features x."""
        queries = self.queries[index].expand(x.shape[0], -1, -1)
        queries = queries + self.drop(self.read(queries, x, query_position=self.query_position[index]))
        queries = queries + self.mix(queries)
        return queries + self.drop(self.read_mlp(queries))

    def _reason(self, queries: Tensor) -> Tensor:
        """Let the queries (B, T * Q, C) of all tasks attend to each other."""
        queries = queries + self.query_drop(self.reason(queries, queries, queries, need_weights=False)[0])
        return queries + self.query_drop(self.reason_mlp(queries))

    def _decode(self, x: Tensor, queries: Tensor, index: int) -> Tensor:
        """Return the features x (B, h * w, C) of a task after reading its queries."""
        read = x + self.drop(self.write(x, queries, key_position=self.key_position[index]))
        read = read + self.drop(self.write_mlp(read))
        x = x + self.drop(self.refine(read))
        return F.gelu(x + self.drop(self.refine_mlp(x)))

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the encoder, the attention between tasks and the decoder."""
        modules = (self.read, self.mix, self.read_mlp, self.reason, self.reason_mlp)
        for module in (*modules, self.write, self.write_mlp, self.refine, self.refine_mlp):
            yield from module.parameters()


class CrossAttention(nn.Module):
    """Multi-head attention of queries (B, M, C) to a source (B, N, C).

    Position embeddings (M or N, C / heads) are added to the channels of each head.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        self.key = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        self.value = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, source: Tensor, query_position: Tensor | None = None, key_position: Tensor | None = None
    ) -> Tensor:
        """Return the attended values (B, M, C)."""
        q = self.query(x if query_position is None else x + query_position.repeat(1, self.heads))
        k = self.key(source if key_position is None else source + key_position.repeat(1, self.heads))
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, self.value(source)))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(width: int, hidden: int) -> nn.Sequential:
    """Return layer norm and a two-layer perceptron."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
