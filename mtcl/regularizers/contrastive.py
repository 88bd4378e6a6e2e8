"""The cross-task contrastive regularizer of Yang, Ye, Xu, "Contrastive Multi-Task Dense Prediction" (AAAI 2023).

For each target task t, a random other task s is drawn; its labels say which pixels of t's projected features are
similar:

    z = normalize(P_ts(F_t))                                   at K sampled pixels of each image
    positive(i, j) = D_s(i, j) <= positive_threshold_s,   negative(i, j) = D_s(i, j) >= negative_threshold_s
    L_t = mean over anchors of max(0, margin + d(z_i, z_p) - d(z_i, z_n)),   d = 2 - 2 cos
    L   = sum_t w_t L_task_t + lambda * mean_t L_t

This file is the method; beside it lie its parts (:mod:`~mtcl.regularizers.sampling`,
:mod:`~mtcl.regularizers.sources`, :mod:`~mtcl.regularizers.source_labels`, :mod:`~mtcl.regularizers.pairs`,
:mod:`~mtcl.regularizers.projector`, :mod:`~mtcl.regularizers.triplet`) and what serves ablations
(:mod:`~mtcl.regularizers.criteria`, :mod:`~mtcl.regularizers.boundary`, :mod:`~mtcl.regularizers.prototypes`,
:mod:`~mtcl.regularizers.mispredicted`, :mod:`~mtcl.regularizers.sampling_ablations`,
:mod:`~mtcl.regularizers.null_labels`). What the paper states and what is our choice is said in
``configs/regularizer/contrastive.yaml``.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mtcl.errors import ParameterError
from mtcl.models.base import DenseOutput
from mtcl.regularizers import boundary, criteria, sampling_ablations
from mtcl.regularizers.base import RegularizerOutput
from mtcl.regularizers.cross_task import CrossTaskRegularizer, SourceWeightsOption
from mtcl.regularizers.mispredicted import MISPREDICTED_CANDIDATES, check_fraction, choose_mispredicted
from mtcl.regularizers.pairs import Pairs, PixelLabels, find_labelled_groups, make_pairs, take_groups
from mtcl.regularizers.projector import build_projectors
from mtcl.regularizers.prototypes import PrototypeBank
from mtcl.regularizers.sampling import Draw, draw_order, sample_features
from mtcl.regularizers.sampling_ablations import PairOptions, filter_pairs
from mtcl.regularizers.source_labels import SourceLabelReader
from mtcl.regularizers.statistics import TripletStats
from mtcl.regularizers.triplet import AnchorLosses, CriterionOutput, mean_over_anchors, triplet
from mtcl.tasks.base import Task

Size = tuple[int, int]
CANDIDATE_FACTOR = 8  # times K pixels are drawn where K of them are chosen by class


class Contrastive(CrossTaskRegularizer):
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
        drop_conflicting_negatives: negatives that the target's own label calls similar are left out.
        mispredicted_fraction: up to this part of the K are pixels where the model's prediction of the target is wrong,
            see :mod:`mtcl.regularizers.mispredicted`; 0: uniform.
        across_images: pairs may lie in different images of a batch.
        criterion: ``triplet`` with random positives and negatives (the paper), ``semihard``, ``ranked``, ``infonce``,
            see :mod:`mtcl.regularizers.criteria`; ``boundary``: patches of 5x5 cells around those of the K positions
            at which the source's labels change, see :mod:`mtcl.regularizers.boundary`; ``prototypes``: running means of
            classes, ranges of depth, directions over all images, see :mod:`mtcl.regularizers.prototypes`.
        temperature: of ``infonce`` and ``prototypes``.
        targets: tasks that are contrasted; the others are sources only. None: all.
        all_sources: at each step every allowed source of a target, each with a loss of its own; else one that is drawn.
        source_weights: target -> source -> weight, relative ones by which sources are drawn, or by which the losses of
            a target are averaged with ``all_sources``; pairs that are not named have 0. ``auto``: estimated from the
            labels that :meth:`observe_labels` reads, see :mod:`mtcl.regularizers.source_weights`. None: equal (the
            paper).
        source_weight_batches: number of batches that ``auto`` reads.
        teacher: the labels of a source that an image has none of are predicted by a running mean of the model, whose
            predictions :meth:`forward` takes; the target's labels stay as they are.
        negative_margin: of ``boundary``, a distance sqrt(2 - 2 cos), 0..2.
    """

    embedded_thresholds: Tensor  # (S, 2), among embedded labels of each task
    source_thresholds: Tensor  # (S, 2), of what relates the pixels: those, or distances in the image
    ranked_max_distance: Tensor  # (S,)

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
        drop_conflicting_negatives: bool = False,
        mispredicted_fraction: float = 0.0,
        across_images: bool = False,
        criterion: str = "triplet",
        temperature: float = 0.1,
        negative_margin: float = 0.65,
        targets: Collection[str] | None = None,
        all_sources: bool = False,
        source_weights: SourceWeightsOption = None,
        source_weight_batches: int = 32,
        teacher: bool = False,
    ):
        super().__init__(
            tasks,
            seed=seed,
            feature=feature,
            num_pixels=num_pixels,
            source_tasks=source_tasks,
            excluded_pairs=excluded_pairs,
            targets=targets,
            all_sources=all_sources,
            source_weights=source_weights,
            source_weight_batches=source_weight_batches,
            thresholds=thresholds,
        )
        if not 1 <= num_pixels < 2**15:
            raise ParameterError("num_pixels", f"={num_pixels} must be from 1 to {2**15 - 1}")
        self.pair_options = PairOptions(window, drop_conflicting_positives, drop_conflicting_negatives, across_images)
        check_fraction(mispredicted_fraction, class_balanced)
        criteria.check_criterion(
            criterion,
            temperature,
            class_balanced=class_balanced,
            mispredicted_fraction=mispredicted_fraction > 0,
            **self.pair_options._asdict(),
        )
        self.class_balanced, self.mispredicted_fraction = class_balanced, mispredicted_fraction
        self.criterion, self.temperature = criterion, temperature
        self.margin, self.negative_margin = margin, negative_margin
        num_balanced = num_pixels if class_balanced else None
        self.uses_teacher = teacher
        self.label_reader = SourceLabelReader(tasks, source_labels, num_balanced, criterion == "prototypes")
        if teacher and self.label_reader.source_labels != "true":
            raise ParameterError(
                "teacher", f"=true needs source_labels=true, not {source_labels}; leave one of them out"
            )
        self.target_tasks = [tasks[c.target] for c in self.comparisons]
        self.projector_sharing = projector_sharing
        generator = torch.Generator().manual_seed(seed)
        widths = {t: channels[t] for t in tasks}
        self.projectors = build_projectors(projector_sharing, widths, hidden_dim, embed_dim, generator)
        if criterion == "prototypes":
            self.prototypes = PrototypeBank(len(tasks), embed_dim or max(widths.values()), temperature)
        embedded = [[task.embedded_distance(d) for d in self.thresholds[name]] for name, task in tasks.items()]
        relating = self.label_reader.choose_thresholds(embedded)
        constants = {
            "embedded_thresholds": embedded,
            "source_thresholds": relating,
            "ranked_max_distance": [criteria.ranked_max_distance(*pair) for pair in relating],
        }
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self.stats = TripletStats(self.task_names)

    @property
    def num_candidates(self) -> int:
        """Return how many pixels are drawn per image, of which K are chosen by class or by the prediction."""
        factor = MISPREDICTED_CANDIDATES if self.mispredicted_fraction else 1
        return self.num_pixels * (CANDIDATE_FACTOR if self.class_balanced else factor)

    def sample(self, step: int, ids: Sequence[str]) -> Draw:
        """Draw the step's sources (equal on every rank), each image's pixels, and their order if it isn't random."""
        draw = super().sample(step, ids)
        if not (self.class_balanced or self.pair_options.across_images):
            return draw
        count = self.num_pixels * (len(ids) if self.pair_options.across_images else 1)
        return draw._replace(order=draw_order(self.seed, step, count))

    def compute_loss(
        self,
        output: DenseOutput,
        labels: Mapping[str, Tensor],
        draw: Draw,
        teacher: Mapping[str, Tensor] | None = None,
    ) -> RegularizerOutput:
        """Compute the contrast of a model's output, see :meth:`forward`."""
        return self(output.features[self.feature], labels, draw, output.frame, output.predictions, teacher)

    def forward(
        self,
        features: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        draw: Draw,
        frame: Size | None = None,
        predictions: Mapping[str, Tensor] | None = None,
        teacher: Mapping[str, Tensor] | None = None,
    ) -> RegularizerOutput:
        """Compute L_t of all comparisons, one per target or per pair, and their mean.

        Args:
            features: task -> F_t (B, C_t, h, w).
            labels: task -> label in batch layout, (B, H, W) or (B, c, H, W).
            draw: result of :meth:`sample`.
            frame: height and width in pixels that the features cover; None: those of the labels.
            predictions: task -> raw prediction (B, C, H, W), needed for ``mispredicted_fraction`` alone.
            teacher: task -> raw prediction (B, C, H, W) of a running mean of the model, without gradient and NaN in
                padding, which stands for a source's labels in images that have none.
        """
        height, width = next(iter(labels.values())).shape[-2:]
        size = (height, width)
        frame = frame or size
        if self.criterion == "boundary":
            read = partial(self.label_reader.read, labels, target=self.target, size=size, teacher=teacher)
            z, pixels = boundary.sample_patches(features, self.target_tasks, draw, size, frame, read, self._project)
            output = boundary.boundary_triplet(z, pixels, self.source_thresholds, self.negative_margin)
            pixels = boundary.take_centres(pixels)
        else:
            with torch.no_grad():
                pixels = self.label_reader.read(labels, draw, self.target, size, teacher)
            if self.mispredicted_fraction:
                near = self.embedded_thresholds[self.target, 0]
                share = self.num_pixels, self.mispredicted_fraction
                pixels = choose_mispredicted(pixels, predictions, self.target_tasks, near, *share)
            sampled = self._sample_features(features, pixels, size, frame)
            z = torch.stack([self._project(i, x, pixels.source[i]) for i, x in enumerate(sampled)])  # (R, B, K, D)
            if self.pair_options.across_images:
                z, pixels = sampling_ablations.merge_images(z), sampling_ablations.merge_groups(pixels, height * width)
            if draw.order is not None:
                z, pixels = z.index_select(2, draw.order), sampling_ablations.reorder_pixels(pixels, draw.order)
            output = self._contrast(z, pixels)
        self.stats.accumulate(self.target, pixels, output.stats)
        return self.combine(output.losses, output.has_anchor)

    def _sample_features(
        self, features: Mapping[str, Tensor], pixels: PixelLabels, size: Size, frame: Size
    ) -> list[Tensor]:
        """Sample the target's features of each comparison at its pixels: R times (B, K, C_t), fp32."""
        sampled: dict[tuple[str, int], Tensor] = {}  # comparisons of one target may have the same pixels
        keys = [(c.target, i % len(pixels.pixels)) for i, c in enumerate(self.comparisons)]
        for target, row in keys:
            if (target, row) not in sampled:
                sampled[target, row] = sample_features(features[target], pixels.pixels[row], size, frame)
        return [sampled[key] for key in keys]

    def _project(self, comparison: int, sampled: Tensor, source: Tensor) -> Tensor:
        """Compute z = normalize(P_ts(F_t)) of features sampled for a comparison: unit vectors (B, K, D), fp32."""
        source = source[:, 0] if self.projector_sharing == "pair" else torch.zeros_like(source[:, 0])
        return self.projectors[self.comparisons[comparison].target](sampled, source)

    def _contrast(self, z: Tensor, pixels: PixelLabels) -> CriterionOutput:
        """Apply the criterion to the features (R, B, K, D) of all comparisons."""
        if self.criterion == "ranked":
            max_distance = self.ranked_max_distance[pixels.source[..., 0]]
            return criteria.ranked_triplet(z, pixels, max_distance, self.margin)
        if self.criterion == "prototypes":
            return self.prototypes(z, pixels, self.target)
        if self.criterion == "infonce":
            return mean_over_anchors(self._compare_all_pairs(z, pixels))
        with torch.no_grad():
            pairs = self.select_pairs(pixels, self.target)
        if self.criterion == "semihard":
            return criteria.semihard(z, pairs, self.margin)
        return triplet(z, pairs, self.margin)

    def _compare_all_pairs(self, z: Tensor, pixels: PixelLabels) -> AnchorLosses:
        """Apply InfoNCE to all pairs, on a CPU only in groups that have labels: the others' losses are zeros."""
        groups = find_labelled_groups(pixels)
        if groups is None:
            with torch.no_grad():
                pairs = self.select_pairs(pixels, self.target)
            return criteria.infonce(z, pairs, self.temperature)
        with torch.no_grad():
            pairs = self.select_pairs(take_groups(pixels, groups), self.target[:, None].expand_as(groups)[groups])
        compared = criteria.infonce(z[groups][:, None], pairs, self.temperature)
        mask = groups[..., None].expand(z.shape[:3])
        return AnchorLosses(*(x.new_zeros(mask.shape).masked_scatter(mask, x) for x in compared))

    def select_pairs(self, pixels: PixelLabels, target: Tensor) -> Pairs:
        """Select the positive and negative pairs, (R, B, K, K); (R, 1, B K, B K) across images.

        Args:
            pixels: R comparisons.
            target: int64 (R,), the target task of each.
        """
        pairs = make_pairs(pixels, self.source_thresholds)
        return filter_pairs(pairs, pixels, self.pair_options, self.embedded_thresholds[target])

    def summary(self) -> dict[str, float]:
        """Return diagnostics of each pair drawn since the last call, see :meth:`TripletStats.summary`."""
        return self.stats.summary()
