"""A published checkpoint of another codebase -> one of ours, which evaluate.py loads."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from mtcl.config.build_data import build_tasks, get_image_size
from mtcl.config.build_model import build_model, saved_config
from mtcl.config.compose import compose_config
from mtcl.config.resolve import plain
from mtcl.config.schema import check_config
from mtcl.config.stored_config import describe_tasks
from mtcl.errors import UserError
from mtcl.models.published import METHODS, check_state_dict, read_published_checkpoint, translate_state_dict
from mtcl.training.checkpoint import save_checkpoint


class Imported(NamedTuple):
    tensors: int  # of our model, each filled from the file
    unused_keys: list[str]  # keys of the file that the published forward never uses
    settings: dict[str, Any]  # config keys that the published network asked for


def import_checkpoint(method: str, source: Path, target: Path, overrides: Sequence[str], configs: Path) -> Imported:
    """Write ``target`` from the published ``source``.

    ``overrides``: words of train.py that describe the published run, under ``configs``. Keys of the config without
    which the network would be another one (``Method.settings``) are set here and saved with it.
    """
    if method not in METHODS:
        raise UserError(f"{method} is not a method whose checkpoints are known; choose one of {', '.join(METHODS)}")
    if target.exists():
        raise UserError(f"{target} exists already; choose another name")
    known = METHODS[method]
    theirs, step = read_published_checkpoint(source)
    config = composed(overrides, configs)
    if str(config.decoder._target_).rpartition(".")[2] != known.model:
        raise UserError(f"the config describes {config.decoder._target_}, not {method}; give decoder={method}")
    settings = known.settings(theirs, get_image_size(config))
    for key, value in settings.items():
        set_key(config, key, value)
    check_config(plain(config))
    tasks = build_tasks(config)
    with torch.device("meta"):  # its shapes are all that is asked for
        model = build_model(config, tasks, pretrained=False)
    ours, unused_keys = translate_state_dict(theirs, known, list(tasks))
    check_state_dict(ours, model.state_dict(), method)
    content = {
        "model": ours,
        "ema": None,
        "regularizer": None,
        "share": None,
        "optimizer": {},
        "schedule": {},
        "step": step,
        "rng": {},
        "config": saved_config(config, model),
        "meta": {
            "tasks": describe_tasks(tasks),
            "best": math.nan,
            "imported": {"method": method, "file": source.name, "idle": unused_keys},
        },
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(target, content)
    return Imported(len(ours), unused_keys, settings)


def composed(overrides: Sequence[str], configs: Path) -> DictConfig:
    return compose_config(overrides, configs, check=False)


def set_key(config: DictConfig, key: str, value: Any) -> None:
    """Set ``key``; a mapping adds to what is there."""
    before = OmegaConf.select(config, key)
    if isinstance(value, dict):
        value = {**(plain(before) or {}), **value}
    with open_dict(config):
        OmegaConf.update(config, key, value, merge=False)
