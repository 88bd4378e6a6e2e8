"""The strength of a regulariser, from the logs of runs."""

import importlib.util
import json

import pytest
from helpers.common import ROOT

from mtcl import UserError


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("print_strengths", ROOT / "scripts" / "docs" / "print_strengths.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_log(folder, *rows):
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "kind": kind, **values}) for step, (kind, values) in enumerate(rows)]
    (folder / "log.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def lengths(task, length, task_length, name="regularizer"):
    return {f"gradient/{task}/norm_{name}": length, f"gradient/{task}/norm_task": task_length}


def test_lengths_are_pooled_over_the_steps_with_a_gradient(script, tmp_path):
    first = write_log(
        tmp_path / "on" / "a",
        ("train", lengths("depth", 9.0, 1.0)),  # of another kind
        ("regularizer", lengths("depth", 1.0, 4.0) | lengths("edge", 0.0, 1.0)),
        ("regularizer", lengths("depth", 0.0, 8.0)),  # no gradient: left out
        ("regularizer", lengths("depth", None, 8.0)),  # not finite: null in a log
    )
    second = write_log(tmp_path / "on" / "b", ("contrast", lengths("depth", 2.0, 2.0, "contrast")))  # as before 0.3
    assert script.measure_strengths([first, second]) == {"depth": pytest.approx(3.0 / 6.0)}


def test_a_folder_without_log_is_refused(script, tmp_path):
    with pytest.raises(UserError, match=r"has no log.jsonl; give the folder of a run"):
        script.measure_strengths([tmp_path])
