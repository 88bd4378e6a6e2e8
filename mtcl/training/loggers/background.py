"""Send records to a server in a thread, so that neither its speed nor its errors reach the training."""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mtcl.errors import first_line
from mtcl.training.loggers.base import Hparams, MetricLogger

log = logging.getLogger(__name__)

MAX_SCALARS = 100_000  # records that wait for a server; about as many bytes per record as numbers times 100
MAX_IMAGES = 64  # images that wait; each has megabytes


@dataclass(frozen=True)
class Scalars:
    """Numbers of one step."""

    step: int
    values: Mapping[str, float]
    time: float = field(default_factory=time.time)  # in seconds since 1970


@dataclass(frozen=True)
class PanelImage:
    """An image, uint8 (H, W, 3)."""

    step: int
    name: str
    image: np.ndarray
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Result:
    """Holds what a finished run was started with, and its scores."""

    step: int
    hparams: Hparams
    scores: Mapping[str, float]
    time: float = field(default_factory=time.time)


Record = Scalars | PanelImage | Result


class Identity(NamedTuple):
    """Names a run on the server.

    Attributes:
        name: of the run.
        parameters: dotted key -> value of the run's config.
        start_step: the step from which it is resumed; 0 for a new run.
    """

    name: str
    parameters: Mapping[str, object] = {}
    start_step: int = 0


class BackgroundLogger(MetricLogger, ABC):
    """A logger whose records are sent by a thread.

    Where the server does not answer, there is one warning in the whole run. Numbers wait, and are sent once it
    answers; an image is tried once. At the end of the run the thread gets :attr:`close_seconds` for what waits; the
    process does not wait longer, and what was not sent is counted in :meth:`describe`.

    Subclasses implement :meth:`connect`, :meth:`send` and :meth:`finish`, which only the thread calls, and which may
    raise anything.
    """

    title: str  # of the server, for messages
    retry_seconds = 30.0
    close_seconds = 60.0

    def __init__(self) -> None:
        self.waiting: deque[Record] = deque()
        self.num_lost = 0
        self.reason = ""  # of the first failure
        self.has_work, self.is_closing = threading.Event(), threading.Event()
        self.ends_well = False
        self.thread = threading.Thread(target=self._work, name=f"{self.title} logger", daemon=True)

    @property
    def subject(self) -> str:  # type: ignore[override]
        """Return what a warning is about, in the plural."""
        return f"records of {self.title}"

    @abstractmethod
    def connect(self) -> None:
        """Begin or continue the run on the server; called again after it has raised."""

    @abstractmethod
    def send(self, record: Record) -> None:
        """Send a record."""

    @abstractmethod
    def finish(self, is_finished: bool) -> None:
        """Tell the server that the run has ended."""

    @abstractmethod
    def locate(self) -> str:
        """Return where the server shows the run."""

    def refuses(self, error: Exception) -> bool:  # noqa: ARG002
        """Return whether an error of :meth:`send` is about the record, so that sending it again is of no use."""
        return False

    def open(self) -> None:
        """Start the thread."""
        self.thread.start()

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Queue numbers."""
        self._put(Scalars(step, dict(values)))

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Queue an image."""
        self._put(PanelImage(step, name, image))

    def log_result(self, step: int, hparams: Hparams, scores: Mapping[str, float]) -> None:
        """Queue the result."""
        self._put(Result(step, dict(hparams), dict(scores)))

    def close(self, is_finished: bool) -> None:
        """Let the thread send what waits, for a limited time."""
        self.ends_well = is_finished
        self.is_closing.set()
        self.has_work.set()
        if self.thread.ident is not None:
            self.thread.join(self.close_seconds)

    def describe(self) -> str:
        """Return where the run is shown, or how many records did not get there and why."""
        missing = self.num_lost + len(self.waiting)
        if not missing and not (self.reason and self.thread.is_alive()):
            return self.locate()
        return f"{missing} records were not sent to {self.title} ({self.reason or 'it takes too long'})"

    def _put(self, record: Record) -> None:
        limit, kind = (MAX_IMAGES, PanelImage) if isinstance(record, PanelImage) else (MAX_SCALARS, Scalars)
        if len(self.waiting) >= limit and sum(isinstance(one, kind) for one in list(self.waiting)) >= limit:
            self.num_lost += 1
        else:
            self.waiting.append(record)
        self.has_work.set()

    def _work(self) -> None:
        """Send until the logger is closed and nothing waits, or nothing can be sent any more."""
        is_connected = False
        while True:
            try:
                if not is_connected:
                    self.connect()
                    is_connected = True
                self._send_waiting()
                if self.is_closing.is_set() and not self.waiting:
                    self.finish(self.ends_well)
                    return
            except Exception as error:  # of any library and server
                self._report(error)
                if self.is_closing.is_set():
                    return
                self.is_closing.wait(self.retry_seconds)
                continue
            self.has_work.wait()
            self.has_work.clear()

    def _send_waiting(self) -> None:
        while self.waiting:
            record = self.waiting[0]
            try:
                self.send(record)
            except Exception as error:
                if not (isinstance(record, PanelImage) or self.refuses(error)):
                    raise
                self.num_lost += 1
                self._report(error)
            self.waiting.popleft()

    def _report(self, error: Exception) -> None:
        if not self.reason:
            self.reason = first_line(error)
            log.warning(
                "%s takes no records (%s): the training goes on, numbers wait and are sent once it does; the run's log "
                "has all of them",
                self.title,
                self.reason,
            )
