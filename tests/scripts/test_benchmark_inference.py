"""The latency table: what it says it measured, and that it sees a regulariser that changes a prediction."""

import json
import runpy
from importlib.util import find_spec

import pytest
import torch
from helpers.common import ROOT, assert_fails, choices

from mtcl.config.build_data import build_tasks, get_image_size
from mtcl.config.build_training import build_regularizer

SCRIPT = "scripts/benchmarks/benchmark_inference.py"
SMALL = ["--decoders", "multi_head", "--size", "32", "64", "--repeats", "1", "--device", "cpu"]
OVERRIDES = ["backbone=resnet18", "decoder.width=8", "decoder.head_width=8"]


def test_every_decoder_has_an_experiment():
    script = runpy.run_path(str(ROOT / SCRIPT), run_name="benchmark_inference")
    assert sorted(script["EXPERIMENTS"]) == choices("decoder")
    assert set(script["EXPERIMENTS"].values()) <= set(choices("experiment"))
    config = script["compose_benchmark"]("mqtransformer", (64, 96), ["backbone=resnet18"])
    assert (config.decoder._target_, config.backbone.name) == ("mtcl.models.decoders.MQTransformer", "resnet18")
    assert (get_image_size(config), list(build_tasks(config))) == (
        (64, 96),
        ["semseg", "depth", "normals", "edge"],
    )


def test_a_backend_that_is_absent_is_left_out_with_its_reason(monkeypatch):
    explain = runpy.run_path(str(ROOT / SCRIPT), run_name="benchmark_inference")["explain_absence"]
    cpu = torch.device("cpu")
    assert explain("eager", cpu) is explain("compiled", cpu) is None
    monkeypatch.setitem(explain.__globals__, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert explain("onnx", cpu) == "needs onnxscript; pip install 'mtcl[export]'"
    monkeypatch.setitem(explain.__globals__, "find_spec", lambda name: name)
    assert explain("tensorrt", cpu) == "has nothing for device=cpu"


def test_rows(cli, tmp_path):
    arguments = [*SMALL, "--batch", "1", "2", "--backends", "eager", "--json", str(tmp_path / "out.json"), *OVERRIDES]
    result = cli(SCRIPT, *arguments)
    assert result.code == 0, result.err
    content = json.loads((tmp_path / "out.json").read_text())
    first, second, compared = content["rows"]
    assert content["left_out"] == {}
    for row, batch in ((first, 1), (second, 2)):
        assert (row["decoder"], row["backbone"], row["backend"]) == ("multi_head", "resnet18", "eager")
        assert (row["batch"], row["repeats"]) == (batch, 1)
        assert row["images_per_s"] == pytest.approx(1e3 * batch / row["ms"])
    assert second["memory_mib"] > 1.5 * first["memory_mib"] > 0
    assert compared["backend"] == "regulariser"
    assert compared["identical"] is True
    assert min(compared["off_ms"], compared["on_ms"]) > 0
    assert "outputs identical" in result.out


def test_half_precision(cli):
    arguments = [*SMALL, "--batch", "1", "--backends", "eager", "--precision", "bf16", *OVERRIDES]
    result = cli(SCRIPT, *arguments)
    assert result.code == 0, result.err
    assert "outputs identical" in result.out


def test_a_regulariser_that_changes_the_model_is_found(cli, monkeypatch):
    make = build_regularizer

    def meddling(config, tasks, model):
        with torch.no_grad():
            next(model.decoder.parameters()).mul_(1.01)
        return make(config, tasks, model)

    monkeypatch.setattr("mtcl.config.build_training.build_regularizer", meddling)
    result = cli(SCRIPT, *OVERRIDES, *SMALL, "--batch", "1", "--backends", "eager")
    assert_fails(result, "differ with the regularizer attached")


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("onnxruntime") or not find_spec("onnxscript"), reason="extra export not installed")
def test_all_backends(cli, tmp_path):
    result = cli(SCRIPT, *SMALL, "--batch", "2", "--json", str(tmp_path / "out.json"), *OVERRIDES)
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["backend"] for row in rows] == ["eager", "compiled", "onnx", "regulariser"]
    assert all(row["ms"] > 0 for row in rows[:3]), rows


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["resnet18"], "resnet18 is not an override key=value"),
        (["data.sise=3"], "data.sise"),
        (["regularizer=none", "--backends", "eager", "--batch", "1", *SMALL, *OVERRIDES], "remove regularizer=none"),
    ],
)
def test_mistakes_are_one_sentence(cli, arguments, sentence):
    assert_fails(cli(SCRIPT, *arguments), sentence)
