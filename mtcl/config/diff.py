"""Compare the config of a run with that of its checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

from mtcl.config.renamed import upgrade_config
from mtcl.config.schema import LEGACY_VALUES, flatten, is_extendable, may_differ_on_resume


def _flatten_both(saved: Mapping[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both configs as dotted key -> value; the saved one may be older than the names of today's keys."""
    return dict(flatten(upgrade_config(saved))), dict(flatten(now))


def find_changed_keys(
    saved: Mapping[str, Any], now: dict[str, Any], prefixes: Sequence[str] = ("",), with_extended: bool = False
) -> list[str]:
    """Return the keys that differ between a saved config and that of the run that continues it.

    Keys that may differ on resume are left out.

    Args:
        saved: nested config of the checkpoint; keys may have the names of an older version. A key that is younger
            than it has the value of what its run did (:data:`LEGACY_VALUES`).
        now: nested config of the run.
        prefixes: beginnings of the keys to compare.
        with_extended: report changes of the keys that may end the training later, too, as ``trainer.max_steps``.
    """
    old, new = (LEGACY_VALUES | values for values in _flatten_both(saved, now))
    keys = [key for key in {**old, **new} if key.startswith(tuple(prefixes))]
    keys = [key for key in keys if not may_differ_on_resume(key) or (with_extended and is_extendable(key))]
    # A model's own mean and std were filled in when it was saved.
    keys = [key for key in keys if not (key in ("backbone.mean", "backbone.std") and new.get(key) is None)]
    return [key for key in keys if old.get(key) != new.get(key)]


def find_changed_experiment_keys(saved: Mapping[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the keys whose change makes another run; those that the saved config lacks make none."""
    old, _ = _flatten_both(saved, now)
    return [key for key in find_changed_keys(saved, now, with_extended=True) if key in old]


def format_changes(saved: Mapping[str, Any], now: dict[str, Any], keys: Sequence[str]) -> str:
    """Return ``key is a, was b`` for each of the keys, as one text."""
    old, new = _flatten_both(saved, now)
    return "; ".join(f"{key} is {new.get(key)}, was {old.get(key)}" for key in keys)


def describe_changes(saved: Mapping[str, Any], now: dict[str, Any], prefixes: Sequence[str] = ("",)) -> str:
    """Return the differences below ``prefixes`` as one text, empty if there are none."""
    return format_changes(saved, now, find_changed_keys(saved, now, prefixes))
