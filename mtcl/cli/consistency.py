"""The consistency picture: what a checkpoint's task features say of the pixels that each task's labels call alike."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from mtcl.atomic import write_json
from mtcl.cli.evaluate import adapt_config, apply_overrides, infer_dataset_override
from mtcl.cli.run_record import build_run_record
from mtcl.config.build_data import build_dataset, build_eval_loader, build_tasks
from mtcl.config.build_training import build_regularizer
from mtcl.config.compose import compose_with_choices
from mtcl.config.load import convert_build_errors, read_checkpoint_model, rebuild_model, restore_config
from mtcl.config.overrides import quote_paths
from mtcl.config.resolve import plain
from mtcl.config.schema import check_config
from mtcl.config.stored_config import check_tasks
from mtcl.data import MultiTaskDataset
from mtcl.data.loader import prepare_batch
from mtcl.data.sample import Batch
from mtcl.errors import UserError
from mtcl.evaluation.feature_consistency import (
    PairStatistics,
    build_histograms,
    compute_pair_statistics,
    label_pairs,
    squared_distances,
    summarize_pairs,
)
from mtcl.models.base import DenseModel
from mtcl.regularizers import Contrastive
from mtcl.regularizers.sampling import sample_features, sample_labels
from mtcl.runtime import choose_device
from mtcl.tasks.base import Task
from mtcl.training.checkpoint import Checkpoint, load_checkpoint
from mtcl.visualization.consistency_figures import draw_distances, draw_separation

PIXELS = 256  # per frame
CHUNK = 16  # frames whose pairs are held at a time
NEARNESS = "nearness"  # the reference: how far apart two pixels lie in the image
Tallies = dict[str, dict[str, PairStatistics]]  # target -> source of the labels -> sums


class Options(NamedTuple):
    """Arguments of the command."""

    checkpoint: Path
    compare: Path | None
    target: str | None  # None: semseg, else the first task; "all": a figure each
    frames: int
    output: Path


class TrainedModel(NamedTuple):
    """A trained model and its trained projectors."""

    path: Path
    step: int
    name: str  # "contrast, weight 0.5"
    model: DenseModel
    regularizer: Contrastive | None  # with its trained projectors
    trained: dict[str, list[str]]  # target -> sources whose projector is no longer the one that the run began with


class Samples(NamedTuple):
    """Labels and features at K pixels of each of N frames, on the CPU."""

    ids: list[str]
    places: Tensor  # (N, K, 2): row and column in pixels, as fractions of the image's diagonal
    labels: dict[str, Tensor]  # task -> (N, K, c)
    valid: dict[str, Tensor]  # task -> bool (N, K)
    features: list[dict[str, Tensor]]  # for each arm: task -> (N, K, C_t)


def parse_args(args: Sequence[str], now: str) -> tuple[Options, list[str]]:
    """Split the command line into the script's arguments and overrides of the checkpoint's config.

    ``now`` names the default output folder.
    """
    options: dict[str, str] = {}
    others = []
    for arg in args:
        key, equals, value = arg.partition("=")
        if key in Options._fields and equals:
            options[key] = value.strip("'\"")
        else:
            others.append(arg)
    if not options.get("checkpoint"):
        raise UserError("consistency.py needs checkpoint=PATH, e.g. checkpoint=outputs/rooms/TIME/checkpoints/last.pt")
    frames = options.get("frames", "64")
    if not frames.isdecimal() or int(frames) < 1:
        raise UserError(f"frames={frames} must be a whole number >= 1")
    compare = options.get("compare")
    return Options(
        Path(options["checkpoint"]),
        Path(compare) if compare else None,
        options.get("target"),
        int(frames),
        Path(options.get("output", f"outputs/consistency/{now}")),
    ), others


def measure_consistency(options: Options, overrides: Sequence[str], configs: Path) -> dict[str, Any]:
    """Measure, write consistency.json and its figures into ``options.output``, and return what the JSON holds.

    ``overrides``: of the checkpoint's config, as evaluate.py takes them; ``configs``: the folder they refer to.
    """
    if (options.output / "consistency.json").exists():
        raise UserError(f"{options.output / 'consistency.json'} exists already; choose another output")
    checkpoint = load_checkpoint(options.checkpoint)
    settings = restore_settings(checkpoint, options.checkpoint, overrides, configs)
    tasks = build_tasks(settings)
    check_tasks(read_checkpoint_model(options.checkpoint, checkpoint).tasks, tasks, options.checkpoint)
    targets = choose_targets(options.target, list(tasks))
    arms = [load_trained_model(options.checkpoint, checkpoint, tasks)]
    if options.compare is not None:
        other = load_checkpoint(options.compare)
        check_tasks(read_checkpoint_model(options.compare, other).tasks, tasks, options.compare)
        arms.append(load_trained_model(options.compare, other, tasks))
    feature = choose_common_feature(arms, settings)
    device = choose_device(settings.trainer.device, "trainer.device")
    reader = take_evenly_spaced(build_dataset(settings, "val", tasks), options.frames)
    batches = build_eval_loader(settings, reader, tasks, device)
    samples = collect(arms, batches, tasks, feature, device)
    lead = next((arm.regularizer for arm in arms if arm.regularizer is not None), None)
    thresholds = (
        lead.thresholds
        if lead
        else {name: (task.positive_threshold, task.negative_threshold) for name, task in tasks.items()}
    )

    statistics = [measure(arm, features, samples, tasks, thresholds) for arm, features in zip(arms, samples.features)]
    nearness = measure_nearness(samples, tasks, thresholds)
    facts = build_run_record(settings, reader, len(samples.ids), device, overrides)
    facts = {k: v for k, v in facts.items() if k not in ("protocol", "evaluation", "precision", "seed")}
    content: dict[str, Any] = {
        "run": {**facts, "data": settings.data.name, "frames": samples.ids, "pixels": samples.places.shape[1]},
        "tap": feature,
        "thresholds": {name: list(pair) for name, pair in thresholds.items()},
        NEARNESS: {source: summarize_pairs(sums) for source, sums in nearness.items()},
        "arms": [to_plain(arm, kinds) for arm, kinds in zip(arms, statistics)],
    }
    title = f"{settings.data.name}, {len(samples.ids)} validation frames of split {settings.data.split}"
    for target in targets:
        draw_distances(options.output / f"consistency_{target}.png", content["arms"][0], target, title)
    draw_separation(options.output / "separation.png", content["arms"], content[NEARNESS], title)
    write_json(options.output / "consistency.json", content)
    return content


def restore_settings(checkpoint: Checkpoint, path: Path, overrides: Sequence[str], configs: Path) -> DictConfig:
    """Restore a checkpoint's config and apply the command's overrides, as evaluate.py does."""
    quoted = quote_paths(overrides)
    saved = read_checkpoint_model(path, checkpoint)
    dataset = infer_dataset_override(saved, quoted, configs)
    composed, groups = compose_with_choices(
        [*quoted, *([dataset] if dataset else [])], configs, "evaluate", check=False
    )
    settings = adapt_config(saved, composed)
    for override in quoted:
        if override.lstrip("+").startswith("regularizer"):
            raise UserError(f"{override}: the regulariser is looked at as it was trained; leave this out")
    settings = apply_overrides(settings, composed, quoted, list(groups))
    check_config(plain(settings))
    return settings


def choose_targets(name: str | None, tasks: Sequence[str]) -> list[str]:
    """Return the targets to draw: those named, by default semseg or the first task."""
    if name is None:
        return ["semseg" if "semseg" in tasks else tasks[0]]
    if name != "all" and name not in tasks:
        raise UserError(f"target={name} is not a task of the checkpoint; choose all or one of {', '.join(tasks)}")
    return list(tasks) if name == "all" else [name]


def load_trained_model(path: Path, checkpoint: Checkpoint, tasks: Mapping[str, Task]) -> TrainedModel:
    """Load the model, and its projectors if there are some, with the checkpoint's weights."""
    saved = read_checkpoint_model(path, replace(checkpoint, ema=None))
    settings = restore_config(saved)
    model = rebuild_model(settings, tasks, saved)
    fresh = regularizer = None
    if checkpoint.regularizer is not None:
        with convert_build_errors(path):
            fresh = build_regularizer(settings, tasks, model)
            regularizer = build_regularizer(settings, tasks, model)
    if regularizer is not None:
        try:
            regularizer.load_state_dict(dict(checkpoint.regularizer or {}))
        except Exception as error:  # names, shapes, or no tensors at all
            raise UserError(f"the projectors in {path} do not fit what its own config describes") from error
    name = "no regulariser"
    if regularizer is not None:
        name = f"{type(regularizer).__name__.lower()}, weight {settings.regularizer.weight:g}"
    if not isinstance(regularizer, Contrastive) or not isinstance(fresh, Contrastive):
        return TrainedModel(path, saved.step, name, model.eval(), None, {task: [] for task in tasks})
    widths = model.feature_channels[regularizer.feature]
    return TrainedModel(
        path, saved.step, name, model.eval(), regularizer, find_trained_projectors(regularizer, fresh, widths)
    )


@torch.inference_mode()
def find_trained_projectors(
    regularizer: Contrastive, fresh: Contrastive, widths: Mapping[str, int]
) -> dict[str, list[str]]:
    """Return for each target the sources whose projector is no longer the ``fresh`` one."""
    trained: dict[str, list[str]] = {}
    for target in regularizer.task_names:
        probe = torch.randn(1, 8, widths[target], generator=torch.Generator().manual_seed(0))
        trained[target] = []
        for index, source in enumerate(regularizer.task_names):
            final, initial = (project(r, target, probe, index) for r in (regularizer, fresh))
            if not torch.equal(final, initial):
                trained[target].append(source)
    return trained


def project(regularizer: Contrastive, target: str, feature: Tensor, source: int) -> Tensor:
    """Project features (B, K, C) to unit vectors (B, K, D)."""
    number = source if regularizer.projector_sharing == "pair" else 0
    return regularizer.projectors[target](feature, torch.full((len(feature),), number))


def choose_common_feature(arms: Sequence[TrainedModel], settings: DictConfig) -> str:
    """Return the name of the feature to measure: the first regulariser's; all models must have it in one width."""
    for attribute in ("feature", "thresholds"):
        values = [(arm.path, getattr(arm.regularizer, attribute)) for arm in arms if arm.regularizer]
        if any(value != values[0][1] for _, value in values):
            to_plain = ", ".join(f"{path}: {value}" for path, value in values)
            raise UserError(f"compare= needs regularisers that look at the same: their {attribute} differ ({to_plain})")
    configured = OmegaConf.select(settings, "regularizer.options.feature", default="final")
    feature = next((arm.regularizer.feature for arm in arms if arm.regularizer), str(configured))
    widths = [arm.model.feature_channels.get(feature) for arm in arms]
    if widths[0] is None or any(width != widths[0] for width in widths):
        facts = ", ".join(f"{arm.path}: {width or 'none'}" for arm, width in zip(arms, widths))
        raise UserError(
            f"compare= needs checkpoints of the same decoder; the channels of the feature {feature} are {facts}"
        )
    return feature


class DatasetSubset:
    """The images of a dataset at ``indices``."""

    def __init__(self, reader: MultiTaskDataset, indices: Sequence[int]):
        self.reader, self.indices = reader, indices
        self.ids: Sequence[str] = [reader.ids[i] for i in indices]
        self.summary, self.fingerprint = reader.summary, reader.fingerprint

    def read(self, index: int, tasks: Any = None) -> Any:
        """Read a sample by its number in the subset."""
        return self.reader.read(self.indices[index], tasks)


def take_evenly_spaced(reader: MultiTaskDataset, count: int) -> MultiTaskDataset:
    """Take ``count`` evenly spaced images from the first to the last; all of a shorter list."""
    last = len(reader.ids) - 1
    return DatasetSubset(reader, np.unique(np.linspace(0, last, min(count, last + 1)).round().astype(int)).tolist())


def sample_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Sample different pixels of each image, none in its padding.

    They depend on the image's id alone, so that all runs are measured at the same pixels: (B, K, 2) as fractions of the
    frame, and as fractions of the image's diagonal.
    """
    height, width = batch["image"].shape[-2:]
    in_frame, in_image = [], []
    for sample in batch["meta"]:
        h, w = sample.native_size
        rng = np.random.default_rng([0x636F6E73, zlib.crc32(sample.id.encode())])  # a stream of its own
        flat = rng.choice(h * w, PIXELS, replace=h * w < PIXELS)
        position = np.stack([flat // w, flat % w], axis=1) + 0.5
        in_frame.append((position + sample.offset) / (height, width))
        in_image.append(position / np.hypot(h, w))
    return torch.from_numpy(np.stack(in_frame)).float(), torch.from_numpy(np.stack(in_image))


@torch.inference_mode()
def collect(
    arms: Sequence[TrainedModel],
    batches: Iterator[Batch] | Any,
    tasks: Mapping[str, Task],
    feature_name: str,
    device: torch.device,
) -> Samples:
    """Run every arm's model on the frames; features are sampled bilinearly."""
    for arm in arms:
        arm.model.to(device)
    ids: list[str] = []
    places, labels, valid = [], [], []
    features: list[list[dict[str, Tensor]]] = [[] for _ in arms]
    progress: Iterable[Batch] = tqdm(batches, desc="frames", leave=False)
    for batch in progress:
        size = (batch["image"].shape[-2], batch["image"].shape[-1])
        pixels, in_image = sample_positions(batch)
        ids += [sample.id for sample in batch["meta"]]
        places.append(in_image)
        labels.append({name: sample_labels(batch["labels"][name], pixels) for name in tasks})
        valid.append(
            {name: sample_labels(task.valid(batch["labels"][name]), pixels)[..., 0] for name, task in tasks.items()}
        )
        for arm, sampled in zip(arms, features):
            image, _ = prepare_batch({**batch, "labels": {}}, arm.model.mean, arm.model.std, device)
            output = arm.model(image)
            positions = pixels.to(device)
            sampled.append(
                {
                    name: sample_features(output.features[feature_name][name], positions, size, output.frame).cpu()
                    for name in tasks
                }
            )
    return Samples(
        ids, torch.cat(places), concatenate(labels), concatenate(valid), [concatenate(sampled) for sampled in features]
    )


def concatenate(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the tensors of each key."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


Pairs = dict[str, tuple[Tensor, Tensor]]  # task -> positive and negative pairs


def chunks(
    samples: Samples, tasks: Mapping[str, Task], thresholds: Mapping[str, tuple[float, float]]
) -> Iterator[tuple[slice, Pairs]]:
    """Yield some frames at a time, with the pairs by each task's labels."""
    for start in tqdm(range(0, len(samples.ids), CHUNK), desc="pairs", leave=False):
        rows = slice(start, start + CHUNK)
        pairs = {}
        for name, task in tasks.items():
            label = samples.labels[name][rows]
            pairs[name] = label_pairs(task.distance(label, label), samples.valid[name][rows], *thresholds[name])
        yield rows, pairs


@torch.inference_mode()
def measure(
    arm: TrainedModel,
    features: Mapping[str, Tensor],
    samples: Samples,
    tasks: Mapping[str, Task],
    thresholds: Mapping[str, tuple[float, float]],
) -> dict[str, Tallies]:
    """Compute the sums for raw, centred and projected features.

    Centred features are without their mean over all frames, which the features of a ReLU share.

    Projected features of a target with the labels of a source go through the projector of that pair. Where that was
    never trained (the target's own labels, mostly), through each of the target's trained ones in turn: do features that
    were projected for the others still separate its own labels?
    """
    statistics: dict[str, Tallies] = {"raw": {}, "centred": {}, "projected": {}}
    names = list(tasks)

    def add(kind: str, target: str, source: str, z: Tensor, pairs: Pairs) -> None:
        sums, by_source = (
            compute_pair_statistics(squared_distances(z), *pairs[source]),
            statistics[kind].setdefault(target, {}),
        )
        by_source[source] = by_source[source] + sums if source in by_source else sums

    for rows, pairs in chunks(samples, tasks, thresholds):
        for target in names:
            feature = features[target][rows]
            centred = feature - features[target].mean(dim=(0, 1))
            z = {}
            if arm.regularizer is not None:
                z = {p: project(arm.regularizer, target, feature, names.index(p)) for p in arm.trained[target]}
            for source in names:
                add("raw", target, source, feature, pairs)
                add("centred", target, source, centred, pairs)
                for projector in projectors_for(arm, target, source):
                    add("projected", target, source, z[projector], pairs)
    return statistics


def projectors_for(arm: TrainedModel, target: str, source: str) -> list[str]:
    """Return the sources whose projectors a target's features go through for the labels of ``source``."""
    return [source] if source in arm.trained[target] else arm.trained[target]


def measure_nearness(
    samples: Samples, tasks: Mapping[str, Task], thresholds: Mapping[str, tuple[float, float]]
) -> dict[str, PairStatistics]:
    """Compute the same sums with the squared distance in the image in place of the features' distance.

    It is what any smooth map would separate. Distances are fractions of the diagonal.
    """
    statistics: dict[str, PairStatistics] = {}
    for rows, pairs in chunks(samples, tasks, thresholds):
        distance = torch.cdist(samples.places[rows], samples.places[rows]).square()
        for name in tasks:
            sums = compute_pair_statistics(distance, *pairs[name])
            statistics[name] = statistics[name] + sums if name in statistics else sums
    return statistics


def to_plain(arm: TrainedModel, kinds: Mapping[str, Tallies]) -> dict[str, Any]:
    """Convert sums to plain numbers: kind -> target -> source -> means and histograms with shared bins."""
    features: dict[str, Any] = {}
    for kind, targets in kinds.items():
        features[kind] = {}
        for target, by_source in targets.items():
            shared = build_histograms(list(by_source.values()))
            features[kind][target] = {
                source: {**summarize_pairs(sums), "bin_width": shared.width, "histogram_ap": ap, "histogram_an": an}
                for (source, sums), ap, an in zip(by_source.items(), shared.ap, shared.an)
            }
            if kind == "projected":
                for source, cell in features[kind][target].items():
                    cell["projectors"] = projectors_for(arm, target, source)
    return {"checkpoint": str(arm.path), "step": arm.step, "name": arm.name, **features}
