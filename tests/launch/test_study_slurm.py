"""A study as an array of jobs, with a stand-in for sbatch; tests/integration/test_slurm.py has a real one."""

import os
import sys
from pathlib import Path

import pytest
from helpers.common import ROOT

from mtcl import UserError
from mtcl.launch.study_slurm import become_run, submit_study
from mtcl.run_lock import lock_run

FILE = """
seeds: [0, 1]
variants:
  off: {overrides: [regularizer=none]}
  on: {overrides: [gain=0.1]}
environment: {A_VARIABLE: 1}
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study's file, in a folder with a sbatch that writes down how it is called."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/sh\nfor word in "$@"; do echo "$word"; done >{tmp_path}/called\necho "7;cluster"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "study.yaml").write_text(FILE)
    return tmp_path / "study.yaml"


def submit(study: Path, *overrides: str, **options) -> tuple[list[str], list[str]]:
    """Return what was said, and the words that sbatch got."""
    lines: list[str] = []
    called = study.with_name("called")
    called.unlink(missing_ok=True)
    options = {"batch_file": ROOT / "scripts/slurm/study.sh", "list_tasks": lambda _: ["depth"], **options}
    submit_study(study, study.with_name("out"), overrides, root=study.parent, say=lines.append, **options)
    return lines, called.read_text().splitlines() if called.exists() else []


def finish(folder: Path, overrides: str = '["regularizer=none", "gain=2"]') -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    (folder / "run.json").write_text(f'{{"overrides": {overrides}}}')


def test_what_is_not_finished_is_an_array(study, tmp_path):
    lines, called = submit(study, "gain=2")
    batch_file, output = str(ROOT / "scripts/slurm/study.sh"), str(tmp_path / "out")
    assert called == ["--parsable", "--array=0,1,2,3", batch_file, str(study), "--output", output, "gain=2"]
    assert lines[:2] == [
        "study: 4 of 4 runs submitted as the array 7",
        f"  7_0: off seed 0, log {tmp_path}/out/off/seed_0.log",
    ]
    finish(tmp_path / "out" / "off" / "seed_1")
    with lock_run(tmp_path / "out" / "on" / "seed_0"):
        assert submit(study, "gain=2", num_parallel=5)[1][1] == "--array=0,3%5"
    assert submit(study, "gain=2", only=["off"])[1][1] == "--array=0"
    finish(tmp_path / "out" / "off" / "seed_0")
    assert submit(study, "gain=2", only=["off"]) == (["study: nothing to submit, 2 runs are finished or running"], [])


def test_what_can_not_be_submitted_is_one_sentence(study, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"--batch-file .*mine\.sh: there is no such file; copy scripts/slurm/study\.sh"
    ):
        submit(study, batch_file=tmp_path / "mine.sh")
    with pytest.raises(UserError, match=r"--only of: .*choose among off, on"):
        submit(study, only=["of"])
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho sbatch: error: Invalid account >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"sbatch refused .*study\.sh: sbatch: error: Invalid account"):
        submit(study)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on this machine"):
        submit(study)


def test_an_element_of_the_array_becomes_the_run(study, tmp_path):
    """Its exit code is the run's; its output goes to the run's log, after what earlier ones wrote."""
    train = "import os, sys; print(os.environ['A_VARIABLE'], os.getpid(), *sys.argv[1:], flush=True); sys.exit(75)"
    lines = tmp_path / "lines"
    pid = os.fork()
    if pid == 0:
        try:
            become_run(
                study,
                tmp_path / "out",
                ["gain=2"],
                3,
                command=[sys.executable, "-c", train],
                root=tmp_path,
                list_tasks=lambda _: ["depth"],
                say=lines.write_text,
            )
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    folder = tmp_path / "out" / "on" / "seed_1"
    assert lines.read_text() == f"on seed 1 started, log {folder}.log"
    command, line = folder.with_suffix(".log").read_text().splitlines()
    assert command.startswith(f"$ {sys.executable} -c ")
    assert line == f"1 {pid} gain=2 seed=1 hydra.run.dir={folder}"
    assert folder.with_suffix(".json").is_file()


def test_a_run_that_is_finished_or_is_none_is_not_started(study, tmp_path):
    lines: list[str] = []

    def become(number: int) -> None:
        options = {"command": ["false"], "root": tmp_path, "list_tasks": lambda _: [], "say": lines.append}
        become_run(study, tmp_path / "out", ["gain=2"], number, **options)

    finish(tmp_path / "out" / "off" / "seed_0")
    become(0)
    with lock_run(tmp_path / "out" / "off" / "seed_1"):
        become(2)
    assert lines == ["off seed 0 is finished", "off seed 1 is running elsewhere"]
    with pytest.raises(UserError, match=r"--run 4: .*has 4 runs; give a number from 0 to 3"):
        become(4)
