"""Show how far a loop is: a bar in a terminal, a plain line now and then in a file or pipe."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

T = TypeVar("T")

PLAIN_INTERVAL = 30.0  # seconds from one line to the next


class PlainProgress(Generic[T]):
    """Has what is used here of tqdm's bar, and prints lines that stand alone.

    A loop that takes less than the interval prints its end only, and that only where ``leave`` is set.

    Args:
        iterable: to loop over; None: :meth:`update` counts.
        total: number of items; None: that of the iterable, where it has one.
        desc: the beginning of each line.
        initial: items that were counted earlier.
        leave: print a line at the end, too.
        unit: of the count.
        disable: print nothing.
        interval: seconds from one line to the next.
    """

    def __init__(
        self,
        iterable: Iterable[T] | None = None,
        *,
        total: int | None = None,
        desc: str = "",
        initial: int = 0,
        leave: bool = True,
        unit: str = "",
        disable: bool = False,
        interval: float = PLAIN_INTERVAL,
    ):
        self.iterable = iterable
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total  # type: ignore[arg-type]
        self.desc, self.unit, self.leave, self.disable, self.interval = desc, unit, leave, disable, interval
        self.n = self.initial = self.last_n = initial
        self.postfix = ""
        self.start = self.last_print = time.monotonic()

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self.iterable or ():
                yield item
                self.update()

    def __enter__(self) -> "PlainProgress[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Count items; print a line where one is due."""
        self.n += count
        if not self.disable and time.monotonic() - self.last_print >= self.interval:
            self._print()

    def set_postfix_str(self, text: str) -> None:
        """Set the end of the next lines."""
        self.postfix = text

    def close(self) -> None:
        """Print the last line, unless it has just been printed."""
        if self.leave and not self.disable and self.n > self.last_n:
            self._print()
        self.disable = True

    def _print(self) -> None:
        self.last_print, self.last_n = time.monotonic(), self.n
        print(self.format_line(self.last_print - self.start), file=sys.stderr, flush=True)

    def format_line(self, seconds: float) -> str:
        """Return the line after so many seconds.

        >>> progress = PlainProgress(total=400, desc="train", unit="step", disable=True)
        >>> progress.update(100)
        >>> progress.set_postfix_str("loss 2.310")
        >>> progress.format_line(50.0)
        'train: 100/400 steps (25 %), 2.00 steps/s, 00:50 passed, 02:30 to go, loss 2.310'
        """
        unit = f" {self.unit}s" if self.unit else ""
        count = f"{self.n}{unit}" if not self.total else f"{self.n}/{self.total}{unit} ({100 * self.n // self.total} %)"
        parts = [f"{self.desc}: {count}"]
        if (speed := (self.n - self.initial) / max(seconds, 1e-9)) > 0:
            parts.append(f"{speed:.2f}{unit}/s" if speed >= 0.1 else f"{1 / speed:.1f} s/{self.unit or 'item'}")
        parts.append(f"{tqdm.format_interval(seconds)} passed")
        if self.total and speed > 0 and self.n < self.total:
            parts.append(f"{tqdm.format_interval((self.total - self.n) / speed)} to go")
        return ", ".join([*parts, *filter(None, [self.postfix])])


def progress_bar(iterable: Iterable[T] | None = None, **options: Any) -> Any:
    """Return tqdm's bar where the standard error is a terminal, else :class:`PlainProgress`.

    Args:
        iterable: to loop over; None: ``update()`` counts.
        options: ``total``, ``desc``, ``initial``, ``leave``, ``unit``, ``delay`` and ``disable``, as tqdm has them.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, mininterval=0.5, dynamic_ncols=True, **options)
    options.pop("delay", None)
    return PlainProgress(iterable, **options)


@contextlib.contextmanager
def logging_beside_bar() -> Iterator[None]:
    """Print log messages above the bar of a terminal instead of into it."""
    with logging_redirect_tqdm([logging.getLogger()]) if sys.stderr.isatty() else contextlib.nullcontext():
        yield
