"""Build what scripts/benchmarks measure: the training of ``train.py``, which writes nothing."""

import statistics
from functools import partial
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mtcl.config.build_data import build_tasks
from mtcl.config.build_training import TrainingRun, build_training_run
from mtcl.data import Batch
from mtcl.profiling.timing import measure_time, synchronize
from mtcl.runtime import choose_device, seed_everything
from mtcl.training.trainer import Trainer


def build_run_at_half(config: DictConfig) -> TrainingRun:
    """Build the training of ``train.py`` with random weights, in the middle of its schedule. It writes no files.

    There, lambda and the learning rate are past their warm-up, unless ``regularizer.start_fraction`` is later. A cache
    of features is left out: these weights would not fit it.

    Raises:
        UserError: a value of the config is refused; it names the key.
    """
    config = config.copy()
    if config.data.get("feature_cache") is not None:
        config.data.feature_cache = None
    seed_everything(config.seed)
    device = choose_device(config.trainer.device, "trainer.device")
    training = build_training_run(config, build_tasks(config), Path("unused"), device)
    training.trainer.model.train()
    training.trainer.step = training.trainer.options.max_steps // 2
    return training


def run_step(trainer: Trainer, batch: Batch) -> None:
    """Train one step, go on to the next and wait for the device. Nothing asks whether the loss was finite."""
    trainer.train_step(batch)
    trainer.nonfinite_guard.pending.clear()
    trainer.step += 1
    synchronize(trainer.device)


def count_state_bytes(trainer: Trainer) -> int:
    """Count the bytes of parameters, buffers, optimiser states and the running mean of the weights."""
    ema = None if trainer.ema is None else trainer.ema.model
    modules = [m for m in (trainer.model, trainer.regularizer, ema) if m is not None]
    optimizers = [o.optimizer for o in (trainer.optimizer, trainer.regularizer_optimizer) if o is not None]
    states = [*(m.state_dict(keep_vars=True) for m in modules), *(list(o.state.values()) for o in optimizers)]
    return sum(t.nbytes for t in tree_leaves(states) if isinstance(t, Tensor))


def advance_to_weighting_step(trainer: Trainer) -> None:
    """Set the step to the next one that measures the gradients of contrast and task (``weighting=gradient_norm``)."""
    if trainer.lambda_.gradient_norm_weight is not None:
        while not trainer.lambda_.measures_gradients(trainer.step):
            trainer.step += 1


def measure_weighting(trainer: Trainer, batch: Batch, repeats: int = 3) -> float:
    """Return the seconds per step, on average, that measuring the gradients of contrast and task takes."""
    if trainer.lambda_.gradient_norm_weight is None:
        return 0.0
    extra = []
    for _ in range(repeats):
        advance_to_weighting_step(trainer)
        with_weighting, without = (measure_time(partial(run_step, trainer, batch), trainer.device)[0] for _ in range(2))
        extra.append(with_weighting - without)
    return statistics.median(extra) / trainer.lambda_.gradient_norm_weight.every
