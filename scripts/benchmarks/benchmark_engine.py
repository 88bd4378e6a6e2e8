"""A training step as the field takes it, and as this project does: time, pictures per second, memory, side by side.

    python scripts/benchmarks/benchmark_engine.py [--steps N] [--batch N] [--variants NAME ...] [--json OUT]
        [--experiment NAME ...] [key=value ...]

``field``: fp32, contiguous layout, no compiler. ``ours``: the config as it is (bf16 where the card has it, channels
last). ``compiled``: that through ``torch.compile``; its compilation is not counted. All take the same batches of
448x576, made up from rooms (nothing to download), with random weights, in turns, step by step, in one process, so that
a drifting machine is fair to all. Memory: ``held`` and ``step`` as in benchmark_step.py. Parts of a step, of a pass of
their own that waits for the device between them: forward, regulariser (its forward pass), backward, optimiser, and
data (the time to make a batch divided by the workers' number). ``roofline``: multiply-adds of the model's forward pass,
times six (a pass forward and two back, two operations each), per second, over the card's peak where it is known.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from mtcl.cli.script import run
from mtcl.config.build_data import build_tasks
from mtcl.config.build_training import build_training_run
from mtcl.config.compose import compose_config
from mtcl.data import Batch
from mtcl.errors import UserError
from mtcl.profiling.flops import count
from mtcl.profiling.timing import measure_peak_memory, measure_time, synchronize
from mtcl.runtime import choose_device, seed_everything
from mtcl.training.trainer import Trainer

EXPERIMENTS = ("nyud_multi_head_hrnet18", "nyud_invpt_vit_base", "nyud_invpt_vit_large")
VARIANTS = {
    "field": ["trainer.precision=fp32", "trainer.channels_last=false", "trainer.tf32=false", "trainer.compile=false"],
    "ours": [],
    "compiled": ["trainer.compile=true"],
}
DATA = ["data=rooms", "tasks=nyud", "data.size=[448,576]", "data.workers=0", "data.augment.scale=[1.0,1.0]"]
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # bf16, dense, vendors' sheets
MIB, BATCHES = 2**20, 2


def built(overrides: Sequence[str]) -> Trainer:
    """The trainer that train.py would build, with random weights, in the middle of its schedule; it writes nothing."""
    config = compose_config(overrides, Path(__file__).resolve().parents[2] / "configs")
    device = choose_device(config.trainer.device, "trainer.device")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.trainer.tf32 else "highest")
    seed_everything(config.seed)
    trainer = build_training_run(config, build_tasks(config), Path("unused"), device).trainer
    trainer.model.train()
    trainer.step = trainer.options.max_steps // 2 + 1  # not one that measures gradients
    return trainer


def one_step(trainer: Trainer, batch: Batch) -> None:
    trainer.train_step(batch)
    trainer.nonfinite_guard.pending.clear()
    synchronize(trainer.device)


def parts(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """Seconds of a step's parts, the device waited for after each."""
    found: dict[str, float] = {}

    def watched(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            results: list[Any] = []
            seconds, _ = measure_time(lambda: results.append(work(*args, **options)), trainer.device)
            found[name] = found.get(name, 0.0) + seconds
            return results[0]

        return call

    replaced: list[tuple[Any, str]] = [(trainer, "training_step"), (trainer.balancer, "backward"), (trainer.optimizer, "step")]
    names = ["forward", "backward", "optimiser"]
    if trainer.regularizer is not None and not isinstance(trainer.training_step, torch.nn.Module):
        pass  # inside a compiled step it has no time of its own
    elif trainer.regularizer is not None:
        replaced.append((trainer.regularizer, "compute_loss"))
        names.append("regulariser")
    kept = [getattr(owner, name) for owner, name in replaced]
    for (owner, attribute), name, work in zip(replaced, names, kept):
        object.__setattr__(owner, attribute, watched(name, work))
    try:
        one_step(trainer, batch)
    finally:
        for (owner, attribute), work in zip(replaced, kept):
            if isinstance(owner, torch.nn.Module):
                object.__delattr__(owner, attribute)
            else:
                setattr(owner, attribute, work)
    found["forward"] -= found.get("regulariser", 0.0)
    return found


def benchmark(name: str, variants: Sequence[str], overrides: Sequence[str], steps: int, batch: int) -> dict[str, Any]:
    words = [f"experiment={name}", *DATA, f"data.batch_size={batch}", *overrides]
    trainers = {variant: built([*words, *VARIANTS[variant]]) for variant in variants}
    first = next(iter(trainers.values()))
    began = time.perf_counter()
    batches = list(islice(first.batches, BATCHES))
    data = (time.perf_counter() - began) / BATCHES
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    turn = list(variants)
    for step, item in enumerate(islice(cycle(batches), 1 + steps)):
        for variant in turn:
            took, _ = measure_time(partial(one_step, trainers[variant], item), first.device)
            if step:
                seconds[variant].append(took)
        turn.reverse()
    operations = 6 * batch * count(first.model, batches[0]["image"].shape[-2:]).multiply_adds
    first.model.train()
    card = torch.cuda.get_device_name() if first.device.type == "cuda" else ""
    top = next((value for key, value in PEAKS.items() if key in card), None)
    print(f"{name}, batch {batch}, {steps} steps in turns; data: {data * 1e3:.0f} ms per batch and worker")
    print(
        "variant    median ms  fastest ms  images/s  step MiB   TFLOP/s  roofline   "
        "forward  regular.  backward  optimiser"
    )
    found: dict[str, Any] = {}
    for variant, trainer in trainers.items():
        median, best = statistics.median(seconds[variant]), min(seconds[variant])
        memory = measure_peak_memory(partial(one_step, trainer, batches[0]), first.device) / MIB
        shares = parts(trainer, batches[0])
        whole = sum(shares.values())
        rate = operations / median
        cells = [f"{100 * shares[p] / whole:6.1f} %" if p in shares else "       -"
                 for p in ("forward", "regulariser", "backward", "optimiser")]  # fmt: skip
        share = f"{100 * rate / top:6.1f} %" if top else "       -"
        print(f"{variant:9} {median * 1e3:10.1f}  {best * 1e3:10.1f}  {batch / median:8.2f}  {memory:8.0f}  "
              f"{rate / 1e12:8.2f}  {share}  {'  '.join(cells)}")  # fmt: skip
        found[variant] = {"seconds": seconds[variant], "step_mib": memory, "flops_per_second": rate, "parts": shares,
                          "roofline": rate / top if top else None}  # fmt: skip
    reference = found[variants[0]]
    for variant in variants[1:]:
        faster = statistics.median(reference["seconds"]) / statistics.median(found[variant]["seconds"])
        less = found[variant]["step_mib"] / reference["step_mib"]
        print(f"{variant}: {faster:.2f} times the images per second of {variants[0]}, {less:.2f} of its memory")
    return {"batch": batch, "data_seconds": data, "variants": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experiment", nargs="+", default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        metavar="NAME",
        help="default: all on CUDA; no compiled on a CPU",
    )
    parser.add_argument("--steps", type=int, help="timed of each variant; default 20 on CUDA, 3 on a CPU")
    parser.add_argument("--batch", type=int, help="default 8 on CUDA, 2 on a CPU")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    parser.add_argument("overrides", nargs="*", help="of train.py")
    given = parser.parse_intermixed_args()
    overrides = [*given.overrides, *(word for word in given.experiment if "=" in word)]
    experiments = [word for word in given.experiment if "=" not in word]
    cuda = torch.cuda.is_available()
    steps, batch = given.steps or (20 if cuda else 3), given.batch or (8 if cuda else 2)
    variants = given.variants or (list(VARIANTS) if cuda else ["field", "ours"])
    if steps < 1 or batch < 1:
        raise UserError("--steps and --batch must be at least 1")
    where = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {where}, torch {torch.__version__}, 448x576")
    found: dict[str, Any] = {}
    for name in experiments:
        print()
        found[name] = benchmark(name, variants, overrides, steps, batch)
        gc.collect()
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    run(main)
