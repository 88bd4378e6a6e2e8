"""Checkpoints: every damage is seen, an intact one is always there, nothing in a file is run."""

import errno
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.common import ROOT, TINY, composed, flip

import mtcl.atomic
import mtcl.training.checkpoint_file as module
from mtcl.atomic import convert_disk_errors, remove_temporary_files, write_atomically
from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_regularizer
from mtcl.config.resolve import plain
from mtcl.config.stored_config import describe_tasks
from mtcl.errors import UserError
from mtcl.run_lock import lock_run
from mtcl.training.checkpoint import Checkpoint, latest_valid_checkpoint
from mtcl.training.checkpoint_file import (
    CorruptCheckpointError,
    find_corruption,
    read_checkpoint_file,
    write_checkpoint_file,
)
from mtcl.training.checkpoint_thread import CheckpointWriter
from mtcl.training.run_logger import RunLogger

QUICK = [*TINY, "tasks.names=[semseg,depth]", "trainer.validate_first=false", "trainer.val_interval=null"]
QUICK += ["trainer.num_panels=0", "decoder.head_width=4", "trainer.max_steps=4", "backbone.name=test_resnet"]


def some(step: int = 7, size: int = 20) -> dict:
    return {"model": {"w": torch.arange(float(size))}, "config": {"seed": 3}, "step": step}


def make_checkpoint(step: int = 7, size: int = 20) -> Checkpoint:
    return Checkpoint.from_dict(some(step, size))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- One file


@pytest.mark.parametrize("every", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_any_byte_and_any_shorter_file_is_seen(tmp_path, every):
    path = tmp_path / "last.pt"
    write_checkpoint_file(path, some())
    content = path.read_bytes()
    positions = {
        *range(0, len(content), every),
        *range(len(content) - 100, len(content), min(every, 9)),
        len(content) - 77,
    }
    for position in positions:
        flip(path, position)
        with pytest.raises(
            CorruptCheckpointError, match=r"last\.pt is damaged \(.*resume=auto finds the newest intact one"
        ):
            read_checkpoint_file(path)
        flip(path, position)
    assert read_checkpoint_file(path)["step"] == 7
    for length in positions:
        path.write_bytes(content[:length])
        with pytest.raises(CorruptCheckpointError):
            read_checkpoint_file(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(CorruptCheckpointError):
        read_checkpoint_file(path)


def test_plain_torch_and_zip_read_the_file(tmp_path):
    path = tmp_path / "last.pt"
    write_checkpoint_file(path, some(size=50_000))
    for mapped in (False, True):
        assert torch.equal(torch.load(path, weights_only=True, mmap=mapped)["model"]["w"], torch.arange(50_000.0))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"mtcl sha256 ")


def test_files_of_before_checksums_are_read(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"format": 1, **some()}, path)
    assert find_corruption(path) is None
    assert read_checkpoint_file(path)["step"] == 7
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CorruptCheckpointError):
        read_checkpoint_file(path)


def test_a_checkpoint_is_that_of_its_entries():
    content = make_checkpoint().to_dict()
    assert set(content) == {
        *("model", "ema", "regularizer", "share", "balancer", "scaler", "optimizer", "schedule", "step", "rng"),
        *("config", "meta"),
    }
    again = Checkpoint.from_dict(content).to_dict()
    assert all(again[name] is content[name] for name in content if name != "schedule")


# --- Disks that fail


@pytest.fixture
def full_disk(monkeypatch):
    """New temporary files lie on a device that takes nothing: the kernel itself says ENOSPC."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    original = mtcl.atomic._temporary

    def on_full(path):
        temporary = original(path)
        temporary.symlink_to("/dev/full")
        return temporary

    def fill():
        monkeypatch.setattr(mtcl.atomic, "_temporary", on_full)

    yield fill
    monkeypatch.undo()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, full_disk, asynchronous):
    writer = CheckpointWriter(tmp_path, asynchronous)
    for step in (1, 2):
        writer.save("last", make_checkpoint(step))
    writer.wait()
    full_disk()
    with pytest.raises(UserError) as error:  # noqa: PT012 - of a thread it comes out of wait
        writer.save("last", make_checkpoint(3, size=100_000))
        writer.wait()
    assert str(error.value) == (
        f"no space left on the disk of {tmp_path} while writing last.pt; free some, then continue with resume=auto"
    )
    writer.close()  # told once
    assert names(tmp_path) == ["last.pt", "previous.pt"]
    assert [read_checkpoint_file(tmp_path / name)["step"] for name in names(tmp_path)] == [2, 1]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, "can't be written to (Read-only file system); make it writable"),
        (errno.EACCES, "can't be written to (Permission denied)"),
        (errno.EDQUOT, "no space left"),
        (errno.EIO, "can't be written (Input/output error)"),
    ],
)
def test_other_failures_of_a_disk_are_sentences(tmp_path, number, message):
    with pytest.raises(UserError) as error, convert_disk_errors(tmp_path / "a.pt"):
        raise OSError(number, os.strerror(number))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        lock_run(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="can't be written"):
        CheckpointWriter(tmp_path / "file" / "checkpoints").save("last", make_checkpoint())


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    own_files = [".lock", "last.pt", "notes.tmp", ".hidden.tmp"]
    for name in [*own_files, ".last.pt.0123456789ab.tmp"]:
        (tmp_path / name).write_text("")
    assert [path.name for path in remove_temporary_files(tmp_path)] == [".last.pt.0123456789ab.tmp"]
    assert names(tmp_path) == sorted(own_files)
    assert remove_temporary_files(tmp_path / "none") == []


# --- Last, previous, best


@pytest.mark.parametrize("has_links", [True, False])
def test_at_every_moment_one_of_last_and_previous_is_intact(tmp_path, monkeypatch, has_links):
    writer = CheckpointWriter(tmp_path)
    steps_read = []

    def look():
        paths = [tmp_path / name for name in ("last.pt", "previous.pt") if (tmp_path / name).exists()]
        steps_read.append([read_checkpoint_file(path)["step"] for path in paths])

    def watched(call):
        def run(*args, **kwargs):
            look()
            result = call(*args, **kwargs)
            look()
            return result

        return run

    writer.save("last", make_checkpoint(1))
    for name in ("link", "replace", "unlink", "fsync"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    if not has_links:

        def refuse(*args):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    for step in (2, 3):
        writer.save("last", make_checkpoint(step))
    monkeypatch.undo()
    assert all(steps_read)
    assert len(steps_read) > 8
    if has_links:
        assert all((step in (1, 2, 3)) for steps in steps_read for step in steps[:1])
    assert names(tmp_path) == ["last.pt", "previous.pt"]
    assert latest_valid_checkpoint(tmp_path).checkpoint.step == 3
    flip(tmp_path / "last.pt", 900)
    assert latest_valid_checkpoint(tmp_path).checkpoint.step == 2


def test_a_damaged_last_does_not_replace_an_intact_previous(tmp_path):
    for step in (1, 2):
        writer = CheckpointWriter(tmp_path)
        writer.save("last", make_checkpoint(step))
    flip(tmp_path / "last.pt", 900)
    CheckpointWriter(tmp_path).save("last", make_checkpoint(3))
    assert read_checkpoint_file(tmp_path / "previous.pt")["step"] == 1
    assert read_checkpoint_file(tmp_path / "last.pt")["step"] == 3


def test_the_newest_intact_one_is_found(tmp_path):
    def write(name: str, step: int) -> None:
        write_checkpoint_file(tmp_path / f"{name}.pt", some(step))
        write.clock += 10
        os.utime(tmp_path / f"{name}.pt", (write.clock, write.clock))

    def find_latest() -> tuple[str, list[str]]:
        best = latest_valid_checkpoint(tmp_path)
        return best.path.stem, [error.path.stem for error in best.rejected]

    write.clock = 1_000_000_000
    assert latest_valid_checkpoint(tmp_path) is None
    write("best", 50)  # of a way that was left: the run was then taken back to an older step
    write("step_00000002", 2)
    write("previous", 4)
    write("last", 6)
    assert find_latest() == ("last", [])
    write("step_00000005", 5)
    assert find_latest() == ("last", [])
    write("best", 7)
    assert find_latest() == ("best", [])
    write("step_00000008", 8)
    assert find_latest() == ("step_00000008", [])
    flip(tmp_path / "step_00000008.pt", 500)
    assert find_latest() == ("best", ["step_00000008"])
    (tmp_path / "step_00000008.pt").unlink()
    (tmp_path / "best.pt").unlink()
    flip(tmp_path / "last.pt", 500)
    assert find_latest() == ("step_00000005", ["last"])
    (tmp_path / "step_00000005.pt").unlink()
    assert find_latest() == ("previous", ["last"])
    (tmp_path / "previous.pt").write_bytes(b"")
    assert find_latest() == ("step_00000002", ["last", "previous"])
    (tmp_path / "step_00000002.pt").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact: last\.pt \(.*\), previous\.pt \(it is empty"):
        latest_valid_checkpoint(tmp_path)
    torch.save({"format": 2, **some()}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="has format 2"):  # of a later version, not damaged: nothing to pass over
        latest_valid_checkpoint(tmp_path)


# --- Written by a thread


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing waits until it is let go; how many writes run at once is counted."""
    gate, counts = threading.Event(), {"now": 0, "most": 0}
    original = module._write

    def write(content, path):
        counts["now"] += 1
        counts["most"] = max(counts["most"], counts["now"])
        gate.wait(20)
        original(content, path)
        counts["now"] -= 1

    monkeypatch.setattr(module, "_write", write)
    yield gate, counts
    gate.set()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, slow_disk):
    gate, counts = slow_disk
    parameter = torch.zeros(3, requires_grad=True)
    running, settings = torch.zeros(2), {"lr": [1.0]}
    content = some() | {
        "model": {"w": parameter, "same": parameter.detach(), "grid": torch.zeros(1, 2, 3, 4)},
        "optimizer": {"state": [running], "groups": settings, "none": None, "pair": (1, running)},
    }
    content["model"]["grid"] = content["model"]["grid"].to(memory_format=torch.channels_last)
    writer = CheckpointWriter(tmp_path, asynchronous=True)
    writer.save("last", Checkpoint.from_dict(content))
    assert not list(tmp_path.glob("*.pt"))
    with torch.no_grad():
        parameter += 1
        running += 1
        settings["lr"][0] = 2.0
    gate.set()
    writer.close()
    loaded = read_checkpoint_file(tmp_path / "last.pt")
    assert loaded["model"]["w"].tolist() == loaded["model"]["same"].tolist() == [0, 0, 0]
    assert loaded["model"]["w"].data_ptr() == loaded["model"]["same"].data_ptr()
    assert loaded["model"]["grid"].is_contiguous(memory_format=torch.channels_last)
    assert loaded["optimizer"]["groups"] == {"lr": [1.0]}
    assert loaded["optimizer"]["state"][0].tolist() == loaded["optimizer"]["pair"][1].tolist() == [0, 0]
    gate.clear()
    writer.save("last", make_checkpoint(1))
    threading.Timer(0.2, gate.set).start()
    writer.save("best", make_checkpoint(2))  # waits for the first
    writer.close()
    assert counts["most"] == 1
    assert latest_valid_checkpoint(tmp_path).checkpoint.step == 2


def test_an_asynchronous_file_is_that_of_a_plain_save(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    content = some() | {"model": model.state_dict()}
    CheckpointWriter(tmp_path).save("plain", Checkpoint.from_dict(content))
    writer = CheckpointWriter(tmp_path, asynchronous=True)
    writer.save("thread", Checkpoint.from_dict(content))
    writer.close()
    assert (tmp_path / "plain.pt").read_bytes() == (tmp_path / "thread.pt").read_bytes()


@pytest.mark.parametrize("how", ["save", "wait", "close", "leave"])
def test_what_the_thread_met_comes_out(tmp_path, monkeypatch, how):
    def fail(content, path):
        raise ValueError("a defect\nin two lines")

    writer = CheckpointWriter(tmp_path, asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", fail)
        writer.save("last", make_checkpoint())
        writer.thread.join()
    act = {"save": lambda: writer.save("last", make_checkpoint(8)), "wait": writer.wait, "close": writer.close}
    act["leave"] = lambda: writer.__exit__(None)
    with pytest.raises(UserError, match=r"last\.pt could not be written \(ValueError: a defect\)$"):
        act[how]()
    writer.save("last", make_checkpoint(9))
    writer.close()
    assert read_checkpoint_file(tmp_path / "last.pt")["step"] == 9


def test_what_ends_a_run_is_not_hidden_by_a_failing_disk(tmp_path, full_disk, caplog):
    writer = CheckpointWriter(tmp_path, asynchronous=True)
    full_disk()
    with pytest.raises(KeyError), writer:  # noqa: PT012
        writer.save("last", make_checkpoint())
        raise KeyError
    assert "no space left" in caplog.text


# --- A folder that vanishes, a folder of two runs

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_outlives_the_removal_of_its_folder(tmp_path, caplog):
    folder = tmp_path / "run"
    writer, run_logger = CheckpointWriter(folder / "checkpoints"), RunLogger(folder)
    with lock_run(folder):
        run_logger.log_scalars(0, "train", {"depth": 1.0})
        writer.save("last", make_checkpoint(1))
        shutil.rmtree(folder)
        run_logger.log_scalars(1, "train", {"depth": 2.0})
        run_logger.log_scalars(2, "train", {"depth": 3.0})
        run_logger.log_event(2, "skipped", {"ids": ["a"]})
        writer.save("last", make_checkpoint(2))
        run_logger.close()
        with pytest.raises(UserError, match="another run"):
            lock_run(folder)
    messages = [record.message for record in caplog.records if "vanished during the run" in record.message]
    assert len(messages) == 2  # of the records, of the checkpoints
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [1, 2, 2]
    assert read_checkpoint_file(folder / "checkpoints" / "last.pt")["step"] == 2
    assert len(list(folder.glob("events.*"))) == 1


def test_a_removed_folder_that_another_run_has_taken_is_left_alone(tmp_path):
    folder = tmp_path / "run"
    writer = CheckpointWriter(folder / "checkpoints")
    with lock_run(folder):
        writer.save("last", make_checkpoint(1))
        shutil.rmtree(folder)
        folder.mkdir()
        with subprocess.Popen([sys.executable, "-c", HOLD, folder / ".lock"], stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            try:
                with pytest.raises(UserError, match="another run is writing"):
                    writer.save("last", make_checkpoint(2))
            finally:
                other.kill()
    assert names(folder) == [".lock"]


def test_records_wait_for_space(tmp_path, caplog):
    """Whole lines only, and in their order, once the disk takes them again."""
    run_logger = RunLogger(tmp_path)
    run_logger.log_scalars(0, "train", {"depth": 1.0})
    size = (tmp_path / "log.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
        for step in (1, 2, 3):
            run_logger.log_event(step, "train", {"depth": 2.0})
        assert (tmp_path / "log.jsonl").stat().st_size == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run_logger.log_scalars(4, "train", {"depth": 5.0})
    run_logger.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert len([r for r in caplog.records if "records wait" in r.message]) == 1


# --- Killed

SAVING = """
import sys, torch
from pathlib import Path
from mtcl.training.checkpoint import Checkpoint
from mtcl.training.checkpoint_thread import CheckpointWriter
writer = CheckpointWriter(Path(sys.argv[1]))
for step in range(10**6):
    writer.save("last", Checkpoint({"w": torch.full((300_000,), float(step))}, {}, step))
    print(step, flush=True)
"""


def test_a_process_killed_while_saving_leaves_an_intact_checkpoint(tmp_path):
    with subprocess.Popen([sys.executable, "-c", SAVING, tmp_path], stdout=subprocess.PIPE, cwd=ROOT) as process:
        for _ in range(3):
            process.stdout.readline()
        deadline = time.monotonic() + 20
        while not list(tmp_path.glob(".*.tmp")) and time.monotonic() < deadline:
            pass
        process.send_signal(signal.SIGKILL)
        steps = [int(line) for line in process.stdout.read().split()]
    latest = latest_valid_checkpoint(tmp_path)
    step = latest.checkpoint.step
    assert step >= max([2, *steps])
    assert latest.checkpoint.model["w"].unique().tolist() == [step]
    remove_temporary_files(tmp_path)
    assert names(tmp_path) == ["last.pt", "previous.pt"]


# --- Resuming


def test_a_damaged_checkpoint_is_passed_over_and_nothing_is_lost(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    overrides = [*QUICK, "trainer.async_checkpoints=true"]
    train(composed(*overrides), tmp_path / "whole")
    folder = tmp_path / "cut" / "checkpoints"
    train(composed(*overrides, "trainer.max_steps=3"), tmp_path / "cut")
    # The schedule of 4 steps: what a run of 4 steps that was killed after the third leaves.
    for name in ("last", "previous"):
        assert read_checkpoint_file(folder / f"{name}.pt")["step"] == {"last": 3, "previous": 2}[name]
    shutil.rmtree(tmp_path / "cut")
    with pytest.MonkeyPatch.context() as patch:
        from mtcl.training.trainer import Trainer

        step = Trainer.train_step

        def die(self, *args, **kwargs):
            if self.step == 3:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        patch.setattr(Trainer, "train_step", die)
        with pytest.raises(KeyboardInterrupt):
            train(composed(*overrides), tmp_path / "cut")
    flip(folder / "last.pt", (folder / "last.pt").stat().st_size // 2)
    (folder / ".last.pt.0123456789ab.tmp").write_text("half")
    with pytest.raises(UserError, match=r"last\.pt is damaged"):
        train(composed(*overrides, f"resume={folder}/last.pt"), tmp_path / "cut")
    assert (folder / ".last.pt.0123456789ab.tmp").exists()
    caplog.clear()
    train(composed(*overrides, "resume=auto"), tmp_path / "cut")
    assert f"checkpoint {folder}/last.pt is damaged" in caplog.text
    assert f"resumed at step 2 from {folder}/previous.pt" in caplog.text
    assert "is not the one of its checkpoint" not in caplog.text
    assert not list(folder.glob(".*.tmp"))
    ours, theirs = (read_checkpoint_file(tmp_path / name / "checkpoints" / "last.pt") for name in ("cut", "whole"))
    assert ours["step"] == theirs["step"] == 4
    for name in theirs["model"]:
        assert torch.equal(ours["model"][name], theirs["model"][name]), name
    records = [(tmp_path / name / "log.jsonl").read_text() for name in ("cut", "whole")]
    assert records[0] == records[1]

    caplog.clear()
    overrides = [*overrides, "optimizer.lr=0.5", "seed=1", "data.batch_size=1", "trainer.max_steps=5", "resume=auto"]
    train(composed(*overrides), tmp_path / "cut")
    (warning,) = [r.message for r in caplog.records if "is not the one of its checkpoint" in r.message]
    for phrase in ("optimizer.lr is 0.5, was ", "seed is 1, was 0", "data.batch_size is 1, was 2",
                   "trainer.max_steps is 5, was 4", "another order"):  # fmt: skip
        assert phrase in warning
    assert "hydra" not in warning

    for path in folder.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    files_before = {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        train(composed(*overrides), tmp_path / "cut")
    (folder / "last.pt").unlink()
    with pytest.raises(UserError, match="already holds a run"):  # previous.pt alone is a run, too
        train(composed(*QUICK), tmp_path / "cut")
    (folder / "last.pt").write_bytes(files_before[folder / "last.pt"])
    assert files_before == {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*") if path.is_file()}


def test_a_run_that_another_finished_in_the_meantime_is_not_written_over(tmp_path, monkeypatch):
    import mtcl.cli.train as entry

    original = entry.build_trainer

    def meanwhile(*args, **kwargs):
        write_checkpoint_file(tmp_path / "run" / "checkpoints" / "last.pt", some(9))
        return original(*args, **kwargs)

    monkeypatch.setattr(entry, "build_trainer", meanwhile)
    with pytest.raises(UserError, match="another run has just written"):
        train(composed(*QUICK), tmp_path / "run")
    assert read_checkpoint_file(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 9


# --- What a file may not do


class Evil:
    """Would create a folder when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


DOORS = ["evaluate", "resume", "resume=auto", "import", "weights"]


@pytest.mark.parametrize(("door", "sealed"), [*((door, True) for door in DOORS), ("evaluate", False)])
def test_code_in_a_file_is_not_run(cli, tmp_path, door, sealed):
    marker = tmp_path / "executed"
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    path.parent.mkdir(parents=True)
    content = {"format": 1, **some(), "extra": Evil(marker)}
    if sealed:  # whoever can write a pickle can write its checksum
        module._write(content, path)
        assert find_corruption(path) is None
    else:
        torch.save(content, path)
    folder = f"hydra.run.dir={tmp_path}/out"
    result = {
        "evaluate": lambda: cli("evaluate.py", f"checkpoint={path}", folder),
        "resume": lambda: cli("train.py", *QUICK, f"resume={path}", folder),
        "resume=auto": lambda: cli("train.py", *QUICK, "resume=auto", f"hydra.run.dir={tmp_path}/run"),
        "import": lambda: cli("scripts/import_checkpoint.py", "invpt", str(path), f"{tmp_path}/new.pt"),
        "weights": lambda: cli("train.py", *QUICK, f"backbone.weights={path}", folder),
    }[door]()
    assert result.code == 1
    assert len([line for line in result.err.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in result.err
    assert not marker.exists()


@pytest.mark.parametrize(
    ("group", "target"), [("decoder", "os.system"), ("decoder", "torch.hub.load"), ("data", "mtcl.os.system")]
)
def test_foreign_targets_in_a_checkpoint_are_refused(cli, tmp_path, monkeypatch, group, target):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("executed"))
    config = plain(composed(*QUICK))
    tasks = describe_tasks(build_tasks(composed(*QUICK)))
    config[group]["_target_"] = target
    content = {**some(), "model": {}, "config": config, "meta": {"tasks": tasks}}
    write_checkpoint_file(tmp_path / "evil.pt", content)
    result = cli("evaluate.py", f"checkpoint={tmp_path}/evil.pt", f"hydra.run.dir={tmp_path}/out")
    assert result.code == 1
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert f"{group}._target_={target}" in line
    assert "Traceback" not in result.err


def test_a_foreign_regularizer_is_refused():
    config = composed(*QUICK)
    config.regularizer._target_ = "os.system"
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False)
    with pytest.raises(UserError, match=r"regularizer\._target_=os\.system is not part of mtcl"):
        build_regularizer(config, tasks, model)


def test_nothing_is_unpickled_or_unpacked_unguarded():
    """``torch.load`` and NumPy as they are safe; no archive is unpacked anywhere in the project."""
    import ast

    files = [ROOT / "train.py", ROOT / "evaluate.py", *(ROOT / "mtcl").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    calls = 0
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module_names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not {"shelve", "joblib", "dill", "marshal"} & set(module_names), path
                if "tarfile" in module_names:
                    assert path.name == "tar_files.py", path  # it reads the members of shards, and unpacks none
                if "zipfile" in module_names:
                    # they list an archive's members, and unpack none
                    assert path.name in ("checkpoint_file.py", "encoding.py"), path
                if "pickle" in module_names:
                    # its Unpickler knows a list of classes, tests/data/test_partial_labels.py
                    assert path.name == "partial_labels.py", path
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load":
                calls += 1
                assert arguments.get("weights_only") == "True", path
            if called != "np.save":  # to write an object array runs nothing; MTPSL's label files are some
                assert arguments.get("allow_pickle", "False") == "False", path
            assert called not in ("pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load", "eval", "exec")
            assert called.rpartition(".")[2] not in ("unpack_archive", "extractall", "extract"), path
            if called == "yaml.load":
                assert ast.unparse(node.args[1]) in ("_Loader", "yaml.BaseLoader"), path  # a SafeLoader; text only
    assert calls >= 4


def test_writing_keeps_the_replaced_file_where_asked(tmp_path):
    path = tmp_path / "a"
    for number in range(3):
        write_atomically(path, lambda temporary, n=number: temporary.write_text(str(n)), keep=tmp_path / "b")
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("2", "1")
    assert names(tmp_path) == ["a", "b"]
