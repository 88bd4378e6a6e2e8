"""The ``mtcl`` command: what it lists, how it refuses, and that a wheel of it needs no checkout."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.common import ROOT, TINY, assert_fails
from PIL import Image

from mtcl.cli.main import COMMANDS, HYDRA_COMMANDS
from mtcl.config import compose
from mtcl.errors import UserError
from mtcl.version import __version__

FIRST_HOUR = runpy.run_path(str(ROOT / "scripts" / "dev" / "first_hour.py"))  # builds and installs wheels
RUN = ROOT / "tests" / "fixtures" / "version_0_1_0" / "runs" / "contrastive_0"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_script_and_a_help_text(cli, command):
    result = cli(f"scripts/{command}.py", "--help")
    assert result.code == 0
    assert f"mtcl {command} " in result.out
    assert "--" in result.out


def test_the_commands_are_listed(cli, tmp_path):
    script = tmp_path / "mtcl"
    script.write_text("from mtcl.cli.main import main\nmain()\n")
    for arguments in ([], ["--help"]):
        result = cli(str(script), *arguments)
        assert result.code == 0
        assert all(text in result.out for text in {**HYDRA_COMMANDS, **COMMANDS}.values())
    assert cli(str(script), "--version").out == f"mtcl {__version__}\n"
    assert_fails(cli(str(script), "trian"), "trian is no command of mtcl (did you mean train?); choose among train, ")
    assert_fails(cli(str(script), "compare", "x", "--holms"), "did you mean --holm?")


@pytest.mark.parametrize("command", HYDRA_COMMANDS)
def test_train_and_evaluate_read_the_configs_from_any_folder(cli, tmp_path, monkeypatch, command):
    """With the program's own grammar, and with a folder of one's own configs beside ours."""
    script = tmp_path / "mtcl"
    script.write_text("from mtcl.cli.main import main\nmain()\n")
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    experiment = "# @package _global_\nname: mine\noptimizer:\n  lr: 0.125\n"
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(experiment)
    monkeypatch.chdir(tmp_path)
    result = cli(
        str(script), command, "--config-dir", "mine", "experiment=own", "--cfg", "job", "--package", "optimizer"
    )
    assert result.code == 0, result.err
    assert "lr: 0.125" in result.out
    assert_fails(cli(str(script), command, "trainer.max_step=1"), "did you mean trainer.max_steps?")


def test_the_configs_of_a_wheel_are_used_where_there_is_no_checkout(tmp_path, monkeypatch):
    package = tmp_path / "mtcl"
    (package / "config").mkdir(parents=True)
    monkeypatch.setattr(compose, "__file__", str(package / "config" / "compose.py"))
    with pytest.raises(UserError, match=f"{package} has no configs; install mtcl again"):
        compose.find_configs()
    for folder in (package / "configs", tmp_path / "configs"):  # the checkout's come first
        folder.mkdir()
        (folder / "train.yaml").touch()
        assert compose.find_configs() == folder


@pytest.mark.slow
def test_a_wheel_without_extras_has_all_commands(tmp_path):
    """Built from this tree, in an environment that sees the dependencies installed here, but not this checkout."""
    wheel = FIRST_HOUR["build_wheel"](tmp_path)
    programs = FIRST_HOUR["create_environment"](tmp_path / "env", wheel)
    python, mtcl = programs / "python", programs / "mtcl"
    (empty := tmp_path / "empty").mkdir()
    package = Path(call([python, "-c", "import mtcl; print(mtcl.__file__)"], empty).strip()).parent
    assert package.is_relative_to(tmp_path / "env")
    configs = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert configs == {path.relative_to(package / "configs") for path in (package / "configs").rglob("*.yaml")}
    call([mtcl, "train", "-m", *TINY, "seed=3,4", "tasks.names=[depth,normals]"], empty)
    (first, second) = (empty / "outputs" / "rooms" / "sweep").glob("*/")
    assert json.loads((first / "run.json").read_text())["command"].startswith("mtcl train ")
    assert "depth" in call([mtcl, "evaluate", second, "hydra.run.dir=evaluated"], empty)
    assert (empty / "evaluated" / "metrics.json").is_file()
    for command in COMMANDS:
        assert f"mtcl {command}" in call([mtcl, command, "--help"], empty)
    Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(empty / "a.png")
    assert "1 images in" in call([mtcl, "predict", "rooms", "a.png", "--output=maps", "--device=cpu"], empty)
    assert "mtcl.load reads" in call([mtcl, "export", RUN, "--format=safetensors", "--output=model"], empty)
    assert "finished" in call([mtcl, "runs", RUN.parent], empty)
    assert "depth" in call([mtcl, "compare", RUN.parent], empty)
    assert "rows" in call([mtcl, "report", RUN.parent, "--output=page.html"], empty)
    blocked = "import sys; sys.modules['gradio'] = None; sys.argv[1:] = ['demo', 'a.pt']; import mtcl.cli.main as m; "
    failed = call([python, "-c", f"{blocked}m.main()"], empty, code=1)
    (line,) = [line for line in failed.splitlines() if not line.startswith("loading ")]
    assert "pip install 'mtcl[demo]'" in line
    # An editable installation, as pip install -e makes it, reads the configs of its checkout.
    build = "from setuptools.build_meta import build_editable; import sys; build_editable(sys.argv[1])"
    (tmp_path / "editable").mkdir()
    call([sys.executable, "-c", build, tmp_path / "editable"], tmp_path / "source")
    (editable,) = (tmp_path / "editable").glob("*.whl")
    call([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--force-reinstall", editable], empty)
    changed = tmp_path / "source" / "configs" / "optimizer" / "adamw.yaml"
    changed.write_text(changed.read_text().replace("lr: ", "lr: 77 # ", 1))
    assert "lr: 77\n" in call([mtcl, "train", "--cfg", "job", "--package", "optimizer"], empty)


def call(command: list, folder: Path, code: int = 0) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == code, f"{command}\n{process.stdout[-1000:]}\n{process.stderr[-3000:]}"
    return process.stderr if code else process.stdout
