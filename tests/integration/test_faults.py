"""What a cluster does to a run: kill -9 at any moment, damaged files, a full disk, a folder that goes away."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.common import ROOT, TINY, flip
from helpers.run_folders import assert_same, assert_same_run

from mtcl.training.checkpoint import latest_valid_checkpoint
from mtcl.training.checkpoint_file import read_checkpoint_file

pytestmark = pytest.mark.slow

OVERRIDES = [*TINY, "tasks.names=[semseg,depth]", "trainer.validate_first=false"]
OVERRIDES += ["trainer.val_interval=null", "trainer.num_panels=0", "evaluation.score_boundaries=false", "data.limit=7"]
OVERRIDES += ["trainer.max_steps=60"]

# Imports once, then a process for every run of train.py, ended with SIGKILL at a moment drawn from the seed.
DRIVER = r"""
import json, os, random, runpy, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import mtcl.cli.train, mtcl.cli.hydra_app, hydra, torch.utils.tensorboard  # noqa
plan = json.loads(sys.argv[1])
folder, dice, resumed = Path(plan["folder"]), random.Random(plan["seed"]), []
checkpoints = folder / "checkpoints"

def start(words, log):
    pid = os.fork()
    if pid == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.argv = ["train.py", *words]
        code = 0
        try:
            runpy.run_path("train.py", run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 99
        sys.stdout.flush(), sys.stderr.flush()
        import threading
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        os._exit(code)
    return pid

def records():
    return (folder / "log.jsonl").read_text().count('"train"') if (folder / "log.jsonl").exists() else 0

def moment():
    # Gives way to the next look until the moment has come.
    if plan["after"]:
        while records() < plan["after"]:
            yield
        return
    if dice.random() < 0.25:
        until = time.monotonic() + dice.uniform(0, 0.6)
        while time.monotonic() < until:
            yield
        return
    wanted, before = dice.randint(0, 4), records()  # a first checkpoint follows its record
    while records() == before:  # a resumed run drops what comes anew
        yield
    before = records()
    while records() < before + wanted:
        yield
    if dice.random() < 0.5:
        while not any(checkpoints.glob(".*.tmp")):
            yield
    until = time.monotonic() + dice.uniform(0, 0.03)
    while time.monotonic() < until:
        yield

kills, code = 0, None
for attempt in range(200):
    pid = start(plan["words"], plan["log"])
    wait = moment()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if kills < plan["kills"] and next(wait, "now") == "now":
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            break
        time.sleep(0.0005)
    if code is not None:
        break
print(json.dumps({"kills": kills, "code": code}))
"""


def drive(folder: Path, *overrides: str, kills: int = 0, after_step: int = 0, seed: int = 0) -> tuple[dict, str]:
    """Runs of train.py in ``folder``, the first ``kills`` of them killed, the last to its end; what they printed.

    ``after``: kill once so many steps are recorded, else at drawn moments.
    """
    log = folder.with_suffix(".log")
    all_overrides = [*OVERRIDES, "resume=auto", f"hydra.run.dir={folder}", *overrides]
    plan = {
        "folder": str(folder),
        "words": all_overrides,
        "kills": kills,
        "after": after_step,
        "seed": seed,
        "log": str(log),
    }
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(plan)], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr
    text = log.read_text()
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["kills"] == kills, text[-3000:]
    assert report["code"] == 0, text[-3000:]
    return report, text


@pytest.fixture(scope="module")
def uncut_run(tmp_path_factory) -> Path:
    """60 steps without an interruption."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    drive(folder, "trainer.checkpoint_interval=2")
    assert read_checkpoint_file(folder / "checkpoints" / "last.pt")["step"] == 60
    return folder


def test_60_steps_are_37_and_a_kill_and_23(uncut_run, tmp_path):
    folder = tmp_path / "run"
    # Written at once: a thread might still be at it two steps later.
    overrides = ["trainer.checkpoint_interval=37", "trainer.async_checkpoints=false"]
    _, text = drive(folder, *overrides, kills=1, after_step=39)
    assert f"resumed at step 37 from {folder}/checkpoints/last.pt" in text
    assert_same_run(uncut_run, folder)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_killed_at_six_moments_ends_as_if_it_had_not_been(uncut_run, tmp_path, asynchronous):
    folder = tmp_path / "run"
    overrides = ["trainer.checkpoint_interval=1", f"trainer.async_checkpoints={asynchronous}"]
    _, text = drive(folder, *overrides, kills=6, seed=len(asynchronous))
    assert text.count("resumed at step") >= 1  # some are killed before they say so
    assert "damaged" not in text
    assert "Traceback" not in text
    assert not list(folder.rglob(".*.tmp"))
    assert_same_run(uncut_run, folder)


def positions(path: Path) -> dict[str, list[int]]:
    """Places in a checkpoint, by what lies there."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries, directory, comment = archive.infolist(), archive.start_dir, len(archive.comment)
    dice = random.Random(0)
    pick = dice.sample(entries, 8)
    largest = max(entries, key=lambda entry: entry.file_size)
    (program,) = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    end = size - comment
    return {
        "headers of entries": [entry.header_offset + dice.randrange(30) for entry in pick],
        "names of entries": [entry.header_offset + 30 + dice.randrange(len(entry.filename)) for entry in pick],
        "pickle": [program.header_offset + 200 + dice.randrange(program.file_size - 200) for _ in range(10)],
        "tensors": [largest.header_offset + 200 + dice.randrange(largest.file_size - 200) for _ in range(8)],
        "anywhere": [dice.randrange(size) for _ in range(8)],
        "directory": [dice.randrange(directory, end - 22) for _ in range(8)],
        "end of the archive": [*range(end - 22, end, 3)],
        "checksum": [end, end + 5, end + 11, end + 12, end + 40, size - 1],
    }


def test_damage_anywhere_is_seen_and_the_one_before_is_used(uncut_run, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(uncut_run / "checkpoints", folder)
    (folder / "best.pt").unlink()
    path = folder / "last.pt"
    places = positions(path)
    assert sum(map(len, places.values())) >= 50
    for part, damaged in places.items():
        for position in damaged:
            flip(path, position)
            best = latest_valid_checkpoint(folder)
            assert (best.path.name, best.checkpoint.step) == ("previous.pt", 58), (part, position)
            assert [error.path for error in best.rejected] == [path]
            flip(path, position)
    assert latest_valid_checkpoint(folder).checkpoint.step == 60
    whole_file = path.read_bytes()
    for part, damaged in places.items():
        for position in damaged[:4]:
            path.write_bytes(whole_file[:position])
            assert latest_valid_checkpoint(folder).path.name == "previous.pt", (part, position)


@contextlib.contextmanager
def mounted(folder: Path, megabytes: int):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def command(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *OVERRIDES, f"hydra.run.dir={folder}", *overrides]


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(folder, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=600)


def assert_one_sentence(result: subprocess.CompletedProcess, *fragments: str) -> None:
    assert result.returncode == 1, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    for word in fragments:
        assert word in line


def test_a_full_file_system_costs_nothing_that_was_written(uncut_run, tmp_path):
    size = (uncut_run / "checkpoints" / "last.pt").stat().st_size
    with mounted(tmp_path / "small", megabytes=int(2.5 * size / 2**20) + 1) as remount:
        folder = tmp_path / "small" / "run"
        overrides = ["trainer.checkpoint_interval=2"]
        assert_one_sentence(
            run(folder, *overrides), "no space left on the disk of", "while writing last.pt", "resume=auto"
        )
        checkpoints = folder / "checkpoints"
        assert not list(checkpoints.glob(".*.tmp"))
        assert [read_checkpoint_file(path)["step"] for path in sorted(checkpoints.glob("*.pt"))] == [4, 2]
        remount("size=200m")
        result = run(folder, *overrides, "resume=auto")
        assert result.returncode == 0, result.stderr
        assert "resumed at step 4" in result.stdout
        assert_same_run(uncut_run, folder)
        remount("ro")
        assert_one_sentence(run(folder, *overrides, "resume=auto", "trainer.max_steps=61"), str(folder), "Read-only")


def test_a_folder_removed_in_mid_run_is_made_anew(uncut_run, tmp_path):
    folder = tmp_path / "run"
    arguments = command(folder, "trainer.checkpoint_interval=2")
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        while not (folder / "checkpoints" / "previous.pt").exists() and process.poll() is None:
            pass
        shutil.rmtree(folder, ignore_errors=True)
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "vanished during the run" in out
    assert "Traceback" not in err
    ours, theirs = (read_checkpoint_file(path / "checkpoints" / "last.pt") for path in (folder, uncut_run))
    assert_same(ours["model"], theirs["model"])


def test_two_runs_told_to_use_one_folder(tmp_path):
    folder = tmp_path / "run"
    both = [
        subprocess.Popen(command(folder), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [(process.communicate(timeout=600), process.returncode) for process in both]
    assert sorted(code for _, code in ended) == [0, 1]
    (error,) = [err for (_, err), code in ended if code]
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert any(phrase in lines[0] for phrase in ("another run", "already holds a run"))
    assert read_checkpoint_file(folder / "checkpoints" / "last.pt")["step"] == 60
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


ENDING = """
import sys, time, torch
from pathlib import Path
import mtcl.training.checkpoint_file as module
original = module._write
module._write = lambda content, path: (time.sleep(1), original(content, path))
from mtcl.training.checkpoint import Checkpoint
from mtcl.training.checkpoint_thread import CheckpointWriter
writer = CheckpointWriter(Path(sys.argv[1]), asynchronous=True)
writer.save("last", Checkpoint({}, {}, 5))
if sys.argv[2] == "raises":
    raise KeyError
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize("how", ["0", "1", "raises"])
def test_a_process_that_ends_waits_for_what_is_being_written(tmp_path, how):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", ENDING, tmp_path, how], env=environment, capture_output=True, timeout=100)
    assert read_checkpoint_file(tmp_path / "last.pt")["step"] == 5
