"""Build an evaluator from a config."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from mtcl.config.resolve import add_key_prefix, plain
from mtcl.errors import UserError, suggest
from mtcl.evaluation.distillation_evaluator import MONITOR, DistillationEvaluator
from mtcl.evaluation.evaluator import Evaluator
from mtcl.regularizers import Distillation, Regularizer
from mtcl.tasks.base import Task
from mtcl.tasks.names import SCORES


def choose_monitor(
    name: str,
    tasks: Mapping[str, Task],
    fast_boundaries: Sequence[int] | None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[str, bool]:
    """Return ``task/metric`` of ``trainer.monitor`` and whether higher is better; ``auto``: the first task's primary.

    Without tasks it is the loss of a distillation.

    Of edges, validations between training steps have their loss only, unless ``evaluation.fast_boundaries`` is given;
    of depth, ``abs_err`` in place of rmse if ``evaluation.options`` has the protocol ``mtan``.
    """
    metrics = {} if tasks else {MONITOR: False}
    for task in tasks.values():
        scores, protocol = SCORES[task.name], ((options or {}).get(task.name) or {}).get("protocol")
        available: tuple[str, ...] = () if fast_boundaries is None else (task.primary_metric,)
        if scores.fallback_metric is not None and protocol is not None and protocol == scores.fallback_protocol:
            available = (scores.fallback_metric,)
        metric, higher = task.choose_metric(available)
        metrics[f"{task.name}/{metric}"] = higher
    name = next(iter(metrics)) if name == "auto" else name
    if name not in metrics:
        hint = "; edge/odsF needs evaluation.fast_boundaries=[9,4]" if name == "edge/odsF" else ""
        problem = f"trainer.monitor={name} is not known{suggest(name, metrics)}"
        raise UserError(f"{problem}; choose auto or one of {', '.join(metrics)}{hint}")
    return name, metrics[name]


def build_evaluator(
    config: DictConfig,
    tasks: Mapping[str, Task],
    loader: DataLoader,
    device: torch.device,
    regularizer: Regularizer | None = None,
) -> Evaluator:
    """Build the evaluator of ``config.evaluation``; without tasks one of the distillation ``regularizer``."""
    if not tasks and isinstance(regularizer, Distillation):
        return DistillationEvaluator(regularizer, loader, device, config.trainer.precision)
    settings = plain(config.evaluation)
    options = {name: dict(settings["options"].get(name) or {}) for name in tasks}
    quick: dict[str, dict[str, Any]] = {}
    if "edge" in tasks:
        options["edge"] |= {"score_boundaries": settings["score_boundaries"], "workers": settings["workers"]}
        if options["edge"].get("max_distance") is None:  # that of the data scored, not of the data trained on
            options["edge"]["max_distance"] = config.data.get("boundary_distance", 0.011)
        quick["edge"] = {"score_boundaries": False}
        if settings["fast_boundaries"] is not None and settings["score_boundaries"]:
            thresholds, every = settings["fast_boundaries"]
            quick["edge"] = {"thresholds": thresholds, "every": every}
    for name, task in tasks.items():  # refuses a wrong option before training
        construct_metric(task, options[name])
    precision, panels = config.trainer.precision, config.trainer.num_panels
    return Evaluator(tasks, loader, device, precision, num_visual_samples=panels, options=options, fast_options=quick)


def construct_metric(task: Task, options: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for an option that a task's metric does not have."""
    try:
        with add_key_prefix(f"evaluation.options.{task.name}."):
            task.metric(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"evaluation.options.{task.name} does not fit its metric: {error}") from error
