"""Shared by the tests: composing configs, running the entry points in this process, tiny runs."""

import logging
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[1]
TINY = ["trainer.device=cpu", "debug=tiny", "data.size=[32,64]", "backbone=resnet18"]
TINY += ["decoder.width=16", "decoder.head_width=8"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; tests send it to themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # at these sizes more threads only wait for each other


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run ``train.py`` or ``evaluate.py`` with these words, as the shell would."""

    def run(script: str, *words: str) -> Result:
        monkeypatch.setattr(sys, "argv", [script, *words])
        code = 0
        handlers = logging.getLogger().handlers[:]
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            logging.getLogger().handlers = handlers  # Hydra's write to this test's stdout
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def composed(*overrides: str, name: str = "train") -> DictConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose(name, list(overrides))


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))
