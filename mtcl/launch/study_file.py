"""A study's YAML file: which runs of train.py it asks for, and what is compared with what."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mtcl.config.schema import role_of
from mtcl.errors import UserError
from mtcl.safe_files import check_depth, read_text
from mtcl.tasks import TASK_NAMES

KEYS = ("name", "overrides", "seeds", "arms", "singles", "environment")
VARIANT_KEYS = ("overrides", "seeds", "against", "label", "note")
SINGLE_TASK_KEYS = ("overrides", "seeds", "tasks")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
LAUNCHER_KEYS = ("seed", "resume", "hydra.run.dir")  # what a study sets itself
SINGLE_PREFIX = "single_"  # before a task: the arm of its single-task runs


@dataclass(frozen=True)
class Variant:
    """Runs that differ in the seed only, a row of the table. ``overrides``: its own, on top of the study's.

    ``against``: the arms it is compared with, seed by seed; its Delta in the table of means is against the first.
    ``task``: of single-task runs, else empty.
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
    """``arms`` in the order of the table. ``singles``: the baselines of Delta_MTL, ``single_tasks`` None for all."""

    name: str
    overrides: tuple[str, ...]
    variants: tuple[Variant, ...]
    single_task: Variant | None = None
    single_task_names: tuple[str, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def with_single_task_variants(self, tasks: Sequence[str]) -> "Study":
        """The study with an arm for each single task in place of ``singles``."""
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


class _Loader(yaml.BaseLoader):
    """Every scalar as the text that stands there: an arm may be called off. A key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_study(path: Path) -> Study:
    """The study in ``path``; ``UserError`` naming file and key for whatever is wrong with it."""
    try:
        content = yaml.load(read_text(path), _Loader)
        check_depth(content, path)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not a readable YAML file: {' '.join(str(error).split())}.") from error
    known = _mapping(path, "the file", content, KEYS)
    name = _name(path, "name", known.get("name", path.stem))
    seeds = _seeds(path, "seeds", known["seeds"]) if "seeds" in known else None
    given = known.get("arms")
    if not isinstance(given, dict) or not given:
        raise UserError(f"{path}: arms must be a mapping of one arm or more, name: {{overrides: [...]}}.")
    variants = tuple(_arm(path, _name(path, "arms", variant), content, seeds) for variant, content in given.items())
    single_task, tasks = None, None
    if "singles" in known:
        content = _mapping(path, "singles", known["singles"], SINGLE_TASK_KEYS)
        tasks = _tasks(path, content.pop("tasks")) if "tasks" in content else None
        single_task = _arm(path, "singles", content, seeds, where="singles")
    _check(path, variants, single_task is not None)
    environment = known.get("environment", {})
    if not isinstance(environment, dict) or not all(isinstance(value, str) for value in environment.values()):
        raise UserError(f"{path}: environment must be a mapping VARIABLE: value.")
    return Study(
        name, _overrides(path, "overrides", known.get("overrides", [])), variants, single_task, tasks, environment
    )


def check_overrides(where: str, overrides: Sequence[str], own: Sequence[str] = LAUNCHER_KEYS) -> None:
    """``UserError`` for a word that is no override of train.py, or one that the study sets itself."""
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not re.fullmatch(r"(\+{0,2}|~)[\w./@:-]+", key) or not (equals or word.startswith("~")):
            raise UserError(f"{where}: {word!r} is no override; write key=value as for train.py.")
        if strip_prefix(key) in own:
            raise UserError(f"{where}: {word} is set by the study itself; leave it out.")


def strip_prefix(key: str) -> str:
    return key.lstrip("+~")


def merge_overrides(*lists: Sequence[str]) -> list[str]:
    """Overrides one after another, of those for one key the last."""
    found: dict[str, str] = {}
    for word in (word for words in lists for word in words):
        key = strip_prefix(word.partition("=")[0])
        found.pop(key, None)
        found[key] = word
    return list(found.values())


def make_portable(overrides: Sequence[str]) -> list[str]:
    """Overrides without what belongs to a machine: its folders and device are left out, files keep their name only."""
    kept = []
    for word in merge_overrides(overrides):
        key, equals, value = word.partition("=")
        if is_machine_key(strip_prefix(key)) or strip_prefix(key).startswith("hydra."):
            continue
        kept.append(f"{key}{equals}{Path(unquote(value)).name}" if is_file_path(strip_prefix(key), value) else word)
    return kept


def is_machine_key(key: str) -> bool:
    """Is this a key of the machine or of the study itself, not of what is learned: may the runs of a study differ?"""
    return key in LAUNCHER_KEYS or key == "name" or role_of(key) == "machine"


def is_file_path(key: str, value: str) -> bool:
    """Is this value of a key the path of a file?"""
    text = unquote(value)
    return text.startswith(("/", "~/", "./", "../")) or (key == "backbone.weights" and "/" in text)


def unquote(value: str) -> str:
    return value.strip("'\"")


# Values


def _mapping(path: Path, where: str, content: Any, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{path}: {where} must be a mapping with keys among {', '.join(keys)}.")
    for key in content:
        if key not in keys:
            raise UserError(f"{path}: {where} has an unknown key {key}; it may have {', '.join(keys)}.")
    return dict(content)


def _arm(path: Path, name: str, content: Any, seeds: tuple[int, ...] | None, where: str = "") -> Variant:
    where = where or f"arms.{name}"
    known = _mapping(path, where, content, VARIANT_KEYS)
    own = _seeds(path, f"{where}.seeds", known["seeds"]) if "seeds" in known else seeds
    if own is None:
        raise UserError(f"{path}: {where} has no seeds; give seeds to it or to the study, e.g. seeds: [0, 1, 2].")
    against = known.get("against", [])
    against = [against] if isinstance(against, str) else against
    if not isinstance(against, list) or not all(isinstance(other, str) for other in against):
        raise UserError(f"{path}: {where}.against must be the name of an arm, or a list of names.")
    if len(set(against)) < len(against):
        raise UserError(f"{path}: {where}.against names an arm twice.")
    texts = {key: known.get(key, "") for key in ("label", "note")}
    for key, value in texts.items():
        if not isinstance(value, str) or (key in known and not value):
            raise UserError(f"{path}: {where}.{key} must be text.")
    overrides = _overrides(path, f"{where}.overrides", known.get("overrides", []))
    return Variant(name, overrides, own, tuple(against), texts["label"] or name, texts["note"])


def _check(path: Path, variants: Sequence[Variant], has_singles: bool) -> None:
    """``UserError`` for arms that cannot be told apart or compared."""
    seeds = {variant.name: set(variant.seeds) for variant in variants}
    labels: dict[str, str] = {}
    for variant in variants:
        if variant.label in labels:
            raise UserError(
                f"{path}: arms.{labels[variant.label]} and arms.{variant.name} have the same label {variant.label}."
            )
        labels[variant.label] = variant.name
        if has_singles and variant.name.startswith(SINGLE_PREFIX):
            raise UserError(
                f"{path}: arms.{variant.name}: with singles, names with {SINGLE_PREFIX} are theirs; take another."
            )
        for other in variant.against:
            if other == variant.name or other not in seeds:
                known = ", ".join(name for name in seeds if name != variant.name) or "there is none"
                raise UserError(f"{path}: arms.{variant.name}.against: {other} is no other arm; choose among: {known}.")
            if not seeds[variant.name] & seeds[other]:
                raise UserError(f"{path}: arms.{variant.name} and arms.{other} have no seed in common to be paired by.")


def _name(path: Path, where: str, value: Any) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise UserError(f"{path}: {where}: {value!r} is no name; take letters, digits, _, - and dots.")
    return value


def _overrides(path: Path, where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise UserError(f"{path}: {where} must be a list of texts, e.g. [regularizer=none, 'data.size=[96,128]'].")
    check_overrides(f"{path}: {where}", value)
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
        raise UserError(f"{path}: singles.tasks must be a list of different tasks.")
    for task in value:
        if task not in TASK_NAMES:
            raise UserError(f"{path}: singles.tasks: {task} is no task; choose among {', '.join(TASK_NAMES)}.")
    return tuple(value)
