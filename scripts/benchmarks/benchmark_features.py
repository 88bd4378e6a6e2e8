"""Compare training end to end, with a frozen backbone, and on its cached features, side by side.

    python scripts/benchmarks/benchmark_features.py [--cases NAME ...] [--steps N] [--rounds N] [--views N]
        [--workers N] [--json OUT] [key=value ...]
    python scripts/benchmarks/benchmark_features.py --sizes

``end to end``: the backbone is trained. ``frozen``: it computes features at each step, without a graph.
``cached``: the features were computed once (``data.feature_cache``), here for two views of each image, and are read
from the disk. The images are scenes of rooms, rendered before anything is timed, with random weights; labels are
augmented as in training. The variants alternate in rounds of several steps in one process, so that a machine that
becomes slower affects all alike; the first step of a round is not timed. ``waiting``: the part of the time in which a
step waits for its batch. Memory: as in benchmark_step.py. ``--sizes`` prints instead how large the caches of the two
datasets are, without computing any.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mtcl.cli.arguments import CommandParser, non_negative_int, positive_int
from mtcl.cli.script import run
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_training_run
from mtcl.config.compose import compose_config
from mtcl.data import Batch, FeatureFormat
from mtcl.data.feature_cache import format_bytes
from mtcl.models import EncoderDecoder
from mtcl.profiling.timing import measure_peak_memory, synchronize
from mtcl.runtime import choose_device, seed_everything
from mtcl.training.trainer import Trainer

MOBILENET = ["backbone=mobilenetv2", "data.size=[96,128]"]
VIT = ["backbone=vit_small", "data.size=[448,576]"]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CASES: dict[str, tuple[list[str], int]] = {  # overrides, batch size
    "mobilenetv2-96x128-linear": ([*MOBILENET, "decoder=linear"], 8),
    "mobilenetv2-96x128-multi_head": (
        [*MOBILENET, "decoder=multi_head", "decoder.width=64", "decoder.head_width=32"],
        8,
    ),
    "mobilenetv2-448x576-linear": (["backbone=mobilenetv2", "data.size=[448,576]", "decoder=linear"], 4),
    "vit_small-448x576-linear": ([*VIT, "decoder=linear"], 2),
    "vit_small-448x576-dpt": ([*VIT, "decoder=dpt"], 2),
}
SHARED = ["data=rooms", "tasks=nyud", "regularizer=none", "data.augment.scale=[1.0,1.5]"]
SHARED += ["data.augment.photometric=true", "trainer.validate_first=false"]
VARIANTS = {"end to end": "full", "frozen": "frozen", "cached": "frozen"}
BACKBONES = ("mobilenetv2", "vit_small_dinov2", "vit_base_dinov2", "vit_large_dinov3")
TRAIN_LISTS = {"NYUD-v2": ([448, 576], 795), "PASCAL-Context": ([512, 512], 4998)}  # size, training images
MIB = 2**20
HEADING = "variant      ms/step  images/s  waiting  step MiB  gain"


@dataclass
class Variant:
    """A trainer with its stream of batches, and what was measured of it."""

    trainer: Trainer
    stream: Iterator[list[Batch]]
    waiting: list[float] = field(default_factory=list)  # seconds for the batch, per step
    working: list[float] = field(default_factory=list)  # seconds for the rest of the step

    def run_round(self, steps: int) -> None:
        """Take ``steps`` timed steps after one that is not timed."""
        for step in range(1 + steps):
            start = time.perf_counter()
            batches = next(self.stream)
            loaded = time.perf_counter()
            self.take_step(batches)
            if step:
                self.waiting.append(loaded - start)
                self.working.append(time.perf_counter() - loaded)

    def take_step(self, batches: list[Batch]) -> None:
        """Take one step and wait for the device."""
        self.trainer.train_step(*batches)
        self.trainer.nonfinite_guard.pending.clear()
        synchronize(self.trainer.device)

    @property
    def seconds(self) -> float:
        """Seconds per step; the median of all that were timed."""
        return statistics.median(map(sum, zip(self.waiting, self.working)))

    @property
    def share_waiting(self) -> float:
        """The part of the time in which steps waited for their batches."""
        return sum(self.waiting) / (sum(self.waiting) + sum(self.working))


def build_variant(overrides: Sequence[str]) -> Variant:
    """Build train.py's trainer with random weights, fill its feature cache and render its scenes."""
    config = compose_config(overrides, CONFIGS)
    device = choose_device(config.trainer.device, "trainer.device")
    seed_everything(config.seed)
    trainer, dataset, _ = build_training_run(config, build_tasks(config), Path("unused"), device)
    for index in range(len(dataset.ids)):
        dataset.read(index)  # kept in memory, and so by the workers
    trainer.model.train()
    for filler in trainer.feature_fillers:
        filler.fill(trainer.model, device, trainer.options.precision)
    return Variant(trainer, trainer.batches_per_step())


def benchmark(name: str, overrides: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Time the variants of one case, print their table, and return the numbers."""
    specific, batch_size = CASES[name]
    shared = [*SHARED, *specific, f"data.batch_size={batch_size}", f"data.workers={args.workers}"]
    shared += [f"data.views={args.views}", f"data.options.length=[{4 * batch_size},{batch_size}]"]
    with tempfile.TemporaryDirectory(prefix="features-") as folder:
        variants: dict[str, Variant] = {}
        for title, trainable in VARIANTS.items():
            cache = [f"data.feature_cache={folder}"] if title == "cached" else []
            start = time.perf_counter()
            variants[title] = build_variant([*shared, f"backbone.trainable={trainable}", *cache, *overrides])
            filling = time.perf_counter() - start
        for _ in range(args.rounds):
            for variant in variants.values():
                variant.run_round(args.steps)
        batches = next(variants["cached"].stream)
        entry = sum(m[0].nbytes for m in batches[0]["features"])
        memory = {}
        for title, variant in variants.items():
            memory[title] = measure_peak_memory(
                partial(variant.take_step, next(variant.stream)), variant.trainer.device
            )
    print(
        f"{name}, batch {batch_size}, {args.rounds} rounds of {args.steps} steps, {args.workers} workers; features of "
        f"a view {format_bytes(entry)}; built and filled in {filling:.1f} s"
    )
    return report(variants, memory, batch_size) | {"bytes_per_view": entry}


def report(variants: Mapping[str, Variant], memory: Mapping[str, float], batch_size: int) -> dict[str, Any]:
    """Print the table of one case and return its numbers."""
    print(HEADING)
    reference = variants["end to end"].seconds
    results: dict[str, Any] = {}
    for title, variant in variants.items():
        seconds, share = variant.seconds, variant.share_waiting
        print(
            f"{title:10} {seconds * 1e3:9.1f}  {batch_size / seconds:8.2f}  {100 * share:5.1f} %  "
            f"{memory[title] / MIB:8.0f}  {reference / seconds:4.1f}"
        )
        results[title] = {
            "seconds": seconds,
            "images_per_second": batch_size / seconds,
            "waiting": share,
            "step_mib": memory[title] / MIB,
            "gain": reference / seconds,
        }
    return results


def print_sizes() -> None:
    """Print the bytes of the features of a view in fp16, and of one view of all training images."""
    print(f"{'backbone':18} {'size':9} {'of an image':>12}  of one view of all training images")
    for name in BACKBONES:
        for dataset, (size, count) in TRAIN_LISTS.items():
            overrides = [f"backbone={name}", "decoder=linear", f"data.size=[{size[0]},{size[1]}]"]
            config = compose_config(overrides, CONFIGS)
            with torch.device("meta"):
                model = build_model(config, build_tasks(config), pretrained=False)
            assert isinstance(model, EncoderDecoder)
            backbone, frame = model.backbone, model.padded_size((size[0], size[1]))
            maps = FeatureFormat(tuple(backbone.channels), tuple(backbone.strides), (), "fp16")
            entry = maps.num_bytes(frame)
            print(
                f"{name:18} {size[0]}x{size[1]}   {format_bytes(entry):>12}  {format_bytes(entry * count)} ({dataset})"
            )


def main() -> None:
    """Parse the command line and benchmark each case."""
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME", help=f"of {', '.join(CASES)}"
    )
    parser.add_argument(
        "--steps", type=positive_int, default=5, help="timed steps of each variant in a round (default 5)"
    )
    parser.add_argument("--rounds", type=positive_int, default=2, help="rounds (default 2)")
    parser.add_argument("--views", type=positive_int, default=2, help="views of an image in the cache (default 2)")
    parser.add_argument("--workers", type=non_negative_int, default=2, help="processes that read data (default 2)")
    parser.add_argument("--sizes", action="store_true", help="print the sizes of caches, and time nothing")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("overrides", nargs="*", help="of train.py")
    args = parser.parse_intermixed_args()
    if args.sizes:
        print_sizes()
        return
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {processor}, torch {torch.__version__}")
    results: dict[str, Any] = {}
    for name in args.cases:
        print()
        results[name] = benchmark(name, args.overrides, args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    run(main)
