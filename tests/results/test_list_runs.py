"""Lists of runs: what state each is in, and that looking disturbs none."""

import csv
import fcntl
import io
import json
import os
import threading
import time

import pytest
from helpers.run_folders import write_run

from mtcl.results.compare import compare
from mtcl.results.list_runs import format_runs, list_runs, read_state, to_records
from mtcl.run_lock import is_locked, lock_run


def log(folder, *records):
    with (folder / "log.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "kind": kind, **values}) + "\n" for step, kind, values in records)


@pytest.fixture
def begun(tmp_path):
    """A run that was ended after 41 of 400 steps."""
    folder = write_run(tmp_path / "runs" / "begun")
    for name in ("metrics.json", "run.json"):
        (folder / name).unlink()
    log(folder, (0, "val", {"depth/rmse": 9.0}), (20, "train", {"depth": 1.0}),
        (40, "val", {"depth/rmse": 0.7, "semseg/mIoU": None}), (40, "train", {"depth": 0.5}))  # fmt: skip
    return folder


def test_every_state_is_told(tmp_path, begun):
    runs = begun.parent
    finished = write_run(runs / "done")
    for name in ("pruned", "failed"):
        (write_run(runs / name, facts={"step": None}) / "metrics.json").unlink()
        log(runs / name, (40, "train", {}))
        (runs / f"{name}.json").write_text(
            json.dumps({"state": name, "reason": "too bad" if name == "failed" else None})
        )
    (write_run(runs / "empty", facts={"step": None}) / "metrics.json").unlink()
    write_run(runs / "extended", facts={"step": 200})
    evaluation = write_run(runs / "begun" / "evaluated", facts={"checkpoint": "x/best.pt"})
    (evaluation / "config.yaml").unlink()
    (write_run(runs / "broken") / "metrics.json").write_text("{")
    (runs / "none").mkdir()
    (finished / "checkpoints").mkdir()
    (finished / "checkpoints" / "config.yaml").touch()
    runs_by_name = {run.folder.name: run for run in list_runs([runs, finished])}
    assert {name: (run.state, run.step, run.max_steps) for name, run in runs_by_name.items() if name != "broken"} == {
        "begun": ("interrupted", 41, 400),
        "done": ("finished", 400, 400),
        "pruned": ("pruned", 41, 400),
        "failed": ("failed", 41, 400),
        "empty": ("not started", 0, 400),
        "extended": ("interrupted", 200, 400),
        "evaluated": ("evaluation", 400, None),
    }
    assert runs_by_name["broken"].state == "broken"
    assert "metrics.json is not a readable JSON" in runs_by_name["broken"].note
    assert runs_by_name["failed"].note == "too bad"
    assert runs_by_name["done"].primary_metric("edge") == ("odsF", 0.7)
    assert runs_by_name["begun"].primary_metric("depth") == ("rmse", 0.7), "of the last validation"
    with lock_run(begun):
        assert read_state(begun).state == "running"
    with lock_run(finished):
        assert read_state(finished).state == "running", "it is being continued"
    assert read_state(begun).state == "interrupted"


def test_a_distillation_is_a_run_without_tasks(tmp_path):
    folder = write_run(tmp_path / "student")
    (folder / "metrics.json").write_text(json.dumps({"distillation": {"loss": 4.0, "cosine/sam": 0.5}}))
    (run,) = list_runs([tmp_path])
    assert (run.state, run.step, run.metrics) == ("finished", 400, {})
    assert "finished" in format_runs([run], None)


def test_looking_makes_no_run_fail_that_is_starting(begun):
    """A look takes the lock for a moment, shared: a claim waits that long."""
    lock_run(begun).close()
    with (begun / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as a look has it, for longer
        assert not is_locked(begun), "looks do not see each other"
        timer = threading.Timer(0.04, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        lock_run(begun).close()
        timer.join()
    with lock_run(begun):
        assert is_locked(begun)
    assert not is_locked(begun)
    assert not is_locked(begun.parent)


def test_a_long_log_is_read_from_its_end(begun):
    log(begun, *((step, "train", {"x" * 200: 1.0}) for step in range(60, 60 + 2000)))
    run = read_state(begun)
    assert (run.step, run.primary_metric("depth")[1]) == (2060, 0.7)
    with (begun / "log.jsonl").open("a") as file:
        file.write('{"step": 9999, "ki')  # being written
    assert read_state(begun).step == 2060


def test_the_text_is_newest_first_and_fits(tmp_path):
    for age in range(3):
        folder = write_run(tmp_path / f"{'a_long_name_' * 8}{age}")
        for path in folder.iterdir():
            os.utime(path, (time.time() - 7200 * age,) * 2)
    lines = format_runs(list_runs([tmp_path]), 100).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == ["state", "steps", "age", "semseg", "depth", "normals", "edge", "odsF", "folder"]
    assert [line.split()[1:4] for line in lines[1:4]] == [
        ["400/400", "0", "s"],
        ["400/400", "2", "h"],
        ["400/400", "4", "h"],
    ]
    assert lines[1].split()[4:8] == ["40.00", "0.6000", "20.00", "70.00"]
    assert lines[-1] == "3 runs: 3 finished"


def test_the_command(cli, tmp_path, begun):
    write_run(begun.parent / "done")
    result = cli("scripts/runs.py", str(begun.parent), "--format", "json")
    assert {record["state"] for record in json.loads(result.out)} == {"finished", "interrupted"}
    result = cli("scripts/runs.py", str(begun.parent), "--format", "csv", "--state", "finished")
    (record,) = csv.DictReader(io.StringIO(result.out))
    assert (record["step"], record["depth/rmse"]) == ("400", "0.6")
    assert cli("scripts/runs.py", str(begun.parent), "--state", "running").out == "no runs\n"
    assert "2 runs: 1 finished, 1 interrupted" in cli("scripts/runs.py", str(begun.parent)).out
    result = cli("scripts/runs.py", str(tmp_path / "nowhere"))
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "nowhere is not a folder" in result.err


def test_names_are_whole_in_a_pipe_and_odd_ones_harmless(cli, tmp_path, monkeypatch):
    long = write_run(tmp_path / "runs" / ("long_" * 40))
    write_run(tmp_path / "runs" / "=1+1\x1b]0;x\x07\n")
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "metrics.json").write_bytes(b"\0")
    text = cli("scripts/runs.py", str(tmp_path / "runs")).out
    assert str(long) in text
    assert "\x1b" not in text
    assert "3 runs: 2 finished, 1 broken" in text, "one bad run hides no other"
    monkeypatch.chdir(tmp_path / "runs")
    rows = list(csv.DictReader(io.StringIO(cli("scripts/runs.py", "=1+1\x1b]0;x\x07\n", "--format", "csv").out)))
    assert [row["folder"] for row in rows] == ["'" + r"=1+1\x1b]0;x\x07\n"]
    assert rows[0]["normals/mErr"] == "20.0"


@pytest.mark.slow
def test_a_thousand_runs_take_seconds(tmp_path):
    template = write_run(tmp_path / "t")
    metrics, facts, config = ((template / n).read_text() for n in ("metrics.json", "run.json", "config.yaml"))
    for i in range(1000):
        folder = tmp_path / "runs" / str(i)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(metrics)
        (folder / "run.json").write_text(facts.replace('"seed": 0', f'"seed": {i % 5}'))
        (folder / "config.yaml").write_text(config.replace("lr: 0.001", f"lr: 0.{i // 5 + 100}"))
        (folder / ".lock").touch()
    began = time.process_time()
    runs = list_runs([tmp_path / "runs"])
    assert len(to_records(runs)) == 1000
    assert time.process_time() - began < 4
    began = time.process_time()
    assert len(compare([tmp_path / "runs"]).rows) == 200
    assert time.process_time() - began < 6
