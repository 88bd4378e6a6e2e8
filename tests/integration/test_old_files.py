"""Files of mtcl 0.1.0, written before the packages and config keys were renamed, give what they gave then."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from helpers.common import ROOT

import mtcl
from mtcl.run_log import read_lines

FILES = ROOT / "tests/fixtures" / "version_0_1_0"


@pytest.mark.parametrize("source", ["runs/contrastive_0", "exported"])
def test_predictions_are_those_of_then(source):
    """To the rounding of another processor: these were stored on one of several kinds."""
    expected = np.load(FILES / "predictions.npz")
    maps = mtcl.load(FILES / source, device="cpu")(expected["image"])
    assert sorted(maps) == sorted(set(expected.files) - {"image"})
    for name, prediction in maps.items():
        assert prediction.dtype == expected[name].dtype
        np.testing.assert_allclose(prediction, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_evaluation_gives_the_metrics_of_then(cli, tmp_path):
    run = shutil.copytree(FILES / "runs/contrastive_0", tmp_path / "run")
    result = cli("evaluate.py", f"checkpoint={run}", f"hydra.run.dir={tmp_path / 'out'}")
    assert result.code == 0, result.err
    metrics, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "out", run))
    assert metrics.keys() == expected.keys()
    for task, values in expected.items():
        assert metrics[task] == pytest.approx(values, rel=1e-6)


def test_logs_of_then_have_today_s_names():
    """The loss of the regulariser was called contrast."""
    lines = list(read_lines(FILES / "runs/contrastive_0" / "log.jsonl"))
    assert any(b'"contrast"' in line.data for line in lines)
    records = [line.record for line in lines]
    assert not any(record is None or record["kind"] == "contrast" or "contrast" in record for record in records)
    assert records[1]["regularizer"] == pytest.approx(0.438196)
    assert list(records[1])[-2:] == ["regularizer", "lr"]
    regularizer_records = [record for record in records if record["kind"] == "regularizer"]
    assert len(regularizer_records) == sum(record["kind"] == "train" for record in records)
    assert 0 < regularizer_records[0]["gradient/depth/norm_regularizer"] < math.inf
    assert not any(key.endswith("norm_contrast") for key in regularizer_records[0])


def figures(text: str) -> list[str]:
    """The numbers of a table's rows; labels may be reworded."""
    rows = [line for line in text.splitlines() if re.match(r"(semseg|human_parts|sal|depth|normals|edge) ", line)]
    return [number for line in rows for number in re.findall(r"[-+]?\d+\.\d+", line)]


def test_comparison_prints_the_table_of_then(cli):
    result = cli("scripts/compare.py", str(FILES / "runs"))
    assert result.code == 0, result.err
    assert len(figures(result.out)) > 40
    assert figures(result.out) == figures((FILES / "compare.txt").read_text())
    assert "4 runs" in result.out


def test_report_shows_the_runs(cli, tmp_path):
    page = tmp_path / "report.html"
    result = cli("scripts/report.py", str(FILES / "runs"), "--output", str(page))
    assert result.code == 0, result.err
    text = page.read_text()
    for run in ("contrastive_0", "contrastive_1", "baseline_0", "baseline_1"):
        assert run in text
    assert "16.08" in text  # odsF of the contrastive runs, in percent
