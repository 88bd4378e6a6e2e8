"""Run all that needs a GPU, piece by piece: tests, determinism, speed and memory, latency, a study; then one table.

    python scripts/benchmarks/gpu.py [--output FOLDER] [--pieces NAME ...] [--list] [--time-limit SECONDS]
        [--stop-after SECONDS] [--study FILE] [--jobs N] [--wheels FOLDER] [--device cuda|cpu] [--tiny] [--work FOLDER]
        [--commit TEXT] [overrides ...]

Each piece is a process of its own that ends within --time-limit. It leaves FOLDER/NAME.json: device, versions, commit,
command, seconds, and the numbers, or why it failed. The same command goes on where an earlier one ended: a finished
piece is skipped, others are done again, and a study continues. FOLDER/gpu.md has the tables of all that is finished.
Exit code 1: a piece failed; 75: --stop-after ended the work, and the same command goes on.

--pieces takes names of --list or their beginnings (engine: all engine_...). --study is a file for scripts/study.py, run
in slices of --time-limit; the overrides (data.root=...) and --jobs are for its runs. --wheels installs the wheels of a
folder where nothing can be downloaded, into the working folder. --device cpu --tiny rehearses all pieces in minutes.
Nothing is downloaded; docs/gpu.md has more.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mtcl.atomic import write_json, write_text
from mtcl.cli.arguments import CommandParser, output_path, positive_float, positive_int
from mtcl.cli.script import run
from mtcl.errors import UserError, suggest
from mtcl.launch.processes import EXIT_REQUEUE, catch_signals, explain_exit, format_duration, stop_processes
from mtcl.version import read_commit

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = "scripts/benchmarks"
TIME_LIMIT = 540  # seconds of a piece: with its start and end, less than ten minutes
SHORTEST = 90  # seconds; with fewer to go, --stop-after starts no further piece
SLICE_END = 60  # seconds of a slice's limit that are kept for saving its runs and writing the table
PATIENCE = 10.0  # seconds that a piece has to end by itself
POLL = 0.1
NUM_LAST_LINES = 20
REQUIRED = (
    *("torch", "torchvision", "timm", "torchmetrics", "hydra", "omegaconf", "antlr4", "numpy", "cv2", "scipy"),
    *("h5py", "PIL", "safetensors", "tensorboard", "tqdm", "yaml"),
)
ONNX = ("onnx", "onnxscript", "onnxruntime")
OPTIONAL = ("pytest", "hypothesis", *ONNX, "tensorrt", "triton", "torchjd", "peft", "skimage", "matplotlib")

ENGINE = {"hrnet18": "nyud_multi_head_hrnet18", "vit_base": "nyud_invpt_vit_base", "vit_large": "nyud_invpt_vit_large"}
BACKBONES = ("mobilenetv2", "resnet50", "vit_base")
DECODERS = ("multi_head", "invpt", "taskprompter", "dpt")
CASES = {
    "mobilenetv2": ("mobilenetv2-96x128-linear", "mobilenetv2-96x128-multi_head", "mobilenetv2-448x576-linear"),
    "vit_small": ("vit_small-448x576-linear", "vit_small-448x576-dpt"),
}
SMALL_VIT = ("backbone=vit_small", "++backbone.kwargs={embed_dim:48,depth:4,num_heads:3,drop_path_rate:0.0}")
SMALL = {  # of --tiny: overrides that make a model small, by decoder
    "multi_head": ("backbone=resnet18", "decoder.width=8", "decoder.head_width=8"),
    "invpt": (*SMALL_VIT, "decoder.width=32", "decoder.prediction_width=16"),
    "taskprompter": (*SMALL_VIT, "decoder.width=32", "decoder.head_width=32"),
    "dpt": (*SMALL_VIT, "decoder.width=16", "decoder.head_width=8", "decoder.level_widths=[8,8,16,16]"),
}
SMALL_IMAGES = "data.size=[32,64]"
TARGETS = {"speed": 3.0, "memory": 0.6, "step": 3.0, "step memory": 2.0}  # the last two in percent

Record = dict[str, Any]  # of a piece, as in its JSON
Results = Mapping[str, Mapping[str, Any]]  # the numbers of pieces of one group, by piece


# The pieces


@dataclass(frozen=True)
class Piece:
    """A part of the work: a Python process that writes its numbers into a file.

    Attributes:
        name: of the piece and its files.
        arguments: of Python, without those that say where to write.
        needs: modules without which it is skipped.
        uses: modules without which it does less.
        obstacle: why it can't run, or empty.
    """

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    obstacle: str = ""

    @property
    def group(self) -> str:
        """The kind of piece, which decides how its numbers are read and shown."""
        return self.name.partition("_")[0]

    @property
    def command(self) -> str:
        """The command as people type it, without folders of this machine."""
        return shlex.join(["python", *(Path(text).name if text.startswith("/") else text for text in self.arguments)])


def list_pieces(tiny: bool, study: Path | None) -> list[Piece]:
    """Return all pieces, in the order in which they run; those of a rehearsal where ``tiny``."""
    tests = ("-m", "pytest", "-m", "cuda", *list_test_files())
    return [
        Piece("tests", tests, needs=("pytest", "hypothesis")),
        _make_determinism_piece(tiny),
        *(_make_engine_piece(name, tiny) for name in ENGINE),
        *(_make_step_piece(name, tiny) for name in BACKBONES),
        _make_data_piece(tiny),
        *(_make_features_piece(name, tiny) for name in CASES),
        *(_make_inference_piece(name, tiny) for name in DECODERS),
        _make_study_piece(study, tiny),
    ]


def list_test_files() -> list[str]:
    """Return the test files that have a test for a card, relative to the repository."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file.relative_to(ROOT).as_posix() for file in files if "mark.cuda" in file.read_text("utf-8")]


def _make_determinism_piece(tiny: bool) -> Piece:
    small = [*SMALL["multi_head"], SMALL_IMAGES, "data.workers=0", "data.batch_size=2", "data.options.length=[4,2]"]
    more = [*small, "--experiment", "nyud_multi_head_hrnet18", "--steps", "2"] if tiny else []
    return Piece("determinism", (f"{BENCHMARKS}/check_determinism.py", *more))


def _make_engine_piece(name: str, tiny: bool) -> Piece:
    small = SMALL["multi_head" if name == "hrnet18" else "invpt"]
    more = [*small, SMALL_IMAGES, "--steps", "1", "--batch", "1"] if tiny else []
    arguments = (f"{BENCHMARKS}/benchmark_engine.py", *more, "--experiment", ENGINE[name])
    return Piece(f"engine_{name}", arguments, uses=("triton",))


def _make_step_piece(name: str, tiny: bool) -> Piece:
    chosen = [f"backbone={name}", "tasks=nyud", "data.size=[448,576]", "data.batch_size=8", "--profile"]
    if tiny:
        backbone = SMALL_VIT if name.startswith("vit") else [f"backbone={name}"]
        widths = ["decoder.width=8", "decoder.head_width=8"]
        chosen = [*backbone, *widths, "tasks=nyud", SMALL_IMAGES, "data.batch_size=2", "--steps", "1"]
    return Piece(f"step_{name}", (f"{BENCHMARKS}/benchmark_step.py", *chosen))


def _make_data_piece(tiny: bool) -> Piece:
    more = ["--images", "8", "--size", "32x64", "--workers", "1"] if tiny else ["--workers", "8"]
    return Piece("data", (f"{BENCHMARKS}/benchmark_data.py", "--step", *more))


def _make_features_piece(name: str, tiny: bool) -> Piece:
    chosen = ["--workers", "4", "--cases", *CASES[name]]
    if tiny:
        small = [SMALL_IMAGES, *(SMALL_VIT if name.startswith("vit") else [])]
        chosen = [*small, "--workers", "0", "--steps", "1", "--rounds", "1", "--cases", CASES[name][0]]
    return Piece(f"features_{name}", (f"{BENCHMARKS}/benchmark_features.py", *chosen))


def _make_inference_piece(name: str, tiny: bool) -> Piece:
    more = []
    if tiny:
        more = [*SMALL[name], "--size", "32", "64", "--batch", "1", "--repeats", "1", "--backends", "eager", "onnx"]
    arguments = (f"{BENCHMARKS}/benchmark_inference.py", *more, "--decoders", name)
    return Piece(f"inference_{name}", arguments, uses=(*ONNX, "tensorrt", "triton"))


def _make_study_piece(study: Path | None, tiny: bool) -> Piece:
    if study is None and not tiny:
        return Piece("study", ("scripts/study.py",), obstacle="no study was chosen; give --study FILE")
    file = study or ROOT / "scripts" / "studies" / "smoke.yaml"
    if not file.is_file():
        raise UserError(f"--study {file} does not exist")
    path = file.resolve()
    shown = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()
    only = ["--only", "off", "on"] if study is None else []
    return Piece("study", ("scripts/study.py", shown, *only))


def choose_pieces(pieces: Sequence[Piece], names: Sequence[str]) -> list[Piece]:
    """Return the pieces of these names, or whose names begin so; all where there are none."""
    for name in names:
        if not any(_matches(piece, name) for piece in pieces):
            available = [piece.name for piece in pieces]
            hint = suggest(name, available)
            raise UserError(f"--pieces {name} is not known{hint}; choose among {', '.join(available)}")
    return [piece for piece in pieces if not names or any(_matches(piece, name) for name in names)]


def _matches(piece: Piece, name: str) -> bool:
    return name in (piece.name, piece.group)


# The machine


PROBE = """
import importlib.util, json, platform, sys
modules = {name: importlib.util.find_spec(name) is not None for name in sys.argv[1:]}
machine = {"python": platform.python_version(), "modules": modules, "device": None, "torch": None, "cuda": None}
if modules["torch"]:
    import torch
    machine["torch"], machine["cuda"] = torch.__version__, torch.version.cuda
    cpu = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    machine["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
print(json.dumps(machine))
"""


def make_environment(device: str, packages: Path) -> dict[str, str]:
    """Return the environment of the pieces: this code and installed wheels can be imported; a CPU hides the GPUs."""
    paths = [str(ROOT), *([str(packages)] if packages.is_dir() else []), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    return environment | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def install_wheels(folder: Path, packages: Path) -> list[str]:
    """Install the wheels of a folder into ``packages``, without a network, and return the names of those that lacked.

    Raises:
        UserError: there are no wheels, or pip refuses one.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise UserError(f"--wheels {folder} has no file *.whl; docs/gpu.md says how to make such a folder")
    path = [str(packages), *sys.path]
    lacking = [wheel for wheel in wheels if not is_installed(wheel, path)]
    if lacking:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        process = subprocess.run(
            [*command, "--target", str(packages), *map(str, lacking)], capture_output=True, text=True, check=False
        )
        if process.returncode != 0:
            lines = process.stderr.strip().splitlines() or ["no output"]
            raise UserError(f"pip could not install the wheels of {folder}: {lines[-1]}")
    return [wheel.name for wheel in lacking]


def is_installed(wheel: Path, path: Sequence[str]) -> bool:
    """Tell whether a package is installed in these folders in the version of its wheel."""
    name, version = wheel.name.split("-")[:2]
    return any(one.version == version for one in importlib.metadata.distributions(name=name, path=list(path)))


def probe_machine(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return device, versions and installed modules, as a process in this environment sees them."""
    process = subprocess.run(
        [sys.executable, "-c", PROBE, *REQUIRED, *OPTIONAL],
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines() or ["no output"]
        raise UserError(f"PyTorch can't be imported: {lines[-1]}")
    return json.loads(process.stdout.splitlines()[-1])


def check_machine(machine: Mapping[str, Any], device: str) -> None:
    """Raise ``UserError`` where nothing could run."""
    absent = [name for name in REQUIRED if not machine["modules"][name]]
    if absent:
        raise UserError(f"these modules are not installed: {', '.join(absent)}; see docs/gpu.md and --wheels")
    if device == "cuda" and machine["device"].startswith("cpu"):
        raise UserError("PyTorch sees no CUDA device; --device cpu --tiny rehearses the pieces on a CPU")


# Running


@dataclass(frozen=True)
class Session:
    """Hold what all pieces of a command share.

    Attributes:
        output: folder of the records and the table.
        work: folder of logs, raw numbers and the study's runs.
        facts: the part of every record that is equal: device, versions, commit.
        modules: name -> whether it is installed.
        environment: of the processes.
        study_arguments: further arguments of scripts/study.py.
        time_limit: seconds of a piece.
        say: prints a line.
    """

    output: Path
    work: Path
    facts: Mapping[str, Any]
    modules: Mapping[str, bool]
    environment: Mapping[str, str]
    study_arguments: tuple[str, ...] = ()
    time_limit: float = TIME_LIMIT
    say: Callable[[str], None] = print


def read_record(output: Path, name: str) -> Record:
    """Read the record of a piece; it is empty where none was written or it is damaged."""
    try:
        content = json.loads((output / f"{name}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_finished(record: Mapping[str, Any], piece: Piece, device: str) -> bool:
    """Tell whether a record is of this very piece on such a device, and finished."""
    same = record.get("command") == piece.command and record.get("device_type") == device
    return same and record.get("status") == "finished"


def run_piece(piece: Piece, session: Session, limit: float, signals: Sequence[int]) -> Record:
    """Run a piece, or a slice of a study, write its record and return it.

    Args:
        piece: the piece.
        session: where and how.
        limit: seconds after which it is ended.
        signals: those that this process receives; one ends the piece.
    """
    earlier = read_record(session.output, piece.name)
    continues = piece.group == "study" and earlier.get("status") in ("unfinished", "started")
    record: Record = {"piece": piece.name, "status": "started", "command": piece.command, **session.facts}
    record["missing_modules"] = [name for name in (*piece.needs, *piece.uses) if not session.modules[name]]
    record["seconds"] = earlier.get("seconds", 0.0) if continues else 0.0
    path = session.output / f"{piece.name}.json"
    if obstacle := find_obstacle(piece, session):
        record |= {"status": "skipped", "reason": obstacle}
        write_json(path, record)
        return record
    write_json(path, record)  # a piece that is killed with this process stays "started"
    numbers, log = session.work / f"{piece.name}.numbers", session.work / f"{piece.name}.log"
    numbers.unlink(missing_ok=True)
    start = time.monotonic()
    process = start_piece(piece, session, numbers, log, limit)
    while process.poll() is None and not signals and time.monotonic() - start < limit:
        time.sleep(POLL)
    cut = process.poll() is None
    if cut:
        stop_processes([process], signal.SIGTERM, PATIENCE)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # children that outlived it
        os.killpg(process.pid, signal.SIGKILL)
    record["seconds"] = round(record["seconds"] + time.monotonic() - start, 1)
    record["returncode"] = process.returncode
    too_slow = cut and not signals and limit >= session.time_limit
    record |= conclude(process.returncode, log, cut, f"it ran past its limit of {limit:.0f} s" if too_slow else "")
    result = read_result(piece, numbers, session.work)
    if result is not None:
        record["result"] = result
    elif record["status"] == "finished":
        record |= {"status": "failed", "reason": "it wrote no numbers"}
    if record["status"] == "failed":
        record["last_lines"] = read_last_lines(log)
    write_json(path, record)
    return record


def find_obstacle(piece: Piece, session: Session) -> str:
    """Return why a piece can't run here, or nothing."""
    absent = [name for name in piece.needs if not session.modules[name]]
    return piece.obstacle or (f"not installed: {', '.join(absent)}" if absent else "")


def start_piece(piece: Piece, session: Session, numbers: Path, log: Path, limit: float) -> subprocess.Popen:
    """Start the process of a piece in a process group of its own, but in this session: it ends with the terminal."""
    where: tuple[str, ...] = ("--json", str(numbers))
    if piece.group == "tests":
        where = (f"--junitxml={numbers}",)
    elif piece.group == "study":
        seconds = max(limit - SLICE_END, limit / 2)
        where = (*session.study_arguments, "--output", str(session.work / "study"), f"--time-limit={seconds:.0f}")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, *piece.arguments, *where],
            cwd=ROOT,
            env=dict(session.environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


def conclude(code: int, log: Path, cut: bool, complaint: str) -> Record:
    """Return the status of a piece whose process has ended, and the reason if it is not finished.

    Args:
        code: its exit code.
        log: its output.
        cut: whether it was ended from here.
        complaint: what the piece did wrong, if it did.
    """
    if complaint:
        return {"status": "failed", "reason": complaint}
    if cut or code == EXIT_REQUEUE:
        return {"status": "unfinished", "reason": "it was ended; the same command goes on"}
    if code != 0:
        return {"status": "failed", "reason": hide_folders(explain_exit(log, code))}
    return {"status": "finished"}


def hide_folders(text: str) -> str:
    """Return a text without the folder of this repository."""
    return text.replace(f"{ROOT}{os.sep}", "")


def read_last_lines(log: Path) -> list[str]:
    """Return the last lines of a log."""
    return hide_folders(log.read_text("utf-8", "replace")).splitlines()[-NUM_LAST_LINES:]


def read_result(piece: Piece, numbers: Path, work: Path) -> Any:
    """Read the numbers of a piece; None if it wrote none."""
    try:
        if piece.group == "tests":
            return count_tests(numbers)
        if piece.group == "study":
            return {
                "table": (work / "study" / "study.md").read_text("utf-8"),
                **json.loads((work / "study" / "study.json").read_text("utf-8")),
            }
        return json.loads(numbers.read_text("utf-8"))
    except (OSError, ValueError, ElementTree.ParseError):
        return None


def count_tests(report: Path) -> dict[str, Any]:
    """Count the tests of a JUnit report: passed, failed, skipped; and name those that failed."""
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        if kind == "failed":
            counts["failures"].append(f"{case.get('classname')}.{case.get('name')}")
    return counts


def run_pieces(pieces: Sequence[Piece], session: Session, stop_after: float | None) -> list[Record]:
    """Run the pieces that are not finished, one after the other, and return a record for each that was reached.

    Raises:
        KeyboardInterrupt: a signal ended the piece that was running.
    """
    records = []
    start = time.monotonic()
    with catch_signals() as signals:
        for number, piece in enumerate(pieces, start=1):
            title = f"[{number}/{len(pieces)}] {piece.name}"
            earlier = read_record(session.output, piece.name)
            if is_finished(earlier, piece, session.facts["device_type"]):
                session.say(f"{title}: finished before")
                records.append(earlier)
                continue
            record: Record = {"status": "unfinished"}
            while record["status"] == "unfinished":  # the slices of a study
                budget = None if stop_after is None else stop_after - (time.monotonic() - start)
                if budget is not None and budget < SHORTEST and (records or "piece" in record):
                    return [*records, record]
                limit = session.time_limit if budget is None else min(session.time_limit, max(budget, 1.0))
                session.say(f"{title}: {piece.command}")
                record = run_piece(piece, session, limit, signals)
                reason = f": {record['reason']}" if "reason" in record else ""
                session.say(f"{title}: {record['status']} after {format_duration(record['seconds'])}{reason}")
                if signals:
                    session.say("interrupted; the same command goes on")
                    raise KeyboardInterrupt
            records.append(record)
    return records


# The table


def format_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def format_number(value: float | None, digits: int = 1) -> str:
    """Format a number, or a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def _chain_items(results: Results) -> Iterator[tuple[str, Any]]:
    for result in results.values():
        yield from result.items()


def make_engine_rows(results: Results) -> Iterator[list[str]]:
    """Yield a row per variant of the engine, relative to the standard one."""
    for experiment, content in _chain_items(results):
        variants = content["variants"]
        base = variants["standard"]
        for variant, numbers in variants.items():
            seconds = statistics.median(numbers["seconds"])
            speed = statistics.median(base["seconds"]) / seconds
            memory = numbers["step_mib"] / base["step_mib"]
            reached = "yes" if speed >= TARGETS["speed"] and memory <= TARGETS["memory"] else "no"
            failed = variant == "compiled" and not numbers["compiled"]
            yield [
                f"{experiment} {variant}{' (compiler failed)' if failed else ''}",
                f"{content['batch'] / seconds:.2f}",
                f"{speed:.2f}",
                f"{numbers['step_mib']:.0f}",
                f"{memory:.2f}",
                "-" if numbers["roofline"] is None else f"{100 * numbers['roofline']:.1f} %",
                "-" if variant == "standard" else reached,
            ]


def make_step_rows(results: Results) -> Iterator[list[str]]:
    """Yield a row of the cost of the regulariser per backbone."""
    for name, content in ((name, content) for name, result in results.items() for content in result.values()):
        added = content["percent added"]
        time_added = added["step"] + added["weighing"]
        reached = time_added <= TARGETS["step"] and added["memory"] <= TARGETS["step memory"]
        cells = (added["step"], added["weighing"], added["memory"])
        waits = content.get("profile", {}).get("waits", "-")
        yield [name.removeprefix("step_"), *map(format_number, cells), "yes" if reached else "no", waits]


def make_data_rows(results: Results) -> Iterator[list[str]]:
    """Yield the rates of reading data, and the part of a step that waits."""
    for key, value in _chain_items(results):
        yield [key, f"{100 * value:.1f} % of a step" if key == "waiting" else f"{value:.0f} images/s of one core"]


def make_feature_rows(results: Results) -> Iterator[list[str]]:
    """Yield a row per variant of training with a frozen backbone."""
    for case, content in _chain_items(results):
        for variant, numbers in content.items():
            if isinstance(numbers, dict):
                yield [
                    f"{case}, {variant}",
                    f"{1e3 * numbers['seconds']:.1f}",
                    f"{numbers['images_per_second']:.1f}",
                    f"{100 * numbers['waiting']:.1f} %",
                    f"{numbers['step_mib']:.0f}",
                    f"{numbers['gain']:.2f}",
                ]


def make_inference_rows(results: Results) -> Iterator[list[str]]:
    """Yield a row per decoder, backend and batch, and one per backend that was left out."""
    for row in (row for result in results.values() for row in result["rows"]):
        if row["backend"] == "regulariser":
            yield [f"{row['decoder']}, with the regulariser", str(row["batch"]), f"{row['on_ms']:.2f}", "-", "-"]
            continue
        remark = f" ({row['error']})" if row.get("error") else ""
        yield [
            f"{row['decoder']}, {row['backend']}{remark}",
            str(row["batch"]),
            format_number(row["ms"], 2),
            format_number(row.get("images_per_s")),
            format_number(row["memory_mib"], 0),
        ]
    absences = {backend: reason for result in results.values() for backend, reason in result["left_out"].items()}
    for backend, reason in absences.items():
        yield [f"{backend}: {reason}", "-", "-", "-", "-"]


def make_determinism_rows(results: Results) -> Iterator[list[str]]:
    """Yield a row per experiment that was trained twice."""
    for experiment, content in _chain_items(results):
        losses = content.get("error") or ("yes" if content["losses_equal"] else "no")
        yield [experiment, str(content["steps"]), losses, str(content.get("different_weights", "-"))]


def make_test_rows(results: Results) -> Iterator[list[str]]:
    """Yield the counts of the tests."""
    for result in results.values():
        yield ["tests for a card", str(result["passed"]), str(result["failed"]), str(result["skipped"])]


SECTIONS: dict[str, tuple[str, list[str], Callable[[Results], Iterator[list[str]]]]] = {
    "tests": ("Tests", ["", "passed", "failed", "skipped"], make_test_rows),
    "determinism": (
        "Two trainings with one seed, trainer.deterministic=true",
        ["experiment", "steps", "losses bit-equal", "weights that differ"],
        make_determinism_rows,
    ),
    "engine": (
        "A training step against the standard loop (fp32, eager); target: at least 3 times the images per second, at "
        "most 0.6 of the memory",
        ["variant", "images/s", "times standard", "step MiB", "of standard", "roofline", "target"],
        make_engine_rows,
    ),
    "step": (
        "What the regulariser adds to a training step; target: at most 3 % of its time, 2 % of its memory",
        ["backbone", "step %", "gradient norms %", "memory %", "target", "host waits for"],
        make_step_rows,
    ),
    "data": ("Loading data", ["", "rate"], make_data_rows),
    "features": (
        "A frozen backbone and its cached features",
        ["case", "ms/step", "images/s", "waiting", "step MiB", "times end to end"],
        make_feature_rows,
    ),
    "inference": ("Latency", ["decoder, backend", "batch", "ms", "images/s", "MiB"], make_inference_rows),
}


def format_report(pieces: Sequence[Piece], records: Mapping[str, Record], tiny: bool) -> str:
    """Format the records of all pieces as Markdown without HTML."""
    blocks = ["# Results on a GPU", "Made by `make gpu` (docs/gpu.md)."]
    if tiny:
        blocks = ["# A rehearsal", "Tiny models, few steps: it shows that the pieces run; the numbers mean nothing."]
    for key in ("device", "torch", "cuda", "python", "commit"):
        values = list(dict.fromkeys(str(record[key]) for record in records.values() if record.get(key)))
        if values:
            blocks.append(f"{key}: {', '.join(values)}")
    rows = []
    for piece in pieces:
        record = records.get(piece.name, {})
        seconds = f"{record['seconds']:.0f}" if "seconds" in record else "-"
        absent = record.get("missing_modules")
        remarks = [record.get("reason", ""), f"without {', '.join(absent)}" if absent else ""]
        status = describe_status(record)
        rows.append([piece.name, status, seconds, "; ".join(filter(None, remarks)) or "-"])
    blocks.append(format_table(["piece", "status", "seconds", "remark"], rows))
    for group, (title, head, make_rows) in SECTIONS.items():
        results = {p.name: records[p.name]["result"] for p in pieces if p.group == group and has_numbers(records, p)}
        if results:
            blocks += [f"## {title}", format_table(head, list(make_rows(results)))]
    if has_numbers(records, pieces[-1]):
        blocks += ["## Study", records[pieces[-1].name]["result"]["table"].strip()]
    return "\n\n".join(blocks) + "\n"


def has_numbers(records: Mapping[str, Record], piece: Piece) -> bool:
    """Tell whether a piece has numbers, of a part of it at least."""
    return "result" in records.get(piece.name, {})


def describe_status(record: Mapping[str, Any]) -> str:
    """Return the status of a piece for people."""
    return {"started": "unfinished", None: "to do"}.get(record.get("status"), record.get("status", ""))


# The command


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(__doc__)
    parser.add_argument("--output", type=output_path, metavar="FOLDER", help="default: docs/results/gpu")
    parser.add_argument("--work", type=output_path, metavar="FOLDER", help="of logs and runs; default: outputs/gpu")
    parser.add_argument("--pieces", nargs="+", default=[], metavar="NAME", help="run these only")
    parser.add_argument("--list", action="store_true", help="list the pieces with their status, and run nothing")
    parser.add_argument(
        "--time-limit",
        type=positive_float,
        default=TIME_LIMIT,
        metavar="SECONDS",
        help="of a piece (default %(default)s)",
    )
    parser.add_argument("--stop-after", type=positive_float, metavar="SECONDS", help="of all; the same command goes on")
    parser.add_argument("--study", type=Path, metavar="FILE", help="a study for the last piece")
    parser.add_argument("--jobs", type=positive_int, default=1, metavar="N", help="runs of the study at once")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install the wheels in it first")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few steps, to rehearse")
    parser.add_argument("--commit", metavar="TEXT", help="of this code, where it is no checkout")
    parser.add_argument("overrides", nargs="*", help="of the study's runs, as for train.py")
    args = parser.parse_intermixed_args()
    for text in args.overrides:
        if "=" not in text:
            raise UserError(f"{text} is not an override key=value of train.py")
    args.overrides += [text for text in args.pieces if "=" in text]  # --pieces takes all that follows it
    args.pieces = [text for text in args.pieces if "=" not in text]
    suffix = "tiny" if args.tiny else ""
    args.work = (args.work or ROOT / "outputs" / "gpu" / suffix).resolve()
    args.output = (args.output or (args.work / "results" if args.tiny else ROOT / "docs" / "results" / "gpu")).resolve()
    return args


def print_list(pieces: Sequence[Piece], output: Path, device: str) -> None:
    """Print each piece with its status and its command."""
    for piece in pieces:
        record = read_record(output, piece.name)
        is_other = record.get("status") == "finished" and not is_finished(record, piece, device)
        print(f"{piece.name:23} {'to do' if is_other else describe_status(record):11} {piece.command}")


def make_session(args: argparse.Namespace) -> Session:
    """Look at the machine and return what the pieces share; raise ``UserError`` where nothing could run."""
    packages = args.work / "packages"
    if args.wheels is not None:
        for name in install_wheels(args.wheels, packages):
            print(f"installed {name}")
    environment = make_environment(args.device, packages)
    machine = probe_machine(environment)
    check_machine(machine, args.device)
    return Session(
        args.output,
        args.work,
        {
            "device_type": args.device,
            **{key: machine[key] for key in ("device", "torch", "cuda", "python")},
            "commit": read_commit()[0] or args.commit,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        machine["modules"],
        environment,
        (f"--jobs={args.jobs}", *args.overrides),
        args.time_limit,
        lambda text: print(text, flush=True),
    )


def main() -> None:
    """Run the pieces that are not finished, and write the table."""
    args = parse_args()
    pieces = list_pieces(args.tiny, args.study)
    chosen = choose_pieces(pieces, args.pieces)
    if args.list:
        print_list(chosen, args.output, args.device)
        return
    session = make_session(args)
    print(f"{session.facts['device']}, torch {session.facts['torch']}, {len(chosen)} pieces")
    try:
        records = run_pieces(chosen, session, args.stop_after)
    finally:
        everything = {piece.name: read_record(args.output, piece.name) for piece in pieces}
        write_text(args.output / "gpu.md", format_report(pieces, everything, args.tiny))
        print(f"{args.output / 'gpu.md'} has the tables")
    failed = [f"{record['piece']} ({record['reason']})" for record in records if record["status"] == "failed"]
    if len(records) < len(chosen) or records[-1]["status"] == "unfinished":
        print("time is up; the same command goes on", file=sys.stderr)
        sys.exit(EXIT_REQUEUE)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(chosen)} pieces failed, the same command tries again: {'; '.join(failed)}"
        )


if __name__ == "__main__":
    run(main)
