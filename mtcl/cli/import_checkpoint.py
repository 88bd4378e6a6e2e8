"""Import a published checkpoint of another codebase as one that evaluate.py loads."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from mtcl.config.build_data import build_tasks, get_image_size
from mtcl.config.build_model import build_model, inline_genotype, saved_config
from mtcl.config.compose import compose_config
from mtcl.config.resolve import plain
from mtcl.config.schema import check_config
from mtcl.config.stored_config import describe_tasks
from mtcl.errors import UserError, suggest
from mtcl.models.published import METHODS, check_state_dict, read_published_checkpoint, translate_state_dict
from mtcl.training.checkpoint import Checkpoint, save_checkpoint


class ImportResult(NamedTuple):
    """Result of an import.

    Attributes:
        num_tensors: tensors of our model, each filled from the file.
        num_regularizer_tensors: tensors that only a training needs, filled from the file: the aligners of a student.
        unused_keys: keys of the file that a prediction never uses, and that are in none of both.
        config_overrides: config keys that were set because the published network needs them.
    """

    num_tensors: int
    num_regularizer_tensors: int
    unused_keys: list[str]
    config_overrides: dict[str, Any]


def import_checkpoint(method: str, source: Path, target: Path, overrides: Sequence[str], configs: Path) -> ImportResult:
    """Convert a published checkpoint.

    Args:
        method: a name in :data:`METHODS`.
        source: the published file.
        target: the file to write; must not exist.
        overrides: of train.py's config, as they describe the published run. Keys that the published network needs
            (``Method.config_overrides``) are set as well and saved.
        configs: folder of the configs.

    Raises:
        UserError: the file is not of that method, or does not fill exactly the model that the config describes.
    """
    if method not in METHODS:
        problem = f"{method} is not a method whose checkpoints are known{suggest(method, METHODS)}"
        raise UserError(f"{problem}; choose one of {', '.join(METHODS)}")
    if target.exists():
        raise UserError(f"{target} exists already; choose another name")
    chosen = METHODS[method]
    published, step = read_published_checkpoint(source, chosen.first_iteration)
    config = compose_config(overrides, configs, check=False)
    if str(config.decoder._target_).rpartition(".")[2] != chosen.model:
        raise UserError(f"the config describes {config.decoder._target_}, not {method}; give decoder={method}")
    needed = {
        f"{group}.{key}": value
        for group, values in chosen.config_overrides(published, get_image_size(config)).items()
        for key, value in values.items()
    }
    for key, value in needed.items():
        set_key(config, key, value)
    inline_genotype(config)
    check_config(plain(config))
    tasks = build_tasks(config)
    with torch.device("meta"):  # only shapes are needed
        model = build_model(config, tasks, pretrained=False)
    expected = model.state_dict()
    weights, unused_keys = translate_state_dict(published, chosen, list(tasks), expected.keys())
    check_state_dict(weights, expected, method)
    keys = {} if chosen.regularizer_keys is None or tasks else chosen.regularizer_keys(published)
    unused_keys = [key for key in unused_keys if key not in keys]
    checkpoint = Checkpoint(
        model=weights,
        config=saved_config(config, model),
        step=step,
        regularizer={ours: published[theirs] for theirs, ours in keys.items()} or None,
        meta={
            "tasks": describe_tasks(tasks),
            "best": math.nan,
            "imported": {"method": method, "file": source.name, "idle": unused_keys},
        },
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(target, checkpoint)
    return ImportResult(len(weights), len(keys), unused_keys, needed)


def set_key(config: DictConfig, key: str, value: Any) -> None:
    """Set a key; a mapping is merged into the current value."""
    current = OmegaConf.select(config, key)
    if isinstance(value, dict):
        value = {**(plain(current) or {}), **value}
    with open_dict(config):
        OmegaConf.update(config, key, value, merge=False)
