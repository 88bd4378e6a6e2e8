"""Measure how well a checkpoint's task features separate the pixels that each task's labels separate, and draw it."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mtcl.atomic import write_json
from mtcl.cli.arguments import BACKBONE_WEIGHTS_HELP, CommandParser, output_path, positive_int
from mtcl.cli.evaluate import adapt_config, apply_overrides, infer_dataset_override
from mtcl.cli.run_record import build_run_record
from mtcl.config.build_data import build_dataset, build_eval_loader, build_tasks
from mtcl.config.build_training import build_regularizer
from mtcl.config.compose import compose_with_choices
from mtcl.config.load import (
    assign_backbone_weights,
    convert_build_errors,
    read_checkpoint_model,
    rebuild_model,
    restore_config,
)
from mtcl.config.overrides import quote_paths
from mtcl.config.resolve import plain
from mtcl.config.schema import check_config, rule_of
from mtcl.config.stored_config import check_tasks
from mtcl.data import MultiTaskDataset
from mtcl.data.device_batch import prepare_batch
from mtcl.data.sample import Batch
from mtcl.errors import UserError, suggest
from mtcl.evaluation.feature_consistency import (
    PairStatistics,
    build_histograms,
    compute_pair_statistics,
    label_pairs,
    squared_distances,
    summarize_pairs,
)
from mtcl.models.base import DenseModel
from mtcl.progress import progress_bar
from mtcl.regularizers import Contrastive
from mtcl.regularizers.sampling import sample_features, sample_labels
from mtcl.runtime import choose_device
from mtcl.tasks.base import Task
from mtcl.training.checkpoint import Checkpoint, load_checkpoint
from mtcl.visualization.consistency_figures import draw_distances, draw_separation

PIXELS = 256  # per frame
CHUNK = 16  # frames whose pairs are in memory at a time
NEARNESS = "nearness"  # the reference: how far apart two pixels lie in the image
Tallies = dict[str, dict[str, PairStatistics]]  # target -> source of the labels -> sums


class Options(NamedTuple):
    """Options of the script, named as on its command line."""

    checkpoint: Path
    compare: Path | None
    target: str | None  # None: semseg, else the first task; "all": one figure per task
    frames: int
    output: Path
    backbone_weights: str | None  # of models that leave out their backbone


class TrainedModel(NamedTuple):
    """A trained model and its projectors, as they are measured here."""

    path: Path
    step: int
    name: str  # "contrast, weight 0.5"
    model: DenseModel
    regularizer: Contrastive | None  # with its trained projectors
    trained: dict[str, list[str]]  # target -> sources whose projector differs from its initialisation


class Samples(NamedTuple):
    """Labels and features at K pixels of each of N frames, on the CPU."""

    ids: list[str]
    positions: Tensor  # (N, K, 2): row and column as fractions of the image's diagonal
    labels: dict[str, Tensor]  # task -> (N, K, c)
    valid: dict[str, Tensor]  # task -> bool (N, K)
    features: list[dict[str, Tensor]]  # for each variant: task -> (N, K, C_t)


def parse_args(args: Sequence[str], description: str | None, timestamp: str) -> tuple[Options, list[str]]:
    """Split the command line into the script's options and overrides of the checkpoint's config.

    Args:
        args: the command line.
        description: the help text.
        timestamp: names the default output folder.
    """
    parser = CommandParser(description)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--compare", type=Path, metavar="CHECKPOINT", help="a second model, beside the first")
    parser.add_argument("--target", metavar="TASK", help="or all; default: semseg, else the model's first task")
    parser.add_argument("--frames", type=positive_int, default=64, metavar="N", help="default: %(default)s")
    default = Path("outputs/consistency") / timestamp
    parser.add_argument("--output", type=output_path, default=default, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--backbone-weights", metavar="FILE|hub", help=BACKBONE_WEIGHTS_HELP)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the checkpoint's config")
    values = vars(parser.parse_intermixed_args(args))
    overrides: list[str] = values.pop("overrides")
    for word in (values["checkpoint"], *overrides):
        if word.partition("=")[0] in values:
            raise UserError(f"{word}: give CHECKPOINT alone, and options as --name VALUE")
    if rule_of(values["checkpoint"].partition("=")[0]) is not None:
        raise UserError(
            f"{values['checkpoint']} is an override; give CHECKPOINT before it, a run's checkpoints/last.pt"
        )
    return Options(**{**values, "checkpoint": Path(values["checkpoint"])}), overrides


def choose_float64_capable_device(name: str) -> torch.device:
    """Return the device of this name; refuse Apple's GPUs."""
    device = choose_device(name, "trainer.device")
    if device.type == "mps":
        raise UserError("trainer.device=mps lacks float64, in which distances are measured; use trainer.device=cpu")
    return device


def measure_consistency(options: Options, overrides: Sequence[str], configs: Path) -> dict[str, Any]:
    """Write consistency.json, separation.png and one consistency_TARGET.png per target into ``options.output``.

    Args:
        options: of the script.
        overrides: of the checkpoint's config, as evaluate.py takes them.
        configs: the folder of the config groups that the overrides choose from.

    Returns:
        The content of consistency.json.
    """
    if (options.output / "consistency.json").exists():
        raise UserError(f"{options.output / 'consistency.json'} exists already; choose another --output")
    checkpoint = load_checkpoint(options.checkpoint)
    settings = restore_settings(checkpoint, options.checkpoint, overrides, configs)
    tasks = build_tasks(settings)
    targets = choose_targets(options.target, list(tasks))
    checkpoints = [(options.checkpoint, checkpoint)]
    if options.compare is not None:
        checkpoints.append((options.compare, load_checkpoint(options.compare)))
    saved = [read_checkpoint_model(*pair) for pair in checkpoints]
    for one in saved:
        check_tasks(one.tasks, tasks, one.path)
    variants = [
        load_trained_model(path, checkpoint, tasks, weights)
        for (path, checkpoint), weights in zip(checkpoints, assign_backbone_weights(saved, options.backbone_weights))
    ]
    feature = choose_common_feature(variants, settings)
    device = choose_float64_capable_device(settings.trainer.device)
    dataset = take_evenly_spaced(build_dataset(settings, "val", tasks), options.frames)
    batches = build_eval_loader(settings, dataset, tasks, device)
    samples = collect_samples(variants, batches, tasks, feature, device)
    regularizer = next((variant.regularizer for variant in variants if variant.regularizer is not None), None)
    thresholds = (
        regularizer.thresholds
        if regularizer
        else {name: (task.positive_threshold, task.negative_threshold) for name, task in tasks.items()}
    )

    statistics = [
        measure_features(variant, features, samples, tasks, thresholds)
        for variant, features in zip(variants, samples.features)
    ]
    nearness = measure_nearness(samples, tasks, thresholds)
    record = build_run_record(settings, dataset, len(samples.ids), device, overrides)
    record = {k: v for k, v in record.items() if k not in ("protocol", "evaluation", "precision", "seed")}
    content: dict[str, Any] = {
        "run": {**record, "data": settings.data.name, "frames": samples.ids, "pixels": samples.positions.shape[1]},
        "tap": feature,
        "thresholds": {name: list(pair) for name, pair in thresholds.items()},
        NEARNESS: {source: summarize_pairs(sums) for source, sums in nearness.items()},
        "arms": [to_plain(variant, kinds) for variant, kinds in zip(variants, statistics)],
    }
    title = f"{settings.data.name}, {len(samples.ids)} validation frames of split {settings.data.split}"
    for target in targets:
        draw_distances(options.output / f"consistency_{target}.png", content["arms"][0], target, title)
    draw_separation(options.output / "separation.png", content["arms"], content[NEARNESS], title)
    write_json(options.output / "consistency.json", content)
    return content


def restore_settings(checkpoint: Checkpoint, path: Path, overrides: Sequence[str], configs: Path) -> DictConfig:
    """Return the checkpoint's config with the overrides applied, as evaluate.py would use it."""
    quoted = quote_paths(overrides)
    saved = read_checkpoint_model(path, checkpoint)
    dataset = infer_dataset_override(saved, quoted, configs)
    composed, groups = compose_with_choices(
        [*quoted, *([dataset] if dataset else [])], configs, "evaluate", check=False
    )
    settings = adapt_config(saved, composed)
    for override in quoted:
        if override.lstrip("+").startswith("regularizer"):
            raise UserError(f"{override}: the regulariser is measured as it was trained; omit this override")
    settings = apply_overrides(settings, composed, quoted, list(groups))
    check_config(plain(settings))
    return settings


def choose_targets(name: str | None, tasks: Sequence[str]) -> list[str]:
    """Return the tasks whose features get a figure: by default semseg, else the first task."""
    if name is None:
        return ["semseg" if "semseg" in tasks else tasks[0]]
    if name != "all" and name not in tasks:
        problem = f"--target {name} is not a task of the checkpoint{suggest(name, tasks)}"
        raise UserError(f"{problem}; choose all or one of {', '.join(tasks)}")
    return list(tasks) if name == "all" else [name]


def load_trained_model(
    path: Path, checkpoint: Checkpoint, tasks: Mapping[str, Task], backbone_weights: str | Path | None = None
) -> TrainedModel:
    """Rebuild the model, and its projectors if it was trained with some, with the checkpoint's weights."""
    saved = read_checkpoint_model(path, replace(checkpoint, ema=None))
    settings = restore_config(saved)
    model = rebuild_model(settings, tasks, saved, backbone_weights)
    fresh = regularizer = None
    if checkpoint.regularizer is not None:
        with convert_build_errors(path):
            fresh = build_regularizer(settings, tasks, model)
            regularizer = build_regularizer(settings, tasks, model)
    if regularizer is not None:
        try:
            regularizer.load_state_dict(dict(checkpoint.regularizer or {}))
        except Exception as error:  # names, shapes, or no tensors at all
            raise UserError(f"the projectors in {path} do not fit the config in it") from error
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
    """Return, for each target, the sources whose projector differs from that of ``fresh``, the initial regulariser."""
    trained: dict[str, list[str]] = {}
    for target in regularizer.task_names:
        probe = torch.randn(1, 8, widths[target], generator=torch.Generator().manual_seed(0))
        trained[target] = []
        for index, source in enumerate(regularizer.task_names):
            current, initial = (project(r, target, probe, index) for r in (regularizer, fresh))
            if not torch.equal(current, initial):
                trained[target].append(source)
    return trained


def project(regularizer: Contrastive, target: str, feature: Tensor, source: int) -> Tensor:
    """Project features (B, K, C) of a target to unit vectors (B, K, D), by the projector of the source's index."""
    index = source if regularizer.projector_sharing == "pair" else 0
    return regularizer.projectors[target](feature, torch.full((len(feature),), index))


def choose_common_feature(variants: Sequence[TrainedModel], settings: DictConfig) -> str:
    """Return the name of the feature map to measure: that of the first regulariser.

    Raises:
        UserError: the regularisers use different features or thresholds, or the models differ in the feature's width.
    """
    for name in ("feature", "thresholds"):
        values = [(variant.path, getattr(variant.regularizer, name)) for variant in variants if variant.regularizer]
        if any(value != values[0][1] for _, value in values):
            listed = ", ".join(f"{path}: {value}" for path, value in values)
            raise UserError(f"--compare needs regularisers with the same {name}; theirs differ ({listed})")
    default = OmegaConf.select(settings, "regularizer.options.feature", default="final")
    feature = next((variant.regularizer.feature for variant in variants if variant.regularizer), str(default))
    widths = [variant.model.feature_channels.get(feature) for variant in variants]
    if widths[0] is None or any(width != widths[0] for width in widths):
        listed = ", ".join(f"{variant.path}: {width or 'none'}" for variant, width in zip(variants, widths))
        raise UserError(
            f"--compare needs checkpoints of the same decoder; the channels of feature {feature} are {listed}"
        )
    return feature


class DatasetSubset:
    """Selects the images of a dataset at ``indices``."""

    def __init__(self, dataset: MultiTaskDataset, indices: Sequence[int]):
        self.dataset, self.indices = dataset, indices
        self.ids: Sequence[str] = [dataset.ids[i] for i in indices]
        self.summary, self.fingerprint = dataset.summary, dataset.fingerprint

    def read(self, index: int, tasks: Any = None) -> Any:
        """Read the image and labels of one sample."""
        return self.dataset.read(self.indices[index], tasks)


def take_evenly_spaced(dataset: MultiTaskDataset, count: int) -> MultiTaskDataset:
    """Select ``count`` evenly spaced images, the first and the last included, or all if there are fewer."""
    last = len(dataset.ids) - 1
    return DatasetSubset(dataset, np.unique(np.linspace(0, last, min(count, last + 1)).round().astype(int)).tolist())


def sample_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Sample distinct pixels of each image, outside its padding.

    They depend on the image's id alone, so that all runs are measured at the same pixels.

    Returns:
        Two tensors (B, K, 2) of row and column: as fractions of the frame, and as fractions of the image's diagonal.
    """
    height, width = batch["image"].shape[-2:]
    in_frame, in_image = [], []
    for sample in batch["meta"]:
        h, w = sample.native_size
        rng = np.random.default_rng([0x636F6E73, zlib.crc32(sample.id.encode())])  # a separate random stream
        flat = rng.choice(h * w, PIXELS, replace=h * w < PIXELS)
        position = np.stack([flat // w, flat % w], axis=1) + 0.5
        in_frame.append((position + sample.offset) / (height, width))
        in_image.append(position / np.hypot(h, w))
    return torch.from_numpy(np.stack(in_frame)).float(), torch.from_numpy(np.stack(in_image))


@torch.inference_mode()
def collect_samples(
    variants: Sequence[TrainedModel],
    batches: Iterator[Batch] | Any,
    tasks: Mapping[str, Task],
    feature: str,
    device: torch.device,
) -> Samples:
    """Run every variant's model on the frames and sample its feature maps bilinearly."""
    for variant in variants:
        variant.model.to(device)
    ids: list[str] = []
    positions, labels, valid = [], [], []
    features: list[list[dict[str, Tensor]]] = [[] for _ in variants]
    progress: Iterable[Batch] = progress_bar(batches, desc="frames", leave=False)
    for batch in progress:
        size = (batch["image"].shape[-2], batch["image"].shape[-1])
        pixels, in_image = sample_positions(batch)
        ids += [sample.id for sample in batch["meta"]]
        positions.append(in_image)
        labels.append({name: sample_labels(batch["labels"][name], pixels) for name in tasks})
        valid.append(
            {name: sample_labels(task.valid(batch["labels"][name]), pixels)[..., 0] for name, task in tasks.items()}
        )
        for variant, sampled in zip(variants, features):
            image, _ = prepare_batch({**batch, "labels": {}}, variant.model.mean, variant.model.std, device)
            output = variant.model(image)
            maps, on_device = output.features[feature], pixels.to(device)
            sampled.append({name: sample_features(maps[name], on_device, size, output.frame).cpu() for name in tasks})
    return Samples(
        ids, torch.cat(positions), concatenate(labels), concatenate(valid), [concatenate(parts) for parts in features]
    )


def concatenate(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the tensors of each name along the first dimension."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


Pairs = dict[str, tuple[Tensor, Tensor]]  # task -> positive and negative pairs


def iterate_chunks(
    samples: Samples, tasks: Mapping[str, Task], thresholds: Mapping[str, tuple[float, float]]
) -> Iterator[tuple[slice, Pairs]]:
    """Yield :data:`CHUNK` frames at a time, with the pairs by each task's labels."""
    for start in progress_bar(range(0, len(samples.ids), CHUNK), desc="pairs", leave=False):
        rows = slice(start, start + CHUNK)
        pairs = {}
        for name, task in tasks.items():
            label = samples.labels[name][rows]
            pairs[name] = label_pairs(task.distance(label, label), samples.valid[name][rows], *thresholds[name])
        yield rows, pairs


@torch.inference_mode()
def measure_features(
    variant: TrainedModel,
    features: Mapping[str, Tensor],
    samples: Samples,
    tasks: Mapping[str, Task],
    thresholds: Mapping[str, tuple[float, float]],
) -> dict[str, Tallies]:
    """Sum the pair statistics of raw features, of centred ones and of those from the trained projectors.

    Centred features are without their mean over all frames, which features after a ReLU have in common. With the labels
    of a source, a target's features go through the projector of that pair. Where that was never trained (mostly, where
    the source is the target), they go through each of the target's trained projectors in turn: do features projected
    for other tasks still separate the target's labels?
    """
    statistics: dict[str, Tallies] = {"raw": {}, "centred": {}, "projected": {}}
    names = list(tasks)

    def add(kind: str, target: str, source: str, z: Tensor, pairs: Pairs) -> None:
        sums = compute_pair_statistics(squared_distances(z), *pairs[source])
        totals = statistics[kind].setdefault(target, {})
        totals[source] = totals[source] + sums if source in totals else sums

    for rows, pairs in iterate_chunks(samples, tasks, thresholds):
        for target in names:
            feature = features[target][rows]
            centred = feature - features[target].mean(dim=(0, 1))
            z = {}
            if variant.regularizer is not None:
                z = {p: project(variant.regularizer, target, feature, names.index(p)) for p in variant.trained[target]}
            for source in names:
                add("raw", target, source, feature, pairs)
                add("centred", target, source, centred, pairs)
                for projector in projectors_for(variant, target, source):
                    add("projected", target, source, z[projector], pairs)
    return statistics


def projectors_for(variant: TrainedModel, target: str, source: str) -> list[str]:
    """Return the sources whose projectors a target's features go through if the labels are those of ``source``."""
    return [source] if source in variant.trained[target] else variant.trained[target]


def measure_nearness(
    samples: Samples, tasks: Mapping[str, Task], thresholds: Mapping[str, tuple[float, float]]
) -> dict[str, PairStatistics]:
    """Sum the pair statistics of the squared distance in the image, as a fraction of its diagonal.

    This is the reference for features: the separation that any smooth map would show.
    """
    statistics: dict[str, PairStatistics] = {}
    for rows, pairs in iterate_chunks(samples, tasks, thresholds):
        distance = torch.cdist(samples.positions[rows], samples.positions[rows]).square()
        for name in tasks:
            sums = compute_pair_statistics(distance, *pairs[name])
            statistics[name] = statistics[name] + sums if name in statistics else sums
    return statistics


def to_plain(variant: TrainedModel, kinds: Mapping[str, Tallies]) -> dict[str, Any]:
    """Convert the statistics of a variant to plain numbers for consistency.json.

    Returns:
        kind -> target -> source -> means and histograms, whose bins the sources of a target share; and the checkpoint.
    """
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
                    cell["projectors"] = projectors_for(variant, target, source)
    return {"checkpoint": str(variant.path), "step": variant.step, "name": variant.name, **features}
