"""The script that follows docs/first_hour.md: its commands are the page's, and it refuses what a reader would."""

import os
import re
import runpy
import subprocess
import sys

import pytest
from helpers.common import ROOT

from mtcl.errors import UserError

SCRIPT = ROOT / "scripts" / "dev" / "first_hour.py"
FIRST_HOUR = runpy.run_path(str(SCRIPT))
Step = FIRST_HOUR["Step"]


def test_its_commands_are_those_of_the_page():
    page = (ROOT / "docs" / "first_hour.md").read_text("utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("mtcl ")]
    assert lines == list(FIRST_HOUR["COMMANDS"])


def test_a_first_line_that_is_late_or_missing_is_refused():
    steps = [Step("mtcl a", 9.9, 30.0, "loading"), Step("mtcl b", 10.1, 11.0, "done"), Step("mtcl c", 0.0, 1.0, "")]
    with pytest.raises(UserError, match=r"later than 10 s: mtcl b: 10\.1 s; mtcl c: never$"):
        FIRST_HOUR["check_first_lines"](steps, 10.0)
    FIRST_HOUR["check_first_lines"](steps[:1], 10.0)
    assert "42.0 s  in all" in FIRST_HOUR["format_steps"](steps)


def test_a_command_that_fails_is_refused_and_its_first_line_is_timed(tmp_path, capfd):
    code = "import time; print(); print('begins', flush=True); time.sleep(0.3); print('ends')"
    step = FIRST_HOUR["run_command"]("mtcl x", [sys.executable, "-c", code], tmp_path)
    assert step.line == "begins"
    assert step.total - step.first >= 0.3
    with pytest.raises(UserError, match="mtcl x: exit code 3"):
        FIRST_HOUR["run_command"]("mtcl x", [sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


@pytest.mark.slow
def test_the_first_hour_in_an_empty_folder(tmp_path):
    pytest.importorskip("gradio")
    command = [sys.executable, str(SCRIPT), "--tiny", "--folder", str(tmp_path / "hour"), "--first-line", "60"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-2000:]}"
    assert result.stdout.count("\n$ mtcl ") == 7
    assert "s  in all" in result.stdout
