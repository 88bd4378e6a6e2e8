"""A search's YAML file: which keys of a run's config are searched, in what range, and what for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mtcl.errors import UserError
from mtcl.launch.study_file import LAUNCHER_KEYS, check_overrides
from mtcl.results.columns import Column, make_column
from mtcl.safe_files import check_depth, read_text
from mtcl.tasks import TASK_NAMES

KEYS = ("name", "overrides", "space", "objective", "seed", "trials", "pruning", "environment")
RANGE_KEYS = ("low", "high", "log", "int")
PRUNING_KEYS = ("startup_trials", "warmup_steps")
DELTA_OBJECTIVES = {"Delta_MTL": "single-task runs", "Delta_on/off": "a run with the regulariser off"}
SIGNIFICANT_DIGITS = 4  # significant, of a value that is tried


@dataclass(frozen=True)
class Range:
    """What one key may be: numbers from ``low`` to ``high``, or one of ``choices`` (as they are typed)."""

    key: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    is_integer: bool = False
    choices: tuple[str, ...] = ()

    def to_override(self, trial: Any) -> str:
        """The override for an Optuna trial."""
        if self.choices:
            return f"{self.key}={trial.suggest_categorical(self.key, list(self.choices))}"
        if self.is_integer:
            return f"{self.key}={trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)}"
        return f"{self.key}={trial.suggest_float(self.key, self.low, self.high, log=self.log):.{SIGNIFICANT_DIGITS}g}"

    def bound_overrides(self) -> tuple[str, ...]:
        """Overrides with its outermost values."""
        if self.choices:
            return tuple(f"{self.key}={choice}" for choice in self.choices)
        return tuple(f"{self.key}={int(end) if self.is_integer else end}" for end in (self.low, self.high))


@dataclass(frozen=True)
class Search:
    """A YAML file. ``pruning``: trials before, and steps in a trial before which none is pruned; None: none is."""

    name: str
    overrides: tuple[str, ...]
    space: tuple[Range, ...]
    objective: str
    seed: int = 0
    trials: int = 20
    pruning: tuple[int, int] | None = (5, 0)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def column(self) -> Column:
        if self.objective in DELTA_OBJECTIVES:
            return Column("", self.objective, True, "%")
        return make_column(*self.objective.split("/"))


def read_search(path: Path) -> Search:
    """The search in ``path``; ``UserError`` naming file and key for whatever is wrong with it."""
    try:
        content = yaml.load(read_text(path), yaml.BaseLoader)  # every value as the text that stands there
        check_depth(content, path)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not a readable YAML file: {' '.join(str(error).split())}.") from error
    known = _mapping(path, "the file", content, KEYS)
    overrides = known.get("overrides", [])
    if not isinstance(overrides, list) or not all(isinstance(word, str) for word in overrides):
        raise UserError(f"{path}: overrides must be a list of texts, e.g. [experiment=nyud_small_cpu].")
    check_overrides(f"{path}: overrides", overrides)
    space = _mapping(path, "space", known.get("space"), None)
    if not space:
        raise UserError(f"{path}: space must hold a key of the config or more, e.g. regularizer.weight: {{...}}.")
    ranges = tuple(_range(path, key, given) for key, given in space.items())
    fixed = {word.partition("=")[0].lstrip("+~") for word in overrides}
    for one in ranges:
        if one.key in fixed:
            raise UserError(f"{path}: {one.key} is both in overrides and in space; leave it out of one.")
    pruning = known.get("pruning", {})
    if pruning in ("none", "null", "false"):
        startup = None
    else:
        given = _mapping(path, "pruning", pruning, PRUNING_KEYS)
        startup = (
            _whole(path, "pruning.startup_trials", given.get("startup_trials", "5")),
            _whole(path, "pruning.warmup_steps", given.get("warmup_steps", "0")),
        )
    return Search(
        name=_text(path, "name", known.get("name", path.stem)),
        overrides=tuple(overrides),
        space=ranges,
        objective=_objective(path, known.get("objective"), ranges),
        seed=_whole(path, "seed", known.get("seed", "0")),
        trials=_whole(path, "trials", known.get("trials", "20"), least=1),
        pruning=startup,
        environment={
            key: _text(path, f"environment.{key}", value)
            for key, value in _mapping(path, "environment", known.get("environment", {}), None).items()
        },
    )


def _mapping(path: Path, where: str, content: Any, keys: Sequence[str] | None) -> dict[str, Any]:
    if not isinstance(content, dict):
        told = f" with keys among {', '.join(keys)}" if keys else ""
        raise UserError(f"{path}: {where} must be a mapping{told}.")
    for key in content:
        if keys is not None and key not in keys:
            raise UserError(f"{path}: {where} has an unknown key {key}; it may have {', '.join(keys)}.")
    return dict(content)


def _text(path: Path, where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{path}: {where} must be text.")
    return value


def _whole(path: Path, where: str, value: Any, least: int = 0) -> int:
    if not isinstance(value, str) or not value.isdecimal() or int(value) < least:
        raise UserError(f"{path}: {where} must be a whole number >= {least}, not {value}.")
    return int(value)


def _range(path: Path, key: str, given: Any) -> Range:
    where = f"space.{key}"
    check_overrides(f"{path}: {where}", [f"{key}=0"], own=(*LAUNCHER_KEYS, "data.split"))
    if isinstance(given, list):
        if len(given) < 2 or not all(isinstance(value, str) for value in given) or len(set(given)) < len(given):
            raise UserError(f"{path}: {where} must be a list of two different values or more.")
        return Range(key, choices=tuple(given))
    known = _mapping(path, where, given, RANGE_KEYS)
    flags = {}
    for flag in ("log", "int"):
        if known.get(flag, "false") not in ("true", "false"):
            raise UserError(f"{path}: {where}.{flag} must be true or false.")
        flags[flag] = known.get(flag) == "true"
    ends = []
    for end in ("low", "high"):
        try:
            value = float(known[end])
        except (KeyError, TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value) or (flags["int"] and value != int(value)):
            kind = "whole number" if flags["int"] else "number"
            raise UserError(f"{path}: {where}.{end} must be a {kind}; write {{low: 0.1, high: 10, log: true}}.")
        ends.append(value)
    if ends[0] >= ends[1] or (flags["log"] and ends[0] <= 0):
        raise UserError(f"{path}: {where}: low must be below high{', and above 0 with log' if flags['log'] else ''}.")
    return Range(key, ends[0], ends[1], flags["log"], flags["int"])


def _objective(path: Path, value: Any, space: Sequence[Range]) -> str:
    task = value.partition("/")[0] if isinstance(value, str) else ""
    if value not in DELTA_OBJECTIVES and (task not in TASK_NAMES or value.count("/") != 1 or value.endswith("/")):
        raise UserError(
            f"{path}: objective: {value} is neither {' nor '.join(DELTA_OBJECTIVES)} nor a task/metric such as depth/rmse."
        )
    for one in space:
        if value == "Delta_on/off" and one.key.partition(".")[0] != "regularizer":
            raise UserError(
                f"{path}: objective: Delta_on/off compares runs that differ in the regulariser only, but space has "
                f"{one.key}; take Delta_MTL or a task/metric."
            )
    return value
