"""Quote values for Hydra's override grammar and expand ``~`` in overrides."""

import os
import re
from pathlib import Path


def quote_value(folder: str | Path) -> str:
    r"""Return a path as Hydra's grammar reads it, where a backslash is escaped only before a quote.

    >>> print(quote_value("/a/b-1"), quote_value("/a=b"), quote_value("it's"), quote_value("a\\b"))
    /a/b-1 '/a=b' 'it\'s' 'a\b'
    """
    text = str(folder)
    if re.fullmatch(r"[\w./-]+", text, re.ASCII) and not _is_no_text(text):
        return text
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def _is_no_text(text: str) -> bool:
    """Return whether Hydra reads a number, a truth value or null."""
    return bool(re.fullmatch(r"true|false|null|nan|inf|[-+]?[\d_.]+(e[-+]?\d+)?", text, re.IGNORECASE))


def expand_tilde(argument: str) -> str:
    """Return an argument with the home folder for a ``~`` that begins it or its value, which shells do only in part.

    ``~key`` (Hydra: take the key out) is kept, as is the ``~`` of a name's backup, ``name~``.
    """
    if argument == "~" or argument.startswith("~/"):
        return os.path.expanduser(argument)
    head, equals, text = argument.partition("=")
    quote = text[:1] if text[:1] in ("'", '"') else ""
    if not equals or not text.startswith(f"{quote}~"):
        return argument
    return f"{head}={quote}{os.path.expanduser(text[len(quote) :])}"
