"""Write paths as a shell's user and Hydra's grammar mean them."""

import os
import re
from pathlib import Path


def quote_value(folder: str | Path) -> str:
    r"""A path as Hydra's grammar reads it, where a backslash is escaped only before a quote.

    >>> print(quoted("/a/b-1"), quoted("/a=b"), quoted("it's"), quoted("a\\b"))
    /a/b-1 '/a=b' 'it\'s' 'a\b'
    """
    text = str(folder)
    if re.fullmatch(r"[\w./-]+", text, re.ASCII) and not _is_no_text(text):
        return text
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def _is_no_text(text: str) -> bool:
    """Does Hydra read a number, a truth value or null?"""
    return bool(re.fullmatch(r"true|false|null|nan|inf|[-+]?[\d_.]+(e[-+]?\d+)?", text, re.IGNORECASE))


def expand_tilde(word: str) -> str:
    """Return ``word`` with the home folder for a ``~`` that begins it or its value, as shells do it only in part.

    ``~key`` (Hydra: take the key out) is kept, as is the ``~`` of a name's backup, ``name~``.
    """
    if word == "~" or word.startswith("~/"):
        return os.path.expanduser(word)
    head, equals, text = word.partition("=")
    quote = text[:1] if text[:1] in ("'", '"') else ""
    if not equals or not text.startswith(f"{quote}~"):
        return word
    return f"{head}={quote}{os.path.expanduser(text[len(quote) :])}"
