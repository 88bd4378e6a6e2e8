"""Read configs of earlier versions, some of whose keys and values have new names: most since 0.2.

Checkpoints, exported folders, run folders and recorded commands of before are read with today's names. On a command
line an old key is refused, and the message names the new one.
"""

from collections.abc import Mapping
from typing import Any

_OPTIONS = {
    "agree": "drop_conflicting_positives",
    "quotas": "class_balanced",
    "exclude": "excluded_pairs",
    "share": "projector_sharing",
    "pixels": "num_pixels",
    "tap": "feature",
    "sources": "source_tasks",
    "dim": "embed_dim",
    "hidden": "hidden_dim",
}
RENAMED_KEYS: dict[str, str] = {
    "regularizer.balance": "regularizer.weighting",
    "regularizer.until": "regularizer.stop_fraction",
    "regularizer.options.shuffle": "regularizer.options.source_labels",
    **{f"regularizer.options.{old}": f"regularizer.options.{new}" for old, new in _OPTIONS.items()},
    "balancing.contrast": "balancing.regularizer_as_objective",
    "balancing.contrast_as_objective": "balancing.regularizer_as_objective",
    "trainer.panels": "trainer.num_panels",
    "trainer.accumulate": "trainer.accumulate_grad_batches",
    "trainer.val_first": "trainer.validate_first",
    "trainer.unreadable": "trainer.on_unreadable",
    "trainer.max_skipped": "trainer.max_nonfinite_steps",
    "trainer.keep_interval": "trainer.keep_checkpoint_interval",
    "evaluation.quick": "evaluation.fast_boundaries",
    "evaluation.boundaries": "evaluation.score_boundaries",
    "data.labels": "data.label_assignment",
}
RENAMED_IN = dict.fromkeys(("balancing.contrast", "balancing.contrast_as_objective"), "0.3")  # version, where not 0.2
_STANDARD = {"field": "standard"}
RENAMED_VALUES: dict[str, dict[str, Any]] = {  # new key, or group -> old value -> new value
    "regularizer.weighting": {"gradient": "gradient_norm"},
    "balancing.regularizer_as_objective": {"objective": True, "outside": False},
    "data.normals_valid": _STANDARD,
    "evaluation.options.depth.protocol": _STANDARD,
    "evaluation.options.sal.protocol": _STANDARD,
    "loss": _STANDARD,
    "recipe": _STANDARD,
    "evaluation": _STANDARD,
}
_SHUFFLE = {"true": "random", "false": True}
# Old key -> old value as text -> new value, where a value is renamed only together with its key.
VALUES_OF_RENAMED_KEYS: dict[str, dict[str, Any]] = {"regularizer.options.shuffle": _SHUFFLE}


def upgrade_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a nested plain config with today's keys and values; what is not renamed stays in its place."""
    return _upgrade_group(config, "")


def upgrade_flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config of dotted keys (``{"trainer.panels": 4}``) with today's keys and values."""
    return {
        RENAMED_KEYS.get(key, key): _upgrade_value(key, RENAMED_KEYS.get(key, key), value)
        for key, value in config.items()
    }


def _upgrade_value(old_key: str, key: str, value: Any) -> Any:
    if old_key in VALUES_OF_RENAMED_KEYS:
        return VALUES_OF_RENAMED_KEYS[old_key].get(str(value).lower(), value)
    return RENAMED_VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value


def _upgrade_group(group: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    upgraded: dict[str, Any] = {}
    for name, value in group.items():
        key = RENAMED_KEYS.get(f"{prefix}{name}", f"{prefix}{name}")
        new_name = key.rpartition(".")[2] if key != f"{prefix}{name}" else name
        if new_name != name and new_name in group:  # the config has both keys: the value of today's counts
            continue
        if isinstance(value, Mapping):
            upgraded[new_name] = _upgrade_group(value, f"{key}.")
        else:
            upgraded[new_name] = _upgrade_value(f"{prefix}{name}", key, value)
    return upgraded


def upgrade_override(override: str) -> str:
    """Return a recorded override ``key=value`` with today's key and value.

    >>> upgrade_override("regularizer.balance=gradient")
    'regularizer.weighting=gradient_norm'
    >>> upgrade_override("seed=1")
    'seed=1'
    """
    typed, equals, text = override.partition("=")
    signs = typed[: len(typed) - len(typed.lstrip("+~"))]
    old = typed[len(signs) :]
    key = RENAMED_KEYS.get(old, old)
    if text not in (values := VALUES_OF_RENAMED_KEYS.get(old) or RENAMED_VALUES.get(key, {})):
        return f"{signs}{key}{equals}{text}"
    value = values[text]
    return f"{signs}{key}{equals}{str(value).lower() if isinstance(value, bool) else value}"


def explain_renamed_key(key: str) -> str | None:
    """Return the sentence for an old key on a command line; None for any other key."""
    if key not in RENAMED_KEYS:
        return None
    values = ", ".join(f"{old} is {str(new).lower()}" for old, new in VALUES_OF_RENAMED_KEYS.get(key, {}).items())
    version = RENAMED_IN.get(key, "0.2")
    return f"{key} is called {RENAMED_KEYS[key]} since version {version}; use that key" + (values and f" ({values})")


def explain_renamed_value(key: str, value: str) -> str | None:
    """Return the sentence for an old choice such as ``loss=field`` on a command line; None for any other."""
    if value not in RENAMED_VALUES.get(key, {}):
        return None
    return f"{key}={value} is called {upgrade_override(f'{key}={value}')} since version 0.2; use that"
