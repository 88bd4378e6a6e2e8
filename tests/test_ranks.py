"""Several processes do what one would do with the whole batch (gloo, on a CPU)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

from mtcl import UserError
from mtcl.data.loading import EpochBatches

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
WORDS = [*TINY, "data.batch_size=4", "data.limit=7", "data.eval_batch_size=2", "optimizer.lr=1e-3", "trainer.panels=0"]


def started(*command: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    "words",
    [
        ["data.labels=random"],
        pytest.param(["regularizer=mtpsl"], marks=pytest.mark.slow),
        pytest.param(["trainer.compile=true", "tasks.names=[depth,normals]"], marks=pytest.mark.slow),
    ],
    ids=["contrastive", "mtpsl", "compiled"],
)
def test_two_processes_with_half_the_batch_are_one_with_the_whole(words, tmp_path):
    """Partial labels: the processes have different numbers of valid pixels, of anchors, of pictures without a label."""
    found = []
    for name, command in (("one", [sys.executable]), ("two", TORCHRUN)):
        folder = tmp_path / name
        folder.mkdir()
        done = started(*command, ROOT / "tests" / "ranks_worker.py", folder, *WORDS, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append((json.loads((folder / "found.json").read_text()), torch.load(folder / "weights.pt")))
    (one, weights), (two, others) = found
    assert len(one["losses"]) == 3
    for a, b in zip(one["losses"], two["losses"], strict=True):
        assert a.keys() == b.keys()
        losses = [name for name in a if "/" not in name]
        assert {"depth", "normals", "contrast"} <= set(losses)
        assert [a[name] for name in losses] == pytest.approx([b[name] for name in losses], abs=1e-5, nan_ok=True)
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4, nan_ok=True), "gradients at the taps"
    assert weights.keys() == others.keys()
    for name in weights if "trainer.compile=true" not in words else []:  # rounds otherwise, and Adam turns on signs
        assert torch.allclose(others[name], weights[name], rtol=0, atol=2e-4), name
    assert one["images"] == two["images"] == 7, "no picture is scored twice"
    for task, metrics in one["metrics"].items():
        assert two["metrics"][task] == pytest.approx(metrics, rel=1e-2, abs=1e-3, nan_ok=True), task


@pytest.mark.slow
def test_train_py_under_torchrun(tmp_path):
    """One folder, one writer, one table; resumed in the middle it ends at the same weights."""
    words = [*WORDS, "trainer.max_steps=4", "trainer.checkpoint_interval=2"]

    def run(folder: Path, *more: str) -> subprocess.CompletedProcess:
        return started(*TORCHRUN, "train.py", *words, f"hydra.run.dir={folder}", *more)

    done = run(tmp_path / "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["processes"] == 2
    assert done.stdout.count("validation pictures:\n") == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert run(tmp_path / "cut", "trainer.max_steps=2", "schedule=constant").returncode == 0
    whole = run(tmp_path / "whole2", "schedule=constant")
    again = run(tmp_path / "cut", "schedule=constant", "resume=auto")
    assert whole.returncode == again.returncode == 0, again.stderr[-3000:]
    a, b = (torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True) for name in ("whole2", "cut"))
    assert len(a["rng"]) == 2
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name


def test_parts_of_a_batch_are_the_batch():
    whole = iter(EpochBatches(20, 6, seed=1, start_step=2))
    parts = [iter(EpochBatches(20, 6, seed=1, start_step=2, part=(i, 3))) for i in range(3)]
    for _ in range(5):
        pieces = [next(part) for part in parts]
        assert sorted(key for piece in pieces for key in piece) == sorted(next(whole))
        assert {len(piece) for piece in pieces} == {2}
    with pytest.raises(UserError, match="multiple of 4"):
        EpochBatches(20, 6, seed=1, part=(0, 4))
