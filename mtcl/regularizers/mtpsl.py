"""Cross-task consistency in joint pairwise task spaces, MTPSL.

Li, Liu, Bilen, "Learning Multiple Dense Prediction Tasks from Partially Annotated Data", CVPR 2022: the comparator of
the contrastive regularizer, training-only as well.

For a target t that labels the image and another task s, both are mapped into a space of the pair, where they must agree
with each other and with the image's feature, which keeps the mapping from a trivial solution:

    a = M_st(prediction of s),   b = M_st(label of t),   f = the image's feature, detached
    L_st = mean over cells of (1 - cos(a, b)) + image_weight * ((1 - cos(a, f)) + (1 - cos(b, f)))
    L    = sum_t w_t L_task_t + lambda * mean over images of sum_st L_st

In the authors' code the tasks' losses are those of an image's first view and L_st that of its second one
(``loss.views=first`` of the config, with two views per step); with one view both are of the same.

L_st can vanish as well where M maps all pixels to one vector. Against this collapse there is an optional term per pair
and side, the hinge of VICReg's variance term (Bardes, Ponce, LeCun, ICLR 2022), here on the spread of unit vectors x:

    spread = sqrt(mean |x|^2 - |mean x|^2)  over the labelled cells of all images, 0 (all equal) to 1
    L_st += variance_weight * (max(0, min_spread - spread of a) + max(0, min_spread - spread of b))

M is one convolutional network for all pairs: an input layer per task, then layers whose scale and shift belong to the
pair (FiLM). What is the paper's or its code's (VICO-UoE/MTPSL, model/mapfns.py) and what is our choice is said in
``configs/regularizer/mtpsl.yaml``.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtcl.distributed import all_reduce_sum_for_ddp, world_size
from mtcl.errors import ParameterError, UserError
from mtcl.models.base import DenseOutput
from mtcl.regularizers.base import Regularizer, RegularizerOutput
from mtcl.regularizers.map_encoding import DEPTH_FACTORS, check_encodable, encode_label, encode_prediction
from mtcl.regularizers.sampling import Draw
from mtcl.regularizers.statistics import PairSums
from mtcl.tasks.base import Task

log = logging.getLogger(__name__)

Size = tuple[int, int]
FILM_LR_FACTOR = 10.0  # as in the authors' code: 1e-3 beside 1e-4
SPREAD_EPS = 1e-6  # under the root, whose slope at zero is infinite
SOURCE_RULES = ("auto", "any", "unlabelled")


class CrossTaskConsistency(Regularizer):
    """Consistency of each labelled target's label with other tasks' predictions.

    Three lines in any training loop:

    >>> from mtcl.tasks import build_task
    >>> tasks = {name: build_task(name) for name in ("depth", "normals", "edge")}
    >>> maps = {name: torch.randn(2, task.channels, 48, 64, requires_grad=True) for name, task in tasks.items()}
    >>> features = {"trunk": {name: torch.randn(2, 16, 12, 16) for name in tasks}}
    >>> labels = {"depth": torch.rand(2, 1, 48, 64) * 5 + 1, "edge": torch.rand(2, 1, 48, 64).round(),
    ...           "normals": torch.nn.functional.normalize(torch.randn(2, 3, 48, 64), dim=1)}

    >>> regularizer = CrossTaskConsistency(tasks, channels={name: 16 for name in tasks}, seed=0)
    >>> draw = regularizer.sample(step=0, ids=["first", "second"])
    >>> output = DenseOutput(maps, features, [], (48, 64))
    >>> loss = 2 * regularizer.compute_loss(output, labels, draw).loss  # train regularizer.parameters(), too
    >>> loss.backward()

    An image counts for the targets that label any of its pixels. ``losses`` of the result: per target the sum over its
    sources, averaged over the images; ``loss`` is their sum (not their mean), as in the authors' code. With
    ``task_loss.views="first"`` the images are the rows of the other views.

    Args:
        tasks: name -> task, at least two; each is a target and a source.
        channels: task -> channels of its feature map, equal for all; the width of the pairs' spaces.
        seed: of the mapping's initialization and of every draw; torch's global generator is never touched.
        feature: which of a model's features is the image's (that of the target, where they differ by task).
        stride: pixels per cell of the maps that enter the mapping (averages over stride x stride pixels).
        widths: channels of the mapping's levels before the last, whose channels are the feature's; each level ends in
            a pooling by two.
        num_sources: drawn per target, image and step; those of the others are estimated by them, without bias.
        source_rule: which predictions an image's labels may teach: ``unlabelled`` (tasks it has no label of), ``any``
            (all others), ``auto`` (``any`` in images labelled for every task, else ``unlabelled``).
        image_weight: of the two terms that tie the mapped maps to the image's feature.
        variance_weight: of the hinge against a collapse of the mapping; 0 leaves it out.
        min_spread: the spread below which the hinge acts and a warning is logged, 0 to 1.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        channels: Mapping[str, int],
        *,
        seed: int = 0,
        feature: str = "trunk",
        stride: int = 4,
        widths: Sequence[int] = (32, 64),
        num_sources: int = 1,
        source_rule: str = "auto",
        image_weight: float = 0.5,
        variance_weight: float = 0.0,
        min_spread: float = 0.1,
    ):
        super().__init__()
        if len(tasks) < 2:
            raise UserError("cross-task consistency needs at least two tasks; switch the regularizer off for one")
        check_encodable(tasks)
        if source_rule not in SOURCE_RULES:
            raise ParameterError("source_rule", f"={source_rule} is not known; choose one of {', '.join(SOURCE_RULES)}")
        feature_channels = {channels[name] for name in tasks}
        if len(feature_channels) > 1:
            all_widths = ", ".join(map(str, sorted(feature_channels)))
            raise ParameterError(
                "feature",
                f"={feature} has maps of {all_widths} channels; cross-task consistency needs a feature with equally "
                "many for every task",
            )
        self.tasks, self.task_names = dict(tasks), list(tasks)
        self.seed, self.feature, self.stride = seed, feature, stride
        self.num_sources = min(num_sources, len(tasks) - 1)
        self.source_rule, self.image_weight = source_rule, image_weight
        self.variance_weight, self.min_spread, self.warned_of_collapse = variance_weight, min_spread, False
        generator = torch.Generator().manual_seed(seed)
        outputs = [*widths, *feature_channels]
        self.num_pairs = len(tasks) * (len(tasks) - 1)
        self.stems = nn.ModuleDict(
            {name: FilmLayer(task.channels, outputs[0], 1, generator) for name, task in self.tasks.items()}
        )
        self.mapping = Mapper(outputs, self.num_pairs, generator)
        # Images, 1 - cos of (a, b), of (a, f), of (b, f), spread of a, of b.
        self.stats = PairSums(self.task_names, num_values=6)

    def sample(self, step: int, ids: Sequence[str]) -> Draw:
        """Draw the order of sources per target, f(seed, step), equal on every rank; there are no pixels to draw."""
        rng = np.random.default_rng([0x6D747073, self.seed, step])  # a stream of its own
        orders = [rng.permutation(np.delete(np.arange(len(self.tasks)), t)) for t in range(len(self.tasks))]
        return Draw(sources=torch.from_numpy(np.stack(orders)), pixels=torch.zeros(len(ids), 0, 2))

    def build_optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Build AdamW at ``lr``, with the pairs' scales and shifts at :data:`FILM_LR_FACTOR` times that."""
        films = [p for name, p in self.mapping.named_parameters() if name.endswith(("gamma", "beta"))]
        film_ids = {id(p) for p in films}
        rest = [p for p in self.parameters() if id(p) not in film_ids]
        groups: list[dict[str, Any]] = [{"params": rest}, {"params": films, "lr": FILM_LR_FACTOR * lr}]
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)

    def compute_loss(
        self,
        output: DenseOutput,
        labels: Mapping[str, Tensor],
        draw: Draw,
        teacher: Mapping[str, Tensor] | None = None,  # noqa: ARG002
    ) -> RegularizerOutput:
        """Compute the consistency of a model's predictions with the labels; see the module's formulas."""
        device = draw.sources.device
        if self.task_loss.views == "first":
            output, labels = self._take_other_views(output, labels)
        with torch.autocast(device.type, enabled=False):
            predicted, labelled, coverage = self._apply_stems(output, labels)
            has_label = coverage.amax(dim=(2, 3, 4)) > 0  # (T, B)
            chosen = choose_sources(draw.sources, has_label, self.num_sources, self.source_rule)

            # Rows of one batch, (target, draw, image): all predictions first, then all labels.
            images = torch.arange(has_label.shape[1], device=device)
            rows = (chosen.source * len(images) + images).flatten()
            sources = predicted.flatten(0, 1).index_select(0, rows)
            target = torch.arange(len(self.task_names), device=device)[:, None, None]
            pair = (
                target * (len(self.task_names) - 1) + chosen.source - (chosen.source > target).long()
            )  # row of the FiLMs
            x = torch.cat([sources, self._per_draw(labelled)])
            mapped = F.normalize(self.mapping(x, pair.flatten().repeat(2)), dim=1, eps=1e-6)
            a, b = mapped.chunk(2)  # (rows, C, h, w)

            features, grid = output.features[self.feature], mapped.shape[-2:]
            image_features = [
                F.interpolate(features[name].detach().float(), tuple(grid), mode="area") for name in self.task_names
            ]
            f = self._per_draw(F.normalize(torch.stack(image_features), dim=2, eps=1e-6))
            counts = self._per_draw(torch.stack([self.mapping.pool_mask(k > 0) for k in coverage]))[
                :, 0
            ]  # (rows, h, w)
            ab, af, bf = (
                mean_cosine_distance(*pair, counts).view_as(chosen.weight) for pair in ((a, b), (a, f), (b, f))
            )
            value = ab + self.image_weight * (af + bf)  # (T, draws, B)
            losses = (value * chosen.weight).sum(dim=1).mean(dim=1)  # (T,)
            spread, hinges = self._guard_spread(mapped, counts, pair, chosen.weight)
            if self.variance_weight > 0:
                losses = losses + self.variance_weight * hinges
            self._accumulate_stats(chosen, (ab, af, bf, *spread))
        return RegularizerOutput(losses.sum(), dict(zip(self.task_names, losses.unbind())))

    def _take_other_views(
        self, output: DenseOutput, labels: Mapping[str, Tensor]
    ) -> tuple[DenseOutput, dict[str, Tensor]]:
        """Return the rows of all views but the first, which the tasks' losses have."""

        def take(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: x[len(x) // self.task_loss.views_per_step :] for name, x in maps.items()}

        features = {self.feature: take(output.features[self.feature])}
        return output._replace(predictions=take(output.predictions), features=features), take(labels)

    def _guard_spread(
        self, mapped: Tensor, counts: Tensor, pair: Tensor, weight: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Measure the spread of each pair and side, over the images of all processes where the guard is on.

        Args:
            mapped: unit vectors (2 rows, C, h, w), predictions first.
            counts: cells with a label, (rows, h, w).
            pair: int64 (T, draws, B).
            weight: how many sources each row stands for, (T, draws, B).

        Returns:
            the spread of predictions and of labels, (T, draws, B) each, that of the row's pair; and per target (T,) the
            sum of the hinges of its pairs and both sides, each as often as the pair's loss counts.
        """
        is_guarded = self.variance_weight > 0
        x, cells = (mapped if is_guarded else mapped.detach()), counts * (weight.flatten() > 0)[:, None, None]
        sides = torch.cat([pair.flatten(), pair.flatten() + self.num_pairs])
        images = weight.shape[-1] * (world_size() if is_guarded else 1)
        sums = sum_vectors(x, cells.repeat(2, 1, 1), sides, 2 * self.num_pairs)
        shares = weight.new_zeros(len(sums), 1).index_add(0, sides, weight.flatten().repeat(2)[:, None] / images)
        sums = torch.cat([sums, shares], dim=1)
        if is_guarded:
            sums = all_reduce_sum_for_ddp(sums)
        spread = compute_spread(sums[:, :-1])
        hinges = sums[:, -1] * (self.min_spread - spread).clamp(min=0)
        of_predictions, of_labels = spread.view(2, -1)
        return (of_predictions[pair], of_labels[pair]), hinges.view(2, len(self.tasks), -1).sum(dim=(0, 2))

    def _apply_stems(self, output: DenseOutput, labels: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the input layers.

        Returns:
            predictions and labels (T, B, widths[0], h, w), and the fraction of each cell's pixels that has a label
            (T, B, 1, h, w).
        """
        predicted, labelled, coverage = [], [], []
        for name, task in self.tasks.items():
            stem, fraction = self.stems[name], self._pool(task.valid(labels[name])[:, None].float(), output.frame)
            label = encode_map(task, encode_label(task, labels[name]))
            labelled.append(stem(self._pool(label, output.frame) / fraction.clamp(min=1e-6)))
            prediction = self._pool(output.predictions[name].float(), output.frame)
            predicted.append(stem(encode_map(task, encode_prediction(task, prediction))))
            coverage.append(fraction)
        return torch.stack(predicted), torch.stack(labelled), torch.stack(coverage)

    def _pool(self, x: Tensor, frame: Size) -> Tensor:
        """Average a map (B, C, H, W), padded to ``frame`` by zeros, over stride x stride pixels."""
        if tuple(x.shape[-2:]) != tuple(frame):
            x = F.pad(x, (0, frame[1] - x.shape[-1], 0, frame[0] - x.shape[-2]))
        return F.avg_pool2d(x, self.stride, ceil_mode=True) if self.stride > 1 else x

    def _per_draw(self, x: Tensor) -> Tensor:
        """Repeat (T, B, ...) for each draw: rows (T * draws * B, ...)."""
        return x[:, None].expand(-1, self.num_sources, *x.shape[1:]).flatten(0, 2)

    @torch.no_grad()
    def _accumulate_stats(self, chosen: "ChosenSources", means: Sequence[Tensor]) -> None:
        values = torch.stack([torch.ones_like(chosen.weight), *means], dim=-1)  # (T, draws, B, 6)
        values = values * (chosen.weight > 0)[..., None]
        target = torch.arange(len(self.task_names), device=chosen.source.device)
        self.stats.add(target, chosen.source.flatten(1), values.flatten(1, 2))

    def summary(self) -> dict[str, float]:
        """Return diagnostics of each drawn pair since the last call; warn once of a collapse.

        Per ``target<-source`` the means over images of 1 - cos between the mapped prediction and label (``apart``), of
        each to the image's feature (``source_image``, ``target_image``), and the spreads (``source_spread``,
        ``target_spread``).
        """
        names = ("apart", "source_image", "target_image", "source_spread", "target_spread")
        summary: dict[str, float] = {}
        for pair, (images, *terms) in self.stats.pop().items():
            if images:
                for name, value in zip(names, terms):
                    summary[f"{pair}/{name}"] = value / images
        self._warn_of_collapse({name: value for name, value in summary.items() if name.endswith("_spread")})
        return summary

    def _warn_of_collapse(self, spreads: Mapping[str, float]) -> None:
        """Log one warning in a run, where the smallest spread is below the bound."""
        name = min(spreads, key=spreads.__getitem__, default=None)
        if name is None or self.warned_of_collapse or spreads[name] >= self.min_spread:
            return
        self.warned_of_collapse = True
        log.warning(
            "the mapping of the cross-task consistency collapses: %s is %.3g, below min_spread=%g; raise "
            "variance_weight (%g), e.g. to %g",
            name,
            spreads[name],
            self.min_spread,
            self.variance_weight,
            max(1.0, 2 * self.variance_weight),
        )


def encode_map(task: Task, values: Tensor) -> Tensor:
    """Divide encoded depth (B, 1, h, w) by the image's largest, at least 1 m; other encoded maps stay as they are.

    The bound limits the gradient of a head that starts near zero.
    """
    if task.prediction_type in DEPTH_FACTORS:
        return values / values.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    return values


def mean_cosine_distance(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Average 1 - a . b of unit vectors (N, C, h, w) over cells with ``weight`` (N, h, w): (N,), 0 without weight."""
    distance = 1 - (a * b).sum(dim=1)
    return (distance * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1)


def sum_vectors(x: Tensor, weight: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sum vectors (N, C, h, w) over cells with ``weight`` (N, h, w) in each group (N,), with |x|^2 and the weight.

    Returns:
        (num_groups, C + 2).
    """
    rows = torch.cat([x, (x * x).sum(dim=1, keepdim=True), torch.ones_like(x[:, :1])], dim=1)
    rows = (rows * weight[:, None]).sum(dim=(2, 3))
    return rows.new_zeros(num_groups, rows.shape[1]).index_add(0, group, rows)


def compute_spread(sums: Tensor) -> Tensor:
    """Compute sqrt(mean |x|^2 - |mean x|^2) of each group from :func:`sum_vectors`, (G, C + 2) -> (G,)."""
    means = sums[:, :-1] / sums[:, -1:].clamp(min=1)
    variance = (means[:, -1] - means[:, :-1].square().sum(dim=1)).clamp(min=0)
    return (variance + SPREAD_EPS).sqrt()


class ChosenSources(NamedTuple):
    """Sources of each target in each image, (T, draws, B)."""

    source: Tensor  # int64
    weight: Tensor  # float32: how many sources it stands for; 0 where there is none


def choose_sources(order: Tensor, has_label: Tensor, count: int, rule: str) -> ChosenSources:
    """Choose the first ``count`` tasks of each target's drawn order that may be its sources in an image.

    Args:
        order: int64 (T, T - 1), the other tasks in random order.
        has_label: bool (T, B).
        count: sources per target and image.
        rule: see :class:`CrossTaskConsistency`.

    Returns:
        the sources; the weights of one target and image sum to the number of sources it could have had.
    """
    eligible = torch.ones_like(has_label) if rule == "any" else ~has_label
    if rule == "auto":
        eligible = eligible | has_label.all(dim=0)
    ok = eligible[order] & has_label[:, None]  # (T, T - 1, B)
    rank = ok.long().cumsum(dim=1)
    total = rank[:, -1]  # (T, B)
    sources, weights = [], []
    for k in range(1, count + 1):
        hit = ok & (rank == k)
        sources.append(order.gather(1, hit.to(torch.uint8).argmax(dim=1)))
        weights.append(hit.any(dim=1) * total / total.clamp(1, count))
    return ChosenSources(torch.stack(sources, dim=1), torch.stack(weights, dim=1))


class FilmLayer(nn.Module):
    """3x3 convolution, normalization over each map of each image, scale and shift, ReLU.

    Scale and shift are shared; with more than one of ``conditions`` they are followed by those of the row's condition.
    """

    def __init__(self, inputs: int, outputs: int, conditions: int, generator: torch.Generator):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(outputs, inputs, 3, 3), generator=generator))
        self.scale, self.shift = nn.Parameter(torch.ones(outputs)), nn.Parameter(torch.zeros(outputs))
        if conditions > 1:
            self.gamma = nn.Parameter(torch.ones(conditions, outputs))
            self.beta = nn.Parameter(torch.zeros(conditions, outputs))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map (N, C, h, w) to (N, D, h, w); ``condition``: int64 (N,)."""
        x = F.conv2d(x, self.weight, padding=1)  # the normalization would remove a bias
        scale, shift = self.scale.expand(len(x), -1), self.shift.expand(len(x), -1)  # (N, D)
        if condition is not None:
            gamma, beta = self.gamma.index_select(0, condition), self.beta.index_select(0, condition)
            scale, shift = gamma * scale, gamma * shift + beta
        return F.relu(_normalize_maps(x, scale, shift), inplace=True)


def _normalize_maps(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalize each map of (N, D, h, w) to mean ``shift`` and deviation ``scale``, both (N, D).

    This is batch norm of one image with N D channels, in a single kernel; ``F.instance_norm`` has no scale per row and
    refuses maps of one cell.
    """
    cudnn = torch.backends.cudnn.enabled
    maps = x.flatten(0, 1)[None]
    return torch.batch_norm(maps, scale.flatten(), shift.flatten(), None, None, True, 0.0, 1e-5, cudnn).view_as(x)


class Mapper(nn.Module):
    """Mapping that all pairs share, conditioned on the pair.

    Each level has two layers, three from the third level on, and max pooling.
    """

    def __init__(self, widths: Sequence[int], pairs: int, generator: torch.Generator):
        super().__init__()
        self.layers, self.ends_level = nn.ModuleList(), []
        previous = widths[0]
        for i, width in enumerate(widths):
            inputs = [previous, width] if i < 2 else [previous, width, width]
            self.layers.extend(FilmLayer(c, width, pairs, generator) for c in inputs)
            self.ends_level += [False] * (len(inputs) - 1) + [True]
            previous = width

    def forward(self, x: Tensor, pair: Tensor) -> Tensor:
        """Map (N, widths[0], h, w) of ``pair`` (N,) to (N, widths[-1], h / 2**levels, w / 2**levels)."""
        for layer, ends_level in zip(self.layers, self.ends_level):
            x = layer(x, pair)
            if ends_level:
                x = F.max_pool2d(x, 2, ceil_mode=True)
        return x

    def pool_mask(self, mask: Tensor) -> Tensor:
        """Return which cells of the result cover a cell of ``mask`` (B, 1, h, w): float (B, 1, h', w')."""
        x = mask.float()
        for _ in range(sum(self.ends_level)):
            x = F.max_pool2d(x, 2, ceil_mode=True)
        return x
