"""Studies: their files, their runs (of a stand-in for train.py that takes no time), their numbers."""

import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.common import ROOT
from scipy import stats

from mtcl import UserError
from mtcl.config.quoting import quote_value
from mtcl.launch.overrides import make_portable, merge_overrides
from mtcl.launch.processes import format_duration
from mtcl.launch.study import (
    TimeLimitReached,
    compose_task_names,
    format_command,
    format_failures,
    list_jobs,
    run_study,
)
from mtcl.launch.study_file import Study, Variant, read_study
from mtcl.launch.study_tables import (
    build_report,
    format_differences,
    format_markdown,
    format_text,
    read_results,
    to_json,
    write_results,
)
from mtcl.results.rows import parse_metrics_option
from mtcl.results.statistics import minimum_detectable_effect
from mtcl.run_lock import lock_run

STUDIES = sorted((ROOT / "scripts" / "studies").glob("*.yaml"))

# Takes the words of train.py. gain=: how much better than seed alone would have it. wait=N: until N runs have started.
# trouble=FILE: while FILE is there, fail, or (FILE ends in .hang) write a checkpoint and wait for SIGTERM.
TRAIN = """
import json, pathlib, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:])
folder, seed = pathlib.Path(words["hydra.run.dir"].strip("'")), int(words["seed"])
calls = folder.parents[1] / "calls"
with calls.open("a") as file:
    file.write(f"{folder.parent.name} {seed} {words.get('resume', '')}\\n")
deadline = time.monotonic() + 20
while len(calls.read_text().splitlines()) < int(words.get("wait", 0)):
    assert time.monotonic() < deadline, "alone"
    time.sleep(0.02)
trouble = pathlib.Path(words.get("trouble", "/nonexistent"))
if trouble.exists() and trouble.suffix == ".hang":
    def save(*_):
        print("saved")
        sys.exit(75)

    signal.signal(signal.SIGTERM, save)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.pt").write_text("")
    time.sleep(60)
if trouble.exists():
    print("train 1/9\\rtrain 2/9\\nerror: the loss was not finite")
    sys.exit(1)
tasks = words.get("tasks.names", "[semseg,depth]").strip("[]").split(",")
gain = float(words.get("gain", 0))
values = {"semseg": {"mIoU": 0.3 + seed / 100 + gain, "IoU/wall": 0.5}, "depth": {"rmse": 0.8 - seed / 50 - gain}}
facts = {"seed": seed, "step": 9, "split": "tune", "num_images": 5, "data_fingerprint": "8d9e", "device": "cpu",
         "commit": "e51845271362f65d", "clean": True, "versions": {"torch": "2"}, "command": "/elsewhere/me/train.py",
         "overrides": sys.argv[1:-2]}
(folder / "run.json").write_text(json.dumps(facts))
(folder / "metrics.json").write_text(json.dumps({task: values[task] for task in tasks}))
"""

FILE = """
name: made_up
overrides: [trainer.max_steps=9]
seeds: [3, 1, 2]
variants:
  off: {overrides: [regularizer=none]}
  on: {overrides: [gain=0.1], against: off, note: "with a gain"}
  self: {overrides: [gain=0.05], against: off, label: of itself, seeds: [1, 2]}
single_task: {overrides: [gain=0.01], seeds: [1]}
environment: {A_VARIABLE: 1}
"""


@pytest.fixture
def study_file(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "made_up.yaml").write_text(FILE)
    return tmp_path / "made_up.yaml"


@pytest.fixture
def run(study_file, tmp_path, monkeypatch):
    """Conduct the study of ``study_file``; what it said, and the runs that failed."""
    monkeypatch.setattr("mtcl.launch.study.POLL", 0.01)

    def conducted(*more, **options):
        lines = []
        command = [sys.executable, str(tmp_path / "train.py")]
        options = {"list_tasks": lambda overrides: ["semseg", "depth"], "say": lines.append, **options}
        failures = run_study(study_file, tmp_path / "out", more, command=command, root=tmp_path, **options)
        return "\n".join(lines), failures

    return conducted


def calls(tmp_path):
    path = tmp_path / "out" / "calls"
    return [line.strip() for line in path.read_text().splitlines()] if path.is_file() else []


# The file


def test_a_study_is_read_as_it_stands_even_where_an_arm_is_called_off(study_file):
    study = read_study(study_file)
    assert study.name == "made_up"
    assert study.variants == (
        Variant("off", ("regularizer=none",), (3, 1, 2), (), "off"),
        Variant("on", ("gain=0.1",), (3, 1, 2), ("off",), "on", "with a gain"),
        Variant("self", ("gain=0.05",), (1, 2), ("off",), "of itself"),
    )
    assert study.single_task == Variant("single_task", ("gain=0.01",), (1,), (), "single_task")
    assert study.environment == {"A_VARIABLE": "1"}
    single_task = study.with_single_task_variants(["depth"]).variants[3:]
    assert [(variant.name, variant.overrides) for variant in single_task] == [
        ("single_depth", ("gain=0.01", "tasks.names=[depth]"))
    ]


MISTAKES = {
    "unknown key": ("seeds: [3", "seed: [3", ["the file", "unknown key seed", "seeds"]),
    "unknown key of an arm": ("against: off, label", "versus: off, label", ["variants.self", "versus", "against"]),
    "unknown key of singles": ("seeds: [1]}", "against: off}", ["single_task", "against", "tasks"]),
    "against nothing": (
        "against: off, note",
        "against: of, note",
        ["variants.on.against", "of is no other variant", "off"],
    ),
    "against an arm twice": ("against: off, note", "against: [off, off], note", ["variants.on.against", "twice"]),
    "against a mapping": ("against: off, note", "against: {off: 1}, note", ["variants.on.against", "list of names"]),
    "against itself": ("against: off, note", "against: on, note", ["variants.on.against", "on is no other variant"]),
    "no common seed": ("seeds: [1, 2]}", "seeds: [7]}", ["variants.self and variants.off", "no seed in common"]),
    "a seed twice": ("[3, 1, 2]", "[3, 1, 3]", ["seeds", "seed 3 twice"]),
    "a seed that is none": ("[3, 1, 2]", "[3, -1]", ["seeds", "whole numbers"]),
    "seeds that are no list": ("[3, 1, 2]", "3", ["seeds", "whole numbers"]),
    "no seeds at all": ("seeds: [3, 1, 2]", "", ["variants.off has no seeds"]),
    "overrides that are no list": ("[regularizer=none]", "regularizer=none", ["variants.off.overrides", "list"]),
    "an override that is none": ("[regularizer=none]", "[regularizer]", ["variants.off.overrides", "'regularizer'"]),
    "an override as a mapping": ("[regularizer=none]", "[{gain: 1}]", ["variants.off.overrides", "list of texts"]),
    "a seed as an override": ("[gain=0.1]", "[seed=4]", ["variants.on.overrides", "seed=4", "set by the study itself"]),
    "a folder as an override": ("[gain=0.1]", "[hydra.run.dir=x]", ["variants.on.overrides", "itself"]),
    "two equal labels": ("of itself", "on", ["variants.on and variants.self", "label on"]),
    "an arm twice": ("  self:", "  on:", ["the key on appears twice"]),
    "an arm with a slash": ("  self:", "  a/b:", ["variants", "'a/b'"]),
    "an arm like the singles": ("  self:", "  single_depth:", ["variants.single_depth"]),
    "an old key": ("variants:", "arms:", ["the key arms is called variants now"]),
    "no YAML": ("variants:", "variants: [", ["not a readable YAML"]),
    "an environment that is none": ("{A_VARIABLE: 1}", "[A]", ["environment"]),
    "a task that is none": ("seeds: [1]}", "tasks: [deph]}", ["single_task.tasks", "deph", "depth"]),
    "a label that is none": ("label: of itself", "label: ", ["variants.self.label"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_file_is_one_sentence(study_file, name):
    old, new, fragments = MISTAKES[name]
    assert FILE.count(old) == 1
    study_file.write_text(FILE.replace(old, new))
    with pytest.raises(UserError) as raised:
        read_study(study_file)
    for word in (str(study_file), *fragments):
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_or_has_no_arms(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml"):
        read_study(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("name: x\nvariants: {}\n")
    with pytest.raises(UserError, match="variants must be a mapping of one variant or more"):
        read_study(tmp_path / "empty.yaml")


@pytest.mark.parametrize(  # explorations have up to forty variants
    "path",
    [pytest.param(path, marks=pytest.mark.slow if "_tune" in path.stem else ()) for path in STUDIES],
    ids=lambda path: path.stem,
)
def test_every_study_in_the_repository_is_one_that_train_py_takes(path):
    study = read_study(path)
    assert study.name == path.stem
    for overrides in {variant.overrides for variant in study.with_single_task_variants(["depth"]).variants}:
        merged = [*study.overrides, *overrides]
        assert make_portable(merged) == merge_overrides(merged), (
            f"{path}: paths of a machine belong to the command line"
        )
        assert compose_task_names(merged, ROOT / "configs")


def test_a_config_that_train_py_refuses_is_one_sentence():
    with pytest.raises(UserError, match=r"did you mean trainer\.max_steps"):
        compose_task_names(["trainer.max_step=3"], ROOT / "configs")
    with pytest.raises(UserError, match=r"trainer\.max_steps=0"):
        compose_task_names(["trainer.max_steps=0"], ROOT / "configs")
    assert compose_task_names(["tasks.names=[normals,depth]"], ROOT / "configs") == ["depth", "normals"]


# The words of a run


def test_later_words_win_and_a_machines_are_not_kept():
    overrides = [
        "a=1",
        "data.root=/data",
        "b=2",
        "a=3",
        "+data.cache=/c",
        "backbone.weights=../w/net.safetensors",
        "seed=1",
    ]
    assert make_portable([*overrides, "data.label_assignment='/x/map.json'", "hydra.run.dir=/y", "~c"]) == [
        *("b=2", "a=3", "backbone.weights=net.safetensors", "data.label_assignment=map.json", "~c")
    ]


def test_the_command_to_repeat_a_study_names_no_folder_of_this_machine():
    typed = ["data.root=/my/data", "data.cache=/c", "backbone.weights=/w/n.safetensors", "backbone.mean=[0.5,0.5,0.5]"]
    assert format_command(ROOT / "scripts" / "studies" / "smoke.yaml", "smoke", typed, ROOT) == (
        "python scripts/study.py scripts/studies/smoke.yaml --output outputs/smoke data.root=$DATA "
        "backbone.weights=$WEIGHTS 'backbone.mean=[0.5,0.5,0.5]'"
    )


def test_the_first_seeds_runs_of_all_arms_come_first(study_file):
    study = read_study(study_file).with_single_task_variants(["semseg", "depth"])
    jobs = list_jobs(study, Path("out"), ["a=1"])
    on, off, of_self, single_task = ("on", "off", "self", ["single_semseg", "single_depth"])
    assert [(job.seed, job.variant.name) for job in jobs] == [
        *((3, variant) for variant in (off, on)),
        *((1, variant) for variant in (off, on, of_self, *single_task)),
        *((2, variant) for variant in (off, on, of_self)),
    ]
    assert jobs[1].overrides == ("trainer.max_steps=9", "gain=0.1", "a=1")
    assert jobs[1].folder == Path("out/on/seed_3")


def test_a_folder_with_odd_characters_is_quoted_for_hydra():
    assert quote_value(Path("/a/b-c_1.d")) == "/a/b-c_1.d"
    assert quote_value(Path("/a b/it's")) == r"'/a b/it\'s'"


# Runs


def test_a_study_runs_once_and_tells_where_it_is(run, tmp_path):
    output, failures = run("extra=1")
    assert not failures
    order = ["off 3", "on 3", "off 1", "on 1", "self 1", "single_semseg 1", "single_depth 1", "off 2", "on 2", "self 2"]
    assert calls(tmp_path) == order
    assert "made_up: 10 runs, 0 of them finished before" in output
    assert "[10/10] self seed 2 started" in output
    assert "about" in output
    folder = tmp_path / "out" / "on" / "seed_3"
    assert json.loads((folder / "run.json").read_text())["overrides"] == [
        *("trainer.max_steps=9", "gain=0.1", "extra=1")
    ]
    assert (tmp_path / "out" / "on" / "seed_3.log").read_text().startswith("$ ")
    assert "| of itself | 2 |" in (tmp_path / "out" / "study.md").read_text()
    assert json.loads((tmp_path / "out" / "study.json").read_text())["missing"] == []

    again, _ = run("extra=1")
    assert calls(tmp_path) == order
    assert "10 runs, 10 of them finished before" in again
    table_only, _ = run(table_only=True)
    assert calls(tmp_path) == order
    assert table_only.partition("single-task")[2] == again.partition("single-task")[2] != ""


def test_only_some_arms_are_run_and_the_table_names_what_is_missing(run, tmp_path):
    output, _ = run(only=["off", "single_task"])
    assert calls(tmp_path) == ["off 3", "off 1", "single_semseg 1", "single_depth 1", "off 2"]
    assert "5 runs missing: on seed 3, on seed 1, on seed 2, self seed 1, self seed 2." in " ".join(output.split())
    with pytest.raises(
        UserError, match=r"--only onn: .* no such variant \(did you mean on\?\); choose among off, on, self"
    ):
        run(only=["onn"])
    with pytest.raises(UserError, match="--multirun"):
        run("--multirun")


def test_nothing_finished_is_no_table(run, tmp_path):
    output, _ = run(table_only=True)
    assert output == "no run has finished: there is no table"
    assert not (tmp_path / "out" / "study.md").exists()


def test_two_runs_at_once(run, study_file, tmp_path):
    study_file.write_text("seeds: [0]\nvariants: {a: {overrides: [wait=2]}, b: {overrides: [wait=2]}}\n")
    assert not run(num_parallel=2)[1]
    assert sorted(calls(tmp_path)) == ["a 0", "b 0"]


@pytest.mark.parametrize("record", [True, False])
def test_finished_runs_of_other_settings_stop_the_study_before_it_starts(run, study_file, tmp_path, record):
    run("data.root=/here", only=["off"])
    if not record:  # by train.py itself
        (tmp_path / "out" / "off" / "seed_1.json").unlink()
        (tmp_path / "out" / "off" / "seed_2.json").unlink()
        (tmp_path / "out" / "off" / "seed_3.json").unlink()
    calls_before = calls(tmp_path)
    run("data.root=/elsewhere", "trainer.device=cuda", only=["off"])  # no setting
    assert calls(tmp_path) == calls_before
    study_file.write_text(FILE.replace("max_steps=9", "max_steps=10"))
    with pytest.raises(UserError) as raised:
        run()
    message = str(raised.value)
    assert f"{tmp_path}/out/off/seed_3 was made by other settings (trainer.max_steps was 9, now 10)" in message
    assert "--output" in message
    assert calls(tmp_path) == calls_before
    study_file.write_text(FILE)
    with pytest.raises(UserError, match="extra was not set, now 1"):
        run("extra=1")
    if record:
        study_file.write_text(FILE.replace("A_VARIABLE: 1", "A_VARIABLE: 2"))
        with pytest.raises(UserError, match="A_VARIABLE was 1, now 2"):
            run()


def test_a_failed_run_does_not_end_the_study_and_is_tried_again(run, study_file, tmp_path):
    study_file.write_text(FILE.replace("gain=0.1", f"gain=0.1, trouble={tmp_path}/trouble"))
    (tmp_path / "trouble").touch()
    output, failures = run()
    assert [one.job.title for one in failures] == ["on seed 3", "on seed 1", "on seed 2"]
    assert failures[0].reason == "exit code 1: error: the loss was not finite"
    assert "3 runs failed" in format_failures(failures)
    assert str(tmp_path / "out" / "on" / "seed_3.log") in format_failures(failures)
    assert "FAILED (exit code 1: error: the loss was not finite)" in output
    assert "3 runs missing: on seed 3, on seed 1, on seed 2" in " ".join(output.split())
    assert len(calls(tmp_path)) == 10
    (tmp_path / "trouble").unlink()
    assert not run()[1]
    assert calls(tmp_path)[10:] == ["on 3", "on 1", "on 2"]  # afresh: there is no checkpoint


def test_a_config_that_is_refused_stops_the_study_before_it_starts(run, tmp_path):
    def refuse(overrides):
        if "gain=0.05" in overrides:
            raise UserError("gain is no key")
        return ["depth"]

    with pytest.raises(UserError, match=r"made_up\.yaml: self: gain is no key"):
        run(list_tasks=refuse)
    assert not calls(tmp_path)


def test_a_signal_ends_the_runs_and_the_same_command_continues_them(run, study_file, tmp_path):
    study_file.write_text(f"seeds: [0]\nvariants: {{a: {{overrides: [trouble={tmp_path}/t.hang]}}, b: {{}}}}\n")
    (tmp_path / "t.hang").touch()

    def interrupt():
        deadline = time.monotonic() + 20
        while not (tmp_path / "out/a/seed_0/checkpoints/last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    lines = []
    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(say=lines.append)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert lines[-2:] == ["interrupted: ending 1 run", "the same command continues this study"]
    assert (tmp_path / "out/a/seed_0.log").read_text().endswith("saved\n")
    assert calls(tmp_path) == ["a 0"]
    (tmp_path / "t.hang").unlink()
    again, failures = run()
    assert not failures
    assert "a seed 0 continued" in again
    assert calls(tmp_path) == ["a 0", "a 0 auto", "b 0"]


def test_a_time_limit_ends_the_runs_and_the_same_command_continues_them(run, study_file, tmp_path):
    study_file.write_text(
        f"seeds: [0]\nvariants: {{b: {{}}, a: {{overrides: [trouble={tmp_path}/t.hang]}}, c: {{}}}}\n"
    )
    (tmp_path / "t.hang").touch()
    lines = []
    run(only=["b"])
    with pytest.raises(TimeLimitReached, match="time limit: 2 runs to go") as reached:
        run(time_limit=0.3, say=lines.append)
    assert reached.value.remaining == 2
    assert "time limit: ending 1 run" in lines
    assert any("b" in line and "mIoU" in line for line in lines)  # the table of what is finished
    assert not (tmp_path / "out/a/seed_0/metrics.json").exists()
    (tmp_path / "t.hang").unlink()
    assert not run(time_limit=60)[1]
    assert (tmp_path / "out/a/seed_0/metrics.json").exists()
    assert calls(tmp_path)[-1] == "c 0"


def test_what_a_killed_studys_process_still_runs_is_waited_for(run, tmp_path):
    run(only=["off"])
    calls_before, folder = calls(tmp_path), tmp_path / "out" / "off" / "seed_3"
    text = (folder / "metrics.json").read_text()
    (folder / "metrics.json").unlink()
    lock = lock_run(folder)

    def finish():
        (folder / "metrics.json").write_text(text)
        lock.close()

    lines = []

    def say(line):
        lines.append(line)
        if "off seed 3 is still run by a process of a study that was killed" in line:
            threading.Timer(0.2, finish).start()

    _, failures = run(only=["off"], say=say)
    assert not failures
    assert calls(tmp_path) == calls_before
    assert "off seed 3 finished by a process of an earlier study" in "\n".join(lines)


def test_two_studies_in_one_folder_are_refused(run, tmp_path):
    refused = []

    def say(text):
        if "started" in text and not refused:
            with pytest.raises(UserError, match="another study is running in"):
                run()
            refused.append(text)

    run(say=say)
    assert refused


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (3599.7, "1 h 00 min")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


# Numbers


OFF = {"semseg": [0.400, 0.410, 0.395, 0.402], "depth": [0.60, 0.62, 0.61, 0.59]}
ON = {"semseg": [0.420, 0.434, 0.409, 0.430], "depth": [0.61, 0.60, 0.63, 0.58]}
SINGLE = {"semseg": [0.41, 0.42], "depth": [0.57]}
METRIC = {"semseg": "mIoU", "depth": "rmse"}
STUDY = Study(
    "numbers",
    (),
    (
        Variant("off", ("regularizer=none",), (0, 1, 2, 3), (), "off"),
        Variant("on", (), (0, 1, 2, 3), ("off",), "on"),
        Variant("single_semseg", (), (0, 1), (), "single-task semseg", "", "semseg"),
        Variant("single_depth", (), (0,), (), "single-task depth", "", "depth"),
    ),
)


def one_record(variant, seed, metrics, **facts):
    record = {"seed": seed, "step": 9, "split": "tune", "num_images": 5, "data_fingerprint": "8d9e", "device": "cpu",
              "commit": "e51845271362f65d", "clean": True, "versions": {"torch": "2.15"}}  # fmt: skip
    return {
        "study": "numbers",
        "arm": variant,
        "seed": seed,
        "overrides": [],
        "metrics": metrics,
        "run": record | facts,
    }


@pytest.fixture
def records():
    both = [
        one_record(variant, seed, {task: {METRIC[task]: values[task][seed]} for task in values})
        for variant, values in (("off", OFF), ("on", ON))
        for seed in range(4)
    ]
    single_task = [
        one_record(f"single_{task}", seed, {task: {METRIC[task]: value}})
        for task, values in SINGLE.items()
        for seed, value in enumerate(values)
    ]
    return both + single_task


def test_intervals_are_those_of_a_paired_t_test(records):
    (effects,) = build_report(STUDY, records).effects
    for column, effect in list(effects.columns.items())[:2]:
        expected = stats.ttest_rel(ON[column.task], OFF[column.task]).confidence_interval(0.95)
        assert (effect.paired.low, effect.paired.high) == pytest.approx((expected.low, expected.high))
        spread = statistics.stdev(a - b for a, b in zip(ON[column.task], OFF[column.task]))
        assert effect.smallest == pytest.approx((3.18245 + 0.97847) * spread / 2, rel=1e-5)  # t tables, 3 degrees
    assert [effect.side(column) for column, effect in effects.columns.items()] == [
        *("wholly better", "contains 0", "contains 0")
    ]


def test_two_pairs_get_no_verdict_and_holm_corrects_those_of_more(records):
    (few,) = build_report(STUDY, [one for one in records if one["seed"] < 2], holm=True).effects
    assert {effect.side(column) for column, effect in few.columns.items()} == {"too few pairs"}
    assert "fewer than 3 pairs" in format_text(build_report(STUDY, [one for one in records if one["seed"] < 2]))
    report = build_report(STUDY, records, holm=True)
    (effects,) = report.effects
    values = [effect.paired.p_value for effect in effects.columns.values()]
    assert next(iter(effects.columns.values())).adjusted == pytest.approx(3 * min(values))
    assert [effect.side(column) for column, effect in effects.columns.items()][1:] == ["not below 0.05"] * 2
    assert "by Holm's method for the 3 of 3 pairs or more" in " ".join(format_text(report).split())
    assert to_json(report)["differences"][0]["metrics"]["semseg/mIoU"]["p_holm"] == pytest.approx(3 * min(values))


def test_other_metrics_can_represent_the_tasks(records, run):
    for one in records:
        if "semseg" in one["metrics"]:  # an accuracy that falls by 1 % of itself where mIoU rises
            one["metrics"]["semseg"]["pixel_accuracy"] = 0.99 if one["arm"] == "on" else 1.0
    report = build_report(STUDY, records, metrics=parse_metrics_option("semseg/pixel_accuracy"))
    assert [column.key for column in report.columns][:2] == ["semseg/pixel_accuracy", "depth/rmse"]
    (effects,) = report.effects
    delta = list(effects.columns.values())[-1].paired.mean
    depth = statistics.mean(100 * (b - a) / b for a, b in zip(ON["depth"], OFF["depth"]))
    assert delta == pytest.approx((-1 + depth) / 2)
    header, _, line = format_differences(report).splitlines()
    assert header == "| variants | pairs | semseg pixel_accuracy ↑ (points) | depth rmse ↓ (m) | Delta ↑ (%) |"
    assert line.startswith("| on minus off | 4 | **-1.00 [-1.00, -1.00]** | 0.0000 [")
    text, _ = run(metrics={"depth": "rmse"})
    assert "study.json contain the table by primary metrics" in text
    for text, message in {
        "semseg": "--metrics semseg: 'semseg' is not TASK/METRIC, such as semseg/pixel_accuracy.",
        "depth/rmse,depth/mIoU": "--metrics depth/rmse,depth/mIoU: depth has two metrics; one represents a task.",
        "smseg/mIoU": "--metrics smseg/mIoU: the runs have no task smseg (did you mean semseg?).",
        "semseg/miou": "--metrics semseg/miou: choose among mIoU, pixel_accuracy (did you mean mIoU?).",
    }.items():
        with pytest.raises(UserError) as refused:
            build_report(STUDY, records, metrics=parse_metrics_option(text))
        assert str(refused.value) == message


def test_delta_on_off_is_of_pairs_and_delta_mtl_of_the_singles_means(records):
    report = build_report(STUDY, records)
    deltas = [
        100 / 2 * ((a - b) / b - (c - d) / d)
        for a, b, c, d in zip(ON["semseg"], OFF["semseg"], ON["depth"], OFF["depth"])
    ]
    (effects,) = report.effects
    column, effect = list(effects.columns.items())[-1]
    assert column.metric == "Delta_on/off"
    expected = stats.ttest_1samp(deltas, 0).confidence_interval(0.95)
    assert effect.paired == pytest.approx((statistics.mean(deltas), expected.low, expected.high, 4))
    mtl = [100 / 2 * ((s - 0.415) / 0.415 - (d - 0.57) / 0.57) for s, d in zip(OFF["semseg"], OFF["depth"])]
    assert report.columns[-1].metric == "Delta_MTL"
    assert [row.label for row in report.rows] == ["single-task", "off", "on"]
    assert report.rows[1].summarize(report.columns[-1]) == pytest.approx(
        (statistics.mean(mtl), statistics.stdev(mtl), 4)
    )


def test_an_arm_may_be_compared_with_several_and_its_delta_is_against_the_first(records):
    variants = (*STUDY.variants[:2], replace(STUDY.variants[1], name="both", label="both", against=("on", "off")))
    more = [{**one, "arm": "both"} for one in records if one["arm"] == "off"]
    report = build_report(
        replace(STUDY, variants=variants), [one for one in records if "single" not in one["arm"]] + more
    )
    assert [(one.row.label, one.reference.label) for one in report.effects] == [
        *(("on", "off"), ("both", "on"), ("both", "off"))
    ]
    assert [list(one.columns)[-1].metric for one in report.effects] == ["Delta_on/off", "Delta_on/off", "Delta"]
    assert [column.metric for column in report.columns] == ["mIoU", "rmse", "Delta_on/off"]
    assert (
        report.rows[2].summarize(report.columns[-1]).mean
        == report.effects[1].columns[report.columns[-1]].paired.mean
        < 0
    )
    assert list(report.effects[2].columns.values())[-1].paired.mean == 0


def test_the_smallest_effect_is_found_four_times_in_five():
    """The noncentral t distribution tells the power without the approximation."""
    for pairs in (5, 10, 30):
        values = dict(enumerate(math.sin(k) for k in range(pairs)))
        effect = minimum_detectable_effect(values, dict.fromkeys(values, 0.0))
        shift = effect / statistics.stdev(values.values()) * math.sqrt(pairs)
        limit = stats.t.ppf(0.975, pairs - 1)
        assert 1 - stats.nct.cdf(limit, pairs - 1, shift) == pytest.approx(0.8, abs=0.03)
    assert math.isnan(minimum_detectable_effect({0: 1.0}, {0: 2.0}))


def test_a_study_scored_by_mtan_has_delta_p_beside_delta_mtl(records):
    protocols = {task: {"protocol": "mtan"} for task in ("semseg", "depth")}
    for one in records:
        one["run"]["evaluation"] = {"options": protocols}
        if "semseg" in one["metrics"]:
            one["metrics"]["semseg"]["pixel_accuracy"] = 0.5
        if "depth" in one["metrics"]:
            one["metrics"]["depth"] = {"abs_err": one["metrics"]["depth"]["rmse"], "rel_err": 0.1}
    report = build_report(STUDY, records)
    assert [column.metric for column in report.columns[-2:]] == ["Delta_MTL", "Delta_p"]
    mtl, p = (report.rows[1].summarize(column).mean for column in report.columns[-2:])
    assert p == pytest.approx(mtl / 2)  # of each task's two metrics the second is that of the single-task runs


def test_words_and_missing_runs(records):
    worse = [r for r in records if r["arm"] != "single_depth" and r["seed"] != 3]
    for one in worse:
        if one["arm"] == "on":
            one["metrics"]["depth"]["rmse"] = OFF["depth"][one["seed"]] + 0.01 + one["seed"] / 1000
    text = " ".join(format_text(build_report(STUDY, worse)).split())
    assert "on against off: the interval is wholly better for semseg; is wholly worse for depth; contains 0 for" in text
    assert "3 runs missing: off seed 3, on seed 3, single_depth seed 0." in text
    assert "no Delta_MTL: there is no single-task run of depth." in text
    one_pair = format_text(build_report(STUDY, [r for r in records if r["seed"] == 0]))
    assert "the interval is not known for semseg, depth, Delta_on/off" in " ".join(one_pair.split())


def test_what_does_not_compare(records):
    records[0]["run"]["data_fingerprint"] = "other"
    with pytest.raises(UserError, match="different validation data"):
        build_report(STUDY, records)


def test_a_baseline_of_zero_gives_no_delta_but_a_table(records):
    for one in records:
        if one["arm"] != "on" and "semseg" in one["metrics"]:
            one["metrics"]["semseg"]["mIoU"] = 0.0
    report = build_report(STUDY, records)
    assert [column.task for column in report.columns] == ["semseg", "depth"]
    assert any("no Delta of on: a metric of off is 0" in note for note in report.notes)
    assert any("no Delta_MTL: the single-task value of semseg is 0" in note for note in report.notes)


def test_the_markdown_is_two_tables_and_how_to_repeat_them(records):
    lines = format_markdown(build_report(STUDY, records), "python scripts/study.py x.yaml").splitlines()
    assert lines[0] == "| variant | n | semseg mIoU ↑ (%) | depth rmse ↓ (m) | Delta_on/off ↑ (%) | Delta_MTL ↑ (%) |"
    assert "| off | 4 | 40.17 ± 0.62 | 0.6050 ± 0.0129 | - | -4.67 ± 1.09 |" in lines
    table = [line for line in lines if line.startswith("| on minus off | semseg")]
    assert table == ["| on minus off | semseg mIoU ↑ (points) | +2.15 | [+1.20, +3.10] | wholly better | 4 | 1.24 |"]
    assert "python scripts/study.py x.yaml" in lines
    assert to_json(build_report(STUDY, records))["differences"][0]["metrics"]["depth/rmse"]["pairs"] == 4


# What is kept in the repository


def test_a_study_goes_on_where_only_its_results_were_kept(run, study_file, tmp_path):
    results = tmp_path / "results"
    weights = "backbone.weights=/elsewhere/me/w.pt"
    run(weights, results=results)
    table = (tmp_path / "out" / "study.md").read_text()
    shutil.rmtree(tmp_path / "out")
    (results / "on_seed3.json").unlink()
    printed, _ = run("backbone.weights=/here/w.pt", results=results)
    assert calls(tmp_path) == ["on 3"]
    assert "9 runs have their results there" in printed
    assert (tmp_path / "out" / "study.md").read_text() == table
    assert (results / "on_seed3.json").is_file()

    shutil.rmtree(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"off_seed3\.json is of other settings \(backbone\.weights was w\.pt, now v\.pt"
    ):
        run("backbone.weights=v.pt", results=results)
    study_file.write_text(FILE.replace("A_VARIABLE: 1", "A_VARIABLE: 2"))
    with pytest.raises(UserError, match=r"A_VARIABLE was 1, now 2"):
        run(weights, results=results)
    study_file.write_text(FILE.replace("made_up", "numbers"))
    with pytest.raises(UserError, match="holds the results of the study made_up, not of numbers"):
        run(weights, results=results)
    assert calls(tmp_path) == []


def test_results_are_small_files_without_a_machines_paths_and_give_the_same_table(run, study_file, tmp_path):
    results = tmp_path / "results" / "made_up"
    run("data.root=/elsewhere/me/data", "backbone.weights=/elsewhere/me/w.pt", results=results)
    names = sorted(path.name for path in results.iterdir())
    assert len(names) == 11
    assert names[:3] == ["off_seed1.json", "off_seed2.json", "off_seed3.json"]
    for path in results.iterdir():
        assert "/elsewhere" not in path.read_text()
        assert "IoU/" not in path.read_text()
    one = json.loads((results / "on_seed3.json").read_text())
    assert one["overrides"] == ["trainer.max_steps=9", "gain=0.1", "backbone.weights=w.pt"]
    assert one["run"]["commit"] == "e51845271362f65d"
    study, records, command = read_results(results)
    assert "data.root=$DATA backbone.weights=$WEIGHTS" in command
    assert format_markdown(build_report(study, records), command) == (tmp_path / "out" / "study.md").read_text()

    files_before = {path: path.read_bytes() for path in results.iterdir()}
    run(table_only=True, results=results)
    assert files_before == {path: path.read_bytes() for path in results.iterdir()}
    study_file.write_text(FILE.replace("seeds: [1, 2]}", "seeds: [2]}"))
    run(table_only=True, results=results)
    assert "self_seed1.json" not in {path.name for path in results.iterdir()}
    with pytest.raises(UserError, match="holds the results of the study made_up, not of numbers"):
        write_results(results, STUDY, [], "")
    (results / "study.json").write_text('{"name": "made_up"}')
    with pytest.raises(UserError, match=r"study\.json is not of scripts/study\.py"):
        read_results(results)


def test_documents_show_a_study_and_notice_when_it_drifts(records, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("render_results", ROOT / "scripts" / "docs" / "render_results.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    document = tmp_path / "results.md"
    document.write_text("# Results\n\n<!-- table: numbers -->\n<!-- end -->\n\nAfter.\n")
    for name, value in {"ROOT": tmp_path, "RESULTS": tmp_path / "results", "DOCUMENTS": (document,)}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(sys, "argv", ["render_results.py"])
    with pytest.raises(UserError, match=r"asks for the table numbers, but there is no results/numbers\.json and no"):
        script.main()
    write_results(tmp_path / "results" / "numbers", STUDY, records, "python scripts/study.py x.yaml")
    script.main()
    assert format_markdown(build_report(STUDY, records), "python scripts/study.py x.yaml") in document.read_text()
    assert document.read_text().endswith("```\n<!-- end -->\n\nAfter.\n")
    document.write_text("<!-- table: numbers differences holm metrics=depth/rmse -->\n<!-- end -->\n")
    script.main()
    lines = document.read_text().splitlines()
    assert lines[3].startswith("| on minus off | 4 | **+2.15 ["), lines
    assert lines[-3] == "python scripts/study.py x.yaml --holm --metrics depth/rmse"
    document.write_text("<!-- table: numbers mean -->\n<!-- end -->\n")
    with pytest.raises(UserError, match="mean is not one of means, differences, holm, metrics=TASK/METRIC"):
        script.main()
    document.write_text("<!-- table: numbers -->\n<!-- end -->\n")
    script.main()
    monkeypatch.setattr(sys, "argv", ["render_results.py", "--check"])
    script.main()
    records[0]["metrics"]["depth"]["rmse"] = 0.7
    write_results(tmp_path / "results" / "numbers", STUDY, records, "python scripts/study.py x.yaml")
    with pytest.raises(UserError, match=r"out of date: results\.md"):
        script.main()


# For real


@pytest.mark.slow
def test_a_small_study_for_real(cli, tmp_path):
    arguments = [str(ROOT / "scripts" / "studies" / "smoke.yaml"), "--output", str(tmp_path / "out"), "--jobs", "2"]
    result = cli("scripts/study.py", *arguments, "--only", "off", "on", "data.workers=0")
    assert result.code == 0, result.err
    assert "missing: single_depth seed 0, single_normals seed 0" in " ".join(result.out.split())
    last = json.loads((tmp_path / "out" / "on" / "seed_1" / "metrics.json").read_text())
    (tmp_path / "out" / "on" / "seed_1" / "metrics.json").unlink()  # as if interrupted after its last checkpoint
    result = cli("scripts/study.py", *arguments, "--results", str(tmp_path / "kept"), "data.workers=0")
    assert result.code == 0, result.err
    assert "6 runs, 3 of them finished before" in result.out
    assert "on seed 1 continued" in result.out
    table = json.loads((tmp_path / "out" / "study.json").read_text())
    assert table["rows"]["on"]["depth/rmse"]["values"]["1"] == last["depth"]["rmse"]
    assert set(table["rows"]["on"]) == {"depth/rmse", "normals/mErr", "Delta_on/off", "Delta_MTL"}
    assert len(list((tmp_path / "kept").glob("*.json"))) == 7
    result = cli("scripts/study.py", *arguments, "trainer.max_steps=3")
    assert result.code == 1
    assert "trainer.max_steps was not set, now 3" in result.err


def test_an_arm_of_changed_defaults_is_told(records):
    for one, weight in zip((one for one in records if one["arm"] == "on"), (0.3, 0.5, 0.5, 0.5)):
        one["config"] = {"regularizer.weight": weight, "optimizer.lr": 1e-3}
        one["config"] |= {"trainer.ema_warmup": False} if weight == 0.5 else {}  # a later key, as what was before it
    notes = build_report(STUDY, records).notes
    assert "warning: the runs of on were made by different settings: regularizer.weight." in notes
    for one in records:
        one["config"] = {"regularizer.weight": 0.3}
    assert not any("different settings" in note for note in build_report(STUDY, records).notes)


def test_curves_of_two_arms(cli, tmp_path):
    """Against the formulas; arms without a common seed are refused."""
    values = {"a": [[1.0, 2.0], [3.0, 4.0]], "b": [[1.5, 2.0], [3.5, 5.0]]}
    for variant, runs in values.items():
        for seed, losses in enumerate(runs):
            lines = [{"step": 10 * i, "kind": "train", "depth": loss, "lr": 0.1} for i, loss in enumerate(losses)]
            folder = tmp_path / variant / f"seed_{seed}"
            folder.mkdir(parents=True)
            (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = cli("scripts/benchmarks/compare_curves.py", f"{tmp_path}/a", f"{tmp_path}/b")
    row = result.out.splitlines()[1].split()
    assert row[0] == "depth"
    assert [float(x) for x in row[3:]] == pytest.approx([3, 3.5, 0.5, 2**0.5, 1.1284, 0.44], abs=5e-3)
    (tmp_path / "b" / "seed_1").rename(tmp_path / "b" / "seed_2")
    refused = cli("scripts/benchmarks/compare_curves.py", f"{tmp_path}/a", f"{tmp_path}/b")
    assert refused.code == 1
    assert "different runs" in refused.err
