"""Run folders as finished runs leave them."""

import json
from pathlib import Path

import torch
from omegaconf import OmegaConf

from mtcl.training.checkpoint_file import read_checkpoint_file

VALUES = {
    "semseg": {"mIoU": 0.40, "pixel_accuracy": 0.7},
    "depth": {"rmse": 0.60, "abs_rel": 0.2},
    "normals": {"mErr": 20.0},
    "edge": {"odsF": 0.70, "loss": 0.05},
}


ON = {"regularizer._target_": "mtcl.regularizers.Contrastive", "regularizer.weight": 0.5}


def write_run(folder: Path, seed=0, metrics=None, config=None, facts=None, overrides=()) -> Path:
    """A finished run's three files; ``config``: dotted keys, ``facts``: of run.json, None takes one out."""
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(VALUES if metrics is None else metrics))
    record = {"seed": seed, "split": "standard", "num_images": 500, "data_fingerprint": "8d9e", "step": 400,
              "commit": "e51845271362f65d", "clean": True, "device": "cpu", "overrides": list(overrides)}  # fmt: skip
    record = {key: value for key, value in (record | (facts or {})).items() if value is not None}
    (folder / "run.json").write_text(json.dumps(record))
    full = {"name": "made_up", "seed": seed, "data.name": "nyud", "tasks.names": "auto", "backbone.name": "resnet18",
            "regularizer._target_": None, "regularizer.weight": 0.0, "optimizer.lr": 0.001,
            "trainer.max_steps": 400, "trainer.num_panels": 4} | (config or {})  # fmt: skip
    nested = OmegaConf.create()
    for key, value in full.items():
        OmegaConf.update(nested, key, value)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(nested))
    return folder


def assert_same(a, b, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), where


def assert_same_run(a: Path, b: Path) -> None:
    """The last checkpoints, bit for bit, and every record."""
    states = [read_checkpoint_file(folder / "checkpoints" / "last.pt") for folder in (a, b)]
    for state in states:
        for name in ("resume", "trainer"):
            del state["config"][name]
    assert_same(*states)
    assert (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text()
    assert (a / "metrics.json").read_text() == (b / "metrics.json").read_text()
