"""The cross-task contrastive regularizer of Yang, Ye, Xu, "Contrastive Multi-Task Dense Prediction" (AAAI 2023).

For each target task t, a random other task s is drawn; its labels say which pixels of t's projected features are
similar:

    z = normalize(P_ts(F_t))                                   at K sampled pixels of each image
    positive(i, j) = D_s(i, j) <= positive_threshold_s,   negative(i, j) = D_s(i, j) >= negative_threshold_s
    L_t = mean over anchors of max(0, margin + d(z_i, z_p) - d(z_i, z_n)),   d = 2 - 2 cos
    L   = sum_t w_t L_task_t + lambda * mean_t L_t

This file is the method; beside it lie its parts (:mod:`~mtcl.regularizers.sampling`, :mod:`~mtcl.regularizers.pairs`,
:mod:`~mtcl.regularizers.projector`, :mod:`~mtcl.regularizers.triplet`) and what serves ablations
(:mod:`~mtcl.regularizers.criteria`, :mod:`~mtcl.regularizers.boundary`,
:mod:`~mtcl.regularizers.sampling_ablations`, :mod:`~mtcl.regularizers.null_labels`). What the paper states and what is
our choice is said in ``configs/regularizer/contrastive.yaml``.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from mtcl.errors import ParameterError, UserError
from mtcl.models.base import DenseOutput
from mtcl.regularizers import boundary, criteria, null_labels, sampling_ablations
from mtcl.regularizers.base import Regularizer, RegularizerOutput
from mtcl.regularizers.masked_adamw import MaskedAdamW
from mtcl.regularizers.pairs import Pairs, PixelLabels, choose_thresholds, make_pairs
from mtcl.regularizers.projector import build_projectors
from mtcl.regularizers.sampling import (
    Draw,
    as_label_map,
    draw_pixels,
    draw_sources,
    flat_index,
    sample_features,
    sample_labels,
)
from mtcl.regularizers.sources import choose_available_source, list_allowed_sources
from mtcl.regularizers.statistics import TripletStats
from mtcl.regularizers.triplet import CriterionOutput, triplet
from mtcl.tasks.base import Task

Size = tuple[int, int]
CRITERIA = ("triplet", "semihard", "ranked", "infonce", "boundary")
CANDIDATE_FACTOR = 8  # times K pixels are drawn where K of them are chosen by class


class Contrastive(Regularizer):
    """Cross-task contrast.

    Three lines in any training loop:

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
        channels: task -> channels C_t of its feature map.
        seed: of the projectors' initialization and of every draw; torch's global generator is never touched.
        feature: which of a model's features :meth:`compute_loss` reads.
        num_pixels: K, sampled per image at label resolution.
        margin: of the triplet loss, on squared distances of unit vectors (0..4).
        embed_dim: D, of the projected features; None: no projector, the features themselves are compared.
        hidden_dim: width inside the projector; None: a linear projector.
        thresholds: task -> (positive, negative) in the units of its label distance; by default the task's own.
        source_tasks: ``other``: a random other task (the paper); ``self``: the target itself, a control; ``any``: a
            random task, the target included; a task's name: always that one (it has a random other one itself).
        excluded_pairs: pairs ``target<-source`` that are never drawn.
        projector_sharing: one projector per ``pair`` (the paper), per ``target``, or one for ``all`` (widths must be
            equal).
        source_labels: whose labels relate the pixels: ``true`` (text or bool): the source's of the image itself, the
            method. Controls: ``other_image``: another image's at the same positions (layout stays); ``random``: another
            image's at that image's own random positions (layout is lost); ``distance``: none, pixels near each other in
            the image are positive and distant ones negative; see :mod:`mtcl.regularizers.null_labels`.
        class_balanced: each class (range of depth, direction) of an image's source label has an equal part in the K;
            else uniform.
        window: pairs lie at most this fraction of the image's height and width apart; None: anywhere.
        drop_conflicting_positives: positives that the target's own label calls different are left out.
        across_images: pairs may lie in different images of a batch.
        criterion: ``triplet`` with random positives and negatives (the paper), ``semihard``, ``ranked``, ``infonce``,
            see :mod:`mtcl.regularizers.criteria`; ``boundary``: patches of 5x5 cells around those of the K positions
            at which the source's labels change, see :mod:`mtcl.regularizers.boundary`.
        temperature: of ``infonce``.
        targets: tasks that are contrasted; the others are sources only. None: all.
        negative_margin: of ``boundary``, a distance sqrt(2 - 2 cos), 0..2.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        channels: Mapping[str, int],
        *,
        seed: int = 0,
        feature: str = "final",
        num_pixels: int = 256,
        margin: float = 0.5,
        embed_dim: int | None = 64,
        hidden_dim: int | None = 64,
        thresholds: Mapping[str, tuple[float, float]] | None = None,
        source_tasks: str = "other",
        excluded_pairs: Collection[str] = (),
        projector_sharing: str = "pair",
        source_labels: bool | str = True,
        class_balanced: bool = False,
        window: float | None = None,
        drop_conflicting_positives: bool = False,
        across_images: bool = False,
        criterion: str = "triplet",
        temperature: float = 0.1,
        negative_margin: float = 0.65,
        targets: Collection[str] | None = None,
    ):
        super().__init__()
        if len(tasks) < 2:
            raise UserError("cross-task contrast needs at least two tasks; switch the regularizer off for one")
        if not 1 <= num_pixels < 2**15:
            raise ParameterError("num_pixels", f"={num_pixels} must be from 1 to {2**15 - 1}")
        if criterion not in CRITERIA:
            raise ParameterError("criterion", f"={criterion} is not known; choose {', '.join(CRITERIA)}")
        if criterion == "ranked" and (window is not None or drop_conflicting_positives or across_images):
            raise ParameterError(
                "criterion",
                "=ranked takes any three pixels of an image; leave out window, drop_conflicting_positives, "
                "across_images",
            )
        labels_of = null_labels.normalize_source_labels(source_labels)
        if labels_of == "distance" and class_balanced:
            raise ParameterError("class_balanced", "=true needs labels, which source_labels=distance has none of")
        if criterion == "boundary" and (window, class_balanced, drop_conflicting_positives, across_images) != (
            None,
            False,
            False,
            False,
        ):
            raise ParameterError(
                "criterion",
                "=boundary takes all pairs of a patch with its centre; leave out window, class_balanced, "
                "drop_conflicting_positives, across_images",
            )
        self.tasks, self.task_names = dict(tasks), list(tasks)
        self.seed, self.feature, self.num_pixels, self.margin = seed, feature, num_pixels, margin
        self.source_labels, self.class_balanced, self.window = labels_of, class_balanced, window
        self.drop_conflicting_positives, self.across_images = drop_conflicting_positives, across_images
        self.criterion, self.temperature, self.negative_margin = criterion, temperature, negative_margin
        self.allowed_sources = list_allowed_sources(self.task_names, source_tasks, excluded_pairs)
        self.thresholds = choose_thresholds(tasks, thresholds or {})
        self.projector_sharing = projector_sharing
        generator = torch.Generator().manual_seed(seed)
        widths = {t: channels[t] for t in tasks}
        self.projectors = build_projectors(projector_sharing, widths, hidden_dim, embed_dim, generator)
        embedded = [[task.embedded_distance(d) for d in self.thresholds[name]] for name, task in tasks.items()]
        source_thresholds = [null_labels.DISTANCE_THRESHOLDS] * len(tasks) if labels_of == "distance" else embedded
        ranges = [criteria.ranked_max_distance(*pair) for pair in source_thresholds]
        self.embedded_thresholds: Tensor  # (S, 2), among embedded labels
        self.register_buffer("embedded_thresholds", torch.tensor(embedded), persistent=False)
        self.source_thresholds: (
            Tensor  # (S, 2), the same but of what relates pixels: distances with source_labels=distance
        )
        self.register_buffer("source_thresholds", torch.tensor(source_thresholds), persistent=False)
        self.ranked_max_distance: Tensor  # (S,)
        self.register_buffer("ranked_max_distance", torch.tensor(ranges), persistent=False)
        if targets is not None and (not targets or not set(targets) <= set(tasks)):
            raise ParameterError("targets", f"={list(targets)} must be null or some of {', '.join(tasks)}")
        self.is_target: Tensor  # bool (T, 1, 1)
        is_target = torch.tensor([targets is None or name in targets for name in tasks])
        self.register_buffer("is_target", is_target[:, None, None], persistent=False)
        self.stats = TripletStats(self.task_names)

    def sample(self, step: int, ids: Sequence[str]) -> Draw:
        """Draw the step's sources (equal on every rank) and each image's pixels."""
        count = self.num_pixels * (CANDIDATE_FACTOR if self.class_balanced else 1)
        return Draw(draw_sources(self.seed, step, self.allowed_sources), draw_pixels(self.seed, step, ids, count))

    def build_optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Build an optimizer in which projectors that were not drawn take no step."""
        groups = [
            {"params": list(self.parameters())}
        ]  # a group may be empty: without projectors there is nothing to train
        return MaskedAdamW(groups, lr=lr, weight_decay=weight_decay)

    def compute_loss(self, output: DenseOutput, labels: Mapping[str, Tensor], draw: Draw) -> RegularizerOutput:
        """Compute the contrast of a model's output, see :meth:`forward`."""
        return self(output.features[self.feature], labels, draw, output.frame)

    def forward(
        self, features: Mapping[str, Tensor], labels: Mapping[str, Tensor], draw: Draw, frame: Size | None = None
    ) -> RegularizerOutput:
        """Compute L_t of all targets and their mean.

        Args:
            features: task -> F_t (B, C_t, h, w).
            labels: task -> label in batch layout, (B, H, W) or (B, c, H, W).
            draw: result of :meth:`sample`.
            frame: height and width in pixels that the features cover; None: those of the labels.
        """
        height, width = next(iter(labels.values())).shape[-2:]
        size = (height, width)
        if self.criterion == "boundary":
            pixels, output = self._contrast_boundaries(features, labels, draw, size, frame or size)
        else:
            with torch.no_grad():
                pixels = self.gather_labels(labels, draw, size)
                pixels = pixels._replace(valid=pixels.valid & self.is_target)
            z = torch.stack(
                [
                    self._project(t, features[t], pixels.pixels[i % len(pixels.pixels)], pixels.source[i], size, frame)
                    for i, t in enumerate(self.task_names)
                ]
            )  # (T, B, K, D)
            if self.across_images:
                z, pixels = sampling_ablations.merge_images(z), sampling_ablations.merge_groups(pixels, height * width)
            output = self._contrast(z, pixels)
        self.stats.accumulate(pixels, output.stats)
        has_anchor = output.has_anchor.to(output.losses)
        loss = (output.losses * has_anchor).sum() / has_anchor.sum().clamp(min=1)
        return RegularizerOutput(loss, dict(zip(self.task_names, output.losses.unbind())))

    def gather_labels(self, labels: Mapping[str, Tensor], draw: Draw, size: Size) -> PixelLabels:
        """Gather each target's source labels at the drawn pixels."""
        read = {name: sample_labels(labels[name], draw.pixels) for name in self.task_names}  # (B, M, c)
        ndims = {name: labels[name].ndim for name in self.task_names}
        valid, label, bins = self._embed_labels(read, ndims)
        target_label = torch.where(valid[..., None], label, torch.nan)
        has_labels = valid.any(dim=2)  # (S, B)
        if self.source_labels == "random":
            valid, label, bins, has_labels = (x.roll(1, dims=1) for x in (valid, label, bins, has_labels))
        elif self.source_labels == "other_image":
            donor, has_donor = null_labels.choose_other_image(has_labels)
            read = {n: sample_labels(labels[n], draw.pixels, image) for n, image in zip(self.task_names, donor)}
            valid, label, bins = self._embed_labels(read, ndims)
            has_labels = has_labels & has_donor
            valid = valid & has_labels[..., None]
        elif self.source_labels == "distance":
            label = null_labels.embed_positions(draw.pixels).expand_as(label)
        source = choose_available_source(draw.sources, has_labels)  # (T, B)
        images = torch.arange(source.shape[1], device=source.device)
        pixels = PixelLabels(
            source=source[..., None],
            pixels=draw.pixels[None],  # the same for all targets
            pixel_id=flat_index(draw.pixels, size)[None],
            label=label[source, images],
            valid=valid[source, images],
            target_label=target_label,
        )
        if self.class_balanced:
            pixels = sampling_ablations.balance_classes(pixels, bins[source, images], self.num_pixels)
        return pixels

    def _embed_labels(self, read: Mapping[str, Tensor], ndims: Mapping[str, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return which labels at pixels (task -> (B, M, c)) are valid (S, B, M), embedded (S, B, M, 3), their bins."""
        valid = torch.stack(
            [task.valid(as_label_map(read[name], ndims[name]))[..., 0] for name, task in self.tasks.items()]
        )
        label = torch.stack([task.embed_label(read[name]) for name, task in self.tasks.items()])
        bins = torch.zeros_like(valid, dtype=torch.long)
        if self.class_balanced:
            bins = torch.stack([task.sampling_bin(read[name]) for name, task in self.tasks.items()])
        return valid, label, bins

    def _project(
        self, target: str, feature: Tensor, pixels: Tensor, source: Tensor, size: Size, frame: Size | None
    ) -> Tensor:
        """Compute z = normalize(P_ts(F_t)) of a target at its pixels (B, K, 2): (B, K, D), fp32."""
        return self._embed(target, sample_features(feature, pixels, size, frame or size), source)

    def _embed(self, target: str, sampled: Tensor, source: Tensor) -> Tensor:
        """Compute unit vectors (B, K, D), fp32, of a target's sampled features (B, K, C_t)."""
        source = source[:, 0] if self.projector_sharing == "pair" else torch.zeros_like(source[:, 0])
        return self.projectors[target](sampled, source)

    def _contrast(self, z: Tensor, pixels: PixelLabels) -> CriterionOutput:
        """Apply the criterion to all targets' features (T, B, K, D)."""
        if self.criterion == "ranked":
            max_distance = self.ranked_max_distance[pixels.source[..., 0]]
            return criteria.ranked_triplet(z, pixels, max_distance, self.margin)
        with torch.no_grad():
            pairs = self.select_pairs(pixels)
        if self.criterion == "infonce":
            return criteria.infonce(z, pairs, self.temperature)
        if self.criterion == "semihard":
            return criteria.semihard(z, pairs, self.margin)
        return triplet(z, pairs, self.margin)

    def _contrast_boundaries(
        self, features: Mapping[str, Tensor], labels: Mapping[str, Tensor], draw: Draw, size: Size, frame: Size
    ) -> tuple[PixelLabels, CriterionOutput]:
        """Return the labels of the patches' centres and the boundary triplets' losses."""
        placed = {}  # by size of the map, which targets usually share
        for map_size in {feature.shape[-2:]: None for feature in features.values()}:
            with torch.no_grad():
                patches = boundary.place_patches(draw.pixels, (map_size[0], map_size[1]), size, frame)
                pixels = self.gather_labels(labels, Draw(draw.sources, patches.pixels), size)
                placed[map_size] = patches, pixels._replace(valid=pixels.valid & patches.inside & self.is_target)
        z, rows = [], []
        for i, t in enumerate(self.task_names):
            patches, pixels = placed[features[t].shape[-2:]]
            rows.append(PixelLabels(*(x[i % len(x)] for x in pixels)))
            z.append(self._embed(t, boundary.gather_cells(features[t], patches.cell), pixels.source[i]))
        pixels = PixelLabels(*(torch.stack(x) for x in zip(*rows)))
        output = boundary.boundary_triplet(torch.stack(z), pixels, self.source_thresholds, self.negative_margin)
        return boundary.take_centres(pixels), output

    def select_pairs(self, pixels: PixelLabels) -> Pairs:
        """Select the positive and negative pairs, (T, B, K, K); (T, 1, B K, B K) across images."""
        pairs = make_pairs(pixels, self.source_thresholds)
        if self.across_images:
            pairs = sampling_ablations.keep_equal_sources(pairs, pixels)
        if self.drop_conflicting_positives:
            pairs = sampling_ablations.drop_conflicting(pairs, pixels, self.embedded_thresholds[:, 1])
        if self.window is not None:
            pairs = sampling_ablations.keep_within_window(pairs, pixels, self.window)
        return pairs

    def summary(self) -> dict[str, float]:
        """Return diagnostics of each pair drawn since the last call, see :meth:`TripletStats.summary`."""
        return self.stats.summary()
