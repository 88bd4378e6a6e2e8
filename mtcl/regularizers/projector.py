"""The projectors P_ts of one target: one stacked parameter per layer, its first axis the source task."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Module):
    """Projects sampled features by the drawn source's own weights: (B, K, C), source (B,) -> unit vectors (B, K, D),
    fp32.

    The source is a tensor, so that one graph serves every draw: no recompilation, and under DDP every parameter
    takes part in every step. Sources that were not drawn get a zero gradient (see :class:`MaskedAdamW`).
    """

    def __init__(self, sources: int, channels: int, hidden: int | None, dim: int, generator: torch.Generator):
        super().__init__()
        widths = [channels, dim] if hidden is None else [channels, hidden, dim]
        self.weights = nn.ParameterList(_uniform((sources, a, b), a, generator) for a, b in pairwise(widths))
        self.biases = nn.ParameterList(_uniform((sources, 1, b), a, generator) for a, b in pairwise(widths))

    def forward(self, feature: Tensor, source: Tensor) -> Tensor:
        with torch.autocast(feature.device.type, enabled=False):
            x = feature.float()
            for layer, (weight, bias) in enumerate(zip(self.weights, self.biases)):
                x = torch.baddbmm(
                    bias.index_select(0, source), F.relu(x) if layer else x, weight.index_select(0, source)
                )
            return F.normalize(x, dim=-1)


def _uniform(shape: tuple[int, ...], inputs: int, generator: torch.Generator) -> nn.Parameter:
    """PyTorch's default start of a linear layer, U(-1/sqrt(inputs), 1/sqrt(inputs)), from a private generator."""
    bound = inputs**-0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))
