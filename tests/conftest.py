"""Shared by the tests: composing configs, running the entry points in this process, tiny runs."""

import logging
import os
import runpy
import signal
import sys
from collections.abc import Callable

import pytest
import torch
from helpers.common import ROOT, Result
from helpers.parsed_configs import keep_parsed_configs

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; tests send it to themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)

keep_parsed_configs()
torch.set_num_threads(1)  # at these sizes more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # the same for processes that tests start


@pytest.fixture
def cli(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run ``train.py`` or ``evaluate.py`` with these words, as the shell would."""

    def run(script: str, *arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
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
