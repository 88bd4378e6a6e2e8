"""Tabulate parameters, multiply-adds, peak memory and latency of every decoder x backbone, or of experiments.

    python scripts/benchmarks/model_table.py [--experiment NAME ...] [--json OUT] [--markdown] [--no-measure]
        [--published FILE] [--device DEVICE] [--repeats N] [overrides ...]

Without ``--experiment`` there is a row for every file of configs/decoder with every file of configs/backbone, with the
tasks and the image size of data=nyud. ``--experiment`` takes names of configs/experiment instead, with their own data.
Overrides are those of train.py and apply to every row; ``decoder=A,B`` and ``backbone=C`` select rows, e.g.
``decoder=invpt data=pascal``. No weights are downloaded, no data are read.

parameters     of the complete model, including heads for training only
flops          multiply-adds (not twice that) of one forward pass, ``predict`` of one image of ``data.size``, as
               papers report them: of convolutions and matrix products, including attention
memory         peak of that pass: the model's parameters and buffers, and the tensors of the pass
latency        median of that pass, batch of one, eager, after a warm-up, in trainer.precision as in evaluate.py

Parameters and flops are counted without allocating weights (mtcl/profiling/flops.py), in seconds for the largest
model. Memory and latency are measured, on CUDA if available; all rows on a CPU take long, --no-measure omits them.
``--published`` puts published sizes beside ours, with the difference in percent: those of a YAML file
(docs/published_sizes.yaml), of its experiments if ``--experiment`` names none.
Combinations that can't be built (decoder=taskprompter on a CNN) are listed below the table. The JSON file has an
object per row, in plain units, and is written after every row: experiment, decoder, backbone, network (timm's name),
tasks, size, parameters, flops, peak_memory_mib, latency_ms, device, precision.
"""

import math
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # less log output of the profiler; both are read when torch is imported
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import yaml
from omegaconf import DictConfig
from torch import Tensor

from mtcl.atomic import write_json
from mtcl.cli.arguments import CommandParser, positive_int
from mtcl.cli.script import run
from mtcl.config.build_data import build_tasks, get_image_size
from mtcl.config.build_model import build_model
from mtcl.config.compose import compose_with_choices
from mtcl.errors import UserError, suggest
from mtcl.profiling.flops import count
from mtcl.profiling.timing import measure_peak_memory, measure_time
from mtcl.runtime import autocast
from mtcl.tasks.base import Task

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SETTING = "data=nyud"  # four tasks, 448x576
GRID = ("decoder", "backbone")
MIB = 2**20

Row = dict[str, Any]  # as in the JSON file


class ComposedRow(NamedTuple):
    """The config of a row and the names of the files that it is composed of."""

    config: DictConfig
    experiment: str | None
    decoder: str
    backbone: str


class Entry(NamedTuple):
    """A row to compute: its name, and a function that composes its config."""

    label: str
    compose: Callable[[], ComposedRow]


class Measurement(NamedTuple):
    """Cost of a forward pass."""

    peak_bytes: int
    seconds: float
    precision: str  # as PyTorch calls it


# Which rows


def list_choices(group: str) -> list[str]:
    """Return the names of the files of a config group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def compose_row(overrides: Sequence[str]) -> ComposedRow:
    """Compose the config of train.py with overrides; raise ``UserError`` if they are not valid."""
    config, chosen = compose_with_choices(overrides, CONFIGS)
    return ComposedRow(config, chosen["experiment"], str(chosen["decoder"]), str(chosen["backbone"]))


def experiment_entries(names: Sequence[str], overrides: Sequence[str]) -> list[Entry]:
    """Return a row per experiment; an unknown name raises before anything is computed."""
    configs = {name: compose_row([f"experiment={name}", *overrides]) for name in names}
    return [Entry(name, partial(configs.__getitem__, name)) for name in configs]


def grid_entries(overrides: Sequence[str]) -> list[Entry]:
    """Return a row for every decoder with every backbone, or for those that the overrides select."""
    groups = {group: list_choices(group) for group in GRID}
    others = []
    for override in overrides:
        group, _, names = override.partition("=")
        if group not in groups:
            others.append(override)
            continue
        for name in names.split(","):
            if name not in list_choices(group):
                hint = suggest(name, list_choices(group))
                raise UserError(f"{group}={name} is not known{hint}; choose among {', '.join(list_choices(group))}")
        groups[group] = names.split(",")
    if not any(override.startswith("data=") for override in others):
        others.insert(0, SETTING)
    return [
        Entry(
            f"{decoder} with {backbone}",
            partial(compose_row, [f"decoder={decoder}", f"backbone={backbone}", *others]),
        )
        for decoder in groups["decoder"]
        for backbone in groups["backbone"]
    ]


# Published sizes


class PublishedSize(NamedTuple):
    """The size of a published model; a number that is not known is None."""

    parameters: float | None
    flops: float | None  # multiply-adds of one image
    source: str


def read_published_sizes(path: Path) -> dict[str, PublishedSize]:
    """Read a YAML file of experiment -> {parameters, flops, source}.

    Raises:
        UserError: the file can't be read, or an entry is not of this form.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--published {path} can't be read: {error}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"--published {path} must hold experiment: {{parameters, flops, source}}")
    sizes = {}
    for name, entry in content.items():
        keys = set(entry) if isinstance(entry, dict) else set()
        numbers = [entry[key] for key in ("parameters", "flops") if key in keys]
        if (
            not numbers
            or not keys <= {"parameters", "flops", "source"}
            or not isinstance(entry.get("source"), str)
            or not all(type(number) in (int, float) and 0 < number < math.inf for number in numbers)
        ):
            raise UserError(
                f"--published {path}: {name} must be {{parameters: number, flops: number, source: text}}; one of the "
                "numbers may be left out"
            )
        sizes[name] = PublishedSize(entry.get("parameters"), entry.get("flops"), entry["source"])
    return sizes


def format_difference(ours: float, published: float) -> str:
    """Return by how much ours differs, in percent of the published number."""
    if ours == published:
        return "0"
    difference = 100 * (ours / published - 1)
    return f"{difference:+.2f} %" if abs(difference) >= 0.005 else "< 0.01 %"


# A row


def compute_row(composed: ComposedRow, device: torch.device | None, repeats: int) -> Row:
    """Compute a row; memory and latency are measured on ``device``, if there is one."""
    config = composed.config
    tasks = build_tasks(config)
    size = get_image_size(config)
    with torch.device("meta"):
        counted = count(build_model(config, tasks, pretrained=False), size)
    measured = None if device is None else measure(config, tasks, device, repeats)
    return {
        "experiment": composed.experiment,
        "decoder": composed.decoder,
        "backbone": composed.backbone,
        "network": config.backbone.name,
        "tasks": list(tasks),
        "size": list(size),
        "parameters": counted.parameters,
        "flops": counted.multiply_adds,
        "peak_memory_mib": None if measured is None else measured.peak_bytes / MIB,
        "latency_ms": None if measured is None else measured.seconds * 1e3,
        "device": None if device is None else describe_device(device),
        "precision": None if measured is None else measured.precision,
    }


def measure(config: DictConfig, tasks: dict[str, Task], device: torch.device, repeats: int) -> Measurement | None:
    """Measure the forward pass of evaluate.py; return None if memory does not suffice."""
    try:
        model = build_model(config, tasks, pretrained=False).to(device).eval()
        image = torch.zeros(1, 3, *get_image_size(config), device=device)
        model_bytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])

        def predict() -> dict[str, Tensor]:
            return model.predict(image)

        with torch.inference_mode(), autocast(device, config.trainer.precision):
            half = torch.is_autocast_enabled(device.type)
            precision = torch.get_autocast_dtype(device.type) if half else image.dtype
            predict()
            seconds = statistics.median(measure_time(predict, device)[0] for _ in range(repeats))
            peak_bytes = model_bytes + measure_peak_memory(predict, device)
    except torch.OutOfMemoryError:
        return None
    return Measurement(peak_bytes, seconds, str(precision).removeprefix("torch."))


def choose_device(name: str) -> torch.device:
    """Return the device of ``--device``."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> str:
    """Return the name of the GPU, or the processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


# The table, printed line by line because a full one takes long


def format_cells(row: Row, published: PublishedSize | None) -> list[str]:
    """Return the texts of a row's cells, one for each of ``HEAD``."""
    memory, latency = row["peak_memory_mib"], row["latency_ms"]
    size = PublishedSize(None, None, "-") if published is None else published
    return [
        row["experiment"] or "-",
        row["decoder"],
        row["backbone"],
        "x".join(map(str, row["size"])),
        f"{row['parameters'] / 1e6:.2f} M",
        "-" if size.parameters is None else f"{size.parameters / 1e6:.2f} M",
        "-" if size.parameters is None else format_difference(row["parameters"], size.parameters),
        f"{row['flops'] / 1e9:.2f} G",
        "-" if size.flops is None else f"{size.flops / 1e9:.2f} G",
        "-" if size.flops is None else format_difference(row["flops"], size.flops),
        "-" if memory is None else f"{memory:.0f} MiB",
        "-" if latency is None else f"{latency:.1f} ms",
        ", ".join(row["tasks"]),
        size.source,
    ]


HEAD = ["experiment", *GRID, "size", "parameters", "published", "differ by", "flops", "published", "differ by",
        "memory", "latency", "tasks", "source"]  # fmt: skip
OF_PUBLISHED = (5, 6, 8, 9, 13)  # columns that --published alone has
OF_NO_PUBLISHED = (1, 2, 12)  # columns that it leaves out, for the width
RIGHT = range(4, 12)  # of numbers


class Table:
    """Print rows as they are computed, aligned or as Markdown.

    Args:
        names: of experiments, for the width of the column; empty: a grid.
        measured: whether there are memory and latency.
        markdown: print a Markdown table.
        header: text above the table.
        published: experiment -> published size; empty: no columns of them.
    """

    def __init__(
        self,
        names: Sequence[str],
        measured: bool,
        markdown: bool,
        header: str,
        published: Mapping[str, PublishedSize],
    ):
        self.markdown, self.header, self.published = markdown, header, published
        left_out = OF_NO_PUBLISHED if published else OF_PUBLISHED
        without = {*([] if names else ["experiment"]), *([] if measured else ["memory", "latency"])}
        self.columns = [i for i, title in enumerate(HEAD) if title not in without and i not in left_out]
        widest = [
            [*names],
            list_choices("decoder"),
            list_choices("backbone"),
            ["1024x1024"],
            *[["9999.99 MiB"]] * 8,
            [],
            [],
        ]
        self.widths = [max(map(len, [title, *texts])) for title, texts in zip(HEAD, widest, strict=True)]
        self.has_head = False

    def add(self, row: Row) -> None:
        """Print a row."""
        if not self.has_head:
            self.has_head = True
            print(self.header, end="\n\n")
            self._line(HEAD)
            if self.markdown:
                self._line(["---:" if i in RIGHT else "---" for i in range(len(HEAD))])
        self._line(format_cells(row, self.published.get(row["experiment"])))

    def _line(self, texts: Sequence[str]) -> None:
        if self.markdown:
            print("| " + " | ".join(texts[i] for i in self.columns) + " |", flush=True)
            return
        aligned = [
            texts[i].rjust(self.widths[i]) if i in RIGHT else texts[i].ljust(self.widths[i]) for i in self.columns
        ]
        print("  ".join(aligned).rstrip(), flush=True)


def format_header(device: torch.device | None, repeats: int) -> str:
    """Return the text above the table: what is counted, where it is measured."""
    text = "flops: multiply-adds of predict() of one image, as papers report them"
    if device is None:
        return text
    return (
        f"{text}\nmemory (peak of parameters, buffers and the pass) and latency (median of {repeats}): "
        f"{describe_device(device)}, torch {torch.__version__}"
    )


def compute_rows(
    entries: Sequence[Entry], device: torch.device | None, repeats: int
) -> Iterator[tuple[Entry, Row | Exception]]:
    """Yield each entry with its row, or with its error; the error of a single entry is raised."""
    for entry in entries:
        try:
            yield entry, compute_row(entry.compose(), device, repeats)
        except Exception as error:
            if len(entries) == 1:
                raise
            yield entry, error


def print_table(
    names: Sequence[str],
    overrides: Sequence[str],
    device: torch.device | None,
    repeats: int,
    out: Path | None = None,
    markdown: bool = False,
    published: Mapping[str, PublishedSize] | None = None,
) -> list[Row]:
    """Print the table and write ``out``; raise ``UserError`` at the end if there is no row, or if one failed."""
    entries = experiment_entries(names, overrides) if names else grid_entries(overrides)
    table = Table(names, device is not None, markdown, format_header(device, repeats), published or {})
    rows: list[Row] = []
    omitted: dict[str, list[str]] = {}  # reason -> labels
    too_large: list[str] = []
    num_failed = 0
    for entry, row in compute_rows(entries, device, repeats):
        if isinstance(row, Exception):
            is_failure = not isinstance(row, UserError)
            reason = f"{type(row).__name__}: {row}" if is_failure else str(row)
            omitted.setdefault(reason, []).append(entry.label)
            num_failed += is_failure
            continue
        rows.append(row)
        table.add(row)
        if out is not None:
            write_json(out, rows)
        if device is not None and row["latency_ms"] is None:
            too_large.append(entry.label)
    if not rows:
        raise UserError(next(iter(omitted)))
    for reason, labels in omitted.items():
        print(f"\nleft out: {', '.join(labels)}\n  {reason}")
    if too_large:
        print(f"\nnot measured, for lack of memory: {', '.join(too_large)}")
    if num_failed:
        raise UserError(f"{num_failed} of {len(entries)} rows failed; the table of one alone shows where")
    return rows


def main() -> None:
    """Parse the command line and print the table."""
    parser = CommandParser(__doc__)
    parser.add_argument("--experiment", nargs="+", metavar="NAME", help="of configs/experiment, instead of the grid")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows there, too")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--published", type=Path, metavar="FILE", help="YAML file of published sizes, to compare with")
    parser.add_argument("--no-measure", action="store_true", help="leave out memory and latency")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to measure")
    parser.add_argument(
        "--repeats", type=positive_int, default=3, metavar="N", help="passes timed; default: %(default)s"
    )
    parser.add_argument("overrides", nargs="*", help="of every row, as for train.py")
    args = parser.parse_intermixed_args()
    positional = [*args.overrides, *(args.experiment or [])]  # --experiment takes all that follows it
    overrides = [arg for arg in positional if "=" in arg and not arg.startswith("experiment=")]
    names = [arg.removeprefix("experiment=") for arg in positional if arg not in overrides]
    if args.experiment is None and any("=" not in arg for arg in positional):
        raise UserError(
            f"{next(arg for arg in positional if '=' not in arg)} is not an override key=value; give --experiment NAME"
        )
    if args.experiment is not None and not names:
        raise UserError(f"--experiment names none; choose among {', '.join(list_choices('experiment'))}")
    published = None if args.published is None else read_published_sizes(args.published)
    if published is not None and not names:
        names = sorted(published)
    device = None if args.no_measure else choose_device(args.device)
    print_table(names, overrides, device, args.repeats, args.json, args.markdown, published)


if __name__ == "__main__":
    run(main)
