"""Time and memory of a training step, without and with the regulariser, side by side in one process.

    python scripts/benchmark_step.py [group=choice ...] [key=value ...]

takes train.py's overrides, e.g. ``data.size=[448,576] backbone=vit_base tasks=nyud``. The two variants take turns step
by step, on the same batches, so that a drifting machine is fair to both. Memory is what a step takes at its peak beyond
what was allocated before it (both variants' weights and moments), by the CUDA allocator; on a CPU it is not measured.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig

from mtcl.data import Batch
from mtcl.entry import build
from mtcl.entry.cli import sentence
from mtcl.entry.schema import check_config
from mtcl.errors import UserError
from mtcl.training.runtime import choose_device, seed_everything
from mtcl.training.trainer import Trainer

STEPS, WARMUP = 20, 3


def built(config: DictConfig) -> Trainer:
    """The trainer that train.py would build, with random weights; it writes nothing."""
    check_config(build.plain(config))
    seed_everything(config.seed)
    device = choose_device(config.trainer.device)
    return build.build_trainer(config, build.build_tasks(config), Path("unused"), device).trainer


def timed(trainer: Trainer, batch: Batch) -> tuple[float, float]:
    """Seconds and peak GiB of one step."""
    cuda = trainer.device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    trainer.train_step(batch)
    trainer.step += 1
    if cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    return took, (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else float("nan")


def main(overrides: list[str]) -> None:
    configs = Path(__file__).resolve().parents[1] / "configs"
    with initialize_config_dir(str(configs), version_base="1.3"):
        variants = {name: compose("train", [*overrides, f"regularizer={name}"]) for name in ("none", "contrastive")}
    trainers = {name: built(config) for name, config in variants.items()}
    batches = iter(trainers["none"].batches)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    memory: dict[str, float] = {}
    for step in range(WARMUP + STEPS):
        batch = next(batches)
        for name, trainer in trainers.items():
            took, memory[name] = timed(trainer, batch)
            if step >= WARMUP:
                seconds[name].append(took)
    config = variants["none"]
    print(f"{config.backbone.name}, {tuple(config.data.size)}, batch {config.data.batch_size}, {STEPS} steps in turns")
    print("regularizer   median ms   fastest ms   images/s   peak GiB")
    for name, values in seconds.items():
        median = statistics.median(values)
        rate = config.data.batch_size / median
        print(f"{name:11}  {median * 1e3:10.1f}  {min(values) * 1e3:11.1f}  {rate:9.1f}  {memory[name]:9.2f}")
    pairs = [on / off - 1 for off, on in zip(seconds["none"], seconds["contrastive"])]
    print(f"the regulariser adds {statistics.median(pairs) * 100:.1f} % to a step (median of pairs)")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, HydraException) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        sys.exit(1)
