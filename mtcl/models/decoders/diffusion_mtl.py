"""DiffusionMTL: initial maps of every task are noised, then denoised under the condition of all initial predictions.

Ye and Xu. DiffusionMTL: Learning Multi-Task Denoising Diffusion Model from Partially Annotated Data. CVPR 2024,
arXiv:2403.15389; sizes and order of the layers from the authors' public code, which has the diffusion of features only.

    all scales at half the finest map's size, concatenated -> 3x3 -> shared map (B, C, h, w)
    per task:  shared map -> 2 residual blocks -> initial map -> 1x1 -> initial prediction
    condition: initial predictions of all tasks, detached, concatenated -> 3x3 -> (B, C, h, w)
    per task:  x_T = noised initial map;  for t = T-1, ..., 1:  x_t <- posterior mean (x_t, denoised(x_t)) + noise
               final map = denoised(x_0) -> 1x1 -> prediction
    denoised:  3x3, + embedding of t -> blocks at a quarter of the size in which the condition attends to the noised
               map -> enlarged, + what went in -> 1x1, three 3x3 -> map of the task

The initial predictions are supervised, too. The authors' code denoises the labelled tasks of each image alone; here all
tasks are denoised together, and an unlabelled task has no loss: the gradients are the same.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from mtcl.errors import ParameterError
from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.blocks import predict_fp32, resize, resize_trained
from mtcl.models.output import DenseOutput, Size

DENOISE = ("features", "predictions")
TIME_FREQUENCIES = 256  # of the sinusoidal embedding of a diffusion step


class DiffusionMTL(Decoder):
    """Initial maps of every task, refined by a short diffusion process that sees all tasks' initial predictions.

    Features: ``final`` (each task's denoised pre-logit map), ``initial`` (its map before the noise); both at half the
    size of the finest backbone map.

    Args:
        channels: see :class:`Decoder`.
        strides: see :class:`Decoder`.
        tasks: see :class:`Decoder`.
        width: channels of all maps.
        head_width: channels inside the denoiser's last layers of each task.
        denoise: what is noised: ``features`` (initial maps) or ``predictions`` (initial predictions).
        steps: number of diffusion steps T, at least 1.
        blocks: attention blocks of the denoiser, shared by the tasks.
        heads: number of attention heads; divides the width.
        noise_at_inference: draw noise in :meth:`eval` mode, too; False: each step takes its mean.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        tasks: Mapping[str, int],
        width: int = 512,
        head_width: int = 512,
        denoise: str = "features",
        steps: int = 2,
        blocks: int = 4,
        heads: int = 4,
        noise_at_inference: bool = False,
    ):
        super().__init__(channels, strides, tasks)
        if width % heads:
            raise ParameterError("heads", f"={heads} must divide the width {width}")
        if denoise not in DENOISE:
            raise ParameterError("denoise", f"={denoise} must be one of {', '.join(DENOISE)}")
        self.denoise, self.noise_at_inference = denoise, noise_at_inference
        self.shared = nn.Conv2d(sum(channels), width, 3, padding=1)
        self.initial = nn.ModuleDict(
            {task: nn.Sequential(BasicBlock(width, width), BasicBlock(width, width)) for task in self.tasks}
        )
        self.initial_logits = nn.ModuleDict({task: nn.Conv2d(width, c, 1) for task, c in self.tasks.items()})
        self.condition = nn.Conv2d(sum(self.tasks.values()), width, 3, padding=1)
        nn.init.kaiming_normal_(self.condition.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.condition.bias)  # type: ignore[arg-type]
        noised = self.tasks if denoise == "predictions" else dict.fromkeys(self.tasks, width)
        self.denoiser = Denoiser(noised, width, head_width, blocks, heads)
        self.logits = nn.ModuleDict({task: nn.Conv2d(width, c, 1) for task, c in self.tasks.items()})
        self.process = DiffusionProcess(steps)
        self.feature_channels = {"final": dict.fromkeys(self.tasks, width), "initial": dict.fromkeys(self.tasks, width)}

    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Decode with the initial predictions as intermediate ones."""
        initial, initial_predictions, final, predictions = self._decode(features)
        return DenseOutput(
            {task: resize_trained(p, size) for task, p in predictions.items()},
            {"final": final, "initial": initial},
            [{task: resize_trained(p, size) for task, p in initial_predictions.items()}],
            size,
        )

    def predict(self, features: list[Tensor], size: Size) -> dict[str, Tensor]:
        """Return the final predictions; the initial ones are computed, for they condition these, and not resized."""
        return {task: resize(p, size) for task, p in self._decode(features)[3].items()}

    def _decode(self, features: list[Tensor]) -> tuple[dict[str, Tensor], ...]:
        """Return the initial maps, initial predictions, final maps and predictions, all (B, C, h, w) by task."""
        grid = [max(1, side // 2) for side in features[0].shape[-2:]]
        shared = self.shared(torch.cat([resize(x, grid) for x in features], dim=1))
        initial = {task: layers(shared) for task, layers in self.initial.items()}
        initial_predictions = {task: predict_fp32(self.initial_logits[task], x) for task, x in initial.items()}
        condition = self.condition(torch.cat([p.detach() for p in initial_predictions.values()], dim=1))
        draw = self.training or self.noise_at_inference
        x = self.process.add_noise(initial if self.denoise == "features" else initial_predictions, draw)
        for step in reversed(range(1, self.process.steps)):
            final = self.denoiser(x, condition, step)
            clean = final if self.denoise == "features" else self._predict(final)
            x = self.process.step_back(x, clean, step, draw)
        final = self.denoiser(x, condition, 0)
        return initial, initial_predictions, final, self._predict(final)

    def _predict(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {task: predict_fp32(self.logits[task], x) for task, x in maps.items()}

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the shared map's layer, the condition's and those of the denoiser that serve all tasks."""
        yield from self.shared.parameters()
        yield from self.condition.parameters()
        yield from self.denoiser.time.parameters()
        yield from self.denoiser.blocks.parameters()


class DiffusionProcess(nn.Module):
    """The forward and backward steps of a Gaussian diffusion whose network predicts the clean maps.

    Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. NeurIPS 2020, equations 4, 6 and 7; the variances
    rise from 1e-3 to 1e-2, evenly in their square roots, as in the authors' code.

    Args:
        steps: number of steps T, at least 1.
    """

    sqrt_signal: Tensor
    sqrt_noise: Tensor
    clean_part: Tensor
    noised_part: Tensor
    deviation: Tensor

    def __init__(self, steps: int):
        super().__init__()
        if steps < 1:
            raise ParameterError("steps", f"={steps} must be at least 1")
        self.steps = steps
        variance = torch.linspace(math.sqrt(1e-3), math.sqrt(1e-2), steps, dtype=torch.float64).square()  # beta_t
        signal = (1 - variance).cumprod(dim=0)
        earlier_signal = torch.cat([signal.new_ones(1), signal[:-1]])
        tables = {
            "sqrt_signal": signal.sqrt(),
            "sqrt_noise": (1 - signal).sqrt(),
            "clean_part": variance * earlier_signal.sqrt() / (1 - signal),
            "noised_part": (1 - variance).sqrt() * (1 - earlier_signal) / (1 - signal),
            "deviation": (variance * (1 - earlier_signal) / (1 - signal)).sqrt(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def add_noise(self, maps: Mapping[str, Tensor], draw: bool) -> dict[str, Tensor]:
        """Return task -> x_T of clean maps (B, C, h, w); ``draw=False``: the mean of x_T."""
        scaled = {task: self.sqrt_signal[-1] * x for task, x in maps.items()}
        return {t: x + self.sqrt_noise[-1] * torch.randn_like(x) for t, x in scaled.items()} if draw else scaled

    def step_back(
        self, noised: Mapping[str, Tensor], clean: Mapping[str, Tensor], step: int, draw: bool
    ) -> dict[str, Tensor]:
        """Return task -> x_{t-1} drawn given x_t and the predicted clean maps; ``draw=False``: its mean."""
        mean = {task: self.clean_part[step] * clean[task] + self.noised_part[step] * x for task, x in noised.items()}
        return {t: x + self.deviation[step] * torch.randn_like(x) for t, x in mean.items()} if draw else mean


class Denoiser(nn.Module):
    """The network that predicts every task's clean map from its noised map, a condition and the step.

    Args:
        channels: task -> channels of its noised map.
        width: channels of condition and result.
        head_width: channels inside the last layers of each task.
        blocks: number of attention blocks.
        heads: number of attention heads.
    """

    def __init__(self, channels: Mapping[str, int], width: int, head_width: int, blocks: int, heads: int):
        super().__init__()
        self.embed = nn.ModuleDict({task: nn.Conv2d(c, width, 3, padding=1) for task, c in channels.items()})
        self.time = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(ConditionBlock(width, heads) for _ in range(blocks))
        self.heads = nn.ModuleDict({task: self._head(width, head_width) for task in channels})
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]

    @staticmethod
    def _head(width: int, head_width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width, width, 1),
            *(nn.Conv2d(width, head_width, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(head_width, width, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True)),
        )

    def forward(self, noised: Mapping[str, Tensor], condition: Tensor, step: int) -> dict[str, Tensor]:
        """Return task -> clean map (B, width, h, w).

        Args:
            noised: task -> (B, C_t, h, w).
            condition: (B, width, h, w).
            step: of the diffusion, 0 to T - 1.
        """
        weight: Tensor = self.time[0].weight  # type: ignore[assignment]  # whose type autocast leaves as it is
        time = self.time(embed_step(step, weight))[:, None, None]
        embedded = torch.stack([layer(noised[task]) for task, layer in self.embed.items()]) + time  # (T, B, C, h, w)
        grid = [max(1, side // 4) for side in condition.shape[-2:]]
        x = resize(embedded.flatten(0, 1), grid).flatten(2).transpose(1, 2)
        query = resize(condition, grid).flatten(2).transpose(1, 2).repeat(len(self.embed), 1, 1)
        for block in self.blocks:
            query, x = block(query, x)
        attended = query.transpose(1, 2).unflatten(2, grid)
        clean = resize(attended, condition.shape[-2:]).unflatten(0, embedded.shape[:2]) + embedded
        return {task: head(x) for (task, head), x in zip(self.heads.items(), clean)}


class ConditionBlock(nn.Module):
    """Tokens of the condition (B, N, C) attend to those of the noised map (B, N, C); both pass an MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.source_norm, self.source_mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp, self.source_mlp = Mlp(width, 4 * width), Mlp(width, 4 * width)

    def forward(self, query: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return both after the block."""
        source = source + self.source_mlp(self.source_mlp_norm(source))
        q = self._split(self.query(self.query_norm(query)))
        k, v = (self._split(x) for x in self.key_value(self.source_norm(source)).chunk(2, dim=-1))
        query = query + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return query + self.mlp(self.mlp_norm(query)), source

    def _split(self, x: Tensor) -> Tensor:
        """Split the channels of x (B, N, C) among the heads: (B, heads, N, C / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def embed_step(step: int, like: Tensor) -> Tensor:
    """Return the sinusoidal embedding (256,) of a diffusion step, of the device and type of ``like``, as DiT has it.

    Peebles and Xie. Scalable Diffusion Models with Transformers. ICCV 2023.
    """
    half = TIME_FREQUENCIES // 2
    frequencies = torch.exp(torch.arange(half, dtype=like.dtype, device=like.device) * (-math.log(10000) / half))
    return torch.cat([torch.cos(step * frequencies), torch.sin(step * frequencies)])
