"""Files as public training code saves them, and the models that are imported from them."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from helpers.common import ROOT, composed
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.stored_config import check_tasks
from mtcl.training.checkpoint_file import read_checkpoint_file

CONFIGS = ROOT / "configs"


def list_channels(overrides: list[str]) -> dict[str, int]:
    """Return task of a config -> channels of its prediction, in order."""
    return {name: task.channels for name, task in build_tasks(composed(*overrides)).items()}


def write_published(path: Path, state: dict[str, Tensor], prefix: str = "module.", **more: Any) -> Path:
    """Write a file as InvPT's training code does: DDP's names, beside optimiser and schedule."""
    content = {
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 2e-5}]},
        "scheduler": {"max_iterations": 40000, "base_lrs": [2e-5], "last_epoch": 40000},
        "model": {f"{prefix}{key}": value for key, value in state.items()},
        "epoch": 5,
        "iter_count": 39999,
        **more,
    }
    torch.save(content, path)
    return path


def rebuild(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model of our checkpoint, as evaluate.py builds it, and the checkpoint."""
    state = read_checkpoint_file(path)
    config = OmegaConf.create(state["config"])
    tasks = build_tasks(config)
    check_tasks(state["meta"]["tasks"], tasks, path)
    model = build_model(config, tasks, pretrained=False)
    model.load_state_dict(state["model"])
    return model.eval(), state


def assert_each_from_one(model: nn.Module, published: dict[str, Tensor], num_unused: int) -> None:
    """Check that every tensor of the model has the values of one published key, another for each."""
    keys: dict[bytes, list[str]] = {}
    for key, value in published.items():
        keys.setdefault(value.contiguous().numpy().tobytes(), []).append(key)
    sources = {name: keys.get(value.contiguous().numpy().tobytes(), []) for name, value in model.state_dict().items()}
    assert [name for name, one in sources.items() if len(one) != 1] == []
    assert len({one[0] for one in sources.values()}) == len(sources) == len(published) - num_unused


def to_double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with its floating-point tensors in double precision."""
    return {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
