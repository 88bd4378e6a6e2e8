"""Measure what each variant of a study costs, in training and at inference, side by side in one process.

    python scripts/benchmarks/benchmark_study.py STUDY.yaml [--only VARIANT ...] [--steps N] [--results FOLDER]
        [--json OUT] [overrides ...]

The overrides go to every variant, as with study.py: they are the place for what belongs to a machine
(data.root=...). Weights are random, nothing is downloaded; the single-task models of a study are left out.

At inference, of one image:

parameters     of the complete model, including heads for training only
multiply-adds  of ``predict``: of convolutions and matrix products, including attention
ms             median of ``predict``

In training, of a step with ``data.batch_size`` images in the middle of the schedule:

beside         parameters that are trained beside the model: projectors, mappings, a second network
step ms        median of a step; if gradients are measured every few steps, with what that takes on average
times          the step's time divided by the first variant's, the median of the turns; gradients as before
step MiB       peak memory of a step beyond what was allocated at its start, as in benchmark_step.py
held MiB       of parameters, buffers, the optimisers' moments and the running mean of the weights

With --results, beside what a variant costs what it brought in the runs of FOLDER, which study.py --results has written:

Delta (%)      Delta_on/off of the variant, mean and 95 % interval over pairs of seeds, as in the study's table

The variants alternate, step by step and pass by pass, so that a machine that becomes slower affects all. Each has its
own batches, which are loaded beforehand.
"""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # less output of the profiler; torch reads both when it is imported
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch

from mtcl.cli.arguments import CommandParser, positive_int
from mtcl.cli.benchmark import (
    advance_to_weighting_step,
    build_run_at_half,
    count_state_bytes,
    measure_weighting,
    run_step,
)
from mtcl.cli.script import run
from mtcl.config.compose import compose_config
from mtcl.data import Batch
from mtcl.errors import UserError, suggest
from mtcl.launch.study_file import Study, Variant, read_study
from mtcl.launch.study_tables import DELTA, build_report, format_difference, read_results
from mtcl.profiling.flops import count
from mtcl.profiling.timing import measure_in_turns, measure_peak_memory
from mtcl.results.tables import NO_VALUE
from mtcl.runtime import autocast
from mtcl.training.trainer import Trainer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WARMUP, BATCHES = 2, 4
MIB = 2**20
HEADINGS = ("parameters", "multiply-adds", "ms", "beside", "step ms", "times", "step MiB", "held MiB")
DELTA_HEADING = "Delta (%)"

Row = dict[str, Any]  # of a variant, as in the JSON file: numbers in plain units


def select_variants(study: Study, names: Sequence[str]) -> list[Variant]:
    """Return the variants of these names, or all of them.

    Raises:
        UserError: the study has no variant of a name.
    """
    variants = {variant.name: variant for variant in study.variants}
    for name in names:
        if name not in variants:
            hint = suggest(name, variants)
            raise UserError(f"--only {name} is not a variant{hint}; choose of {', '.join(variants)}")
    return [variants[name] for name in names or variants]


def build_trainers(study: Study, variants: Sequence[Variant], overrides: Sequence[str]) -> dict[str, Trainer]:
    """Build the trainer of each variant: name -> trainer."""
    trainers = {}
    for variant in variants:
        chosen = [*study.overrides, *variant.overrides, *overrides, "data.workers=0"]
        trainers[variant.name] = build_run_at_half(compose_config(chosen, CONFIGS)).trainer
    return trainers


def measure_training(trainers: dict[str, Trainer], steps: int) -> dict[str, Row]:
    """Measure the training steps of the variants, which alternate."""
    device = next(iter(trainers.values())).device
    batches = {name: list(islice(trainer.batches, BATCHES)) for name, trainer in trainers.items()}

    def train(name: str, index: int) -> None:
        run_step(trainers[name], batches[name][index])

    works = {name: partial(train, name) for name in trainers}
    durations = measure_in_turns(works, islice(cycle(range(BATCHES)), WARMUP + steps), device, WARMUP)
    clocks = {name: [clock for clock, _ in pairs] for name, pairs in durations.items()}
    weightings = {name: measure_weighting(trainer, batches[name][0]) for name, trainer in trainers.items()}
    first = next(iter(trainers))
    rows = {}
    for name, trainer in trainers.items():
        extra, first_extra = weightings[name], weightings[first]
        ratios = [(seconds + extra) / (other + first_extra) for seconds, other in zip(clocks[name], clocks[first])]
        rows[name] = {
            "beside": 0 if trainer.regularizer is None else sum(p.numel() for p in trainer.regularizer.parameters()),
            "step_seconds": statistics.median(clocks[name]) + extra,
            "times_first": statistics.median(ratios),
            "step_bytes": measure_step_memory(trainer, batches[name][0]),
            "held_bytes": count_state_bytes(trainer),
        }
    return rows


def measure_step_memory(trainer: Trainer, batch: Batch) -> int:
    """Return the peak memory in bytes of a step that measures gradients, if any does."""
    advance_to_weighting_step(trainer)
    return measure_peak_memory(partial(run_step, trainer, batch), trainer.device)


def measure_inference(trainers: dict[str, Trainer], passes: int) -> dict[str, Row]:
    """Count and measure ``predict`` of one image with the model of each variant; the passes alternate."""
    first = next(iter(trainers.values()))
    sizes = {name: trainer.checkpointing.config["data"]["size"] for name, trainer in trainers.items()}
    counts = {name: count(trainer.model, sizes[name]) for name, trainer in trainers.items()}
    images = {name: torch.zeros(1, 3, *size, device=first.device) for name, size in sizes.items()}

    def predict(name: str, _turn: int) -> None:
        with torch.inference_mode(), autocast(first.device, trainers[name].options.precision):
            trainers[name].model.predict(images[name])

    works = {name: partial(predict, name) for name in trainers}
    durations = measure_in_turns(works, range(WARMUP + passes), first.device, WARMUP)
    return {
        name: {
            "parameters": counts[name].parameters,
            "multiply_adds": counts[name].multiply_adds,
            "predict_seconds": statistics.median(clock for clock, _ in durations[name]),
        }
        for name in trainers
    }


def read_deltas(folder: Path, study: Study) -> dict[str, str]:
    """Read the runs of a study's results: label of a variant -> Delta_on/off with its 95 % interval, in percent.

    Raises:
        UserError: the results are those of another study, or no results.
    """
    of_results, records, _ = read_results(folder)
    if of_results.name != study.name:
        raise UserError(f"--results {folder}: these are the results of {of_results.name}, not of {study.name}")
    effects = [one for one in build_report(of_results, records).effects if DELTA in one.columns]
    return {one.row.label: format_difference(one, DELTA).strip("*") for one in effects}


def print_table(variants: Sequence[Variant], rows: dict[str, Row], deltas: Mapping[str, str] | None) -> None:
    """Print a line for each variant, named by its label; with ``deltas`` by label a column of them."""
    labels = {variant.name: variant.label or variant.name for variant in variants}
    width = max(map(len, labels.values()))
    widths = [max(8, len(heading)) for heading in HEADINGS]
    delta_width = max(map(len, [DELTA_HEADING, *(deltas or {}).values()]))
    last = [] if deltas is None else [DELTA_HEADING.rjust(delta_width)]
    print("  ".join(["variant".ljust(width), *(h.rjust(w) for h, w in zip(HEADINGS, widths)), *last]))
    for name, row in rows.items():
        cells = [
            f"{row['parameters'] / 1e6:.3f} M",
            f"{row['multiply_adds'] / 1e9:.3f} G",
            f"{row['predict_seconds'] * 1e3:.1f}",
            f"{row['beside'] / 1e6:.3f} M",
            f"{row['step_seconds'] * 1e3:.0f}",
            f"{row['times_first']:.2f}",
            f"{row['step_bytes'] / MIB:.0f}",
            f"{row['held_bytes'] / MIB:.1f}",
        ]
        last = [] if deltas is None else [deltas.get(labels[name], NO_VALUE).rjust(delta_width)]
        print("  ".join([labels[name].ljust(width), *(c.rjust(w) for c, w in zip(cells, widths)), *last]))


def main() -> None:
    """Parse the command line, measure the variants and print their table."""
    parser = CommandParser(__doc__)
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="measure these only")
    parser.add_argument("--steps", type=positive_int, help="steps and passes of each; default 50 on CUDA, 20 on a CPU")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="of study.py --results: print their Delta, too")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the numbers to this file")
    parser.add_argument("overrides", nargs="*", help="of every variant, as for train.py")
    args = parser.parse_intermixed_args()
    overrides = [*args.overrides, *(text for text in args.only if "=" in text)]
    study = read_study(args.study)
    variants = select_variants(study, [text for text in args.only if "=" not in text])
    deltas = read_deltas(args.results, study) if args.results else None
    trainers = build_trainers(study, variants, overrides)
    first = next(iter(trainers.values()))
    cuda = first.device.type == "cuda"
    steps = args.steps or (50 if cuda else 20)
    processor = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    config = first.checkpointing.config
    height, width = config["data"]["size"]
    print(
        f"{platform.machine()}, {processor}, torch {torch.__version__}; {study.name}: {config['backbone']['name']}, "
        f"{height}x{width}, batch {config['data']['batch_size']}, tasks {', '.join(first.tasks)}, {steps} in turns\n",
        flush=True,
    )
    training = measure_training(trainers, steps)
    inference = measure_inference(trainers, steps)
    rows = {name: {**inference[name], **training[name]} for name in trainers}
    print_table(variants, rows, deltas)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    run(main)
