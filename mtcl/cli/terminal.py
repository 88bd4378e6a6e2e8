"""Write to a terminal or into a pipe: nobody need read it, and no name in it steers the terminal."""

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from typing import Any, TextIO

from mtcl.errors import escape_control_characters

DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)


class ToleratingStream:
    """A stream whose reader may go: what is written from then on is dropped, and the work goes on.

    Everything else is the wrapped stream's.

    Args:
        stream: the standard output, or that of errors.
        also: errors of the system on which it is given up, besides those of a closed pipe or terminal.
    """

    def __init__(self, stream: TextIO, extra_errors: Sequence[int] = ()):
        self._stream = stream
        self._gone = (errno.EPIPE, *((errno.EIO,) if stream.isatty() else ()), *extra_errors)

    def write(self, text: str) -> int:
        with self._may_be_gone():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._may_be_gone():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _may_be_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in self._gone:
                raise
            with contextlib.suppress(OSError, ValueError):  # a stream of a test has no number
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def ensure_utf8() -> None:
    """Start the command again in Python's UTF-8 mode where the locale knows ASCII only: else a path with other letters
    could neither be opened nor written down. Python itself does so in the locale C, unless it is told not to."""
    if sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"  # of processes that are started later
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


@contextlib.contextmanager
def tolerate_closed_output(extra_errors: Sequence[int] = ()) -> Iterator[None]:
    """Let the command outlast whoever reads its output; write what the terminal's alphabet lacks as escapes.

    ``also``: see :class:`ToleratingStream`.
    """
    before = sys.stdout, sys.stderr
    streams = [_opened(1) if sys.stdout is None else sys.stdout, _opened(2) if sys.stderr is None else sys.stderr]
    for stream in streams:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (ToleratingStream(stream, extra_errors) for stream in streams)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, ToleratingStream):
                stream.flush()
        sys.stdout, sys.stderr = before


def _opened(number: int) -> TextIO:
    """A stream to nowhere for one that was closed before the start; else a file that is opened next has its number, and
    takes in what a library prints."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(number)
    except OSError:
        os.dup2(nowhere, number)
    return os.fdopen(nowhere, "w", encoding="utf-8")


class EscapingFormatter(logging.Formatter):
    """Escapes what would steer the terminal, line by line: a table is a message of several lines."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(escape_control_characters, super().format(record).split("\n")))


def print_error(text: str) -> None:
    """Write ``error: text`` to the terminal, a single line."""
    print(f"error: {escape_control_characters(text)}", file=sys.stderr)
