"""Train as one process and as several."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import ranks_worker
from helpers.common import ROOT, TINY


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


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def started(*command: object) -> subprocess.CompletedProcess:
    arguments = [str(word) for word in command]
    return subprocess.run(
        arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )


def worked(folder: Path, command: list[str] | None, *overrides: str) -> tuple[dict, dict]:
    """What ranks_worker.py found, and the state it left in ``folder / "state.pt"``. No command: in this process."""
    folder.mkdir()
    if command is None:
        ranks_worker.main(folder, [*RANKS_OVERRIDES, *overrides])
    else:
        process = started(
            *command, ROOT / "tests" / "helpers" / "ranks_worker.py", folder, *RANKS_OVERRIDES, *overrides
        )
        assert process.returncode == 0, process.stderr[-3000:]
    return json.loads((folder / "found.json").read_text()), torch.load(folder / "state.pt")


def check_same(one: tuple[dict, dict], two: tuple[dict, dict]) -> None:
    """Losses, gradients at the taps, weights, pictures scored and their metrics."""
    (one, a), (two, b) = one, two
    assert len(one["losses"]) == len(two["losses"]) == 3
    for x, y in zip(one["losses"], two["losses"], strict=True):
        assert x.keys() == y.keys()
        losses = [name for name in x if "/" not in name]
        assert {"semseg", "sal", "edge", "contrast"} <= set(losses)
        assert [x[name] for name in losses] == pytest.approx([y[name] for name in losses], abs=1e-5, nan_ok=True)
        assert x == pytest.approx(y, rel=1e-3, abs=1e-4, nan_ok=True), "gradients at the taps"
    weights, others = weights_of(a), weights_of(b)
    assert weights.keys() == others.keys()
    for name in weights:
        assert torch.allclose(others[name], weights[name], rtol=0, atol=2e-4), name
    assert one["images"] == two["images"] == 7, "no picture is scored twice"
    for task, metrics in one["metrics"].items():
        assert two["metrics"][task] == pytest.approx(metrics, rel=1e-2, abs=1e-3, nan_ok=True), task


def weights_of(state: dict) -> dict[str, torch.Tensor]:
    weights = {f"{part}.{n}": v for part in ("model", "regularizer") for n, v in (state[part] or {}).items()}
    return weights | {f"ema.{name}": value for name, value in (state["ema"] or {"model": {}})["model"].items()}
