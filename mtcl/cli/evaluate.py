"""One evaluation: of a checkpoint, from which everything is rebuilt, or of saved maps of any origin."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from mtcl.atomic import write_json
from mtcl.cli.run_record import build_run_record
from mtcl.config.build_data import build_dataset, build_eval_loader, build_tasks
from mtcl.config.build_evaluator import build_evaluator
from mtcl.config.load import SavedModel, convert_build_errors, read_saved_model, rebuild_model, restore_config
from mtcl.config.resolve import plain
from mtcl.config.stored_config import check_tasks
from mtcl.errors import UserError
from mtcl.evaluation.evaluator import EvaluationResult
from mtcl.evaluation.format_metrics import format_metrics
from mtcl.evaluation.plausibility import check_labels, check_maps, report_problems
from mtcl.evaluation.saved_predictions import PredictionWriter, SavedPredictions, find_map_folder
from mtcl.runtime import choose_device, seed_everything
from mtcl.tasks import TASK_NAMES
from mtcl.tasks.base import Task
from mtcl.training.run_logger import write_panels

log = logging.getLogger(__name__)

MODEL_GROUPS = ("backbone", "decoder")  # what a checkpoint's weights belong to
GLOBAL_GROUPS = ("experiment", "debug")
COMMAND_KEYS = ("checkpoint", "save_predictions")  # keys of the evaluation, not of the run
MODEL_FACTS = ("precision", "seed")  # facts that mean nothing for saved maps


def evaluate(
    config: DictConfig, overrides: Sequence[str], groups: Sequence[str], folder: Path
) -> dict[str, dict[str, float]]:
    """Score ``config.checkpoint`` or the maps in ``config.predictions``; the metrics.

    Writes metrics.json, run.json and panels into ``folder``, and with ``config.save_predictions`` the checkpoint's maps
    there. ``config``: the composed defaults with the command's overrides in them; ``overrides``: those words;
    ``groups``: which of their keys choose a whole config group.
    """
    if (config.checkpoint is None) == (config.predictions is None):
        both = "not both" if config.checkpoint is not None else "neither is given"
        raise UserError(f"evaluate.py scores checkpoint=PATH or predictions=DIR data=NAME, {both}")
    if config.predictions is not None:
        return score_predictions(config, overrides, folder)
    return score_checkpoint(config, overrides, groups, folder)


def score_checkpoint(
    config: DictConfig, overrides: Sequence[str], groups: Sequence[str], folder: Path
) -> dict[str, dict[str, float]]:
    """Everything is rebuilt from the checkpoint, then the command's overrides apply; ``tasks.names`` may be fewer."""
    saved = read_saved_model(config.checkpoint)
    check_folder_unused(folder)
    settings = adapt_config(saved, config)
    settings = apply_overrides(settings, config, overrides, groups)
    with convert_build_errors(saved.path, passthrough=UserError):
        tasks = select_tasks(settings, saved)
    device = choose_device(settings.trainer.device, "trainer.device")
    seed_everything(settings.seed, settings.trainer.deterministic)
    given = config.save_predictions
    writer = None if given is None else PredictionWriter(Path(given), tasks, settings.data.root)
    reader = build_dataset(settings, "val", tasks)
    warnings = report_problems(check_labels(reader, tasks, "validation"), settings.data.get("strict", False))
    model = rebuild_model(settings, build_model_tasks(saved), saved)
    evaluator = build_evaluator(settings, tasks, build_eval_loader(settings, reader, tasks, device), device)
    evaluation = evaluator.run(model.to(device), on_prediction=None if writer is None else writer.write)
    facts = build_run_record(settings, reader, evaluation.num_images, device, overrides)
    facts |= {"checkpoint": str(saved.path), "step": saved.step, "warnings": warnings}
    told = f"{saved.path} on {evaluation.num_images} pictures of {settings.data.name}"
    write_evaluation(folder, evaluation, tasks, facts, f"step {saved.step}", told)
    if writer is not None:
        log.info("its predictions are in %s; score them with predictions=%s", given, given)
    return evaluation.metrics


def adapt_config(saved: SavedModel, composed: DictConfig) -> DictConfig:
    """Return the saved config for an evaluation here: device, cache and keys younger than it are this machine's."""
    settings = restore_config(saved)
    for group in ("data", "loss", "trainer", "evaluation"):
        settings[group] = {**plain(composed[group]), **plain(settings.get(group, {}))}
    settings.trainer.device = "auto"  # the machine it was trained on is not this one
    return settings


def build_model_tasks(saved: SavedModel) -> dict[str, Task]:
    """All tasks that a checkpoint's model predicts, on the data that it was trained on."""
    with convert_build_errors(saved.path):
        tasks = build_tasks(restore_config(saved))
    check_tasks(dict(saved.tasks), tasks, saved.path)
    return tasks


def select_tasks(settings: DictConfig, saved: SavedModel) -> dict[str, Task]:
    """The tasks to score: those that ``settings`` name, all of the checkpoint's. ``UserError`` where it lacks one."""
    names = settings.tasks.names
    for name in names if names != "auto" else ():
        if name in TASK_NAMES and name not in saved.tasks:
            raise UserError(f"{saved.path} has no task {name} to score (tasks.names); it has {', '.join(saved.tasks)}")
    if names == "auto":
        settings.tasks.names = list(saved.tasks)
    tasks = build_tasks(settings)
    check_tasks({name: saved.tasks[name] for name in tasks}, tasks, saved.path)
    return tasks


def score_predictions(config: DictConfig, overrides: Sequence[str], folder: Path) -> dict[str, dict[str, float]]:
    """Score saved maps (:mod:`mtcl.evaluation.saved_predictions`) on the validation list, without any model.

    ``tasks.names=auto``: the tasks that have a folder and that the dataset has labels for.
    """
    if config.save_predictions is not None:
        raise UserError("save_predictions writes the maps of a checkpoint; leave it out with predictions=DIR")
    check_folder_unused(folder)
    chosen = config.tasks.names
    config = config.copy()
    config.tasks.names = "auto"
    offered = list(build_tasks(config))
    maps, found = find_map_folder(Path(config.predictions), offered)
    if chosen == "auto" and len(found) < len(offered):
        log.info("%s has no folder of %s: not scored", maps, ", ".join(name for name in offered if name not in found))
    config.tasks.names = found if chosen == "auto" else chosen
    tasks = build_tasks(config)
    device = choose_device(config.trainer.device, "trainer.device")
    seed_everything(config.seed, config.trainer.deterministic)
    reader = build_dataset(config, "val", tasks)
    # Both lists are shorter than that of the dataset: human parts alone keep to pictures with persons.
    shortened = config.data.limit is not None or list(tasks) == ["human_parts"]
    saved = SavedPredictions(maps, tasks, reader, device, allow_extra_maps=shortened)
    problems = check_labels(reader, tasks, "validation") + check_maps(saved, reader, tasks)
    warnings = report_problems(problems, config.data.get("strict", False))
    evaluation = build_evaluator(config, tasks, build_eval_loader(config, reader, tasks, device), device).score(
        saved.predict
    )
    facts = build_run_record(config, reader, evaluation.num_images, device, overrides)
    facts = {key: value for key, value in facts.items() if key not in MODEL_FACTS}
    facts |= {"predictions": str(maps), "predictions_fingerprint": saved.fingerprint(), "warnings": warnings}
    told = f"{maps} on {evaluation.num_images} pictures of {config.data.name}"
    write_evaluation(folder, evaluation, tasks, facts, "saved maps", told)
    return evaluation.metrics


def check_folder_unused(folder: Path) -> None:
    """``UserError`` where an evaluation has been written to ``folder`` already."""
    for name in ("metrics.json", "run.json"):
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists already; choose another hydra.run.dir")


def write_evaluation(
    folder: Path,
    evaluation: EvaluationResult,
    tasks: Mapping[str, Task],
    facts: Mapping[str, Any],
    column: str,
    told: str,
) -> None:
    """Write run.json, metrics.json and panels into ``folder``; log ``told`` with the table, its column so headed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_panels(folder / "panels", evaluation.visual_samples, tasks)
    write_json(folder / "run.json", facts)
    write_json(folder / "metrics.json", evaluation.metrics)
    table = format_metrics(tasks, {column: evaluation.metrics})
    log.info("%s:\n\n%s\n", told, table)
    log.info("metrics.json, run.json and panels/ are in %s", folder)


def infer_dataset_override(words: Sequence[str], configs: Path) -> str | None:
    """``data=NAME`` for the checkpoint named among the command's words, so that the keys of its dataset are known.

    None where the words choose a dataset themselves, or where there is nothing to know (evaluate will say so).
    """
    found = [word.partition("=")[2] for word in words if word.startswith("checkpoint=")]
    if not found or any(word.startswith("data=") for word in words):
        return None
    try:
        name = str(read_saved_model(found[-1].strip("'\"")).config["data"]["name"])
    except (UserError, KeyError):
        return None
    return f"data={name}" if name in {path.stem for path in (configs / "data").glob("*.yaml")} else None


def apply_overrides(
    saved: DictConfig, composed: DictConfig, overrides: Sequence[str], groups: Sequence[str]
) -> DictConfig:
    """The checkpoint's config with the command's overrides: whole groups first, then single keys."""
    words = OverridesParser.create().parse_overrides(list(overrides))
    for word in sorted(words, key=lambda w: w.key_or_group not in groups):
        key = word.key_or_group
        if key.split(".")[0] in MODEL_GROUPS:
            raise UserError(f"{key} belongs to the checkpoint's model and can't be changed when evaluating")
        if key in GLOBAL_GROUPS:
            raise UserError(f"{key}= sets keys of many groups; when evaluating, override the keys themselves")
        if word.is_delete():
            raise UserError(f"{word.input_line}: nothing can be taken out of a checkpoint's config; set it to null")
        if key not in COMMAND_KEYS:
            with open_dict(saved):
                OmegaConf.update(saved, key, OmegaConf.select(composed, key), merge=False)
    return saved
