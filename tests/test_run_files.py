"""Run folders that others wrote, edited or damaged: every reader gives a result or one sentence, and none waits."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_compare import ON, VALUES, write_run

from mtcl import UserError
from mtcl.entry.compare import compare
from mtcl.entry.page import collect, document
from mtcl.entry.runs import as_records, as_text, list_runs
from mtcl.entry.study_file import Arm, Study
from mtcl.entry.study_tables import as_json, as_markdown, record, report
from mtcl.entry.sweeping import state_of
from mtcl.entry.tables import FORMATS, csv_text, render
from mtcl.training.recorder import DAMAGED, Recorder

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
    "evaluation": {"options": {"sal": {"protocol": "field"}}},
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
            found = compare(sources, every_metric=len(sources) == 1, holm=True)
            for format in FORMATS:
                render(found, format).encode()

    def runs() -> None:
        found = list_runs([folder.parent])
        as_text(found, 80).encode()
        csv_text([list(one.values()) for one in as_records(found)]).encode()
        json.dumps(as_records(found))

    def page() -> None:
        document(collect([folder.parent]), "x").encode()

    def study() -> None:
        made = Study("x", (), (Arm("a", (), (1,)),))
        found = report(made, [record(made, made.arms[0], 1, (), folder)])
        as_markdown(found, "x").encode()
        json.dumps(as_json(found))

    def sweep() -> None:
        state_of(folder, CONFIG)

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
        *above, last = draw(st.sampled_from([place for place in places(content) if place] or [(None,)]))
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
    before = (folder / "log.jsonl").read_bytes() if (folder / "log.jsonl").exists() else b""
    (folder / DAMAGED).unlink(missing_ok=True)
    recorder = Recorder(folder, start_step=10**15)
    recorder._keep_earlier_records()
    kept = (folder / "log.jsonl").read_bytes()
    aside = (folder / DAMAGED).read_bytes() if (folder / DAMAGED).exists() else b""
    assert all(isinstance(json.loads(line)["step"], int) for line in kept.splitlines())
    assert len(kept) + len(aside) in (len(before), len(before) + 1)


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A folder with an intact run, and room for another one."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "intact", 0, config={"backbone.name": "resnet18"})
    return folder / "a"


FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@FEW
@given(files=damaged_files())
def test_damaged_run_folders_give_a_sentence_or_a_result(beside, files):
    check_damaged(beside, files)


@pytest.mark.slow
@settings(FEW, max_examples=1500)
@given(files=damaged_files())
def test_a_thousand_damaged_run_folders_give_a_sentence_or_a_result(beside, files):
    check_damaged(beside, files)
