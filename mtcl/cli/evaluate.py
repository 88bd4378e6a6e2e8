"""Evaluate a checkpoint, from which everything is rebuilt, or saved maps of any origin."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from mtcl.cli.run_record import build_run_record
from mtcl.cli.write_metrics import write_metrics
from mtcl.config.build_data import build_dataset, build_eval_loader, build_tasks
from mtcl.config.build_evaluator import build_evaluator
from mtcl.config.load import (
    SavedModel,
    convert_build_errors,
    read_saved_model,
    rebuild_model,
    restore_config,
)
from mtcl.config.resolve import add_key_prefix, plain
from mtcl.config.schema import COMMAND, MODEL_GROUPS, role_of
from mtcl.config.stored_config import check_tasks
from mtcl.errors import UserError
from mtcl.evaluation.evaluator import EvaluationResult
from mtcl.evaluation.format_metrics import format_metrics
from mtcl.evaluation.plausibility import check_labels, check_maps, report_problems
from mtcl.evaluation.saved_predictions import PredictionWriter, SavedPredictions, find_map_folder
from mtcl.run_folder import RunFolder
from mtcl.runtime import choose_device, seed_everything
from mtcl.tasks import TASK_NAMES
from mtcl.tasks.base import Task
from mtcl.training.run_logger import write_panels

log = logging.getLogger(__name__)

MODEL_FACTS = ("precision", "seed")  # entries of the run record that mean nothing for saved maps


def evaluate(
    config: DictConfig, overrides: Sequence[str], groups: Sequence[str], folder: Path, saved: SavedModel | None = None
) -> dict[str, dict[str, float]]:
    """Score ``config.checkpoint`` or the maps in ``config.predictions``.

    Writes metrics, record and panels into ``folder``, and with ``config.save_predictions`` the checkpoint's maps there.

    Args:
        config: the composed defaults with the command's overrides in them.
        overrides: the command's overrides, for the record and for what replaces the checkpoint's own config.
        groups: the names of the config groups.
        folder: the folder of the evaluation; it must not hold one already.
        saved: what :func:`read_named_model` has read; a checkpoint of the same name is not read again.

    Returns:
        Task -> metric -> value.
    """
    if (config.checkpoint is None) == (config.predictions is None):
        both = "not both" if config.checkpoint is not None else "neither is given"
        raise UserError(f"evaluate.py scores checkpoint=PATH or predictions=DIR data=NAME, {both}")
    if config.predictions is not None:
        return evaluate_predictions(config, overrides, folder)
    if saved is None or saved.source != str(config.checkpoint):
        saved = read_saved_model(config.checkpoint)
    return evaluate_checkpoint(saved, config, overrides, groups, folder)


def evaluate_checkpoint(
    saved: SavedModel, config: DictConfig, overrides: Sequence[str], groups: Sequence[str], folder: Path
) -> dict[str, dict[str, float]]:
    """Score a saved model with its own config, changed by the command's overrides; ``tasks.names`` may be fewer."""
    check_folder_unused(folder)
    backbone_weights, overrides_of_settings = None, list(overrides)
    if saved.backbone is not None:  # these are the command's to say
        overrides_of_settings = [one for one in overrides if not one.startswith("backbone.weights=")]
        if overrides_of_settings != list(overrides):
            backbone_weights = config.backbone.weights
    settings = apply_overrides(adapt_config(saved, config), config, overrides_of_settings, groups)
    with convert_build_errors(saved.path, passthrough=UserError):
        tasks = select_tasks(settings, saved)
    device = choose_device(settings.trainer.device, "trainer.device")
    seed_everything(settings.seed, settings.trainer.deterministic)
    output = config.save_predictions
    writer = None if output is None else PredictionWriter(Path(output), tasks, settings.data.root)
    dataset = build_dataset(settings, "val", tasks)
    with add_key_prefix("data."):
        warnings = report_problems(check_labels(dataset, tasks, "validation"), settings.data.get("strict", False))
    model = rebuild_model(settings, build_model_tasks(saved), saved, backbone_weights)
    evaluator = build_evaluator(settings, tasks, build_eval_loader(settings, dataset, tasks, device), device)
    evaluation = evaluator.run(model.to(device), on_prediction=None if writer is None else writer.write)
    record = build_run_record(settings, dataset, evaluation.num_images, device, overrides)
    record |= {"checkpoint": str(saved.path), "step": saved.step, "warnings": warnings}
    title = f"{saved.path} on {evaluation.num_images} images of {settings.data.name}"
    write_evaluation(folder, evaluation, tasks, record, f"step {saved.step}", title)
    if writer is not None:
        log.info("its predictions are in %s; score them with predictions=%s", output, output)
    return evaluation.metrics


def adapt_config(saved: SavedModel, composed: DictConfig) -> DictConfig:
    """Return the saved config for an evaluation here: device, cache and keys younger than it are this machine's."""
    settings = restore_config(saved)
    for group in ("data", "loss", "trainer", "evaluation"):
        settings[group] = {**plain(composed[group]), **plain(settings.get(group, {}))}
    settings.trainer.device = "auto"  # the machine it was trained on is not this one
    return settings


def build_model_tasks(saved: SavedModel) -> dict[str, Task]:
    """Build all tasks that a checkpoint's model predicts, on the data that it was trained on."""
    with convert_build_errors(saved.path):
        tasks = build_tasks(restore_config(saved))
    check_tasks(dict(saved.tasks), tasks, saved.path)
    return tasks


def select_tasks(settings: DictConfig, saved: SavedModel) -> dict[str, Task]:
    """Build the tasks to score: those that ``settings`` name, or all of the checkpoint's.

    Raises:
        UserError: the checkpoint's model does not predict one of them.
    """
    names = settings.tasks.names
    for name in names if names != "auto" else ():
        if name in TASK_NAMES and name not in saved.tasks:
            raise UserError(f"{saved.path} has no task {name} to score (tasks.names); it has {', '.join(saved.tasks)}")
    if names == "auto":
        settings.tasks.names = list(saved.tasks)
    tasks = build_tasks(settings)
    check_tasks({name: saved.tasks[name] for name in tasks}, tasks, saved.path)
    return tasks


def evaluate_predictions(config: DictConfig, overrides: Sequence[str], folder: Path) -> dict[str, dict[str, float]]:
    """Score saved maps (:mod:`mtcl.evaluation.saved_predictions`) on the validation list, without any model.

    ``tasks.names=auto``: the tasks that have a folder and that the dataset has labels for.
    """
    if config.save_predictions is not None:
        raise UserError("save_predictions writes the maps of a checkpoint; leave it out with predictions=DIR")
    check_folder_unused(folder)
    names = config.tasks.names
    config = config.copy()
    config.tasks.names = "auto"
    labelled = list(build_tasks(config))
    maps, predicted = find_map_folder(Path(config.predictions), labelled)
    if names == "auto" and len(predicted) < len(labelled):
        missing = ", ".join(name for name in labelled if name not in predicted)
        log.info("%s has no folder of %s: not scored", maps, missing)
    config.tasks.names = predicted if names == "auto" else names
    tasks = build_tasks(config)
    device = choose_device(config.trainer.device, "trainer.device")
    seed_everything(config.seed, config.trainer.deterministic)
    dataset = build_dataset(config, "val", tasks)
    # Both lists are shorter than that of the dataset: human parts alone keep to images with persons.
    shortened = config.data.limit is not None or list(tasks) == ["human_parts"]
    predictions = SavedPredictions(maps, tasks, dataset, device, allow_extra_maps=shortened)
    problems = check_labels(dataset, tasks, "validation") + check_maps(predictions, dataset, tasks)
    with add_key_prefix("data."):
        warnings = report_problems(problems, config.data.get("strict", False))
    evaluator = build_evaluator(config, tasks, build_eval_loader(config, dataset, tasks, device), device)
    evaluation = evaluator.score(predictions.predict)
    record = build_run_record(config, dataset, evaluation.num_images, device, overrides)
    record = {key: value for key, value in record.items() if key not in MODEL_FACTS}
    record |= {"predictions": str(maps), "predictions_fingerprint": predictions.fingerprint(), "warnings": warnings}
    title = f"{maps} on {evaluation.num_images} images of {config.data.name}"
    write_evaluation(folder, evaluation, tasks, record, "saved maps", title)
    return evaluation.metrics


def check_folder_unused(folder: Path) -> None:
    """Raise ``UserError`` if an evaluation or a run has been written to ``folder`` already."""
    files = RunFolder(folder)
    for path in (files.metrics, files.record):
        if path.exists():
            raise UserError(f"{path} exists already; choose another hydra.run.dir")


def write_evaluation(
    folder: Path,
    evaluation: EvaluationResult,
    tasks: Mapping[str, Task],
    record: Mapping[str, Any],
    column: str,
    title: str,
) -> None:
    """Write record, metrics and panels into ``folder`` and log the table with one ``column`` under a ``title``."""
    folder.mkdir(parents=True, exist_ok=True)
    files = RunFolder(folder)
    write_panels(files.panels, evaluation.visual_samples, tasks)
    write_metrics(folder, evaluation.metrics, record)
    log.info("%s:\n\n%s\n", title, format_metrics(tasks, {column: evaluation.metrics}))
    log.info("%s, %s and %s/ are in %s", files.metrics.name, files.record.name, files.panels.name, folder)


def read_named_model(overrides: Sequence[str]) -> SavedModel | None:
    """Read the model of the last ``checkpoint=`` among a command's overrides.

    None if there is none or it cannot be read; :func:`evaluate` then says what is wrong.
    """
    sources = [override.partition("=")[2] for override in overrides if override.startswith("checkpoint=")]
    if not sources:
        return None
    try:
        return read_saved_model(sources[-1].strip("'\""))
    except UserError:
        return None


def infer_dataset_override(saved: SavedModel | None, overrides: Sequence[str], configs: Path) -> str | None:
    """Return ``data=NAME`` of a saved model, so that the keys of its dataset exist in the composed config.

    None if the command chooses a dataset itself, or if the model's dataset is not one of ``configs``.
    """
    if saved is None or any(override.startswith("data=") for override in overrides):
        return None
    name = str(saved.config["data"]["name"])
    return f"data={name}" if name in {path.stem for path in (configs / "data").glob("*.yaml")} else None


def apply_overrides(
    settings: DictConfig, composed: DictConfig, overrides: Sequence[str], groups: Sequence[str]
) -> DictConfig:
    """Change a checkpoint's config by the command's overrides: groups as a unit first, then single keys.

    Args:
        settings: the checkpoint's config, which is changed.
        composed: the defaults with the overrides in them, where the values come from.
        overrides: as typed.
        groups: the names of the config groups.

    Returns:
        ``settings``.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    for override in sorted(parsed, key=lambda one: one.key_or_group not in groups):
        key = override.key_or_group
        if key.split(".")[0] in MODEL_GROUPS:
            raise UserError(f"{key} belongs to the checkpoint's model and can't be changed when evaluating")
        if key in groups and key not in composed:  # @package _global_: experiment, debug, recipe
            raise UserError(f"{key}= sets keys of many groups; when evaluating, override the keys themselves")
        if override.is_delete():
            raise UserError(f"{override.input_line}: a key of a checkpoint's config can't be removed; set it to null")
        if role_of(key) != COMMAND:
            with open_dict(settings):
                OmegaConf.update(settings, key, OmegaConf.select(composed, key), merge=False)
    return settings
