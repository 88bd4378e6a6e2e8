"""One training run, from a composed config to a folder of results."""

import logging
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mtcl.entry import build
from mtcl.entry.report import format_table, run_facts
from mtcl.errors import UserError
from mtcl.training.checkpoint import load_checkpoint
from mtcl.training.recorder import write_json, write_text
from mtcl.training.runtime import choose_device, seed_everything
from mtcl.training.trainer import Trainer

log = logging.getLogger(__name__)


def train(config: DictConfig, folder: Path, siblings: Path | None = None) -> dict[str, dict[str, float]]:
    """Train, evaluate, write everything into ``folder``; the metrics of the last state.

    ``siblings``: a folder of earlier runs of the same name, where ``resume=auto`` may look.
    """
    device = choose_device(config.trainer.device)
    seed_everything(config.seed, config.trainer.deterministic)
    path = find_checkpoint(config.resume, folder, siblings)
    state = None if path is None else load_checkpoint(path)
    tasks = build.build_tasks(config)
    if state is not None and path is not None:
        build.check_tasks(state["meta"]["tasks"], tasks, path)
    dry = config.trainer.dry_run
    start = 0 if state is None else state["step"]
    run = build.build_trainer(config, tasks, folder, device, pretrained=state is None, start_step=start)
    trainer = run.trainer
    if state is None and config.backbone.weights in (None, "none"):
        log.warning(
            "the backbone starts from random weights (backbone.weights=none); "
            "backbone.weights=hub fetches ImageNet's, a path loads a file"
        )
    if trainer.regularizer is None and config.regularizer._target_ is not None:
        log.warning("one task has no other task to contrast with: the regulariser is off")
    if state is not None:
        restore(trainer, state, path)
        log.info("resumed at step %d from %s", start, path)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    log.info(
        "%s: %d training and %d validation pictures, tasks %s, %s, %.2f M parameters, on %s",
        config.data.name,
        len(run.train_reader.ids),
        len(run.val_reader.ids),
        ", ".join(tasks),
        "no regulariser" if trainer.regularizer is None else f"contrast with weight {config.regularizer.weight}",
        sum(p.numel() for p in trainer.model.parameters()) / 1e6,
        device,
    )
    began = time.perf_counter()
    evaluation = trainer.fit()
    seconds = time.perf_counter() - began
    facts = run_facts(
        seed=config.seed,
        split=config.data.split,
        num_images=evaluation.num_images,
        size=build.data_size(config),
        reader=run.val_reader,
        device=device,
    )
    write_json(folder / "run.json", {**facts, "step": trainer.step, "seconds": round(seconds, 1)})
    write_json(folder / "metrics.json", evaluation.metrics)
    trainer.recorder.close()
    columns = {"untrained": trainer.first.metrics} if trainer.first else {}
    table = format_table(tasks, {**columns, f"step {trainer.step}": evaluation.metrics})
    log.info("on %d validation pictures:\n\n%s\n", evaluation.num_images, table)
    if dry:
        log.info("dry run: the step took %.2f s, peak memory %.2f GiB", trainer.seconds_per_step, trainer.memory())
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    log.info(
        "%.0f s\n  pictures:   %s\n  checkpoint: %s\n  curves:     tensorboard --logdir %s",
        seconds,
        shown / "panels",
        shown / "checkpoints" / "last.pt",
        shown,
    )
    return evaluation.metrics


def restore(trainer: Trainer, state: dict[str, Any], path: Path | None) -> None:
    try:
        trainer.restore(state)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"checkpoint {path} does not fit this run's model or optimiser: {reason}") from error


def find_checkpoint(resume: str | None, folder: Path, siblings: Path | None) -> Path | None:
    """The checkpoint to continue from; None: a fresh run. A fresh run never writes over another."""
    own = folder / "checkpoints" / "last.pt"
    taken = own.exists() or (folder / "metrics.json").exists()
    other = resume not in (None, "auto") and Path(str(resume)).resolve().parent != own.parent.resolve()
    if taken and (resume is None or other):
        raise UserError(f"{folder} already holds a run; continue it with resume=auto or choose another hydra.run.dir")
    if resume is None:
        return None
    if resume != "auto":
        return Path(resume)
    if own.exists():
        return own
    found = sorted(siblings.glob("*/checkpoints/last.pt"), key=lambda p: p.stat().st_mtime) if siblings else []
    if not found:
        log.info("resume=auto: no checkpoint in %s, starting afresh", folder)
    return found[-1] if found else None
