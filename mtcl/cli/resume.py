"""Find the checkpoint that a run continues from, and check that it fits the run."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

from mtcl import distributed
from mtcl.config.diff import describe_changes, find_changed_experiment_keys, find_changed_keys, format_changes
from mtcl.config.overrides import names_regularizer
from mtcl.config.resolve import plain
from mtcl.config.schema import affects_sample_order
from mtcl.config.stored_config import (
    check_stored_backbone,
    check_stored_tasks,
    check_tasks,
    describe_backbone_source,
)
from mtcl.errors import UserError
from mtcl.models import DenseModel
from mtcl.models.weights import check_tensor_values
from mtcl.run_folder import CHECKPOINTS, LAST_CHECKPOINT, RunFolder
from mtcl.run_lock import lock_run
from mtcl.tasks.base import Task
from mtcl.training.checkpoint import (
    Checkpoint,
    LoadedCheckpoint,
    hash_backbone,
    latest_valid_checkpoint,
    load_checkpoint,
)
from mtcl.training.trainer import Trainer

log = logging.getLogger(__name__)


def list_run_files(folder: Path) -> list[tuple[str, int]]:
    """Return names and modification times of what a run has written into ``folder``.

    Until this run has locked the folder, another one may write there.
    """
    files = [*RunFolder(folder).checkpoints.glob("*.pt"), *folder.glob(RunFolder(folder).metrics.name)]
    return sorted((path.name, path.stat().st_mtime_ns) for path in files)


def find_checkpoint(config: DictConfig, folder: Path, siblings: Path | None) -> LoadedCheckpoint | None:
    """Find what to continue from; every process gets it.

    Args:
        config: with ``resume``: null, ``auto`` or the path of a checkpoint.
        folder: the run folder.
        siblings: a folder of earlier runs, where ``resume=auto`` may look.

    Returns:
        The checkpoint; None for a fresh run.

    Raises:
        UserError: a fresh run would write over another, or the checkpoint cannot be read.
    """
    loaded = _find_checkpoint(config, folder, siblings) if distributed.rank() == 0 else None
    path = distributed.broadcast_object(None if loaded is None else loaded.path)
    if loaded is None and path is not None:
        loaded = LoadedCheckpoint(path, load_checkpoint(path), [])
    return loaded


def _find_checkpoint(config: DictConfig, folder: Path, siblings: Path | None) -> LoadedCheckpoint | None:
    resume, checkpoints = config.resume, RunFolder(folder).checkpoints
    is_elsewhere = resume not in (None, "auto") and Path(str(resume)).resolve().parent != checkpoints.resolve()
    if list_run_files(folder) and (resume is None or is_elsewhere):
        raise UserError(f"{folder} already holds a run; continue it with resume=auto or choose another hydra.run.dir")
    if resume is None:
        return None
    if resume != "auto" and Path(str(resume)).is_dir():
        raise UserError(
            f"resume={resume} is a folder; give its {CHECKPOINTS}/{LAST_CHECKPOINT}, or hydra.run.dir={resume} "
            "resume=auto"
        )
    if resume != "auto":
        return LoadedCheckpoint(Path(resume), load_checkpoint(resume), [])
    loaded = latest_valid_checkpoint(checkpoints) or find_resumable_run(config, siblings)
    if loaded is None:
        log.info("resume=auto: no interrupted run like this one beside %s, starting afresh", folder)
    return loaded


def find_resumable_run(config: DictConfig, siblings: Path | None) -> LoadedCheckpoint | None:
    """Find the newest run in ``siblings`` with this config that has steps left and that no process is writing."""
    modified: dict[Path, float] = {}
    for path in siblings.glob(f"*/{CHECKPOINTS}/*.pt") if siblings else ():
        modified[path.parent] = max(path.stat().st_mtime, modified.get(path.parent, 0.0))
    for folder in sorted(modified, key=modified.__getitem__, reverse=True):
        try:
            lock_run(folder.parent).close()
            loaded = latest_valid_checkpoint(folder)
        except UserError as error:
            log.warning("%s is passed over: %s", folder.parent, error)
            continue
        if loaded is None or not has_steps_left(loaded.checkpoint, config):
            continue
        if not find_changed_keys(loaded.checkpoint.config, plain(config)):
            return loaded
    return None


def has_steps_left(checkpoint: Checkpoint, config: DictConfig) -> bool:
    """Return whether a run that continues from a checkpoint trains: neither its last step nor early stopping ended it.

    A checkpoint whose count of validations is not as mtcl writes it counts as one without.
    """
    state, patience = checkpoint.meta.get("early_stopping"), config.trainer.patience
    wait_count = state.get("wait_count") if isinstance(state, Mapping) else None
    is_stopped = patience is not None and isinstance(wait_count, int) and wait_count >= patience
    return checkpoint.step < config.trainer.max_steps and not is_stopped


def check_resume(resumed: LoadedCheckpoint, config: DictConfig, tasks: Mapping[str, Task]) -> None:
    """Raise ``UserError`` unless a checkpoint is of the run's tasks and optimizer and not behind its last step."""
    checkpoint, path = resumed.checkpoint, resumed.path
    stored = checkpoint.meta.get("tasks")
    check_tasks({} if stored == {} and not tasks else check_stored_tasks(stored, path), tasks, path)
    if not checkpoint.optimizer:
        raise UserError(
            f"checkpoint {path} was imported: it has weights only, which evaluate.py scores; nothing to resume"
        )
    group, current = checkpoint.config.get("optimizer"), config.optimizer.name
    saved = group.get("name") if isinstance(group, Mapping) else None
    if saved != current:
        raise UserError(f"checkpoint {path} was trained with optimizer={saved}, not {current}; its moments do not fit")
    step, max_steps = checkpoint.step, config.trainer.max_steps
    if step > max_steps and not config.trainer.dry_run:
        raise UserError(
            f"checkpoint {path} is at step {step}, behind trainer.max_steps={max_steps}; give trainer.max_steps of "
            f"{step} or more, or resume an earlier one"
        )


def check_backbone(resumed: LoadedCheckpoint, model: DenseModel, config: DictConfig) -> None:
    """Raise ``UserError`` unless a backbone that the checkpoint leaves out is that of ``model``."""
    if "backbone" not in resumed.checkpoint.meta:
        return
    facts = check_stored_backbone(resumed.checkpoint.meta["backbone"], resumed.path)
    digest = hash_backbone(model.state_dict())
    if digest != facts["sha256"]:
        raise UserError(
            f"backbone.weights={config.backbone.weights} gives another backbone (SHA-256 {digest[:12]}...) than "
            f"checkpoint {resumed.path} was trained on and leaves out: {describe_backbone_source(facts)}; give its "
            "weights"
        )


def restore_frozen_backbone(resumed: LoadedCheckpoint, model: DenseModel) -> None:
    """Give a frozen backbone its weights before the trainer is built: they say which feature cache is its own.

    What does not fit is left alone; :func:`restore_trainer` says what that is.
    """
    if not model.backbone.is_frozen:
        return
    prefix, current = "backbone.", model.backbone.state_dict()
    saved = {name.removeprefix(prefix): x for name, x in resumed.checkpoint.model.items() if name.startswith(prefix)}
    if all(isinstance(saved.get(name), torch.Tensor) and saved[name].shape == x.shape for name, x in current.items()):
        model.backbone.load_state_dict({name: saved[name] for name in current})


def restore_trainer(trainer: Trainer, resumed: LoadedCheckpoint, config: DictConfig) -> None:
    """Restore a trainer from a checkpoint.

    Raises:
        UserError: weights are not finite, or parts of the checkpoint have other names, shapes or kinds.
    """
    checkpoint = resumed.checkpoint
    for name, tensor in trainer.model.state_dict().items():
        saved = checkpoint.model.get(name)
        if isinstance(saved, torch.Tensor) and saved.shape == tensor.shape:  # else restoring says what does not fit
            check_tensor_values(name, saved, tensor, resumed.path)
    try:
        trainer.restore(checkpoint)
    except UserError:
        raise
    except Exception as error:  # of torch and of ours, for parts of other names, shapes or kinds
        changes = describe_changes(checkpoint.config, plain(config), ("backbone.", "decoder.", "regularizer."))
        raise UserError(f"checkpoint {resumed.path} does not fit this run: {changes or error}") from error


def check_regularizer(resumed: LoadedCheckpoint, config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse to go on without the regulariser of a checkpoint unless the command says so.

    Before version 0.3 the contrast was on by default, so that the command of such a run does not name it.

    Args:
        resumed: what is continued.
        config: of the command.
        overrides: of the command.

    Raises:
        UserError: the checkpoint has a regulariser, and the command neither has nor names one.
    """
    if resumed.checkpoint.regularizer is None or config.regularizer._target_ is not None:
        return
    if not names_regularizer(overrides):
        raise UserError(
            f"checkpoint {resumed.path} was trained with a regularizer, which is off by default since version 0.3; add "
            "the regularizer=NAME that it had (contrastive, if its command had none) to go on with it, or "
            "regularizer=none to go on without"
        )


def log_resume(resumed: LoadedCheckpoint, config: DictConfig) -> None:
    """Log what the run continues from, which checkpoints are damaged and what has changed since."""
    for error in resumed.rejected:
        log.warning("checkpoint %s is damaged (%s): it is passed over", error.path, error.why)
    log.info("resumed at step %d from %s", resumed.checkpoint.step, resumed.path)
    saved, current = resumed.checkpoint.config, plain(config)
    if config.data.get("shards") is not None and (streams := _describe_other_streams(resumed, config)):
        log.warning("%s, each reading other shards than the rest: images come in another order from here on", streams)
    if keys := find_changed_experiment_keys(saved, current):
        order = "; images come in another order from here on" if any(map(affects_sample_order, keys)) else ""
        log.warning("this run is not the one of its checkpoint: %s%s", format_changes(saved, current, keys), order)


def _describe_other_streams(resumed: LoadedCheckpoint, config: DictConfig) -> str | None:
    """Say how many processes and workers read the data of a checkpoint, and do now; None if the numbers are equal."""
    states, data = resumed.checkpoint.rng, resumed.checkpoint.config.get("data")
    num_processes = len(states) if isinstance(states, list) else 1
    workers = data.get("workers") if isinstance(data, Mapping) else None
    if (num_processes, workers or 1) == (distributed.world_size(), config.data.workers or 1):
        return None
    return (
        f"{num_processes} processes with data.workers={workers} are now {distributed.world_size()} with "
        f"data.workers={config.data.workers}"
    )
