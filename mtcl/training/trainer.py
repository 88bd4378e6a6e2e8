"""The training loop: where a picture's walk and a label's walk meet."""

import logging
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mtcl.contrastive import GradientShare, Regularizer, RegularizerOutput
from mtcl.contrastive.diagnostics import gradient_norms, gradients_at_taps
from mtcl.data import Batch, prepare
from mtcl.errors import UserError
from mtcl.models import DenseModel, DenseOutput
from mtcl.tasks.base import Task
from mtcl.training.balancer import Balancer
from mtcl.training.checkpoint import save_checkpoint
from mtcl.training.evaluator import Evaluation, Evaluator
from mtcl.training.optim import Schedule, ScheduledOptimizer
from mtcl.training.recorder import Recorder, flat
from mtcl.training.runtime import autocast, peak_memory, rng_state, running_statistics_kept, set_rng_state

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
        recorder: Recorder,
        folder: Path,
        device: torch.device,
        max_steps: int,
        monitor: str,
        higher_is_better: bool,
        config: Mapping[str, Any],
        meta: Mapping[str, Any],
        weight: Schedule = lambda step: 0.0,
        share: GradientShare | None = None,
        precision: str = "auto",
        recompute: bool = False,
        clip_norm: float | None = None,
        val_interval: int | None = None,
        checkpoint_interval: int | None = None,
        log_interval: int = 20,
        start_step: int = 0,
        validate_first: bool = True,
    ):
        self.model, self.tasks, self.regularizer, self.balancer = model, dict(tasks), regularizer, balancer
        self.optimizer, self.regularizer_optimizer = optimizer, regularizer_optimizer
        self.batches, self.evaluator, self.recorder, self.folder = batches, evaluator, recorder, folder
        self.device, self.precision, self.clip_norm = device, precision, clip_norm
        self.recompute = recompute  # the model runs parts of its forward pass again in the backward pass
        self.max_steps, self.step, self.log_interval = max_steps, start_step, log_interval
        self.val_interval, self.checkpoint_interval = val_interval, checkpoint_interval
        self.validate_first = validate_first
        self.weight, self.share = weight, share
        self.monitor, self.higher_is_better, self.best = monitor, higher_is_better, math.nan
        self.config, self.meta = dict(config), dict(meta)
        self.first: Evaluation | None = None  # before the first step
        self.seconds_per_step = math.nan
        self.broken: dict[str, Tensor] = {}  # what was watched -> was it ever not finite? on the device

    def fit(self) -> Evaluation:
        """Train to ``max_steps``, validate, save; the evaluation of the last state."""
        self.model.train()
        if self.step == 0 and self.validate_first:
            self.first = self.validate(quick=True)
        evaluation = None
        with tqdm(total=self.max_steps, initial=self.step, desc="train", mininterval=0.5, dynamic_ncols=True) as bar:
            for batch in self.batches if self.step < self.max_steps else ():
                began = time.perf_counter()
                logged = self.step % self.log_interval == 0 or self.step + 1 == self.max_steps
                values = self.train_step(batch, with_diagnostics=logged)
                if logged:
                    self._log(values, bar)
                self.step += 1
                self.seconds_per_step = time.perf_counter() - began
                bar.update()
                done = self.step >= self.max_steps
                if done or _due(self.step, self.val_interval):
                    self._check_finite()
                    evaluation = self.validate(quick=not done)
                    self._keep_best(evaluation, whole=done)
                if done or _due(self.step, self.checkpoint_interval):
                    self._check_finite()
                    self.save("last")
                if done:
                    break
        if evaluation is None:  # resumed at its end: nothing left to train
            evaluation = self.evaluator.run(self.model)
            self.recorder.panels(self.step, evaluation.shown, self.tasks)
            self._keep_best(evaluation, whole=True)
            self.save("last")
        return evaluation

    def train_step(self, batch: Batch, with_diagnostics: bool = False) -> dict[str, Tensor]:
        """One optimiser step; detached device scalars by name: each loss, and on request the diagnostics' gradients."""
        image, labels = prepare(batch, self.model.mean, self.model.std, self.device)
        with autocast(self.device, self.precision):
            output = self.model(image)
        weight, contrast = self.weight(self.step), None
        if self.regularizer is not None:
            draw = self.regularizer.sample(self.step, [meta.id for meta in batch["meta"]]).to(self.device)
            # With weight 0 the model's graph, and so its gradient, stays untouched. Before the tasks' losses: backward
            # goes the other way round, and the contrast's gradient maps then fit below the peak of the tasks'.
            with torch.set_grad_enabled(weight > 0):
                contrast = self.regularizer.penalty(output, labels, draw)
        losses = self.task_losses(output, labels) | self.model.auxiliary_losses(output, labels)
        values = {name: loss.detach() for name, loss in losses.items()}
        watched = {f"loss of {name}": value for name, value in values.items()}
        if with_diagnostics:  # a batch without a task's labels has no loss to show for it
            values |= {n: torch.where(t.valid(labels[n]).any(), values[n], math.nan) for n, t in self.tasks.items()}
        if contrast is not None:
            values["contrast"] = watched["loss of contrast"] = contrast.loss.detach()
            if weight > 0:
                term, gradients = self._contrast(losses, contrast, output, weight, with_diagnostics)
                values |= {f"gradient/{name}": value for name, value in gradients.items()}
                losses["contrast"] = term
        with running_statistics_kept(self.model) if self.recompute else nullcontext():
            self.balancer.backward(losses, self.model.shared_parameters())
        if self.clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            watched["norm of the gradient"] = norm
        for name, value in watched.items():
            bad = ~value.isfinite()
            self.broken[name] = bad | self.broken[name] if name in self.broken else bad
        self.optimizer.step(self.step)
        self.optimizer.zero_grad()
        if self.regularizer_optimizer is not None:
            self.regularizer_optimizer.step(self.step)
            self.regularizer_optimizer.zero_grad()
        return values

    def _contrast(
        self,
        losses: Mapping[str, Tensor],
        contrast: RegularizerOutput,
        output: DenseOutput,
        weight: float,
        with_diagnostics: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrast as it enters the step, and on request its gradients beside the tasks'."""
        assert self.regularizer is not None
        total = torch.stack([task.weight * losses[name] for name, task in self.tasks.items()]).sum()
        taps, term = output.taps[self.regularizer.tap], contrast.loss
        if self.share is not None:
            if self.step % self.share.every == 0:
                sum_of_targets = torch.stack(list(contrast.losses.values())).sum()
                self.share.update(gradient_norms(total, taps), gradient_norms(sum_of_targets, taps))
            term = self.share.total(contrast.losses)
        return weight * term, gradients_at_taps(total, weight * term, taps) if with_diagnostics else {}

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

    def validate(self, quick: bool) -> Evaluation:
        evaluation = self.evaluator.run(self.model, quick=quick)
        self.recorder.scalars(self.step, "val", flat(evaluation.metrics))
        self.recorder.panels(self.step, evaluation.shown, self.tasks)
        return evaluation

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, tensors and plain containers only."""
        regularizer, its_optimizer = self.regularizer, self.regularizer_optimizer
        return {
            "model": self.model.state_dict(),
            "ema": None,
            "regularizer": None if regularizer is None else regularizer.state_dict(),
            "share": None if self.share is None else self.share.state_dict(),
            "optimizer": {
                "model": self.optimizer.optimizer.state_dict(),
                "regularizer": None if its_optimizer is None else its_optimizer.optimizer.state_dict(),
            },
            "schedule": {},  # a function of the step
            "step": self.step,
            "rng": rng_state(self.device),
            "config": self.config,
            "meta": {**self.meta, "best": self.best},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`. A regulariser the checkpoint knows nothing of starts afresh."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load(state["optimizer"]["model"])
        if self.regularizer is not None and self.regularizer_optimizer is not None:
            if state["regularizer"] is None:
                log.warning("the checkpoint was trained without a regulariser: its projectors start afresh")
            else:
                self.regularizer.load_state_dict(state["regularizer"])
                self.regularizer_optimizer.load(state["optimizer"]["regularizer"])
        if self.share is not None and state.get("share") is not None:
            self.share.load_state_dict(state["share"])
        if (self.folder / "checkpoints" / "best.pt").is_file():  # else the run goes on in another folder
            self.best = state["meta"]["best"]
        self.step = state["step"]
        set_rng_state(state["rng"], self.device)

    def save(self, name: str) -> None:
        save_checkpoint(self.folder / "checkpoints" / f"{name}.pt", self.state())

    def _keep_best(self, evaluation: Evaluation, whole: bool) -> None:
        """A ``whole`` evaluation competes with earlier quick ones only where both are on one scale."""
        if whole and not math.isnan(self.best) and not self.evaluator.comparable(self.monitor):
            return
        value = flat(evaluation.metrics)[self.monitor]
        if math.isnan(self.best) or (value > self.best if self.higher_is_better else value < self.best):
            self.best = value
            self.save("best")

    def _log(self, values: Mapping[str, Tensor], bar: tqdm) -> None:
        """Read the step's scalars from the device, once, and write them down."""
        numbers = dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist()))
        losses = {name: value for name, value in numbers.items() if "/" not in name}
        self._check_finite()
        rate = self.optimizer.optimizer.param_groups[0]["lr"]
        self.recorder.scalars(self.step, "train", {**losses, "lr": rate})
        if self.regularizer is not None:
            gradients = {name: value for name, value in numbers.items() if "/" in name}
            self.recorder.scalars(self.step, "contrast", {**self.regularizer.summary(), **gradients})
        bar.set_postfix_str(" ".join(f"{name} {value:.3f}" for name, value in losses.items() if not math.isnan(value)))

    def _check_finite(self) -> None:
        """Never save, or go on with, what has seen a number that is not finite."""
        bad = [name for name, flag in self.broken.items() if flag.item()]
        if bad:
            raise UserError(
                f"the {', the '.join(bad)} was not finite by step {self.step}; lower optimizer.lr or trainer.clip_norm "
                "(checkpoints hold the last good state)"
            )

    def memory(self) -> float:
        """Peak memory so far, GiB."""
        return peak_memory(self.device)


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
