"""The costs of a study's variants: counted exactly, measured in turns, and refused where a name is not known."""

import json

import pytest
import torch
from helpers.common import ROOT, TINY, assert_fails

from mtcl.profiling.timing import measure_in_turns

OVERRIDES = [item for item in TINY if not item.startswith("regularizer=")]
RESULTS = ROOT / "docs" / "results" / "nyud_small_cpu"
SCRIPT = "scripts/benchmarks/benchmark_study.py"
STUDY = """
name: costs
overrides: [tasks=nyud, data.limit=null]
seeds: [0]
variants:
  off:
    overrides: [regularizer=none]
  on:
    label: contrast
    overrides: [regularizer=contrastive]
  running_mean:
    overrides: [regularizer=pseudo_labels, trainer.ema=0.99]
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "costs.yaml"
    path.write_text(STUDY)
    return path


def test_costs_stand_side_by_side(cli, study, tmp_path):
    study.write_text(STUDY.replace("costs", "nyud_small_cpu").replace("label: contrast", "label: on"))
    result = cli(SCRIPT, study, "--steps", "1", "--results", RESULTS, "--json", tmp_path / "out.json", *OVERRIDES)
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "out.json").read_text())
    off, on, running_mean = rows["off"], rows["on"], rows["running_mean"]
    assert off["parameters"] == on["parameters"] == running_mean["parameters"] > 0
    assert off["multiply_adds"] == on["multiply_adds"] == running_mean["multiply_adds"] > 0
    assert off["beside"] == running_mean["beside"] == 0 < on["beside"]
    assert running_mean["held_bytes"] >= off["held_bytes"] + 4 * off["parameters"]
    assert off["times_first"] == 1
    assert min(row[key] for row in rows.values() for key in ("step_seconds", "predict_seconds", "step_bytes")) > 0
    lines = result.out.splitlines()
    assert [line.split("  ")[0] for line in lines[-4:]] == ["variant", "off", "on", "running_mean"]
    endings = ["  Delta (%)", "  -", "  +0.14 [-1.49, +1.76]", "  -"]  # as in docs/results.md
    assert all(line.endswith(ending) for line, ending in zip(lines[-4:], endings, strict=True))


def test_unknown_names_are_refused(cli, study, tmp_path):
    assert_fails(cli(SCRIPT, study, "--only", "onn"), "--only onn is not a variant", "on", "off, on, running_mean")
    assert_fails(cli(SCRIPT, tmp_path / "none.yaml"), "none.yaml")
    assert_fails(cli(SCRIPT, study, "--results", RESULTS), "results of nyud_small_cpu, not of costs")


def test_works_take_turns_in_alternating_order():
    calls = []
    works = {name: lambda turn, name=name: calls.append((name, turn)) for name in "ab"}
    durations = measure_in_turns(works, range(3), torch.device("cpu"), warmup=1)
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert {name: len(pairs) for name, pairs in durations.items()} == {"a": 2, "b": 2}
