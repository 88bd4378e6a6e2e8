"""What mtcl promises of a run: free at inference, watching changes nothing, reproducible, resumable."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.common import TINY, composed
from torch.utils.flop_counter import FlopCounterMode

from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_regularizer
from mtcl.errors import UserError
from mtcl.models import EncoderDecoder
from mtcl.training.checkpoint_file import read_checkpoint_file

FOUR = [*TINY, "trainer.max_steps=4", "trainer.val_interval=null", "trainer.checkpoint_interval=2"]
FOUR += ["trainer.validate_first=false"]


def run(folder: Path, *overrides: str) -> dict:
    train(composed(*FOUR, *overrides), folder)
    return read_checkpoint_file(folder / "checkpoints" / "last.pt")


def records(folder: Path, kind: str) -> list[dict]:
    records_read = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records_read if record["kind"] == kind]


def losses(folder: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "regularizer"} for record in records(folder, "train")]


def assert_equal_state(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def flops(model: torch.nn.Module, image: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.predict(image)
    return counter.get_total_flops()


class FinishedRun(NamedTuple):
    """A run that several tests look at; none of them writes into its folder."""

    folder: Path
    state: dict


@pytest.fixture(scope="module")
def on(tmp_path_factory) -> FinishedRun:
    """Four steps with the contrast."""
    folder = tmp_path_factory.mktemp("on") / "run"
    return FinishedRun(folder, run(folder))


@pytest.fixture(scope="module")
def off(tmp_path_factory) -> FinishedRun:
    """The same without it."""
    folder = tmp_path_factory.mktemp("off") / "run"
    return FinishedRun(folder, run(folder, "regularizer=none"))


def test_same_seed_same_losses_and_weights_other_seed_others(on, tmp_path):
    again = run(tmp_path / "again")
    assert losses(on.folder) == losses(tmp_path / "again")
    assert len(losses(on.folder)) == 4
    assert_equal_state(on.state["model"], again["model"])
    assert_equal_state(on.state["regularizer"], again["regularizer"])
    run(tmp_path / "c", "seed=1")
    assert losses(on.folder) != losses(tmp_path / "c")


@pytest.mark.slow
def test_workers_change_nothing(on, tmp_path):
    assert_equal_state(on.state["model"], run(tmp_path / "workers", "data.workers=2")["model"])


def test_weight_zero_is_bit_equal_to_none(on, off, tmp_path):
    zero = run(tmp_path / "zero", "regularizer.weight=0")
    assert losses(off.folder) == losses(tmp_path / "zero")
    assert_equal_state(off.state["model"], zero["model"])
    assert_equal_state({"cpu": off.state["rng"]["cpu"]}, {"cpu": zero["rng"]["cpu"]})
    # and it is not because the regulariser does nothing
    assert any(not torch.equal(value, on.state["model"][k]) for k, value in off.state["model"].items())
    first, other = losses(off.folder)[0], losses(on.folder)[0]
    assert first.pop("loss") < other.pop("loss"), "the total has the regulariser's part"
    assert first == other, "the same start, data order and augmentation"


def test_free_at_inference(on, off):
    assert on.state["model"].keys() == off.state["model"].keys()
    config = composed(*FOUR)
    tasks = build_tasks(config)
    image = torch.randn(2, 3, 32, 64)
    outputs, costs = [], []
    for overrides in ([], ["regularizer=none"]):
        config = composed(*FOUR, *overrides)
        model = build_model(config, tasks, pretrained=False)
        regularizer = build_regularizer(config, tasks, model)
        assert (regularizer is None) == bool(overrides)
        model.load_state_dict(on.state["model"])
        costs.append((flops(model.eval(), image), sum(p.numel() for p in model.parameters())))
        with torch.no_grad():
            outputs.append(model.predict(image))
    assert costs[0] == costs[1]
    assert_equal_state(outputs[0], outputs[1])


def test_a_contrast_trained_run_goes_on_without_regularizer(on, tmp_path):
    overrides = ["regularizer=none", f"resume={on.folder}/checkpoints/last.pt", "trainer.max_steps=5"]
    without = [word for word in FOUR if not word.startswith("regularizer=")]
    with pytest.raises(UserError, match=r"was trained with a regularizer.*regularizer=none to go on without"):
        train(composed(*without, *overrides[1:]), tmp_path / "on2", overrides=[*without, *overrides[1:]])
    assert not (tmp_path / "on2" / "checkpoints").exists()
    train(composed(*FOUR, *overrides), tmp_path / "on2", overrides=overrides)
    end = read_checkpoint_file(tmp_path / "on2" / "checkpoints" / "last.pt")
    assert end["step"] == 5
    assert end["regularizer"] is None
    assert end["model"].keys() == on.state["model"].keys()


@pytest.mark.parametrize("regularizer", ["contrastive", pytest.param("auxiliary", marks=pytest.mark.slow), "none"])
def test_resuming_is_bit_exact(tmp_path, regularizer):
    overrides = [f"regularizer={regularizer}", "data.limit=5", "trainer.max_steps=6", "trainer.checkpoint_interval=3",
                 "trainer.val_interval=3", "trainer.validate_first=true"]  # fmt: skip
    uncut = run(tmp_path / "whole", *overrides)

    class Cut(Exception):
        pass

    from mtcl.training.trainer import Trainer

    save = Trainer.save
    with pytest.MonkeyPatch.context() as patch:

        def save_and_die(self, name):
            save(self, name)
            if name == "last":
                raise Cut

        patch.setattr(Trainer, "save", save_and_die)
        with pytest.raises(Cut):
            train(composed(*FOUR, *overrides), tmp_path / "cut")
    assert read_checkpoint_file(tmp_path / "cut" / "checkpoints" / "last.pt")["step"] == 3
    resumed = run(tmp_path / "cut", *overrides, "resume=auto")
    assert_equal_state(uncut["model"], resumed["model"])
    if regularizer != "none":
        assert_equal_state(uncut["regularizer"], resumed["regularizer"])
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    a, b = (records(tmp_path / name, "val") for name in ("whole", "cut"))
    assert [r["step"] for r in a] == [0, 3, 6]
    assert a == b
    a, b = (
        torch.load(p / "checkpoints" / "last.pt", weights_only=True) for p in (tmp_path / "whole", tmp_path / "cut")
    )
    for x, y in zip(a["optimizer"]["model"]["state"].values(), b["optimizer"]["model"]["state"].values()):
        assert_equal_state(x, y)


@pytest.mark.parametrize("overrides", [["optimizer=sgd", "loss=atrc"], ["optimizer=adam", "schedule=cosine"]])
def test_other_choices_train(tmp_path, overrides):
    run(tmp_path, *overrides)
    history = losses(tmp_path)
    assert len(history) == 4
    assert all(math.isfinite(value) for record in history for value in record.values() if isinstance(value, float))


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_run(on, tmp_path):
    """Losses, weights and running statistics, but for rounding; a backbone that knows no such thing is named."""
    b = run(tmp_path / "b", "trainer.grad_checkpointing=true")
    for x, y in zip(losses(on.folder), losses(tmp_path / "b"), strict=True):
        numbers = [{k: v for k, v in record.items() if isinstance(v, float)} for record in (x, y)]
        assert {"semseg", "depth"} <= numbers[0].keys()
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-4)
    for key, value in on.state["model"].items():
        if key.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(value, b["model"][key], rtol=1e-3, atol=1e-4, msg=key)
    with pytest.raises(UserError, match="hrnet_w18_small_v2 knows no gradient checkpointing"):
        run(tmp_path / "c", "backbone=hrnet_w18_small", "trainer.grad_checkpointing=true")


def test_what_is_not_finite_is_never_saved(tmp_path):
    overrides = [
        "optimizer.lr=1e30",
        "trainer.log_interval=1000",
        "trainer.checkpoint_interval=1",
        "trainer.max_steps=20",
    ]
    with pytest.raises(UserError, match="not finite"):
        run(tmp_path, *overrides)
    state = read_checkpoint_file(tmp_path / "checkpoints" / "last.pt")
    assert state["step"] < 20
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_models_own_losses_are_trained(on, tmp_path, monkeypatch):
    """The door for heads of another kind and balance terms: what a model adds reaches its weights and the log."""
    monkeypatch.setattr(
        EncoderDecoder,
        "auxiliary_losses",
        lambda self, output, labels: {"decay": sum(p.square().sum() for p in self.decoder.parameters())},
    )
    with_it = run(tmp_path / "with")
    assert all(record["decay"] > 0 for record in losses(tmp_path / "with"))
    assert any(not torch.equal(with_it["model"][k], value) for k, value in on.state["model"].items())


@pytest.mark.slow
def test_the_built_in_example_learns(tmp_path):
    """A quarter of `make train`: every task is far better than untrained."""
    config = composed("experiment=rooms", "trainer.max_steps=100", "trainer.val_interval=null", "data.limit=200")
    metrics = train(config, tmp_path)
    first_metrics = {k: v for k, v in records(tmp_path, "val")[0].items() if "/" in k}
    assert metrics["semseg"]["mIoU"] > 0.12 > 5 * first_metrics["semseg/mIoU"]
    assert metrics["depth"]["rmse"] < 0.6 * first_metrics["depth/rmse"]
    assert metrics["normals"]["mErr"] < 0.4 * first_metrics["normals/mErr"]
    assert metrics["edge"]["loss"] < 0.8 * first_metrics["edge/loss"]
    assert metrics["sal"]["maxF"] > 2 * first_metrics["sal/maxF"]
    assert metrics["human_parts"]["mIoU"] > 0.1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("overrides", [[], ["regularizer.weight=0"], ["trainer.precision=fp32"]])
def test_deterministic_on_cuda(tmp_path, overrides):
    cuda = ["trainer.device=cuda", "trainer.deterministic=true", *overrides]
    try:
        a, b = run(tmp_path / "a", *cuda), run(tmp_path / "b", *cuda)
        assert losses(tmp_path / "a") == losses(tmp_path / "b")
        assert_equal_state(a["model"], b["model"])
        if "regularizer.weight=0" in overrides:
            off = run(tmp_path / "off", *cuda, "regularizer=none")
            assert_equal_state(a["model"], off["model"])
        overrides = [*cuda, "resume=auto", "trainer.max_steps=6"]
        assert run(tmp_path / "a", *overrides)["step"] == 6
    finally:
        torch.use_deterministic_algorithms(False)
