"""What documents tell people to type: every command is checked, those that need nothing but this machine are run."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from helpers.common import ROOT, TINY, choices, composed
from PIL import Image

from mtcl.cli.arguments import CommandParser
from mtcl.cli.main import COMMANDS, HYDRA_COMMANDS
from mtcl.config.overrides import refuse_idle_regularizer_keys
from mtcl.config.resolve import plain
from mtcl.config.schema import check_config

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = re.compile(r"<!-- table: .*?<!-- end -->", re.DOTALL)  # made by commands of their own; dear ones
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
INLINE = re.compile(r"`((?:python|torchrun|make|mtcl) [^`]+)`")
# What stands for something else: a folder of data, of runs, a file of weights.
STANDS_FOR = re.compile(
    r"\$\w+|\b(?:PATH|FILE|DIR|FOLDER|ROOT|RUN|OTHER|TIME\w*|SINGLES|NAME|METHOD|OUTPUT|VALUE|USER)\b|<\w+>|\.\.\."
)
FAR_AWAY = re.compile(
    r"=hub\b|submitit|torchrun|data=nyu|data=cityscapes|data=pascal|experiment=(?!rooms)|scripts/prepare|benchmark|"
    r"mtcl predict \S* 0|plot_study.py docs|"
    r"nyud_small_cpu|outputs/nyuv2_13|outputs/singles"
)
LONG = re.compile(r"scripts/(search|study|model_table)\.py|mtcl demo")  # they have tests of their own


def commands(document: Path) -> list[str]:
    text = GENERATED.sub("", document.read_text())
    commands = [
        line
        for kind, block in BLOCK.findall(text)
        if kind in ("sh", "bash")
        for line in block.replace("\\\n", " ").split("\n")
    ]
    commands += INLINE.findall(BLOCK.sub("", text))
    return [
        command
        for command in (line.split(" #")[0].strip() for line in commands)
        if command and not command.startswith("#")
    ]


def split(command: str) -> tuple[str, list[str]]:
    """The script, and the words behind it."""
    words_of = [word for word in shlex.split(command.split(";")[0].split("&&")[0]) if word not in ("srun", "nohup")]
    if words_of[:2] in (["mtcl", "train"], ["mtcl", "evaluate"]):
        return f"{words_of[1]}.py", words_of[2:]
    if words_of[0] == "mtcl" and words_of[1] in HYDRA_COMMANDS:
        return f"{words_of[1]}.py", words_of[2:]
    for i, word in enumerate(words_of):
        if word.endswith(".py"):
            return word, words_of[i + 1 :]
    return words_of[0], words_of[1:]


ALL = [(document, command) for document in DOCUMENTS for command in commands(document)]


HELP: dict[str, str] = {}


@pytest.fixture
def told_by(cli):
    """What a script's ``--help`` says."""

    def message(script: str) -> str:
        if script not in HELP:
            result = cli(script, "--help")
            assert result.code == 0, f"{script} --help: {result.err}"
            HELP[script] = result.out
        return HELP[script]

    return message


GROUPS = sorted(path.name for path in (ROOT / "configs").iterdir() if path.is_dir())


def known_keys() -> set[str]:
    """All keys of all configs, and what they lie in."""
    keys: set[str] = set()

    def add(prefix: str, value: object) -> None:
        keys.add(prefix)
        for key, inner in value.items() if isinstance(value, dict) else ():
            add(f"{prefix}.{key}".strip("."), inner)

    for path in (ROOT / "configs").rglob("*.yaml"):
        text = path.read_text()
        inside = "" if "@package _global_" in text or path.parent.name == "configs" else path.parent.name
        add(inside, yaml.safe_load(text) or {})
    return keys | set(GROUPS)


KNOWN = known_keys()


def first_of_sweep(word: str) -> str:
    """``a=1,2`` -> ``a=1``, but not ``a=[1,2]``."""
    key, _, value = word.partition("=")
    return word if not value or value.startswith(("[", "{", "'")) else f"{key}={value.split(',')[0]}"


@pytest.mark.parametrize(("document", "command"), ALL, ids=[f"{d.stem}-{i}" for i, (d, _) in enumerate(ALL)])
def test_what_a_command_names_is_there(document, command, told_by):
    script, arguments = split(command)
    if "--config-dir" in arguments:
        return  # a choice of a folder that the page describes; tests/cli/test_main.py has one
    if script in ("train.py", "evaluate.py", "scripts/distill.py"):
        flags = ("-m", "--multirun", "--cfg", "job", "-h", "--help")
        overrides = [
            first_of_sweep(word)
            for word in arguments
            if word not in flags and "=" in word and not word.startswith("hydra")
        ]
        config = composed(*overrides, name=Path(script).stem)
        if script != "evaluate.py":
            check_config(plain(config))
            refuse_idle_regularizer_keys(overrides, config)
    elif script.startswith("scripts/"):
        assert (ROOT / script).is_file(), f"{document.name}: {script} is gone"
        for word in arguments:
            key, equals, _ = word.partition("=")
            if word.startswith("--"):
                assert key in told_by(script), f"{script} has no {word}"
            elif equals:
                assert key in KNOWN or f"{key}=" in told_by(script), f"{script} has no {key}="
    elif script == "mtcl" and arguments[0] in COMMANDS:
        module = import_module(f"mtcl.cli.{arguments[0]}")
        parser = CommandParser("", command)
        module.add_arguments(parser)
        if arguments[1:] not in ([], ["--help"]):
            parser.parse_intermixed_args(arguments[1:])
    elif script == "mtcl":
        assert arguments[0] in ("--help", "--version"), f"{document.name}: {command}"
    elif script == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets
    elif script == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = re.findall(r"\[([\w,]+)\]", command)
        assert all(name in extras for group in asked for name in group.split(","))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.stem)
def test_keys_and_choices_in_the_text_are_there(document):
    """``trainer.ema`` and ``decoder=invpt``, wherever they stand as code."""
    for code in CODE.findall(BLOCK.sub("", document.read_text())):
        for word in re.split(r"[\s,]+", code):
            key, equals, value = word.partition("=")
            if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)*", key) and key.split(".")[0] in GROUPS and "." in key:
                assert key in KNOWN or key.endswith((".md", ".py")), f"{document.name}: there is no key {key}"
            if key in GROUPS and equals and re.fullmatch(r"\w+", value) and not STANDS_FOR.search(value):
                assert value in choices(key), f"{document.name}: there is no {word}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with outputs/rooms/sweep of two runs, outputs/rooms/TIME, RUN and OTHER, a picture."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "installed_mtcl.py").write_text("from mtcl.cli.main import main\nmain()\n")  # as the installed command
    for path, seed in (("outputs/rooms/sweep/a", 0), ("outputs/rooms/sweep/b", 1)):
        run_in(folder, [str(ROOT / "train.py"), *TINY, f"seed={seed}", f"hydra.run.dir={path}", "trainer.num_panels=1"])
    for link in ("RUN", "OTHER", "outputs/rooms/TIME", "outputs/rooms/run"):
        (folder / link).symlink_to(folder / "outputs/rooms/sweep/a")
    (folder / "images").mkdir()
    for name in ("image", "images/a", "images/b"):
        Image.fromarray(np.full((40, 60, 3), 128, np.uint8)).save(folder / f"{name}.jpg")
    film = cv2.VideoWriter(str(folder / "walk.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 25, (64, 32))
    for _ in range(3):
        film.write(np.full((32, 64, 3), 128, np.uint8))
    film.release()
    return folder


def run_in(folder: Path, arguments: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert process.returncode == 0, f"{shlex.join(map(str, arguments))}\n{process.stderr[-2000:]}"
    return process


def runnable(command: str) -> bool:
    command = re.sub(r"\bRUN\b|\bOTHER\b|outputs/rooms/TIME", "", command)
    script, arguments = split(command)
    if (script == "evaluate.py" and not arguments) or "--config-dir" in arguments:
        return False
    if script == "mtcl" and arguments in (["predict"], ["export"], ["demo"], ["compare"], ["report"]):
        return False  # the name of a command, not a line to type
    alone = (
        (script.endswith(".py") or script == "mtcl") and not STANDS_FOR.search(command) and not FAR_AWAY.search(command)
    )
    return alone and not LONG.search(command) and not {"resume=auto"} & set(arguments)


def first_run(command: str) -> tuple[str, ...]:
    """The script and its words; of a sweep those of its first run."""
    script, arguments = split(command)
    if script == "train.py":
        arguments = [first_of_sweep(word) for word in arguments if word != "-m"]
    return script, *arguments


HERE = sorted({first_run(command) for _, command in ALL if runnable(command)})


@pytest.mark.slow
@pytest.mark.parametrize("command", HERE, ids=" ".join)
def test_a_command_that_needs_nothing_else_runs(command, workplace, cli, monkeypatch):
    """In this process: starting one takes longer than most of them."""
    script, *arguments = command
    if script == "train.py":
        arguments = [*(word for word in TINY if not word.startswith("regularizer=")), *arguments]
        arguments += [] if "--cfg" in arguments else ["hydra.run.dir=outputs/typed/run"]
    if script == "evaluate.py" and not {"--cfg", "-m"} & set(arguments):  # two may begin in the same second
        arguments = ["hydra.run.dir=outputs/typed/evaluation", *arguments]
    monkeypatch.chdir(workplace)
    result = cli(workplace / "installed_mtcl.py" if script == "mtcl" else script, *arguments)
    assert result.code == 0, result.err[-2000:]
    shutil.rmtree(workplace / "outputs/typed", ignore_errors=True)  # checkpoints of all commands take gigabytes


@pytest.mark.slow
@pytest.mark.parametrize("document", [d for d in DOCUMENTS[1:] if "```python" in d.read_text()], ids=lambda d: d.stem)
def test_blocks_of_python_run(document, workplace, monkeypatch, cli):
    """In their order, one after the other, where there are a run and a picture."""
    monkeypatch.chdir(workplace)
    if document.stem == "export":
        options = ["--format=onnx", "--output=onnx", "--overwrite"]
        result = cli("scripts/export.py", "outputs/rooms/TIME", *options)
        assert result.code == 0, result.err[-2000:]
    names: dict = {"__name__": "document"}
    for kind, block in BLOCK.findall(document.read_text()):
        if kind == "python":
            exec(compile(block, str(document), "exec"), names)


def test_documents_point_at_what_is_there():
    """Links between files, and files of the project that are named in code."""
    for document in DOCUMENTS:
        text = document.read_text()
        for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)#?([^)\s]*)\)", text):
            linked = document.parent / target if target else document
            assert linked.exists(), f"{document.name} links to {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)", linked.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in anchors, f"{document.name} links to {target}#{anchor}"
        for name in re.findall(
            r"`((?:mtcl|scripts|tests|configs|docs)/[\w/.-]+\.(?:py|yaml|md))`", GENERATED.sub("", text)
        ):
            assert STANDS_FOR.search(name) or (ROOT / name).exists(), f"{document.name} names {name}"


def test_the_table_of_decoders_has_the_differences_that_were_counted():
    """Compare the differences in parameters of a decoder's experiments: one number, or the lowest to the highest."""
    printed = json.loads((ROOT / "docs" / "results" / "published_sizes.json").read_text())["printed"][3:]
    differences = {cells[0]: cells[4] for cells in (re.split(r"  +", line) for line in printed)}
    lines = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| `decoder=` | paper")) + 2
    rows = [line.split(" | ") for line in itertools.takewhile(str.strip, lines[first:])]
    assert {row[0].strip("| `") for row in rows} == set(choices("decoder"))
    experiments_seen = set()
    for _, _, _, cell, _, patterns in rows:
        names = [name.replace("N_", f"{data}_") for name in CODE.findall(patterns) for data in ("nyud", "pascal")]
        experiments = {experiment for experiment in differences if any(fnmatch(experiment, name) for name in names)}
        texts = {differences[experiment] for experiment in experiments}
        ascending = sorted(texts, key=lambda text: float(text.strip("< %")))
        span = dict.fromkeys([*ascending[:1], *ascending[-1:]])
        assert cell.strip("() ") == " to ".join(span).replace(" % to", " to"), patterns
        experiments_seen |= experiments
    assert experiments_seen == set(differences)
