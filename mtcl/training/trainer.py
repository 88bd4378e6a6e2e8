"""The training loop: batches through model, losses and optimiser, with validation, logging and checkpoints."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtcl import distributed
from mtcl.data import Batch
from mtcl.data.device_batch import image_mask
from mtcl.data.sample import SampleMeta
from mtcl.errors import Preempted, UserError
from mtcl.evaluation.evaluator import EvaluationResult, Evaluator
from mtcl.evaluation.model_input import prepare_input
from mtcl.losses.masked import masked_mean
from mtcl.models import DenseModel, DenseOutput, EncodedImage
from mtcl.models.lora import is_base_weight
from mtcl.progress import logging_beside_bar, progress_bar
from mtcl.regularizers import RegularizerOutput
from mtcl.regularizers.diagnostics import compare_feature_gradients
from mtcl.regularizers.task_loss import compute_task_loss
from mtcl.regularizers.weighting import Lambda
from mtcl.run_folder import RunFolder
from mtcl.runtime import autocast, choose_precision, freeze_running_statistics, peak_memory, rng_state, set_rng_state
from mtcl.tasks.base import Task
from mtcl.tasks.image_weights import find_labelled_images, weigh_images
from mtcl.training.balancing import Balancer
from mtcl.training.checkpoint import Checkpoint, hash_backbone, leave_out_backbone
from mtcl.training.checkpoint_thread import CheckpointWriter
from mtcl.training.early_stopping import EarlyStopping
from mtcl.training.ema import ModelEma
from mtcl.training.feature_filling import FeatureFiller
from mtcl.training.loss_terms import LossTerms
from mtcl.training.measurements import Throughput, read_learning_rates
from mtcl.training.nonfinite import NonFiniteGuard, merge_skipped
from mtcl.training.optimizers import ScheduledOptimizer
from mtcl.training.options import CheckpointPolicy, Regularization, TrainerOptions, ValidationPolicy
from mtcl.training.preemption import PreemptionHandler
from mtcl.training.run_logger import RunLogger, flatten_metrics
from mtcl.training.sharding import ReplicatedWeights
from mtcl.training.step_profiler import StepProfiler
from mtcl.training.train_step import TrainingStep, broadcast_buffers, no_gradient_sync

log = logging.getLogger(__name__)
MAX_IDLE_LOGS = 5  # logged steps in a row without a loss of the regulariser before there is a warning


class Trainer:
    """Trains a model on several tasks, with or without a regulariser.

    Args:
        model: on ``device``.
        tasks: name -> task, each with its loss.
        balancer: turns the loss terms into gradients.
        optimizer: of the model's parameters.
        batches: endless training batches, the first one being that of ``start_step``.
        evaluator: scores the model on the validation data.
        run_logger: takes the losses, metrics and panels.
        folder: the run folder; checkpoints go to its subfolder ``checkpoints``.
        device: where batches are moved to.
        options: of the loop.
        validation: when to validate.
        checkpointing: when to save, and what is saved beside the state.
        regularization: None: the tasks' losses alone. Where its lambda is 0, the regulariser only reports: the training
            is bit-equal to one without it.
        ema: a running mean of the model's weights; where there is one, it is what is validated.
        weights: where the model's weights are; None: all of them in every process.
        feature_fillers: compute what the batches' feature caches lack, before the first step.
        start_step: optimiser steps already taken.
    """

    def __init__(
        self,
        *,
        model: DenseModel,
        tasks: Mapping[str, Task],
        balancer: Balancer,
        optimizer: ScheduledOptimizer,
        batches: Iterable[Batch],
        evaluator: Evaluator,
        run_logger: RunLogger,
        folder: Path,
        device: torch.device,
        options: TrainerOptions,
        validation: ValidationPolicy,
        checkpointing: CheckpointPolicy,
        regularization: Regularization | None = None,
        ema: ModelEma | None = None,
        weights: ReplicatedWeights | None = None,
        feature_fillers: Sequence[FeatureFiller] = (),
        start_step: int = 0,
    ):
        self.model, self.tasks, self.balancer, self.optimizer = model, dict(tasks), balancer, optimizer
        self.batches, self.evaluator, self.run_logger = batches, evaluator, run_logger
        self.folder, self.device = folder, device
        self.options, self.validation, self.checkpointing = options, validation, checkpointing
        self.regularizer = regularization.regularizer if regularization else None
        if self.regularizer is not None:
            self.regularizer.task_loss = options.task_loss
        self.regularizer_optimizer = regularization.optimizer if regularization else None
        self.lambda_ = regularization.lambda_ if regularization else Lambda(0.0, options.max_steps)
        self.head_parameters = regularization.head_parameters if regularization else None
        self.ema, self.feature_fillers = ema, feature_fillers
        self.weights = weights or ReplicatedWeights(model)
        self.weights.attach_optimizer(optimizer.optimizer)
        self.eager_step = self.weights.wrap_parallel(TrainingStep(model, self.regularizer), device)
        if ema is not None:
            ema.start_from(model)
        self.training_step = self.weights.compile(self.eager_step) if options.compile else self.eager_step
        self.regularizer_parameters = [] if self.regularizer is None else list(self.regularizer.parameters())
        self.trained = [*model.parameters(), *self.regularizer_parameters]
        is_fp16 = choose_precision(device, options.precision) == "fp16"
        self.scaler = self.weights.build_scaler(device) if is_fp16 else None
        self.nonfinite_guard = NonFiniteGuard(model, options.max_nonfinite_steps)
        self.reported_overflows = 0  # steps that were skipped because of the loss scale
        self.idle_logs = 0  # logged steps in a row in which the regulariser had no loss
        self.preemption = PreemptionHandler()
        self.checkpoint_writer = CheckpointWriter(RunFolder(folder).checkpoints, checkpointing.asynchronous)
        self.unreadable: set[str] = set()  # messages, one per image that could not be read
        self.reported_unreadable: set[str] = set()
        self.step = start_step
        self.best = math.nan
        self.best_step: int | None = None  # of best.pt
        self.early_stopping = EarlyStopping(validation.patience, validation.higher_is_better)
        self.backbone_hash: str | None = None  # of weights that are not trained; computed when they are first left out
        self.first_evaluation: EvaluationResult | None = None  # before the first step
        self.seconds_per_step = math.nan

    # The loop

    def fit(self) -> EvaluationResult:
        """Train until ``max_steps`` or an early stop, validating and saving on the way; return the final evaluation.

        Raises:
            Preempted: a signal asked for an early end; the state is saved.
            UserError: too many steps were not finite, something could not be written, or early stopping has no score.
        """
        self.model.train()
        for filler in self.feature_fillers:
            filler.fill(self.model, self.device, self.options.precision)
        if self.step == 0 and self.validation.validate_first:
            self.first_evaluation = self.validate(quick=True)
            self.early_stopping.check(self._monitored_score(self.first_evaluation))
        max_steps, evaluation = self.options.max_steps, None
        throughput = Throughput()
        with (
            self.preemption,
            logging_beside_bar(),
            progress_bar(
                total=max_steps, initial=self.step, desc="train", unit="step", disable=distributed.rank() > 0
            ) as bar,
            StepProfiler(self.folder, self.options.profile if distributed.rank() == 0 else None, self.step) as profiler,
        ):
            for batches in self.batches_per_step():
                start = time.perf_counter()
                is_logged = self.step % self.options.log_interval == 0 or self.step + 1 == max_steps
                values = self.train_step(*batches, with_diagnostics=is_logged)
                throughput.count(batches)
                if is_logged:
                    self._log(values, bar, throughput)
                self.step += 1
                self.seconds_per_step = time.perf_counter() - start
                profiler.step()
                bar.update()
                with throughput.pause():
                    evaluation = self._validate_and_save()
                if self.is_finished:
                    break
                if self.preemption.should_stop(self.step):
                    self.save("last")
                    self.checkpoint_writer.wait()
                    raise Preempted(self.step)
        self.checkpoint_writer.wait()
        return self._evaluate_finished_run() if evaluation is None else evaluation

    def batches_per_step(self) -> Iterator[list[Batch]]:
        """Yield the batches of one optimiser step after the other."""
        if self.is_finished:
            return
        stream = iter(self.batches)
        while True:
            batches = [next(stream) for _ in range(self.options.accumulate_grad_batches)]
            for batch in batches:
                self.unreadable.update(batch.get("unreadable", ()))
            yield batches

    def _validate_and_save(self) -> EvaluationResult | None:
        """Do what is due after a step; return the evaluation, if there was one and it is a full one."""
        is_full = self.step >= self.options.max_steps or not self.evaluator.fast_options
        is_due = _is_due(self.step, self.validation.interval)
        evaluation = None
        if is_due or self.step >= self.options.max_steps:
            self._report_problems()
            evaluation = self.validate(quick=not is_full)
            if is_due:
                self._count_validation(evaluation)
            self._save_best(evaluation, is_full)
        if self.is_finished or _is_due(self.step, self.checkpointing.interval):
            self.save("last")
        if _is_due(self.step, self.checkpointing.keep_interval):
            self.save(f"step_{self.step:08d}")
        return evaluation if is_full else None

    @property
    def is_finished(self) -> bool:
        """Are all steps taken, or has early stopping ended the training?"""
        return self.step >= self.options.max_steps or self.is_stopped_early

    @property
    def is_stopped_early(self) -> bool:
        """Has early stopping ended the training before its last step?"""
        return self.step < self.options.max_steps and self.early_stopping.should_stop

    def _count_validation(self, evaluation: EvaluationResult) -> None:
        """Give early stopping the score of a validation that was due.

        The last step's is left out where it is on another scale than the earlier ones.
        """
        monitor = self.validation.monitor
        if self.step < self.options.max_steps or self.evaluator.is_comparable(monitor):
            # Process 0's, so that all processes end at the same step whatever the rounding.
            self.early_stopping.update(distributed.broadcast_object(self._monitored_score(evaluation)))

    def _monitored_score(self, evaluation: EvaluationResult) -> float:
        return flatten_metrics(evaluation.metrics)[self.validation.monitor]

    def _evaluate_finished_run(self) -> EvaluationResult:
        """Evaluate a run without a step left to take: it was resumed at its end, or its last validation was quick."""
        evaluation = self.evaluator.run(self.evaluation_model())
        if distributed.rank() == 0:
            self.run_logger.log_panels(self.step, evaluation.visual_samples, self.tasks)
        self._save_best(evaluation, is_full=True)
        self.save("last")
        self.checkpoint_writer.wait()
        return evaluation

    # One step

    def train_step(self, *batches: Batch, with_diagnostics: bool = False) -> dict[str, Tensor]:
        """Take one optimiser step on the mean loss over ``batches``; skip it where a loss or gradient is not finite.

        Args:
            batches: as the data loader gives them.
            with_diagnostics: also sum up the losses, count the labelled images of the last batch, and compare the
                gradients of the tasks and the regulariser at the task features.

        Returns:
            detached scalars on the device by name: each loss, and for the diagnostics ``labelled_images/TASK`` and
            ``gradient/...``.
        """
        values_per_batch: list[dict[str, Tensor]] = []
        is_finite: dict[str, Tensor] = {}
        if self.scaler is not None:
            self.balancer.loss_scale = self.scaler.scale(torch.ones((), device=self.device))
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)
            with nullcontext() if is_last else no_gradient_sync(self.eager_step):
                values = self.accumulate_gradients(
                    batch, len(batches), is_finite, with_diagnostics and is_last, with_total=with_diagnostics
                )
            values_per_batch.append(values)
        self.balancer.finish_step(self.step)
        self.weights.collect_gradients()
        may_overflow = self._unscale_gradients(is_finite)
        is_finite |= self._clip_gradients()
        ids = [meta.id for batch in batches for meta in batch["meta"]]
        skip = self.nonfinite_guard.record(self.step, ids, is_finite, may_overflow)
        self.optimizer.step(self.step, skip)
        self.optimizer.zero_grad()
        if self.regularizer_optimizer is not None:
            self.regularizer_optimizer.step(self.step, skip)
            self.regularizer_optimizer.zero_grad()
        if self.scaler is not None:
            self.scaler.update()
        if self.balancer.measures_progress:
            self.balancer.observe_progress(self._recompute_task_losses(batches))
        self.balancer.update(self.step, skip)
        if self.ema is not None:
            self.ema.update(self.model)
        if len(batches) == 1:
            return values
        first, last = values_per_batch[0], values_per_batch[-1]
        return last | {name: torch.stack([values[name] for values in values_per_batch]).mean() for name in first}

    def accumulate_gradients(
        self,
        batch: Batch,
        num_batches: int,
        is_finite: dict[str, Tensor],
        with_diagnostics: bool,
        with_total: bool = False,
    ) -> dict[str, Tensor]:
        """Run forward and backward pass of one of the ``num_batches`` batches of a step.

        Args:
            batch: one batch.
            num_batches: the losses are divided by it.
            is_finite: "loss of NAME" -> whether it is finite in all batches up to here; updated.
            with_diagnostics: as in :meth:`train_step`.
            with_total: also return the total loss: the sum of all terms, each times its fixed weight, before any
                balancing.

        Returns:
            detached scalars by name, as :meth:`train_step`; the total is ``loss``.
        """
        image, labels = prepare_input(batch, self.model, self.device)
        with_diagnostics = with_diagnostics and bool(self.tasks)
        draw = None
        if self.regularizer is not None:
            draw = self.regularizer.sample(self.step, [meta.row_id for meta in batch["meta"]]).to(self.device)
            self.regularizer.observe_labels(labels, draw)
        lambda_ = self.lambda_(self.step)
        needs_gradients = lambda_ > 0 and (
            with_diagnostics or self.lambda_.measures_gradients(self.step) or self.head_parameters is not None
        )
        # Inside a compiled step there is no graph from which to take gradients at the features: those are run eagerly.
        step = self.eager_step if needs_gradients else self.training_step
        with autocast(self.device, self.options.precision):
            teacher = self._predict_by_teacher(image, batch["meta"]) if lambda_ > 0 else None
            output, regularizer_output = step(image, labels, draw, lambda_ > 0, teacher)
        head_gradients: list[tuple[nn.Parameter, Tensor]] = []
        head_loss: Tensor | None = None  # trains the heads alone, so it is no term of the loss
        first = output  # the rows that have the tasks' losses
        if self.options.task_loss.views == "first":
            first, labels = take_first_rows(output, labels, sum(meta.view == 0 for meta in batch["meta"]))
        auxiliary_losses = self.model.auxiliary_losses(first, labels)
        loss = task_loss = LossTerms(self.task_losses(first, labels) | auxiliary_losses)
        values = {name: term.detach() for name, term in task_loss.items()}
        if regularizer_output is not None:
            values["regularizer"] = regularizer_output.loss.detach()
        for name, value in values.items():
            is_finite[f"loss of {name}"] = value.isfinite() & is_finite.get(f"loss of {name}", True)
        if with_diagnostics:
            values |= self._count_labels(values, labels)
        if regularizer_output is not None and lambda_ > 0:
            regularizer_loss, gradients = self._weigh_regularizer(
                task_loss, regularizer_output, output, lambda_, with_diagnostics
            )
            values |= gradients
            if self.head_parameters is None:
                loss = task_loss + lambda_ * regularizer_loss
            else:
                head_loss = lambda_ * regularizer_loss["regularizer"]
                head_gradients = self._differentiate_heads(self.balancer.scale_loss(head_loss / num_batches))
        elif self.regularizer_parameters and distributed.world_size() > 1:  # DDP waits for every parameter's gradient
            loss = task_loss + {"idle": 0.0 * torch.stack([p.sum() for p in self.regularizer_parameters]).sum()}
        if with_total and loss:
            values["loss"] = self._add_terms(loss, head_loss)
        if num_batches > 1:
            loss = loss / num_batches
        with freeze_running_statistics(self.model) if self.options.grad_checkpointing else nullcontext():
            self.balancer.backward(loss, self.trained, num_batches)
        for parameter, gradient in head_gradients:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return values

    def _add_terms(self, loss: Mapping[str, Tensor], head_loss: Tensor | None) -> Tensor:
        """Return the detached sum of the losses, each times its fixed weight, and of the loss of the heads alone."""
        terms = [self.balancer.weights.get(name, 1.0) * term.detach() for name, term in loss.items()]
        return torch.stack(terms if head_loss is None else [*terms, head_loss.detach()]).sum()

    @torch.no_grad()
    def _predict_by_teacher(self, image: Tensor | EncodedImage, meta: Sequence[SampleMeta]) -> DenseOutput | None:
        """Return predictions of the running mean of the weights, NaN in padding, for a regulariser that uses them.

        Features are those that the regulariser reads, or none. A regulariser with networks of its own runs these.
        """
        if self.regularizer is None:
            return None
        if isinstance(image, Tensor):  # networks of its own see images, not cached features
            output = self.regularizer.run_teachers(image, self.model.mean, self.model.std)
            if output is not None:
                return output
        if not self.regularizer.uses_teacher:
            return None
        assert self.ema is not None
        self.ema.copy_buffers(self.model)
        model = self.ema.model.eval()
        if self.regularizer.reads_teacher_features:
            output = model(image)._replace(intermediate=[])
        else:
            predictions = model.predict(image)
            height, width = next(iter(predictions.values())).shape[-2:]
            output = DenseOutput(predictions, {}, [], (height, width))
        frame = next(iter(output.predictions.values())).shape[-2:]
        if all(sample.native_size == tuple(frame) for sample in meta):
            return output
        mask = image_mask(meta, frame, lambda x: x.to(self.device, non_blocking=True))
        masked = {name: prediction.masked_fill(~mask, math.nan) for name, prediction in output.predictions.items()}
        return output._replace(predictions=masked)

    def _differentiate_heads(self, loss: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the gradient of a loss for the tasks' own and the regulariser's parameters, not for shared ones."""
        parameters = [*(self.head_parameters or ()), *self.regularizer_parameters]
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return [(p, gradient) for p, gradient in zip(parameters, gradients) if gradient is not None]

    def task_losses(self, output: DenseOutput, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each task's loss, with those of its intermediate predictions and the model's own errors of it."""
        weight = self.options.task_loss.intermediate_weight
        image_weights = weigh_images(self.tasks, labels, self.options.task_loss.image_weighting)
        losses = {
            name: compute_task_loss(name, task, output, labels[name], weight, image_weights[name])
            for name, task in self.tasks.items()
        }
        for name, (errors, is_valid) in self.model.compute_task_errors(output, labels).items():
            losses[name] = losses[name] + masked_mean(errors, is_valid, image_weights[name])
        return losses

    @torch.no_grad()
    def _recompute_task_losses(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Return each task's loss by the current weights, the mean over ``batches``; running statistics stay."""
        losses = []
        with freeze_running_statistics(self.model):
            for batch in batches:
                image, labels = prepare_input(batch, self.model, self.device)
                with autocast(self.device, self.options.precision):
                    output = self.model(image, labels) if self.model.reads_labels else self.model(image)
                if self.options.task_loss.views == "first":
                    output, labels = take_first_rows(output, labels, sum(meta.view == 0 for meta in batch["meta"]))
                losses.append(self.task_losses(output, labels))
        return {name: torch.stack([batch_losses[name] for batch_losses in losses]).mean() for name in self.tasks}

    def _weigh_regularizer(
        self,
        task_loss: Mapping[str, Tensor],
        regularizer_output: RegularizerOutput,
        output: DenseOutput,
        lambda_: float,
        with_diagnostics: bool,
    ) -> tuple[LossTerms, dict[str, Tensor]]:
        """Return the regulariser's loss that lambda multiplies, and on request the gradients at the task features."""
        assert self.regularizer is not None
        features = output.features[self.regularizer.feature]
        measures_gradients = self.lambda_.measures_gradients(self.step)
        if measures_gradients or with_diagnostics:
            with freeze_running_statistics(self.model) if self.options.grad_checkpointing else nullcontext():
                weights = self.balancer.weigh({name: task_loss[name] for name in self.tasks})
            total = torch.stack([weights[name] * task_loss[name] for name in self.tasks]).sum()
        if measures_gradients:
            losses = {name: self.balancer.scale_loss(loss) for name, loss in regularizer_output.losses.items()}
            self.lambda_.update(self.balancer.scale_loss(total), losses, features)
        regularizer_loss = self.lambda_.rescale(regularizer_output.loss, regularizer_output.losses)
        gradients = {}
        if with_diagnostics:
            gradients = compare_feature_gradients(total, lambda_ * regularizer_loss, features, self.balancer.loss_scale)
        return LossTerms(regularizer=regularizer_loss), {f"gradient/{name}": value for name, value in gradients.items()}

    def _count_labels(self, values: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the number of images with a label of each task, and the tasks' losses, NaN where that number is 0.

        Images of the batch in all processes are counted.
        """
        num_images = distributed.all_reduce_sum(find_labelled_images(self.tasks, labels).sum(dim=1).float())
        losses = {n: torch.where(num_images[i] > 0, values[n], math.nan) for i, n in enumerate(self.tasks)}
        return losses | {f"labelled_images/{name}": num_images[i] for i, name in enumerate(self.tasks)}

    def _unscale_gradients(self, is_finite: Mapping[str, Tensor]) -> Tensor | None:
        """Divide the gradients by the loss scale; return whether, if they are not finite, it may be too large.

        Args:
            is_finite: of the losses. A loss overflows whatever its scale, and at a scale of 1 so does a gradient.
        """
        if self.scaler is None:
            return None
        for optimizer in (self.optimizer, self.regularizer_optimizer):
            if optimizer is not None:
                self.scaler.unscale_(optimizer.optimizer)
        assert self.balancer.loss_scale is not None
        return torch.stack(list(is_finite.values())).all() & (self.balancer.loss_scale > 1)

    def _clip_gradients(self) -> dict[str, Tensor]:
        """Clip the model's gradient; return which gradients are finite."""
        grads = [p.grad for p in self.weights.parameters if p.grad is not None]
        norm = self.weights.global_norm(torch.nn.utils.get_total_norm(grads))
        is_finite = {"gradient": norm.isfinite()}
        parameters = self.regularizer.parameters() if self.regularizer is not None else ()
        if regularizer_grads := [p.grad for p in parameters if p.grad is not None]:
            is_finite["gradient of the regulariser"] = torch.nn.utils.get_total_norm(regularizer_grads).isfinite()
        if self.options.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.weights.parameters, self.options.clip_norm, norm)
        return is_finite

    # Validation

    def validate(self, quick: bool) -> EvaluationResult:
        """Evaluate the current state and log its metrics and panels.

        Args:
            quick: leave out or shorten metrics that take long.
        """
        evaluation = self.evaluator.run(self.evaluation_model(), fast=quick)
        if distributed.rank() == 0:
            self.run_logger.log_scalars(self.step, "val", flatten_metrics(evaluation.metrics))
            self.run_logger.log_panels(self.step, evaluation.visual_samples, self.tasks)
        return evaluation

    def evaluation_model(self) -> DenseModel:
        """Return what is validated: the running mean of the weights where there is one, else the model."""
        self._synchronize_buffers()
        return self.weights.unsharded_copy(self.model if self.ema is None else self.ema.model)

    def _synchronize_buffers(self) -> None:
        """Give process 0's buffers to all processes, and to the running mean of the weights."""
        broadcast_buffers(self.model)
        if self.ema is not None:
            self.ema.copy_buffers(self.model)

    # State

    @property
    def num_skipped_steps(self) -> int:
        """Steps that were skipped since the start of the training because they were not finite."""
        return self.nonfinite_guard.count

    def checkpoint(self) -> Checkpoint:
        """Return everything that a resumed run needs. All processes must call it; process 0 has all of it."""
        ema = None
        if self.ema is not None:
            ema = {"model": self.weights.state(self.ema.model), "updates": self.ema.updates}
        regularizer_optimizer = self.regularizer_optimizer
        checkpoint = Checkpoint(
            model=self.weights.state(self.model),
            config=dict(self.checkpointing.config),
            step=self.step,
            meta={
                **self.checkpointing.meta,
                "best": self.best,
                "best_step": self.best_step,
                "early_stopping": self.early_stopping.state_dict(),
                "skipped": self.num_skipped_steps,
                "overflows": self.nonfinite_guard.num_overflows,
            },
            ema=ema,
            regularizer=None if self.regularizer is None else self.regularizer.state_dict(),
            gradient_norm_weight=self.lambda_.state_dict(),
            balancer=self.balancer.state_dict(),
            scaler=None if self.scaler is None else self.scaler.state_dict(),
            optimizer={
                "model": self.weights.optimizer_state(self.optimizer),
                "regularizer": None if regularizer_optimizer is None else regularizer_optimizer.optimizer.state_dict(),
            },
            rng=distributed.all_gather_object(rng_state(self.device)),
        )
        source = self.checkpointing.backbone
        if source is None or distributed.rank() > 0:
            return checkpoint
        self.backbone_hash = self.backbone_hash or hash_backbone(checkpoint.model)
        return leave_out_backbone(checkpoint, {**source, "sha256": self.backbone_hash})

    def _add_backbone(self, weights: Mapping[str, Tensor], checkpoint: Checkpoint) -> Mapping[str, Tensor]:
        """Return weights of a checkpoint, with those of a backbone that it leaves out, as the model has them."""
        if "backbone" not in checkpoint.meta:
            return weights
        state = self.weights.state(self.model)
        return {**{name: value for name, value in state.items() if is_base_weight(name)}, **weights}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint. What it has no state of starts afresh, after a warning."""
        self.weights.load(self.model, self._add_backbone(checkpoint.model, checkpoint))
        self.weights.load_optimizer(self.optimizer, checkpoint.optimizer["model"])
        if self.regularizer is not None and self.regularizer_optimizer is not None:
            if checkpoint.regularizer is None:
                log.warning("the checkpoint was trained without a regulariser: its projectors start afresh")
            else:
                self.regularizer.load_state_dict(checkpoint.regularizer)
                self.regularizer_optimizer.load(checkpoint.optimizer["regularizer"])
        self.lambda_.load_state_dict(checkpoint.gradient_norm_weight)
        self.balancer.load_state_dict(checkpoint.balancer)
        if self.scaler is not None:
            if checkpoint.scaler is None:
                log.warning("the checkpoint was not trained in fp16: the loss scale starts afresh")
            else:
                self.scaler.load_state_dict(dict(checkpoint.scaler))
        if RunFolder(self.folder).best_checkpoint.is_file():  # else the run continues in another folder
            self.best, self.best_step = checkpoint.meta["best"], checkpoint.meta.get("best_step")
        self.early_stopping.load_state_dict(checkpoint.meta.get("early_stopping"))
        self.step = checkpoint.step
        self._restore_rng(checkpoint)
        if self.ema is not None:
            if checkpoint.ema is None:
                log.warning("the checkpoint has no running mean of the weights: it starts from its weights")
            else:
                self.ema.updates = checkpoint.ema["updates"]
            self.weights.load(self.ema.model, self._add_backbone(checkpoint.weights, checkpoint))
        self.nonfinite_guard = NonFiniteGuard(self.model, self.options.max_nonfinite_steps)
        self.nonfinite_guard.count = checkpoint.meta.get("skipped", 0)
        self.reported_overflows = self.nonfinite_guard.num_overflows = checkpoint.meta.get("overflows", 0)

    def _restore_rng(self, checkpoint: Checkpoint) -> None:
        states = checkpoint.rng if isinstance(checkpoint.rng, list) else [checkpoint.rng]
        num_processes = distributed.world_size()
        if len(states) == num_processes:
            set_rng_state(states[distributed.rank()], self.device)
        else:
            log.warning(
                "the checkpoint is of %d processes, this run of %d: dropout draws other random numbers than it would "
                "with the same number of processes",
                len(states),
                num_processes,
            )

    def save(self, name: str) -> None:
        """Save the state as checkpoint ``name``.

        Raises:
            UserError: weights are not finite, or too many steps were not; nothing is written then.
        """
        self._report_problems()
        parameters = [p for p in self.weights.parameters if p.numel()]
        largest = self.weights.global_norm(torch.nn.utils.get_total_norm(parameters, norm_type=math.inf))
        if not math.isfinite(largest.item()):
            raise UserError(
                f"at step {self.step} the model has weights that are NaN or infinite; lower the learning rate or the "
                "norm at which gradients are clipped (the checkpoints hold the last good state)"
            )
        self._synchronize_buffers()
        checkpoint = self.checkpoint()
        if distributed.rank() == 0:
            self.checkpoint_writer.save(name, checkpoint)

    def _save_best(self, evaluation: EvaluationResult, is_full: bool) -> None:
        """Save ``best`` if the monitored metric has improved.

        A full evaluation competes with earlier quick ones only where both are on one scale.
        """
        monitor = self.validation.monitor
        if is_full and not math.isnan(self.best) and not self.evaluator.is_comparable(monitor):
            return
        value = self._monitored_score(evaluation)
        is_better = value > self.best if self.validation.higher_is_better else value < self.best
        if math.isnan(self.best) or is_better:
            self.best, self.best_step = value, self.step
            self.save("best")

    # Records

    def _log(self, values: Mapping[str, Tensor], bar: Any, throughput: Throughput) -> None:
        """Read the step's scalars from the device, once, and log their means over all processes.

        Args:
            values: of :meth:`train_step`.
            bar: of :func:`mtcl.progress.progress_bar`; shows the losses.
            throughput: has counted the step; it is read after the device, and goes to the loggers alone.
        """
        sums = distributed.all_reduce_sum(torch.stack([value.float() for value in values.values()]))
        numbers = dict(zip(values, (sums / distributed.world_size()).tolist()))
        speed = throughput.read()
        losses = {name: value for name, value in numbers.items() if "/" not in name}
        self._report_problems()
        if distributed.rank() > 0:
            return
        lr = self.optimizer.optimizer.param_groups[0]["lr"]
        self.run_logger.log_scalars(self.step, "train", {**losses, "lr": lr})
        if self.tasks:
            num_images = {name: numbers[f"labelled_images/{name}"] for name in self.tasks}
            self.run_logger.log_scalars(self.step, "labelled_images", num_images)
        if self.scaler is not None:
            scale = {"scale": self.scaler.get_scale(), "skipped_steps": self.nonfinite_guard.num_overflows}
            self.run_logger.log_scalars(self.step, "loss_scale", scale)
        if self.regularizer is not None:
            self._report_idle_regularizer(numbers.get("regularizer", math.nan))
            gradients = {name: value for name, value in numbers.items() if name.startswith("gradient/")}
            self.run_logger.log_scalars(self.step, "regularizer", {**self.regularizer.summary(), **gradients})
        if summary := self.balancer.summary():
            scalars = torch.stack([torch.as_tensor(value, device=self.device) for value in summary.values()])
            self.run_logger.log_scalars(self.step, "balancing", dict(zip(summary, scalars.tolist())))
        extra = None if self.regularizer_optimizer is None else self.regularizer_optimizer.optimizer
        rates = read_learning_rates(self.model, self.optimizer.optimizer, extra)
        self.run_logger.log_curves(self.step, "lr", rates)
        self.run_logger.log_curves(self.step, "system", {**speed, "peak_memory_gib": self.peak_memory()})
        losses = {"loss": losses.pop("loss", math.nan), **losses}
        bar.set_postfix_str(" ".join(f"{name} {value:.3f}" for name, value in losses.items() if not math.isnan(value)))

    def _report_idle_regularizer(self, loss: float) -> None:
        """Warn where the regulariser's loss was exactly 0 in several logged steps in a row while lambda is not."""
        self.idle_logs = self.idle_logs + 1 if loss == 0 and self.lambda_(self.step) > 0 else 0
        if self.idle_logs == MAX_IDLE_LOGS:
            log.warning(
                "step %d: the loss of the regulariser was 0 in the last %d logged steps, so it changes nothing: see "
                "what it finds in the records regularizer of %s, or set regularizer=none",
                self.step,
                MAX_IDLE_LOGS,
                self.run_logger.log,
            )

    def _report_problems(self) -> None:
        """Log the steps that were skipped and the images that could not be read since the last call.

        Raises:
            UserError: too many consecutive steps were skipped.
        """
        skipped = self.nonfinite_guard.flush()
        if distributed.world_size() > 1:  # all processes skip the same steps, each knows its own images
            skipped = [merge_skipped(parts) for parts in zip(*distributed.all_gather_object(skipped))]
            self.unreadable.update(*distributed.all_gather_object(self.unreadable))
        num_overflows, self.reported_overflows = (
            self.nonfinite_guard.num_overflows - self.reported_overflows,
            self.nonfinite_guard.num_overflows,
        )
        if num_overflows and self.scaler is not None:
            log.info(
                "%d steps up to step %d were skipped because gradients overflowed in fp16 (%d since the start); "
                "the loss scale is now %g",
                num_overflows,
                self.step,
                self.reported_overflows,
                self.scaler.get_scale(),
            )
        if distributed.rank() > 0:
            self.nonfinite_guard.check()
            return
        for step, terms, ids in skipped:
            log.warning("step %d was skipped: the %s was not finite", step, ", the ".join(terms))
            self.run_logger.log_event(step, "skipped", {"terms": terms, "ids": ids})
        self._report_unreadable(sorted(self.unreadable - self.reported_unreadable))
        try:
            self.nonfinite_guard.check()
        except UserError:
            self.checkpoint_writer.wait()
            raise

    def _report_unreadable(self, messages: Sequence[str]) -> None:
        for message in messages:
            log.warning("%s (skipped; %d so far)", message, len(self.unreadable))
            self.run_logger.log_event(self.step, "unreadable", {"message": message})
        self.reported_unreadable |= self.unreadable

    def peak_memory(self) -> float:
        """Return the peak memory up to now, in GiB."""
        return peak_memory(self.device)


def take_first_rows(
    output: DenseOutput, labels: Mapping[str, Tensor], count: int
) -> tuple[DenseOutput, dict[str, Tensor]]:
    """Return the first ``count`` rows of a batch's predictions, features and labels."""

    def take(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: rows[:count] for name, rows in maps.items()}

    first = output._replace(
        predictions=take(output.predictions),
        features={name: take(maps) for name, maps in output.features.items()},
        intermediate=[take(maps) for maps in output.intermediate],
    )
    return first, take(labels)


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
