"""Train as one process and as several."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from helpers import ranks_worker
from helpers.common import ROOT, TINY
from helpers.shrunken import shrunk


def torchrun(processes: int, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        *options,
    ]


TORCHRUN = torchrun(2)

RANKS_OVERRIDES = [
    *TINY,
    "backbone=resnet18",  # the small maps of test_resnet make batch norm magnify rounding
    "data.batch_size=4",
    "data.limit=7",
    "data.eval_batch_size=2",
    "optimizer.lr=1e-3",
    "trainer.num_panels=0",
]

# No dropped paths, which every process draws for itself; and Adam would weigh up noise.
VIT = ["backbone=vit_small", *shrunk("multi_head", "vit_small"), "++backbone.kwargs.drop_path_rate=0", "optimizer=sgd"]
VIT += ["regularizer.lr=1e-4"]

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "PYTHONFAULTHANDLER": "1",  # a process that aborts prints where it was
}


def started(*command: object, timeout: float = 300) -> subprocess.CompletedProcess:
    arguments = [str(word) for word in command]
    return subprocess.run(
        arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )


def check_exit_code(process: subprocess.CompletedProcess, code: int = 0) -> None:
    """Check how a process has ended; else show the end of what it wrote, and of what its own processes did.

    torchrun adds a traceback of its own after theirs, which says nothing.
    """
    errors = process.stderr.split("torch/distributed/run.py")[0]
    assert process.returncode == code, f"{process.stdout[-1000:]}\n{errors[-4000:]}"


@contextmanager
def started_in_background(*command: object) -> Iterator[subprocess.Popen]:
    """Start a command whose errors go into its output; what is left of it ends with the block."""
    arguments = [str(word) for word in command]
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> int:
    """Wait until a run has logged a training step >= ``step`` and saved a checkpoint; return its last logged step."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the run ended with {process.returncode}: {process.communicate()[0][-3000:]}")
        log = folder / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        logged = [record["step"] for record in records if record["kind"] == "train"]
        if logged and logged[-1] >= step and (folder / "checkpoints" / "last.pt").exists():
            return logged[-1]
        time.sleep(0.02)
    pytest.fail(f"no step {step} within four minutes")


def find_process_of_rank(parent: int, rank: int) -> int:
    """Return the process that torchrun (``parent``) started with RANK=``rank``."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in children:
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    pytest.fail(f"none of {children} is rank {rank}")


Outcome = tuple[dict, dict]  # what ranks_worker.py wrote down, and the trainer's state


def worked(folder: Path, command: list[str] | None, *overrides: str) -> Outcome:
    """Let ranks_worker.py do one case in ``folder`` and return what came of it. No command: in this process."""
    return run_cases(folder.parent, command, {folder.name: overrides})[folder.name]


def run_cases(folder: Path, command: list[str] | None, cases: Mapping[str, Sequence[str]]) -> dict[str, Outcome]:
    """Let ranks_worker.py do several cases, one start of processes for all of them.

    Args:
        folder: gets a folder for each case, with ``state.pt``.
        command: starts the processes; ``None``: the cases are done in this process.
        cases: name -> words, beside ``RANKS_OVERRIDES``.

    Returns:
        Name -> what came of it.
    """
    arguments = {str(folder / name): add_common_overrides(overrides) for name, overrides in cases.items()}
    for path in arguments:
        Path(path).mkdir(parents=True)
    if command is None:
        ranks_worker.main(arguments)
    else:
        path_of_cases = folder / "cases.json"
        path_of_cases.write_text(json.dumps(arguments))
        worker = ROOT / "tests" / "helpers" / "ranks_worker.py"
        check_exit_code(started(*command, worker, path_of_cases, timeout=200 + 100 * len(cases)))
    return {
        name: (json.loads((folder / name / "found.json").read_text()), torch.load(folder / name / "state.pt"))
        for name in cases
    }


def add_common_overrides(overrides: Sequence[str]) -> list[str]:
    """Put ``RANKS_OVERRIDES`` before those of a case; a case with another decoder brings that decoder's sizes."""
    other_decoder = any(word.startswith("decoder=") for word in overrides)
    return [word for word in RANKS_OVERRIDES if not (other_decoder and word.startswith("decoder."))] + [*overrides]


def check_same(one: Outcome, two: Outcome, case: str = "", metrics_rel: float = 1e-2) -> None:
    """Compare losses, gradients at the taps, weights, pictures scored and their metrics (to within ``metrics_rel``)."""
    (one, a), (two, b) = one, two
    assert len(one["losses"]) == len(two["losses"]) == 3, case
    for x, y in zip(one["losses"], two["losses"], strict=True):
        assert x.keys() == y.keys(), case
        assert x.get("loss", 0) == pytest.approx(y.get("loss", 0), rel=1e-5, nan_ok=True), f"{case}: the total"
        losses = [name for name in x if "/" not in name and name != "loss"]
        assert {"semseg", "sal", "edge", "regularizer"} <= set(losses), case
        for name in losses:
            assert x[name] == pytest.approx(y[name], rel=1e-5, abs=1e-5, nan_ok=True), (case, name)
        assert x == pytest.approx(y, rel=1e-3, abs=1e-4, nan_ok=True), f"{case}: gradients at the taps"
    weights, others = weights_of(a), weights_of(b)
    assert weights.keys() == others.keys(), case
    for name in weights:
        assert torch.allclose(others[name], weights[name], rtol=0, atol=2e-4), (case, name)
    assert one["images"] == two["images"] == 7, f"{case}: no picture is scored twice"
    for task, metrics in one["metrics"].items():
        assert two["metrics"][task] == pytest.approx(metrics, rel=metrics_rel, abs=1e-3, nan_ok=True), (case, task)


def weights_of(state: dict) -> dict[str, torch.Tensor]:
    weights = {f"{part}.{n}": v for part in ("model", "regularizer") for n, v in (state[part] or {}).items()}
    return weights | {f"ema.{name}": value for name, value in (state["ema"] or {"model": {}})["model"].items()}
