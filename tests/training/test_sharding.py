"""Weights, gradients and moments shared out among processes (FSDP2; gloo, on a CPU)."""

import json
import logging
from pathlib import Path

import pytest
import torch
from helpers.common import TINY, composed
from helpers.processes import RANKS_OVERRIDES, TORCHRUN, VIT, check_exit_code, check_same, run_cases, started, worked
from helpers.shrunken import shrunk
from torch._dynamo.exc import TorchDynamoException

from mtcl import UserError
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_training_run
from mtcl.config.schema import check_config
from mtcl.training.checkpoint_file import read_checkpoint_file
from mtcl.training.sharding import ReplicatedWeights, fsdp_units
from mtcl.training.train_step import CompiledModule

FSDP = "trainer.parallel=fsdp"
LONG = ["trainer.max_steps=20"]  # of 2 (debug=tiny) the third has no rate left


def moments_of(state: dict) -> dict[tuple[int, str], torch.Tensor]:
    entries = state["optimizer"]["model"]["state"].items()
    return {(index, name): value for index, entry in entries for name, value in entry.items()}


CASES = {
    "contrastive": ["data.label_assignment=random"],
    "not_finite": ["spoil=1", "trainer.ema=0.5", *LONG],
    "accumulated": ["regularizer=mtpsl", "trainer.accumulate_grad_batches=2", "data.batch_size=2"],
    "fp16": [*VIT, "trainer.precision=fp16", *LONG],
    "checkpointing": [*VIT, "trainer.grad_checkpointing=true"],
    "compiled": [*VIT, "trainer.compile=true", "compiler=aot_eager"],
    "taskprompter": ["decoder=taskprompter", *VIT, *shrunk("taskprompter", "vit_small")],
}


@pytest.mark.slow
def test_two_sharded_processes_are_one_with_the_whole_batch(tmp_path):
    """... and each has half of what there is to have. Clipping is on, as everywhere."""
    plain = {case: [word for word in overrides if "compile" not in word] for case, overrides in CASES.items()}
    sharded = {case: [*overrides, FSDP] for case, overrides in CASES.items()}
    ones, twos = run_cases(tmp_path / "one", None, plain), run_cases(tmp_path / "two", TORCHRUN, sharded)
    for case in CASES:
        one, two = ones[case], twos[case]
        # odsF counts pixels on either side of a threshold: a few that fp16 rounds to the other side are 3 % of it.
        check_same(one, two, case, metrics_rel=5e-2 if case == "fp16" else 1e-2)
        assert one[0]["skipped"] == two[0]["skipped"] == ([1] if case == "not_finite" else []), case
        assert one[1]["scaler"] == two[1]["scaler"], case
        assert one[0]["weights here"] == 1
        # What has a first axis of 1, as positions of a ViT, is the first one's.
        assert 0.45 < two[0]["weights here"] < 0.6, case
        assert two[0]["moments here"] in (0, two[0]["weights here"]), case
        a, b = moments_of(one[1]), moments_of(two[1])
        assert a.keys() == b.keys(), case
        for key, value in a.items():
            torch.testing.assert_close(b[key], value, rtol=1e-2, atol=1e-4, check_stride=True, msg=f"{case}: {key}")


@pytest.mark.slow
def test_a_state_knows_nothing_of_processes(tmp_path):
    """Continued by one process, or by two with their halves, it goes the same way, whoever left it."""
    overrides = ["trainer.ema=0.5", *LONG]
    worked(tmp_path / "one", None, *overrides)
    worked(tmp_path / "two", TORCHRUN, *overrides, FSDP)
    want = worked(tmp_path / "one_one", None, *overrides, f"from={tmp_path / 'one' / 'state.pt'}")
    check_same(want, worked(tmp_path / "one_two", TORCHRUN, *overrides, FSDP, f"from={tmp_path / 'one' / 'state.pt'}"))
    check_same(want, worked(tmp_path / "two_one", None, *overrides, f"from={tmp_path / 'two' / 'state.pt'}"))


@pytest.mark.slow
def test_train_py_with_shared_out_weights(tmp_path, cli):
    """Resumed in the middle it ends at the same weights, bit for bit; evaluate.py scores it as it scored itself; one
    process goes on from it."""
    overrides = [
        *RANKS_OVERRIDES,
        "trainer.max_steps=4",
        "trainer.checkpoint_interval=2",
        "schedule=constant",
        "trainer.ema=0.5",
    ]

    def run(folder: Path, *more: str) -> str:
        process = started(*TORCHRUN, "train.py", *overrides, FSDP, f"hydra.run.dir={folder}", *more)
        check_exit_code(process)
        return process.stdout + process.stderr

    run(tmp_path / "whole")
    run(tmp_path / "cut", "trainer.max_steps=2")
    assert "resumed at step 2" in run(tmp_path / "cut", "resume=auto")
    a, b = (read_checkpoint_file(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "cut"))
    assert len(a["rng"]) == 2
    for part in ("model", "regularizer"):
        assert all(torch.equal(value, b[part][name]) for name, value in a[part].items())
    assert all(torch.equal(value, b["ema"]["model"][name]) for name, value in a["ema"]["model"].items())
    moments = moments_of(b)
    assert all(torch.equal(value, moments[key]) for key, value in moments_of(a).items())
    path = tmp_path / "cut" / "checkpoints" / "last.pt"
    evaluated = cli("evaluate.py", f"checkpoint={path}", f"hydra.run.dir={tmp_path / 'scores'}")
    assert evaluated.code == 0, evaluated.err
    scores, cut_scores = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("scores", "cut"))
    for task, metrics in cut_scores.items():
        assert scores[task] == pytest.approx(metrics, rel=1e-2, abs=1e-3, nan_ok=True), task
    more = [f"hydra.run.dir={tmp_path / 'on'}", f"resume={path}", "trainer.max_steps=6"]
    alone = cli("train.py", *overrides, FSDP, *more)
    assert alone.code == 0, alone.err
    assert "resumed at step 4" in alone.out + alone.err
    assert read_checkpoint_file(tmp_path / "on" / "checkpoints" / "last.pt")["step"] == 6


@pytest.mark.parametrize(
    ("decoder", "backbone", "want"),
    [
        ("multi_head", "vit_small", ["backbone.net.model.blocks.0", "backbone.net.model.blocks.3"]),
        ("invpt", "swin_tiny", ["backbone.net.layers_2.blocks.0", "decoder.stages.0", "decoder.preliminary.sal.1"]),
        ("multi_head", "resnet18", ["backbone.net.layer4.0"]),
        ("taskprompter", "vit_small", ["backbone.net.model.blocks.0.mlp"]),
    ],
)
def test_blocks_are_units(decoder, backbone, want):
    config = composed(f"decoder={decoder}", f"backbone={backbone}", *shrunk(decoder, backbone))
    model = build_model(config, build_tasks(config), pretrained=False)
    units = fsdp_units(model)
    names = [name for name, module in model.named_modules() if any(module is unit for unit in units)]
    assert set(want) <= set(names)
    inside = [id(p) for unit in units for p in unit.parameters()]
    assert len(inside) == len(set(inside)), "none within another"
    assert 5 <= len(units) <= 100 or decoder == "taskprompter"


def test_alone_it_means_nothing(tmp_path):
    config = composed(*TINY, FSDP)
    trainer = build_training_run(config, build_tasks(config), tmp_path, torch.device("cpu")).trainer
    assert type(trainer.weights) is ReplicatedWeights
    with pytest.raises(UserError, match=r"trainer\.parallel=zero must be ddp or fsdp"):
        check_config({"trainer": {"parallel": "zero"}})


def test_one_block_that_does_not_compile_is_one_warning(monkeypatch, caplog):
    def compiled(call, backend):
        def fails(x):
            raise TorchDynamoException("no")

        return fails

    monkeypatch.setattr(torch, "compile", compiled)
    parts: list[CompiledModule] = []
    for _ in range(3):
        parts.append(CompiledModule(lambda x: x + 1, parts=parts))
    with caplog.at_level(logging.WARNING):
        assert [part(1) for part in parts] == [2, 2, 2]
    assert len(caplog.records) == 1
