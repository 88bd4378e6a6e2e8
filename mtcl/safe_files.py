"""Read small files of strangers safely: regular files only, of bounded size, nesting and number range.

Any problem is a :class:`UserError` of one sentence that names the file, never another exception. Reading never blocks:
a FIFO or a device is refused before it is read.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import yaml

from mtcl.errors import UserError

MAX_BYTES = 64 << 20
MAX_DEPTH = 40
MAX_ITEMS = 2_000_000
MAX_YAML = 1 << 20  # bytes of a YAML file
MAX_DIGITS = 18  # of an integer: what fits 64 bits


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading bytes, without waiting for a writer of a FIFO; links are followed.

    Raises:
        UserError: it does not exist, can't be read, or is a folder, a FIFO, a socket or a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not a regular file (a folder, FIFO, socket or device); give a file")
    return open(descriptor, "rb")


def read_bytes(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file; links are followed.
        max_bytes: the largest size that is read.

    Raises:
        UserError: it does not exist, can't be read, is larger, or is a folder, a FIFO, a socket or a device.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise UserError(f"{path} has {size:,} bytes, more than the {max_bytes:,} that such a file may have")
        try:
            content = file.read(size + 1)  # not max_bytes + 1, which would be allocated first
            if len(content) > size:  # it grows, or its system does not tell sizes
                content += file.read(max_bytes + 1 - len(content))
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror})") from error
    if len(content) > max_bytes:
        raise UserError(f"{path} has more than the {max_bytes:,} bytes that such a file may have")
    return content


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    """Return the content of a regular UTF-8 file; see :func:`read_bytes` for what is refused."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a UTF-8 text ({error.reason} at byte {error.start})") from error


def read_json(path: str | Path, max_bytes: int = MAX_BYTES) -> Any:
    """Return the content of a JSON file; see :func:`parse_json` for what is refused."""
    return parse_json(read_text(path, max_bytes), path)


def parse_json(text: str | bytes, path: str | Path) -> Any:
    """Return the content of JSON ``text``: plain containers nested at most :data:`MAX_DEPTH` deep.

    Args:
        text: JSON, also with NaN and Infinity as Python writes them.
        path: where it comes from, for the message.

    Raises:
        UserError: it is no JSON, is nested too deep, or has an integer of more than :data:`MAX_DIGITS` digits.
    """

    def parse_int(digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_DIGITS:
            raise UserError(f"{path} holds a whole number of {len(digits)} digits; the largest has {MAX_DIGITS}")
        return int(digits)

    try:
        content = json.loads(text, parse_int=parse_int)
    except RecursionError as error:
        raise UserError(f"{path} is nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:  # also a text that is not UTF-8
        raise UserError(f"{path} is not a readable JSON file: {error}") from error
    check_depth(content, path)
    return content


def check_depth(content: Any, path: str | Path) -> None:
    """Check that containers are not nested too deep and do not hold too many items.

    Raises:
        UserError: they are nested more than :data:`MAX_DEPTH` deep, hold themselves, or hold more than
            :data:`MAX_ITEMS` items, counted as often as they occur.
    """
    kinds = (dict, list, tuple)
    level: list[Any] = [content] if isinstance(content, kinds) else []
    total = 0
    for _ in range(MAX_DEPTH + 1):
        total += sum(map(len, level))
        if total > MAX_ITEMS:
            raise UserError(f"{path} holds more than {MAX_ITEMS:,} values")
        level = [
            child
            for item in level
            for child in (dict.values(item) if isinstance(item, dict) else item)
            if isinstance(child, kinds)
        ]
        if not level:
            return
    raise UserError(f"{path} is nested deeper than {MAX_DEPTH} levels")


_NUMBER = re.compile(r"[-+0-9_:.]{60,}")  # a long one may take long to read: 1:1:1:... is a number to base 60


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A loader that reads as OmegaConf's, thirty times as fast: 1e-3 is a number, a date is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML has it
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*\.?[\d_]*[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file: plain containers without anchors, nested at most :data:`MAX_DEPTH` deep.

    Raises:
        UserError: it is no YAML, is nested too deep, or has an alias (``*name``), which could make it grow without end.
    """
    text = read_text(path, MAX_YAML)
    try:
        _check_events(text, path)
        content = yaml.load(text, _Loader)
    except UserError:
        raise
    except Exception as error:  # of YAML itself, or of converting odd numbers and dates
        _refuse_yaml(path, error)
    check_depth(content, path)
    return content


def _check_events(text: str, path: str | Path) -> None:
    """Check the events of a YAML text before it is composed, for that is recursive and expands aliases."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{path} has an alias (*{event.anchor}); write its value out")
        if isinstance(event, yaml.ScalarEvent) and not event.style and _NUMBER.fullmatch(event.value):
            raise UserError(f"{path} has a number of {len(event.value):,} digits; the largest has {MAX_DIGITS}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UserError(f"{path} is nested deeper than {MAX_DEPTH} levels")


def _refuse_yaml(path: str | Path, error: Exception) -> NoReturn:
    raise UserError(f"{path} is not a readable YAML file: {' '.join(str(error).split())}") from error
