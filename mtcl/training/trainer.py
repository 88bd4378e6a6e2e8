"""The training loop: where a picture's walk and a label's walk meet."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mtcl import distributed
from mtcl.data import Batch, prepare_batch
from mtcl.errors import UserError
from mtcl.evaluation.evaluator import EvaluationResult, Evaluator
from mtcl.models import DenseModel, DenseOutput
from mtcl.regularizers import GradientNormWeight, Regularizer, RegularizerOutput
from mtcl.regularizers.diagnostics import compare_feature_gradients, gradient_norms
from mtcl.runtime import autocast, freeze_running_statistics, peak_memory, rng_state, set_rng_state
from mtcl.tasks.base import Task
from mtcl.training.balancing import Balancer
from mtcl.training.checkpoint import CheckpointWriter
from mtcl.training.ema import ModelEma
from mtcl.training.nonfinite import NonFiniteGuard, merge_skipped
from mtcl.training.optimizers import Schedule, ScheduledOptimizer
from mtcl.training.preemption import Preempted, PreemptionHandler
from mtcl.training.run_logger import RunLogger, flatten_metrics
from mtcl.training.sharding import ReplicatedWeights
from mtcl.training.train_step import TrainingStep, broadcast_buffers, no_gradient_sync

log = logging.getLogger(__name__)


class Trainer:
    """Trains ``model`` on ``tasks``, with a regulariser or without one. Its attributes are what can be swapped.

    Args:
        regularizer: None switches it off; ``weight`` is its lambda as a function of the step. Where that is 0 it only
            watches: the run is bit-equal to one without it.
        share: ``weight`` is then the part that the contrast's gradient at F_t has of the task's; None: a plain factor.
        balancer: turns the losses, one per objective, into gradients.
        optimizer: the model's; ``regularizer_optimizer``: the projectors', None without a regulariser.
        batches: endless training batches, from ``start_step`` on.
        evaluator: run every ``val_interval`` steps, before the first step and after the last.
        monitor: ``task/metric`` that decides ``best.pt``; ``higher_is_better`` its direction.
        config, meta: plain containers, stored in the checkpoint beside the state.
        clip_norm: of the model's gradient; None: no clipping. The regulariser's parameters are not counted.
        compile: forward passes go through ``torch.compile``. ``accumulate_grad_batches``: batches per optimiser step.
        ema: a running mean of the model's weights, which is then what is validated.
        weights: where the model's weights are; None: whole, in every process.
        max_nonfinite_steps: so many steps in a row that are not finite end the run.
        async_checkpoints: checkpoints are written beside the training. ``keep_checkpoint_interval``: every so many steps one is kept.
    """

    def __init__(
        self,
        *,
        model: DenseModel,
        tasks: Mapping[str, Task],
        regularizer: Regularizer | None,
        balancer: Balancer,
        optimizer: ScheduledOptimizer,
        regularizer_optimizer: ScheduledOptimizer | None,
        batches: Iterable[Batch],
        evaluator: Evaluator,
        run_logger: RunLogger,
        folder: Path,
        device: torch.device,
        max_steps: int,
        monitor: str,
        higher_is_better: bool,
        config: Mapping[str, Any],
        meta: Mapping[str, Any],
        weight: Schedule = lambda step: 0.0,
        share: GradientNormWeight | None = None,
        precision: str = "auto",
        grad_checkpointing: bool = False,
        compile: bool = False,
        accumulate_grad_batches: int = 1,
        ema: ModelEma | None = None,
        weights: ReplicatedWeights | None = None,
        max_nonfinite_steps: int = 10,
        async_checkpoints: bool = False,
        keep_checkpoint_interval: int | None = None,
        clip_norm: float | None = None,
        val_interval: int | None = None,
        checkpoint_interval: int | None = None,
        log_interval: int = 20,
        start_step: int = 0,
        validate_first: bool = True,
    ):
        self.model, self.tasks, self.regularizer, self.balancer = model, dict(tasks), regularizer, balancer
        self.optimizer, self.regularizer_optimizer = optimizer, regularizer_optimizer
        self.batches, self.evaluator, self.run_logger, self.folder = batches, evaluator, run_logger, folder
        self.device, self.precision, self.clip_norm = device, precision, clip_norm
        self.weights = weights or ReplicatedWeights(model)
        self.weights.attach_optimizer(optimizer.optimizer)
        self.wrapped = self.weights.parallel(TrainingStep(model, regularizer), device)
        self.module = self.weights.compiled(self.wrapped) if compile else self.wrapped
        self.trained = [*model.parameters(), *(regularizer.parameters() if regularizer is not None else ())]
        self.grad_checkpointing = (
            grad_checkpointing  # the model runs parts of its forward pass again in the backward pass
        )
        self.accumulate_grad_batches, self.ema, self.keep_checkpoint_interval = (
            accumulate_grad_batches,
            ema,
            keep_checkpoint_interval,
        )
        self.nonfinite_guard, self.stop = NonFiniteGuard(model, max_nonfinite_steps), PreemptionHandler()
        self.checkpoints = CheckpointWriter(folder / "checkpoints", async_checkpoints)
        self.unreadable: set[str] = set()
        self.told: set[str] = set()
        self.max_steps, self.step, self.log_interval = max_steps, start_step, log_interval
        self.val_interval, self.checkpoint_interval = val_interval, checkpoint_interval
        self.validate_first = validate_first
        self.weight, self.share = weight, share
        self.monitor, self.higher_is_better, self.best = monitor, higher_is_better, math.nan
        self.config, self.meta = dict(config), dict(meta)
        self.first: EvaluationResult | None = None  # before the first step
        self.seconds_per_step = math.nan

    def fit(self) -> EvaluationResult:
        """Train to ``max_steps``, validate, save; the evaluation of the last state."""
        self.model.train()
        if self.step == 0 and self.validate_first:
            self.first = self.validate(quick=True)
        evaluation = None
        quiet = distributed.rank() > 0
        with (
            self.stop,
            tqdm(
                total=self.max_steps,
                initial=self.step,
                desc="train",
                mininterval=0.5,
                dynamic_ncols=True,
                disable=quiet,
            ) as bar,
        ):
            for batches in self._batches():
                began = time.perf_counter()
                logged = self.step % self.log_interval == 0 or self.step + 1 == self.max_steps
                values = self.train_step(*batches, with_diagnostics=logged)
                if logged:
                    self._log(values, bar)
                self.step += 1
                self.seconds_per_step = time.perf_counter() - began
                bar.update()
                done = self.step >= self.max_steps
                if done or _due(self.step, self.val_interval):
                    self._settle()
                    evaluation = self.validate(quick=not done)
                    self._keep_best(evaluation, whole=done)
                if done or _due(self.step, self.checkpoint_interval):
                    self.save("last")
                if _due(self.step, self.keep_checkpoint_interval):
                    self.save(f"step_{self.step:08d}")
                if done:
                    break
                if self.stop.should_stop(self.step):
                    self.save("last")
                    self.checkpoints.wait()
                    raise Preempted(self.step)
        self.checkpoints.wait()
        if evaluation is None:  # resumed at its end: nothing left to train
            evaluation = self.evaluator.run(self.evaluation_model())
            if distributed.rank() == 0:
                self.run_logger.panels(self.step, evaluation.visual_samples, self.tasks)
            self._keep_best(evaluation, whole=True)
            self.save("last")
            self.checkpoints.wait()
        return evaluation

    def _batches(self) -> Iterator[list[Batch]]:
        """The batches of one step after the other."""
        if self.step >= self.max_steps:
            return
        stream = iter(self.batches)
        while True:
            batches = [next(stream) for _ in range(self.accumulate_grad_batches)]
            for batch in batches:
                self.unreadable.update(batch.get("unreadable", ()))
            yield batches

    def train_step(self, *batches: Batch, with_diagnostics: bool = False) -> dict[str, Tensor]:
        """One optimiser step on the mean over ``batches``; detached device scalars by name: each loss, and on request
        the diagnostics' gradients. Nothing takes a step where a loss or the gradient is not finite."""
        parts: list[dict[str, Tensor]] = []
        finite: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with nullcontext() if last else no_gradient_sync(self.wrapped):
                values = self._add_gradients(batch, len(batches), finite, with_diagnostics and last)
            parts.append(values)
        self.balancer.finish_step(self.step)
        self.weights.collect_gradients()
        grads = [p.grad for p in self.weights.parameters if p.grad is not None]
        norm = self.weights.norm(torch.nn.utils.get_total_norm(grads))
        finite["gradient"] = norm.isfinite()
        own = [p.grad for p in self.regularizer.parameters() if p.grad is not None] if self.regularizer else []
        if own:
            finite["gradient of the regulariser"] = torch.nn.utils.get_total_norm(own).isfinite()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.weights.parameters, self.clip_norm, norm)
        skip = self.nonfinite_guard.record(self.step, [meta.id for batch in batches for meta in batch["meta"]], finite)
        self.optimizer.step(self.step, skip)
        self.optimizer.zero_grad()
        if self.regularizer_optimizer is not None:
            self.regularizer_optimizer.step(self.step, skip)
            self.regularizer_optimizer.zero_grad()
        self.balancer.update(self.step, skip)
        if self.ema is not None:
            self.ema.update(self.model)
        return (
            parts[-1] | {n: torch.stack([p[n] for p in parts]).mean() for n in parts[0]} if len(parts) > 1 else values
        )

    def _add_gradients(
        self, batch: Batch, count: int, finite: dict[str, Tensor], with_diagnostics: bool
    ) -> dict[str, Tensor]:
        """One batch of the ``count`` of a step, forward and backward. ``finite`` takes in whether its losses are."""
        image, labels = prepare_batch(batch, self.model.mean, self.model.std, self.device)
        weight, draw = self.weight(self.step), None
        shares = self.share is not None and self.step % self.share.every == 0
        # Between the outputs of a compiled step there is no graph: gradients at the taps are had from an eager one.
        module = self.wrapped if weight > 0 and (shares or with_diagnostics) else self.module
        if self.regularizer is not None:
            draw = self.regularizer.sample(self.step, [meta.id for meta in batch["meta"]]).to(self.device)
        with autocast(self.device, self.precision):
            output, contrast = module(image, labels, draw, weight > 0)
        losses = self.task_losses(output, labels) | self.model.auxiliary_losses(output, labels)
        values = {name: loss.detach() for name, loss in losses.items()}
        if contrast is not None:
            values["contrast"] = contrast.loss.detach()
        for name, value in values.items():
            finite[f"loss of {name}"] = value.isfinite() & finite.get(f"loss of {name}", True)
        if with_diagnostics:  # a batch without a task's labels has no loss to show for it
            seen = distributed.all_reduce_sum(
                torch.stack([task.valid(labels[name]).any() for name, task in self.tasks.items()]).float()
            )
            values |= {n: torch.where(seen[i] > 0, values[n], math.nan) for i, n in enumerate(self.tasks)}
        if contrast is not None and weight > 0:
            term, gradients = self._contrast(losses, contrast, output, weight, shares, with_diagnostics)
            values |= {f"gradient/{name}": value for name, value in gradients.items()}
            losses["contrast"] = term
        elif (
            self.regularizer is not None and distributed.world_size() > 1
        ):  # DDP waits for a gradient of every parameter
            losses["idle"] = 0.0 * torch.stack([p.sum() for p in self.regularizer.parameters()]).sum()
        if count > 1:
            losses = {name: loss / count for name, loss in losses.items()}
        with freeze_running_statistics(self.model) if self.grad_checkpointing else nullcontext():
            self.balancer.backward(losses, self.trained)
        return values

    def _contrast(
        self,
        losses: Mapping[str, Tensor],
        contrast: RegularizerOutput,
        output: DenseOutput,
        weight: float,
        shares: bool,
        with_diagnostics: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrast as it enters the step, and on request its gradients beside the tasks'."""
        assert self.regularizer is not None
        total = torch.stack([self.balancer.weight(name) * losses[name] for name in self.tasks]).sum()
        features, term = output.features[self.regularizer.feature], contrast.loss
        if self.share is not None:
            if shares:
                sum_of_targets = torch.stack(list(contrast.losses.values())).sum()
                self.share.update(gradient_norms(total, features), gradient_norms(sum_of_targets, features))
            term = self.share.total(contrast.losses)
        return weight * term, compare_feature_gradients(total, weight * term, features) if with_diagnostics else {}

    def task_losses(self, output: DenseOutput, labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each task's loss, with those of its intermediate predictions added (factor 1, as InvPT)."""
        losses = {}
        for name, task in self.tasks.items():
            predictions = [output.predictions, *(p for p in output.intermediate if name in p)]
            losses[name] = sum(
                (task.loss(p[name], labels[name]) for p in predictions[1:]),
                start=task.loss(predictions[0][name], labels[name]),
            )
        return losses

    def validate(self, quick: bool) -> EvaluationResult:
        evaluation = self.evaluator.run(self.evaluation_model(), quick=quick)
        if distributed.rank() == 0:
            self.run_logger.log_scalars(self.step, "val", flatten_metrics(evaluation.metrics))
            self.run_logger.panels(self.step, evaluation.visual_samples, self.tasks)
        return evaluation

    def evaluation_model(self) -> DenseModel:
        """What is validated: the model, or the running mean of its weights (``ema``)."""
        self._agree()
        return self.weights.unsharded_copy(self.model if self.ema is None else self.ema.model)

    def _agree(self) -> None:
        """Buffers are those of process 0 everywhere, also beside the running mean."""
        broadcast_buffers(self.model)
        if self.ema is not None:
            self.ema.copy_buffers(self.model)

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, tensors and plain containers only."""
        regularizer, its_optimizer = self.regularizer, self.regularizer_optimizer
        return {
            "model": self.weights.state(self.model),
            "ema": None
            if self.ema is None
            else {"model": self.weights.state(self.ema.model), "updates": self.ema.updates},
            "regularizer": None if regularizer is None else regularizer.state_dict(),
            "share": None if self.share is None else self.share.state_dict(),
            "balancer": self.balancer.state_dict(),
            "optimizer": {
                "model": self.weights.optimizer_state(self.optimizer.optimizer),
                "regularizer": None if its_optimizer is None else its_optimizer.optimizer.state_dict(),
            },
            "schedule": {},  # a function of the step
            "step": self.step,
            "rng": distributed.all_gather_object(rng_state(self.device)),
            "config": self.config,
            "meta": {**self.meta, "best": self.best, "skipped": self.nonfinite_guard.count},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`. A regulariser the checkpoint knows nothing of starts afresh."""
        self.weights.load(self.model, state["model"])
        self.weights.load_optimizer(self.optimizer, state["optimizer"]["model"])
        if self.regularizer is not None and self.regularizer_optimizer is not None:
            if state["regularizer"] is None:
                log.warning("the checkpoint was trained without a regulariser: its projectors start afresh")
            else:
                self.regularizer.load_state_dict(state["regularizer"])
                self.regularizer_optimizer.load(state["optimizer"]["regularizer"])
        if self.share is not None and state.get("share") is not None:
            self.share.load_state_dict(state["share"])
        self.balancer.load_state_dict(state.get("balancer"))
        if (self.folder / "checkpoints" / "best.pt").is_file():  # else the run goes on in another folder
            self.best = state["meta"]["best"]
        self.step = state["step"]
        states = state["rng"] if isinstance(state["rng"], list) else [state["rng"]]
        if len(states) == distributed.world_size():
            set_rng_state(states[distributed.rank()], self.device)
        else:
            log.warning(
                "the checkpoint is of %d processes, this run of %d: dropout is drawn anew",
                len(states),
                distributed.world_size(),
            )
        if self.ema is not None:
            if state.get("ema") is None:
                log.warning("the checkpoint has no running mean of the weights: it starts from its weights")
                self.weights.load(self.ema.model, state["model"])
            else:
                self.weights.load(self.ema.model, state["ema"]["model"])
                self.ema.updates = state["ema"]["updates"]
        self.nonfinite_guard = NonFiniteGuard(self.model, self.nonfinite_guard.limit)
        self.nonfinite_guard.count = state["meta"].get("skipped", 0)

    def save(self, name: str) -> None:
        """Never what has seen a number that is not finite."""
        self._settle()
        parameters = [p for p in self.weights.parameters if p.numel()]
        largest = self.weights.norm(torch.nn.utils.get_total_norm(parameters, norm_type=math.inf))
        if not math.isfinite(largest.item()):
            raise UserError(
                f"weights of the model were not finite by step {self.step}; lower optimizer.lr or trainer.clip_norm "
                "(checkpoints hold the last good state)"
            )
        self._agree()
        state = self.state()
        if distributed.rank() == 0:
            self.checkpoints.save(name, state)

    def _keep_best(self, evaluation: EvaluationResult, whole: bool) -> None:
        """A ``whole`` evaluation competes with earlier quick ones only where both are on one scale."""
        if whole and not math.isnan(self.best) and not self.evaluator.is_comparable(self.monitor):
            return
        value = flatten_metrics(evaluation.metrics)[self.monitor]
        if math.isnan(self.best) or (value > self.best if self.higher_is_better else value < self.best):
            self.best = value
            self.save("best")

    def _log(self, values: Mapping[str, Tensor], bar: tqdm) -> None:
        """Read the step's scalars from the device, once, and write them down."""
        numbers = dict(
            zip(
                values,
                (
                    distributed.all_reduce_sum(torch.stack([v.float() for v in values.values()]))
                    / distributed.world_size()
                ).tolist(),
            )
        )
        losses = {name: value for name, value in numbers.items() if "/" not in name}
        self._settle()
        if distributed.rank() > 0:
            return
        rate = self.optimizer.optimizer.param_groups[0]["lr"]
        self.run_logger.log_scalars(self.step, "train", {**losses, "lr": rate})
        if self.regularizer is not None:
            gradients = {name: value for name, value in numbers.items() if "/" in name}
            self.run_logger.log_scalars(self.step, "contrast", {**self.regularizer.summary(), **gradients})
        if balancing := self.balancer.summary():
            read = torch.stack([torch.as_tensor(value, device=self.device) for value in balancing.values()]).tolist()
            self.run_logger.log_scalars(self.step, "balancing", dict(zip(balancing, read)))
        bar.set_postfix_str(" ".join(f"{name} {value:.3f}" for name, value in losses.items() if not math.isnan(value)))

    def _settle(self) -> None:
        """Write down which steps were skipped since the last time, and which pictures could not be read."""
        skipped = self.nonfinite_guard.flush()
        if distributed.world_size() > 1:  # all skip the same steps, each has its own pictures
            skipped = [merge_skipped(parts) for parts in zip(*distributed.all_gather_object(skipped))]
            self.unreadable.update(*distributed.all_gather_object(self.unreadable))
        if distributed.rank() > 0:
            self.nonfinite_guard.check()
            return
        for step, terms, ids in skipped:
            log.warning("step %d was skipped: the %s was not finite", step, ", the ".join(terms))
            self.run_logger.log_event(step, "skipped", {"terms": terms, "ids": ids})
        for message in sorted(self.unreadable - self.told):
            log.warning("%s (skipped; %d so far)", message, len(self.unreadable))
            self.run_logger.log_event(self.step, "unreadable", {"message": message})
        self.told |= self.unreadable
        try:
            self.nonfinite_guard.check()
        except UserError:
            self.checkpoints.wait()
            raise

    def memory(self) -> float:
        """Peak memory so far, GiB."""
        return peak_memory(self.device)


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
