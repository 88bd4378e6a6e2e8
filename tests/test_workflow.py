"""The public workflow does what .ci/run does, on the Python versions that the project claims."""

import ast
import re
import tomllib
from typing import Any

import yaml
from helpers.common import ROOT

JOB = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))["jobs"]["ci"]


def find_make_targets(script: str) -> list[str]:
    """Return the targets of all lines of a shell script that begin with make, in order."""
    return " ".join(re.findall(r"^make (.+)$", script, re.MULTILINE)).split()


def read_assignment(source: str, name: str) -> Any:
    """Return the literal that a module assigns to a name, without importing it."""
    assigned = [
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
    ]
    return ast.literal_eval(assigned[0])


def test_the_workflow_runs_the_targets_of_ci_and_nothing_else():
    commands = [step["run"] for step in JOB["steps"] if "run" in step]
    assert all(command.startswith("make ") for command in commands)
    targets = find_make_targets("\n".join(commands))
    assert targets == find_make_targets((ROOT / ".ci" / "run").read_text("utf-8"))
    assert set(targets) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_the_workflow_has_the_python_versions_of_the_project():
    versions = JOB["strategy"]["matrix"]["python-version"]
    assert versions == read_assignment((ROOT / "noxfile.py").read_text("utf-8"), "PYTHONS")  # text: 3.10 is not 3.1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["requires-python"] == f">={versions[0]}"
    assert project["tool"]["mypy"]["python_version"] == versions[0]
