"""Promises of checkpoints that leave out a frozen backbone, and of what reads them."""

import argparse
import json

import cv2
import numpy as np
import pytest
import timm
import torch
from helpers.common import ROOT, TINY, assert_fails, composed
from helpers.shrunken import shrunk
from safetensors.torch import save_file

import mtcl
from mtcl import UserError
from mtcl.cli.consistency import measure_consistency, parse_args
from mtcl.cli.demo import add_arguments, load
from mtcl.cli.export import export_model
from mtcl.cli.train import train
from mtcl.config.load import load_model
from mtcl.models.weights import hash_weights
from mtcl.training.checkpoint_file import read_checkpoint_file, write_checkpoint_file

QUICK = [*TINY, "trainer.val_interval=null", "trainer.checkpoint_interval=null", "trainer.num_panels=0"]
QUICK += ["trainer.max_steps=2", "schedule=constant", "trainer.ema=0.5", "trainer.keep_checkpoint_interval=2"]
FROZEN = ["backbone=mobilenetv2", "backbone.name=mobilenetv2_050", "backbone.trainable=frozen"]
LORA = [
    "backbone=vit_small",
    *shrunk("multi_head", "vit_small"),
    "backbone.trainable=lora",
    "optimizer.backbone_lr=0.1",
]
VIT = {"embed_dim": 24, "depth": 4, "num_heads": 2}


def write_weights(path, name="mobilenetv2_050", seed=1, **kwargs):
    torch.manual_seed(seed)
    save_file(timm.create_model(name, **kwargs).state_dict(), path)
    return path


def read(folder, name="last"):
    return read_checkpoint_file(folder / "checkpoints" / f"{name}.pt")


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """Folder with two weight files and three runs on the first one."""
    folder = tmp_path_factory.mktemp("frozen")
    write_weights(folder / "weights.safetensors")
    write_weights(folder / "others.safetensors", seed=2)
    overrides = [*QUICK, *FROZEN, f"backbone.weights={folder / 'weights.safetensors'}"]
    train(composed(*overrides), folder / "without")
    train(composed(*overrides, "trainer.save_backbone=true"), folder / "with")
    train(composed(*QUICK, *FROZEN), folder / "random")
    return folder


@pytest.mark.parametrize("name", ["last", "best", "step_00000002"])
def test_a_checkpoint_leaves_out_the_weights_that_a_file_has(name, frozen):
    without, complete = read(frozen / "without", name), read(frozen / "with", name)
    assert "backbone" not in complete["meta"]
    backbone = {key: value for key, value in complete["model"].items() if key.startswith("backbone.")}
    assert any("running_mean" in key for key in backbone)
    for part in (lambda state: state["model"], lambda state: state["ema"]["model"]):
        heads = {key: value for key, value in part(complete).items() if key not in backbone}
        assert_equal_states(part(without), heads)
    expected = {"name": "mobilenetv2_050", "weights": "weights.safetensors", "sha256": hash_weights(backbone)}
    assert without["meta"]["backbone"] == expected


def test_random_weights_are_saved(frozen):
    state = read(frozen / "random")
    assert "backbone" not in state["meta"]
    assert any(key.startswith("backbone.") for key in state["model"])


def test_a_run_goes_on_with_the_weights_of_its_file_and_no_others(frozen, tmp_path):
    overrides = [*QUICK, *FROZEN, "trainer.max_steps=4"]
    path = frozen / "without" / "checkpoints" / "last.pt"
    weights = f"backbone.weights={frozen / 'weights.safetensors'}"
    train(composed(*overrides, weights), tmp_path / "whole")
    train(composed(*overrides, weights, f"resume={path}"), tmp_path / "on")
    for part in ("model", "regularizer"):
        assert_equal_states(read(tmp_path / "whole")[part], read(tmp_path / "on")[part])
    assert_equal_states(read(tmp_path / "whole")["ema"]["model"], read(tmp_path / "on")["ema"]["model"])
    for source in (frozen / "others.safetensors", "none"):
        with pytest.raises(UserError, match=r"^backbone.weights=.* gives another backbone .* mobilenetv2_050 with the"):
            train(composed(*overrides, f"backbone.weights={source}", f"resume={path}"), tmp_path / "other")


def test_loading_asks_for_the_weights_and_takes_no_others(frozen, tmp_path, monkeypatch):
    path = frozen / "without" / "checkpoints" / "last.pt"
    pattern = (
        r"last\.pt leaves out its frozen backbone, mobilenetv2_050 with the weights weights\.safetensors \(SHA-256 "
    )
    with monkeypatch.context() as patch:  # nothing that a checkpoint names is read
        patch.setattr("mtcl.models.backbones._read_state_dict", None)
        with pytest.raises(UserError, match=pattern + r".*--backbone-weights \(mtcl predict, export, demo, "):
            mtcl.load(path)
    with pytest.raises(
        UserError, match=r"^.*others\.safetensors gives another backbone .* than .* was trained on, mob"
    ):
        load_model(path, frozen / "others.safetensors")
    with pytest.raises(UserError, match=r"^backbone\.weights=.*missing\.pth is not a file"):
        load_model(path, tmp_path / "missing.pth")
    loaded, complete = load_model(path, frozen / "weights.safetensors"), load_model(frozen / "with")
    assert_equal_states(loaded.model.state_dict(), complete.model.state_dict())
    with pytest.raises(UserError, match="has a backbone with weights of its own; leave out backbone_weights"):
        load_model(frozen / "with", frozen / "weights.safetensors")
    export_model(loaded, "safetensors", tmp_path / "exported")
    assert_equal_states(load_model(tmp_path / "exported").model.state_dict(), complete.model.state_dict())
    predictor = mtcl.load(path, device="cpu", backbone_weights=frozen / "weights.safetensors")
    assert "depth" in predictor.tasks


def test_evaluate_py_takes_the_weights_as_an_override(frozen, tmp_path, cli):
    path = frozen / "without" / "checkpoints" / "last.pt"
    weights = f"backbone.weights={frozen / 'weights.safetensors'}"
    assert_fails(cli("evaluate.py", f"checkpoint={path}", f"hydra.run.dir={tmp_path / 'a'}"), "leaves out its frozen")
    result = cli("evaluate.py", f"checkpoint={path}", weights, f"hydra.run.dir={tmp_path / 'b'}")
    assert result.code == 0, result.err
    scores, metrics_without = (
        json.loads((f / "metrics.json").read_text()) for f in (tmp_path / "b", frozen / "without")
    )
    assert scores["depth"] == pytest.approx(metrics_without["depth"], rel=1e-4)
    complete = frozen / "with" / "checkpoints" / "last.pt"
    refused = cli("evaluate.py", f"checkpoint={complete}", weights, f"hydra.run.dir={tmp_path / 'c'}")
    assert_fails(refused, "backbone.weights belongs to the checkpoint's model")


def test_adapters_are_saved_without_their_backbone(tmp_path):
    pytest.importorskip("peft")
    weights = write_weights(tmp_path / "vit.safetensors", "vit_small_patch16_384", drop_path_rate=0.15, **VIT)
    overrides = [*QUICK, *LORA, f"backbone.weights={weights}"]
    train(composed(*overrides), tmp_path / "without")
    train(composed(*overrides, "trainer.save_backbone=true"), tmp_path / "with")
    names = {name for name in read(tmp_path / "without")["model"] if name.startswith("backbone.")}
    assert names
    assert all(".lora_" in name for name in names)
    loaded, complete = load_model(tmp_path / "without", weights), load_model(tmp_path / "with")
    assert_equal_states(loaded.model.state_dict(), complete.model.state_dict())
    train(composed(*overrides, "trainer.max_steps=4", "resume=auto"), tmp_path / "without")
    assert read(tmp_path / "without")["step"] == 4


def test_what_can_not_be_got_again_is_not_left_out(frozen, tmp_path):
    off = "trainer.save_backbone=false"
    with pytest.raises(UserError, match=r"^trainer\.save_backbone=false would lose what is trained .*trainable=full"):
        train(composed(*QUICK, off), tmp_path)
    with pytest.raises(UserError, match=r"^trainer\.save_backbone=false would lose the backbone's random weights"):
        train(composed(*QUICK, *FROZEN, off), tmp_path)


HOSTILE = {"nothing": {}, "no hash": {"name": "x", "weights": "y", "sha256": "z"}, "text": "hub"}


@pytest.mark.parametrize("facts", HOSTILE.values(), ids=HOSTILE)
def test_damaged_facts_are_refused(facts, frozen, tmp_path):
    state = read(frozen / "without")
    state["meta"]["backbone"] = facts
    write_checkpoint_file(tmp_path / "odd.pt", {key: value for key, value in state.items() if key != "format"})
    with pytest.raises(UserError, match="leaves out its backbone and does not say which one it was"):
        load_model(tmp_path / "odd.pt", frozen / "weights.safetensors")


@pytest.mark.parametrize("command", ["predict", "export"])
def test_commands_take_the_weights_as_a_flag(command, frozen, tmp_path, cli):
    path, weights = frozen / "without" / "checkpoints" / "last.pt", frozen / "weights.safetensors"
    cv2.imwrite(str(tmp_path / "a.png"), np.full((32, 64, 3), 90, np.uint8))
    arguments = {
        "predict": [path, tmp_path / "a.png", "--device=cpu"],
        "export": [path, "--format=safetensors"],
    }[command]
    arguments.append(f"--output={tmp_path / 'out'}")
    assert_fails(cli(f"scripts/{command}.py", *arguments), "leaves out its frozen backbone", "--backbone-weights")
    assert not (tmp_path / "out").exists()
    refused = cli(f"scripts/{command}.py", *arguments, f"--backbone-weights={frozen / 'others.safetensors'}")
    assert_fails(refused, "others.safetensors gives another backbone")
    result = cli(f"scripts/{command}.py", *arguments, f"--backbone-weights={weights}")
    assert result.code == 0, result.err
    if command == "export":
        complete = load_model(frozen / "with").model.state_dict()
        assert_equal_states(load_model(tmp_path / "out").model.state_dict(), complete)
    else:
        assert (tmp_path / "out" / "depth" / "a.png").is_file()


def test_the_demo_takes_the_weights_for_models_that_leave_them_out(frozen):
    sources = [str(frozen / "without"), str(frozen / "with")]
    with pytest.raises(UserError, match="leaves out its frozen backbone"):
        load(sources, {"device": "cpu"})
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([*sources[:1], f"--backbone-weights={frozen / 'weights.safetensors'}"])
    without, complete = (one.predictor.model for one in load(sources, {"device": "cpu"}, args.backbone_weights))
    assert_equal_states(without.state_dict(), complete.state_dict())
    with pytest.raises(UserError, match="has a backbone with weights of its own"):
        load(sources[1:], {"device": "cpu"}, args.backbone_weights)


@pytest.mark.slow
def test_consistency_takes_the_weights_for_models_that_leave_them_out(frozen, tmp_path):
    paths = [frozen / name / "checkpoints" / "last.pt" for name in ("without", "with")]
    arguments = [str(paths[0]), f"--compare={paths[1]}", "--frames=2", f"--output={tmp_path}"]
    with pytest.raises(UserError, match="leaves out its frozen backbone"):
        measure_consistency(*parse_args(arguments, "", ""), ROOT / "configs")
    arguments.append(f"--backbone-weights={frozen / 'weights.safetensors'}")
    without, complete = measure_consistency(*parse_args(arguments, "", ""), ROOT / "configs")["arms"]
    assert without.pop("checkpoint") != complete.pop("checkpoint")
    assert without == complete
