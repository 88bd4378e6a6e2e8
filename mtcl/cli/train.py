"""Train: from a composed config to a run folder."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mtcl import distributed
from mtcl.atomic import remove_temporary_files, write_text
from mtcl.cli.resume import (
    check_backbone,
    check_regularizer,
    check_resume,
    find_checkpoint,
    list_run_files,
    log_resume,
    restore_frozen_backbone,
    restore_trainer,
)
from mtcl.cli.run_record import build_run_record, record_ending, record_labels
from mtcl.cli.write_metrics import write_metrics
from mtcl.config.build_data import build_dataset, build_tasks
from mtcl.config.build_model import build_model, inline_genotype
from mtcl.config.build_training import build_trainer
from mtcl.config.resolve import add_key_prefix
from mtcl.config.schema import RESULT, SEED, role_of, rule_of
from mtcl.data import MultiTaskDataset
from mtcl.data.loader import explain_worker_error
from mtcl.data.partial_labels import PRESENT, PartiallyLabeledDataset
from mtcl.errors import UserError, first_line
from mtcl.evaluation.format_metrics import format_metrics
from mtcl.evaluation.plausibility import check_labels, find_unlabeled_tasks, report_problems
from mtcl.launch.overrides import split_override
from mtcl.regularizers import CrossTaskConsistency, JointTaskRegularization, PseudoLabels, Regularizer
from mtcl.run_folder import RunFolder
from mtcl.run_lock import lock_run
from mtcl.runtime import choose_device, choose_precision, seed_everything
from mtcl.tasks.base import Task
from mtcl.training.trainer import Trainer

log = logging.getLogger(__name__)


@distributed.convert_lost_peers()
def train(
    config: DictConfig, folder: Path, siblings: Path | None = None, overrides: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Train, evaluate and write everything into a run folder.

    Args:
        config: the composed and checked config.
        folder: the run folder.
        siblings: a folder of earlier runs of the same name, where ``resume=auto`` may look.
        overrides: the command's overrides, for the record.

    Returns:
        Task -> metric -> value of the last state.
    """
    # Config
    inline_genotype(config)
    device = set_up_process(config)
    folder = distributed.broadcast_object(folder)
    files_at_start = list_run_files(folder)
    resumed = find_checkpoint(config, folder, siblings)
    # Data
    tasks = build_tasks(config)
    if resumed is not None:
        check_resume(resumed, config, tasks)
        check_regularizer(resumed, config, overrides)
    train_dataset = build_dataset(config, "train", tasks)
    val_limit = config.data.eval_batch_size if config.trainer.dry_run else None
    val_dataset = build_dataset(config, "val", tasks, limit=val_limit)
    # Model
    has_backbone = resumed is not None and "backbone" not in resumed.checkpoint.meta
    model = build_model(config, tasks, pretrained=not has_backbone).to(device)
    if resumed is not None:
        check_backbone(resumed, model, config)
        restore_frozen_backbone(resumed, model)
    # Trainer
    start_step = 0 if resumed is None else resumed.checkpoint.step
    trainer = build_trainer(config, tasks, model, train_dataset, val_dataset, folder, device, start_step)
    if distributed.rank() > 0:  # dropout differs between the processes; DDP copies process 0's initial weights
        torch.manual_seed(config.seed + 2**20 * distributed.rank())
    if resumed is not None:
        restore_trainer(trainer, resumed, config)
    # Fit
    if distributed.rank() > 0:  # process 0 alone writes
        with convert_torch_errors(device):
            return trainer.fit().metrics
    with lock_run(folder), trainer.checkpoint_writer:
        if list_run_files(folder) != files_at_start:
            raise UserError(f"another run has just written into {folder}; start again, with resume=auto to continue it")
        remove_temporary_files(folder)
        remove_temporary_files(RunFolder(folder).checkpoints)
        if resumed is not None:
            log_resume(resumed, config)
        log_setup(config, trainer, train_dataset, val_dataset, is_fresh=resumed is None)
        warnings = check_dataset_labels(config, tasks, train_dataset, val_dataset)
        write_text(RunFolder(folder).config, OmegaConf.to_yaml(config, resolve=True))
        return fit(config, trainer, val_dataset, folder, overrides, record_labels(train_dataset), warnings)


def set_up_process(config: DictConfig) -> torch.device:
    """Join the process group, seed all generators and return the device to train on."""
    device = choose_device(config.trainer.device, "trainer.device")
    distributed.init_process_group(device)
    if distributed.rank() > 0:
        logging.disable(logging.INFO)
    torch.set_float32_matmul_precision("high" if config.trainer.tf32 else "highest")
    seed_everything(config.seed, config.trainer.deterministic)
    return device


def fit(
    config: DictConfig,
    trainer: Trainer,
    val_dataset: MultiTaskDataset,
    folder: Path,
    overrides: Sequence[str],
    labels: Mapping[str, Any],
    warnings: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Train to the end, write record and metrics into ``folder`` and log the table; ``labels`` goes into the record.

    Returns:
        Task -> metric -> value of the last state.
    """
    start, was_finished = time.perf_counter(), trainer.is_finished
    try:
        with convert_torch_errors(trainer.device):
            evaluation = trainer.fit()
        trainer.run_logger.log_result(trainer.step, find_hparams(config, overrides), evaluation.metrics)
    finally:
        trainer.run_logger.close()
    seconds = time.perf_counter() - start
    record = build_run_record(config, val_dataset, evaluation.num_images, trainer.device, overrides)
    record |= labels
    record |= {"step": trainer.step, "seconds": round(seconds, 1), "skipped_steps": trainer.num_skipped_steps}
    record |= {"processes": distributed.world_size(), "unreadable": len(trainer.unreadable), "warnings": list(warnings)}
    record |= record_ending(trainer)
    write_metrics(folder, evaluation.metrics, record)
    columns = {"untrained": trainer.first_evaluation.metrics} if trainer.first_evaluation else {}
    table = format_metrics(trainer.tasks, {**columns, f"step {trainer.step}": evaluation.metrics})
    log.info("on %d validation images:\n\n%s\n", evaluation.num_images, table)
    if trainer.is_stopped_early:
        log_early_stop(trainer, was_finished)
    for warning in warnings:  # they were logged at the start, far up
        log.warning("%s", warning)
    if config.trainer.dry_run:
        has_regularizer = trainer.regularizer is not None and trainer.lambda_.weight > 0
        note = ", with the regularizer at its full weight," if has_regularizer else ""
        memory = trainer.peak_memory()
        log.info("dry run: the step%s took %.2f s, peak memory %.2f GiB", note, trainer.seconds_per_step, memory)
    log_folder(folder, seconds, trainer.run_logger.describe())
    return evaluation.metrics


def log_early_stop(trainer: Trainer, was_finished: bool) -> None:
    """Log why a run has ended before its last step, and how to continue it.

    Args:
        trainer: after the training.
        was_finished: the run had ended before it was started now.
    """
    log.info(
        "the run %s at step %d of %d: %s was best at step %s, and not in the %d validations since "
        "(trainer.patience=%d); resume=auto with a greater trainer.patience, or null, continues it",
        "had already ended" if was_finished else "ended",
        trainer.step,
        trainer.options.max_steps,
        trainer.validation.monitor,
        "(not recorded)" if trainer.best_step is None else trainer.best_step,
        trainer.early_stopping.wait_count,
        trainer.validation.patience,
    )


def log_folder(folder: Path, seconds: float, curves: Sequence[str]) -> None:
    """Log how long the run took and where its files and its curves (one line for each logger) are."""
    files = RunFolder(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
    lines = "\n              ".join(curves or [str(files.log)])
    log.info(
        "%.0f s\n  images:     %s\n  checkpoint: %s\n  curves:     %s",
        seconds,
        files.panels,
        files.last_checkpoint,
        lines,
    )


def find_hparams(config: DictConfig, overrides: Sequence[str]) -> dict[str, bool | int | float | str]:
    """Return what distinguishes a run from others: the seed, and the overrides that bear on the result.

    Overrides of a group are in it with the choice (``regularizer=none``), those of keys with the config's value.
    """
    hparams: dict[str, bool | int | float | str] = {"seed": config.seed}
    for override in overrides:
        key, value = split_override(override)
        if key.partition(".")[0] == "logger" or role_of(key) not in (RESULT, SEED):
            continue
        chosen = None if rule_of(key) is None else OmegaConf.select(config, key)
        hparams[key] = chosen if isinstance(chosen, bool | int | float | str) else value
    return hparams


def log_setup(
    config: DictConfig,
    trainer: Trainer,
    train_dataset: MultiTaskDataset,
    val_dataset: MultiTaskDataset,
    is_fresh: bool,
) -> None:
    """Log what is about to be trained, and warn of what the user may not expect."""
    if is_fresh and config.backbone.weights in (None, "none"):
        stays = " and stays so (backbone.trainable=frozen)" if trainer.model.backbone.is_frozen else ""
        log.warning(
            "the backbone starts from random weights (backbone.weights=none)%s; "
            "backbone.weights=hub fetches ImageNet's, a path loads a file",
            stays,
        )
    if trainer.regularizer is None and config.regularizer._target_ is not None:
        log.warning("one task has no other task to compare with: the regularizer is off")
    if isinstance(trainer.regularizer, PseudoLabels) and keeps_all_labels(train_dataset):
        log.warning(
            "the pseudo-labels of regularizer=%s are for images that lack the label of a task, and here every image "
            "keeps all labels; set data.label_fractions, or with several tasks data.label_assignment=one",
            trainer.regularizer.method_name(),
        )
    for problem in find_unused_settings(config, trainer.regularizer):
        log.warning("%s", problem)
    if config.trainer.precision == "auto" and choose_precision(trainer.device, "auto") == "fp16":
        log.info(
            "trainer.precision=auto: %s has no bf16, so the run is in fp16, with a gradient scaler", trainer.device
        )
    log.info("%s", train_dataset.summary())
    if config.trainer.dry_run and config.data.get("feature_cache") is not None:
        log.info("dry run: the feature cache is left alone, so this step is slower than one of the training")
    regularizer = "no regularizer"
    if trainer.regularizer is not None:
        regularizer = f"regularizer {trainer.regularizer.method_name()} with weight {config.regularizer.weight}"
    num_parameters = sum(p.numel() for p in trainer.model.parameters())
    num_trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    log.info(
        "%s: %d training and %d validation images, tasks %s, %s, %.2f M parameters%s, on %s",
        config.data.name,
        len(train_dataset.ids),
        len(val_dataset.ids),
        ", ".join(trainer.tasks) or "none",
        regularizer,
        num_parameters / 1e6,
        f" ({num_trained / 1e6:.2f} M of them trained)" if num_trained < num_parameters else "",
        trainer.device,
    )


def find_unused_settings(config: DictConfig, regularizer: Regularizer | None) -> list[str]:
    """Return a sentence on each setting of labels and views that changes little or nothing in this training."""
    data, problems = config.data, []
    if data.get("label_tasks") is not None and data.get("label_assignment", "full") in ("full", PRESENT):
        problems.append(
            f"data.label_tasks has no effect with data.label_assignment={data.label_assignment}, which distributes no "
            "labels"
        )
    if config.loss.get("views", "all") == "first":
        if regularizer is None:
            problems.append(
                "without a regularizer loss.views=first computes the second views of the images for nothing; set "
                "data.views_per_step=1 loss.views=all"
            )
        elif isinstance(regularizer, PseudoLabels):
            problems.append(
                f"with loss.views=first regularizer={regularizer.method_name()} learns from second views only where "
                "labels are missing; loss.views=all trains the tasks on both"
            )
    has_many_views = data.get("views") and data.get("views_per_step", 1) == 1 and not data.get("feature_cache")
    if has_many_views and isinstance(regularizer, CrossTaskConsistency | JointTaskRegularization):
        problems.append(
            f"data.views={data.views} is the number of different views of an image in the whole training; two views at "
            f"each step, as regularizer={regularizer.method_name()} was published, are data.views_per_step=2 "
            "loss.views=first"
        )
    return problems


def keeps_all_labels(dataset: MultiTaskDataset) -> bool:
    """Return whether each image keeps the labels of all tasks, by the record of the labels; files are not read."""
    counts = record_labels(dataset).get("labels", {}).get("images", {})
    return all(count == len(dataset.ids) for count in counts.values())


def check_dataset_labels(
    config: DictConfig, tasks: Mapping[str, Task], train_dataset: MultiTaskDataset, val_dataset: MultiTaskDataset
) -> list[str]:
    """Check the labels of both lists and return the problems, which are logged.

    Raises:
        UserError: there is a problem and ``data.strict`` is set.
    """
    problems = [*find_unlabeled_images(train_dataset), *find_unlabeled_tasks(train_dataset, tasks)]
    for dataset, name in ((train_dataset, "training"), (val_dataset, "validation")):
        problems += check_labels(dataset, tasks, name)
    with add_key_prefix("data."):
        return report_problems(problems, config.data.get("strict", False))


def find_unlabeled_images(dataset: MultiTaskDataset) -> list[str]:
    """Find images that have no label at all by a label file or by what files there are; return a sentence, or none."""
    if not isinstance(dataset, PartiallyLabeledDataset) or not dataset.num_unlabeled:
        return []
    if dataset.source.get("rule") == PRESENT:
        return [
            f"{dataset.num_unlabeled} of {len(dataset.ids)} training images have no file of a label of "
            f"{', '.join(dataset.label_tasks)}, so nothing is learnt from them; leave them out of the training list"
        ]
    if "file" not in dataset.source:
        return []
    return [
        f"{dataset.source['file']} gives {dataset.num_unlabeled} of {len(dataset.ids)} training images no label of "
        f"{', '.join(dataset.label_tasks)}, so nothing is learnt from them; write a file for these tasks alone "
        "(scripts/make_label_file.py with the overrides of this training), or name all tasks of the file in "
        "data.label_tasks if this is meant"
    ]


@contextmanager
def convert_torch_errors(device: torch.device) -> Iterator[None]:
    """Convert torch errors that the user can fix (out of memory, ...) to ``UserError``."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device} has too little memory ({first_line(error)}); lower data.batch_size (and raise "
            "trainer.accumulate_grad_batches as much) or data.size, or set trainer.grad_checkpointing=true or "
            "trainer.precision=bf16"
        ) from error
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel when training"):
            raise
        raise UserError(
            f"a batch norm gets a single value per channel ({str(error).rpartition('Size')[2].strip('()')}), which has "
            "no spread; raise data.batch_size to 2 per process or more (trainer.accumulate_grad_batches does not "
            "help), or data.size"
        ) from error
    except RuntimeError as error:
        if (
            sentence := explain_worker_error(error)
        ) is not None:  # torch raises it wherever the main thread happens to be
            raise UserError(sentence) from error
        operation, separator, _ = str(error).partition(" does not have a deterministic implementation")
        if not separator:
            raise
        raise UserError(
            f"trainer.deterministic=true, but {operation} of this model has no deterministic implementation on this "
            "device; use trainer.deterministic=false or another backbone"
        ) from error
