"""Follow docs/first_hour.md in an empty folder, with mtcl installed from a wheel, and print how long each step takes.

    python scripts/dev/first_hour.py [--wheel FILE] [--full-install] [--tiny] [--folder FOLDER] [--first-line SECONDS]

The wheel is built from this checkout unless --wheel names one. The new environment sees the dependencies that are
installed here; with --full-install it gets its own from the package index, which takes minutes. --tiny shortens the
trainings and makes the model small. The two photos are drawn by this script; nothing else needs a network.

A step fails if its command does, if a file that it should write is missing, or if its first line comes later than
--first-line. The demo is asked for its page over HTTP and then ended as by Ctrl-C. The folder is kept if it is named.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mtcl.cli.arguments import CommandParser, output_path, positive_float
from mtcl.cli.script import run
from mtcl.errors import UserError
from mtcl.launch.processes import stop_processes
from mtcl.run_folder import METRICS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("mtcl", "configs", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")  # of the wheel
# docs/first_hour.md has these lines, in this order (tested). TIME: the folder of the first run.
COMMANDS = (
    "mtcl train experiment=rooms trainer.max_steps=60",
    "mtcl train -m experiment=rooms trainer.max_steps=60 regularizer=none,contrastive seed=0,1",
    "mtcl runs",
    "mtcl compare outputs/rooms/sweep",
    "mtcl report outputs/rooms/sweep --output report.html",
    "mtcl predict outputs/rooms/TIME images --output predictions",
    "mtcl demo outputs/rooms/TIME",
)
# Files that a command leaves, by the command without its options, and how many.
RESULTS = {
    "mtcl train": (f"outputs/rooms/2*/{METRICS}", 1),
    "mtcl train -m": (f"outputs/rooms/sweep/*/{METRICS}", 4),
    "mtcl report": ("report.html", 1),
    "mtcl predict": ("predictions/panel/*.jpg", 2),
}
TINY = ("debug=tiny", "data.size=[32,64]", "backbone=test_resnet", "decoder.width=16", "decoder.head_width=8")
PATIENCE = 30.0  # seconds that a command has to end once it is told to
START_SECONDS = 120.0  # that the demo may take until it shows its address


@dataclass(frozen=True)
class Step:
    """A command with the seconds until its first line and until its end, and that line."""

    command: str
    first: float
    total: float
    line: str


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this checkout into ``folder``, from a copy: an older build's files must not get into it.

    Returns:
        The wheel's path.
    """
    copy = folder / "source"
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    _run([sys.executable, "-c", build, str(folder / "dist")], copy)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def create_environment(folder: Path, wheel: Path, full_install: bool = False) -> Path:
    """Create an environment with mtcl from a wheel.

    Args:
        folder: of the new environment.
        wheel: the wheel's path.
        full_install: install the dependencies, too; else those of this Python are seen, but not its mtcl.

    Returns:
        The folder of the environment's programs.
    """
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    install = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if full_install:
        _run([*install, f"{wheel}[demo]"], folder)
        return programs
    _run([*install, "--no-deps", "--no-index", str(wheel)], folder)
    # A .pth file in a folder that a .pth file adds is not read: an editable mtcl of this Python stays out.
    packages = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"]
    hook = f"import sys; sys.path.append({sysconfig.get_paths()['purelib']!r})\n"
    Path(packages, "dependencies.pth").write_text(hook, encoding="utf-8")
    return programs


def clean_environment() -> dict[str, str]:
    """Return the environment variables without those that could bring this checkout's mtcl."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}


def draw_photos(folder: Path) -> None:
    """Write two images, 480x640, of a floor, a wall and a box in light from the left, with the noise of a camera."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows, columns = np.mgrid[:480, :640]
    for name, edge in (("kitchen", 260), ("office", 320)):
        image = np.where((rows > edge)[..., None], (120, 96, 72), (200, 196, 184)) * (1 - columns[..., None] / 1600)
        image[edge - 60 : edge + 80, 180:330] = (60, 80, 140)
        noisy = np.clip(image + rng.normal(0, 4, image.shape), 0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{name}.jpg")


def run_command(command: str, arguments: Sequence[str], folder: Path) -> Step:
    """Run a command to its end and show its lines.

    Args:
        command: as it is typed, for the table.
        arguments: what is started.
        folder: where.

    Raises:
        UserError: its exit code is not 0.
    """
    print(f"\n$ {command}", flush=True)
    start = time.monotonic()
    first, line = 0.0, ""
    with _started(arguments, folder) as process:
        for text in process.stdout or ():
            if not first and text.strip():
                first, line = time.monotonic() - start, text.strip()
            print(text, end="", flush=True)
        if code := process.wait():
            raise UserError(f"{command}: exit code {code}")
    return Step(command, first, time.monotonic() - start, line)


def run_demo(command: str, arguments: Sequence[str], folder: Path) -> Step:
    """Start the demo, ask for its page and end it.

    Raises:
        UserError: it does not start, or answers with something else than its page.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    print(f"\n$ {command}", flush=True)
    start = time.monotonic()
    first, line = 0.0, ""
    with _started([*arguments, f"--port={port}"], folder) as process:
        for text in process.stdout or ():
            print(text, end="", flush=True)
            if not first:
                first, line = time.monotonic() - start, text.strip()
            if f"http://127.0.0.1:{port}" in text:
                break
            if time.monotonic() - start > START_SECONDS:
                raise UserError(f"{command}: no address after {START_SECONDS:.0f} s")
        else:
            raise UserError(f"{command}: ended with exit code {process.wait()} before it showed an address")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=START_SECONDS) as answer:
            page = answer.read().decode("utf-8", "replace")
        if answer.status != 200 or "All tasks of an image" not in page:
            raise UserError(f"{command}: the page is not the demo's (status {answer.status})")
        total = time.monotonic() - start
        process.send_signal(signal.SIGINT)
        process.wait(timeout=PATIENCE)
        return Step(command, first, total, line)


def follow(folder: Path, programs: Path, tiny: bool) -> list[Step]:
    """Run all commands of the page in a folder, and check what they leave there.

    Args:
        folder: an empty one.
        programs: the folder with the program ``mtcl``.
        tiny: shorten the trainings and make the model small.

    Raises:
        UserError: a command fails, or leaves not the files that it should.
    """
    draw_photos(folder / "images")
    steps = []
    for typed in COMMANDS:
        name = " ".join(typed.split()[: 3 if " -m " in typed else 2])
        newest = next(iter(sorted((folder / "outputs" / "rooms").glob("2*"))), Path("TIME")).name
        command = typed.replace("TIME", newest)
        if tiny and name.startswith("mtcl train"):
            command = f"{command.replace('max_steps=60', 'max_steps=2')} {shlex.join(TINY)}"
        arguments = [str(programs / "mtcl"), *shlex.split(command)[1:]]
        steps.append((run_demo if name == "mtcl demo" else run_command)(command, arguments, folder))
        pattern, count = RESULTS.get(name, ("", 0))
        written = list(folder.glob(pattern)) if pattern else []
        if len(written) != count:
            raise UserError(f"{command}: {len(written)} files {pattern}, not {count}")
    return steps


def format_steps(steps: Sequence[Step]) -> str:
    """Return a table: for each step the seconds until its first line and until its end, and the line's beginning."""
    lines = [f"{'first line':>10}  {'total':>8}  command", "-" * 72]
    for step in steps:
        lines.append(f"{step.first:8.1f} s  {step.total:6.1f} s  {step.command}")
        lines += [f"{'':22}{step.line[:96]}"] if step.line else []
    lines.append(f"{'':10}  {sum(step.total for step in steps):6.1f} s  in all")
    return "\n".join(lines)


def check_first_lines(steps: Sequence[Step], limit: float) -> None:
    """Raise ``UserError`` where a command's first line came later than ``limit`` seconds, or never."""
    late = [step for step in steps if step.first > limit or not step.line]
    if late:
        names = "; ".join(f"{step.command}: {f'{step.first:.1f} s' if step.line else 'never'}" for step in late)
        raise UserError(f"the first line came later than {limit:g} s: {names}")


def _run(arguments: Sequence[str], folder: Path) -> None:
    """Run a command silently; ``UserError`` with the end of what it printed where it fails."""
    process = subprocess.run(
        arguments, cwd=folder, env=clean_environment(), capture_output=True, text=True, check=False
    )
    if process.returncode:
        lines = (process.stdout + process.stderr).strip().splitlines()
        raise UserError(f"{shlex.join(arguments)[:200]}: exit code {process.returncode}: {' | '.join(lines[-3:])}")


@contextlib.contextmanager
def _started(arguments: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a command whose lines come as soon as it prints them; in the end stop it if it still runs."""
    environment = clean_environment() | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        arguments,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        stop_processes([process], signal.SIGTERM, PATIENCE)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(__doc__)
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="default: built from this checkout")
    parser.add_argument("--full-install", action="store_true", help="install the dependencies anew")
    parser.add_argument("--tiny", action="store_true", help="two steps of a small model")
    parser.add_argument("--folder", type=output_path, metavar="FOLDER", help="default: a temporary one")
    parser.add_argument(
        "--first-line", type=positive_float, default=10.0, metavar="SECONDS", help="default: %(default)s"
    )
    return parser.parse_args()


def main() -> None:
    """Install, follow the page and print the table."""
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that commands are stopped then, too
    if args.wheel is not None and not args.wheel.is_file():
        raise UserError(f"--wheel {args.wheel} is not a file")
    if args.folder is not None and args.folder.exists():
        raise UserError(f"--folder {args.folder} exists already; choose another")
    with contextlib.ExitStack() as stack:
        if args.folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mtcl_first_hour_")))
        else:
            folder = args.folder.resolve()
            folder.mkdir(parents=True)
        start = time.monotonic()
        print("building the wheel and installing it into a new environment", flush=True)
        wheel = build_wheel(folder) if args.wheel is None else args.wheel.resolve()
        programs = create_environment(folder / "env", wheel, args.full_install)
        install = Step(f"pip install {wheel.name}", 0.0, time.monotonic() - start, "")
        (folder / "work").mkdir()
        steps = follow(folder / "work", programs, args.tiny)
        print(f"\n{format_steps([install, *steps])}")
        check_first_lines(steps, args.first_line)


if __name__ == "__main__":
    run(main)
