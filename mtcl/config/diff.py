"""Compare the config of a run with that of its checkpoint."""

from collections.abc import Sequence
from typing import Any

from mtcl.config.schema import BEFORE_THE_KEY, leaves, role_of

# Keys that change the arithmetic or the meaning of best.pt though not the experiment: a run that is resumed by its path
# tells of them, resume=auto takes no run that differs in them.
TOLD = ("trainer.channels_last", "trainer.deterministic", "trainer.monitor")


def is_free(key: str) -> bool:
    """May an interrupted run differ in this key from the one that continues it?"""
    return key == "trainer.max_steps" or (role_of(key) in ("machine", "engine", "record") and key not in TOLD)


def changed_keys(
    saved: dict[str, Any], now: dict[str, Any], prefixes: Sequence[str] = ("",), max_steps: bool = False
) -> list[str]:
    """The keys below ``prefixes`` that differ, but for those that may; ``max_steps``: that one, too, if it does.

    A key younger than the saved config stands for what its run did (:data:`BEFORE_THE_KEY`).
    """
    before, after = BEFORE_THE_KEY | dict(leaves(saved)), BEFORE_THE_KEY | dict(leaves(now))
    keys = [key for key in {**before, **after} if key.startswith(tuple(prefixes))]
    keys = [key for key in keys if not is_free(key) or (max_steps and key == "trainer.max_steps")]
    # A model's own mean and std were filled in when it was saved.
    keys = [key for key in keys if not (key in ("backbone.mean", "backbone.std") and after.get(key) is None)]
    return [key for key in keys if before.get(key) != after.get(key)]


def changed_meanings(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the keys whose change makes another run; those that the saved config lacks make none."""
    known = dict(leaves(saved))
    return [key for key in changed_keys(saved, now, max_steps=True) if key in known]


def described_changes(saved: dict[str, Any], now: dict[str, Any], keys: Sequence[str]) -> str:
    """``key is a, was b``."""
    before, after = dict(leaves(saved)), dict(leaves(now))
    return "; ".join(f"{key} is {after.get(key)}, was {before.get(key)}" for key in keys)


def differences(saved: dict[str, Any], now: dict[str, Any], prefixes: Sequence[str] = ("",)) -> str:
    return described_changes(saved, now, changed_keys(saved, now, prefixes))
