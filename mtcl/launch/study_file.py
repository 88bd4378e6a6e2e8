"""Read a study's YAML file: which runs of train.py it asks for, and what is compared with what."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mtcl.errors import UserError, suggest
from mtcl.launch.overrides import check_overrides
from mtcl.launch.yaml_file import check_mapping, read_texts
from mtcl.tasks import TASK_NAMES

KEYS = ("name", "overrides", "seeds", "variants", "single_task", "environment")
RENAMED_KEYS = {"arms": "variants", "singles": "single_task"}
VARIANT_KEYS = ("overrides", "seeds", "against", "label", "note")
SINGLE_TASK_KEYS = ("overrides", "seeds", "tasks")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
SINGLE_PREFIX = "single_"  # before a task: the variant of its single-task runs


@dataclass(frozen=True)
class Variant:
    """Runs that differ in the seed only, a row of the table.

    Attributes:
        name: Its key in the file, and its folder.
        overrides: Those that are added to the study's.
        seeds: One run each.
        against: The variants it is compared with, seed by seed; its Delta in the table of means is against the first.
        label: Its name in the table.
        note: A sentence on it.
        task: Of single-task runs, else empty.
    """

    name: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    against: tuple[str, ...] = ()
    label: str = ""
    note: str = ""
    task: str = ""


@dataclass(frozen=True)
class Study:
    """The variants in the order of the table.

    ``single_task``: the runs that Delta_MTL is computed against; ``single_task_names``: of these tasks, None: of all.
    """

    name: str
    overrides: tuple[str, ...]
    variants: tuple[Variant, ...]
    single_task: Variant | None = None
    single_task_names: tuple[str, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def with_single_task_variants(self, tasks: Sequence[str]) -> "Study":
        """Return the study with a variant for each single task in place of ``single_task``."""
        if self.single_task is None:
            return self
        variants = [
            replace(
                self.single_task,
                name=f"{SINGLE_PREFIX}{task}",
                label=f"single-task {task}",
                overrides=(*self.single_task.overrides, f"tasks.names=[{task}]"),
                task=task,
            )
            for task in self.single_task_names or tasks
        ]
        return replace(self, variants=(*self.variants, *variants), single_task=None)


def read_study(path: Path) -> Study:
    """Read a study; ``UserError`` names the file and the key of a mistake."""
    content = read_texts(path)
    if isinstance(content, dict):
        for key, new in RENAMED_KEYS.items():
            if key in content:
                raise UserError(f"{path}: the key {key} is called {new} now.")
    definition = check_mapping(path, "the file", content, KEYS)
    name = _name(path, "name", definition.get("name", path.stem))
    seeds = _seeds(path, "seeds", definition["seeds"]) if "seeds" in definition else None
    variants_by_name = definition.get("variants")
    if not isinstance(variants_by_name, dict) or not variants_by_name:
        raise UserError(f"{path}: variants must be a mapping of one variant or more, name: {{overrides: [...]}}.")
    variants = tuple(
        _variant(path, _name(path, "variants", variant), content, seeds)
        for variant, content in variants_by_name.items()
    )
    single_task, tasks = None, None
    if "single_task" in definition:
        content = check_mapping(path, "single_task", definition["single_task"], SINGLE_TASK_KEYS)
        tasks = _tasks(path, content.pop("tasks")) if "tasks" in content else None
        single_task = _variant(path, "single_task", content, seeds, where="single_task")
    _check(path, variants, single_task is not None)
    environment = definition.get("environment", {})
    if not isinstance(environment, dict) or not all(isinstance(value, str) for value in environment.values()):
        raise UserError(f"{path}: environment must be a mapping VARIABLE: value.")
    return Study(
        name, _overrides(path, "overrides", definition.get("overrides", [])), variants, single_task, tasks, environment
    )


# Values


def _variant(path: Path, name: str, content: Any, seeds: tuple[int, ...] | None, where: str = "") -> Variant:
    where = where or f"variants.{name}"
    fields = check_mapping(path, where, content, VARIANT_KEYS)
    variant_seeds = _seeds(path, f"{where}.seeds", fields["seeds"]) if "seeds" in fields else seeds
    if variant_seeds is None:
        raise UserError(f"{path}: {where} has no seeds; give seeds to it or to the study, e.g. seeds: [0, 1, 2].")
    against = fields.get("against", [])
    against = [against] if isinstance(against, str) else against
    if not isinstance(against, list) or not all(isinstance(other, str) for other in against):
        raise UserError(f"{path}: {where}.against must be the name of a variant, or a list of names.")
    if len(set(against)) < len(against):
        raise UserError(f"{path}: {where}.against names a variant twice.")
    texts = {key: fields.get(key, "") for key in ("label", "note")}
    for key, value in texts.items():
        if not isinstance(value, str) or (key in fields and not value):
            raise UserError(f"{path}: {where}.{key} must be text.")
    overrides = _overrides(path, f"{where}.overrides", fields.get("overrides", []))
    return Variant(name, overrides, variant_seeds, tuple(against), texts["label"] or name, texts["note"])


def _check(path: Path, variants: Sequence[Variant], has_single_task: bool) -> None:
    """``UserError`` for variants that have one name or can't be compared."""
    seeds = {variant.name: set(variant.seeds) for variant in variants}
    labels: dict[str, str] = {}
    for variant in variants:
        if variant.label in labels:
            raise UserError(
                f"{path}: variants.{labels[variant.label]} and variants.{variant.name} have the same label "
                f"{variant.label}."
            )
        labels[variant.label] = variant.name
        if has_single_task and variant.name.startswith(SINGLE_PREFIX):
            raise UserError(
                f"{path}: variants.{variant.name}: names that begin with {SINGLE_PREFIX} are those of single_task; "
                "choose another."
            )
        for other in variant.against:
            if other == variant.name or other not in seeds:
                others = ", ".join(name for name in seeds if name != variant.name) or "none"
                raise UserError(
                    f"{path}: variants.{variant.name}.against: {other} is no other variant; choose among: {others}."
                )
            if not seeds[variant.name] & seeds[other]:
                raise UserError(
                    f"{path}: variants.{variant.name} and variants.{other} have no seed in common to be paired by."
                )


def _name(path: Path, where: str, value: Any) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise UserError(f"{path}: {where}: {value!r} is no name; use letters, digits, _, - and dots.")
    return value


def _overrides(path: Path, where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise UserError(f"{path}: {where} must be a list of texts, e.g. [regularizer=none, 'data.size=[96,128]'].")
    check_overrides(f"{path}: {where}", value, "study")
    return tuple(value)


def _seeds(path: Path, where: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.isdecimal() for v in value):
        raise UserError(f"{path}: {where} must be a list of whole numbers >= 0, e.g. [0, 1, 2].")
    seeds = [int(seed) for seed in value]
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise UserError(f"{path}: {where} has the seed {seed} twice.")
    return tuple(seeds)


def _tasks(path: Path, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or len(set(value)) < len(value):
        raise UserError(f"{path}: single_task.tasks must be a list of different tasks.")
    for task in value:
        if task not in TASK_NAMES:
            problem = f"{task} is no task{suggest(str(task), TASK_NAMES)}"
            raise UserError(f"{path}: single_task.tasks: {problem}; choose among {', '.join(TASK_NAMES)}.")
    return tuple(value)
