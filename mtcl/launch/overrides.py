"""Overrides of train.py as launchers handle them: checked, merged, and freed of what belongs to a machine."""

import re
from collections.abc import Sequence
from pathlib import Path

from mtcl.config.schema import MACHINE, PATH_KEYS, RESULT, role_of
from mtcl.errors import UserError

LAUNCHER_KEYS = ("seed", "resume", "hydra.run.dir")  # set by studies and searches themselves
FILES = tuple(key for key in PATH_KEYS if role_of(key) == RESULT)  # that a result depends on, or keywords


def check_overrides(
    where: str, overrides: Sequence[str], launcher: str, reserved: Sequence[str] = LAUNCHER_KEYS
) -> None:
    """Raise ``UserError`` for a text that is no override of train.py, or sets a key that the launcher sets.

    Args:
        where: Where the overrides come from, for messages.
        overrides: ``key=value`` each.
        launcher: ``study`` or ``search``, for messages.
        reserved: The keys that it sets.
    """
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not re.fullmatch(r"(\+{0,2}|~)[\w./@:-]+", key) or not (equals or override.startswith("~")):
            raise UserError(f"{where}: {override!r} is no override; write key=value as for train.py.")
        if strip_prefix(key) in reserved:
            raise UserError(f"{where}: {override} is set by the {launcher} itself; leave it out.")


def strip_prefix(key: str) -> str:
    """Return a key without Hydra's ``+`` or ``~``."""
    return key.lstrip("+~")


def split_override(override: str) -> tuple[str, str]:
    """Return the key, without prefix, and the value."""
    key, _, value = override.partition("=")
    return strip_prefix(key), value


def merge_overrides(*lists: Sequence[str]) -> list[str]:
    """Concatenate overrides; of those for one key the last stays."""
    merged: dict[str, str] = {}
    for override in (override for overrides in lists for override in overrides):
        key, _ = split_override(override)
        merged.pop(key, None)
        merged[key] = override
    return list(merged.values())


def make_portable(overrides: Sequence[str]) -> list[str]:
    """Return overrides without those of a machine, such as folders and device; of files the name alone stays."""
    portable = []
    for override in merge_overrides(overrides):
        prefixed, equals, value = override.partition("=")
        key = strip_prefix(prefixed)
        if is_machine_key(key) or key.startswith("hydra."):
            continue
        portable.append(f"{prefixed}{equals}{Path(unquote(value)).name}" if is_file_path(key, value) else override)
    return portable


def is_machine_key(key: str) -> bool:
    """Is this a key of the machine or of the launcher, not of what is learned? The runs of a study may differ in it."""
    return key in LAUNCHER_KEYS or key == "name" or role_of(key) == MACHINE


def is_file_path(key: str, value: str) -> bool:
    """Is this value of a key the path of a file?"""
    text = unquote(value)
    return text.startswith(("/", "~/", "./", "../")) or (key in FILES and "/" in text)


def unquote(value: str) -> str:
    """Return a value without the quotes around it."""
    return value.strip("'\"")
