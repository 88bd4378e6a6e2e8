"""Compare the standard training step with this project's: time, images per second and memory, side by side.

    python scripts/benchmarks/benchmark_engine.py [--steps N] [--batch N] [--variants NAME ...] [--json OUT]
        [--experiment NAME ...] [key=value ...]

``standard``: fp32, contiguous memory format, no compiler. ``default``: the config as it is (bf16 where the card
supports it, channels last). ``compiled``: the same through ``torch.compile``; compiling is not timed. All train with
the contrast and take the same batches of 448x576, rendered from rooms (nothing to download), with random weights.
They alternate step by step in one process, so that a machine that becomes slower affects all alike. Memory: as in
benchmark_step.py. Parts of a step, from a separate step that waits for the device between them: forward, regulariser
(its forward pass), backward, optimiser; and data (the time to make a batch divided by the number of workers).
``roofline``: multiply-adds of the model's forward pass, times six (one forward and two backward passes, two
operations each), per second, over the card's peak where it is known.
"""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # less output of the profiler; torch reads both when it is imported
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch

from mtcl.cli.arguments import CommandParser, positive_int
from mtcl.cli.benchmark import build_run_at_half, run_step
from mtcl.cli.script import run
from mtcl.config.compose import compose_config
from mtcl.data import Batch
from mtcl.profiling.flops import count
from mtcl.profiling.timing import measure_in_turns, measure_peak_memory, measure_time
from mtcl.runtime import choose_device
from mtcl.training.train_step import CompiledModule
from mtcl.training.trainer import Trainer

EXPERIMENTS = ("nyud_multi_head_hrnet18", "nyud_invpt_vit_base", "nyud_invpt_vit_large")
VARIANTS = {
    "standard": [
        "trainer.precision=fp32",
        "trainer.channels_last=false",
        "trainer.tf32=false",
        "trainer.compile=false",
    ],
    "default": [],
    "compiled": ["trainer.compile=true"],
}
DATA = ["data=rooms", "tasks=nyud", "data.size=[448,576]", "data.workers=0", "data.augment.scale=[1.0,1.0]"]
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # bf16, dense, data sheets
MIB, NUM_BATCHES = 2**20, 2
PARTS = ("forward", "regulariser", "backward", "optimiser")
HEADING = (
    "variant    median ms  fastest ms  images/s  step MiB   TFLOP/s  roofline   forward  regular.  backward  optimiser"
)


def build_for_timing(overrides: Sequence[str]) -> Trainer:
    """Build the trainer of train.py with random weights. It writes no files."""
    config = compose_config(overrides, Path(__file__).resolve().parents[2] / "configs")
    device = choose_device(config.trainer.device, "trainer.device")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.trainer.tf32 else "highest")
    return build_run_at_half(config).trainer


def repeat_step(trainer: Trainer, batch: Batch) -> None:
    """Take the step after the middle of the schedule, which does not measure gradients, and wait for the device."""
    trainer.step = trainer.options.max_steps // 2 + 1
    run_step(trainer, batch)


def measure_parts(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """Return the seconds of a step's parts, waiting for the device after each."""
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            results: list[Any] = []
            elapsed, _ = measure_time(lambda: results.append(function(*args, **options)), trainer.device)
            seconds[name] = seconds.get(name, 0.0) + elapsed
            return results[0]

        return call

    methods: dict[str, tuple[Any, str]] = {
        "forward": (trainer, "training_step"),
        "backward": (trainer.balancer, "backward"),
        "optimiser": (trainer.optimizer, "step"),
    }
    if trainer.regularizer is not None and isinstance(trainer.training_step, torch.nn.Module):
        methods["regulariser"] = (trainer.regularizer, "compute_loss")  # inside a compiled step it can't be timed
    originals = {name: getattr(owner, attribute) for name, (owner, attribute) in methods.items()}
    for name, (owner, attribute) in methods.items():
        object.__setattr__(owner, attribute, timed(name, originals[name]))
    try:
        repeat_step(trainer, batch)
    finally:
        for name, (owner, attribute) in methods.items():
            if isinstance(owner, torch.nn.Module):
                object.__delattr__(owner, attribute)
            else:
                setattr(owner, attribute, originals[name])
    seconds["forward"] -= seconds.get("regulariser", 0.0)
    return seconds


def time_steps(trainers: Mapping[str, Trainer], batches: Sequence[Batch], steps: int) -> dict[str, list[float]]:
    """Return variant -> seconds of each step, after one that is not timed."""
    works = {variant: partial(repeat_step, trainer) for variant, trainer in trainers.items()}
    turns = islice(cycle(batches), 1 + steps)
    durations = measure_in_turns(works, turns, next(iter(trainers.values())).device, warmup=1)
    return {variant: [clock for clock, _ in pairs] for variant, pairs in durations.items()}


def benchmark(name: str, variants: Sequence[str], overrides: Sequence[str], steps: int, batch: int) -> dict[str, Any]:
    """Time the variants of one experiment, print their table, and return the numbers."""
    shared = [f"experiment={name}", "regularizer=contrastive", *DATA, f"data.batch_size={batch}", *overrides]
    trainers = {variant: build_for_timing([*shared, *VARIANTS[variant]]) for variant in variants}
    first = next(iter(trainers.values()))
    start = time.perf_counter()
    batches = list(islice(first.batches, NUM_BATCHES))
    data_seconds = (time.perf_counter() - start) / NUM_BATCHES
    seconds = time_steps(trainers, batches, steps)
    operations = 6 * batch * count(first.model, batches[0]["image"].shape[-2:]).multiply_adds
    first.model.train()
    card = torch.cuda.get_device_name() if first.device.type == "cuda" else ""
    peak = next((value for key, value in PEAKS.items() if key in card), None)
    print(f"{name}, batch {batch}, {steps} steps in turns; data: {data_seconds * 1e3:.0f} ms per batch and worker")
    print(HEADING)
    results: dict[str, Any] = {}
    for variant, trainer in trainers.items():
        median = statistics.median(seconds[variant])
        memory = measure_peak_memory(partial(repeat_step, trainer, batches[0]), first.device) / MIB
        parts = measure_parts(trainer, batches[0])
        rate = operations / median
        results[variant] = {
            "seconds": seconds[variant],
            "step_mib": memory,
            "flops_per_second": rate,
            "parts": parts,
            "roofline": rate / peak if peak else None,
            "compiled": isinstance(trainer.training_step, CompiledModule) and trainer.training_step.works,
        }
        print(format_row(variant, batch, results[variant]))
        if trainer.options.compile and not results[variant]["compiled"]:
            print(f"{variant}: torch.compile failed, these steps are eager")
    reference = results[variants[0]]
    for variant in variants[1:]:
        speedup = statistics.median(reference["seconds"]) / statistics.median(results[variant]["seconds"])
        memory = results[variant]["step_mib"] / reference["step_mib"]
        print(f"{variant}: {speedup:.2f} times the images per second of {variants[0]}, {memory:.2f} of its memory")
    return {"batch": batch, "data_seconds": data_seconds, "variants": results}


def format_row(variant: str, batch: int, result: Mapping[str, Any]) -> str:
    """Return a variant's line of the table."""
    median, fastest = statistics.median(result["seconds"]), min(result["seconds"])
    parts, total = result["parts"], sum(result["parts"].values())
    cells = [f"{100 * parts[part] / total:6.1f} %" if part in parts else "       -" for part in PARTS]
    roofline = f"{100 * result['roofline']:6.1f} %" if result["roofline"] is not None else "       -"
    return (
        f"{variant:9} {median * 1e3:10.1f}  {fastest * 1e3:10.1f}  {batch / median:8.2f}  {result['step_mib']:8.0f}  "
        f"{result['flops_per_second'] / 1e12:8.2f}  {roofline}  {'  '.join(cells)}"
    )


def main() -> None:
    """Parse the command line and benchmark each experiment."""
    parser = CommandParser(__doc__)
    parser.add_argument("--experiment", nargs="+", default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        metavar="NAME",
        help="default: all on CUDA; no compiled on a CPU",
    )
    parser.add_argument("--steps", type=positive_int, help="timed of each variant; default 20 on CUDA, 3 on a CPU")
    parser.add_argument("--batch", type=positive_int, help="default 8 on CUDA, 2 on a CPU")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("overrides", nargs="*", help="of train.py")
    args = parser.parse_intermixed_args()
    overrides = [*args.overrides, *(word for word in args.experiment if "=" in word)]
    experiments = [word for word in args.experiment if "=" not in word]
    cuda = torch.cuda.is_available()
    steps, batch = args.steps or (20 if cuda else 3), args.batch or (8 if cuda else 2)
    variants = args.variants or (list(VARIANTS) if cuda else ["standard", "default"])
    processor = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {processor}, torch {torch.__version__}, 448x576")
    results: dict[str, Any] = {}
    for name in experiments:
        print()
        results[name] = benchmark(name, variants, overrides, steps, batch)
        gc.collect()
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    run(main)
