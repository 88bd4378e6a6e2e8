"""Group the trainer's parameters: options of the loop, validation, checkpoints, regularisation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mtcl.regularizers import Regularizer
from mtcl.regularizers.task_loss import TaskLossOptions
from mtcl.regularizers.weighting import Lambda
from mtcl.training.optimizers import ScheduledOptimizer


@dataclass(frozen=True)
class TrainerOptions:
    """Options of the training loop.

    Attributes:
        max_steps: optimiser steps, counted from the start of the training (not from where it is resumed).
        precision: ``bf16``, ``fp16``, ``fp32`` or ``auto``, see :func:`mtcl.runtime.autocast`.
        accumulate_grad_batches: batches per optimiser step.
        task_loss: how the tasks' losses are computed; the regulariser gets these options, too.
        clip_norm: largest norm of the model's gradient; None: no clipping. The regulariser's gradient is not counted.
        grad_checkpointing: the model repeats parts of its forward pass in the backward pass.
        compile: forward passes go through ``torch.compile``.
        max_nonfinite_steps: so many consecutive steps with a loss or gradient that is not finite end the training.
        log_interval: steps from one record of the losses to the next.
        profile: steps that torch's profiler records; None: none.
    """

    max_steps: int
    precision: str = "auto"
    accumulate_grad_batches: int = 1
    task_loss: TaskLossOptions = field(default_factory=TaskLossOptions)
    clip_norm: float | None = None
    grad_checkpointing: bool = False
    compile: bool = False
    max_nonfinite_steps: int = 10
    log_interval: int = 20
    profile: int | None = None


@dataclass(frozen=True)
class ValidationPolicy:
    """When a trainer validates. It always does so after the last step.

    Attributes:
        monitor: ``task/metric``, which decides what ``best.pt`` holds.
        higher_is_better: direction of ``monitor``.
        interval: steps from one validation to the next; None: none on the way.
        validate_first: also before the first step.
        patience: so many validations in a row on which ``monitor`` has no new best value end the training before its
            last step; None: they do not. Those before the first step and after the last do not count.
    """

    monitor: str
    higher_is_better: bool
    interval: int | None = None
    validate_first: bool = True
    patience: int | None = None


@dataclass(frozen=True)
class CheckpointPolicy:
    """When a trainer saves, and what is saved beside the state. It always saves after the last step.

    Attributes:
        config: the run's config, plain containers, from which the model can be rebuilt.
        meta: facts about the run, plain containers: ``tasks``.
        backbone: where the weights of a backbone come from that is left out, ``name`` and ``weights``, which are saved
            with their hash; None: the backbone is saved.
        interval: steps from one ``last.pt`` to the next; None: none on the way.
        keep_interval: steps from one numbered checkpoint, which is kept, to the next; None: none.
        asynchronous: a thread writes while the training continues.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    backbone: Mapping[str, str] | None = None
    interval: int | None = None
    keep_interval: int | None = None
    asynchronous: bool = False


@dataclass(frozen=True)
class Regularization:
    """A regulariser in training.

    Attributes:
        regularizer: its parameters (projectors) are trained with the model, and discarded afterwards.
        optimizer: of these parameters.
        lambda_: weight of its loss.
        head_parameters: the parameters of the model that its loss trains; None: all.
    """

    regularizer: Regularizer
    optimizer: ScheduledOptimizer
    lambda_: Lambda
    head_parameters: Sequence[nn.Parameter] | None = None
