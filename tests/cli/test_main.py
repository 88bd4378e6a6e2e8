"""The ``mtcl`` command: what it lists, how it refuses, and that a wheel of it needs no checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
from helpers.common import ROOT, assert_fails
from PIL import Image

from mtcl.cli.main import COMMANDS
from mtcl.version import __version__

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
        assert all(text in result.out for text in COMMANDS.values())
    assert cli(str(script), "--version").out == f"mtcl {__version__}\n"
    assert_fails(cli(str(script), "train"), "train is no command of mtcl; choose among predict, ")
    assert_fails(cli(str(script), "compare", "x", "--holms"), "did you mean --holm?")


@pytest.mark.slow
def test_a_wheel_without_extras_has_the_six_commands(tmp_path):
    """Built from this tree, in an environment that sees the dependencies installed here, but not this checkout."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "mtcl", source / "mtcl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    call([sys.executable, "-c", build, tmp_path / "dist"], source)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel]
    call(install, tmp_path)
    # The dependencies alone: an editable mtcl of that folder is not on the path, as its .pth is not read.
    packages = sysconfig.get_paths(vars={"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")})["purelib"]
    hook = f"import sys; sys.path.append({sysconfig.get_paths()['purelib']!r})"
    (Path(packages) / "dependencies.pth").write_text(hook + "\n")
    mtcl = tmp_path / "env" / "bin" / "mtcl"
    where = call([python, "-c", "import mtcl; print(mtcl.__file__)"], tmp_path)
    assert str(tmp_path) in where
    for command in COMMANDS:
        assert f"mtcl {command}" in call([mtcl, command, "--help"], tmp_path)
    Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(tmp_path / "a.png")
    assert "1 images in" in call([mtcl, "predict", RUN, "a.png", "--output=maps", "--device=cpu"], tmp_path)
    assert "mtcl.load reads" in call([mtcl, "export", RUN, "--format=safetensors", "--output=model"], tmp_path)
    assert "finished" in call([mtcl, "runs", RUN.parent], tmp_path)
    assert "depth" in call([mtcl, "compare", RUN.parent], tmp_path)
    assert "rows" in call([mtcl, "report", RUN.parent, "--output=page.html"], tmp_path)
    blocked = "import sys; sys.modules['gradio'] = None; sys.argv[1:] = ['demo', 'a.pt']; import mtcl.cli.main as m; "
    failed = call([python, "-c", f"{blocked}m.main()"], tmp_path, code=1)
    assert failed.count("\n") == 1
    assert "pip install 'mtcl[demo]'" in failed


def call(command: list, folder: Path, code: int = 0) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == code, f"{command}\n{process.stdout[-1000:]}\n{process.stderr[-3000:]}"
    return process.stderr if code else process.stdout
