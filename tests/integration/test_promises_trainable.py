"""Promises of trainings whose backbone is not trained, or in part."""

import logging
import re
import sys

import pytest
import torch
from helpers.common import TINY, composed
from helpers.processes import TORCHRUN, check_same, run_cases
from helpers.shrunken import shrunk

from mtcl import UserError
from mtcl.cli.export import export_model
from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_training_run
from mtcl.config.load import load_model
from mtcl.models.lora import remove_inserted_names
from mtcl.training.checkpoint_file import read_checkpoint_file
from mtcl.training.trainer import Trainer

CPU = torch.device("cpu")
QUICK = [*TINY, "trainer.val_interval=null", "trainer.checkpoint_interval=null", "trainer.num_panels=0"]
FROZEN = "backbone.trainable=frozen"
MOBILE = ["backbone=mobilenetv2", "backbone.name=mobilenetv2_050"]
VIT = ["backbone=vit_small", *shrunk("multi_head", "vit_small"), "++backbone.kwargs.drop_path_rate=0.5"]
PROMPTS = ["decoder=taskprompter", *VIT, *shrunk("taskprompter", "vit_small")]


def make_trainer(folder, *overrides) -> Trainer:
    config = composed(*overrides)
    torch.manual_seed(0)
    trainer = build_training_run(config, build_tasks(config), folder, CPU).trainer
    trainer.model.train()
    return trainer


def copy_state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


ENGINES = {
    "mobilenet": MOBILE,
    "vit": VIT,
    "taskprompter": PROMPTS,
    "ema and accumulation": [*MOBILE, "trainer.ema=0.5", "trainer.accumulate_grad_batches=2"],
    "checkpointed blocks": [*VIT, "trainer.grad_checkpointing=true"],
    "sgd": [*MOBILE, "optimizer=sgd", "trainer.channels_last=false"],
}


@pytest.mark.parametrize("overrides", ENGINES.values(), ids=ENGINES)
def test_training_leaves_a_frozen_backbone_as_it_is(overrides, tmp_path):
    trainer = make_trainer(tmp_path, *QUICK, FROZEN, *overrides)
    backbone, state_before = trainer.model.backbone, copy_state(trainer.model)
    for _, batches in zip(range(3), trainer.batches_per_step()):
        trainer.train_step(*batches)
    state_after = copy_state(trainer.model)
    inside = {name for name in state_before if name.startswith("backbone.")}
    assert any("running_mean" in name for name in inside) or "backbone.net.model.blocks.0.norm1.weight" in inside
    assert [name for name in inside if not torch.equal(state_before[name], state_after[name])] == []
    assert any(not torch.equal(state_before[name], state_after[name]) for name in state_before if name not in inside)
    optimized = {id(p) for group in trainer.optimizer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainer.model.parameters()} - {id(p) for p in backbone.parameters()}
    if trainer.ema is not None:
        trainer.ema.copy_buffers(trainer.model)
        assert_equal_states(copy_state(trainer.ema.model.backbone), copy_state(backbone))


LAST = {
    "stages": ([*MOBILE, "backbone.trainable=last_2", "trainer.ema=0.5"], r"net\.blocks\.[56]\..*"),
    "blocks": ([*VIT, "backbone.trainable=last_1", "trainer.grad_checkpointing=true"], r".*\.(blocks\.3|norm)\..*"),
    "prompts": ([*PROMPTS, "backbone.trainable=last_3"], r".*\.(blocks\.[123]|norm)\..*"),
}


@pytest.mark.parametrize(("overrides", "trained"), LAST.values(), ids=LAST)
def test_training_moves_the_last_layers_alone(overrides, trained, tmp_path):
    trainer = make_trainer(tmp_path, *QUICK, *overrides)
    backbone = trainer.model.backbone
    names = {name for name, _ in backbone.named_parameters() if re.fullmatch(trained, name)}
    state_before = copy_state(backbone)
    for _, batches in zip(range(2), trainer.batches_per_step()):
        trainer.train_step(*batches)
    moved = {name for name, value in copy_state(backbone).items() if not torch.equal(value, state_before[name])}
    assert all(re.fullmatch(trained, name) for name in moved)
    assert names <= moved
    optimized = {id(p) for group in trainer.optimizer.optimizer.param_groups for p in group["params"]}
    assert {name for name, p in backbone.named_parameters() if id(p) in optimized} == names
    if trainer.ema is not None:
        average = copy_state(trainer.ema.model.backbone)
        assert all(torch.equal(average[n], state_before[n]) for n, _ in backbone.named_parameters() if n not in names)
        assert not all(torch.equal(average[n], state_before[n]) for n in names)


def test_a_frozen_run_goes_on_as_if_it_had_never_stopped(tmp_path, caplog):
    overrides = [*QUICK, *MOBILE, FROZEN, "trainer.max_steps=4", "schedule=constant", "trainer.ema=0.5"]
    with caplog.at_level(logging.WARNING):
        train(composed(*overrides), tmp_path / "whole")
    assert "random weights (backbone.weights=none) and stays so (backbone.trainable=frozen)" in caplog.text
    train(composed(*overrides, "trainer.max_steps=2"), tmp_path / "cut")
    train(composed(*overrides, "resume=auto"), tmp_path / "cut")
    uncut, cut = (read_checkpoint_file(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "cut"))
    assert_equal_states(uncut["model"], cut["model"])
    assert_equal_states(uncut["ema"]["model"], cut["ema"]["model"])
    with pytest.raises(UserError, match=r"does not fit this run: backbone\.trainable is full, was frozen"):
        train(composed(*overrides, "backbone.trainable=full", "trainer.max_steps=6", "resume=auto"), tmp_path / "cut")


def test_adapters_train_and_are_merged_when_the_checkpoint_is_loaded(tmp_path, monkeypatch):
    """... which needs no peft. Resumed in the middle, the run ends at the same weights."""
    pytest.importorskip("peft")
    overrides = [
        *QUICK,
        *VIT,
        "backbone.trainable=lora",
        "backbone.lora.rank=2",
        "trainer.ema=0.5",
        "schedule=constant",
    ]
    overrides += ["optimizer.backbone_lr=0.1", "trainer.max_steps=4"]
    plain = copy_state(make_trainer(tmp_path, *QUICK, *VIT).model)
    train(composed(*overrides), tmp_path / "whole")
    train(composed(*overrides, "trainer.max_steps=2"), tmp_path / "cut")
    train(composed(*overrides, "resume=auto"), tmp_path / "cut")
    paths = [tmp_path / name / "checkpoints" / "last.pt" for name in ("whole", "cut")]
    uncut, cut = (read_checkpoint_file(path) for path in paths)
    assert_equal_states(uncut["model"], cut["model"])
    base = {remove_inserted_names(n): v for n, v in uncut["model"].items() if ".lora_" not in n}
    assert base.keys() == plain.keys()
    for part in ("model", "ema"):
        weights = uncut["model"] if part == "model" else uncut["ema"]["model"]
        assert all(value.abs().max() > 0 for name, value in weights.items() if ".lora_B." in name)
    config = composed(*overrides)
    unmerged = build_model(config, build_tasks(config), pretrained=False).eval()
    unmerged.load_state_dict(uncut["ema"]["model"])
    monkeypatch.setitem(sys.modules, "peft", None)
    loaded = load_model(paths[0])
    assert loaded.model.state_dict().keys() == plain.keys()
    image = torch.randn(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for task, prediction in loaded.model.predict(image).items():
            torch.testing.assert_close(prediction, unmerged.predict(image)[task], rtol=1e-5, atol=1e-5)
    export_model(loaded, "safetensors", tmp_path / "exported")
    again = load_model(tmp_path / "exported")
    assert_equal_states(again.model.state_dict(), loaded.model.state_dict())


def test_nothing_shared_is_nothing_to_balance(tmp_path, caplog):
    """Heads of their own on frozen maps have one objective each: the step is that of fixed weights, after a warning."""
    pytest.importorskip("torchjd")
    overrides = [word for word in QUICK if not word.startswith("decoder.head_width")]
    overrides += [*MOBILE, FROZEN, "decoder=deeplab", "decoder.dropout=0", "regularizer=none"]
    states = []
    for balancing in ("fixed", "pcgrad"):
        trainer = make_trainer(tmp_path, *overrides, f"balancing={balancing}")
        for _, batches in zip(range(2), trainer.batches_per_step()):
            trainer.train_step(*batches)
        states.append(copy_state(trainer.model))
    assert_equal_states(*states)
    assert caplog.text.count("has nothing to balance") == 1


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    pytest.importorskip("peft")
    common = [
        *VIT,
        "++backbone.kwargs.drop_path_rate=0",
        "optimizer=sgd",
        "regularizer.lr=1e-4",
        "trainer.ema=0.5",
        "trainer.max_steps=20",
    ]
    alone = {trainable: [*common, f"backbone.trainable={trainable}"] for trainable in ("frozen", "lora", "last_1")}
    shared = {
        f"{trainable} by {parallel}": [*overrides, f"trainer.parallel={parallel}"]
        for trainable, overrides in alone.items()
        for parallel in ("ddp", "fsdp")
    }
    one, two = run_cases(tmp_path / "one", None, alone), run_cases(tmp_path / "two", TORCHRUN, shared)
    for case, outcome in two.items():
        check_same(one[case.split(" by ")[0]], outcome, case)


@pytest.mark.slow
def test_a_frozen_backbone_can_be_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr("mtcl.training.train_step.CompiledModule.backend", "aot_eager")
    trainer = make_trainer(tmp_path, *QUICK, *MOBILE, FROZEN, "trainer.compile=true")
    state_before = copy_state(trainer.model.backbone)
    for _, batches in zip(range(2), trainer.batches_per_step()):
        trainer.train_step(*batches)
    assert trainer.training_step.works
    assert_equal_states(state_before, copy_state(trainer.model.backbone))
