"""Check configs that come out of files of others: checkpoints and exported folders.

Such a config may come from anybody. It is data: nothing in it is resolved, and before anything is built from it, it
passes the same schema as the command line, and what names a file or a folder is left out of it.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtcl.config.renamed import upgrade_config
from mtcl.config.schema import PATH_KEYS, check_config, truncate
from mtcl.errors import UserError, escape_control_characters
from mtcl.models.decoders.atrc import is_named_genotype
from mtcl.safe_files import check_depth
from mtcl.tasks import TASK_NAMES
from mtcl.tasks.base import Task

REQUIRED_GROUPS = ("backbone", "decoder", "tasks", "data", "trainer")
REQUIRED_KEYS = ("seed", "backbone.name", "decoder._target_", "data.name", "data._target_", "data.size")
MAX_VALUES = 20_000  # of a config; those of today have about 150
MAX_TEXT_LENGTH, MAX_KEY_LENGTH = 4_096, 200
MAX_CHANNELS = 100_000  # of a task
# Paths that drop_paths leaves. Reading images from data.root is what evaluate.py is asked for, nothing is read from
# name, and the last two have checks of their own.
KEPT_PATHS = ("data.root", "name", "data.label_assignment", "decoder.genotype")
WEIGHT_SOURCES = ("none", "hub")  # values of backbone.weights that say how training began
LABEL_ASSIGNMENTS = ("full", "one", "random", "present")  # of data.label_assignment; anything else is a path
LEGACY_DEFAULTS: dict[str, Any] = {  # keys younger than some checkpoints
    "backbone": {
        "weights": None,
        "trainable": "full",
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": None},
        "mean": None,
        "std": None,
        "out_indices": None,
        "kwargs": None,
    },
    "data": {"options": {}},
    "loss": {"weights": {}, "options": {}},
}


def check_stored_config(config: Any, source: str | Path) -> dict[str, Any]:
    """Return a copy of a stored config from which a model may be built.

    Args:
        config: what the checkpoint or the exported folder holds under "config".
        source: where it comes from, for messages.

    Returns:
        plain containers with string keys; every key and value fits the schema; without paths of another machine but
        for ``data.root``.

    Raises:
        UserError: it is no such config; the sentence names the key.
    """
    check_depth(config, source)
    if not isinstance(config, Mapping) or not all(isinstance(config.get(group), Mapping) for group in REQUIRED_GROUPS):
        raise UserError(f"{source} is no model of mtcl: its config has not all of {', '.join(REQUIRED_GROUPS)}")
    try:
        count = [0]
        plain = upgrade_config(_copy_plain(dict(config), "the config", count))
        drop_paths(plain)
        for group, defaults in LEGACY_DEFAULTS.items():
            if isinstance(plain.setdefault(group, {}), dict):
                plain[group] = {**defaults, **plain[group]}
        for key in REQUIRED_KEYS:
            group, _, name = key.rpartition(".")
            if (plain[group] if group else plain).get(name) is None:
                raise UserError(f"{key} is missing")
        check_config(plain)
        _check_genotype(plain["decoder"].get("genotype"))
    except UserError as error:
        raise UserError(f"the config stored in {source} is refused: {escape_control_characters(str(error))}") from error
    return plain


def _copy_plain(value: Any, key: str, count: list[int]) -> Any:
    """Copy a value of which containers, texts, numbers, booleans and None are all; refuse interpolations."""
    count[0] += 1
    if count[0] > MAX_VALUES:
        raise UserError(f"it has more than {MAX_VALUES} values")
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str) or len(name) > MAX_KEY_LENGTH:
                raise UserError(
                    f"{key} has the key {truncate(name)}; a key is a text of at most {MAX_KEY_LENGTH} characters"
                )
        prefix = "" if key == "the config" else f"{key}."
        return {name: _copy_plain(item, prefix + name, count) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy_plain(item, key, count) for item in value]
    if isinstance(value, str):
        if "${" in value or value == "???":
            raise UserError(
                f"{key}={truncate(value)} refers to another value; a stored config may have plain values only"
            )
        if len(value) > MAX_TEXT_LENGTH:
            raise UserError(f"{key} is a text of {len(value):,} characters")
        return value
    if value is None or type(value) in (bool, int) or (type(value) is float and not math.isnan(value)):
        return value
    kind = "nan" if type(value) is float else f"a {type(value).__name__}"
    raise UserError(f"{key} is {kind}; a config has texts, numbers, true, false and null")


def drop_paths(config: dict[str, Any]) -> None:
    """Take from a plain config what names files of the machine it was trained on, but for ``data.root``."""
    for key in (key for key in PATH_KEYS if key not in KEPT_PATHS):
        group, _, name = key.rpartition(".")
        part = config.get(group) if group else config
        if isinstance(part, dict) and part.get(name) not in (None, *WEIGHT_SOURCES):
            del part[name]
    config.pop("logger", None)  # addresses of servers
    for teacher in _list_teachers(config):
        if teacher.get("weights") not in (None, *WEIGHT_SOURCES):
            del teacher["weights"]
    data = config.get("data")
    if (
        isinstance(data, dict)
        and isinstance(data.get("label_assignment"), str)
        and data["label_assignment"] not in LABEL_ASSIGNMENTS
    ):
        data["label_assignment"] = LABEL_ASSIGNMENTS[0]


def _list_teachers(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the options of the networks that ``regularizer=distillation`` has as teachers."""
    part: Any = config
    for name in ("regularizer", "options", "teachers"):
        part = part.get(name) if isinstance(part, dict) else None
    return [options for options in part.values() if isinstance(options, dict)] if isinstance(part, dict) else []


def _check_genotype(genotype: Any) -> None:
    """Refuse a genotype that is the path of a file."""
    if isinstance(genotype, str) and not is_named_genotype(genotype):
        raise UserError(
            f"decoder.genotype={truncate(genotype)} names a file of the machine it was trained on; continue that run "
            "once with train.py resume=auto, which stores what the file says"
        )


def check_stored_tasks(tasks: Any, source: str | Path) -> dict[str, dict[str, Any]]:
    """Return the facts of stored tasks, {name: {"channels": number, "classes": names}}, or raise ``UserError``."""
    if isinstance(tasks, Mapping) and not tasks:
        raise UserError(
            f"{source} is a student of scripts/distill.py, which predicts no task; give it to decoder.weights"
        )
    if not isinstance(tasks, Mapping):
        raise UserError(f"{source} is no model of mtcl: it does not say which tasks it has")
    for name, facts in tasks.items():
        if name not in TASK_NAMES:
            raise UserError(
                f"{source} has a task {escape_control_characters(truncate(name))}; mtcl knows {', '.join(TASK_NAMES)}"
            )
        channels, classes = (facts.get("channels"), facts.get("classes")) if isinstance(facts, Mapping) else (0, None)
        if type(channels) is not int or not 0 < channels <= MAX_CHANNELS:
            raise UserError(f"{source} gives no number of channels for its task {name}")
        if not isinstance(classes, list) or not all(isinstance(one, str) for one in classes):
            raise UserError(f"{source} gives no list of classes for its task {name}")
    return {name: {"channels": facts["channels"], "classes": [*facts["classes"]]} for name, facts in tasks.items()}


def check_stored_backbone(facts: Any, source: str | Path) -> dict[str, str]:
    """Return what a checkpoint says of a backbone that it leaves out: name, weights, sha256; or raise ``UserError``."""
    keys = ("name", "weights", "sha256")
    is_known = isinstance(facts, Mapping) and all(isinstance(facts.get(key), str) for key in keys)
    if not is_known or not re.fullmatch(r"[0-9a-f]{64}", facts["sha256"]):
        raise UserError(f"{source} leaves out its backbone and does not say which one it was")
    return {key: escape_control_characters(truncate(facts[key])) for key in keys}


def describe_backbone_source(facts: Mapping[str, str]) -> str:
    """Return the name, weights and hash of a backbone that a checkpoint leaves out, as a part of a sentence."""
    return f"{facts['name']} with the weights {facts['weights']} (SHA-256 {facts['sha256'][:12]}...)"


def describe_tasks(tasks: Mapping[str, Task]) -> dict[str, dict[str, Any]]:
    """Return what a checkpoint records of tasks: channels, and the names of the classes if there are any."""
    return {n: {"channels": t.channels, "classes": list(getattr(t, "classes", ()))} for n, t in tasks.items()}


def check_tasks(saved: Mapping[str, dict[str, Any]], tasks: Mapping[str, Task], path: Path) -> None:
    """Raise ``UserError`` unless the tasks of a checkpoint are those of the run, with the same classes."""

    def format_channels(facts: Mapping[str, dict[str, Any]]) -> str:
        return ", ".join(f"{name} ({fact['channels']})" for name, fact in facts.items())

    current = describe_tasks(tasks)
    if dict(saved) != current:
        same = format_channels(saved) == format_channels(current)
        raise UserError(
            f"checkpoint {path} was trained for the tasks (channels) {format_channels(saved)}, this command is for "
            f"{'classes of other names' if same else format_channels(current)}; give the same data and tasks"
        )
