"""What a command writes to its terminal or into a pipe: nobody need read it, and no name in it steers the terminal."""

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from typing import Any, TextIO

from mtcl.errors import printable

GONE = (errno.EPIPE, errno.EIO)  # of a pipe that nobody reads any longer, of a terminal that was closed


class Outlasting:
    """A stream whose reader may go: what is written from then on is dropped, and the work goes on.

    Everything else is the wrapped stream's.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._is_terminal = stream.isatty()

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
            if error.errno not in GONE or (error.errno == errno.EIO and not self._is_terminal):
                raise
            with contextlib.suppress(OSError, ValueError):  # a stream of a test has no number
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def speak_utf8() -> None:
    """Start the command again in Python's UTF-8 mode where the locale knows ASCII only: else a path with other letters
    could neither be opened nor written down. Python itself does so in the locale C, unless it is told not to."""
    if sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"  # of processes that are started later
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


@contextlib.contextmanager
def outlasting_output() -> Iterator[None]:
    """Let the command outlast whoever reads its output; write what the terminal's alphabet lacks as escapes."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (stream and Outlasting(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Outlasting):
                stream.flush()
        sys.stdout, sys.stderr = before


class Printable(logging.Formatter):
    """Escapes what would steer the terminal, line by line: a table is a message of several lines."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def complain(text: str) -> None:
    """Write ``error: text`` to the terminal, a single line."""
    print(f"error: {printable(text)}", file=sys.stderr)
