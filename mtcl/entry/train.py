"""One training run, from a composed config to a folder of results."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mtcl.entry import build
from mtcl.entry.report import format_table, run_facts
from mtcl.entry.schema import leaves
from mtcl.errors import UserError
from mtcl.training.checkpoint import claim, load_checkpoint
from mtcl.training.recorder import write_json, write_text
from mtcl.training.runtime import choose_device, seed_everything
from mtcl.training.trainer import Trainer

log = logging.getLogger(__name__)


# Keys in which an interrupted run may differ from the one that continues it.
FREE = (
    "resume",
    "name",
    "trainer.max_steps",
    "trainer.device",
    "trainer.panels",
    "data.workers",
    "data.root",
    "data.cache",
    "data.memory_map",
)


def train(
    config: DictConfig, folder: Path, siblings: Path | None = None, overrides: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Train, evaluate, write everything into ``folder``; the metrics of the last state.

    ``siblings``: a folder of earlier runs of the same name, where ``resume=auto`` may look. ``overrides``: the words of
    the command, for the record.
    """
    device = choose_device(config.trainer.device)
    seed_everything(config.seed, config.trainer.deterministic)
    path = find_checkpoint(config, folder, siblings)
    state = None if path is None else load_checkpoint(path)
    tasks = build.build_tasks(config)
    if state is not None and path is not None:
        build.check_tasks(state["meta"]["tasks"], tasks, path)
        check_optimizer(state, config, path)
    start = 0 if state is None else state["step"]
    run = build.build_trainer(config, tasks, folder, device, pretrained=state is None, start_step=start)
    if state is not None:
        restore(run.trainer, state, path, config)
    with claim(folder):
        if state is not None:
            log.info("resumed at step %d from %s", start, path)
        announce(config, run, fresh=state is None)
        write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
        return finish(config, run, folder, overrides)


def announce(config: DictConfig, run: build.Run, fresh: bool) -> None:
    """What is about to be trained, and what the user may not expect of it."""
    if fresh and config.backbone.weights in (None, "none"):
        log.warning(
            "the backbone starts from random weights (backbone.weights=none); "
            "backbone.weights=hub fetches ImageNet's, a path loads a file"
        )
    regularizer = run.trainer.regularizer
    if regularizer is None and config.regularizer._target_ is not None:
        log.warning("one task has no other task to contrast with: the regulariser is off")
    log.info("%s", run.train_reader.summary())
    log.info(
        "%s: %d training and %d validation pictures, tasks %s, %s, %.2f M parameters, on %s",
        config.data.name,
        len(run.train_reader.ids),
        len(run.val_reader.ids),
        ", ".join(run.trainer.tasks),
        "no regulariser" if regularizer is None else f"contrast with weight {config.regularizer.weight}",
        sum(p.numel() for p in run.trainer.model.parameters()) / 1e6,
        run.trainer.device,
    )


def finish(config: DictConfig, run: build.Run, folder: Path, overrides: Sequence[str]) -> dict[str, dict[str, float]]:
    """Train to the end, write metrics.json and run.json, tell the table; the metrics."""
    trainer = run.trainer
    began = time.perf_counter()
    try:
        evaluation = trainer.fit()
    except RuntimeError as error:
        operation, known, _ = str(error).partition(" does not have a deterministic implementation")
        if not known:
            raise
        raise UserError(
            f"trainer.deterministic=true, but {operation} of this model has no deterministic implementation on this "
            "device; use trainer.deterministic=false or another backbone"
        ) from error
    finally:
        trainer.recorder.close()
    seconds = time.perf_counter() - began
    facts = run_facts(config, run.val_reader, evaluation.num_images, trainer.device, overrides)
    write_json(folder / "run.json", {**facts, "step": trainer.step, "seconds": round(seconds, 1)})
    write_json(folder / "metrics.json", evaluation.metrics)
    columns = {"untrained": trainer.first.metrics} if trainer.first else {}
    table = format_table(trainer.tasks, {**columns, f"step {trainer.step}": evaluation.metrics})
    log.info("on %d validation pictures:\n\n%s\n", evaluation.num_images, table)
    if config.trainer.dry_run:
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


def restore(trainer: Trainer, state: dict[str, Any], path: Path | None, config: DictConfig) -> None:
    try:
        trainer.restore(state)
    except (RuntimeError, ValueError, KeyError) as error:
        changed = differences(state["config"], build.plain(config), ("backbone.", "decoder.", "regularizer."))
        raise UserError(f"checkpoint {path} does not fit this run: {changed or error}") from error


def check_optimizer(state: dict[str, Any], config: DictConfig, path: Path) -> None:
    if not state["optimizer"]:
        raise UserError(
            f"checkpoint {path} was imported: it has weights only, which evaluate.py scores; nothing to resume"
        )
    before, now = state["config"]["optimizer"]["name"], config.optimizer.name
    if before != now:
        raise UserError(f"checkpoint {path} was trained with optimizer={before}, not {now}; its moments do not fit")


def differences(saved: dict[str, Any], now: dict[str, Any], prefixes: Sequence[str] = ("",)) -> str:
    """``key is a, was b`` for the keys below ``prefixes`` that differ, but for those that may."""
    before, after = dict(leaves(saved)), dict(leaves(now))
    keys = [key for key in {**before, **after} if key.startswith(tuple(prefixes)) and key not in FREE]
    # A model's own mean and std were filled in when it was saved.
    keys = [key for key in keys if not (key in ("backbone.mean", "backbone.std") and after.get(key) is None)]
    return "; ".join(f"{k} is {after.get(k)}, was {before.get(k)}" for k in keys if before.get(k) != after.get(k))


def find_checkpoint(config: DictConfig, folder: Path, siblings: Path | None) -> Path | None:
    """The checkpoint to continue from; None: a fresh run. A fresh run never writes over another."""
    resume = config.resume
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
    for path in reversed(found):
        if is_unfinished_twin(path, config):
            return path
    log.info("resume=auto: no interrupted run like this one beside %s, starting afresh", folder)
    return None


def is_unfinished_twin(path: Path, config: DictConfig) -> bool:
    """Is this the checkpoint of a run with our config that has steps left, and that nobody is still writing?"""
    try:
        state = load_checkpoint(path)
        claim(path.parents[1]).close()
    except UserError:
        return False
    return state["step"] < config.trainer.max_steps and not differences(state["config"], build.plain(config))
