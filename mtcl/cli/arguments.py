"""The words ``key=value`` of a script that has no config."""

import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtcl.errors import UserError


def parse(words: Sequence[str], keys: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """key -> value as ``keys[key]`` reads it (it raises ``ValueError`` for what it does not take)."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if key not in keys or not equals:
            close = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {close[0]}=?" if close else f"there are {', '.join(keys)}"
            raise UserError(f"{word}: {'no key of this script' if equals else 'not of the form key=value'}; {hint}")
        try:
            found[key] = keys[key](text.strip("'\""))
        except ValueError as error:
            raise UserError(f"{word}: {error}") from error
    return found


def path(text: str) -> Path:
    if not text:
        raise ValueError("give a path")
    return Path(os.path.expanduser(text))


def flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("give true or false")
    return text.lower() == "true"


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("give a whole number from 1 on")
    return int(text)


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError("give a number above 0")
    return number


def names(text: str) -> list[str]:
    """``a,b`` or ``[a,b]``."""
    return [part.strip() for part in text.strip("[]").split(",") if part.strip()]


def numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in names(text)]
    except ValueError:
        raise ValueError("give numbers, such as 0.75,1,1.25") from None


def choice(*known: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError(f"choose {', '.join(known)}")
        return text

    return read
