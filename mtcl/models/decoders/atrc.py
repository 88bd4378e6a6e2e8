"""ATRC: each task gathers context from each other task, with the kind of attention that suits the pair.

Brüggemann, Kanakis, Obukhov, Georgoulis, Van Gool, "Exploring Relational Context for Multi-Task Dense Prediction",
ICCV 2021 (https://arxiv.org/abs/2104.13874).

    features (strides 4..32) -> resized to 1/4, concatenated -> per task: 3x3 convolution -> initial
             concatenation, detached -> per task: auxiliary head -> label logits -> intermediate predictions
    per target t, per source s: context of the kind genotype[t][s] (relational.py) from initial[t], initial[s] and,
             for a label context, the label logits of t or of s
    per target: contexts, concatenated -> 1x1 -> [initial[t], that] -> 1x1 -> final -> 1x1 -> prediction

The search for a genotype is not implemented; :func:`read_genotype` says where one comes from.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtcl.errors import ParameterError, UserError
from mtcl.models.decoders.base import Decoder
from mtcl.models.decoders.blocks import ConvBlock, Fusion, SpatialNorm, predict_fp32, predict_tasks, resize
from mtcl.models.decoders.relational import Context, GlobalContext, LabelContext, LocalContext, prototypes
from mtcl.models.output import DenseOutput, Size
from mtcl.safe_files import read_json

KINDS = ("none", "global", "local", "t_label", "s_label")  # a published file names a kind by its index in this list

# The genotypes of the authors' search: tasks, then for each target a string with a letter for each source.
PUBLISHED = {
    "nyud_hrnet18": ("semseg depth normals edge", "TTSS STSS STTS TTGT"),
    "nyud_hrnet48": ("semseg depth normals edge", "TNNS SGGS SGGS TTTT"),
    "pascal_hrnet18": ("semseg human_parts sal normals edge", "TTSNS TTSTS TTTST TTTTS TTTGT"),
}
_LETTERS = {"N": "none", "G": "global", "L": "local", "T": "t_label", "S": "s_label"}

Genotype = dict[str, dict[str, str]]  # target -> source -> kind of context


def read_genotype(genotype: str | Mapping[str, Any], tasks: Iterable[str]) -> Genotype:
    """Return the kind of context that each of ``tasks`` (target) gathers from each of them (source).

    Args:
        genotype: ``all_KIND`` (the same for every pair), the name of a published one, the path of a JSON file as the
            authors' search writes it, or a mapping target -> source -> kind. Entries of other tasks are ignored.
        tasks: names of the tasks.

    Returns:
        target -> source -> kind, one of :data:`KINDS`.

    Raises:
        ParameterError: no such genotype, or none for all pairs of these tasks.
    """
    tasks = list(tasks)
    if isinstance(genotype, str):
        uniform = {f"all_{kind}": kind for kind in KINDS}
        if genotype in uniform:
            return {target: dict.fromkeys(tasks, uniform[genotype]) for target in tasks}
        if genotype in PUBLISHED:
            names, rows = (text.split() for text in PUBLISHED[genotype])
            table: Any = {t: {s: _LETTERS[x] for s, x in zip(names, row)} for t, row in zip(names, rows)}
        else:
            table = read_genotype_file(genotype)
        value = f"={genotype}"
    else:
        table, value = genotype, ""
    if not isinstance(table, Mapping):
        raise ParameterError("genotype", f"{value} is no mapping target -> source -> kind of context")
    return {target: {source: _get_kind(table, target, source, value) for source in tasks} for target in tasks}


def is_named_genotype(genotype: str) -> bool:
    """Return whether a text names a built-in genotype; any other text is the path of a file."""
    return genotype in PUBLISHED or genotype in {f"all_{kind}" for kind in KINDS}


def read_genotype_file(name: str) -> Any:
    """Read a genotype from a JSON file: a mapping, or what the authors' search writes (the mapping under ``data``)."""
    if not Path(name).is_file():
        names = ", ".join([*(f"all_{kind}" for kind in KINDS), *PUBLISHED])
        raise ParameterError("genotype", f"={name} is neither a file nor one of {names}")
    try:
        content = read_json(name)
    except UserError as error:
        raise ParameterError("genotype", f"={name} can't be read as JSON: {error}") from error
    return content["data"] if isinstance(content, dict) and "data" in content else content


def _get_kind(table: Mapping[str, Any], target: str, source: str, value: str) -> str:
    """Return the kind of context of one pair; ``value`` is the genotype's, for messages."""
    row = table.get(target)
    if not isinstance(row, Mapping) or source not in row:
        problem = f"{value} does not say which context {target} takes from {source}; it needs every pair of tasks"
        raise ParameterError("genotype", problem)
    kind = row[source]
    if isinstance(kind, int) and not isinstance(kind, bool) and 0 <= kind < len(KINDS):
        return KINDS[kind]
    if kind in KINDS:
        return str(kind)
    names = ", ".join(f"{name} ({code})" for code, name in enumerate(KINDS))
    raise ParameterError("genotype", f"{value} gives {kind!r} for {target} from {source}, which is none of {names}")


class Expectation(nn.Module):
    """Map logits of K labels (B, K, h, w) to the expectation (B, C, h, w) of the labels' values (K, C)."""

    values: Tensor

    def __init__(self, values: Tensor):
        super().__init__()
        self.register_buffer("values", values, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """Return the mean value, weighted by the labels' probabilities."""
        return torch.einsum("bkhw,kc->bchw", logits.softmax(dim=1), self.values)


class Difference(nn.Module):
    """Map logits of "no" and "yes" (B, 2, h, w) to one logit (B, 1, h, w) of the same probability."""

    def forward(self, logits: Tensor) -> Tensor:
        """Return the difference of the two logits."""
        return logits[:, 1:] - logits[:, :1]


def log_bins(count: int, low: float, high: float) -> Tensor:
    """Return the centres of ``count`` bins of equal width in the logarithm: (count, 1)."""
    steps = (torch.arange(count) + 0.5) / count
    return (low * (steps * math.log(high / low)).exp()).unsqueeze(1)


def directions(count: int) -> Tensor:
    """Return unit vectors spread evenly over the half sphere z > 0, which a camera sees: (count, 3)."""
    index = torch.arange(count)
    z = (index + 0.5) / count
    angle = index * math.pi * (3 - 5**0.5)  # the golden angle
    ring = (1 - z.square()).sqrt()
    return torch.stack([ring * angle.cos(), ring * angle.sin(), z], dim=1)


def build_label_space(task: str, channels: int, options: Mapping[str, Any] | None) -> tuple[int, nn.Module]:
    """Return the number of labels of a task's auxiliary head, and the module that maps their logits to a prediction.

    Args:
        task: name, for messages.
        channels: number of channels of the task's prediction.
        options: how a continuous prediction is divided into labels; see ``kinds`` of :class:`ATRC`. None: the channels
            are the labels, and a single channel is the logit of two.
    """
    if options is None:
        return (2, Difference()) if channels == 1 else (channels, nn.Identity())
    parameter, required = f"kinds.{task}", {"log_bins": {"low", "high"}, "directions": set()}
    if not isinstance(options, Mapping):
        choices = "{kind: log_bins, count: 40, low: 0.6, high: 10} or {kind: directions, count: 40}"
        raise ParameterError(parameter, f"={options} must be a mapping, such as {choices}")
    remaining = dict(options)
    kind, count = remaining.pop("kind", None), remaining.pop("count", None)
    if kind not in required:
        raise ParameterError(f"{parameter}.kind", f"={kind} is not known; choose {' or '.join(required)}")
    if set(remaining) != required[kind]:
        names = ", ".join(["count", *sorted(required[kind])])
        raise ParameterError(parameter, f" is of the kind {kind}, which takes {names}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise ParameterError(f"{parameter}.count", f"={count} must be a whole number >= 2")
    if kind == "log_bins":
        low, high = remaining["low"], remaining["high"]
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in (low, high)) or not 0 < low < high:
            raise ParameterError(parameter, f" needs numbers 0 < low < high, not low={low} and high={high}")
        values = log_bins(count, low, high)
    else:
        values = directions(count)
    if values.shape[1] != channels:
        problem = f"={kind} is for predictions of {values.shape[1]} channels, {task} has {channels}"
        raise ParameterError(f"{parameter}.kind", problem)
    return count, Expectation(values)


class Refine(nn.Module):
    """Refine a target's features (B, width, h, w) with the contexts that it gathers.

    The norm of the contexts starts at zero, so that training starts without them.
    """

    def __init__(self, contexts: Mapping[str, Context], width: int, context_width: int, dropout: float):
        super().__init__()
        self.contexts = nn.ModuleDict(contexts)
        self.merge = None
        if contexts:
            gathered = context_width * len(contexts)
            norm = SpatialNorm(width)
            nn.init.zeros_(norm.weight)
            self.merge = nn.Sequential(nn.Conv2d(gathered, width, 1, bias=False), norm)
        inputs = 2 * width if contexts else width
        self.mix = nn.Sequential(ConvBlock(inputs, width, 1), nn.Dropout2d(dropout))

    def forward(self, target: Tensor, sources: Mapping[str, Tensor]) -> Tensor:
        """Return the refined features; ``sources``: source -> features or prototypes that its context attends to."""
        if self.merge is None:
            return self.mix(target)
        gathered = [context(target, sources[source]) for source, context in self.contexts.items()]
        return self.mix(torch.cat([target, self.merge(torch.cat(gathered, dim=1))], dim=1))


def _logits(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 1x1 convolution with small initial weights, as published."""
    head = nn.Conv2d(inputs, outputs, 1)
    nn.init.normal_(head.weight, std=0.01)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return head


class ATRC(Decoder):
    """Adaptive task-relational context: initial features per task, contexts between tasks, refined features.

    Only tasks whose labels some context uses have an auxiliary head. The heads learn from detached features.

    Features: ``final`` (each task's pre-logit map), ``initial`` (each task's features before the contexts).

    Args:
        channels: see :class:`Decoder`.
        strides: see :class:`Decoder`.
        tasks: see :class:`Decoder`.
        genotype: kind of context of every pair of tasks; see :func:`read_genotype`.
        kinds: task -> how its auxiliary head divides a continuous prediction into labels, ``{kind: log_bins, count,
            low, high}`` or ``{kind: directions, count}``; tasks without an entry: see :func:`build_label_space`.
        reduction: channels of the concatenated backbone maps, relative to those of a task's features.
        context_reduction: channels of a task's features, relative to those of a context.
        window: side of the window of local contexts, in pixels of the map; odd.
        dropout: probability, of whole channels.
        stride: stride of all maps, in pixels.
        widest: a concatenation of more channels is projected to this number. The published backbones have 270 and 720
            channels; the 3840 of a ResNet-50 would give every task a 3x3 convolution of 33 M parameters.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        tasks: Mapping[str, int],
        genotype: str | Mapping[str, Any] = "all_t_label",
        kinds: Mapping[str, Mapping[str, Any]] | None = None,
        reduction: int = 4,
        context_reduction: int = 2,
        window: int = 9,
        dropout: float = 0.05,
        stride: int = 4,
        widest: int = 720,
    ):
        super().__init__(channels, strides, tasks)
        if window % 2 == 0:
            raise ParameterError("window", f"={window} must be odd: a window has a pixel at its centre")
        self.stride = stride
        self.genotype = read_genotype(genotype, self.tasks)
        total = sum(channels)
        self.fusion = Fusion(channels, widest) if total > widest else None
        total = min(total, widest)
        width = max(total // reduction, 1)
        context_width = max(width // context_reduction, 1)

        self.initial = nn.ModuleDict({task: ConvBlock(total, width) for task in self.tasks})
        # (task of the labels, source) of the prototypes: those that several targets use are computed once
        self.prototype_pairs = {
            (target if kind == "t_label" else source, source): None
            for target, row in self.genotype.items()
            for source, kind in row.items()
            if kind in ("t_label", "s_label")
        }
        labelling = {labeller for labeller, _ in self.prototype_pairs}
        self.auxiliary, self.labels, self.decode = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for task in (t for t in self.tasks if t in labelling):
            count, self.decode[task] = build_label_space(task, self.tasks[task], (kinds or {}).get(task))
            self.auxiliary[task] = ConvBlock(total, total, 1)
            self.labels[task] = _logits(total, count)

        def build_context(kind: str) -> Context:
            if kind == "global":
                return GlobalContext(width, context_width)
            if kind == "local":
                return LocalContext(width, context_width, window)
            return LabelContext(width, context_width)

        self.refine = nn.ModuleDict(
            {
                target: Refine(
                    {s: build_context(k) for s, k in row.items() if k != "none"}, width, context_width, dropout
                )
                for target, row in self.genotype.items()
            }
        )
        self.logits = nn.ModuleDict({task: _logits(width, c) for task, c in self.tasks.items()})
        self.feature_channels = {"final": dict.fromkeys(self.tasks, width), "initial": dict.fromkeys(self.tasks, width)}

    def forward(self, features: list[Tensor], size: Size) -> DenseOutput:
        """Decode with the auxiliary predictions as intermediate ones."""
        initial, labels, final = self._refine(features, size)
        auxiliary = {task: resize(predict_fp32(self.decode[task], x), size) for task, x in labels.items()}
        maps = {"final": final, "initial": initial}
        return DenseOutput(self._predictions(final, size), maps, [auxiliary] if auxiliary else [], size)

    def predict(self, features: list[Tensor], size: Size) -> dict[str, Tensor]:
        """Return the final predictions; of the auxiliary heads only the logits, which label contexts need, are run."""
        return self._predictions(self._refine(features, size)[2], size)

    def _predictions(self, final: Mapping[str, Tensor], size: Size) -> dict[str, Tensor]:
        return predict_tasks(self.logits, final, size)

    def _refine(self, features: list[Tensor], size: Size) -> tuple[dict[str, Tensor], ...]:
        """Return, per task, the initial features, the label logits (of tasks that have them) and the final features."""
        side = [-(-s // self.stride) for s in size]
        if self.fusion is not None:
            fused = self.fusion(features, side)
        else:
            fused = torch.cat([resize(feature, side) for feature in features], dim=1)
        initial = {task: convolution(fused) for task, convolution in self.initial.items()}
        detached = fused.detach()  # as published: earlier layers do not learn from the auxiliary heads
        labels = {task: predict_fp32(head, self.auxiliary[task](detached)) for task, head in self.labels.items()}
        gathered = {(by, of): prototypes(labels[by], initial[of]) for by, of in self.prototype_pairs}
        final = {}
        for target, refine in self.refine.items():
            sources = dict(initial)
            for source, kind in self.genotype[target].items():
                if kind in ("t_label", "s_label"):
                    sources[source] = gathered[target if kind == "t_label" else source, source]
            final[target] = refine(initial[target], sources)
        return initial, labels, final

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Return the fusion, and each task's initial layers and label head where another task gathers from them."""
        if self.fusion is not None:
            yield from self.fusion.parameters()
        for source in self.tasks:
            kinds = {row[source] for target, row in self.genotype.items() if target != source}
            if kinds - {"none"}:
                yield from self.initial[source].parameters()
            if "s_label" in kinds:
                yield from self.auxiliary[source].parameters()
                yield from self.labels[source].parameters()
