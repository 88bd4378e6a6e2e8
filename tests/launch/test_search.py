"""Searches: their files, and trials of a stand-in for train.py that takes no time."""

import errno
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.common import ROOT
from helpers.run_folders import VALUES, write_run

from mtcl import UserError
from mtcl.launch.search import Storage, compute_objective, run_search
from mtcl.launch.search_file import Range, read_search
from mtcl.launch.study import compose_task_names
from mtcl.training.checkpoint_file import read_checkpoint_file

optuna = pytest.importorskip("optuna")

SEARCHES = sorted((ROOT / "scripts" / "searches").glob("*.yaml"))

# Takes the words of train.py; depth's rmse is the squared distance of log10 of the weight from -1, plus the margin.
# Validates at steps 1 to 4, waits after each while FOLDER/../hold exists; SIGTERM: checkpoint, exit code 75.
TRAIN = """
import fcntl, json, math, os, pathlib, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(words["hydra.run.dir"].strip("'"))
output = folder.parent
with (output / "calls").open("a") as file:
    file.write(f"{folder.name} {words.get('resume', 'fresh')} {words.get('regularizer.weight')}\\n")
weight = float(words.get("regularizer.weight", 1))
if weight < float(words.get("fails_below", 0)):
    sys.exit("error: the loss was not finite")
folder.mkdir(exist_ok=True)
lock = (folder / ".lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
value = (math.log10(weight) + 1) ** 2 + float(words.get("regularizer.options.margin", 0)) + 0.5
if words.get("regularizer") == "none":
    value = 2.0
(folder / "checkpoints").mkdir(exist_ok=True)
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
log = folder / "log.jsonl"
first = len(log.read_text().splitlines()) + 1 if log.exists() else 1
for step in range(first, 5):
    with log.open("a") as file:
        file.write(json.dumps({"step": step, "kind": "val", "depth/rmse": value + 1 / step}) + "\\n")
    (folder / "checkpoints" / "last.pt").touch()
    until = time.monotonic() + float(words.get("pace", 0))
    while not told and ((output / "hold").exists() or time.monotonic() < until):
        time.sleep(0.01)
    if told:
        sys.exit(75)
tasks = words.get("tasks.names", "[depth]").strip("[]").split(",")
metrics = {"depth": {"rmse": value}} if "depth" in tasks else {}
if "semseg" in tasks:
    metrics["semseg"] = {"mIoU": 0.4}
(folder / "metrics.json").write_text(json.dumps(metrics))
facts = {"seed": int(words["seed"]), "split": words["data.split"], "num_images": 5, "data_fingerprint": "8d9e"}
(folder / "run.json").write_text(json.dumps(facts))
"""

FILE = """
name: made_up
overrides: [trainer.max_steps=4]
space:
  regularizer.weight: {low: 0.001, high: 10, log: true}
  regularizer.options.margin: {low: 0, high: 0.1}
objective: depth/rmse
seed: 3
trials: 6
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "made_up.yaml").write_text(FILE)
    return tmp_path / "made_up.yaml"


@pytest.fixture
def run(file, tmp_path, monkeypatch):
    """Conduct the search of ``file``; what it said."""
    monkeypatch.setattr("mtcl.launch.search.POLL", 0.02)

    def conducted(*more, output="out", **options):
        lines = []
        command = [sys.executable, str(tmp_path / "train.py")]
        options = {"list_tasks": lambda overrides: ["depth"], "say": lines.append, **options}
        try:
            run_search(file, tmp_path / output, more, command=command, root=tmp_path, **options)
        except BaseException as error:
            error.output = "\n".join(lines)
            raise
        return "\n".join(lines)

    return conducted


def calls(tmp_path, output="out"):
    return [line.split() for line in (tmp_path / output / "calls").read_text().splitlines()]


def trials(file, output):
    search = read_search(file)
    return optuna.load_study(study_name=search.name, storage=f"sqlite:///{output}/search.db").trials


# The file


def test_a_search_is_read_as_it_stands(file):
    file.write_text(FILE.replace("seed: 3", "pruning: none\nseed: 3").replace("{low: 0, high: 0.1}", "[off, 0.10]"))
    search = read_search(file)
    assert search.space == (
        Range("regularizer.weight", 0.001, 10, log=True),
        Range("regularizer.options.margin", choices=("off", "0.10")),
    )
    assert (search.pruning, search.seed, search.trials) == (None, 3, 6)
    assert search.space[1].bound_overrides() == ("regularizer.options.margin=off", "regularizer.options.margin=0.10")


MISTAKES = {
    "unknown key": ("seed: 3", "seeds: 3", ["the file", "unknown key seeds"]),
    "no space": ("space:", "overrides2:", ["unknown key overrides2"]),
    "low above high": ("low: 0, high: 0.1", "low: 1, high: 0.1", ["space.regularizer.options.margin", "below high"]),
    "no high": ("low: 0, high: 0.1", "low: 0", ["margin.high", "number"]),
    "log of 0": ("low: 0.001", "low: 0", ["space.regularizer.weight", "above 0"]),
    "a fraction as a whole number": ("low: 0, high: 0.1", "low: 0, high: 0.1, int: true", ["margin.high", "whole"]),
    "a flag that is none": ("log: true", "log: maybe", ["weight.log", "true or false"]),
    "one choice": ("{low: 0, high: 0.1}", "[1]", ["margin", "two different values"]),
    "a range that is none": ("{low: 0, high: 0.1}", "0.1", ["margin", "mapping"]),
    "the split": ("regularizer.options.margin", "data.split", ["data.split", "set by the search itself"]),
    "a key twice": ("[trainer.max_steps=4]", "[regularizer.weight=4]", ["both in overrides and in space"]),
    "a repeated key": ("seed: 3", "seed: 3\nseed: 4", ["the key seed appears twice"]),
    "an override that is none": ("[trainer.max_steps=4]", "[x]", ["overrides", "'x'"]),
    "overrides that are no list": ("[trainer.max_steps=4]", "a=b", ["overrides must be a list"]),
    "an objective that is none": ("depth/rmse", "rmse", ["objective", "rmse", "Delta_MTL", "task/metric"]),
    "an unknown task": ("depth/rmse", "deph/rmse", ["objective", "deph/rmse"]),
    "no objective": ("objective: depth/rmse", "", ["objective", "None"]),
    "trials": ("trials: 6", "trials: 0", ["trials", ">= 1"]),
    "pruning": ("seed: 3", "pruning: {after: 3}", ["pruning", "after", "startup_trials"]),
    "first trials that are no list": ("seed: 3", "first: {a: 1}", ["first", "list"]),
    "a first trial of an unknown key": ("seed: 3", "first: [{optimizer.lr: 1}]", ["first, entry 1", "optimizer.lr"]),
    "a first trial of one key": ("seed: 3", "first: [{regularizer.weight: 1}]", ["no value of", "options.margin"]),
    "a first trial outside the range": (
        "seed: 3",
        "first: [{regularizer.weight: 11, regularizer.options.margin: 0}]",
        ["first, entry 1: regularizer.weight must be a number from 0.001 to 10"],
    ),
    "no YAML": ("space:", "space: [", ["not a readable YAML"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_file_is_one_sentence(file, name):
    old, new, fragments = MISTAKES[name]
    assert FILE.count(old) == 1
    file.write_text(FILE.replace(old, new))
    with pytest.raises(UserError) as raised:
        read_search(file)
    for word in (str(file), *fragments):
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_delta_on_off_is_of_the_regulariser_alone(file):
    file.write_text(FILE.replace("depth/rmse", "Delta_on/off"))
    assert read_search(file).column.unit == "%"
    file.write_text(FILE.replace("depth/rmse", "Delta_on/off").replace("regularizer.options.margin", "optimizer.lr"))
    with pytest.raises(UserError, match=r"differ in the regulariser only, but space has optimizer\.lr"):
        read_search(file)


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_every_search_in_the_repository_is_one_that_train_py_takes(path):
    search = read_search(path)
    assert search.name == path.stem
    overrides = [word for one in search.space for word in one.bound_overrides()[:1]]
    assert compose_task_names([*search.overrides, "data.split=tune", *overrides], ROOT / "configs")


# Its runs


def test_the_first_trials_have_the_values_that_the_file_gives(file, tmp_path):
    first = "first:\n" + "".join(
        f"  - {{regularizer.weight: {weight}, regularizer.options.margin: {margin}}}\n"
        for weight, margin in ((0.3, "b"), (1, "a"))
    )
    file.write_text(FILE.replace("{low: 0, high: 0.1}", "[a, b]").replace("seed: 3", f"{first}seed: 3"))
    for _ in range(2):  # the same command goes on: given once
        storage = Storage(read_search(file), [], tmp_path)
    proposed = []
    for _ in range(4):
        proposed.append(storage.propose(3, tmp_path / "searcher"))
        if proposed[-1] is not None:
            storage.study.tell(proposed[-1][0], 1.0)
    assert [overrides for _, overrides in proposed[:2]] == [
        ["regularizer.weight=0.3", "regularizer.options.margin=b"],
        ["regularizer.weight=1", "regularizer.options.margin=a"],
    ]
    assert proposed[2] is not None
    assert proposed[3] is None
    assert [trial.user_attrs["folder"] for trial, _ in proposed[:3]] == ["trial_0000", "trial_0001", "trial_0002"]


@pytest.mark.parametrize(
    ("searched", "text", "value"),
    [
        (Range("a", 0, 1), "0.5", 0.5),
        (Range("a", 1, 5, is_integer=True), "4", 4),
        (Range("a", choices=("x", "1")), "1", "1"),
        (Range("a", 0, 1), "nan", "must be a number from 0 to 1"),
        (Range("a", 1, 5, is_integer=True), "2.5", "must be a whole number from 1 to 5"),
        (Range("a", choices=("x", "1")), "2", "must be x or 1"),
    ],
)
def test_a_given_value_must_be_in_the_range(searched, text, value):
    if isinstance(value, str) and value.startswith("must"):
        with pytest.raises(ValueError, match=value):
            searched.parse(text)
    else:
        assert searched.parse(text) == value


def test_a_search_finds_the_best_and_says_how_to_repeat_it(run, file, tmp_path, monkeypatch):
    monkeypatch.setattr("mtcl.launch.search.MIN_FOR_IMPORTANCE", 5)
    output = run("data.root=/d")
    finished = trials(file, tmp_path / "out")
    assert [trial.state.name for trial in finished] == ["COMPLETE"] * 6
    best = min(finished, key=lambda trial: trial.value)
    for trial in finished:
        weight, margin = trial.params["regularizer.weight"], trial.params["regularizer.options.margin"]
        assert trial.value == pytest.approx((math.log10(weight) + 1) ** 2 + margin + 0.5, rel=1e-2)
        assert len(trial.intermediate_values) >= 1
    lines = output.splitlines()
    table = lines.index("made_up: 6 trials finished, 0 trials pruned, 0 trials failed")
    assert lines[table + 2].split() == [
        "trial",
        "depth/rmse",
        "↓",
        "(m)",
        "regularizer.weight",
        "regularizer.options.margin",
    ]
    assert lines[table + 4].split()[:2] == [f"trial_{best.number:04d}", f"{best.value:.4f}"]
    assert "importance (PED-ANOVA, 6 trials): regularizer.weight " in output
    (command,) = [line for line in lines if line.startswith("python train.py")]
    weight = f"regularizer.weight={best.params['regularizer.weight']:.4g}"
    assert {"data.split=tune", "trainer.max_steps=4", "data.root=/d", weight, "seed=3"} < set(shlex.split(command))
    calls_before = calls(tmp_path)
    assert run("data.root=/d").splitlines()[-8:] == lines[-8:]
    assert calls(tmp_path) == calls_before, "nothing is repeated"
    with pytest.raises(UserError, match="holds a search with other overrides"):
        run("data.root=/e")


@pytest.mark.slow
def test_what_is_proposed_follows_from_seed_and_results_and_not_from_interruptions(run, file, tmp_path):
    run()
    params = [trial.params for trial in trials(file, tmp_path / "out")]
    for count in (2, 4, 6):
        run(trials=count, output="parts")
    assert [trial.params for trial in trials(file, tmp_path / "parts")] == params
    file.write_text(FILE.replace("seed: 3", "seed: 4"))
    run(trials=2, output="other")
    assert trials(file, tmp_path / "other")[0].params != params[0]


def test_failed_trials_are_told_and_end_nothing_unless_all_fail(run, file, tmp_path):
    output = run("fails_below=0.01", trials=3)
    states = [trial.state.name for trial in trials(file, tmp_path / "out")]
    assert set(states) == {"COMPLETE", "FAIL"}
    failed = states.index("FAIL")
    assert f"trial_{failed:04d}: FAILED (exit code 1: error: the loss was not finite ({tmp_path}/out/" in output
    assert f"failed: trial_{failed:04d}: exit code 1" in output
    record = json.loads((tmp_path / "out" / f"trial_{failed:04d}.json").read_text())
    assert (record["state"], record["value"]) == ("failed", None)
    with pytest.raises(UserError, match=r"no trial of .* finished"):
        run("fails_below=99", trials=2, output="none")


def test_a_trial_worse_than_the_median_is_stopped_and_pruned(run, file, tmp_path):
    """Each is compared with what the others had at the same step."""
    file.write_text(FILE.replace("trials: 6", "trials: 5\npruning: {startup_trials: 2, warmup_steps: 2}"))
    output = run("pace=0.1")
    finished = trials(file, tmp_path / "out")
    pruned = [trial for trial in finished if trial.state.name == "PRUNED"]
    assert pruned
    for trial in pruned:
        folder = tmp_path / "out" / f"trial_{trial.number:04d}"
        assert not (folder / "metrics.json").exists()
        assert max(trial.intermediate_values) >= 2, "not before step 2"
        assert json.loads(folder.with_suffix(".json").read_text())["state"] == "pruned"
        earlier = [t.intermediate_values[2] for t in finished[: trial.number] if t.state.name == "COMPLETE"]
        assert trial.value > sorted(earlier)[(len(earlier) - 1) // 2]
    assert f"{len(pruned)} trials pruned" in output
    assert min(finished, key=lambda t: t.value).state.name == "COMPLETE"


def test_an_interrupted_search_goes_on_with_the_same_trials_from_their_checkpoints(run, file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "hold").touch()

    def interrupt():
        while len(list((tmp_path / "out").glob("trial_*/checkpoints/last.pt"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt) as raised:
        run(num_parallel=2, trials=4)
    thread.join()
    assert "2 runs save and stop; the same command goes on" in raised.value.output
    assert [trial.state.name for trial in trials(file, tmp_path / "out")] == ["RUNNING"] * 2
    calls_before = sorted(calls(tmp_path))
    assert [call[:2] for call in calls_before] == [["trial_0000", "fresh"], ["trial_0001", "fresh"]]
    (tmp_path / "out" / "hold").unlink()
    run(num_parallel=2, trials=4)
    calls_after = sorted(calls(tmp_path)[2:])
    assert [call[:2] for call in calls_after[:2]] == [["trial_0000", "auto"], ["trial_0001", "auto"]]
    assert [call[2] for call in calls_after[:2]] == [call[2] for call in calls_before], "the same values"
    assert [call[:2] for call in calls_after[2:]] == [[f"trial_{n:04d}", "fresh"] for n in range(2, 4)]
    assert sum(trial.state.name == "COMPLETE" for trial in trials(file, tmp_path / "out")) == 4


@pytest.mark.slow
def test_two_searches_share_one_storage(run, file, tmp_path):
    """The second is a process of its own, killed: its trial is taken over once its run has let go of the folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "hold").touch()
    code = (
        "import sys; from pathlib import Path; from mtcl.launch.search import run_search\n"
        f"here = Path({str(tmp_path)!r})\n"
        "run_search(here / 'made_up.yaml', here / 'out', command=[sys.executable, str(here / 'train.py')], root=here, "
        "list_tasks=lambda words: ['depth'], trials=3)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL) as other:
        while not (tmp_path / "out" / "trial_0000" / "checkpoints" / "last.pt").exists():
            assert other.poll() is None
            time.sleep(0.02)

        def release():
            while len(calls(tmp_path)) < 2:
                time.sleep(0.01)
            assert [trial.state.name for trial in trials(file, tmp_path / "out")] == ["RUNNING"] * 2
            other.kill()
            (tmp_path / "out" / "hold").unlink()

        thread = threading.Thread(target=release)
        thread.start()
        run(trials=3)
        thread.join()
    runs = calls(tmp_path)
    assert sorted({call[0] for call in runs}) == ["trial_0000", "trial_0001", "trial_0002"]
    assert len(runs) == 3, "the killed search's run went on by itself, and was only read"
    assert sum(trial.state.name == "COMPLETE" for trial in trials(file, tmp_path / "out")) == 3


# What it is for


def test_a_delta_is_against_runs_that_the_search_makes(run, file, tmp_path):
    file.write_text(FILE.replace("depth/rmse", "Delta_on/off"))
    output = run("regularizer.options.embed_dim=8", trials=1)
    assert "1 of 1 runs to compare with: off" in output
    finished = trials(file, tmp_path / "out")
    values = [json.loads((tmp_path / "out" / f"trial_000{i}" / "metrics.json").read_text()) for i in range(1)]
    assert [t.value for t in finished] == pytest.approx([100 * (2.0 - v["depth"]["rmse"]) / 2.0 for v in values])
    assert calls(tmp_path)[0][0] == "off"
    assert "options.embed_dim" not in (tmp_path / "out" / "off.log").read_text(), "regularizer=none has no such key"
    run("regularizer.options.embed_dim=8", trials=2)
    assert sum(call[0] == "off" for call in calls(tmp_path)) == 1
    file.write_text(FILE.replace("depth/rmse", "Delta_MTL"))
    run(trials=1, output="mtl", list_tasks=lambda overrides: ["semseg", "depth"])
    assert [call[0] for call in calls(tmp_path, "mtl")] == ["single_semseg", "single_depth", "trial_0000"]


def test_a_given_baseline_must_be_of_the_tune_split_and_of_the_right_kind(run, file, tmp_path):
    file.write_text(FILE.replace("depth/rmse", "Delta_MTL"))
    single = write_run(tmp_path / "single", 0, {"depth": {"rmse": 1.0}}, facts={"split": "tune", "num_images": 5})
    run(trials=1, baseline=[single])
    (trial,) = trials(file, tmp_path / "out")
    value = json.loads((tmp_path / "out" / "trial_0000" / "metrics.json").read_text())["depth"]["rmse"]
    assert trial.value == pytest.approx(100 * (1.0 - value))
    standard = write_run(tmp_path / "standard", 0, {"depth": {"rmse": 1.0}})
    with pytest.raises(UserError, match=r"standard was scored on split standard; it must be tune"):
        run(baseline=[standard], output="b")
    both = write_run(tmp_path / "both", 0, facts={"split": "tune"})
    with pytest.raises(UserError, match="Delta_MTL needs single-task runs"):
        run(baseline=[both], output="b")
    with pytest.raises(UserError, match="no value of semseg"):
        run(baseline=[single], output="b", list_tasks=lambda overrides: ["semseg", "depth"])
    file.write_text(FILE)
    with pytest.raises(UserError, match="of no use with the objective depth/rmse"):
        run(baseline=[single], output="b")


def test_an_edge_stands_with_its_loss_until_both_have_odsf(file):
    file.write_text(FILE.replace("depth/rmse", "Delta_MTL"))
    search = read_search(file)
    base = [type("Run", (), {"metrics": {task: values}})() for task, values in VALUES.items()]
    metrics = {task: dict(values) for task, values in VALUES.items()}
    metrics["edge"] = {"odsF": 0.77, "loss": 9.0}
    assert compute_objective(search, metrics, base) == pytest.approx(10 / 4)
    del metrics["edge"]["odsF"]
    metrics["edge"]["loss"] = 0.04
    assert compute_objective(search, metrics, base) == pytest.approx(20 / 4)
    del metrics["edge"]["loss"]
    with pytest.raises(UserError, match="odsF of edge is missing"):
        compute_objective(search, metrics, base)


def test_the_pictures_of_the_test_are_not_searched_on(run, file, tmp_path):
    with pytest.raises(UserError, match=r"data\.split=standard: values are chosen on the tune split"):
        run("data.split=standard")
    with pytest.raises(UserError, match=r"regularizer\.weight=1 is set by the search itself"):
        run("regularizer.weight=1")

    def refuse(overrides):
        if "regularizer.weight=10.0" in overrides:
            raise UserError("too heavy")
        return ["depth"]

    with pytest.raises(UserError, match=r"made_up\.yaml: space\.regularizer\.weight: too heavy"):
        run(list_tasks=refuse)
    with pytest.raises(UserError, match=r"objective: depth/rmse, but the runs have semseg"):
        run(list_tasks=lambda overrides: ["semseg"])
    assert not (tmp_path / "out").exists()


def test_without_optuna_it_says_what_to_install(file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"needs Optuna; pip install 'mtcl\[search\]'"):
        Storage(read_search(file), [], tmp_path)


@pytest.mark.slow
def test_a_search_for_real(tmp_path):
    """Pruning reads train.py's own log, SIGTERM saves a checkpoint, an ended search is continued."""
    path = tmp_path / "real.yaml"
    text = (ROOT / "scripts" / "searches" / "smoke.yaml").read_text().replace("Delta_MTL", "depth/rmse")
    extra = "\n  - backbone.name=test_resnet\n  - evaluation.score_boundaries=false\n  - trainer.max_steps=40"
    text = text.replace("name: smoke", "name: real").replace("trainer.num_panels=0", f"trainer.num_panels=0{extra}")
    rate = "optimizer.lr: [1e-4, 1e-2, 0.0]"
    text = text.replace("regularizer.weight: {low: 0.01, high: 1.0, log: true}", rate)
    path.write_text(f"{text}pruning: {{startup_trials: 1, warmup_steps: 1}}\n")
    command = [sys.executable, "scripts/search.py", str(path), "--output", str(tmp_path / "out"), "--trials"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, "6", "--jobs", "2"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as one:
        while len(list((tmp_path / "out").glob("trial_*/checkpoints/last.pt"))) < 2:
            assert one.poll() is None
            time.sleep(0.05)
        one.send_signal(signal.SIGINT)
        out, _ = one.communicate(timeout=200)
    assert one.returncode == 130, out
    assert "the same command goes on" in out
    process = subprocess.run(
        [*command, "6", "--jobs", "2"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580
    )
    assert process.returncode == 0, process.stdout + process.stderr
    logs = {p.stem: p.read_text() for p in (tmp_path / "out").glob("trial_*.log")}
    assert len(logs) == 6
    assert "resumed at step" in logs["trial_0000"] + logs["trial_0001"]
    records = {p.stem: json.loads(p.read_text())["state"] for p in Path(tmp_path / "out").glob("trial_*.json")}
    assert set(records.values()) <= {"finished", "pruned"}
    for name, state in records.items():
        step = read_checkpoint_file(tmp_path / "out" / name / "checkpoints" / "last.pt")["step"]
        assert (step == 40) == (state == "finished") or state == "pruned"


def lock_search(output: Path):
    return Storage.lock(SimpleNamespace(output=output, seconds_to_warning=0.05))


def test_one_search_at_a_time_proposes(tmp_path, caplog):
    """The others wait, and after some time say for whom. A link in place of the file is not followed."""
    fcntl = pytest.importorskip("fcntl")
    with lock_search(tmp_path), (tmp_path / ".turn").open("w") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file = (tmp_path / ".turn").open("w")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    timer = threading.Timer(0.3, file.close)
    timer.start()
    with lock_search(tmp_path):
        assert file.closed
        assert "waiting for another search" in caplog.text
        assert f"(process {os.getpid()})" in caplog.text or not Path("/proc/locks").exists()
    timer.join()
    (tmp_path / ".turn").unlink()
    (tmp_path / "target").write_text("kept")
    (tmp_path / ".turn").symlink_to(tmp_path / "target")
    with lock_search(tmp_path):
        assert (tmp_path / "target").read_text() == "kept"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_on_a_disk_without_locks_a_search_goes_on(code, tmp_path, monkeypatch):
    """... and leaves nothing that would lock out another one after it was killed."""

    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", flock)
        for _ in range(2):
            with lock_search(tmp_path):
                assert not (tmp_path / ".turn").is_file() or not (tmp_path / ".turn").read_bytes()
    with lock_search(tmp_path):
        pass
