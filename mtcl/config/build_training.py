"""Build a trainer and its parts from a config."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from mtcl import distributed
from mtcl.config.build_data import build_dataset, build_eval_loader, build_train_loader
from mtcl.config.build_evaluator import build_evaluator, choose_monitor
from mtcl.config.build_model import build_model, saved_config
from mtcl.config.resolve import construct, locate, plain
from mtcl.config.stored_config import describe_tasks
from mtcl.data import MultiTaskDataset
from mtcl.errors import UserError
from mtcl.models import DenseModel
from mtcl.regularizers import Contrastive, GradientNormWeight, Regularizer
from mtcl.runtime import autocast
from mtcl.tasks.base import Task
from mtcl.training.balancing import Balancer, DynamicWeightAveraging, FixedWeights, UncertaintyWeighting
from mtcl.training.balancing_torchjd import GradientAggregation
from mtcl.training.ema import ModelEma
from mtcl.training.optimizers import ScheduledOptimizer, build_optimizer, build_schedule, lambda_schedule
from mtcl.training.run_logger import RunLogger
from mtcl.training.sharding import ShardedWeights
from mtcl.training.trainer import Trainer


def build_regularizer(config: DictConfig, tasks: Mapping[str, Task], model: DenseModel) -> Regularizer | None:
    settings = config.regularizer
    if settings._target_ is None or len(tasks) < 2:  # one task has no other to contrast with
        return None
    options = plain(settings.options)
    options.setdefault("feature", "final")
    if options["feature"] not in model.feature_channels:
        raise UserError(
            f"regularizer.options.feature={options['feature']} is not a tap of this decoder; "
            f"choose one of {', '.join(model.feature_channels)}"
        )
    if "thresholds" in options:
        options["thresholds"] = {name: tuple(pair) for name, pair in (options["thresholds"] or {}).items() if pair}
    if options.get("shuffle") and config.data.batch_size < 2:
        raise UserError(
            "regularizer.options.shuffle=true takes labels of another image; give data.batch_size of 2 or more"
        )
    kind = locate(settings._target_, "regularizer", Regularizer)
    channels = model.feature_channels[options["feature"]]
    return construct(kind, "regularizer.options", tasks, channels, seed=config.seed, **options)


def build_gradient_norm_weight(
    config: DictConfig, regularizer: Regularizer | None, device: torch.device
) -> GradientNormWeight | None:
    balance = config.regularizer.weighting
    if balance not in ("fixed", "gradient_norm"):
        raise UserError(f"regularizer.weighting={balance} is not known; choose fixed or gradient_norm")
    if regularizer is None or balance == "fixed":
        return None
    if not isinstance(regularizer, Contrastive):
        raise UserError("regularizer.weighting=gradient_norm is for regularizer=contrastive; use fixed")
    return GradientNormWeight(regularizer.task_names).to(device)


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
    config: DictConfig,
    tasks: Mapping[str, Task],
    regularizer: Regularizer | None,
    reader: MultiTaskDataset,
    device: torch.device,
) -> Balancer:
    """How losses become gradients. UserError for what a method can't be combined with."""
    settings, trainer = config.balancing, config.trainer
    method, weights = settings.method, {name: task.weight for name, task in tasks.items()}
    if regularizer is not None and settings.contrast_as_objective:
        weights["contrast"] = 1.0  # the trainer has multiplied it by lambda
        if method in ("uncertainty", "dwa") and config.regularizer.weighting == "gradient_norm":
            raise UserError(
                f"balancing.method={method} judges objectives by their losses, which regularizer.weighting=gradient_norm "
                "rescales; use balancing.contrast_as_objective=false or regularizer.weighting=fixed"
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
        return UncertaintyWeighting(weights, device, settings.lr, schedule)
    if method == "dwa":
        epoch = -(-(len(reader.ids) // config.data.batch_size) // trainer.accumulate_grad_batches)
        return DynamicWeightAveraging(weights, device, settings.every or max(epoch, 1), settings.temperature)
    if method == "torchjd":
        if distributed.world_size() > 1:
            raise UserError(
                "balancing.method=torchjd trains in one process; start without torchrun or use another method"
            )
        if trainer.compile:
            raise UserError("balancing.method=torchjd needs a backward pass per objective; set trainer.compile=false")
        return GradientAggregation(weights, device, settings.aggregator, plain(settings.options), config.seed)
    raise UserError(f"balancing.method={method} is not known; choose fixed, uncertainty, dwa or torchjd")


class TrainingRun(NamedTuple):
    trainer: Trainer
    train_reader: MultiTaskDataset
    val_reader: MultiTaskDataset


def build_trainer(
    config: DictConfig,
    tasks: Mapping[str, Task],
    folder: Path,
    device: torch.device,
    pretrained: bool = False,
    start_step: int = 0,
) -> TrainingRun:
    """Everything of a training run, on ``device``. Writes nothing before all of it has been checked."""
    settings, dry = config.trainer, config.trainer.dry_run
    if settings.on_unreadable not in ("stop", "skip"):
        raise UserError(f"trainer.on_unreadable={settings.on_unreadable} is not known; choose stop or skip")
    autocast(device, settings.precision, "trainer.precision")  # refuses an unknown one now
    quick = config.evaluation.fast_boundaries if config.evaluation.score_boundaries else None
    monitor, higher_is_better = choose_monitor(settings.monitor, tasks, quick)
    train_reader = build_dataset(config, "train", tasks)
    val_reader = build_dataset(config, "val", tasks, limit=config.data.eval_batch_size if dry else None)
    model = build_model(config, tasks, pretrained).to(device)
    regularizer = build_regularizer(config, tasks, model)
    if settings.grad_checkpointing and not model.backbone.set_grad_checkpointing():
        raise UserError(
            f"backbone {config.backbone.name} knows no gradient checkpointing; set trainer.grad_checkpointing=false"
        )
    if regularizer is not None:
        regularizer.to(device)
    ema = None if settings.ema is None else ModelEma(model, settings.ema)
    weights = None
    if settings.parallel == "fsdp" and distributed.world_size() > 1:
        weights = ShardedWeights(model, device, *(() if ema is None else (ema.model,)))
    optimizer, regularizer_optimizer = build_optimizers(config, model, regularizer)
    val_loader = build_eval_loader(config, val_reader, tasks, device)
    batches = build_train_loader(config, train_reader, tasks, start_step * settings.accumulate_grad_batches, device)
    trainer = Trainer(
        model=model,
        tasks=tasks,
        regularizer=regularizer,
        balancer=build_balancer(config, tasks, regularizer, train_reader, device),
        optimizer=optimizer,
        regularizer_optimizer=regularizer_optimizer,
        batches=batches,
        evaluator=build_evaluator(config, tasks, val_loader, device),
        run_logger=RunLogger(folder, start_step),
        folder=folder,
        device=device,
        max_steps=start_step + 1 if dry else settings.max_steps,
        monitor=monitor,
        higher_is_better=higher_is_better,
        config=saved_config(config, model),
        meta={"tasks": describe_tasks(tasks)},
        weight=lambda_schedule(
            config.regularizer.weight,
            settings.max_steps,
            config.regularizer.warmup_steps,
            config.regularizer.stop_fraction,
        ),
        share=build_gradient_norm_weight(config, regularizer, device),
        precision=settings.precision,
        grad_checkpointing=settings.grad_checkpointing,
        compile=settings.compile,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        ema=ema,
        weights=weights,
        max_nonfinite_steps=settings.max_nonfinite_steps,
        async_checkpoints=settings.async_checkpoints,
        keep_checkpoint_interval=settings.keep_checkpoint_interval,
        clip_norm=settings.clip_norm,
        val_interval=settings.val_interval,
        checkpoint_interval=settings.checkpoint_interval,
        log_interval=settings.log_interval,
        start_step=start_step,
        validate_first=settings.validate_first and not dry,
    )
    return TrainingRun(trainer, train_reader, val_reader)
