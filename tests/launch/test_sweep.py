"""Sweeps: folders that follow from the words, what is finished is skipped, what fails or is ended ends alone."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.common import ROOT, TINY
from omegaconf import OmegaConf

from mtcl import UserError
from mtcl.launch import sweep as sweeping
from mtcl.launch.sweep import JobOutcome, SweepStopped, exit_code, job_folder, run_job, summary
from mtcl.run_lock import lock_run

# Takes the words of train.py: trouble=fail, crash (SIGKILL), hang (until SIGTERM: saves, exit code 75), taken.
TRAIN = """
import json, os, pathlib, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(words["hydra.run.dir"].strip("'"))
with folder.with_suffix(".calls").open("a") as file:
    file.write(words.get("resume", "fresh") + "\\n")
folder.mkdir(parents=True, exist_ok=True)
config = {"trainer": {"max_steps": 9}, "optimizer": {"lr": float(words["optimizer.lr"])}, "data": {"root": "/then"}}
(folder / "config.yaml").write_text(json.dumps(config))
(folder / "checkpoints").mkdir(exist_ok=True)
print("training", flush=True)
trouble = words.get("trouble")
if trouble == "fail":
    sys.exit("error: the loss was not finite")
if trouble == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
if trouble == "hang" and "resume" not in words:
    def save(*_):
        (folder / "checkpoints" / "last.pt").touch()
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    (folder / "ready").touch()
    time.sleep(60)
if trouble == "taken":
    import fcntl, subprocess
    file = (folder / ".lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    subprocess.Popen(["sleep", words["seconds"]], pass_fds=[file.fileno()], stdout=subprocess.DEVNULL,
                     stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    sys.exit("error: another run is writing into it")
(folder / "metrics.json").write_text("{}")
(folder / "run.json").write_text("{}")
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(sweeping, "POLL", 0.01)
    sweeping.job_outcomes.clear()
    sweeping.received_signals.clear()
    yield
    sweeping.job_outcomes.clear()
    sweeping.received_signals.clear()


@pytest.fixture
def job(tmp_path):
    """Run one job of a sweep with a stand-in for train.py."""
    (tmp_path / "train.py").write_text(TRAIN)

    def run(*overrides, number=0, here=False, lr=0.1, max_steps=9):
        overrides = [f"optimizer.lr={lr}", *overrides]
        config = {"trainer": {"max_steps": max_steps}, "optimizer": {"lr": lr}, "data": {"root": "/now"}, "later": 1}
        command = [sys.executable, str(tmp_path / "train.py")]
        return run_job(command, overrides, config, tmp_path / f"job{number}", number, dict(os.environ), here)

    return run


def calls(tmp_path, number=0):
    return (tmp_path / f"job{number}.calls").read_text().split()


def test_a_folder_follows_from_the_words_in_any_order_and_is_short_and_valid():
    overrides = ["seed=1", "regularizer.weight=0.03", "data.root=/my/data"]
    assert job_folder(overrides) == job_folder(overrides[::-1]) == job_folder([*overrides, "resume=auto"])
    assert job_folder(overrides).startswith("weight-0.03_seed-1_")
    others = [
        ["seed=1", "regularizer.weight=0.030", overrides[2]],
        [*overrides[:2], "data.root=/other"],
        [*overrides, "resume=a.pt"],
    ]
    assert len({job_folder(other) for other in [overrides, *others]}) == 4
    long = [f"decoder.key{i}='a/b,{i}: ä'" for i in range(100)]
    assert len(job_folder(long)) < 120
    assert all(c.isascii() and (c.isalnum() or c in "_.+-") for c in job_folder(long))
    assert job_folder([])


def test_folders_of_other_tasks_differ_in_their_readable_part_and_keep_an_earlier_name(tmp_path):
    common = ["data=nyud_small", "data.size=[448,576]", "experiment=nyud_mti_net_hrnet18", "trainer.max_steps=40000"]
    common += [
        "backbone.weights=/weights/x.safetensors",
        "data.label_assignment=one",
        "loss.weights.depth=0.5",
        "data.workers=3",
    ]
    tasks = ("[semseg,depth]", "[semseg,depth,normals]", "[semseg,depth,normals,edge]")
    names = [job_folder([*common, f"tasks.names={names}", "seed=0"]) for names in tasks]
    assert len({name.rpartition("_")[0] for name in names}) == 3
    assert "tasks-semseg-depth_" in names[0]
    compiled = [job_folder([*common[:1], f"trainer.compile={flag}"]) for flag in ("true", "false")]
    assert len({name.rpartition("_")[0] for name in compiled}) == 2
    earlier = tmp_path / f"called_otherwise_{names[0][-8:]}"
    earlier.mkdir()
    (tmp_path / f"{earlier.name}.log").touch()
    assert job_folder([*common, f"tasks.names={tasks[0]}", "seed=0"], tmp_path) == earlier.name
    assert job_folder([*common, f"tasks.names={tasks[1]}", "seed=0"], tmp_path) == names[1]


def test_a_job_runs_once_and_is_skipped_when_it_is_finished(job, tmp_path, capfd):
    assert job(here=True).ending == "finished"
    shown = capfd.readouterr()
    assert "training" in shown.out, "its output is shown"
    began, ended = shown.err.splitlines()
    assert began == f"[1] job0: started, log {tmp_path}/job0.log"
    assert ended.startswith("[1] job0: finished after ")
    (tmp_path / "job0" / "metrics.json").write_text('{"depth": {"rmse": 0.5}, "semseg": {"mIoU": 0.25}}')
    assert job().ending == "finished before", "data.root and keys of later versions are no other config"
    assert capfd.readouterr().err == "[1] job0: finished before, semseg mIoU 25.00 %\n"
    assert calls(tmp_path) == ["fresh"]
    with pytest.raises(UserError, match=r"job0 holds a run of another config \(optimizer.lr is 0.2, was 0.1\)"):
        job(lr=0.2)
    with pytest.raises(UserError, match=r"trainer\.max_steps is 10, was 9"):
        job(max_steps=10)


def test_an_interrupted_run_is_continued_and_a_running_one_left_alone(job, tmp_path):
    (tmp_path / "job0" / "checkpoints").mkdir(parents=True)
    (tmp_path / "job0" / "checkpoints" / "last.pt").touch()
    with lock_run(tmp_path / "job0"):
        assert job().ending == "running elsewhere"
    assert job("resume=a.pt").ending == "finished"
    assert calls(tmp_path) == ["auto"]


def test_failures_and_crashes_are_told_and_end_nothing_else(job, tmp_path):
    assert job("trouble=fail", number=0).reason == f"exit code 1: error: the loss was not finite ({tmp_path}/job0.log)"
    assert job("trouble=crash", number=1).reason.startswith("ended by signal 9: training")
    assert job(number=2).ending == "finished"
    assert exit_code() == 1
    lines = summary()
    assert lines[0] == "sweep of 3 runs: 1 finished, 2 failed"
    assert lines[1].startswith("error: trouble=fail: exit code 1: error: the loss")
    assert lines[2].startswith("error: trouble=crash: ended by signal 9")
    assert len(lines) == 4


def test_a_folder_that_another_sweep_took_meanwhile_is_no_failure(job):
    assert job("trouble=taken", "seconds=3").ending == "running elsewhere"
    assert exit_code() == 0


@pytest.mark.parametrize("here", [True, False])
def test_a_signal_lets_the_run_save_and_starts_no_other(job, tmp_path, here):
    def interrupt():
        while not (tmp_path / "job0" / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    if here:
        with pytest.raises(SweepStopped):
            job("trouble=hang", here=True)
    else:  # in a launcher's pool: others of it save, too, so nothing is raised
        assert job("trouble=hang").ending == "stopped"
        assert job(number=1).ending == "stopped"
        assert not (tmp_path / "job1").exists()
    thread.join()
    assert exit_code() == 75
    assert (tmp_path / "job0" / "checkpoints" / "last.pt").exists()
    assert summary()[-1] == "the same command runs what is not finished"
    sweeping.received_signals.clear()
    assert job("trouble=hang").ending == "finished"
    assert calls(tmp_path) == ["fresh", "auto"]


def test_an_outcome_is_kept_where_it_is_unpickled():
    sent = pickle.dumps(JobOutcome(3, ("a=1",), "failed", "why"))
    sweeping.job_outcomes.clear()
    assert pickle.loads(sent) == sweeping.job_outcomes[3]
    assert exit_code() == 1


# For real

OVERRIDES = [*TINY, "tasks.names=[depth,normals]", "evaluation.score_boundaries=false"]
OVERRIDES += ["trainer.num_panels=0", "trainer.validate_first=false"]


def sweep(folder: Path, *overrides: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), "-m", *OVERRIDES, f"hydra.sweep.dir={folder}", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=590, **options)


def finished(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/metrics.json"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_a_sweep_for_real(tmp_path, launcher):
    """Runs with one of two monitors fail in every launcher; the second time nothing is left to do for the others."""
    weights = ("0", "0.5") if launcher == "basic" else ("0.5",)
    overrides = [f"hydra/launcher={launcher}", f"regularizer.weight={','.join(weights)}", "seed=0"]
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher")
        overrides += ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else ["hydra.launcher.timeout_min=9"]
    overrides += ["trainer.monitor=depth/rmse,depth/none"]
    result = sweep(tmp_path / "s", *overrides)
    assert result.returncode == 1, result.stderr
    lines = result.stderr.splitlines()
    num_runs = len(weights)
    assert f"sweep of {2 * num_runs} runs: {num_runs} finished, {num_runs} failed" in lines
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == num_runs
    assert all("trainer.monitor=depth/none: exit code 1: error: " in line for line in errors)
    assert len(finished(tmp_path / "s")) == num_runs
    times_before = {path: path.stat().st_mtime_ns for path in finished(tmp_path / "s")}
    result = sweep(tmp_path / "s", *overrides[:-1], "trainer.monitor=depth/rmse")
    assert result.returncode == 0, result.stderr
    assert f"sweep of {num_runs} run{'s' * (num_runs > 1)}: {num_runs} finished before" in result.stderr
    assert times_before == {path: path.stat().st_mtime_ns for path in finished(tmp_path / "s")}


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "number"), [("basic", signal.SIGINT), ("joblib", signal.SIGTERM)])
def test_a_sweep_that_is_told_to_end_saves_and_goes_on(tmp_path, launcher, number):
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    overrides = ["seed=0,1", "trainer.max_steps=60", "trainer.checkpoint_interval=null", "trainer.val_interval=null"]
    overrides += [f"hydra/launcher={launcher}", *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else [])]
    folder = tmp_path / "s"
    command = [sys.executable, str(ROOT / "train.py"), "-m", *OVERRIDES, f"hydra.sweep.dir={folder}", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True, start_new_session=True) as process:  # fmt: skip
        num_running = 2 if launcher == "joblib" else 1
        while sum('"train"' in path.read_text() for path in folder.glob("*/log.jsonl")) < num_running:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
    assert process.returncode == (130 if number == signal.SIGINT else 75), err
    assert "Traceback" not in err
    assert len(list(folder.glob("*/checkpoints/last.pt"))) == num_running, err
    assert not finished(folder)
    result = sweep(folder, *overrides)
    assert result.returncode == 0, result.stderr
    assert len(finished(folder)) == 2
    logs = [path.read_text() for path in folder.glob("*.log")]
    assert sum("resumed at step" in log for log in logs) == num_running
    for path in finished(folder):
        steps = [json.loads(line)["step"] for line in (path / "log.jsonl").read_text().splitlines()]
        assert steps == sorted(steps)
        assert steps[-1] == 60
        assert OmegaConf.load(path / "config.yaml").trainer.max_steps == 60
