"""Restate as plainly as possible what DiffusionMTL's public code saves and computes.

Key names with their shapes, the tables of its diffusion, and the network as functions of a state dict under those
names, one task at a time. For images whose sides are multiples of 32, as there; evaluation mode. The layers' sizes are
those of the tensors, so that narrow networks can be compared; the public code has the widths of ResNet-18 alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.invpt_reference import random_state
from helpers.published_shapes import Shapes

MODEL = "diffusion_model"
DENOISER = f"{MODEL}.denoiser"
RESNET18 = (64, 128, 256, 512)
BACKBONE_BLOCKS = 2  # of each stage
Maps = dict[str, Tensor]  # task -> map


def published_shapes(
    tasks: Mapping[str, int],  # in their order
    channels: Sequence[int] = RESNET18,  # of the backbone's maps; the first is that of its stem, too
    width: int = 512,  # in the public code that of the last map
    head: int = 512,
    steps: int = 2,
    blocks: int = 4,
) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of a state dict of DiffusionMTL on ResNet-18. The defaults are the published ones."""
    shapes = Shapes()

    shapes.layer("backbone.conv1", channels[0], 3, 7, 7, bias=False)
    shapes.norm("backbone.bn1", channels[0])
    for stage, out in enumerate(channels, start=1):
        into = channels[max(0, stage - 2)]
        for n in range(BACKBONE_BLOCKS):
            shapes.block(f"backbone.layer{stage}.{n}", out if n else into, out)

    shapes.layer("backbone_embed", width, sum(channels), 3, 3)
    shapes.layer(f"{MODEL}.pred_combinator.out_layer", width, sum(tasks.values()), 3, 3)
    for table in make_tables(steps):
        shapes[table] = (steps,)
    shapes.layer(f"{DENOISER}.t_embedder.mlp.0", width, 256)
    shapes.layer(f"{DENOISER}.t_embedder.mlp.2", width, width)
    for n in range(blocks):
        block = f"{DENOISER}.crossblocks.{n}"
        for name in ("norm1", "norm2", "norm_kv", "norm2_kv"):
            shapes.layer(f"{block}.{name}", width)
        shapes.layer(f"{block}.attn.q", width, width, bias=False)
        shapes.layer(f"{block}.attn.kv", 2 * width, width, bias=False)
        shapes.layer(f"{block}.attn.proj", width, width)
        for mlp in ("mlp", "mlp_kv"):
            shapes.layer(f"{block}.{mlp}.fc1", 4 * width, width)
            shapes.layer(f"{block}.{mlp}.fc2", width, 4 * width)
    for task, outputs in tasks.items():
        for n in range(2):
            shapes.block(f"preliminary_dec.{task}.{n}", width, width)
        shapes.layer(f"preliminary_head.{task}.0", outputs, width, 1, 1)
        shapes.layer(f"{DENOISER}.pre_layer.{task}", width, width, 3, 3)
        for n, (out, into, kernel) in {
            0: (width, width, 1),
            1: (head, width, 3),
            3: (width, head, 3),
            5: (width, width, 3),
        }.items():
            shapes.layer(f"{DENOISER}.task_heads.{task}.{n}", out, into, kernel, kernel)
        shapes.layer(f"{DENOISER}.final_task_heads.{task}.linear_pred", outputs, width, 1, 1)
    return shapes


def published_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors of these shapes, the tables of the diffusion as the public code fills them.

    Larger variances keep the maps of so many residual blocks from growing.
    """
    state = random_state(dict(shapes), seed)
    state = {key: 4 * value if key.endswith("running_var") else value for key, value in state.items()}
    return state | make_tables(len(state[f"{MODEL}.betas"]))


def make_tables(steps: int) -> dict[str, Tensor]:
    """Return key -> table of the diffusion (steps,): DDPM's, of variances whose roots rise evenly."""
    first, last = 1e-3**0.5, 1e-2**0.5
    betas = [(first + (last - first) * i / max(1, steps - 1)) ** 2 for i in range(steps)]
    signal = [math.prod(1 - beta for beta in betas[: i + 1]) for i in range(steps)]
    earlier = [1.0, *signal[:-1]]
    variance = [b * (1 - e) / (1 - s) for b, e, s in zip(betas, earlier, signal)]
    tables = {
        "betas": betas,
        "alphas_cumprod": signal,
        "alphas_cumprod_prev": earlier,
        "sqrt_alphas_cumprod": [s**0.5 for s in signal],
        "sqrt_one_minus_alphas_cumprod": [(1 - s) ** 0.5 for s in signal],
        "log_one_minus_alphas_cumprod": [math.log(1 - s) for s in signal],
        "sqrt_recip_alphas_cumprod": [(1 / s) ** 0.5 for s in signal],
        "sqrt_recipm1_alphas_cumprod": [(1 / s - 1) ** 0.5 for s in signal],
        "posterior_variance": variance,
        "posterior_log_variance_clipped": [math.log(max(v, 1e-20)) for v in variance],
        "posterior_mean_coef1": [b * e**0.5 / (1 - s) for b, e, s in zip(betas, earlier, signal)],
        "posterior_mean_coef2": [(1 - e) * (1 - b) ** 0.5 / (1 - s) for b, e, s in zip(betas, earlier, signal)],
    }
    return {f"{MODEL}.{name}": torch.tensor(table) for name, table in tables.items()}


class Reference:
    """The public network in evaluation mode.

    ``noise``: map -> the noise that is added to it, of deviation 1; without it every noise is 0, which is the mean of
    each step.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        tasks: Sequence[str],  # in their order
        heads: int = 4,
        noise: Callable[[Tensor], Tensor] = torch.zeros_like,
    ):
        self.state, self.tasks, self.heads, self.noise = state, list(tasks), heads, noise

    def __call__(self, image: Tensor) -> tuple[Maps, Maps]:
        """Return predictions and initial predictions, of the image's size."""
        initial, final = self.decode(self.backbone(image))
        return {t: to(final[t], image.shape[-2:]) for t in final}, {t: to(initial[t], image.shape[-2:]) for t in final}

    def backbone(self, image: Tensor) -> list[Tensor]:
        """Return maps of strides 4, 8, 16 and 32."""
        x = F.conv2d(image, self.state["backbone.conv1.weight"], stride=2, padding=3)
        x = F.max_pool2d(self.batch_norm("backbone.bn1", x).relu(), 3, stride=2, padding=1)
        maps = []
        for stage in range(1, 5):
            for n in range(BACKBONE_BLOCKS):
                x = self.residual_block(f"backbone.layer{stage}.{n}", x, stride=2 if stage > 1 and n == 0 else 1)
            maps.append(x)
        return maps

    def decode(self, maps: Sequence[Tensor]) -> tuple[Maps, Maps]:
        """Return initial predictions and final ones, at half the finest map's size."""
        grid = [side // 2 for side in maps[0].shape[-2:]]
        shared = self.layer("backbone_embed", torch.cat([to(x, grid) for x in maps], dim=1))
        initial, predictions = {}, {}
        for task in self.tasks:
            x = self.residual_block(f"preliminary_dec.{task}.0", shared)
            initial[task] = self.residual_block(f"preliminary_dec.{task}.1", x)
            predictions[task] = self.layer(f"preliminary_head.{task}.0", initial[task])
        condition = self.layer(f"{MODEL}.pred_combinator.out_layer", torch.cat(list(predictions.values()), dim=1))
        return predictions, self.diffuse(initial, condition)

    def diffuse(self, initial: Maps, condition: Tensor) -> Maps:
        """Return final predictions, of initial maps that are noised to the last step and denoised from there."""
        last = len(self.state[f"{MODEL}.betas"]) - 1
        noised = {}
        for task, x in initial.items():
            signal, deviation = self.at("sqrt_alphas_cumprod", last), self.at("sqrt_one_minus_alphas_cumprod", last)
            noised[task] = signal * x + deviation * self.noise(x)
        for step in range(last, 0, -1):
            deviation = math.exp(self.at("posterior_log_variance_clipped", step) / 2)
            for task, x in noised.items():
                clean = self.denoise(task, x, condition, step)
                mean = self.at("posterior_mean_coef1", step) * clean + self.at("posterior_mean_coef2", step) * x
                noised[task] = mean + deviation * self.noise(x)
        head = f"{DENOISER}.final_task_heads"
        return {t: self.layer(f"{head}.{t}.linear_pred", self.denoise(t, x, condition, 0)) for t, x in noised.items()}

    def denoise(self, task: str, noised: Tensor, condition: Tensor, step: int) -> Tensor:
        """Return the clean map of a task at a step, as large as its noised map."""
        angles = [step * math.exp(-math.log(10000) * i / 128) for i in range(128)]
        time = torch.tensor([[math.cos(a) for a in angles] + [math.sin(a) for a in angles]], dtype=noised.dtype)
        time = self.layer(f"{DENOISER}.t_embedder.mlp.2", F.silu(self.layer(f"{DENOISER}.t_embedder.mlp.0", time)))
        start = self.layer(f"{DENOISER}.pre_layer.{task}", noised) + time[:, :, None, None]
        grid = [side // 4 for side in start.shape[-2:]]
        x, source = (to(m, grid).flatten(2).transpose(1, 2) for m in (condition, start))
        for n in range(sum(key.endswith(".attn.q.weight") for key in self.state)):
            block = f"{DENOISER}.crossblocks.{n}"
            source = source + self.mlp(f"{block}.mlp_kv", self.layer(f"{block}.norm2_kv", source))
            keys = self.layer(f"{block}.norm_kv", source)
            x = x + self.attention(f"{block}.attn", self.layer(f"{block}.norm1", x), keys)
            x = x + self.mlp(f"{block}.mlp", self.layer(f"{block}.norm2", x))
        x = to(x.transpose(1, 2).unflatten(2, grid), start.shape[-2:]) + start
        for n in (0, 1, 3, 5):
            x = self.layer(f"{DENOISER}.task_heads.{task}.{n}", x)
            x = x.relu() if n else x
        return x

    def attention(self, name: str, x: Tensor, source: Tensor) -> Tensor:
        query = self.layer(f"{name}.q", x)
        key, value = self.layer(f"{name}.kv", source).chunk(2, dim=-1)
        mixed = []
        for q, k, v in zip(*(part.chunk(self.heads, dim=-1) for part in (query, key, value))):
            mixed.append((q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v)
        return self.layer(f"{name}.proj", torch.cat(mixed, dim=-1))

    def residual_block(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        hidden = F.conv2d(x, self.state[f"{name}.conv1.weight"], stride=stride, padding=1)
        hidden = self.layer(f"{name}.conv2", self.batch_norm(f"{name}.bn1", hidden).relu())
        if f"{name}.downsample.0.weight" in self.state:
            x = F.conv2d(x, self.state[f"{name}.downsample.0.weight"], stride=stride)
            x = self.batch_norm(f"{name}.downsample.1", x)
        return (self.batch_norm(f"{name}.bn2", hidden) + x).relu()

    # --- Single layers by name

    def at(self, table: str, step: int) -> float:
        return self.state[f"{MODEL}.{table}"][step].item()

    def layer(self, name: str, x: Tensor) -> Tensor:
        """Apply a layer norm, linear layer or convolution at the same size, by the dimensions of its weight."""
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        if weight.dim() == 1:
            return F.layer_norm(x, weight.shape, weight, bias)
        if weight.dim() == 2:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.layer(f"{name}.fc2", F.gelu(self.layer(f"{name}.fc1", x)))

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.state[f"{name}.{part}"] for part in parts))


def to(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
