"""Build from a config what turns the losses of several objectives into gradients."""

from collections.abc import Iterable, Mapping

import torch
from omegaconf import DictConfig
from torch import nn

from mtcl import distributed
from mtcl.config.build_lr_schedule import build_lr_schedule
from mtcl.config.resolve import add_key_prefix, plain
from mtcl.data import MultiTaskDataset
from mtcl.errors import UserError, suggest
from mtcl.regularizers import Regularizer
from mtcl.regularizers.weighting import OBJECTIVE_WEIGHT
from mtcl.tasks.base import Task
from mtcl.training.balancing import Balancer, FixedWeights
from mtcl.training.balancing_avg_norm import AverageNorm
from mtcl.training.balancing_db_mtl import DualBalancing
from mtcl.training.balancing_scalarizers import WITHOUT_LOSSES, build_scalarization
from mtcl.training.balancing_torchjd import GradientAggregation

REGULARIZER = "regularizer"  # the regulariser's objective, beside the tasks' names
METHODS = ("fixed", "uncertainty", "dwa", "scalarizer", "avg_norm", "db_mtl", "torchjd")
GRADIENT_METHODS = ("avg_norm", "db_mtl", "torchjd")  # they differentiate each objective by itself
SINGLE_PROCESS_METHODS = ("db_mtl", "torchjd")


def build_balancer(
    config: DictConfig,
    tasks: Mapping[str, Task],
    regularizer: Regularizer | None,
    train_dataset: MultiTaskDataset,
    device: torch.device,
    shared_parameters: Iterable[nn.Parameter] = (),
) -> Balancer:
    """Return what turns loss terms into gradients.

    Args:
        config: as ``train.py`` composes it.
        tasks: name -> task.
        regularizer: None: the tasks' losses alone.
        train_dataset: whose length an epoch has.
        device: of the losses.
        shared_parameters: of the model, from the input to the heads.

    Raises:
        UserError: the method is unknown, or can't be combined with other settings.
    """
    settings = config.balancing
    weights: dict[str, float] = {name: task.weight for name, task in tasks.items()}
    if regularizer is not None and settings.regularizer_as_objective:
        weights[REGULARIZER] = OBJECTIVE_WEIGHT
    scalarizer = _choose_scalarizer(config)
    _check_balancing(config, weights)
    _check_objectives(config, weights, scalarizer)
    if settings.method == "fixed":
        return FixedWeights(weights)
    with add_key_prefix("balancing."):
        if scalarizer is not None:
            return _build_scalarizer(config, weights, scalarizer, train_dataset, device)
        if settings.method == "avg_norm":
            return AverageNorm(weights, shared_parameters, settings.target)
        if settings.method == "db_mtl":
            return DualBalancing(weights, device, settings.beta, settings.sigma)
        return GradientAggregation(weights, device, settings.aggregator, plain(settings.options), config.seed)


def _choose_scalarizer(config: DictConfig) -> str | None:
    """Return the library's name of the scalarizer; None for methods of another kind."""
    method = config.balancing.method
    return config.balancing.scalarizer if method == "scalarizer" else {"uncertainty": "UW", "dwa": "DWA"}.get(method)


def _build_scalarizer(
    config: DictConfig,
    weights: Mapping[str, float],
    scalarizer: str,
    train_dataset: MultiTaskDataset,
    device: torch.device,
) -> Balancer:
    settings = config.balancing
    options, scale = plain(settings.get("options")), settings.get("scale", 1.0)
    if settings.method == "uncertainty":
        scale = 2.0  # so a run starts with loss.weights: UW has exp(-s) / 2
    if settings.method == "dwa":
        options = {"temperature": settings.temperature}
    steps_per_epoch = -(-(len(train_dataset.ids) // config.data.batch_size) // config.trainer.accumulate_grad_batches)
    return build_scalarization(
        weights,
        device,
        scalarizer,
        schedule=build_lr_schedule(config),
        options=options,
        scale=scale,
        lr=settings.get("lr", 0.0),
        every=settings.get("every") or max(steps_per_epoch, 1),
        seed=config.seed,
    )


def _check_balancing(config: DictConfig, weights: Mapping[str, float]) -> None:
    """Refuse a method of balancing that is unknown or can't be combined with the way of training."""
    method = config.balancing.method
    if method not in METHODS:
        choices = f"choose {', '.join(METHODS[:-1])} or {METHODS[-1]}"
        raise UserError(f"balancing.method={method} is not known{suggest(method, METHODS)}; {choices}")
    if method != "fixed" and len(weights) < 2:
        objective = next(iter(weights), "distillation")
        raise UserError(f"balancing.method={method} has one objective only, {objective}; use balancing=fixed")
    if method in SINGLE_PROCESS_METHODS and distributed.world_size() > 1:
        raise UserError(
            f"balancing.method={method} trains in one process; start without torchrun or use another method"
        )
    if method in GRADIENT_METHODS and config.trainer.compile:
        raise UserError(f"balancing.method={method} needs a backward pass per objective; set trainer.compile=false")
    if method == "avg_norm" and config.trainer.parallel == "fsdp" and distributed.world_size() > 1:
        raise UserError("balancing.method=avg_norm needs the weights in every process; set trainer.parallel=ddp")


def _check_objectives(config: DictConfig, weights: Mapping[str, float], scalarizer: str | None) -> None:
    """Refuse objectives that a scalarizer can't judge by their losses."""
    method = config.balancing.method
    if scalarizer is None or scalarizer in WITHOUT_LOSSES:
        return
    if REGULARIZER in weights and config.regularizer.weighting != "fixed":
        raise UserError(
            f"balancing.method={method} judges objectives by their losses, which regularizer.weighting="
            f"{config.regularizer.weighting} rescales; use balancing.regularizer_as_objective=false or "
            "regularizer.weighting=fixed"
        )
    if REGULARIZER in weights and scalarizer == "FAMO":
        raise UserError(
            "balancing.scalarizer=FAMO computes the tasks' losses again after a step, not the regularizer's; "
            "use balancing.regularizer_as_objective=false"
        )
    if unweighted := [name for name, weight in weights.items() if weight == 0]:
        raise UserError(f"loss.weights.{unweighted[0]}=0 leaves balancing={method} nothing to learn from; leave it out")
