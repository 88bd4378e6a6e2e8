"""One training run, from a composed config to a folder of results."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from mtcl import distributed
from mtcl.atomic import remove_temporary_files, write_json, write_text
from mtcl.cli.run_record import build_run_record
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import inline_genotype
from mtcl.config.build_training import TrainingRun, build_training_run
from mtcl.config.diff import describe_changes, find_changed_experiment_keys, find_changed_keys, format_changes
from mtcl.config.resolve import plain
from mtcl.config.schema import affects_sample_order
from mtcl.config.stored_config import check_stored_tasks, check_tasks
from mtcl.data.loader import explain_worker_error
from mtcl.errors import UserError
from mtcl.evaluation.format_metrics import format_metrics
from mtcl.evaluation.plausibility import check_labels, find_unlabeled_tasks, report_problems
from mtcl.models.weights import check_tensor_values
from mtcl.run_lock import lock_run
from mtcl.runtime import choose_device, seed_everything
from mtcl.training.checkpoint import Checkpoint, LoadedCheckpoint, latest_valid_checkpoint, load_checkpoint
from mtcl.training.trainer import Trainer

log = logging.getLogger(__name__)


def train(
    config: DictConfig, folder: Path, siblings: Path | None = None, overrides: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Train, evaluate, write everything into ``folder``; the metrics of the last state.

    ``siblings``: a folder of earlier runs of the same name, where ``resume=auto`` may look. ``overrides``: the words of
    the command, for the record.
    """
    inline_genotype(config)
    device = choose_device(config.trainer.device, "trainer.device")
    distributed.init_process_group(device)
    if distributed.rank() > 0:
        logging.disable(logging.INFO)
    torch.set_float32_matmul_precision("high" if config.trainer.tf32 else "highest")
    seed_everything(config.seed, config.trainer.deterministic)
    folder = distributed.broadcast_object(folder)
    before = list_run_files(folder)
    found = find_checkpoint(config, folder, siblings) if distributed.rank() == 0 else None
    path = distributed.broadcast_object(None if found is None else found.path)
    checkpoint = found.checkpoint if found is not None else None if path is None else load_checkpoint(path)
    tasks = build_tasks(config)
    if checkpoint is not None and path is not None:
        check_tasks(check_stored_tasks(checkpoint.meta.get("tasks"), path), tasks, path)
        check_optimizer(checkpoint, config, path)
        check_steps(checkpoint, config, path)
    start = 0 if checkpoint is None else checkpoint.step
    run = build_training_run(config, tasks, folder, device, pretrained=checkpoint is None, start_step=start)
    if distributed.rank() > 0:
        torch.manual_seed(
            config.seed + 2**20 * distributed.rank()
        )  # dropout of its own; the model's start is process 0's
    if checkpoint is not None:
        restore(run.trainer, checkpoint, path, config)
    if distributed.rank() > 0:
        with convert_torch_errors(device):
            return run.trainer.fit().metrics
    with lock_run(folder), run.trainer.checkpoint_writer:
        if list_run_files(folder) != before:
            raise UserError(f"another run has just written into {folder}; start again, with resume=auto to continue it")
        for part in (folder, folder / "checkpoints"):
            remove_temporary_files(part)
        if found is not None:
            log_resume(found, config)
        log_setup(config, run, fresh=checkpoint is None)
        warnings = check_dataset_labels(config, run)
        write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
        return finish(config, run, folder, overrides, warnings)


def log_setup(config: DictConfig, run: TrainingRun, fresh: bool) -> None:
    """What is about to be trained, and what the user may not expect of it."""
    if fresh and config.backbone.weights in (None, "none"):
        log.warning(
            "the backbone starts from random weights (backbone.weights=none); "
            "backbone.weights=hub fetches ImageNet's, a path loads a file"
        )
    regularizer = run.trainer.regularizer
    if regularizer is None and config.regularizer._target_ is not None:
        log.warning("one task has no other task to contrast with: the regulariser is off")
    log.info("%s", run.train_dataset.summary())
    log.info(
        "%s: %d training and %d validation pictures, tasks %s, %s, %.2f M parameters, on %s",
        config.data.name,
        len(run.train_dataset.ids),
        len(run.val_dataset.ids),
        ", ".join(run.trainer.tasks),
        "no regulariser" if regularizer is None else f"contrast with weight {config.regularizer.weight}",
        sum(p.numel() for p in run.trainer.model.parameters()) / 1e6,
        run.trainer.device,
    )


@contextmanager
def convert_torch_errors(device: torch.device) -> Iterator[None]:
    """What torch raises for what a user can mend, in one sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device} has too little memory ({str(error).splitlines()[0]}); lower data.batch_size (and raise "
            "trainer.accumulate_grad_batches as much) or data.size, or set trainer.grad_checkpointing=true or trainer.precision=bf16"
        ) from error
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel when training"):
            raise
        raise UserError(
            f"a batch norm gets a single value per channel ({str(error).rpartition('Size')[2].strip('()')}), which has "
            "no spread; raise data.batch_size to 2 per process or more (trainer.accumulate_grad_batches does not help), or data.size"
        ) from error
    except RuntimeError as error:
        if (
            sentence := explain_worker_error(error)
        ) is not None:  # torch raises that wherever the main thread happens to be
            raise UserError(sentence) from error
        operation, known, _ = str(error).partition(" does not have a deterministic implementation")
        if not known:
            raise
        raise UserError(
            f"trainer.deterministic=true, but {operation} of this model has no deterministic implementation on this "
            "device; use trainer.deterministic=false or another backbone"
        ) from error


def check_dataset_labels(config: DictConfig, run: TrainingRun) -> list[str]:
    """Look at the labels of both lists; the sentences, which are logged, or an error with ``data.strict``."""
    problems = find_unlabeled_tasks(run.train_dataset, run.trainer.tasks)
    for reader, part in ((run.train_dataset, "training"), (run.val_dataset, "validation")):
        problems += check_labels(reader, run.trainer.tasks, part)
    return report_problems(problems, config.data.get("strict", False))


def finish(
    config: DictConfig, run: TrainingRun, folder: Path, overrides: Sequence[str], warnings: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Train to the end, write metrics.json and run.json, tell the table; the metrics."""
    trainer = run.trainer
    began = time.perf_counter()
    try:
        with convert_torch_errors(trainer.device):
            evaluation = trainer.fit()
    finally:
        trainer.run_logger.close()
    seconds = time.perf_counter() - began
    facts = build_run_record(config, run.val_dataset, evaluation.num_images, trainer.device, overrides)
    facts |= {"step": trainer.step, "seconds": round(seconds, 1), "skipped_steps": trainer.num_skipped_steps}
    facts |= {"processes": distributed.world_size(), "unreadable": len(trainer.unreadable), "warnings": list(warnings)}
    write_json(folder / "run.json", facts)
    write_json(folder / "metrics.json", evaluation.metrics)
    columns = {"untrained": trainer.first_evaluation.metrics} if trainer.first_evaluation else {}
    table = format_metrics(trainer.tasks, {**columns, f"step {trainer.step}": evaluation.metrics})
    log.info("on %d validation pictures:\n\n%s\n", evaluation.num_images, table)
    for text in warnings:  # they were logged at the start, far up
        log.warning("%s", text)
    if config.trainer.dry_run:
        log.info("dry run: the step took %.2f s, peak memory %.2f GiB", trainer.seconds_per_step, trainer.peak_memory())
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    log.info(
        "%.0f s\n  pictures:   %s\n  checkpoint: %s\n  curves:     tensorboard --logdir %s",
        seconds,
        shown / "panels",
        shown / "checkpoints" / "last.pt",
        shown,
    )
    return evaluation.metrics


def restore(trainer: Trainer, checkpoint: Checkpoint, path: Path | None, config: DictConfig) -> None:
    for name, tensor in trainer.model.state_dict().items():
        saved = checkpoint.model.get(name)
        if isinstance(saved, torch.Tensor) and saved.shape == tensor.shape:  # else it does not fit, as said below
            check_tensor_values(name, saved, tensor, path or "the checkpoint")
    try:
        trainer.restore(checkpoint)
    except UserError:
        raise
    except Exception as error:  # of torch and of ours, for parts of other names, shapes or kinds
        changed = describe_changes(checkpoint.config, plain(config), ("backbone.", "decoder.", "regularizer."))
        raise UserError(f"checkpoint {path} does not fit this run: {changed or error}") from error


def check_optimizer(checkpoint: Checkpoint, config: DictConfig, path: Path) -> None:
    if not checkpoint.optimizer:
        raise UserError(
            f"checkpoint {path} was imported: it has weights only, which evaluate.py scores; nothing to resume"
        )
    group, now = checkpoint.config.get("optimizer"), config.optimizer.name
    before = group.get("name") if isinstance(group, Mapping) else None
    if before != now:
        raise UserError(f"checkpoint {path} was trained with optimizer={before}, not {now}; its moments do not fit")


def check_steps(checkpoint: Checkpoint, config: DictConfig, path: Path) -> None:
    """``UserError`` where the run has taken more steps than it is to take in all."""
    done, wanted = checkpoint.step, config.trainer.max_steps
    if done > wanted and not config.trainer.dry_run:
        raise UserError(
            f"checkpoint {path} is at step {done}, behind trainer.max_steps={wanted}; give trainer.max_steps of {done} "
            "or more, or resume an earlier one"
        )


def log_resume(found: LoadedCheckpoint, config: DictConfig) -> None:
    """From where, what is damaged, and what is not as it was."""
    for error in found.rejected:
        log.warning("checkpoint %s is damaged (%s): it is passed over", error.path, error.why)
    log.info("resumed at step %d from %s", found.checkpoint.step, found.path)
    saved, now = found.checkpoint.config, plain(config)
    if keys := find_changed_experiment_keys(saved, now):
        shuffled = any(map(affects_sample_order, keys))
        order = "; pictures come in another order from here on" if shuffled else ""
        log.warning("this run is not the one of its checkpoint: %s%s", format_changes(saved, now, keys), order)


def list_run_files(folder: Path) -> list[tuple[str, int]]:
    """What a run has written into ``folder`` and when: another one may do so until the folder is ours."""
    files = [*folder.glob("checkpoints/*.pt"), *folder.glob("metrics.json")]
    return sorted((path.name, path.stat().st_mtime_ns) for path in files)


def find_checkpoint(config: DictConfig, folder: Path, siblings: Path | None) -> LoadedCheckpoint | None:
    """What to continue from; None: a fresh run. A fresh run never writes over another."""
    resume = config.resume
    own = folder / "checkpoints"
    other = resume not in (None, "auto") and Path(str(resume)).resolve().parent != own.resolve()
    if list_run_files(folder) and (resume is None or other):
        raise UserError(f"{folder} already holds a run; continue it with resume=auto or choose another hydra.run.dir")
    if resume is None:
        return None
    if resume != "auto" and Path(str(resume)).is_dir():
        raise UserError(
            f"resume={resume} is a folder; give its checkpoints/last.pt, or hydra.run.dir={resume} resume=auto"
        )
    if resume != "auto":
        return LoadedCheckpoint(Path(resume), load_checkpoint(resume), [])
    found = latest_valid_checkpoint(own) or find_resumable_run(config, siblings)
    if found is None:
        log.info("resume=auto: no interrupted run like this one beside %s, starting afresh", folder)
    return found


def find_resumable_run(config: DictConfig, siblings: Path | None) -> LoadedCheckpoint | None:
    """The checkpoint of the newest run in ``siblings`` with our config that has steps left, and that nobody is still
    writing."""
    written: dict[Path, float] = {}
    for path in siblings.glob("*/checkpoints/*.pt") if siblings else ():
        written[path.parent] = max(path.stat().st_mtime, written.get(path.parent, 0.0))
    for folder in sorted(written, key=written.__getitem__, reverse=True):
        try:
            lock_run(folder.parent).close()
            found = latest_valid_checkpoint(folder)
        except UserError as error:
            log.warning("%s is passed over: %s", folder.parent, error)
            continue
        if found is None or found.checkpoint.step >= config.trainer.max_steps:
            continue
        if not find_changed_keys(found.checkpoint.config, plain(config)):
            return found
    return None
