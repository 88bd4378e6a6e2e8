"""Compare the config of a run with that of its checkpoint."""

from collections.abc import Sequence
from typing import Any

from mtcl.config.schema import LEGACY_VALUES, flatten, role_of

# Keys that change the arithmetic or the meaning of best.pt though not the experiment: a run that is resumed by its path
# tells of them, resume=auto takes no run that differs in them.
REPORTED_KEYS = ("trainer.channels_last", "trainer.deterministic", "trainer.monitor")


def may_differ(key: str) -> bool:
    """May an interrupted run differ in this key from the one that continues it?"""
    return key == "trainer.max_steps" or (role_of(key) in ("machine", "engine", "record") and key not in REPORTED_KEYS)


def find_changed_keys(
    saved: dict[str, Any], now: dict[str, Any], prefixes: Sequence[str] = ("",), max_steps: bool = False
) -> list[str]:
    """The keys below ``prefixes`` that differ, but for those that may; ``max_steps``: that one, too, if it does.

    A key younger than the saved config stands for what its run did (:data:`LEGACY_VALUES`).
    """
    before, after = LEGACY_VALUES | dict(flatten(saved)), LEGACY_VALUES | dict(flatten(now))
    keys = [key for key in {**before, **after} if key.startswith(tuple(prefixes))]
    keys = [key for key in keys if not may_differ(key) or (max_steps and key == "trainer.max_steps")]
    # A model's own mean and std were filled in when it was saved.
    keys = [key for key in keys if not (key in ("backbone.mean", "backbone.std") and after.get(key) is None)]
    return [key for key in keys if before.get(key) != after.get(key)]


def find_changed_experiment_keys(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the keys whose change makes another run; those that the saved config lacks make none."""
    known = dict(flatten(saved))
    return [key for key in find_changed_keys(saved, now, max_steps=True) if key in known]


def format_changes(saved: dict[str, Any], now: dict[str, Any], keys: Sequence[str]) -> str:
    """``key is a, was b``."""
    before, after = dict(flatten(saved)), dict(flatten(now))
    return "; ".join(f"{key} is {after.get(key)}, was {before.get(key)}" for key in keys)


def describe_changes(saved: dict[str, Any], now: dict[str, Any], prefixes: Sequence[str] = ("",)) -> str:
    return format_changes(saved, now, find_changed_keys(saved, now, prefixes))
