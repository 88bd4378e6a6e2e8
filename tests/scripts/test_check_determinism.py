"""Two trainings with one seed: compared step by step and tensor by tensor; by a stand-in for train.py."""

import importlib.util
import json

import pytest
import torch
from helpers.common import ROOT, choices

from mtcl import UserError


@pytest.fixture
def script(monkeypatch):
    """The script, whose trainings write ``losses`` and ``weights``, which a test sets for each run's name."""
    spec = importlib.util.spec_from_file_location("check_determinism", ROOT / "scripts/benchmarks/check_determinism.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.calls = []
    module.losses = {"first": [0.5, 0.25], "second": [0.5, 0.25]}
    module.weights = {"first": 1.0, "second": 1.0}

    def train(folder, overrides):
        module.calls.append(overrides)
        folder.mkdir()
        records = [{"step": i, "kind": "train", "depth": loss} for i, loss in enumerate(module.losses[folder.name])]
        records.append({"step": 2, "kind": "val", "seconds": len(module.calls)})  # no loss
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def read(path):
        weight = module.weights[path.parent.parent.name]
        return {"model": {"w": torch.ones(2), "v": torch.tensor([weight])}, "regularizer": None}

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "read_checkpoint_file", read)
    return module


def test_equal_runs_are_equal(script, capsys):
    result = script.check_experiment("nyud_invpt_vit_base", ["data.batch_size=2"], 7)
    assert result == {
        "steps": 7,
        "equal": True,
        "records": 2,
        "losses_equal": True,
        "first_different_step": None,
        "different_weights": 0,
    }
    assert script.calls[0] == script.calls[1]
    assert {"experiment=nyud_invpt_vit_base", "trainer.deterministic=true", "trainer.max_steps=7"} <= {*script.calls[0]}
    assert script.calls[0][-2:] == ["backbone.trainable=frozen", "data.batch_size=2"]
    assert capsys.readouterr().out == "nyud_invpt_vit_base: bit-equal, 7 steps\n"


@pytest.mark.parametrize("difference", ["loss", "weight", "length", "nothing logged", "failure"])
def test_a_difference_is_reported(script, monkeypatch, difference):
    if difference == "loss":
        script.losses["second"] = [0.5, 0.25 + 2**-54]
        assert script.losses["second"] != script.losses["first"]
    elif difference == "weight":
        script.weights["second"] = 1.0 + 2**-23
    elif difference == "length":
        script.losses["second"] = [0.5]
    elif difference == "nothing logged":
        script.losses.update(first=[], second=[])
    else:

        def fail(folder, overrides):
            raise UserError("exit code 1: error: no memory")

        monkeypatch.setattr(script, "train", fail)
    result = script.check_experiment("nyud_deeplab_resnet18", [], 2)
    assert result["equal"] is False
    assert result.get("first_different_step") == (1 if difference == "loss" else None)
    assert result.get("different_weights") == {"weight": 1, "failure": None}.get(difference, 0)
    assert result.get("error") == ("exit code 1: error: no memory" if difference == "failure" else None)


def test_the_experiments_exist(script):
    assert set(script.EXPERIMENTS) <= set(choices("experiment"))
