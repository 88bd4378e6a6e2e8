"""TaskExpert, a re-implementation: every task mixes experts of each backbone map with its memory of earlier maps.

Ye and Xu. TaskExpert: Dynamically Assembling Multi-Task Representations with Memorial Mixture-of-Experts. ICCV 2023,
arXiv:2307.15324. Its code was never released. The abstract and the caption of its figure 2 were read, and say: experts
decompose a backbone map into several generic maps; gates of each task, which depend on the image, mix them; the memory
is one more expert, every layer updates it, and after the last one it gives the predictions. All sizes, the layers of
experts, gates and memory, and the order of what follows are ours (docs/models.md lists them):

    memory:             zeros (B, T, W, h, w)
    per backbone map X, earliest first:
        experts:        E_1..E_N = convolution, batch norm, GELU of X (shared by the tasks)    -> (B, N, W, h, w)
        per task:       X -> 1x1, layer norm, GELU = H;  gates = softmax(1x1 of H + linear of the mean of H over pixels)
                        mixture = sum over n of gate_n E_n + gate_(N+1) memory
                        memory  = memory + (convolution, batch norm, GELU of the mixture)
    per task:           memory, enlarged to 1/4 -> 3x3, batch norm, GELU -> final -> 1x1 -> prediction

The last line is that of TaskPrompter, the authors' model before it, whose code is public.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.errors import ParameterError
from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.blocks import SpatialNorm, predict_tasks, resize
from mtcl.models.output import DenseOutput, Size

GATING = ("pixel", "image")
MEMORY_UPDATE = ("add", "replace")
MEMORY_STRIDE = 16  # the memory has the size of the backbone map of the closest stride: a ViT's own


class TaskExpert(Decoder):
    """Task-specific mixtures of shared experts at every backbone map, collected in a memory per task.

    Features: ``final`` (each task's map before its logits).

    Args:
        channels: see :class:`Decoder`.
        strides: see :class:`Decoder`.
        tasks: see :class:`Decoder`.
        num_experts: number N of experts of each backbone map.
        width: channels W of the experts' maps and of the memory.
        kernel: side of the experts' and the memory's convolutions, odd.
        gate_width: channels of H inside the gates.
        gating: gates of each ``pixel``, or of the ``image``, from the mean over its pixels alone.
        memory_update: a mixture is added to the memory (``add``) or stands in for it (``replace``).
        head_width: channels of the final maps.
        stride: of the final maps, in pixels.

    Raises:
        ParameterError: the kernel is even, or ``gating`` or ``memory_update`` is unknown.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        tasks: Mapping[str, int],
        num_experts: int = 4,
        width: int = 448,
        kernel: int = 3,
        gate_width: int = 256,
        gating: str = "pixel",
        memory_update: str = "add",
        head_width: int = 448,
        stride: int = 4,
    ):
        super().__init__(channels, strides, tasks)
        if kernel % 2 == 0:
            raise ParameterError("kernel", f"={kernel} must be odd")
        for name, value, choices in (
            ("gating", gating, GATING),
            ("memory_update", memory_update, MEMORY_UPDATE),
        ):
            if value not in choices:
                raise ParameterError(name, f"={value} must be one of {', '.join(choices)}")
        self.width, self.stride = width, stride
        self.memory_level = min(range(len(strides)), key=lambda level: abs(strides[level] - MEMORY_STRIDE))
        self.levels = nn.ModuleList(
            MemorialExperts(c, self.tasks, num_experts, width, kernel, gate_width, gating, memory_update)
            for c in channels
        )
        self.heads = nn.ModuleDict({task: ConvGelu(width, head_width, 3) for task in self.tasks})
        self.logits = nn.ModuleDict({task: nn.Conv2d(head_width, c, 1) for task, c in self.tasks.items()})
        self.feature_channels = {"final": dict.fromkeys(self.tasks, head_width)}

    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Pass the memory through all levels and predict from it."""
        grid = features[self.memory_level].shape[-2:]
        # In single precision under autocast, too: the memory is a sum over the levels.
        memory = torch.zeros(features[0].shape[0], len(self.tasks), self.width, *grid, device=features[0].device)
        for level, x in zip(self.levels, features):
            memory = level(resize(x, grid), memory)
        finer = [-(-side // self.stride) for side in size]
        final = {task: head(resize(memory[:, i], finer)) for i, (task, head) in enumerate(self.heads.items())}
        return DenseOutput(predict_tasks(self.logits, final, size), {"final": final}, [], size)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the experts."""
        for level in self.levels:
            yield from level.experts.parameters()  # type: ignore[union-attr]

    def head_weight(self, task: str) -> nn.Parameter:
        """Return the weight of the task's head: gates come before it, but a decided softmax passes no gradient."""
        head: Any = self.heads[task]
        return head[0].weight


class ConvGelu(nn.Sequential):
    """Convolution with "same" padding, batch norm, GELU."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
            SpatialNorm(outputs),
            nn.GELU(),
        )


class MemorialExperts(nn.Module):
    """Decompose a backbone map by experts, mix them and the memory for each task, and update the memory.

    Args:
        inputs: channels C of the backbone map.
        tasks: names.
        num_experts: N.
        width: channels W.
        kernel: see :class:`TaskExpert`.
        gate_width: see :class:`TaskExpert`.
        gating: see :class:`TaskExpert`.
        memory_update: see :class:`TaskExpert`.
    """

    def __init__(
        self,
        inputs: int,
        tasks: Iterable[str],
        num_experts: int,
        width: int,
        kernel: int,
        gate_width: int,
        gating: str,
        memory_update: str,
    ):
        super().__init__()
        names = list(tasks)
        self.num_experts, self.memory_update = num_experts, memory_update
        self.experts = ConvGelu(inputs, num_experts * width, kernel)  # all experts side by side
        self.gates = nn.ModuleDict({task: Gate(inputs, gate_width, num_experts + 1, gating) for task in names})
        self.write = nn.ModuleDict({task: ConvGelu(width, width, kernel) for task in names})

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Return the updated memory (B, T, W, h, w).

        Args:
            x: backbone map (B, C, h, w).
            memory: of every task (B, T, W, h, w).
        """
        experts = self.experts(x).unflatten(1, (self.num_experts, -1))
        gates = torch.stack([gate(x) for gate in self.gates.values()], dim=1)
        mixed = mix_experts(gates, experts, memory)
        written = torch.stack([write(mixed[:, i]) for i, write in enumerate(self.write.values())], dim=1)
        return memory + written if self.memory_update == "add" else written


class Gate(nn.Module):
    """Weigh the experts for one task: (B, C, h, w) -> (B, count, h, w), which sums to 1 over ``count``.

    Args:
        inputs: C.
        width: channels of the hidden map H.
        count: number of experts, the memory among them.
        gating: ``pixel`` or ``image``: the weights of an image are equal at all pixels.
    """

    def __init__(self, inputs: int, width: int, count: int, gating: str):
        super().__init__()
        self.hidden = nn.Conv2d(inputs, width, 1)
        self.norm = nn.LayerNorm(width)
        self.context = nn.Linear(width, count)
        self.local = nn.Linear(width, count, bias=False) if gating == "pixel" else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the weights in single precision, as torch's softmax under autocast."""
        hidden = F.gelu(self.norm(self.hidden(x).permute(0, 2, 3, 1)))  # (B, h, w, width)
        scores = self.context(hidden.mean(dim=(1, 2), keepdim=True)).expand(*hidden.shape[:-1], -1)
        if self.local is not None:
            scores = scores + self.local(hidden)
        return scores.softmax(dim=-1).permute(0, 3, 1, 2)


def mix_experts(gates: Tensor, experts: Tensor, memory: Tensor) -> Tensor:
    """Mix experts and memory: sum over n of gate_n E_n + gate_(N+1) memory, for every task at every pixel.

    Args:
        gates: (B, T, N + 1, h, w); the last is the memory's.
        experts: (B, N, W, h, w).
        memory: (B, T, W, h, w).

    Returns:
        Mixtures (B, T, W, h, w).
    """
    return torch.einsum("btnhw,bnchw->btchw", gates[:, :, :-1], experts) + gates[:, :, -1:] * memory
