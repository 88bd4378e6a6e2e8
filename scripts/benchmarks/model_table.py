"""What models cost: parameters, multiply-adds, peak memory and latency of every decoder x backbone, or of experiments.

    python scripts/benchmarks/model_table.py [--experiment NAME ...] [--json OUT] [--markdown] [--no-measure]
        [--device DEVICE] [--repeats N] [overrides ...]

Without ``--experiment`` there is a row for every file of configs/decoder with every file of configs/backbone, with the
tasks and the size of data=nyud. ``--experiment`` takes names of configs/experiment instead, each with its own.
Overrides are those of train.py and go to every row; ``decoder=A,B`` and ``backbone=C`` choose among the rows, e.g.
``decoder=invpt data=pascal``. Weights are never fetched, data are never read.

parameters     of the whole model, what only training uses included
flops          multiply-adds (not twice that) of one forward pass, ``predict`` of one picture of ``data.size``, as
               papers print them: of convolutions and matrix products, those of attention included
memory         peak of that pass: the model's parameters and buffers, and what the pass holds at its worst moment
latency        median of that pass, batch of one, eager, after a warm-up; trainer.precision holds, as in evaluate.py

Parameters and flops are counted without weights or memory for them (mtcl/profiling/flops.py), in seconds for the
largest model. Memory and latency are measured, on CUDA where there is one; all rows on a CPU take long: --no-measure
leaves them out. What can't be built (decoder=taskprompter on a CNN) is named below the table. The JSON file has an
object per row, in plain units, complete after every row: experiment, decoder, backbone, network (timm's name), tasks,
size, parameters, flops, peak_memory_mib, latency_ms, device, precision.
"""

import argparse
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's chatter; both are read when torch is loaded
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from omegaconf import DictConfig
from torch import Tensor

from mtcl.atomic import write_json
from mtcl.cli.script import run
from mtcl.config.build_data import build_tasks, get_image_size
from mtcl.config.build_model import build_model
from mtcl.config.compose import compose_with_choices
from mtcl.errors import UserError
from mtcl.profiling.flops import count
from mtcl.profiling.timing import measure_peak_memory, measure_time
from mtcl.runtime import autocast
from mtcl.tasks.base import Task

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SETTING = "data=nyud"  # four tasks, 448x576
GRID = ("decoder", "backbone")
MIB = 2**20

Row = dict[str, Any]  # as in the JSON file


class Composed(NamedTuple):
    config: DictConfig
    experiment: str | None
    decoder: str  # the names of their files
    backbone: str


class Entry(NamedTuple):
    """A row to come: what it is called, and its config once it is its turn."""

    label: str
    compose: Callable[[], Composed]


class Measured(NamedTuple):
    peak_bytes: int
    seconds: float
    precision: str  # as PyTorch calls it


# Which rows


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def composed(overrides: Sequence[str]) -> Composed:
    """The config of train.py with these overrides; ``UserError`` if it would refuse them."""
    config, chosen = compose_with_choices(overrides, CONFIGS)
    return Composed(config, chosen["experiment"], chosen["decoder"], chosen["backbone"])


def named_entries(names: Sequence[str], overrides: Sequence[str]) -> list[Entry]:
    """A row per experiment. A name that is not known ends the table before it has begun."""
    found = {name: composed([f"experiment={name}", *overrides]) for name in names}
    return [Entry(name, partial(found.__getitem__, name)) for name in found]


def grid_entries(overrides: Sequence[str]) -> list[Entry]:
    """A row for every decoder with every backbone, or with those that the overrides choose."""
    groups = {group: choices(group) for group in GRID}
    others = []
    for word in overrides:
        group, _, names = word.partition("=")
        if group not in groups:
            others.append(word)
            continue
        for name in names.split(","):
            if name not in choices(group):
                raise UserError(f"{group}={name} is not known; choose among {', '.join(choices(group))}")
        groups[group] = names.split(",")
    if not any(word.startswith("data=") for word in others):
        others.insert(0, SETTING)
    return [
        Entry(
            f"{decoder} with {backbone}",
            partial(composed, [f"decoder={decoder}", f"backbone={backbone}", *others]),
        )
        for decoder in groups["decoder"]
        for backbone in groups["backbone"]
    ]


# A row


def row_of(made: Composed, device: torch.device | None, repeats: int) -> Row:
    """``device``: where to measure; None: nowhere."""
    config = made.config
    tasks = build_tasks(config)
    size = get_image_size(config)
    with torch.device("meta"):
        counted = count(build_model(config, tasks, pretrained=False), size)
    measured = None if device is None else measure(config, tasks, device, repeats)
    return {
        "experiment": made.experiment,
        "decoder": made.decoder,
        "backbone": made.backbone,
        "network": config.backbone.name,
        "tasks": list(tasks),
        "size": list(size),
        "parameters": counted.parameters,
        "flops": counted.multiply_adds,
        "peak_memory_mib": None if measured is None else measured.peak_bytes / MIB,
        "latency_ms": None if measured is None else measured.seconds * 1e3,
        "device": None if device is None else described(device),
        "precision": None if measured is None else measured.precision,
    }


def measure(config: DictConfig, tasks: dict[str, Task], device: torch.device, repeats: int) -> Measured | None:
    """The forward pass as evaluate.py makes it; None where there was not enough memory."""
    try:
        model = build_model(config, tasks, pretrained=False).to(device).eval()
        image = torch.zeros(1, 3, *get_image_size(config), device=device)
        held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])

        def predict() -> dict[str, Tensor]:
            return model.predict(image)

        with torch.inference_mode(), autocast(device, config.trainer.precision):
            half = torch.is_autocast_enabled(device.type)
            precision = torch.get_autocast_dtype(device.type) if half else image.dtype
            predict()
            seconds = statistics.median(measure_time(predict, device)[0] for _ in range(repeats))
            most = held + measure_peak_memory(predict, device)
    except torch.OutOfMemoryError:
        return None
    return Measured(most, seconds, str(precision).removeprefix("torch."))


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def described(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


# The table, line by line: a full one takes long


def cells(row: Row) -> list[str]:
    memory, latency = row["peak_memory_mib"], row["latency_ms"]
    return [
        row["experiment"] or "-",
        row["decoder"],
        row["backbone"],
        "x".join(map(str, row["size"])),
        f"{row['parameters'] / 1e6:.2f} M",
        f"{row['flops'] / 1e9:.2f} G",
        "-" if memory is None else f"{memory:.0f} MiB",
        "-" if latency is None else f"{latency:.1f} ms",
        ", ".join(row["tasks"]),
    ]


HEAD = ["experiment", *GRID, "size", "parameters", "flops", "memory", "latency", "tasks"]
RIGHT = range(4, 8)  # of numbers


class Table:
    """Prints rows as they come, aligned or as Markdown; the columns' widths follow from the names there are.

    ``names``: of experiments; none: a grid. ``measured``: with memory and latency.
    """

    def __init__(self, names: Sequence[str], measured: bool, markdown: bool, facts: str):
        self.markdown, self.facts = markdown, facts
        without = {*([] if names else ["experiment"]), *([] if measured else ["memory", "latency"])}
        self.columns = [i for i, title in enumerate(HEAD) if title not in without]
        widest = [[*names], choices("decoder"), choices("backbone"), ["1024x1024"], *[["9999.99 MiB"]] * 4, []]
        self.widths = [max(map(len, [title, *texts])) for title, texts in zip(HEAD, widest)]
        self.has_head = False

    def add(self, row: Row) -> None:
        if not self.has_head:
            self.has_head = True
            print(self.facts, end="\n\n")
            self._line(HEAD)
            if self.markdown:
                self._line(["---:" if i in RIGHT else "---" for i in range(len(HEAD))])
        self._line(cells(row))

    def _line(self, texts: Sequence[str]) -> None:
        if self.markdown:
            print("| " + " | ".join(texts[i] for i in self.columns) + " |", flush=True)
            return
        aligned = [
            texts[i].rjust(self.widths[i]) if i in RIGHT else texts[i].ljust(self.widths[i]) for i in self.columns
        ]
        print("  ".join(aligned).rstrip(), flush=True)


def facts(device: torch.device | None, repeats: int) -> str:
    text = "flops: multiply-adds of predict() of one picture, as papers print them"
    if device is None:
        return text
    return (
        f"{text}\nmemory (parameters, buffers and the pass at its worst moment) and latency (median of {repeats}): "
        f"{described(device)}, torch {torch.__version__}"
    )


def rows_of(
    entries: Sequence[Entry], device: torch.device | None, repeats: int
) -> Iterator[tuple[Entry, Row | Exception]]:
    """What can't be built, or fails, does not end the table; a row on its own shows the whole trace."""
    for entry in entries:
        try:
            yield entry, row_of(entry.compose(), device, repeats)
        except Exception as error:
            if len(entries) == 1:
                raise
            yield entry, error


def tabulate(
    names: Sequence[str],
    overrides: Sequence[str],
    device: torch.device | None,
    repeats: int,
    out: Path | None = None,
    markdown: bool = False,
) -> list[Row]:
    """Print the table and write ``out``. ``UserError`` at the end if there is no row, or if one failed."""
    entries = named_entries(names, overrides) if names else grid_entries(overrides)
    table = Table(names, device is not None, markdown, facts(device, repeats))
    rows: list[Row] = []
    left_out: dict[str, list[str]] = {}  # reason -> labels
    too_large: list[str] = []
    num_failed = 0
    for entry, found in rows_of(entries, device, repeats):
        if isinstance(found, Exception):
            is_failure = not isinstance(found, UserError)
            reason = f"{type(found).__name__}: {found}" if is_failure else str(found)
            left_out.setdefault(reason, []).append(entry.label)
            num_failed += is_failure
            continue
        rows.append(found)
        table.add(found)
        if out is not None:
            write_json(out, rows)
        if device is not None and found["latency_ms"] is None:
            too_large.append(entry.label)
    if not rows:
        raise UserError(next(iter(left_out)))
    for reason, labels in left_out.items():
        print(f"\nleft out: {', '.join(labels)}\n  {reason}")
    if too_large:
        print(f"\nnot measured, for lack of memory: {', '.join(too_large)}")
    if num_failed:
        raise UserError(f"{num_failed} of {len(entries)} rows failed; the table of one alone shows where")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", nargs="+", metavar="NAME", help="of configs/experiment, instead of the grid")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows there, too")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--no-measure", action="store_true", help="leave out memory and latency")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to measure")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="passes timed; default: %(default)s")
    parser.add_argument("overrides", nargs="*", help="of every row, as for train.py")
    given = parser.parse_intermixed_args()
    if given.repeats < 1:
        raise UserError(f"--repeats {given.repeats}: at least one pass is timed; --no-measure leaves latency out")
    words = [*given.overrides, *(given.experiment or [])]  # --experiment takes all that follows it
    overrides = [word for word in words if "=" in word and not word.startswith("experiment=")]
    names = [word.removeprefix("experiment=") for word in words if word not in overrides]
    if given.experiment is None and any("=" not in word for word in words):
        raise UserError(
            f"{next(w for w in words if '=' not in w)} is not an override key=value; give --experiment NAME"
        )
    if given.experiment is not None and not names:
        raise UserError(f"--experiment names none; choose among {', '.join(choices('experiment'))}")
    device = None if given.no_measure else choose_device(given.device)
    tabulate(names, overrides, device, given.repeats, given.json, given.markdown)


if __name__ == "__main__":
    run(main)
