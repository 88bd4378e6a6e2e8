"""InvPT++: Ye and Xu, *InvPT++: Inverted Pyramid Multi-Task Transformer for Visual Scene Understanding*, TPAMI 2024.

    InvPT, in which a stage uses the previous stage's scores by a cross-scale self-attention of two types
    Fusion Attention:     this stage's scores, mixed with the previous stage's by a 1x1 convolution over heads
    Selective Attention:  a query attends only to the keys with the highest previous scores at its position

    selected (Q x k of K) = the k = ceil(key_fraction K) highest of the previous scores of each query and head
    attended              = softmax over the selected keys alone
    to the next stage     = this stage's scores of selected keys, the previous stage's of the others

Sources: the abstract (arXiv 2306.04842) names the two types and the aggregation of encoder features. The paper's text
was not at hand, its public repository has the code of InvPT alone (issue 35 asks for both attentions), and no
checkpoint is public. Fusion Attention and the aggregation are taken to be those that InvPT's code has: message passing
of attention, and encoder maps added to the stages. The formulas of Selective Attention above are our choice: each head
selects separately, among the keys of all tasks together; how many keys; what goes on to the next stage; the selection
has no gradient; and it replaces Fusion Attention unless both are asked for.

Shapes: B images, H heads, Q queries and K keys of all tasks together.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from mtcl.errors import ParameterError
from mtcl.models.decoders.invpt import InvPT, TaskAttention

CROSS_SCALE = ("fusion", "selective", "both")
FINEST_FRACTION = 1_000_000  # largest denominator of the part of the keys that is selected


class InvPTPlusPlus(InvPT):
    """InvPT with a choice of how a stage uses the attention scores of the stage before it.

    Features and further arguments: see :class:`InvPT`.

    Args:
        channels: see :class:`Decoder`.
        strides: see :class:`Decoder`.
        tasks: see :class:`Decoder`.
        width: see :class:`InvPT`.
        prediction_width: see :class:`InvPT`.
        heads: see :class:`InvPT`.
        mlp_ratio: see :class:`InvPT`.
        downsample: see :class:`InvPT`.
        aggregate_first: see :class:`InvPT`.
        cross_scale: ``fusion`` (exactly InvPT), ``selective``, or ``both``: the selected keys' scores are fused.
        key_fraction: part of the keys that a query attends to in the stages after the first, above 0 and at most 1;
            unused by ``fusion``.
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
        cross_scale: str = "selective",
        key_fraction: float = 0.25,
    ):
        if cross_scale not in CROSS_SCALE:
            raise ParameterError("cross_scale", f"={cross_scale} must be one of {', '.join(CROSS_SCALE)}")
        if not 0 < key_fraction <= 1:
            raise ParameterError("key_fraction", f"={key_fraction} must be above 0 and at most 1")
        selective = partial(SelectiveAttention, key_fraction=key_fraction, also_fuses=cross_scale == "both")
        super().__init__(
            channels,
            strides,
            tasks,
            width,
            prediction_width,
            heads,
            mlp_ratio,
            downsample,
            aggregate_first,
            make_attention=TaskAttention if cross_scale == "fusion" else selective,
        )


class SelectiveAttention(TaskAttention):
    """Self-attention among all tasks, of each query to the keys with the highest scores in the previous stage.

    All scores are computed and those of other keys are masked: there are few keys (1/64 of the image per task), and to
    gather them for each query would take more memory than it saves arithmetic.

    Args:
        tasks: see :class:`TaskAttention`.
        width: see :class:`TaskAttention`.
        heads: see :class:`TaskAttention`.
        pool: see :class:`TaskAttention`.
        fuses_scores: whether there is a previous stage.
        key_fraction: part of the keys that is selected, above 0 and at most 1.
        also_fuses: fuse the scores with the previous stage's, too, as :class:`TaskAttention` does.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        width: int,
        heads: int,
        pool: int,
        fuses_scores: bool,
        key_fraction: float,
        also_fuses: bool,
    ):
        super().__init__(tasks, width, heads, pool, fuses_scores and also_fuses)
        self.key_ratio = as_ratio(key_fraction)

    def combine(self, scores: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mask the scores (B, H, Q, K) of keys that are not selected; see :meth:`TaskAttention.combine`."""
        scores, _ = super().combine(scores, previous)
        if previous is None:
            return scores, scores
        selected = select_keys(previous, self.key_ratio)
        return scores.masked_fill(~selected, -math.inf), torch.where(selected, scores, previous)


def select_keys(scores: Tensor, ratio: tuple[int, int]) -> Tensor:
    """Return the mask (..., K) of the keys with the highest of the scores (..., K).

    Args:
        scores: (..., K).
        ratio: part of the K keys that is selected, rounded up, as two whole numbers: torch can't write a program that
            rounds a product of a float and a size.
    """
    numerator, denominator = ratio
    count = -(-scores.shape[-1] * numerator // denominator)
    highest = scores.detach().topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, highest, True)


def as_ratio(fraction: float) -> tuple[int, int]:
    """Return the numerator and denominator of a fraction above 0, rounded so that 0.1 is 1/10 and 1/3 is 1/3."""
    nearest = Fraction(fraction).limit_denominator(FINEST_FRACTION)
    return max(nearest, Fraction(1, FINEST_FRACTION)).as_integer_ratio()
