"""The projectors P_ts of one target: one stacked parameter per layer, its first axis the source task."""

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.errors import ParameterError


class StackedLayers(nn.Module):
    """Linear layers with ReLU in between and weights of their own for every source.

    The source is a tensor, so that one graph serves every draw: no recompilation, and under DDP every parameter
    takes part in every step. Sources that were not drawn get a zero gradient (see
    :class:`~mtcl.regularizers.masked_adamw.MaskedAdamW`).

    Args:
        num_sources: number of stacks.
        channels: C, of the features.
        hidden_dim: width of the hidden layer; None: a linear projector.
        embed_dim: D, of the result.
        generator: of the initial weights.
    """

    def __init__(
        self, num_sources: int, channels: int, hidden_dim: int | None, embed_dim: int, generator: torch.Generator
    ):
        super().__init__()
        widths = [channels, embed_dim] if hidden_dim is None else [channels, hidden_dim, embed_dim]
        self.weights = nn.ParameterList(_uniform((num_sources, a, b), a, generator) for a, b in pairwise(widths))
        self.biases = nn.ParameterList(_uniform((num_sources, 1, b), a, generator) for a, b in pairwise(widths))

    def forward(self, feature: Tensor, source: Tensor) -> Tensor:
        """Map sampled features (B, K, C) by the weights of ``source`` (B,): (B, K, D), fp32."""
        with torch.autocast(feature.device.type, enabled=False):
            x = feature.float()
            for layer, (weight, bias) in enumerate(zip(self.weights, self.biases)):
                x = torch.baddbmm(
                    bias.index_select(0, source), F.relu(x) if layer else x, weight.index_select(0, source)
                )
            return x


class Projector(StackedLayers):
    """The layers of :class:`StackedLayers`, then normalization."""

    def forward(self, feature: Tensor, source: Tensor) -> Tensor:
        """Project sampled features (B, K, C) by the weights of ``source`` (B,): unit vectors (B, K, D), fp32."""
        return F.normalize(super().forward(feature, source), dim=-1)


class Unprojected(nn.Module):
    """Normalization alone, in place of a projector: it has no parameters.

    Args:
        width: D; narrower features are filled up with zeros, which changes no cosine.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, feature: Tensor, source: Tensor) -> Tensor:  # noqa: ARG002
        """Normalize sampled features (B, K, C): unit vectors (B, K, D), fp32."""
        with torch.autocast(feature.device.type, enabled=False):
            return F.normalize(F.pad(feature.float(), (0, self.width - feature.shape[-1])), dim=-1)


def build_projectors(
    sharing: str, channels: Mapping[str, int], hidden_dim: int | None, embed_dim: int | None, generator: torch.Generator
) -> nn.ModuleDict:
    """Build the projectors of all targets.

    Args:
        sharing: one projector per ``pair`` of target and source, per ``target``, or one for ``all``.
        channels: target -> C_t, equal where one projector serves all.
        hidden_dim: see :class:`Projector`; ``embed_dim`` and ``generator`` alike.
        embed_dim: see :class:`Projector`; None: features are normalized only.
        generator: see :class:`Projector`.

    Returns:
        target -> projector.

    Raises:
        ParameterError: unknown sharing, or one projector for features of different width.
    """
    if sharing not in ("pair", "target", "all"):
        raise ParameterError("projector_sharing", f"={sharing} is not known; choose pair, target or all")
    if embed_dim is None:
        return nn.ModuleDict({t: Unprojected(max(channels.values())) for t in channels})
    if sharing == "all":
        if len(set(channels.values())) > 1:
            raise ParameterError("projector_sharing", "=all needs features of equal width; choose pair or target")
        width = next(iter(channels.values()))
        return nn.ModuleDict(dict.fromkeys(channels, Projector(1, width, hidden_dim, embed_dim, generator)))
    num_sources = len(channels) if sharing == "pair" else 1
    return nn.ModuleDict(
        {t: Projector(num_sources, width, hidden_dim, embed_dim, generator) for t, width in channels.items()}
    )


def _uniform(shape: tuple[int, ...], inputs: int, generator: torch.Generator) -> nn.Parameter:
    """Initialize as PyTorch's linear layer does, U(-1/sqrt(inputs), 1/sqrt(inputs)), from a private generator."""
    bound = inputs**-0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))
