"""Config -> objects. Every function takes the composed config, or one group of it, and calls plain constructors."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from mtcl import ranks
from mtcl.contrastive import Contrastive, GradientShare, Regularizer
from mtcl.data import Augment, Reader, eval_loader, partly_labelled, train_loader
from mtcl.errors import UserError
from mtcl.models import DenseModel, EncoderDecoder, build_backbone
from mtcl.models.decoders import Decoder
from mtcl.models.decoders.atrc import is_named_genotype, read_genotype_file
from mtcl.tasks import TASK_NAMES, build_task
from mtcl.tasks.base import Task
from mtcl.training.aggregator import Aggregated
from mtcl.training.balancer import Balancer, DynamicAverage, FixedWeights, Uncertainty
from mtcl.training.ema import RunningMean
from mtcl.training.evaluator import Evaluator
from mtcl.training.optim import ScheduledOptimizer, build_optimizer, build_schedule, regularizer_weight
from mtcl.training.recorder import Recorder
from mtcl.training.runtime import autocast
from mtcl.training.sharding import Sharded
from mtcl.training.trainer import Trainer

T = TypeVar("T")


def plain(config: Any) -> Any:
    """A config node as plain Python containers."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


PACKAGES = {  # group -> what its classes are, and the package they come from
    "data": ("dataset", "mtcl.data"),
    "decoder": ("Decoder", "mtcl.models"),
    "regularizer": ("Regularizer", "mtcl.contrastive"),
}


def locate(target: str, what: str, kind: type | None = None, needs: str | None = None) -> Any:
    """Return the class that a config's ``_target_`` names, a ``kind`` or with the method ``needs``. A config may come
    out of a checkpoint: only the package of the group ``what`` is imported from.
    """
    module, _, name = str(target).rpartition(".")
    if not module.startswith("mtcl."):
        raise UserError(f"{what}._target_={target} is not part of mtcl, so it is not imported")
    expected, package = PACKAGES[what]
    if not f"{module}.".startswith(f"{package}."):
        raise UserError(f"{what}._target_={target} is not a {expected} of {package}")
    try:
        located = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{what}._target_={target} does not exist") from error
    if not isinstance(located, type) or (kind is not None and not issubclass(located, kind)):
        raise UserError(f"{what}._target_={target} is not a {expected}")
    if needs is not None and not hasattr(located, needs):
        raise UserError(f"{what}._target_={target} is not a dataset")
    return located


def construct(maker: Callable[..., T], what: str, *given: Any, **options: Any) -> T:
    """``maker(*given, **options)``, where a config key that it does not know is the user's mistake."""
    known = [name for name, p in inspect.signature(maker).parameters.items() if p.kind != p.VAR_KEYWORD]
    for name in options:
        if name not in known:
            raise UserError(
                f"{what}.{name} is not an option of {maker.__name__}; it has {', '.join(known[len(given) :])}"
            )
    return maker(*given, **options)


def build_tasks(config: DictConfig) -> dict[str, Task]:
    """The tasks in use, in canonical order: the config's names among those the dataset offers."""
    dataset = locate(config.data._target_, "data", needs="offered")
    try:
        offered = dict(dataset.offered(**plain(config.data.options)))
    except (TypeError, AttributeError) as error:  # a class that only describes datasets
        raise UserError(f"data._target_={config.data._target_} is not a dataset") from error
    names = plain(config.tasks.names)
    if names == "auto":
        names = list(offered)
    if not names:
        raise UserError("tasks.names is empty; name at least one task, or auto")
    for name in names:
        if name not in TASK_NAMES:
            build_task(name)  # says which names there are
        if name not in offered:
            raise UserError(
                f"tasks.names asks for {name}, but data={config.data.name} has labels for {', '.join(offered)} only"
            )
    weights, extra = plain(config.loss.weights), plain(config.loss.options)
    tasks = {}
    for name in (n for n in TASK_NAMES if n in names):
        weight = weights.get(name)
        options = {**offered[name], **extra.get(name, {})}
        if name == "normals" and "normals_valid" in config.data:
            options["validity"] = config.data.normals_valid
        tasks[name] = build_task(name, weight=None if weight is None else float(weight), **options)
    return tasks


def build_reader(config: DictConfig, part: str, tasks: Mapping[str, Task], limit: int | None = None) -> Reader:
    """The list ``part`` ("train" or "val") of the config's dataset and split; to train on, with ``data.labels``."""
    data = config.data
    reader = locate(data._target_, "data")
    limits = [n for n in (limit, data.limit) if n is not None]
    options = {"part": part, "tasks": list(tasks), "split": data.split, "limit": min(limits, default=None)}
    accepted = inspect.signature(reader).parameters
    if "root" in accepted:
        if data.root is None:
            raise UserError(f"data={data.name} needs data.root=FOLDER, where its files are")
        options["root"] = data.root
    elif data.root is not None:
        raise UserError(f"data.root={data.root} makes no sense with data={data.name}, which needs no files")
    if "size" in accepted:  # rendered at the size asked for
        options["size"] = data_size(config)
    options |= {key: data[key] for key in ("cache", "memory_map") if key in data}
    built = construct(reader, "data.options", **options, **plain(data.options))
    return partly_labelled(built, tasks, str(data.labels), data.labels_seed) if part == "train" else built


def data_size(config: DictConfig) -> tuple[int, int]:
    height, width = config.data.size
    return height, width


def build_train_loader(
    config: DictConfig, reader: Reader, tasks: Mapping[str, Task], start_step: int, device: torch.device
) -> DataLoader:
    augment = plain(config.data.augment)
    augment["scale"] = tuple(augment["scale"])
    return train_loader(
        reader,
        tasks,
        Augment(size=data_size(config), **augment),
        batch_size=config.data.batch_size,
        seed=config.seed,
        workers=config.data.workers,
        start_step=start_step,
        pin_memory=device.type == "cuda",
        part=(ranks.rank(), ranks.world()),
        skip_unreadable=config.trainer.unreadable == "skip",
    )


def build_eval_loader(
    config: DictConfig, reader: Reader, tasks: Mapping[str, Task], device: torch.device
) -> DataLoader:
    return eval_loader(
        reader,
        tasks,
        data_size(config),
        batch_size=config.data.eval_batch_size,
        workers=config.data.workers,
        pin_memory=device.type == "cuda",
        part=(ranks.rank(), ranks.world()),
    )


def build_model(config: DictConfig, tasks: Mapping[str, Task], pretrained: bool) -> DenseModel:
    """``pretrained`` is true only for a fresh run: else neither a hub nor a weight file is asked for."""
    source = config.backbone.weights
    source = None if source in (None, "none") else str(source)
    backbone = build_backbone(
        config.backbone.name,
        weights=source if pretrained else None,
        mean=plain(config.backbone.mean),
        std=plain(config.backbone.std),
        out_indices=plain(config.backbone.out_indices),
        kwargs=plain(config.backbone.kwargs),
    )
    options = plain(config.decoder)
    target = options.pop("_target_")
    kind = locate(target, "decoder")
    channels = {name: task.channels for name, task in tasks.items()}
    model: DenseModel
    if isinstance(kind, type) and issubclass(kind, DenseModel):  # a model of its own, woven into the backbone
        model = construct(kind, "decoder", backbone, channels, **options)
    else:
        kind = locate(target, "decoder", Decoder)
        decoder = construct(kind, "decoder", backbone.channels, backbone.strides, channels, **options)
        model = EncoderDecoder(backbone, decoder)
    # Layouts round differently: evaluate.py must build what was trained. Checkpoints from before the key had none.
    channels_last = OmegaConf.select(config, "trainer.channels_last", default=False)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(memory_format=layout)


def inline_files(config: DictConfig) -> None:
    """Replace the path of a genotype's file in ``config`` by what the file says: what is saved stands on its own."""
    genotype = config.decoder.get("genotype")
    if isinstance(genotype, str) and not is_named_genotype(genotype):
        OmegaConf.update(config, "decoder.genotype", read_genotype_file(genotype), force_add=True)


def build_regularizer(config: DictConfig, tasks: Mapping[str, Task], model: DenseModel) -> Regularizer | None:
    settings = config.regularizer
    if settings._target_ is None or len(tasks) < 2:  # one task has no other to contrast with
        return None
    options = plain(settings.options)
    options.setdefault("tap", "final")
    if options["tap"] not in model.tap_channels:
        raise UserError(
            f"regularizer.options.tap={options['tap']} is not a tap of this decoder; "
            f"choose one of {', '.join(model.tap_channels)}"
        )
    if "thresholds" in options:
        options["thresholds"] = {name: tuple(pair) for name, pair in (options["thresholds"] or {}).items() if pair}
    if options.get("shuffle") and config.data.batch_size < 2:
        raise UserError(
            "regularizer.options.shuffle=true takes labels of another image; give data.batch_size of 2 or more"
        )
    kind = locate(settings._target_, "regularizer", Regularizer)
    channels = model.tap_channels[options["tap"]]
    return construct(kind, "regularizer.options", tasks, channels, seed=config.seed, **options)


def build_share(config: DictConfig, regularizer: Regularizer | None, device: torch.device) -> GradientShare | None:
    balance = config.regularizer.balance
    if balance not in ("fixed", "gradient"):
        raise UserError(f"regularizer.balance={balance} is not known; choose fixed or gradient")
    if regularizer is None or balance == "fixed":
        return None
    if not isinstance(regularizer, Contrastive):
        raise UserError("regularizer.balance=gradient is for regularizer=contrastive; use fixed")
    return GradientShare(regularizer.names).to(device)


def build_optimizers(
    config: DictConfig, model: DenseModel, regularizer: Regularizer | None
) -> tuple[ScheduledOptimizer, ScheduledOptimizer | None]:
    """The model's optimiser and the projectors', both on the config's schedule."""
    schedule = build_schedule(max_steps=config.trainer.max_steps, **plain(config.schedule))
    optimizer = ScheduledOptimizer(construct(build_optimizer, "optimizer", model, **plain(config.optimizer)), schedule)
    if regularizer is None:
        return optimizer, None
    own = regularizer.build_optimizer(config.regularizer.lr, config.regularizer.weight_decay)
    return optimizer, ScheduledOptimizer(own, schedule)


def build_balancer(
    config: DictConfig, tasks: Mapping[str, Task], regularizer: Regularizer | None, reader: Reader, device: torch.device
) -> Balancer:
    """How losses become gradients. UserError for what a method can't be combined with."""
    settings, trainer = config.balancing, config.trainer
    method, weights = settings.method, {name: task.weight for name, task in tasks.items()}
    if settings.contrast not in ("objective", "outside"):
        raise UserError(f"balancing.contrast={settings.contrast} is not known; choose objective or outside")
    if regularizer is not None and settings.contrast == "objective":
        weights["contrast"] = 1.0  # the trainer has multiplied it by lambda
        if method in ("uncertainty", "dwa") and config.regularizer.balance == "gradient":
            raise UserError(
                f"balancing.method={method} judges objectives by their losses, which regularizer.balance=gradient "
                "rescales; use balancing.contrast=outside or regularizer.balance=fixed"
            )
    if method == "fixed":
        return FixedWeights(weights)
    if len(weights) < 2:
        raise UserError(f"balancing.method={method} has one objective only, {next(iter(weights))}; use balancing=fixed")
    if method == "uncertainty":
        for name, weight in weights.items():
            if weight == 0:
                raise UserError(
                    f"loss.weights.{name}=0 leaves balancing=uncertainty nothing to learn from; leave it out"
                )
        schedule = build_schedule(max_steps=trainer.max_steps, **plain(config.schedule))
        return Uncertainty(weights, device, settings.lr, schedule)
    if method == "dwa":
        epoch = -(-(len(reader.ids) // config.data.batch_size) // trainer.accumulate)
        return DynamicAverage(weights, device, settings.every or max(epoch, 1), settings.temperature)
    if method == "torchjd":
        if ranks.world() > 1:
            raise UserError(
                "balancing.method=torchjd trains in one process; start without torchrun or use another method"
            )
        if trainer.compile:
            raise UserError("balancing.method=torchjd needs a backward pass per objective; set trainer.compile=false")
        return Aggregated(weights, device, settings.aggregator, plain(settings.options), config.seed)
    raise UserError(f"balancing.method={method} is not known; choose fixed, uncertainty, dwa or torchjd")


class Run(NamedTuple):
    trainer: Trainer
    train_reader: Reader
    val_reader: Reader


def build_trainer(
    config: DictConfig,
    tasks: Mapping[str, Task],
    folder: Path,
    device: torch.device,
    pretrained: bool = False,
    start_step: int = 0,
) -> Run:
    """Everything of a training run, on ``device``. Writes nothing before all of it has been checked."""
    settings, dry = config.trainer, config.trainer.dry_run
    if settings.unreadable not in ("stop", "skip"):
        raise UserError(f"trainer.unreadable={settings.unreadable} is not known; choose stop or skip")
    autocast(device, settings.precision)  # says so now if it is not known
    quick = config.evaluation.quick if config.evaluation.boundaries else None
    monitor, higher_is_better = choose_monitor(settings.monitor, tasks, quick)
    train_reader = build_reader(config, "train", tasks)
    val_reader = build_reader(config, "val", tasks, limit=config.data.eval_batch_size if dry else None)
    model = build_model(config, tasks, pretrained).to(device)
    regularizer = build_regularizer(config, tasks, model)
    if settings.grad_checkpointing and not model.backbone.set_grad_checkpointing():
        raise UserError(
            f"backbone {config.backbone.name} knows no gradient checkpointing; set trainer.grad_checkpointing=false"
        )
    if regularizer is not None:
        regularizer.to(device)
    ema = None if settings.ema is None else RunningMean(model, settings.ema)
    weights = None
    if settings.parallel == "fsdp" and ranks.world() > 1:
        weights = Sharded(model, device, *(() if ema is None else (ema.model,)))
    optimizer, regularizer_optimizer = build_optimizers(config, model, regularizer)
    val_loader = build_eval_loader(config, val_reader, tasks, device)
    batches = build_train_loader(config, train_reader, tasks, start_step * settings.accumulate, device)
    trainer = Trainer(
        model=model,
        tasks=tasks,
        regularizer=regularizer,
        balancer=build_balancer(config, tasks, regularizer, train_reader, device),
        optimizer=optimizer,
        regularizer_optimizer=regularizer_optimizer,
        batches=batches,
        evaluator=build_evaluator(config, tasks, val_loader, device),
        recorder=Recorder(folder, start_step),
        folder=folder,
        device=device,
        max_steps=start_step + 1 if dry else settings.max_steps,
        monitor=monitor,
        higher_is_better=higher_is_better,
        config=saved_config(config, model),
        meta={"tasks": described(tasks)},
        weight=regularizer_weight(
            config.regularizer.weight, settings.max_steps, config.regularizer.warmup_steps, config.regularizer.until
        ),
        share=build_share(config, regularizer, device),
        precision=settings.precision,
        recompute=settings.grad_checkpointing,
        compiled=settings.compile,
        accumulate=settings.accumulate,
        ema=ema,
        weights=weights,
        max_skipped=settings.max_skipped,
        asynchronous=settings.async_checkpoints,
        keep_interval=settings.keep_interval,
        clip_norm=settings.clip_norm,
        val_interval=settings.val_interval,
        checkpoint_interval=settings.checkpoint_interval,
        log_interval=settings.log_interval,
        start_step=start_step,
        validate_first=settings.val_first and not dry,
    )
    return Run(trainer, train_reader, val_reader)


def choose_monitor(name: str, tasks: Mapping[str, Task], quick: Sequence[int] | None) -> tuple[str, bool]:
    """(``task/metric``, higher is better) of ``trainer.monitor``; ``auto``: the headline of the first task.

    Of edges, validations between training steps have their loss only, unless ``evaluation.quick`` is given.
    """
    known = {}
    for task in tasks.values():
        metric, higher = task.headline(() if quick is None else (task.primary,))
        known[f"{task.name}/{metric}"] = higher
    name = next(iter(known)) if name == "auto" else name
    if name not in known:
        hint = "; edge/odsF needs evaluation.quick=[9,4]" if name == "edge/odsF" else ""
        raise UserError(f"trainer.monitor={name} is not known; choose auto or one of {', '.join(known)}{hint}")
    return name, known[name]


def build_evaluator(
    config: DictConfig, tasks: Mapping[str, Task], loader: DataLoader, device: torch.device
) -> Evaluator:
    """Scores as ``config.evaluation`` says."""
    settings = plain(config.evaluation)
    options = {name: dict(settings["options"].get(name) or {}) for name in tasks}
    quick: dict[str, dict[str, Any]] = {}
    if "edge" in tasks:
        options["edge"] |= {"boundaries": settings["boundaries"], "workers": settings["workers"]}
        if options["edge"].get("max_distance") is None:  # that of the data scored, not of the data trained on
            options["edge"]["max_distance"] = config.data.get("boundary_distance", 0.011)
        quick["edge"] = {"boundaries": False}
        if settings["quick"] is not None and settings["boundaries"]:
            thresholds, every = settings["quick"]
            quick["edge"] = {"thresholds": thresholds, "every": every}
    for name, task in tasks.items():  # says now what an option lacks
        construct_metric(task, options[name])
    precision, panels = config.trainer.precision, config.trainer.panels
    return Evaluator(tasks, loader, device, precision, num_shown=panels, options=options, quick=quick)


def construct_metric(task: Task, options: Mapping[str, Any]) -> None:
    """UserError for an option that a task's metric does not have."""
    try:
        task.metric(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"evaluation.options.{task.name} does not fit its metric: {error}") from error


def saved_config(config: DictConfig, model: DenseModel) -> dict[str, Any]:
    """The config a checkpoint carries: enough to rebuild the model even where timm's own defaults have changed."""
    saved = plain(config)
    saved["backbone"] |= {"mean": list(model.mean), "std": list(model.std)}
    return saved


def described(tasks: Mapping[str, Task]) -> dict[str, dict[str, Any]]:
    """Plain facts of the tasks, for a checkpoint: channels, and the classes' names where there are some."""
    return {n: {"channels": t.channels, "classes": list(getattr(t, "classes", ()))} for n, t in tasks.items()}


def check_tasks(saved: Mapping[str, dict[str, Any]], tasks: Mapping[str, Task], path: Path) -> None:
    """The tasks of a checkpoint must be those of the run, with the same classes."""

    def told(facts: Mapping[str, dict[str, Any]]) -> str:
        return ", ".join(f"{name} ({fact['channels']})" for name, fact in facts.items())

    own = described(tasks)
    if dict(saved) != own:
        same = told(saved) == told(own)
        raise UserError(
            f"checkpoint {path} was trained for the tasks (channels) {told(saved)}, this command is for "
            f"{'classes of other names' if same else told(own)}; give the same data and tasks"
        )
