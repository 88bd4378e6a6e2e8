"""Joint-task regularization, JTR: the predictions of all tasks must look like the labels, to an auto-encoder.

Nishi, Kim, Li, Pfister, "Joint-Task Regularization for Partially Labeled Multi-Task Learning", CVPR 2024: a comparator
of the contrastive regularizer, training-only as well.

Of each image the maps of all tasks are stacked along the channels, once as predicted and once with labels in place of
the predictions wherever the image has labels of a task. An auto-encoder with encoder E and decoder D is trained beside
the model to see whether the two differ:

    Y' = predictions of all tasks,   Y = labels of the labelled tasks, predictions of the others
    L_distance       = mean over cells of 1 - cos(E(Y), E(Y'))      trains the model: E's weights are constants
    L_encoder        = the same, of detached maps                   trains E
    L_reconstruction = error of D(E(Y)) and of D(E(Y')), detached   trains E and D: no code of E can be trivial
    L = sum_t w_t L_task_t + lambda * mean over images of (4 L_distance + 8 L_encoder + 2 L_reconstruction)

Pixels that lack a label of any labelled task of their image are masked in both stacks. What is the code's
(KentoNishi/JTR-CVPR-2024) and what is our choice is said in ``configs/regularizer/jtr.yaml``.
"""

import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mtcl.errors import ParameterError, UserError
from mtcl.models.base import DenseOutput
from mtcl.regularizers.base import Regularizer, RegularizerOutput
from mtcl.regularizers.map_encoding import DEPTH_FACTORS, check_encodable, encode_label, encode_prediction
from mtcl.regularizers.mtpsl import FilmLayer
from mtcl.regularizers.sampling import Draw, draw_nothing
from mtcl.tasks.base import Task

DETACH_RULES = ("auto", "labelled", "none")
TERMS = ("distance", "encoder_distance", "reconstruction")


class JointTaskRegularization(Regularizer):
    """Distance of the stacked predictions from the stacked labels in the space of an auto-encoder.

    Three lines in any training loop:

    >>> from mtcl.tasks import build_task
    >>> tasks = {name: build_task(name) for name in ("depth", "normals", "edge")}
    >>> maps = {name: torch.randn(2, task.channels, 48, 64, requires_grad=True) for name, task in tasks.items()}
    >>> labels = {"depth": torch.rand(2, 1, 48, 64) * 5 + 1, "edge": torch.rand(2, 1, 48, 64).round(),
    ...           "normals": torch.zeros(2, 3, 48, 64)}  # no label: its prediction is what the loss trains

    >>> regularizer = JointTaskRegularization(tasks, seed=0)
    >>> draw = regularizer.sample(step=0, ids=["first", "second"])
    >>> output = DenseOutput(maps, {}, [], (48, 64))
    >>> loss = regularizer.compute_loss(output, labels, draw).loss  # train regularizer.parameters(), too
    >>> loss.backward()

    An image without any label adds nothing. ``losses`` of the result: the three terms, means over the images without
    their weights; ``loss`` is their weighted sum.

    Args:
        tasks: name -> task, at least two.
        channels: ignored; other regularizers read feature maps of that width.
        seed: of the auto-encoder's initialization and of every draw; torch's global generator is never touched.
        feature: at which of a model's features a trainer compares gradients; the loss reads none.
        stride: one pixel of so many, in height and width, enters the auto-encoder.
        widths: channels of its levels; each level ends in a pooling by two.
        distance_weight: of the distance that trains the model.
        encoder_distance_weight: of the distance that trains the encoder.
        reconstruction_weight: of the error of both reconstructions, which trains the auto-encoder.
        hard_classes: classes enter the model's distance as samples, one-hot, with the gradient of the probabilities
            (Gumbel-softmax at temperature 1); else as probabilities.
        depth_mean: metres, of inverse depth of 20 times its value; depth z enters as the normal distribution's
            probability of a value up to z.
        depth_std: see ``depth_mean``.
        detach_rule: which predictions have no gradient: ``labelled`` (those of tasks that label the image), ``none``,
            ``auto`` (``none`` in images labelled for every task, else ``labelled``).

    With two views per step and ``task_loss.views="first"`` the model's distance is that of the second views and the
    auto-encoder is trained on the first ones.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        channels: Mapping[str, int] | None = None,  # noqa: ARG002
        *,
        seed: int = 0,
        feature: str = "final",
        stride: int = 4,
        widths: Sequence[int] = (64, 128, 256),
        distance_weight: float = 4.0,
        encoder_distance_weight: float = 8.0,
        reconstruction_weight: float = 2.0,
        hard_classes: bool = True,
        depth_mean: float = 2.3618,
        depth_std: float = 1.5876,
        detach_rule: str = "auto",
    ):
        super().__init__()
        if len(tasks) < 2:
            raise UserError("joint-task regularization needs at least two tasks; switch the regularizer off for one")
        check_encodable(tasks)
        if detach_rule not in DETACH_RULES:
            raise ParameterError("detach_rule", f"={detach_rule} is not known; choose one of {', '.join(DETACH_RULES)}")
        self.tasks, self.seed, self.feature, self.stride = dict(tasks), seed, feature, stride
        self.weights = (distance_weight, encoder_distance_weight, reconstruction_weight)
        self.hard_classes, self.detach_rule = hard_classes, detach_rule
        self.encoding = MapEncoding(depth_mean, depth_std)
        generator = torch.Generator().manual_seed(seed)
        num_channels = sum(task.channels for task in self.tasks.values())
        self.encoder = Encoder([num_channels, *widths], generator)
        self.decoder = Decoder([*reversed(widths)], num_channels, generator)
        self.sums: Tensor
        self.register_buffer("sums", torch.zeros(1 + len(TERMS)), persistent=False)  # images, then sums over them

    def sample(self, step: int, ids: Sequence[str]) -> Draw:
        """Draw a seed per image, f(seed, step, id), from which the device computes the noise of its samples."""
        keys = [[0x6A7472, self.seed, step, zlib.crc32(id.encode())] for id in ids]  # a stream of its own
        seeds = [int(np.random.default_rng(key).integers(2**32)) for key in keys]
        return draw_nothing(ids)._replace(seeds=torch.tensor(seeds, dtype=torch.int64))

    def compute_loss(
        self,
        output: DenseOutput,
        labels: Mapping[str, Tensor],
        draw: Draw,
        teacher: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> RegularizerOutput:
        """Compute the three terms of a model's predictions; see the module's formulas."""
        assert draw.seeds is not None
        with torch.autocast(draw.seeds.device.type, enabled=False):
            has_views = self.task_loss.views == "first"
            num_images = len(draw.seeds) // (self.task_loss.views_per_step if has_views else 1)
            stacks = self._stack_maps(output, labels, draw.seeds, slice(-num_images, None))
            y, y_hat = stacks.target(1, hard=self.hard_classes), stacks.predicted(0, hard=self.hard_classes)
            constants = {name: parameter.detach() for name, parameter in self.encoder.named_parameters()}
            code, _ = functional_call(self.encoder, constants, (torch.cat([y, y_hat]),))
            distance = cosine_distance(*code.chunk(2)) * stacks.weight

            with torch.no_grad():
                if has_views:
                    stacks = self._stack_maps(output, labels, draw.seeds, slice(num_images))
                y, y_hat = stacks.target(2, hard=True), stacks.predicted(3, hard=False)
                targets = torch.cat([stacks.target(4, hard=False), y_hat])
            code, sizes = self.encoder(torch.cat([y, y_hat]))
            encoder_distance = cosine_distance(*code.chunk(2)) * stacks.weight
            error = self._reconstruction_error(self.decoder(code, sizes), targets, stacks.mask.repeat(2, 1, 1, 1))
            reconstruction = sum(error.chunk(2)) * stacks.weight
            values = torch.stack([distance, encoder_distance, reconstruction])  # (3, B)
            with torch.no_grad():
                self.sums += torch.cat([stacks.weight.sum()[None], values.sum(dim=1)])
            terms = values.mean(dim=1).unbind()
        loss = torch.stack([weight * term for weight, term in zip(self.weights, terms)]).sum()
        return RegularizerOutput(loss, dict(zip(TERMS, terms)))

    def _stack_maps(self, output: DenseOutput, labels: Mapping[str, Tensor], seeds: Tensor, rows: slice) -> "JointMaps":
        """Encode the predictions and labels of the batch's ``rows`` at every stride-th pixel."""
        start = (self.stride - 1) // 2  # of an even stride one of the cell's middle pixels
        pixels = (..., slice(start, None, self.stride), slice(start, None, self.stride))
        predictions = {name: output.predictions[name][rows][pixels] for name in self.tasks}
        predictions = {n: x.to(torch.promote_types(x.dtype, torch.float32)) for n, x in predictions.items()}
        sampled = {name: labels[name][rows][pixels] for name in self.tasks}
        valid = torch.stack([task.valid(sampled[name]) for name, task in self.tasks.items()])[:, :, None]  # (T,B,1,h,w)
        has_label = valid.flatten(2).any(dim=2)[..., None, None, None]  # (T, B, 1, 1, 1)
        mask = (valid | ~has_label).all(dim=0).float()
        if self.detach_rule != "none":
            is_detached = has_label & ~has_label.all(dim=0) if self.detach_rule == "auto" else has_label
            predictions = {
                name: torch.where(detached, x.detach(), x)
                for (name, x), detached in zip(predictions.items(), is_detached)
            }
        encoded_labels = [self.encoding.encode_label(task, sampled[name]) for name, task in self.tasks.items()]
        weight = has_label.any(dim=0).flatten().float()
        return JointMaps(self.tasks, self.encoding, predictions, encoded_labels, has_label, mask, weight, seeds[rows])

    def _reconstruction_error(self, outputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Sum the errors of all tasks' channels, each the mean over the masked-in pixels: (N, C, h, w) -> (N,)."""
        channels = [task.channels for task in self.tasks.values()]
        parts = zip(self.tasks.values(), outputs.split(channels, dim=1), targets.split(channels, dim=1))
        error = sum(self.encoding.compare(task, x, y) for task, x, y in parts)  # (N, h, w)
        mask = mask[:, 0]
        return (error * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1)

    def summary(self) -> dict[str, float]:
        """Return the three terms, without their weights, as means over the images with a label since the last call."""
        images, *sums = self.sums.tolist()
        self.sums.zero_()
        return {name: value / images for name, value in zip(TERMS, sums)} if images else {}


class MapEncoding:
    """Encode a task's map for the auto-encoder, and compare its reconstruction with it.

    As in :mod:`mtcl.regularizers.map_encoding`, but a depth z is Phi((z - mean) / std), Phi the normal distribution
    function, and unit normals n are (n + 1) / 2.

    Args:
        depth_mean: see :class:`JointTaskRegularization`.
        depth_std: see :class:`JointTaskRegularization`.
    """

    def __init__(self, depth_mean: float, depth_std: float):
        self.depth_mean, self.depth_std = depth_mean, depth_std

    def encode_prediction(self, task: Task, x: Tensor) -> Tensor:
        """Encode raw predictions (B, C, h, w), fp32."""
        return self._rescale(task, encode_prediction(task, x))

    def encode_label(self, task: Task, label: Tensor) -> Tensor:
        """Encode a batch's label: (B, C, h, w), :meth:`void_value` where it is void."""
        return self._rescale(task, encode_label(task, label))

    def void_value(self, task: Task, like: Tensor) -> Tensor:
        """Return what a masked pixel is, a scalar: that of depth 0, of the zero vector, of no class."""
        return self._rescale(task, like.new_zeros(()))

    def _rescale(self, task: Task, values: Tensor) -> Tensor:
        """Bring encoded depths and directions to 0..1."""
        if task.prediction_type in DEPTH_FACTORS:
            return torch.special.ndtr((values - self.depth_mean) / self.depth_std)
        return (values + 1) / 2 if task.prediction_type == "direction" else values

    def compare(self, task: Task, x: Tensor, target: Tensor) -> Tensor:
        """Return the error of a reconstruction x (N, C, h, w) at each pixel (N, h, w).

        Cross-entropy summed over the channels for classes and edges, |sigmoid(x) - target| for depth, 1 - cos for
        normals.
        """
        if task.prediction_type in DEPTH_FACTORS:
            return (x.sigmoid() - target).abs()[:, 0]
        if task.prediction_type == "direction":
            return 1 - F.cosine_similarity(x, 2 * target - 1, dim=1, eps=1e-6)
        return F.binary_cross_entropy_with_logits(x, target, reduction="none").sum(dim=1)


class JointMaps(NamedTuple):
    """The maps of a batch at the pixels that enter the auto-encoder.

    Attributes:
        tasks: name -> task.
        encoding: of the maps.
        predictions: raw, name -> (B, C_t, h, w).
        labels: encoded, per task (B, C_t, h, w).
        has_label: bool (T, B, 1, 1, 1).
        mask: float (B, 1, h, w): 0 where a labelled task of the image is void.
        weight: float (B,): 0 for an image without any label.
        seeds: int64 (B,), of the noise.
    """

    tasks: Mapping[str, Task]
    encoding: MapEncoding
    predictions: Mapping[str, Tensor]
    labels: Sequence[Tensor]
    has_label: Tensor
    mask: Tensor
    weight: Tensor
    seeds: Tensor

    def encode_predictions(self, stream: int, hard: bool) -> list[Tensor]:
        """Encode the predictions; with ``hard`` classes are samples whose noise is that of this stream."""
        encoded, first = [], 0
        for name, task in self.tasks.items():
            x = self.predictions[name]
            if hard and task.prediction_type == "class":
                encoded.append(sample_classes(x, self.seeds, stream, first))
            else:
                encoded.append(self.encoding.encode_prediction(task, x))
            first += x[0].numel()
        return encoded

    def predicted(self, stream: int, hard: bool) -> Tensor:
        """Return Y', the stacked predictions (B, C, h, w)."""
        return self._stack(self.encode_predictions(stream, hard))

    def target(self, stream: int, hard: bool) -> Tensor:
        """Return Y, stacked: labels where the image has some of the task, else the prediction (B, C, h, w)."""
        maps = zip(self.has_label, self.labels, self.encode_predictions(stream, hard))
        return self._stack([torch.where(has_label, label, x) for has_label, label, x in maps])

    def _stack(self, maps: Sequence[Tensor]) -> Tensor:
        """Mask the maps of all tasks and stack them."""
        shown = [
            torch.where(self.mask > 0, x, self.encoding.void_value(task, x))
            for task, x in zip(self.tasks.values(), maps)
        ]
        return torch.cat(shown, dim=1)


class Encoder(nn.Module):
    """SegNet's encoder: per level two layers, three from the third level on, and max pooling.

    Args:
        widths: channels of the input, then of each level.
        generator: of the initial weights.
    """

    def __init__(self, widths: Sequence[int], generator: torch.Generator):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(*(FilmLayer(c, width, 1, generator) for c in (previous, width, width)[: 2 + (i > 1)]))
            for i, (previous, width) in enumerate(pairwise(widths))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, torch.Size]]]:
        """Encode (N, C, h, w).

        Returns:
            the code (N, widths[-1], h / 2**levels, w / 2**levels); of each level where its maxima were, and the shape
            of the map that they were in.
        """
        pooled_from = []
        for level in self.levels:
            x = level(x)
            size = x.shape
            x, index = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
            pooled_from.append((index, size))
        return x, pooled_from


class Decoder(nn.Module):
    """SegNet's decoder: the encoder's levels from the last to the first, after each maximum is put where it was.

    Args:
        widths: channels of the encoder's levels, the last level first.
        outputs: channels of the reconstruction.
        generator: of the initial weights.
    """

    def __init__(self, widths: Sequence[int], outputs: int, generator: torch.Generator):
        super().__init__()
        self.levels = nn.ModuleList()
        for i, (width, following) in enumerate(pairwise([*widths, widths[-1]])):
            inputs = [width, following, following][: 2 + (len(widths) - i > 2)]
            self.levels.append(nn.Sequential(*(FilmLayer(c, following, 1, generator) for c in inputs)))
        self.last = nn.ParameterList(
            nn.init.xavier_normal_(torch.empty(shape), generator=generator)
            for shape in ((widths[-1], widths[-1], 3, 3), (outputs, widths[-1], 1, 1))
        )
        self.biases = nn.ParameterList(torch.zeros(width) for width in (widths[-1], outputs))

    def forward(self, x: Tensor, pooled_from: Sequence[tuple[Tensor, torch.Size]]) -> Tensor:
        """Decode (N, widths[0], h', w'): (N, outputs, h, w), without an activation."""
        for level, (index, size) in zip(self.levels, reversed(pooled_from)):
            # Not F.max_unpool2d: it has no deterministic CUDA implementation.
            flat = x.new_zeros(*size[:2], size[2] * size[3])
            x = level(flat.scatter(2, index.flatten(2), x.flatten(2)).view(size))
        x = F.conv2d(x, self.last[0], self.biases[0], padding=1)
        return F.conv2d(x, self.last[1], self.biases[1])


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Average 1 - cos of the vectors at all cells of (N, C, h, w): (N,)."""
    return (1 - F.cosine_similarity(a, b, dim=1, eps=1e-6)).mean(dim=(1, 2))


def sample_classes(logits: Tensor, seeds: Tensor, stream: int, first: int = 0) -> Tensor:
    """Sample a class at each pixel from softmax(logits), with the gradient of a Gumbel-softmax at temperature 1.

    Args:
        logits: (B, C, h, w).
        seeds: int64 (B,), see :func:`hash_uniform`.
        stream: number of the sample, so that several of the same image are independent.
        first: number of the image's first random number.

    Returns:
        one-hot (B, C, h, w), up to rounding.
    """
    uniform = hash_uniform(seeds, logits[0].numel(), stream, first).view_as(logits).to(logits)
    soft = (logits - (-uniform.log()).log()).softmax(dim=1)
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    hard = (soft.argmax(dim=1, keepdim=True) == classes).to(soft)
    return hard - soft.detach() + soft


def hash_uniform(seeds: Tensor, count: int, stream: int, first: int = 0) -> Tensor:
    """Compute uniform random numbers inside (0, 1), the same on every device and at every row of a batch.

    Args:
        seeds: int64 (B,) in 0..2**32 - 1.
        count: numbers per seed.
        stream: other streams are independent.
        first: of the numbers; ``first=n`` continues ``count=n``.

    Returns:
        float32 (B, count), multiples of 2**-24.
    """
    index = torch.arange(first, first + count, device=seeds.device)
    bits = _mix(_mix(_mix(index) + stream * 0x9E3779B1) ^ seeds[:, None])
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def _mix(x: Tensor) -> Tensor:
    """Scramble the lower 32 bits of int64 values: the finalizer of MurmurHash3."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
