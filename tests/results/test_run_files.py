"""Run folders that others wrote, edited or damaged: every reader gives a result or one sentence, and none waits."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from helpers.run_folders import ON, VALUES, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtcl import UserError
from mtcl.launch.study_file import Study, Variant
from mtcl.launch.study_tables import build_report, format_markdown, make_record, read_results, to_json, write_results
from mtcl.launch.sweep import find_run_state
from mtcl.results.compare import compare
from mtcl.results.html import collect, render_page
from mtcl.results.list_runs import format_runs, list_runs, read_state, to_records
from mtcl.results.run_files import read_config, read_metrics, read_record
from mtcl.results.runs import read_run
from mtcl.results.tables import FORMATS, format_csv, render
from mtcl.run_log import read_tail
from mtcl.training.run_logger import DAMAGED, RunLogger

NAMES = ("metrics.json", "run.json", "config.yaml", "log.jsonl")
LIMIT = 5.0  # seconds

LOG = [
    {"step": 0, "kind": "val", "semseg/mIoU": 0.1, "depth/rmse": 2.0},
    {"step": 0, "kind": "train", "semseg": 1.5, "lr": 0.001},
    {"step": 20, "kind": "train", "semseg": 1.0, "lr": 0.0005},
    {"step": 400, "kind": "val", "semseg/mIoU": 0.4, "depth/rmse": None},
]
CONFIG = {
    "name": "made_up",
    "seed": 1,
    "tasks": {"names": ["semseg", "depth"]},
    "data": {"root": "/x", "size": [64, 96]},
    "backbone": {"name": "resnet18", "kwargs": {"drop_path_rate": 0.1}},
    "regularizer": {"_target_": ON["regularizer._target_"], "weight": 0.5, "options": {"pixels": 64}},
    "optimizer": {"lr": 0.001},
    "trainer": {"max_steps": 400, "dry_run": False},
}
RECORD = {
    "command": "train.py",
    "overrides": ["regularizer=contrastive"],
    "commit": "e51845271362f65d",
    "clean": True,
    "versions": {"torch": "2.1"},
    "device": "cpu",
    "seed": 1,
    "split": "standard",
    "num_images": 500,
    "data_fingerprint": "8d9e",
    "evaluation": {"options": {"sal": {"protocol": "standard"}}},
    "step": 400,
    "seconds": 12.5,
    "checkpoint": "runs/a/checkpoints/best.pt",
}
INTACT = {
    "metrics.json": json.dumps(VALUES),
    "run.json": json.dumps(RECORD),
    "config.yaml": json.dumps(CONFIG, indent=1),
    "log.jsonl": "".join(json.dumps(line) + "\n" for line in LOG),
}


def read_everything(folder: Path) -> list[UserError]:
    """Read a run, and the folder it lies in beside an intact one, in every way there is; the sentences that come."""
    errors = []

    def tables() -> None:
        for sources in ([folder], [folder.parent]):
            comparison = compare(sources, all_metrics=len(sources) == 1, holm=True)
            for format in FORMATS:
                render(comparison, format).encode()

    def runs() -> None:
        listed = list_runs([folder.parent])
        format_runs(listed, 80).encode()
        format_csv([list(one.values()) for one in to_records(listed)]).encode()
        json.dumps(to_records(listed))

    def page() -> None:
        render_page(collect([folder.parent]), "x").encode()

    def study() -> None:
        study = Study("x", (), (Variant("a", (), (1,)),))
        report = build_report(study, [make_record(study, study.variants[0], 1, (), folder)])
        format_markdown(report, "x").encode()
        json.dumps(to_json(report))

    def sweep() -> None:
        find_run_state(folder, CONFIG)

    for read in (tables, runs, page, study, sweep):
        began = time.perf_counter()
        try:
            read()
        except UserError as error:
            errors.append(error)
        assert time.perf_counter() - began < LIMIT, read
    assert not [error for error in errors if "\n" in str(error)]
    return errors


# Mutations

ODD = [
    "null", "true", "0", "-1", "1.5", "9" * 400, "1e308", "-1e308", "5e-324", "1e400", "NaN", "-Infinity", "[]", "{}",
    "[0]", '{"a": 0}', '""', '"x"', r'"\ud800"', r'"\u0000"', '"=1+1"', r'"\u001b[31m"', r'"\u202e"', "[" * 100_000,
    '{"a":' * 2000, '"a/../checkpoints/x.pt"', "2026-01-01", "!!set {a}", "!!binary aGk=", "!!python/name:os.system",
    "&a [*a]", "1:30", "0x10", ".nan", ".inf", "auto", "[[1, 2], [3]]", "123456789012345678", '"' + "x" * 5000 + '"',
]  # fmt: skip
BYTES = [
    b"\0", b"\0" * 5000, b"\xff\xfe", b"[" * 50_000, b"- " * 50_000, b"*a", b"&a ", b"{", b"}", b",", b"\n", b"\r",
    b'"', b"9" * 30, b"-", b"e999", b"[1]\n", b"\xef\xbb\xbf", b"\t", b"? ", b"\x1b]0;x\x07", b"%YAML 9\n---\n",
]  # fmt: skip


def places(content, path=()):
    """Every place of a JSON tree, as the keys that lead to it."""
    yield path
    for key, value in content.items() if isinstance(content, dict) else ():
        yield from places(value, (*path, key))
    for index, value in enumerate(content) if isinstance(content, list) else ():
        yield from places(value, (*path, index))


@st.composite
def changed_tree(draw, text: str) -> bytes:
    """A JSON text in which some values are replaced, left out or called otherwise."""
    content = json.loads(text)
    odd: dict[str, str] = {}
    for number in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from([position for position in places(content) if position] or [(None,)]))
        if last is None or draw(st.integers(0, 30)) == 0:
            return draw(st.sampled_from(ODD)).encode()
        parent = content
        for key in above:
            parent = parent[key]
        value = parent.pop(last)
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "wrap"]))
        if kind == "replace":
            odd[f"<{number}>"] = draw(st.sampled_from(ODD))
            value = f"<{number}>"
        elif kind == "wrap":
            value = [value]
        if kind == "rename" and isinstance(last, str):
            last = draw(st.sampled_from(["", "x", "a/b", "\x1b[31m", "depth", "step", "=1", "\ud800"]))
        if kind != "remove":
            parent.insert(last, value) if isinstance(parent, list) else parent.update({last: value})
    rendered = json.dumps(content)
    for name, raw in odd.items():
        rendered = rendered.replace(f'"{name}"', raw)
    return rendered.encode()


@st.composite
def changed_bytes(draw, data: bytes) -> bytes:
    """A file in which some bytes are put in, taken out, doubled or cut off."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["insert", "replace", "remove", "double", "cut"]))
        part = draw(st.sampled_from(BYTES)) if kind in ("insert", "replace") else b""
        if kind == "cut":
            return data[:start]
        middle = {"double": data[start:end] * 2, "remove": b""}.get(kind, part)
        data = data[:start] + middle + data[start if kind == "insert" else end :]
    return data


@st.composite
def damaged_files(draw) -> dict[str, bytes]:
    """The files of a run, of which one or two are damaged."""
    files = {name: text.encode() for name, text in INTACT.items()}
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True)):
        if draw(st.booleans()):
            files[name] = draw(changed_bytes(files[name]))
        elif name == "log.jsonl":
            lines = INTACT[name].splitlines()
            lines[draw(st.integers(0, len(lines) - 1))] = draw(changed_tree(json.dumps(LOG[0]))).decode()
            files[name] = "".join(f"{line}\n" for line in lines).encode()
        else:
            files[name] = draw(changed_tree(INTACT[name]))
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=1)):
        del files[name]
    return files


def check_damaged(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    read_everything(folder)
    check_resumed(folder)


def check_resumed(folder: Path) -> None:
    """Continue the run's log: what is in it then are whole records, what was there and is none lies beside it."""
    log_before = (folder / "log.jsonl").read_bytes() if (folder / "log.jsonl").exists() else b""
    (folder / DAMAGED).unlink(missing_ok=True)
    run_logger = RunLogger(folder, start_step=10**15)
    run_logger._keep_earlier_records()
    log_after = (folder / "log.jsonl").read_bytes()
    aside = (folder / DAMAGED).read_bytes() if (folder / DAMAGED).exists() else b""
    assert all(isinstance(json.loads(line)["step"], int) for line in log_after.splitlines())
    assert len(log_after) + len(aside) in (len(log_before), len(log_before) + 1)


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A folder with an intact run, and room for another one."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "intact", 1)  # off, of the same seed: a pair
    return folder / "a"


FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@FEW
@given(files=damaged_files())
def test_damaged_run_folders_give_a_sentence_or_a_result(beside, files):
    check_damaged(beside, files)


@pytest.mark.slow
@settings(FEW, max_examples=750)
@given(files=damaged_files())
def test_hundreds_of_damaged_run_folders_give_a_sentence_or_a_result(beside, files):
    check_damaged(beside, files)


# Single readers


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("run.json", '{"seed": [0]}', r"run.json has \[0\] for seed; it must be a whole number >= 0"),
        ("run.json", '{"seed": -1}', "has -1 for seed"),
        ("run.json", '{"step": "x"}', "has 'x' for step; it must be a whole number"),
        ("run.json", '{"step": true}', "has True for step"),
        ("run.json", '{"checkpoint": 5}', "has 5 for checkpoint; it must be text"),
        ("run.json", '{"overrides": [1]}', "a list of texts"),
        ("run.json", '{"evaluation": []}', "has .. for evaluation"),
        ("run.json", '{"num_images": 1%s}' % ("0" * 400), "whole number of 401 digits"),
        ("run.json", "[" * 100_000, "nested deeper"),
        ("metrics.json", '{"depth": {"rmse": Infinity}}', "has inf for depth/rmse; it must be a finite number"),
        ("metrics.json", '{"depth": {"rmse": 1e308}}', "1e.308 for depth/rmse"),
        ("metrics.json", '{"depth": {"not_finite": -1}}', "it must be 0 or more"),
        ("config.yaml", "seed: [0]", "for seed; it must be a whole number"),
        ("config.yaml", "trainer: {max_steps: x}", "has 'x' for trainer.max_steps"),
        ("config.yaml", "[" * 50_000, "nested deeper"),
        ("config.yaml", "a: &a [*a]", "has an alias"),
        ("config.yaml", "a: {b: !!set {c}}", "has a value of type set for b"),
        ("config.yaml", "a: 1%s" % ("0" * 30), "of more than 18 digits for a"),
        ("config.yaml", "- 1", "must hold a mapping, not a list"),
        ("config.yaml", "!!python/name:os.system", "not a readable YAML"),
    ],
)
def test_a_value_of_another_type_is_one_sentence(tmp_path, name, content, match):
    """The file, the key, the value, what it must be."""
    read = {"run.json": read_record, "metrics.json": read_metrics, "config.yaml": read_config}[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=match):
        read(tmp_path / name)
    run = write_run(tmp_path / "run")
    (run / name).write_text(content)
    assert read_state(run).state == "broken"
    with pytest.raises(UserError, match=match):
        compare([run])
    write_run(tmp_path / "other", 1)
    comparison = compare([tmp_path / "run", tmp_path / "other"])
    assert [one.path.name for row in comparison.rows for one in row.runs] == ["other"]
    assert any(note.startswith("warning: left out: ") and name in note for note in comparison.notes)


def test_an_evaluation_reads_no_file_but_its_runs_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("optimizer: {lr: 0.5}")
    for i, checkpoint in enumerate(("x", "a/b.pt", "checkpoints/x.pt", "a\0b/checkpoints/x", "")):
        run = write_run(tmp_path / f"run{i}", facts={"checkpoint": checkpoint})
        (run / "config.yaml").unlink()
        assert ("optimizer.lr" in read_run(run).config) == (checkpoint == "checkpoints/x.pt")


def within(seconds: float):
    def stop(number, frame):
        raise TimeoutError("it waits")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)


@pytest.mark.parametrize("name", [*NAMES, ".lock", "panels/a.png", "../a.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "loop"])
def test_no_fifo_folder_or_loop_in_place_of_a_file_makes_a_reader_wait_or_fail(tmp_path, name, kind):
    write_run(tmp_path / "runs" / "intact", 0)
    run = write_run(tmp_path / "runs" / "a", 1)
    (run / "log.jsonl").write_text(INTACT["log.jsonl"])
    path = (run / name).resolve()
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    {"fifo": lambda: os.mkfifo(path), "folder": path.mkdir, "loop": lambda: path.symlink_to(path)}[kind]()
    handler = signal.getsignal(signal.SIGALRM)
    within(LIMIT)
    try:
        read_everything(run)
        if name == "log.jsonl":
            with pytest.raises(UserError, match=r"log\.jsonl"):
                RunLogger(run, start_step=5).log_scalars(5, "train", {})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    if name in NAMES[:3]:
        assert read_state(run).state == "broken"


def test_bad_lines_of_a_log_are_set_aside_when_the_run_goes_on(tmp_path, caplog):
    bad = [b"\0" * 100 + b"\n", b"[1]\n", b'{"step": "x", "kind": "val"}\n', b"\xff\xfe\n", b'{"step": 1, "ki']
    good = [json.dumps({"step": step, "kind": "train", "depth": 1.0}).encode() + b"\n" for step in range(4)]
    (tmp_path / "log.jsonl").write_bytes(b"".join([good[0], bad[0], good[1], *bad[1:4], good[2], good[3], bad[4]]))
    lines, _ = read_tail(tmp_path / "log.jsonl", 1 << 16)
    assert sum(line.record is None for line in lines) == 5
    run_logger = RunLogger(tmp_path, start_step=3)
    run_logger.log_scalars(3, "train", {"depth": 2.0})
    run_logger.close()
    assert (tmp_path / "log.jsonl").read_bytes().startswith(b"".join(good[:3]))
    assert [json.loads(line)["depth"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 1, 1, 2]
    assert (tmp_path / DAMAGED).read_bytes() == b"".join(bad) + b"\n"
    (warning,) = [one.getMessage() for one in caplog.records if "damaged" in one.getMessage()]
    assert "5 damaged lines: moved to log.damaged.jsonl" in warning
    RunLogger(tmp_path, start_step=4)._keep_earlier_records()
    assert len([one for one in caplog.records if "damaged" in one.getMessage()]) == 1


@pytest.mark.parametrize("content", [b"\xff", b"[1]", b'{"arms": 5}', b'{"arms": [{"name": "../x"}]}', b"[" * 90_000])
def test_a_damaged_study_is_one_sentence(tmp_path, content):
    study = Study("x", (), (Variant("a", (), (1,), label="a"),))
    record = make_record(study, study.variants[0], 1, (), write_run(tmp_path / "run", 1))
    for name in ("study.json", "a_seed1.json"):
        folder = tmp_path / name
        write_results(folder, study, [record], "x")
        assert len(read_results(folder)[1]) == 1
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_results(folder)
