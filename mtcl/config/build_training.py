"""Build a trainer and its parts from a config."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import nn

from mtcl import distributed
from mtcl.config.build_balancer import build_balancer
from mtcl.config.build_data import build_dataset, build_eval_loader, build_train_loader
from mtcl.config.build_evaluator import build_evaluator, choose_monitor
from mtcl.config.build_features import build_feature_caches
from mtcl.config.build_loggers import build_loggers
from mtcl.config.build_lr_schedule import build_lr_schedule
from mtcl.config.build_model import build_model, read_student, saved_config
from mtcl.config.resolve import add_key_prefix, construct, locate, plain
from mtcl.config.stored_config import describe_tasks
from mtcl.data import MultiTaskDataset
from mtcl.errors import UserError
from mtcl.models import DenseModel, EncoderDecoder
from mtcl.regularizers import Distillation, GradientNormWeight, Regularizer, TaskSaliency
from mtcl.regularizers.cross_task import CrossTaskRegularizer
from mtcl.regularizers.pairs import choose_thresholds
from mtcl.regularizers.task_loss import TaskLossOptions
from mtcl.regularizers.weighting import Lambda
from mtcl.runtime import choose_precision
from mtcl.tasks.base import Task
from mtcl.training.ema import ModelEma
from mtcl.training.optimizers import ScheduledOptimizer, build_optimizer
from mtcl.training.options import CheckpointPolicy, Regularization, TrainerOptions, ValidationPolicy
from mtcl.training.run_logger import RunLogger
from mtcl.training.sharding import ShardedWeights
from mtcl.training.step_profiler import WAIT, WARMUP
from mtcl.training.trainer import Trainer

SHARED_FEATURE = "trunk"  # the name that decoders give a map that all tasks share


class TrainingRun(NamedTuple):
    """A trainer and the datasets that it trains and validates on."""

    trainer: Trainer
    train_dataset: MultiTaskDataset
    val_dataset: MultiTaskDataset


def build_training_run(
    config: DictConfig,
    tasks: Mapping[str, Task],
    folder: Path,
    device: torch.device,
    pretrained: bool = False,
    start_step: int = 0,
) -> TrainingRun:
    """Build the datasets, the model and the trainer of a config. Nothing is written.

    Args:
        config: as ``train.py`` composes it.
        tasks: of :func:`mtcl.config.build_data.build_tasks`.
        folder: the run folder, where the trainer will write.
        device: to train on.
        pretrained: whether the backbone takes its pretrained weights, as a fresh run does.
        start_step: the step to continue from.
    """
    _find_regularizer_class(config, tasks)  # refuses too few tasks before their labels are looked for
    limit = config.data.eval_batch_size if config.trainer.dry_run else None
    train_dataset = build_dataset(config, "train", tasks)
    val_dataset = build_dataset(config, "val", tasks, limit=limit)
    model = build_model(config, tasks, pretrained).to(device)
    trainer = build_trainer(config, tasks, model, train_dataset, val_dataset, folder, device, start_step)
    return TrainingRun(trainer, train_dataset, val_dataset)


def build_trainer(
    config: DictConfig,
    tasks: Mapping[str, Task],
    model: DenseModel,
    train_dataset: MultiTaskDataset,
    val_dataset: MultiTaskDataset,
    folder: Path,
    device: torch.device,
    start_step: int = 0,
) -> Trainer:
    """Build what trains ``model``, which is on ``device``. Nothing is written before all of it is checked.

    Raises:
        UserError: a value is refused, or values do not go together; it names the keys.
    """
    settings = config.trainer
    if settings.on_unreadable not in ("stop", "skip"):
        raise UserError(f"trainer.on_unreadable={settings.on_unreadable} is not known; choose stop or skip")
    with add_key_prefix("trainer."):
        precision = choose_precision(device, settings.precision)
    validation = build_validation_policy(config, tasks)
    if settings.grad_checkpointing and not model.backbone.set_grad_checkpointing():
        raise UserError(
            f"backbone {config.backbone.name} knows no gradient checkpointing; set trainer.grad_checkpointing=false"
        )
    if settings.ema is None and settings.ema_warmup:
        raise UserError("trainer.ema_warmup=true needs a running mean of the weights; set trainer.ema, e.g. to 0.9999")
    ema = None if settings.ema is None else ModelEma(model, settings.ema, settings.ema_warmup)
    regularizer = build_regularizer(config, tasks, model)
    if isinstance(regularizer, TaskSaliency) and precision == "fp16":
        raise UserError(
            "regularizer=rep_mtl takes gradients within the forward pass, where fp16 would round them to 0; "
            "set trainer.precision=fp32 or bf16"
        )
    if device.type == "mps" and config.regularizer.get("options", {}).get("source_weights") == "auto":
        raise UserError(
            "regularizer.options.source_weights=auto sums in float64, which trainer.device=mps lacks; give a mapping "
            "or use trainer.device=cpu"
        )
    if regularizer is not None:
        regularizer.to(device)
    if isinstance(regularizer, Distillation):
        prepare_distillation(config, regularizer, device, is_fresh=start_step == 0)
    if not tasks:
        _check_distillation_alone(config, regularizer)
    weights = None
    if settings.parallel == "fsdp" and distributed.world_size() > 1:
        weights = ShardedWeights(model, device, *(() if ema is None else (ema.model,)))
    optimizer = construct(
        build_optimizer, "optimizer", model, is_sharded=weights is not None, **plain(config.optimizer)
    )
    features = None
    if not settings.dry_run:  # its one step would wait for the features of all images
        features = build_feature_caches(config, tasks, model, train_dataset, val_dataset, device)
    batches = build_train_loader(
        config,
        train_dataset,
        tasks,
        start_step * settings.accumulate_grad_batches,
        device,
        features.train if features else None,
    )
    val_batches = build_eval_loader(config, val_dataset, tasks, device, features.val if features else None)
    return Trainer(
        model=model,
        tasks=tasks,
        balancer=build_balancer(config, tasks, regularizer, train_dataset, device, model.shared_parameters()),
        optimizer=ScheduledOptimizer(optimizer, build_lr_schedule(config)),
        batches=batches,
        evaluator=build_evaluator(config, tasks, val_batches, device, regularizer),
        run_logger=RunLogger(folder, start_step, build_loggers(config, folder, start_step)),
        folder=folder,
        device=device,
        options=build_trainer_options(config, start_step),
        validation=validation,
        checkpointing=CheckpointPolicy(
            config=saved_config(config, model),
            meta={"tasks": describe_tasks(tasks)},
            backbone=choose_backbone_source(config),
            interval=settings.checkpoint_interval,
            keep_interval=settings.keep_checkpoint_interval,
            asynchronous=settings.async_checkpoints,
        ),
        regularization=build_regularization(config, regularizer, model, device),
        ema=ema,
        weights=weights,
        feature_fillers=features.fillers if features else (),
        start_step=start_step,
    )


def choose_backbone_source(config: DictConfig) -> dict[str, str] | None:
    """Return what the weights of a backbone are called that checkpoints leave out; None where they hold it.

    Raises:
        UserError: the backbone can't be left out, because it is trained or its weights come from nowhere else.
    """
    choice, trainable = config.trainer.get("save_backbone", "auto"), config.backbone.get("trainable", "full")
    is_kept, weights = trainable in ("frozen", "lora"), config.backbone.weights
    has_source = weights not in (None, "none")
    if config.decoder.get("weights") is not None:  # the backbone began as a student's, which no other weights restore
        if choice is False:
            raise UserError("trainer.save_backbone=false would lose the backbone that decoder.weights gave; use auto")
        return None
    if choice is False and not is_kept:
        raise UserError(
            f"trainer.save_backbone=false would lose what is trained of the backbone (backbone.trainable={trainable}); "
            "use auto"
        )
    if choice is False and not has_source:
        raise UserError(
            "trainer.save_backbone=false would lose the backbone's random weights (backbone.weights=none); use auto"
        )
    if choice is True or not (is_kept and has_source):
        return None
    return {"name": str(config.backbone.name), "weights": Path(str(weights)).name}


def build_trainer_options(config: DictConfig, start_step: int) -> TrainerOptions:
    """Return the options of the training loop; a dry run takes a single step."""
    settings = config.trainer
    task_loss = TaskLossOptions(
        intermediate_weight=config.loss.intermediate_weight,
        image_weighting=config.loss.get("image_weighting", "pixels"),
        views_per_step=config.data.get("views_per_step", 1),
        views=config.loss.get("views", "all"),
    )
    if task_loss.views == "first" and task_loss.views_per_step < 2:
        raise UserError(
            "loss.views=first leaves the second views of the images to the regulariser, but data.views_per_step=1 has "
            "none; set data.views_per_step=2 or loss.views=all"
        )
    max_steps, profile = start_step + 1 if settings.dry_run else settings.max_steps, settings.get("profile")
    # A run that is resumed shortly before its end goes on without a trace.
    if profile is not None and start_step == 0 and max_steps < WAIT + WARMUP + profile:
        raise UserError(
            f"trainer.profile={profile} needs {WAIT + WARMUP + profile} steps ({WAIT + WARMUP} before the trace), but "
            f"this run takes {max_steps}; raise trainer.max_steps or lower trainer.profile"
        )
    return TrainerOptions(
        max_steps=max_steps,
        precision=settings.precision,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        task_loss=task_loss,
        clip_norm=settings.clip_norm,
        grad_checkpointing=settings.grad_checkpointing,
        compile=settings.compile,
        max_nonfinite_steps=settings.max_nonfinite_steps,
        log_interval=settings.log_interval,
        profile=profile,
    )


def build_validation_policy(config: DictConfig, tasks: Mapping[str, Task]) -> ValidationPolicy:
    """Return when to validate, which metric decides ``best.pt``, and when it ends the training early.

    Raises:
        UserError: there is a patience without validations on the way, or the metric is not known.
    """
    settings, evaluation = config.trainer, config.evaluation
    quick = evaluation.fast_boundaries if evaluation.score_boundaries else None
    monitor, higher_is_better = choose_monitor(settings.monitor, tasks, quick, plain(evaluation.options))
    if settings.patience is not None and settings.val_interval is None:
        raise UserError(
            f"trainer.patience={settings.patience} counts validations between training steps, and with "
            "trainer.val_interval=null there are none; set trainer.val_interval, or trainer.patience=null"
        )
    validate_first = settings.validate_first and not settings.dry_run
    patience = None if settings.dry_run else settings.patience
    return ValidationPolicy(monitor, higher_is_better, settings.val_interval, validate_first, patience)


def build_regularizer(config: DictConfig, tasks: Mapping[str, Task], model: DenseModel) -> Regularizer | None:
    """Return the regulariser, on the CPU; None where the config has none.

    A single task trains without a contrast, too, so that it can be a baseline with the overrides of the other runs: a
    sweep over tasks, the single-task runs of a study. ``train.py`` warns of it.

    Raises:
        UserError: another regulariser needs more tasks, or a value is refused; it names the keys.
    """
    if (regularizer_class := _find_regularizer_class(config, tasks)) is None:
        return None
    options = plain(config.regularizer.options)
    options.setdefault("feature", "final")
    if issubclass(regularizer_class, TaskSaliency):
        _check_saliency(config, model)
    if options["feature"] not in model.feature_channels:
        raise UserError(
            f"regularizer={regularizer_class.method_name()} reads the feature {options['feature']} of a decoder, which "
            f"this one lacks; set regularizer.options.feature to one of {', '.join(model.feature_channels)}"
        )
    if "thresholds" in options:
        options["thresholds"] = {name: tuple(pair) for name, pair in (options["thresholds"] or {}).items() if pair}
    _check_images(config, options)
    channels = model.feature_channels[options["feature"]]
    if regularizer_class.min_tasks and options["feature"] == "adapted":
        raise UserError(
            "regularizer.options.feature=adapted has maps for teachers, not for tasks; use final, or "
            "regularizer=distillation"
        )
    regularizer = construct(regularizer_class, "regularizer.options", tasks, channels, seed=config.seed, **options)
    if regularizer.uses_teacher:
        method = f"regularizer={regularizer_class.method_name()}"  # that always has a teacher
        _check_teacher(config, "regularizer.options.teacher=true" if options.get("teacher") else method)
    return regularizer


def _find_regularizer_class(config: DictConfig, tasks: Collection[str]) -> type[Regularizer] | None:
    """Return the class of the regulariser; None where the config has none, or a contrast has a single task.

    Raises:
        UserError: another regulariser needs more tasks.
    """
    if config.regularizer._target_ is None:
        return None
    regularizer_class = locate(config.regularizer._target_, "regularizer", Regularizer)
    if len(tasks) >= regularizer_class.min_tasks:
        return regularizer_class
    if tasks and not issubclass(regularizer_class, CrossTaskRegularizer):
        raise UserError(
            f"regularizer={regularizer_class.method_name()} needs {regularizer_class.min_tasks} tasks or more, but "
            f"tasks.names=[{','.join(tasks)}] has {len(tasks)}; set regularizer=none or name more tasks"
        )
    return None


def prepare_distillation(config: DictConfig, regularizer: Distillation, device: torch.device, is_fresh: bool) -> None:
    """Load the teachers, and for a fresh run the aligners of the student that it starts from.

    Args:
        config: the composed config.
        regularizer: on ``device``.
        device: to train on.
        is_fresh: False: the run's own checkpoint has the aligners.

    Raises:
        UserError: weights can't be had, or do not fit.
    """
    with add_key_prefix("regularizer.options."):
        regularizer.load_teachers(device)
    path = config.decoder.get("weights")
    if not is_fresh or path is None or not len(regularizer.aligners):
        return
    state = read_student(path).regularizer
    if state is None:
        raise UserError(f"decoder.weights={path} has no aligners; give the checkpoint of scripts/distill.py itself")
    regularizer.load_aligners(state, path)


def _check_distillation_alone(config: DictConfig, regularizer: Regularizer | None) -> None:
    """Refuse a training without tasks whose loss would be nothing."""
    if not isinstance(regularizer, Distillation):
        raise UserError(
            f"data={config.data.name} has no labels: only regularizer=distillation trains on it (scripts/distill.py)"
        )
    settings = config.regularizer
    if settings.weight == 0 or settings.start_fraction > 0 or settings.stop_fraction < 1:
        raise UserError(
            "without tasks the distillation is the whole loss; give regularizer.weight above 0, start_fraction=0 and "
            "stop_fraction=1"
        )
    if settings.detach_trunk:
        raise UserError("regularizer.detach_trunk=true would train the tasks' own layers alone, and there are no tasks")


def _check_images(config: DictConfig, options: Mapping[str, Any]) -> None:
    """Refuse options of a regulariser that the number, the views or the size of a batch's images do not allow."""
    labels_of = options.get("source_labels")
    two_images = 2 * distributed.world_size()  # data.batch_size is that of all processes
    if labels_of in ("other_image", "random") and config.data.batch_size < two_images:
        raise UserError(
            f"regularizer.options.source_labels={labels_of} takes labels of another image of the process; "
            f"give data.batch_size of {two_images} or more"
        )
    if options.get("source_weights") == "auto" and config.data.batch_size < two_images:
        raise UserError(
            "regularizer.options.source_weights=auto compares the labels of two images of a process; "
            f"give data.batch_size of {two_images} or more"
        )
    views_per_step = config.data.get("views_per_step", 1)
    if labels_of == "other_image" and views_per_step > 1:
        raise UserError(
            f"regularizer.options.source_labels=other_image could take another view's labels for another image's with "
            f"data.views_per_step={views_per_step}; set data.views_per_step=1"
        )
    if options.get("stride", 1) > min(config.data.size):
        raise UserError(
            f"regularizer.options.stride={options['stride']} is more than the {min(config.data.size)} pixels of the "
            f"shorter side of data.size=[{','.join(map(str, config.data.size))}]; give at most so many"
        )


def _check_teacher(config: DictConfig, key: str) -> None:
    """Refuse ``key``, which asks for a teacher's predictions, where there is no teacher."""
    if config.trainer.ema is None:
        raise UserError(
            f"{key} has the running mean of the weights as its teacher; set trainer.ema=0.999 trainer.ema_warmup=true"
        )
    if config.trainer.parallel == "fsdp" and distributed.world_size() > 1:
        raise UserError(f"{key} needs whole weights in a process; set trainer.parallel=ddp")


def _check_saliency(config: DictConfig, model: DenseModel) -> None:
    """Refuse what second derivatives through a part of the model, or a contrast of images, can't be combined with."""
    if SHARED_FEATURE not in model.feature_channels:
        raise UserError(
            "regularizer=rep_mtl compares the tasks at a map that all share, which this decoder lacks; choose "
            f"decoder=multi_head or another that has the feature {SHARED_FEATURE}"
        )
    feature = config.regularizer.options.feature
    if feature in model.feature_channels and feature != SHARED_FEATURE:
        raise UserError(
            f"regularizer.options.feature={feature} has a map for each task, and regularizer=rep_mtl compares them at "
            f"one that all share; set regularizer.options.feature={SHARED_FEATURE}"
        )
    if config.trainer.compile:
        raise UserError(
            "regularizer=rep_mtl takes second derivatives, which torch can't compile; set trainer.compile=false"
        )
    if config.trainer.parallel == "fsdp":
        raise UserError("regularizer=rep_mtl takes gradients within the forward pass; set trainer.parallel=ddp")
    if config.data.batch_size < 2:
        raise UserError("regularizer=rep_mtl contrasts the images of a batch; give data.batch_size of 2 or more")


def choose_label_thresholds(config: DictConfig, tasks: Mapping[str, Task]) -> dict[str, tuple[float, float]]:
    """Return task -> (positive, negative) threshold of label distances, those of the regulariser's options if any."""
    overrides = plain(config.regularizer).get("options", {}).get("thresholds") or {}
    with add_key_prefix("regularizer.options."):
        return choose_thresholds(tasks, {name: tuple(pair) for name, pair in overrides.items() if pair})


def build_regularization(
    config: DictConfig, regularizer: Regularizer | None, model: DenseModel, device: torch.device
) -> Regularization | None:
    """Return the regulariser with its optimiser and lambda; None without one."""
    lambda_ = build_lambda(config, regularizer, model, device)
    if regularizer is None:
        return None
    optimizer = regularizer.build_optimizer(config.regularizer.lr, config.regularizer.weight_decay)
    scheduled = ScheduledOptimizer(optimizer, build_lr_schedule(config))
    return Regularization(regularizer, scheduled, lambda_, find_head_parameters(config, model))


def find_head_parameters(config: DictConfig, model: DenseModel) -> list[nn.Parameter] | None:
    """Return the parameters of single tasks where the regulariser trains them alone; None where it trains the model."""
    if not config.regularizer.detach_trunk:
        return None
    if distributed.world_size() > 1 or config.balancing.regularizer_as_objective:
        raise UserError(
            "regularizer.detach_trunk=true trains in one process, without balancing.regularizer_as_objective; "
            "leave one of them out"
        )
    shared = {id(parameter) for parameter in model.shared_parameters()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in shared]


def build_lambda(
    config: DictConfig, regularizer: Regularizer | None, model: DenseModel, device: torch.device
) -> Lambda:
    """Return the weight of the regulariser's loss over the training; a dry run's step has it in full, early or late."""
    settings = config.regularizer
    if settings.weighting not in ("fixed", "gradient_norm", "head_gradient_norm"):
        raise UserError(
            f"regularizer.weighting={settings.weighting} is not known; "
            "choose fixed, gradient_norm or head_gradient_norm"
        )
    if settings.weighting == "fixed" and settings.weighting_cap is not None:
        raise UserError(
            f"regularizer.weighting_cap={settings.weighting_cap} limits the weights of regularizer.weighting="
            "gradient_norm and head_gradient_norm, and fixed has none; set weighting_cap=null or one of these"
        )
    gradient_norm_weight = None
    if regularizer is not None and settings.weighting != "fixed":
        if not isinstance(regularizer, CrossTaskRegularizer):
            raise UserError(
                f"regularizer.weighting={settings.weighting} is for regularizer=contrastive or auxiliary; use fixed"
            )
        targets = [comparison.target for comparison in regularizer.comparisons]
        gradient_norm_weight = GradientNormWeight(
            [comparison.name for comparison in regularizer.comparisons],
            cap=settings.weighting_cap,
            targets=targets,
            head_weights=find_head_weights(config, model, targets),
            read_share=regularizer.read_share if regularizer.source_weights is not None else None,
        ).to(device)
    with add_key_prefix("regularizer."):
        lambda_ = Lambda(
            settings.weight,
            config.trainer.max_steps,
            settings.warmup_steps,
            settings.stop_fraction,
            settings.start_fraction,
            gradient_norm_weight,
        )
    if config.trainer.dry_run:
        lambda_.hold_weight()
    return lambda_


def find_head_weights(
    config: DictConfig, model: DenseModel, targets: Collection[str]
) -> dict[str, nn.Parameter] | None:
    """Return target -> first weight of its head for regularizer.weighting=head_gradient_norm; None for others."""
    if config.regularizer.weighting != "head_gradient_norm":
        return None
    advice = "use regularizer.weighting=gradient_norm"
    if config.trainer.parallel == "fsdp":
        raise UserError(f"regularizer.weighting=head_gradient_norm needs trainer.parallel=ddp, else {advice}")
    if not isinstance(model, EncoderDecoder):
        raise UserError(f"regularizer.weighting=head_gradient_norm needs a backbone with a decoder, else {advice}")
    if config.regularizer.options.feature != "final":
        raise UserError(
            f"regularizer.weighting=head_gradient_norm needs regularizer.options.feature=final; or {advice}"
        )
    try:
        return {target: model.decoder.head_weight(target) for target in targets}
    except UserError as error:
        raise UserError(f"regularizer.weighting=head_gradient_norm: {error}; or {advice}") from error
