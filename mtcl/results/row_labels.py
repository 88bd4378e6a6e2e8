"""Name the rows of a table by the settings in which they differ."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mtcl.results.runs import Run, differing_keys

MAX_KEYS = 3  # in a row's name


def make_labels(
    settings: Sequence[Mapping[str, Any]],
    choices: Sequence[Mapping[str, str]],
    use_all_keys: bool,
    notes: list[str],
) -> list[str]:
    """Return a name for each row, made of the keys in which the rows differ.

    The keys of a group follow the group's choice (``regularizer=none``), and only if the choice alone is not enough.

    Args:
        settings: dotted key -> value of each row.
        choices: config group -> choice of each row, as typed on its command line.
        use_all_keys: name all keys if the rows differ in none.
        notes: gets a note if the names leave differing keys out.

    Returns:
        A name per row; "" for a row that nothing distinguishes.
    """
    keys = differing_keys(settings)
    if use_all_keys and not keys:
        keys = list(settings[0]) if settings else []
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.partition(".")[0], []).append(key)
    parts: list[list[str]] = []
    for group, group_keys in groups.items():
        parts += _label_group(group, group_keys, settings, choices)
    if len(parts) > MAX_KEYS:
        needed = _drop_redundant(sorted(parts, key=_names_single_key))
        if len(needed) < len(parts):
            names = [f"{group}.*" if group not in group_keys else group for group, group_keys in groups.items()]
            notes.append(f"The rows differ in more than their names say, in keys of {', '.join(names)}.")
            parts = needed
    return [", ".join(text for part in parts if (text := part[i])) for i in range(len(settings))]


def _label_group(
    group: str, keys: Sequence[str], settings: Sequence[Mapping[str, Any]], choices: Sequence[Mapping[str, str]]
) -> list[list[str]]:
    """Return what the names say of one config group: parts of a text per row, "" where it adds nothing."""
    group_choices, choice_key = _choose_group_names(group, keys, settings, choices)
    parts = [[f"{group}={text}" for text in group_choices]] if group_choices else []
    for key in (key for key in keys if key != choice_key):
        part = []
        for i, one in enumerate(settings):
            same_choice = [
                other for j, other in enumerate(settings) if not group_choices or group_choices[j] == group_choices[i]
            ]
            is_needed = not group_choices or len({format_setting(other.get(key)) for other in same_choice}) > 1
            part.append(f"{key}={format_setting(one.get(key))}" if is_needed else "")
        if any(part):
            parts.append(part)
    return parts


def _choose_group_names(
    group: str, keys: Sequence[str], settings: Sequence[Mapping[str, Any]], choices: Sequence[Mapping[str, str]]
) -> tuple[list[str], str]:
    """Return the choice of a group in each row, as typed or else its class or name, and the key that it replaces."""
    typed = [choice.get(group, "") for choice in choices]
    if group not in keys and all(typed) and (len(set(typed)) > 1 or len(typed) == 1):
        return typed, ""
    for key in (f"{group}._target_", f"{group}.name"):
        if key in keys:
            return [_to_snake_case(one.get(key)) for one in settings], key
    return [], ""


def _to_snake_case(target: Any) -> str:
    """Return ``mtcl.models.decoders.MultiHead`` as ``multi_head``, and any other name unchanged."""
    text = "none" if target is None else str(target)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text.rpartition(".")[2]).lower() if text.startswith("mtcl.") else text


def _names_single_key(part: Sequence[str]) -> bool:
    """Does this part of the names give a single key, not the choice of a group?"""
    return any("." in text.partition("=")[0] for text in part)


def _drop_redundant(parts: Sequence[list[str]]) -> list[list[str]]:
    """Return the parts that distinguish rows which the parts before them do not."""
    needed: list[list[str]] = []
    for part in parts:
        if len(set(zip(*needed, part))) > (len(set(zip(*needed))) if needed else 1):
            needed.append(part)
    return needed


def typed_choices(run: Run) -> dict[str, str]:
    """Return the ``group=choice`` overrides of the run's command as group -> choice."""
    pairs = [str(override).partition("=")[::2] for override in run.record.get("overrides", ())]
    return {key: value for key, value in pairs if any(k.startswith(f"{key}.") for k in run.config)}


def format_setting(value: Any) -> str:
    """Return a config value as one types it on a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(format_setting, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def unique_name(run: Run, runs: Sequence[Run]) -> str:
    """Return the name of a run's folder or file, or its path if others of ``runs`` have the same name."""
    return run.name if sum(other.name == run.name for other in runs) == 1 else str(run.path)
