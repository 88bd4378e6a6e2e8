"""The cross-task contrastive regulariser of Yang, Ye, Xu, "Contrastive Multi-Task Dense Prediction" (AAAI 2023).

For each target task t, a random other task s is drawn; its labels say which pixels of t's projected features are alike:

    z = normalize(P_ts(F_t))                                   at K sampled pixels of each image
    positive(i, j) = D_s(i, j) <= near_s,   negative(i, j) = D_s(i, j) >= far_s
    L_t = mean over anchors of max(0, margin + d(z_i, z_p) - d(z_i, z_n)),   d = 2 - 2 cos
    L   = sum_t w_t L_task_t + lambda * mean_t L_t

What the paper states and what is our choice is said in ``configs/regularizer/contrastive.yaml``.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtcl.errors import UserError
from mtcl.models.base import DenseOutput
from mtcl.regularizers import criteria
from mtcl.regularizers.masked_adamw import MaskedAdamW
from mtcl.regularizers.pairs import Pairs, flat_index, is_other_pixel, make_pairs, pairwise_distances, within_window
from mtcl.regularizers.projector import Projector
from mtcl.regularizers.sampling import Draw, balanced_sample, draw_pixels, draw_sources, sample_features, sample_labels
from mtcl.tasks import TASK_NAMES
from mtcl.tasks.base import Task

Size = tuple[int, int]
CRITERIA = ("triplet", "semihard", "ranked", "infonce")
RANKED_MAX_FACTOR = 5.0  # times "far": label distances beyond are not told apart by "ranked"
CANDIDATE_FACTOR = 8  # times K pixels are looked at when quotas are wanted


class RegularizerOutput(NamedTuple):
    loss: Tensor  # scalar: ``losses`` as the regulariser combines them; contrast: the mean over targets with an anchor
    losses: dict[str, Tensor]  # target -> scalar; zero, with its graph, where no anchor is to be had


class Regularizer(nn.Module, ABC):
    """A training-only loss on what any model gives in training. Its parameters live here, never in the model."""

    feature: str = "final"  # the features it looks at, for its diagnostics

    def build_optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """What trains its own parameters."""
        return torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=weight_decay, fused=True)

    @abstractmethod
    def sample(self, step: int, ids: Sequence[str]) -> Draw:
        """All randomness of one training step, as a function of (seed, step, sample ids)."""

    @abstractmethod
    def compute_loss(self, output: DenseOutput, labels: Mapping[str, Tensor], draw: Draw) -> RegularizerOutput:
        """The loss on a model's output; ``labels``: task -> label in batch layout."""

    @abstractmethod
    def summary(self) -> dict[str, float]:
        """Diagnostics since the last call, name -> value. Reads from the device: call it when logging, not each
        step."""


class Contrastive(Regularizer):
    """Cross-task contrast. Three lines in any training loop:

    >>> from mtcl.tasks import build_task
    >>> tasks = {name: build_task(name) for name in ("depth", "normals", "edge")}
    >>> features = {name: torch.randn(2, 16, 12, 16, requires_grad=True) for name in tasks}  # from your decoder
    >>> labels = {"depth": torch.rand(2, 1, 48, 64) * 5 + 1, "edge": torch.rand(2, 1, 48, 64).round(),
    ...           "normals": torch.nn.functional.normalize(torch.randn(2, 3, 48, 64), dim=1)}

    >>> regularizer = Contrastive(tasks, channels={name: 16 for name in tasks}, seed=0)
    >>> draw = regularizer.sample(step=0, ids=["first", "second"])
    >>> loss = 0.5 * regularizer(features, labels, draw).loss  # add it to your own; train regularizer.parameters(), too
    >>> loss.backward()

    Args:
        tasks: name -> task, at least two; each is a target and a source.
        channels: task -> channels C_t of its tapped feature map.
        seed: of the projectors' start and of every draw; torch's global generator is never touched.
        source_tasks: ``other``: a random other task (the paper); ``self``: the target itself, a control; ``any``: a random
            task, the target included; a task's name: always that one (it has a random other one itself).
        excluded_pairs: pairs ``target<-source`` that are never drawn.
        shuffle: a control: an image's source labels are those of another image of the batch.
        num_pixels: K, sampled per image at label resolution.
        class_balanced: each class (range of depth, direction) of an image's source label has an equal part in the K; else
            uniform.
        window: pairs lie at most this part of the picture's height and width apart; None: anywhere.
        drop_conflicting_positives: positives of the source that the target's own label calls different are left out.
        across_images: pairs may lie in different images of a batch.
        criterion: ``triplet`` with random positives and negatives (the paper), ``semihard``, ``ranked``, ``infonce``;
            see :mod:`mtcl.regularizers.criteria`.
        margin: of the first three, on squared distances of unit vectors (0..4). ``temperature``: of ``infonce``.
        embed_dim: D, of the projected features. ``hidden_dim``: width inside the projector; None: a linear projector.
        projector_sharing: one projector per ``pair`` (the paper), per ``target``, or one for ``all`` (widths must be equal).
        thresholds: task -> (near, far) in the units of its label distance; by default the task's own.
        feature: which of a model's taps :meth:`compute_loss` reads.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        channels: Mapping[str, int],
        *,
        seed: int = 0,
        source_tasks: str = "other",
        excluded_pairs: Collection[str] = (),
        shuffle: bool = False,
        num_pixels: int = 256,
        class_balanced: bool = False,
        window: float | None = None,
        drop_conflicting_positives: bool = False,
        across_images: bool = False,
        criterion: str = "triplet",
        margin: float = 0.5,
        temperature: float = 0.1,
        embed_dim: int = 64,
        hidden_dim: int | None = 64,
        projector_sharing: str = "pair",
        thresholds: Mapping[str, tuple[float, float]] | None = None,
        feature: str = "final",
    ):
        super().__init__()
        if len(tasks) < 2:
            raise UserError("cross-task contrast needs at least two tasks; use regularizer=none for one")
        if not 1 <= num_pixels < 2**15:
            raise UserError(f"regularizer.options.num_pixels={num_pixels} must be from 1 to {2**15 - 1}")
        if criterion == "ranked" and (window is not None or drop_conflicting_positives or across_images):
            raise UserError(
                "regularizer.options.criterion=ranked takes any three pixels of an image; leave out window, drop_conflicting_positives, "
                "across_images"
            )
        if criterion not in CRITERIA:
            raise UserError(f"regularizer.options.criterion={criterion} is not known; choose {', '.join(CRITERIA)}")
        self.tasks = dict(tasks)
        self.task_names = list(tasks)
        self.seed, self.num_pixels, self.feature = seed, num_pixels, feature
        self.shuffle, self.class_balanced, self.window, self.drop_conflicting_positives = (
            shuffle,
            class_balanced,
            window,
            drop_conflicting_positives,
        )
        self.across_images, self.criterion, self.margin, self.temperature = (
            across_images,
            criterion,
            margin,
            temperature,
        )
        self.allowed_sources = list_allowed_sources(self.task_names, source_tasks, excluded_pairs)
        chosen = dict(thresholds or {})
        self.thresholds = {
            name: chosen.get(name) or (task.positive_threshold, task.negative_threshold) for name, task in tasks.items()
        }
        for name, (near, far) in self.thresholds.items():
            if not 0 <= near < far:
                raise UserError(f"regularizer.options.thresholds.{name}=[{near}, {far}] must be 0 <= near < far")
        self.projector_sharing = projector_sharing
        self.projectors = self._build_projectors(channels, hidden_dim, embed_dim)
        # Near, far, and where "ranked" stops telling distances apart: of placed labels, see Task.place.
        spans = [[task.embedded_distance(d) for d in self.thresholds[name]] for name, task in tasks.items()]
        tops = [far if near == 0 else RANKED_MAX_FACTOR * far for near, far in spans]
        self.spans: Tensor
        self.register_buffer("spans", torch.tensor([[*s, t] for s, t in zip(spans, tops)]), persistent=False)
        # Sums since the last summary: [target, source, (pixels, anchors, active triplets, sum d_ap, sum d_an)]
        self.sums: Tensor
        self.register_buffer("sums", torch.zeros(len(tasks), len(tasks), 5), persistent=False)

    def _build_projectors(self, channels: Mapping[str, int], hidden: int | None, dim: int) -> nn.ModuleDict:
        generator = torch.Generator().manual_seed(self.seed)
        if self.projector_sharing == "pair":
            return nn.ModuleDict(
                {t: Projector(len(self.task_names), channels[t], hidden, dim, generator) for t in self.task_names}
            )
        if self.projector_sharing == "target":
            return nn.ModuleDict({t: Projector(1, channels[t], hidden, dim, generator) for t in self.task_names})
        if self.projector_sharing != "all":
            raise UserError(
                f"regularizer.options.projector_sharing={self.projector_sharing} is not known; choose pair, target or all"
            )
        if len({channels[t] for t in self.task_names}) > 1:
            raise UserError(
                "regularizer.options.projector_sharing=all needs features of equal width; choose pair or target"
            )
        return nn.ModuleDict(
            dict.fromkeys(self.task_names, Projector(1, channels[self.task_names[0]], hidden, dim, generator))
        )

    def sample(self, step: int, ids: Sequence[str]) -> Draw:
        """The step's sources (equal on every rank) and each image's pixels."""
        count = self.num_pixels * (CANDIDATE_FACTOR if self.class_balanced else 1)
        return Draw(draw_sources(self.seed, step, self.allowed_sources), draw_pixels(self.seed, step, ids, count))

    def build_optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Projectors that were not drawn take no step."""
        return MaskedAdamW(self.parameters(), lr=lr, weight_decay=weight_decay)

    def compute_loss(self, output: DenseOutput, labels: Mapping[str, Tensor], draw: Draw) -> RegularizerOutput:
        return self(output.features[self.feature], labels, draw, output.frame)

    def forward(
        self, features: Mapping[str, Tensor], labels: Mapping[str, Tensor], draw: Draw, frame: Size | None = None
    ) -> RegularizerOutput:
        """``taps``: task -> (B, C_t, h, w), ``labels``: task -> label in batch layout, ``frame``: the size in pixels
        that the taps cover (None: that of the labels)."""
        height, width = next(iter(labels.values())).shape[-2:]
        size = (height, width)
        with torch.no_grad():
            source, pixels, place, own, valid = self._look(labels, draw)
        z = torch.stack(
            [
                self._project(t, features, pixels[t % len(pixels)], source[t], size, frame)
                for t in range(len(self.task_names))
            ]
        )
        if self.criterion == "ranked":
            top = self.spans[source][..., 2]
            found = criteria.ranked_triplet(z, flat_index(pixels, size), place, valid, top, self.margin)
        else:
            with torch.no_grad():
                pairs = self._pairs(source, pixels, place, own, valid, size)
            z = merge_images(z) if self.across_images else z
            if self.criterion == "infonce":
                found = criteria.infonce(z, pairs, self.temperature)
            else:
                found = getattr(criteria, self.criterion)(z, pairs, self.margin)
        self._record(source, found.stats)
        present = found.has_anchor.to(found.losses)
        total = (found.losses * present).sum() / present.sum().clamp(min=1)
        return RegularizerOutput(total, dict(zip(self.task_names, found.losses.unbind())))

    def _look(self, labels: Mapping[str, Tensor], draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """At the labels: each target's source in each image (T, B), its pixels (T or 1, B, K, 2), where their source
        labels and the target's own are placed (T, B, K, 3), and which are valid (T, B, K)."""
        read = {name: sample_labels(labels[name], draw.pixels) for name in self.task_names}  # (B, M, c)
        known = torch.stack(
            [
                task.valid(read[name].mT[..., None] if labels[name].ndim == 4 else read[name])[..., 0]
                for name, task in self.tasks.items()
            ]  # at the pixels alone: they are a label of M rows and one column
        )  # (S, B, M)
        places = torch.stack([task.embed_label(read[name]) for name, task in self.tasks.items()])  # (S, B, M, 3)
        strata = (
            torch.stack([task.sampling_bin(read[name]) for name, task in self.tasks.items()])
            if self.class_balanced
            else None
        )
        own = torch.where(known[..., None], places, torch.nan)  # a void label of the target's own contradicts nothing
        if self.shuffle:
            known, places = known.roll(1, dims=1), places.roll(1, dims=1)
            strata = None if strata is None else strata.roll(1, dims=1)
        source = choose_available_source(draw.sources, known.any(dim=2))  # (T, B)
        images = torch.arange(source.shape[1], device=source.device)
        valid, place = known[source, images], places[source, images]
        pixels = draw.pixels[None]  # the same for all targets
        if strata is None:
            return source, pixels, place, own, valid
        index = balanced_sample(strata[source, images], valid, self.num_pixels)  # (T, B, K)
        pixels, place, own = (torch.take_along_dim(x, index[..., None], dim=2) for x in (pixels, place, own))
        return source, pixels, place, own, valid.gather(2, index)

    def _project(
        self, t: int, features: Mapping[str, Tensor], pixels: Tensor, source: Tensor, size: Size, frame: Size | None
    ) -> Tensor:
        """z = normalize(P_ts(F_t)) of target number ``t`` at its pixels: (B, K, D), fp32."""
        feature = sample_features(features[self.task_names[t]], pixels, size, frame or size)  # (B, K, C_t)
        return self.projectors[self.task_names[t]](
            feature, source if self.projector_sharing == "pair" else torch.zeros_like(source)
        )

    def _pairs(self, source: Tensor, pixels: Tensor, place: Tensor, own: Tensor, valid: Tensor, size: Size) -> Pairs:
        """The relations (T, B, K, K) by which an anchor's positives and negatives are told; (T, 1, B K, B K) across
        images."""
        limits = self.spans[source][:, :, None]  # (T, B, 1, 3)
        mine = self.spans[:, None, None]  # (T, 1, 1, 3), of the target's own labels
        different = is_other_pixel(pixels, size)
        comparable = None
        if self.across_images:
            image = torch.arange(source.shape[1], device=source.device)[:, None].expand(-1, self.num_pixels)
            kind = source[..., None].expand(*source.shape, self.num_pixels)
            pixels, place, own, valid, limits, kind, image = map(
                merge_images, (pixels, place, own, valid, limits.expand(-1, -1, self.num_pixels, -1), kind, image[None])
            )
            different = is_other_pixel(pixels, size) | (image[..., :, None] != image[..., None, :])
            comparable = kind[..., :, None] == kind[..., None, :]  # partial labels: images differ in their source
        positive, negative = make_pairs(place, valid, limits[..., 0], limits[..., 1])
        positive = positive & different
        if self.shuffle:  # a pixel sampled twice may have two labels: those of two pixels of another image
            negative = negative & different
        if comparable is not None:
            positive, negative = positive & comparable, negative & comparable
        if self.drop_conflicting_positives:
            positive = positive & ~(pairwise_distances(own) >= mine[..., 1, None])
        if self.window is not None:
            near = within_window(pixels, self.window)
            positive, negative = positive & near, negative & near
        return Pairs(positive, negative)

    @torch.no_grad()
    def _record(self, source: Tensor, stats: Tensor) -> None:
        group_size = 1
        if self.across_images:  # one group for all images: counted for the first one's source
            source, group_size = source[:, :1], source.shape[1]
        pixels = torch.full_like(stats[..., :1], float(self.num_pixels) * group_size)
        counted = torch.cat([pixels, stats], dim=-1)  # (T, B, 5)
        every = torch.arange(len(self.task_names), device=source.device)
        drawn = (source[..., None] == every).to(counted)  # (T, B, S); one_hot would wait for the device
        # Not a matrix product: under autocast that would count in bf16.
        self.sums += (drawn[..., None] * counted[:, :, None]).sum(dim=1)

    def summary(self) -> dict[str, float]:
        """Per (target, source) drawn since the last call: share of pixels that were anchors (``anchors``), of triplets
        inside the margin (``active``), mean distances to positives (``d_ap``) and negatives (``d_an``)."""
        sums = self.sums.tolist()
        self.sums.zero_()
        found = {}
        for t, target in enumerate(self.task_names):
            for s, source in enumerate(self.task_names):
                pixels, anchors, active, d_ap, d_an = sums[t][s]
                if pixels:
                    found[f"{target}<-{source}/anchors"] = anchors / pixels
                if anchors:
                    found[f"{target}<-{source}/active"] = active / anchors
                    found[f"{target}<-{source}/d_ap"] = d_ap / anchors
                    found[f"{target}<-{source}/d_an"] = d_an / anchors
        return found


def merge_images(x: Tensor) -> Tensor:
    """All images of a batch as one group: (T, B, K, ...) -> (T, 1, K B, ...). Pixel by pixel, not image by image: the
    order of a group is what its random choices come from."""
    return x.transpose(1, 2).flatten(1, 2)[:, None]


def choose_available_source(order: Tensor, has_labels: Tensor) -> Tensor:
    """Each image's source: the first task of the drawn ``order`` (..., n) that labels it, int64 (..., B).

    ``has_labels``: bool (S, B). With all labels present this is the batch's one draw, ``order[..., 0]``; an image that
    lacks it (partial labels, all void) goes on to the next, which is uniform among those it has. None: the first.
    """
    first = has_labels[order].to(torch.uint8).argmax(dim=-2)  # (..., B)
    return order.gather(-1, first)


def list_allowed_sources(names: Sequence[str], sources: str, exclude: Collection[str]) -> list[list[int]]:
    """For each target the sources that may be drawn; UserError for words that say nothing, or leave a target without
    any."""
    count = len(names)
    if sources in names:
        always = names.index(sources)
        found = [[always] if t != always else [s for s in range(count) if s != t] for t in range(count)]
    elif sources == "self":
        found = [[t] for t in range(count)]
    elif sources in ("other", "any"):
        found = [[s for s in range(count) if s != t or sources == "any"] for t in range(count)]
    else:
        raise UserError(
            f"regularizer.options.source_tasks={sources} is not known; choose other, self, any or a task in use"
        )
    every = {f"{t}<-{s}" for t in TASK_NAMES for s in TASK_NAMES}
    for pair in exclude:
        if pair not in every:
            raise UserError(
                f"regularizer.options.excluded_pairs: {pair} is no pair target<-source, e.g. {names[0]}<-{names[1]}"
            )
    found = [[s for s in own if f"{names[t]}<-{names[s]}" not in exclude] for t, own in enumerate(found)]
    for name, own in zip(names, found):
        if not own:
            raise UserError(
                f"regularizer.options.excluded_pairs leaves {name} without a source; leave one of its pairs in"
            )
    return found
