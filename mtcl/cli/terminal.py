"""Write to a terminal or a pipe that may be closed, and escape what would control the terminal."""

import contextlib
import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from typing import Any, TextIO

from mtcl.errors import escape_control_characters

DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
QUIET_SECONDS = 2.0  # a command that says nothing for longer looks as if it hung
announced: set[str] = set()  # what a line has said to be loading


class ToleratingStream:
    """A standard stream that drops what is written once its reader has closed it, so that the work goes on.

    Args:
        stream: standard output or standard error.
        extra_errors: numbers of system errors after which output is dropped, besides those of a closed pipe or
            terminal.
    """

    def __init__(self, stream: TextIO, extra_errors: Sequence[int] = ()):
        self._stream = stream
        self._tolerated = (errno.EPIPE, *((errno.EIO,) if stream.isatty() else ()), *extra_errors)

    def write(self, text: str) -> int:
        """Write, or drop, a text; return its length."""
        with self._tolerate_errors():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream unless its reader has closed it."""
        with self._tolerate_errors():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _tolerate_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in self._tolerated:
                raise
            with contextlib.suppress(OSError, ValueError):  # a stream of a test has no number
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def ensure_utf8() -> None:
    """Restart the command in Python's UTF-8 mode if the locale knows ASCII only.

    Otherwise a path with other letters could neither be opened nor printed. Python does so by itself in the locale C,
    unless it is configured not to.
    """
    if sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"  # of processes that are started later
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


@contextlib.contextmanager
def tolerate_closed_output(extra_errors: Sequence[int] = ()) -> Iterator[None]:
    """Keep a command running when its output is closed; write what the terminal's encoding lacks as escapes.

    Args:
        extra_errors: see :class:`ToleratingStream`.
    """
    originals = sys.stdout, sys.stderr
    streams = [_open_null(1) if sys.stdout is None else sys.stdout, _open_null(2) if sys.stderr is None else sys.stderr]
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
        sys.stdout, sys.stderr = originals


@contextlib.contextmanager
def announce_loading(name: str) -> Iterator[None]:
    """Print a line to standard error where the body, imports of a large package, takes longer than a moment, once.

    Args:
        name: of the package or the command that is loaded, for the line.
    """

    def announce() -> None:
        if name not in announced:
            announced.add(name)
            print(f"loading {name}, which can take a few seconds", file=sys.stderr, flush=True)

    timer = threading.Timer(QUIET_SECONDS, announce)
    timer.daemon = True
    if int(os.environ.get("RANK", "0")) == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _open_null(number: int) -> TextIO:
    """Return a stream to nowhere in place of one that was closed before the start.

    Otherwise the next file that is opened gets its number, and what a library prints would go into that file.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(number)
    except OSError:
        os.dup2(nowhere, number)
    return os.fdopen(nowhere, "w", encoding="utf-8")


class EscapingFormatter(logging.Formatter):
    """A formatter that escapes control characters line by line: a table is a message of several lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the formatted record with control characters escaped."""
        return "\n".join(map(escape_control_characters, super().format(record).split("\n")))


def print_error(text: str) -> None:
    """Print ``error: text`` to standard error as a single line."""
    print(f"error: {escape_control_characters(text)}", file=sys.stderr)
