"""TaskDiffusion: the labels of all tasks share one noised map, from which all predictions are denoised together.

Yang, Jiang, Hou, Zhang, Chen, Li. Multi-Task Dense Predictions via Unleashing the Power of Diffusion. ICLR 2025;
layers, orders and constants from the authors' public code (YuqiYang213/TaskDiffusion, models/transformers), of which
this is the variant without MLoRE.

    per level:     map of a backbone block -> 1x1 = X_i (B, W, h, w)
                   per task: two pairs of (3x3, batch norm, GELU, 1x1) of X_i = F_ik, the same at all steps
    training:      labels of all tasks at the size of X -> label map y_0 (see :class:`LabelEncoder`)
                   y = alpha_t y_0 + sigma_t noise, with a t for each image; predictions = decode(y, t)
    inference:     y = noise;  for each of T steps from t = 1 to 0:  predictions = decode(y, t);  y_0 = their label map;
                   y = alpha_s y_0 + sigma_s (y - alpha_t y_0) / sigma_t  at the next step's s  (DDIM)
    decode(y, t):  per level: [X_i, y] -> 1x1 -> two timed blocks -> gates of all pairs of tasks
                   per level and task k: sum over l of sigmoid(gate_kl) F_il -> timed 1x1
                   per task: mean of the levels, weighted at each cell -> timed residual blocks, the last at 1/4 = final
                   final -> 3x3 -> prediction
    training only: per task: all F_ik, enlarged to 1/4 -> (3x3, batch norm, GELU, 1x1) + 1x1 -> 3x3
                   -> initial prediction

A timed layer is scaled and shifted by a function of t after its batch norm (:class:`TimedConv`). No part is that of
:mod:`mtcl.models.decoders.diffusion_mtl`, which noises its own initial maps and never sees a label: its schedule is one
of discrete variances, its steps are drawn from DDPM's posterior, its embedding of t is not learned.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.errors import ParameterError
from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.blocks import SpatialNorm, predict_fp32, predict_tasks, resize
from mtcl.models.output import DenseOutput, Size

KINDS = {"class": None, "metres": 1, "direction": 3, "probability": 1}  # what a pixel is -> channels; None: two or more
VOID = 255  # of classes and edges in a batch; void depths and directions are 0
MAX_DEPTH = 80.0  # metres: to which a prediction is clamped before it is encoded, as in the authors' code
MAX_TIME = 0.999  # largest t of training, as in the authors' code
LEVEL_STRIDE = 16  # all maps have the size of the backbone map of the closest stride: a ViT's own
TIME_FREQUENCIES = 8  # of the embedding of t
NOISE_SIDE = 32  # cells per side of the noise that inference repeats over its map


class TaskDiffusion(Decoder):
    """A conditional diffusion over the labels of all tasks, which inference denoises in a few steps.

    In training the labels are noised and denoised once; features and predictions are those of that pass. In evaluation
    mode :meth:`forward` and :meth:`predict` see no labels and take all steps. Without labels in training, and where an
    image has none of a task, they count as void.

    Features: ``final`` (each task's map before its logits).

    Args:
        channels: see :class:`Decoder`.
        strides: see :class:`Decoder`.
        tasks: see :class:`Decoder`.
        width: channels W of all maps, a multiple of 4.
        blocks: timed residual blocks of each task before its logits.
        steps: number T of steps at inference.
        label_scale: largest absolute value of a label map; the noise has a deviation of 1.
        stride: of the final maps, in pixels.
        kinds: task -> what a pixel of its prediction is: ``class``, ``metres``, ``direction`` or ``probability``.
            Without an entry: ``class``.
        separate_tasks: tasks whose part of the label map is kept apart from the others'; absent tasks are ignored.
        class_thresholds: task of two classes -> probability above which a step's prediction is encoded as the second
            class for the next step; without an entry, or None: the more probable class is.
        noise_at_inference: draw the noise anew for each batch; False: every image starts from the same noise.

    Raises:
        ParameterError: the width is no multiple of 4, or a kind or threshold does not fit its task.
    """

    reads_labels = True
    start_noise: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        tasks: Mapping[str, int],
        width: int = 576,
        blocks: int = 3,
        steps: int = 3,
        label_scale: float = 0.01,
        stride: int = 4,
        kinds: Mapping[str, str] | None = None,
        separate_tasks: Sequence[str] = (),
        class_thresholds: Mapping[str, float | None] | None = None,
        noise_at_inference: bool = False,
    ):
        super().__init__(channels, strides, tasks)
        if width % 4:
            raise ParameterError("width", f"={width} must be a multiple of 4")
        names, count = list(self.tasks), len(channels)
        self.stride, self.noise_at_inference = stride, noise_at_inference
        self.steps = list_steps(steps)
        self.level = min(range(count), key=lambda level: abs(strides[level] - LEVEL_STRIDE))
        self.project = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.task_maps = nn.ModuleList(
            nn.ModuleDict({task: nn.Sequential(*_map_layers(width), *_map_layers(width)) for task in names})
            for _ in channels
        )
        self.encoder = LabelEncoder(self.tasks, width, label_scale, kinds or {}, separate_tasks, class_thresholds or {})
        self.time = nn.Sequential(
            FourierTime(TIME_FREQUENCIES),
            nn.Linear(1 + 2 * TIME_FREQUENCIES, width),
            nn.GELU(),
            nn.Linear(width, width),
        )
        self.condition = nn.ModuleList(nn.Conv2d(width + self.encoder.channels, width, 1) for _ in channels)
        self.interactions = nn.ModuleList(LevelInteraction(names, width) for _ in channels)
        self.level_weights = nn.ModuleDict(
            {task: TimedBlock(count * width, width, count, (1, 3), width) for task in names}
        )
        self.refine = nn.ModuleList(
            nn.ModuleDict({task: TimedBlock(width, width, width, (3, 1), width) for task in names})
            for _ in range(blocks)
        )
        self.logits = nn.ModuleDict({task: nn.Conv2d(width, c, 3, padding=1) for task, c in self.tasks.items()})
        self.initial = nn.ModuleDict({task: InitialMap(count * width, width) for task in names})
        self.initial_logits = nn.ModuleDict({task: nn.Conv2d(width, c, 3, padding=1) for task, c in self.tasks.items()})
        shape = (1, self.encoder.channels, NOISE_SIDE, NOISE_SIDE)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("start_noise", torch.empty(shape).copy_(noise), persistent=False)
        self.feature_channels = {"final": dict.fromkeys(names, width)}

    def forward(self, features: list[Tensor], size: Size, labels: Mapping[str, Tensor] | None = None) -> DenseOutput:
        """Denoise noised labels in training, and noise in evaluation mode; initial predictions are intermediate.

        Args:
            features: see :meth:`Decoder.forward`.
            size: see :meth:`Decoder.forward`.
            labels: task -> label in batch layout, of the image; only read in training.
        """
        levels, maps = self._encode(features)
        grid = self._final_grid(size)
        if self.training:
            final = self._denoise_labels(levels, maps, labels or {}, size)
        else:
            final = self._sample(levels, maps, grid)
        initial = {
            task: layers(torch.cat([level[task] for level in maps], dim=1), grid)
            for task, layers in self.initial.items()
        }
        intermediate = predict_tasks(self.initial_logits, initial, size)
        return DenseOutput(predict_tasks(self.logits, final, size), {"final": final}, [intermediate], size)

    def predict(self, features: list[Tensor], size: Size) -> dict[str, Tensor]:
        """Return the predictions of the last step alone."""
        final = self._sample(*self._encode(features), self._final_grid(size))
        return predict_tasks(self.logits, final, size)

    def _final_grid(self, size: Size) -> list[int]:
        return [-(-side // self.stride) for side in size]

    def _encode(self, features: list[Tensor]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Return each level's map (B, W, h, w), and task -> its map of each level, which no step changes."""
        grid = features[self.level].shape[-2:]
        levels = [resize(layer(x), grid) for layer, x in zip(self.project, features)]
        maps = [
            {task: task_layers(x) for task, task_layers in layers.items()}  # type: ignore[operator]
            for layers, x in zip(self.task_maps, levels)
        ]
        return levels, maps

    def _denoise_labels(
        self,
        levels: Sequence[Tensor],
        maps: Sequence[Mapping[str, Tensor]],
        labels: Mapping[str, Tensor],
        size: Size,
    ) -> dict[str, Tensor]:
        """Return the final maps of labels noised at a time drawn for each image; gradients reach the label encoder."""
        clean = self.encoder.encode_labels(labels, size, levels[0])
        log_snr = cosine_log_snr(torch.rand(len(clean), dtype=clean.dtype, device=clean.device) * MAX_TIME)
        signal, noise = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        noised = signal[:, None, None, None] * clean + noise[:, None, None, None] * torch.randn_like(clean)
        return self._decode(levels, maps, noised, log_snr, self._final_grid(size))

    def _sample(
        self, levels: Sequence[Tensor], maps: Sequence[Mapping[str, Tensor]], grid: Sequence[int]
    ) -> dict[str, Tensor]:
        """Return the final maps of the last step, at ``grid``; those of earlier steps have the size of the levels."""
        batch, _, height, width = levels[0].shape
        noised = self._start(batch, height, width)
        for step in self.steps[:-1]:
            final = self._decode(levels, maps, noised, self._log_snr(step), levels[0].shape[-2:])
            predictions = {task: predict_fp32(head, final[task]) for task, head in self.logits.items()}
            noised = step.advance(noised, self.encoder.encode_predictions(predictions))
        return self._decode(levels, maps, noised, self._log_snr(self.steps[-1]), grid)

    def _start(self, batch: int, height: int, width: int) -> Tensor:
        """Return the noise (B, M, height, width) from which the denoising starts."""
        if self.noise_at_inference:
            shape = (batch, self.encoder.channels, height, width)
            return torch.randn(shape, dtype=self.start_noise.dtype, device=self.start_noise.device)
        rows, columns = (torch.arange(side, device=self.start_noise.device) % NOISE_SIDE for side in (height, width))
        return self.start_noise[:, :, rows][..., columns].expand(batch, -1, -1, -1)

    def _log_snr(self, step: "Step") -> Tensor:
        return torch.full((1,), step.log_snr, dtype=self.start_noise.dtype, device=self.start_noise.device)

    def _decode(
        self,
        levels: Sequence[Tensor],
        maps: Sequence[Mapping[str, Tensor]],
        noised: Tensor,
        log_snr: Tensor,
        grid: Sequence[int],
    ) -> dict[str, Tensor]:
        """Return task -> final map (B, W, *grid).

        Args:
            levels: (B, W, h, w) each.
            maps: of each level, task -> (B, W, h, w).
            noised: label map (B, M, h, w).
            log_snr: of the noised map, (B,) or (1,).
            grid: height and width from the last block on.
        """
        time = self.time(log_snr)
        mixed = []
        for x, task_maps, condition, interaction in zip(levels, maps, self.condition, self.interactions):
            mixed.append(interaction(condition(torch.cat([x, noised.to(x.dtype)], dim=1)), task_maps, time))
        final = {}
        for task, weights in self.level_weights.items():
            candidates = [level[task] for level in mixed]
            shares = weights(torch.cat(candidates, dim=1), time).softmax(dim=1)
            final[task] = torch.stack([shares[:, i, None] * x for i, x in enumerate(candidates)]).sum(dim=0)
        for i, blocks in enumerate(self.refine):
            if i == len(self.refine) - 1:
                final = {task: resize(x, grid) for task, x in final.items()}
            final = {task: final[task] + block(final[task], time) for task, block in blocks.items()}  # type: ignore[operator]
        return final

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that bear on several tasks' predictions: all up to the weights of the levels."""
        for module in (self.project, self.task_maps, self.encoder, self.time, self.condition):
            yield from module.parameters()
        for interaction in self.interactions:
            yield from interaction.shared_parameters()  # type: ignore[operator]

    def head_weight(self, task: str) -> nn.Parameter:
        """Return the weight of the first residual block of the task, which its loss and its features depend on."""
        blocks: Any = self.refine[0]
        return blocks[task].timed.conv.weight


class Step(NamedTuple):
    """One step of DDIM, from the time t to an earlier time s.

    Attributes:
        log_snr: logarithm of the signal's power divided by the noise's, at t.
        signal: factor of the label map, at t.
        noise: factor of the noise, at t.
        next_signal: factor of the label map, at s.
        next_noise: factor of the noise, at s.
    """

    log_snr: float
    signal: float
    noise: float
    next_signal: float
    next_noise: float

    def advance(self, noised: Tensor, clean: Tensor) -> Tensor:
        """Return the noised map at s, from that at t and the clean one that is predicted: (B, M, h, w) each.

        Song, Meng, Ermon. Denoising Diffusion Implicit Models. ICLR 2021, equation 12 with a deviation of 0.
        """
        noise = (noised - self.signal * clean) / self.noise
        return self.next_signal * clean + self.next_noise * noise


def list_steps(count: int) -> list[Step]:
    """Return the steps of inference from t = 1 to 0; each goes one step further than the next one starts.

    The authors' code takes t = 1 - i / count and s = max(1 - (i + 2) / count, 0): the asymmetric time intervals of
    Chen, Zhang, Hinton. Analog Bits. ICLR 2023.
    """
    if count < 1:
        raise ParameterError("steps", f"={count} must be at least 1")
    now = torch.tensor([1 - i / count for i in range(count)], dtype=torch.float64, device="cpu")
    then = torch.tensor([max(1 - (i + 2) / count, 0.0) for i in range(count)], dtype=torch.float64, device="cpu")
    log_snr, next_log_snr = cosine_log_snr(now), cosine_log_snr(then)
    columns = [log_snr, *(sign * x for x in (log_snr, next_log_snr) for sign in (1, -1))]
    columns[1:] = [x.sigmoid().sqrt() for x in columns[1:]]
    return [Step(*row) for row in torch.stack(columns, dim=1).tolist()]


def cosine_log_snr(time: Tensor) -> Tensor:
    """Return the logarithm of the signal's power divided by the noise's, at times from 0 to 1, by the cosine schedule.

    Nichol and Dhariwal. Improved Denoising Diffusion Probabilistic Models. ICML 2021; offsets and the smallest noise
    from the authors' code.
    """
    cosine = torch.cos((time + 0.0002) / 1.00025 * (math.pi / 2))
    return -(cosine**-2 - 1).clamp(min=1e-5).log()


class FourierTime(nn.Module):
    """Embed a number per image (B,) by itself, and by sines and cosines of learned frequencies: (B, 1 + 2 count)."""

    def __init__(self, count: int):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(count))

    def forward(self, x: Tensor) -> Tensor:
        """Return the embedding in the precision of the frequencies, which autocast leaves alone."""
        angles = 2 * math.pi * x[:, None] * self.frequencies
        return torch.cat([x[:, None], angles.sin(), angles.cos()], dim=1)


class TimedConv(nn.Module):
    """Convolution and batch norm, then x (1 + scale) + shift, both linear in SiLU of the time's embedding.

    Args:
        inputs: channels of the map.
        outputs: channels of the result.
        kernel: side of the convolution, odd.
        time_width: channels of the embedding.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, time_width: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        self.norm = SpatialNorm(outputs)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time_width, 2 * outputs))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return (B, outputs, h, w) of x (B, inputs, h, w) and the embedding (B, time_width) or (1, time_width)."""
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        return self.norm(self.conv(x)) * (scale + 1) + shift


class TimedBlock(nn.Module):
    """Timed convolution, GELU, convolution.

    Args:
        inputs: channels of the map.
        width: channels between the convolutions.
        outputs: channels of the result.
        kernels: sides of the two convolutions, odd.
        time_width: channels of the time's embedding.
    """

    def __init__(self, inputs: int, width: int, outputs: int, kernels: tuple[int, int], time_width: int):
        super().__init__()
        self.timed = TimedConv(inputs, width, kernels[0], time_width)
        self.conv = nn.Conv2d(width, outputs, kernels[1], padding=kernels[1] // 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return (B, outputs, h, w); arguments as in :meth:`TimedConv.forward`."""
        return self.conv(F.gelu(self.timed(x, time)))


class LevelInteraction(nn.Module):
    """Mix the tasks' maps of one level by gates that depend on the noised label map and on the time.

    Args:
        tasks: names.
        width: channels W.
    """

    def __init__(self, tasks: Sequence[str], width: int):
        super().__init__()
        self.count = len(tasks)
        self.shared = nn.ModuleList(TimedBlock(width, width, width, (3, 1), width) for _ in range(2))
        self.gates = TimedConv(width, self.count**2, 3, width)
        self.heads = nn.ModuleDict({task: TimedConv(width, width, 1, width) for task in tasks})

    def forward(self, x: Tensor, task_maps: Mapping[str, Tensor], time: Tensor) -> dict[str, Tensor]:
        """Return task -> map (B, W, h, w).

        Args:
            x: the level's map with the noised label map in it, (B, W, h, w).
            task_maps: task -> map of the level without noise (B, W, h, w).
            time: embedding, (B, W) or (1, W).
        """
        for block in self.shared:
            x = block(x, time)
        gates = self.gates(x, time).sigmoid().unflatten(1, (self.count, self.count))
        sources = torch.stack(list(task_maps.values()), dim=1)
        return {
            task: head((gates[:, i, :, None] * sources).sum(dim=1), time)
            for i, (task, head) in enumerate(self.heads.items())
        }

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters up to the gates of all tasks."""
        yield from self.shared.parameters()
        yield from self.gates.parameters()


class InitialMap(nn.Module):
    """Enlarge a task's maps of all levels (B, inputs, h, w) and reduce them to one (B, width, *size); training only."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(*_map_layers(inputs, width))
        self.shortcut = nn.Conv2d(inputs, width, 1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Return the map; the shortcut, which commutes with resizing, comes first."""
        return self.layers(resize(x, size)) + resize(self.shortcut(x), size)


def _map_layers(inputs: int, width: int | None = None) -> list[nn.Module]:
    """Return 3x3 convolution, batch norm, GELU, 1x1 convolution."""
    width = width or inputs
    return [nn.Conv2d(inputs, width, 3, padding=1), SpatialNorm(width), nn.GELU(), nn.Conv2d(width, width, 1)]


class LabelEncoder(nn.Module):
    """Encode the labels, or the predictions, of all tasks as one label map (B, M, h, w) of values within +-scale.

    A class is embedded by a table whose last row is the void; other labels by a 1x1 convolution, and their void by a
    vector. Each has W/4 channels. Those of the joint tasks are concatenated and projected to W channels. The map is
    that of each separate task, then the joint one, squashed by a sigmoid.

    Args:
        tasks: name -> channels of its prediction.
        width: W.
        scale: largest absolute value.
        kinds: see :class:`TaskDiffusion`.
        separate: see ``separate_tasks`` of :class:`TaskDiffusion`.
        thresholds: see ``class_thresholds`` of :class:`TaskDiffusion`.

    Attributes:
        channels: M of the map.
    """

    def __init__(
        self,
        tasks: Mapping[str, int],
        width: int,
        scale: float,
        kinds: Mapping[str, str],
        separate: Sequence[str],
        thresholds: Mapping[str, float | None],
    ):
        super().__init__()
        self.tasks, self.scale = dict(tasks), scale
        self.kinds = {task: _check_kind(task, c, kinds.get(task)) for task, c in tasks.items()}
        self.thresholds = {
            task: _check_threshold(task, tasks[task], p)
            for task, p in thresholds.items()
            if task in tasks and p is not None
        }
        self.separate = [task for task in tasks if task in separate]
        self.joint = [task for task in tasks if task not in separate]
        part = width // 4
        self.embed = nn.ModuleDict(
            {
                task: nn.Embedding(c + 1, part) if self.kinds[task] == "class" else nn.Conv2d(c, part, 1)
                for task, c in tasks.items()
            }
        )
        self.void = nn.ParameterDict({task: torch.randn(part) for task in tasks if self.kinds[task] != "class"})
        self.merge = nn.Conv2d(part * len(self.joint), width, 1) if self.joint else None
        self.channels = part * len(self.separate) + (width if self.joint else 0)

    def encode_labels(self, labels: Mapping[str, Tensor], frame: Size, like: Tensor) -> Tensor:
        """Return the label map of a batch, at the size of the maps.

        Args:
            labels: task -> label in batch layout; a task that lacks is void.
            frame: height and width of the padded image that the maps cover; beyond the labels it is void.
            like: map (B, W, h, w), for size and device.
        """
        grid, parts = like.shape[-2:], {}
        for task, channels in self.tasks.items():
            label = labels.get(task)
            if self.kinds[task] == "class":
                parts[task] = self._embed_class(task, sample_classes(label, channels, frame, like))
                continue
            if label is None:
                value, void = like.new_zeros(len(like), channels, *grid), like.new_ones(len(like), 1, *grid)
            else:
                value, void = average_label(label, self.kinds[task], frame, grid)
            absent = self.void[task][:, None, None]
            parts[task] = void * absent + (1 - void) * self.embed[task](value)
        return self._join(parts)

    def encode_predictions(self, predictions: Mapping[str, Tensor]) -> Tensor:
        """Return the label map of raw predictions: task -> (B, C, h, w)."""
        parts = {}
        for task, prediction in predictions.items():
            kind = self.kinds[task]
            if kind == "class":
                parts[task] = self._embed_class(task, self._choose_class(task, prediction))
            else:
                parts[task] = self.embed[task](_to_value(prediction, kind))
        return self._join(parts)

    def _choose_class(self, task: str, logits: Tensor) -> Tensor:
        """Return the class of each cell, int64 (B, h, w)."""
        if task in self.thresholds:
            return (logits.softmax(dim=1)[:, 1] > self.thresholds[task]).long()
        return logits.argmax(dim=1)

    def _embed_class(self, task: str, classes: Tensor) -> Tensor:
        return self.embed[task](classes).permute(0, 3, 1, 2)

    def _join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the label map of the tasks' parts (B, W/4, h, w), in single precision at least."""
        merged = [parts[task] for task in self.separate]
        if self.merge is not None:
            merged.append(self.merge(torch.cat([parts[task] for task in self.joint], dim=1)))
        joined = torch.cat(merged, dim=1)
        joined = joined.to(torch.promote_types(joined.dtype, torch.float32))
        return (2 * joined.sigmoid() - 1) * self.scale


def sample_classes(label: Tensor | None, channels: int, frame: Size, like: Tensor) -> Tensor:
    """Return the class of the pixel in the middle of each cell, int64 (B, h, w); ``channels`` where it is void.

    Args:
        label: classes (B, H, W); None: all void.
        channels: number of classes.
        frame: see :meth:`LabelEncoder.encode_labels`.
        like: map (B, W, h, w), for size and device.
    """
    if label is None:
        return torch.full((len(like), *like.shape[-2:]), channels, device=like.device)
    padded = pad_to_frame(label[:, None].float(), frame, VOID)
    sampled = F.interpolate(padded, like.shape[-2:], mode="nearest-exact")[:, 0].long()
    return torch.where(sampled < channels, sampled, channels)


def average_label(label: Tensor, kind: str, frame: Size, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Average the valid pixels of a label in the middle of each cell (bilinear resizing).

    Args:
        label: (B, C, H, W).
        kind: of :data:`KINDS`, not ``class``.
        frame: see :meth:`LabelEncoder.encode_labels`.
        grid: height and width of the result.

    Returns:
        The averages (B, C, *grid), 0 where all of these pixels are void, and the void fraction (B, 1, *grid).
    """
    is_valid = (label != VOID) if kind == "probability" else (label != 0).any(dim=1, keepdim=True)
    is_valid = is_valid & label.isfinite().all(dim=1, keepdim=True)
    value = torch.where(is_valid, label, 0.0)
    valid_fraction = resize(pad_to_frame(is_valid.to(value.dtype), frame, 0), grid)
    return resize(pad_to_frame(value, frame, 0), grid) / valid_fraction.clamp(min=1e-6), 1 - valid_fraction


def pad_to_frame(x: Tensor, frame: Size, value: float) -> Tensor:
    """Pad x (B, C, H, W) at its right and bottom to the size of the frame."""
    return F.pad(x, (0, frame[1] - x.shape[-1], 0, frame[0] - x.shape[-2]), value=value)


def _to_value(prediction: Tensor, kind: str) -> Tensor:
    """Convert a raw prediction (B, C, h, w) to the values of a label."""
    if kind == "metres":
        return prediction.clamp(0.0, MAX_DEPTH)  # an int and a float cannot become ONNX
    return F.normalize(prediction, dim=1) if kind == "direction" else prediction.sigmoid()


def _check_kind(task: str, channels: int, kind: str | None) -> str:
    """Return the kind of a task's labels, ``class`` by default, or raise ``ParameterError`` if it can't be that."""
    if kind is None and channels < 2:
        raise ParameterError(f"kinds.{task}", f" is missing: {task} has one channel, so give metres or probability")
    kind = "class" if kind is None else kind
    if not isinstance(kind, str) or kind not in KINDS:
        raise ParameterError(f"kinds.{task}", f"={kind} must be one of {', '.join(KINDS)}")
    expected = KINDS[kind]
    if channels < 2 if expected is None else channels != expected:
        number = "two channels or more" if expected is None else f"{expected} channel{'s' if expected > 1 else ''}"
        raise ParameterError(f"kinds.{task}", f"={kind} is for predictions of {number}, {task} has {channels}")
    return kind


def _check_threshold(task: str, channels: int, threshold: float) -> float:
    """Return the threshold of a task, or raise ``ParameterError`` if it hasn't two classes."""
    if channels != 2:
        raise ParameterError(
            f"class_thresholds.{task}", f" needs a task of two classes, {task} has {channels} channels"
        )
    return threshold
