"""The cross-task contrastive regulariser of Yang, Ye, Xu, "Contrastive Multi-Task Dense Prediction" (AAAI 2023).

For each target task t, a random other task s is drawn; its labels say which pixels of t's projected features are alike:

    z = normalize(P_ts(F_t))                                   at K sampled pixels of each image
    positive(i, j) = D_s(i, j) <= near_s,   negative(i, j) = D_s(i, j) >= far_s
    L_t = mean over anchors of max(0, margin + d(z_i, z_p) - d(z_i, z_n)),   d = 2 - 2 cos
    L   = sum_t w_t L_task_t + lambda * mean_t L_t

What the paper states and what is our choice is said in ``configs/regularizer/contrastive.yaml``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtcl.contrastive.optimizer import SliceAdamW
from mtcl.contrastive.projector import Projector
from mtcl.contrastive.sampling import Draw, draw_pixels, draw_sources, read_features, read_labels
from mtcl.contrastive.triplets import pick, triplet_loss
from mtcl.errors import UserError
from mtcl.models.base import DenseOutput
from mtcl.tasks.base import Task

Size = tuple[int, int]


class RegularizerOutput(NamedTuple):
    loss: Tensor  # scalar: the mean of ``losses`` over the targets that have an anchor
    losses: dict[str, Tensor]  # target -> scalar; zero, with its graph, where no anchor is to be had


class Regularizer(nn.Module, ABC):
    """A training-only loss on what any model gives in training. Its parameters live here, never in the model."""

    tap: str = "final"  # the features it looks at, for its diagnostics

    def build_optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """What trains its own parameters."""
        return torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=weight_decay)

    @abstractmethod
    def sample(self, step: int, ids: Sequence[str]) -> Draw:
        """All randomness of one training step, as a function of (seed, step, sample ids)."""

    @abstractmethod
    def penalty(self, output: DenseOutput, labels: Mapping[str, Tensor], draw: Draw) -> RegularizerOutput:
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
        pixels: K, sampled per image, uniformly, at label resolution.
        margin: of the triplet loss, on squared distances of unit vectors (0..4).
        dim: D, of the projected features. ``hidden``: width inside the projector; None: a linear projector.
        thresholds: task -> (near, far) in the units of its label distance; by default the task's own.
        tap: which of a model's taps :meth:`penalty` reads.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        channels: Mapping[str, int],
        *,
        seed: int = 0,
        pixels: int = 256,
        margin: float = 0.5,
        dim: int = 64,
        hidden: int | None = 64,
        thresholds: Mapping[str, tuple[float, float]] | None = None,
        tap: str = "final",
    ):
        super().__init__()
        if len(tasks) < 2:
            raise UserError("cross-task contrast needs at least two tasks; use regularizer=none for one")
        if not 1 <= pixels < 2**15:
            raise UserError(f"regularizer.options.pixels={pixels} must be from 1 to {2**15 - 1}")
        self.tasks = dict(tasks)
        self.names = list(tasks)
        self.seed, self.pixels, self.margin, self.tap = seed, pixels, margin, tap
        chosen = dict(thresholds or {})
        self.thresholds = {name: chosen.get(name) or (task.near, task.far) for name, task in tasks.items()}
        for name, (near, far) in self.thresholds.items():
            if not 0 <= near < far:
                raise UserError(f"regularizer.thresholds.{name}=[{near}, {far}] must be 0 <= near < far")
        generator = torch.Generator().manual_seed(seed)
        self.projectors = nn.ModuleDict(
            {t: Projector(len(tasks), channels[t], hidden, dim, generator) for t in self.names}
        )
        # Sums since the last summary: [target, source, (pixels, anchors, active triplets, sum d_ap, sum d_an)]
        self.sums: Tensor
        self.register_buffer("sums", torch.zeros(len(tasks), len(tasks), 5), persistent=False)

    def sample(self, step: int, ids: Sequence[str]) -> Draw:
        """The step's sources (equal on every rank) and each image's pixels."""
        return Draw(draw_sources(self.seed, step, len(self.tasks)), draw_pixels(self.seed, step, ids, self.pixels))

    def build_optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Projectors that were not drawn take no step."""
        return SliceAdamW(self.parameters(), lr=lr, weight_decay=weight_decay)

    def penalty(self, output: DenseOutput, labels: Mapping[str, Tensor], draw: Draw) -> RegularizerOutput:
        return self(output.taps[self.tap], labels, draw, output.frame)

    def forward(
        self, taps: Mapping[str, Tensor], labels: Mapping[str, Tensor], draw: Draw, frame: Size | None = None
    ) -> RegularizerOutput:
        """``taps``: task -> (B, C_t, h, w), ``labels``: task -> label in batch layout, ``frame``: the size in pixels
        that the taps cover (None: that of the labels)."""
        height, width = next(iter(labels.values())).shape[-2:]
        size = (height, width)
        valid, positive, negative = self._relations(labels, draw.pixels)  # (T, B, K), 2 x (T, B, K, K)
        has_labels = valid.any(dim=2)  # (T, B)
        images = torch.arange(has_labels.shape[1], device=has_labels.device)
        losses, has_anchor = {}, []
        for t, target in enumerate(self.names):
            source = first_available(draw.sources[t], has_labels)  # (B,)
            feature = read_features(taps[target], draw.pixels, size, frame or size)  # (B, K, C_t), fp32
            z = self.projectors[target](feature, source)  # (B, K, D), unit vectors
            p, n, anchor = pick(positive[source, images], negative[source, images])  # (B, K) each
            losses[target], stats = triplet_loss(z, p, n, anchor, self.margin)  # scalar, (B, 4)
            has_anchor.append(anchor.any())
            self._record(t, source, stats)
        present = torch.stack(has_anchor).float()
        total = (torch.stack(list(losses.values())) * present).sum() / present.sum().clamp(min=1)
        return RegularizerOutput(total, losses)

    @torch.no_grad()
    def _relations(self, labels: Mapping[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which sampled pixels are alike, and which differ, under each task's labels."""
        valid, positive, negative = [], [], []
        itself = torch.eye(pixels.shape[1], dtype=torch.bool, device=pixels.device)
        for name, task in self.tasks.items():
            near, far = self.thresholds[name]
            label = read_labels(labels[name], pixels)  # (B, K, c)
            ok = read_labels(task.valid(labels[name]), pixels)[..., 0]  # (B, K)
            distance = task.distance(label, label)  # (B, K, K)
            both = ok[:, :, None] & ok[:, None, :]
            valid.append(ok)
            positive.append(both & (distance <= near) & ~itself)
            negative.append(both & (distance >= far))
        return torch.stack(valid), torch.stack(positive), torch.stack(negative)

    @torch.no_grad()
    def _record(self, target: int, source: Tensor, stats: Tensor) -> None:
        counted = torch.cat([torch.full_like(stats[:, :1], float(self.pixels)), stats], dim=1)  # (B, 5)
        drawn = torch.nn.functional.one_hot(source, len(self.names)).to(counted)  # (B, S)
        # Not a matrix product: under autocast that would count in bf16.
        self.sums[target] += (drawn[:, :, None] * counted[:, None]).sum(dim=0)

    def summary(self) -> dict[str, float]:
        """Per (target, source) drawn since the last call: share of pixels that were anchors (``anchors``), of triplets
        inside the margin (``active``), mean distances to positives (``d_ap``) and negatives (``d_an``)."""
        sums = self.sums.tolist()
        self.sums.zero_()
        found = {}
        for t, target in enumerate(self.names):
            for s, source in enumerate(self.names):
                pixels, anchors, active, d_ap, d_an = sums[t][s]
                if pixels:
                    found[f"{target}<-{source}/anchors"] = anchors / pixels
                if anchors:
                    found[f"{target}<-{source}/active"] = active / anchors
                    found[f"{target}<-{source}/d_ap"] = d_ap / anchors
                    found[f"{target}<-{source}/d_an"] = d_an / anchors
        return found


def first_available(order: Tensor, has_labels: Tensor) -> Tensor:
    """Each image's source: the first task of the drawn ``order`` (T - 1,) that labels it.

    ``has_labels``: bool (T, B). With all labels present this is the batch's one draw, ``order[0]``; an image that lacks
    it (partial labels, all void) goes on to the next, which is uniform among those it has. None at all: ``order[0]``.
    """
    return order[has_labels[order].to(torch.uint8).argmax(dim=0)]
