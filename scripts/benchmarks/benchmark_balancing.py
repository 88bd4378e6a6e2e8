"""Measure time and memory of a training step with each method of balancing, side by side in one process.

    python scripts/benchmarks/benchmark_balancing.py [--methods NAME ...] [--steps N] [--json OUT] [key=value ...]

A method is a choice of ``balancing=`` (by default all of them but the two that stand for a library's list,
``scalarizer`` and ``torchjd``), or TorchJD's name of a scalarizer or an aggregator. One that the setting refuses, or
whose solver is not installed, is left out, with a line that says why.

Without overrides of train.py it measures NYUD-v2's setting without regulariser, images of 448x576 with the tasks
semseg, depth, normals and edge (rendered rooms: nothing to download), random weights, ResNet-18 and the baseline
decoder; batches of 8 on CUDA, of 2 on a CPU. With ``regularizer=contrastive balancing.regularizer_as_objective=true``
the regulariser's loss is an objective, too.

All methods train one model, step after step in turn and on the same batches, so that a machine that becomes slower
affects all. The batches are loaded beforehand. ``ms`` is the median of a step, ``times fixed`` the median of its ratio
to the step with ``balancing=fixed`` of the same turn (which is measured in any case), ``step MiB`` the peak memory of a
step beyond what was allocated at its start (as in benchmark_step.py), ``state MiB`` what the method keeps between
steps.
"""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # less output of the profiler; torch reads both when it is imported
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mtcl.cli.arguments import CommandParser, positive_int
from mtcl.cli.benchmark import build_run_at_half, run_step
from mtcl.cli.script import run
from mtcl.config.build_balancer import build_balancer
from mtcl.config.build_training import TrainingRun
from mtcl.config.compose import compose_config
from mtcl.data import Batch
from mtcl.errors import UserError, suggest
from mtcl.profiling.timing import measure_in_turns, measure_peak_memory
from mtcl.training.balancing import Balancer
from mtcl.training.balancing_torchjd import list_aggregators, list_scalarizers
from mtcl.training.trainer import Trainer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SETTING = ("data=rooms", "tasks=nyud", "data.size=[448,576]", "backbone=resnet18", "regularizer=none")
NOT_A_METHOD = ("scalarizer", "torchjd")
NEEDED = {  # options without a default, of choices that no config makes; WEIGHTS: one number for each task
    "COSMOS": "{lambda_: 1.0, weights: WEIGHTS}",
    "Constant": "{weights: WEIGHTS}",
    "FairGrad": "{alpha: 2.0}",
    "Krum": "{n_byzantine: 0}",
    "PBI": "{theta: 5.0, weights: WEIGHTS}",
    "STCH": "{mu: 1.0}",
    "TrimmedMean": "{trim_number: 1}",
}
WARMUP, BATCHES = 2, 4
MIB = 2**20


def list_choices() -> list[str]:
    """Return the choices of ``balancing=`` that are measured by default, the standard one first."""
    names = sorted(path.stem for path in (CONFIGS / "balancing").glob("*.yaml") if path.stem not in NOT_A_METHOD)
    return ["fixed", *(name for name in names if name != "fixed")]


def list_overrides(method: str, tasks: Sequence[str]) -> list[str]:
    """Return the overrides of train.py that choose a method.

    Raises:
        UserError: it is neither a choice of the config nor one of TorchJD's names.
    """
    if method in list_choices():
        return [f"balancing={method}"]
    scalarizers, aggregators = list_scalarizers(), list_aggregators()
    names = [*list_choices(), *scalarizers, *aggregators]
    if method not in names:
        raise UserError(f"--methods {method} is not known{suggest(method, names)}; choose of {', '.join(names)}")
    choice, key = ("scalarizer", "scalarizer") if method in scalarizers else ("torchjd", "aggregator")
    overrides = [f"balancing={choice}", f"balancing.{key}={method}"]
    if method in NEEDED:
        weights = "{" + ", ".join(f"{task}: 1.0" for task in tasks) + "}"
        overrides.append(f"balancing.options={NEEDED[method].replace('WEIGHTS', weights)}")
    return overrides


def build_balancers(methods: Sequence[str], shared: Sequence[str], training: TrainingRun) -> dict[str, Balancer]:
    """Return the balancer of each method for one model; one that is refused is left out."""
    trainer, balancers = training.trainer, {}
    for method in methods:
        config = compose_config([*list_overrides(method, list(trainer.tasks)), *shared], CONFIGS)
        parameters = trainer.model.shared_parameters()
        dataset = training.train_dataset
        try:
            balancers[method] = build_balancer(
                config, trainer.tasks, trainer.regularizer, dataset, trainer.device, parameters
            )
        except UserError as error:
            print(f"{method} is left out: {error}")
    return balancers


def repeat_step(trainer: Trainer, balancer: Balancer, batch: Batch) -> None:
    """Train a step that measures no gradients, in the middle of the schedule, with a method; wait for the device."""
    trainer.balancer, trainer.step = balancer, trainer.options.max_steps // 2 + 1
    run_step(trainer, batch)


def measure(
    trainer: Trainer, balancers: dict[str, Balancer], batches: Sequence[Batch], steps: int
) -> dict[str, list[float]]:
    """Return the seconds of each method's steps, which are taken in turn."""
    works = {method: partial(repeat_step, trainer, balancer) for method, balancer in balancers.items()}
    durations = measure_in_turns(works, islice(cycle(batches), WARMUP + steps), trainer.device, WARMUP)
    return {method: [clock for clock, _ in pairs] for method, pairs in durations.items()}


def count_state_bytes(balancer: Balancer) -> int:
    """Count the bytes of the tensors that a method keeps between steps."""
    return sum(leaf.nbytes for leaf in tree_leaves(balancer.state_dict()) if isinstance(leaf, Tensor))


def benchmark(methods: Sequence[str], overrides: Sequence[str], steps: int | None) -> dict[str, Any]:
    """Measure the methods, print their table and return the numbers."""
    batch_size = f"data.batch_size={8 if torch.cuda.is_available() else 2}"
    shared = [*SETTING, batch_size, "data.workers=0", *overrides]
    config = compose_config([word for word in shared if not word.startswith("balancing.")], CONFIGS)
    training = build_run_at_half(config)
    trainer = training.trainer
    balancers = build_balancers(["fixed", *(name for name in methods if name != "fixed")], shared, training)
    batches = list(islice(trainer.batches, BATCHES))
    steps = steps or (20 if trainer.device.type == "cuda" else 6)
    height, width = config.data.size
    print(
        f"{config.backbone.name}, {height}x{width}, batch {config.data.batch_size}, "
        f"tasks {', '.join(trainer.tasks)}, {steps} steps of each method",
        flush=True,
    )
    seconds = measure(trainer, balancers, batches, steps)
    results = {}
    print("method              ms   times fixed   step MiB   state MiB")
    for method, balancer in balancers.items():
        peak = measure_peak_memory(partial(repeat_step, trainer, balancer, batches[0]), trainer.device)
        ratio = statistics.median(a / b for a, b in zip(seconds[method], seconds["fixed"]))
        median, state = statistics.median(seconds[method]), count_state_bytes(balancer)
        print(f"{method:12}  {median * 1e3:8.1f}  {ratio:12.2f}  {peak / MIB:9.1f}  {state / MIB:10.1f}")
        results[method] = {"seconds": seconds[method], "times_fixed": ratio, "step_bytes": peak, "state_bytes": state}
    return results


def main() -> None:
    """Parse the command line and measure the methods."""
    parser = CommandParser(__doc__)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="choices of balancing=, or TorchJD's names")
    parser.add_argument("--steps", type=positive_int, help="timed steps of each; default 20 on CUDA, 6 on a CPU")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("overrides", nargs="*", help="of train.py")
    args = parser.parse_intermixed_args()
    overrides = args.overrides
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {device}, torch {torch.__version__}")
    results = benchmark(args.methods or list_choices(), overrides, args.steps)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    run(main)
