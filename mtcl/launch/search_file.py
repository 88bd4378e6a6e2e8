"""Read a search's YAML file: which keys of a run's config are searched, in which ranges, for which objective."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtcl.errors import UserError
from mtcl.launch.overrides import LAUNCHER_KEYS, check_overrides, split_override
from mtcl.launch.yaml_file import check_mapping, read_texts
from mtcl.results.columns import Column, make_column
from mtcl.tasks import TASK_NAMES

KEYS = ("name", "overrides", "space", "objective", "seed", "trials", "first", "pruning", "environment")
RANGE_KEYS = ("low", "high", "log", "int")
PRUNING_KEYS = ("startup_trials", "warmup_steps")
DELTA_OBJECTIVES = {"Delta_MTL": "single-task runs", "Delta_on/off": "a run with the regulariser off"}
SIGNIFICANT_DIGITS = 4  # significant, of a value that is tried


@dataclass(frozen=True)
class Range:
    """The values of one key: numbers from ``low`` to ``high``, or one of ``choices`` (as they are typed)."""

    key: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    is_integer: bool = False
    choices: tuple[str, ...] = ()

    def to_override(self, trial: Any) -> str:
        """Return the override for an Optuna trial."""
        if self.choices:
            return f"{self.key}={trial.suggest_categorical(self.key, list(self.choices))}"
        if self.is_integer:
            return f"{self.key}={trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)}"
        return f"{self.key}={trial.suggest_float(self.key, self.low, self.high, log=self.log):.{SIGNIFICANT_DIGITS}g}"

    def parse(self, text: Any) -> float | int | str:
        """Return the value that a text stands for; ``ValueError`` says what the range holds where it is outside."""
        allowed = " or ".join(self.choices) if self.choices else f"from {self.low:g} to {self.high:g}"
        if self.choices:
            if text in self.choices:
                return str(text)
            raise ValueError(f"must be {allowed}")
        try:
            value = float(text)
        except (TypeError, ValueError):
            value = math.nan
        if not self.low <= value <= self.high or (self.is_integer and value != int(value)):
            raise ValueError(f"must be a {'whole ' * self.is_integer}number {allowed}")
        return int(value) if self.is_integer else value

    def bound_overrides(self) -> tuple[str, ...]:
        """Return overrides with the lowest and the highest value, or all choices."""
        if self.choices:
            return tuple(f"{self.key}={choice}" for choice in self.choices)
        return tuple(f"{self.key}={int(end) if self.is_integer else end}" for end in (self.low, self.high))


@dataclass(frozen=True)
class Search:
    """The content of a search's file.

    ``first``: the values of the first trials, one mapping from each key of ``space`` for each of them. ``pruning``: the
    number of trials before the first is pruned, and of steps in a trial before it may be; None: no pruning.
    """

    name: str
    overrides: tuple[str, ...]
    space: tuple[Range, ...]
    objective: str
    seed: int = 0
    trials: int = 20
    first: tuple[Mapping[str, float | int | str], ...] = ()
    pruning: tuple[int, int] | None = (5, 0)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def column(self) -> Column:
        """The objective as a column of tables."""
        if self.objective in DELTA_OBJECTIVES:
            return Column("", self.objective, True, "%")
        return make_column(*self.objective.split("/"))


def read_search(path: Path) -> Search:
    """Read a search; ``UserError`` names the file and the key of a mistake."""
    definition = check_mapping(path, "the file", read_texts(path), KEYS)
    overrides = definition.get("overrides", [])
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        raise UserError(f"{path}: overrides must be a list of texts, e.g. [experiment=nyud_small_cpu].")
    check_overrides(f"{path}: overrides", overrides, "search")
    space = check_mapping(path, "space", definition.get("space"))
    if not space:
        raise UserError(f"{path}: space must hold a key of the config or more, e.g. regularizer.weight: {{...}}.")
    ranges = tuple(_range(path, key, bounds) for key, bounds in space.items())
    fixed = {split_override(override)[0] for override in overrides}
    for searched in ranges:
        if searched.key in fixed:
            raise UserError(f"{path}: {searched.key} is both in overrides and in space; leave it out of one.")
    pruning = definition.get("pruning", {})
    if pruning in ("none", "null", "false"):
        startup = None
    else:
        fields = check_mapping(path, "pruning", pruning, PRUNING_KEYS)
        startup = (
            _integer(path, "pruning.startup_trials", fields.get("startup_trials", "5")),
            _integer(path, "pruning.warmup_steps", fields.get("warmup_steps", "0")),
        )
    return Search(
        name=_text(path, "name", definition.get("name", path.stem)),
        overrides=tuple(overrides),
        space=ranges,
        objective=_objective(path, definition.get("objective"), ranges),
        seed=_integer(path, "seed", definition.get("seed", "0")),
        trials=_integer(path, "trials", definition.get("trials", "20"), least=1),
        first=_first_trials(path, definition.get("first", []), ranges),
        pruning=startup,
        environment={
            key: _text(path, f"environment.{key}", value)
            for key, value in check_mapping(path, "environment", definition.get("environment", {})).items()
        },
    )


def _text(path: Path, where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{path}: {where} must be text.")
    return value


def _integer(path: Path, where: str, value: Any, least: int = 0) -> int:
    if not isinstance(value, str) or not value.isdecimal() or int(value) < least:
        raise UserError(f"{path}: {where} must be a whole number >= {least}, not {value}.")
    return int(value)


def _range(path: Path, key: str, bounds: Any) -> Range:
    where = f"space.{key}"
    check_overrides(f"{path}: {where}", [f"{key}=0"], "search", reserved=(*LAUNCHER_KEYS, "data.split"))
    if isinstance(bounds, list):
        if len(bounds) < 2 or not all(isinstance(value, str) for value in bounds) or len(set(bounds)) < len(bounds):
            raise UserError(f"{path}: {where} must be a list of two different values or more.")
        return Range(key, choices=tuple(bounds))
    fields = check_mapping(path, where, bounds, RANGE_KEYS)
    flags = {}
    for flag in ("log", "int"):
        if fields.get(flag, "false") not in ("true", "false"):
            raise UserError(f"{path}: {where}.{flag} must be true or false.")
        flags[flag] = fields.get(flag) == "true"
    ends = []
    for end in ("low", "high"):
        try:
            value = float(fields[end])
        except (KeyError, TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value) or (flags["int"] and value != int(value)):
            kind = "whole number" if flags["int"] else "number"
            raise UserError(f"{path}: {where}.{end} must be a {kind}; write {{low: 0.1, high: 10, log: true}}.")
        ends.append(value)
    if ends[0] >= ends[1] or (flags["log"] and ends[0] <= 0):
        raise UserError(f"{path}: {where}: low must be below high{', and above 0 with log' if flags['log'] else ''}.")
    return Range(key, ends[0], ends[1], flags["log"], flags["int"])


def _first_trials(path: Path, content: Any, space: Sequence[Range]) -> tuple[Mapping[str, float | int | str], ...]:
    if not isinstance(content, list):
        raise UserError(f"{path}: first must be a list of mappings from the keys of space to values.")
    trials = []
    for number, fields in enumerate(content, 1):
        where = f"first, entry {number}"
        texts = check_mapping(path, where, fields, [searched.key for searched in space])
        values = {}
        for searched in space:
            if searched.key not in texts:
                raise UserError(f"{path}: {where} has no value of {searched.key}.")
            try:
                values[searched.key] = searched.parse(texts[searched.key])
            except ValueError as error:
                raise UserError(f"{path}: {where}: {searched.key} {error}, as in space.") from None
        trials.append(values)
    return tuple(trials)


def _objective(path: Path, value: Any, space: Sequence[Range]) -> str:
    task = value.partition("/")[0] if isinstance(value, str) else ""
    if value not in DELTA_OBJECTIVES and (task not in TASK_NAMES or value.count("/") != 1 or value.endswith("/")):
        raise UserError(
            f"{path}: objective: {value} is neither {' nor '.join(DELTA_OBJECTIVES)} nor a task/metric such as "
            "depth/rmse."
        )
    for searched in space:
        if value == "Delta_on/off" and searched.key.partition(".")[0] != "regularizer":
            raise UserError(
                f"{path}: objective: Delta_on/off compares runs that differ in the regulariser only, but space has "
                f"{searched.key}; choose Delta_MTL or a task/metric."
            )
    return value
