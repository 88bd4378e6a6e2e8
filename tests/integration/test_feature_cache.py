"""Whole runs on a feature cache: several processes, several runs at once, resumed runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.common import ROOT, composed
from helpers.processes import RANKS_OVERRIDES, TORCHRUN, check_exit_code, started

from mtcl.cli.train import train

OVERRIDES = [*RANKS_OVERRIDES, "backbone.trainable=frozen", "data.views=2", "schedule=constant", "data.workers=1"]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["model"]


@pytest.mark.slow
def test_two_processes_share_the_work_of_filling_and_a_resumed_run_ends_at_the_same_weights(tmp_path):
    cache = f"data.feature_cache={tmp_path}/cache"

    def run(name: str, *overrides: str) -> str:
        folder = tmp_path / name
        process = started(*TORCHRUN, "train.py", *OVERRIDES, cache, f"hydra.run.dir={folder}", *overrides)
        check_exit_code(process)
        return process.stdout

    assert "14 are to be computed" in run("whole", "trainer.max_steps=4")
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.array")}
    assert len(entries) == 2 * 7 + 7
    assert run("cut", "trainer.max_steps=2").count("all there") == 2
    run("cut", "trainer.max_steps=4", "resume=auto")
    assert {path: path.stat().st_mtime_ns for path in entries} == entries
    uncut, cut = read_weights(tmp_path / "whole"), read_weights(tmp_path / "cut")
    assert all(torch.equal(value, cut[name]) for name, value in uncut.items())


def test_a_resumed_run_uses_the_cache_of_the_weights_in_its_checkpoint(tmp_path, caplog):
    """Not that of the random weights with which the model is built before they are restored."""
    overrides = [*OVERRIDES, "data.workers=0", f"data.feature_cache={tmp_path}/cache", "trainer.validate_first=false"]
    overrides += ["trainer.val_interval=null", "evaluation.score_boundaries=false"]
    torch.manual_seed(5)
    config = composed(*overrides, "trainer.max_steps=1", "seed=5")
    train(config, tmp_path / "run")
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.array")}
    checkpoint = tmp_path / "run" / "checkpoints" / "last.pt"
    with caplog.at_level("INFO"):  # another seed draws another random backbone
        train(composed(*overrides, "trainer.max_steps=2", f"resume={checkpoint}", "seed=6"), tmp_path / "resumed")
    assert caplog.text.count("all there") == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.array")} == entries


@pytest.mark.slow
def test_runs_that_fill_one_cache_at_once_train_as_if_alone(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "train.py", *OVERRIDES, "trainer.max_steps=3"]

    def start(name: str, cache: str) -> subprocess.Popen:
        overrides = [f"data.feature_cache={tmp_path}/{cache}", f"hydra.run.dir={tmp_path}/{name}"]
        return subprocess.Popen([*command, *overrides], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    together = [start("first", "shared"), start("second", "shared")]
    assert [process.wait(300) for process in together] == [0, 0]
    assert start("alone", "own").wait(300) == 0
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("first", "second", "alone")]
    assert metrics[0] == metrics[1] == metrics[2]
    assert not list((tmp_path / "shared").rglob("*.tmp"))
