"""What a run leaves behind: TensorBoard, a line per record in ``log.jsonl``, panels, metrics."""

import contextlib
import errno
import json
import logging
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.utils.tensorboard import SummaryWriter

from mtcl.atomic import convert_disk_errors, replace_non_finite, write_atomically
from mtcl.evaluation.evaluator import Metrics, VisualSample
from mtcl.run_log import NAME, read_lines
from mtcl.tasks.base import Task
from mtcl.visualization.panels import LAYOUT_KEY, draw_panel, panel_layout

log = logging.getLogger(__name__)

DAMAGED = "log.damaged.jsonl"  # beside a log: its lines that are no records


class RunLogger:
    """Writes into one run folder, nothing before the first record.

    A run resumed at ``start_step`` writes what comes after it anew, so an interrupted run's records from there on are
    dropped. A folder that vanishes in mid-run, or a disk that is full, is told once and ends nothing: records wait
    until they can be written.
    """

    def __init__(self, folder: Path, start_step: int = 0):
        self.folder, self.start_step = folder, start_step
        self.log = folder / NAME
        self.waiting: list[str] = []  # lines that the disk did not take yet
        self.told: set[str] = set()

    @cached_property
    def writer(self) -> "SummaryWriter | NullSummaryWriter":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep_earlier_records()
        return self._curves(self.start_step + 1 if self.start_step else None)

    def _curves(self, purge_step: int | None = None) -> "SummaryWriter | NullSummaryWriter":
        """TensorBoard's writer; a silent one where the folder is none for it."""
        try:
            return _summary_writer(self.folder, purge_step)
        except (OSError, UnicodeError) as error:  # a name that is not UTF-8
            self._tell(f"TensorBoard's curves are not written ({error_reason(error)})", once="curves")
            return NullSummaryWriter()

    def _keep_earlier_records(self) -> None:
        """Rewrite the log with the records before ``start_step``; move damaged lines into a file beside it."""
        aside = self.log.with_name(DAMAGED)
        damaged = 0

        def write(temporary: Path) -> None:
            nonlocal damaged
            with temporary.open("wb") as kept, contextlib.ExitStack() as stack:
                for line in read_lines(self.log) if self.start_step else ():
                    if line.record is None:
                        if not damaged:
                            rest = stack.enter_context(os.fdopen(_open_to_append(aside), "ab"))
                        rest.write(line.data if line.data.endswith(b"\n") else line.data + b"\n")
                        damaged += 1
                    elif _is_before(line.record, self.start_step):
                        kept.write(line.data)

        with convert_disk_errors(self.log):
            write_atomically(self.log, write)
        if damaged:
            lines = f"{damaged} damaged line{'s' * (damaged > 1)}"
            log.warning("%s had %s: moved to %s, training goes on", self.log, lines, aside.name)

    def log_scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """``kind`` is ``train``, ``contrast`` or ``val``; ``values`` by name, NaN where nothing was seen."""
        self._ready()
        with self._curves_may_fail():
            for name, value in values.items():
                if not math.isnan(value):
                    self.writer.add_scalar(f"{kind}/{name}", value, step)
        self._append(json.dumps(replace_non_finite({"step": step, "kind": kind, **values}), allow_nan=False))

    def log_event(self, step: int, kind: str, content: Mapping[str, Any]) -> None:
        """A record of another kind than numbers: plain containers."""
        self._ready()
        self._append(json.dumps({"step": step, "kind": kind, **content}))

    def log_panels(self, step: int, shown: Sequence[VisualSample], tasks: Mapping[str, Task]) -> None:
        self._ready()
        try:
            panels = write_panels(self.folder / "panels", shown, tasks)
        except OSError as error:
            self._tell(f"pictures of step {step} are not written ({error.strerror or error})", once="panels")
            return
        with self._curves_may_fail():
            for sample, panel in zip(shown, panels):
                self.writer.add_image(f"panel/{sample.id}", panel, step, dataformats="HWC")

    def close(self) -> None:
        if self.waiting:
            self._append()
        if "writer" in self.__dict__:
            with self._curves_may_fail():
                self.writer.close()

    def _ready(self) -> None:
        """The folder is there, with its log, or made anew."""
        if "writer" not in self.__dict__:
            self.writer  # noqa: B018 - makes it
        elif not self.log.exists():
            before = set(self.folder.glob("events.*"))
            with contextlib.suppress(OSError):
                self.writer.close()
            for rest in set(self.folder.glob("events.*")) - before:  # the end of a file whose beginning is gone
                rest.unlink(missing_ok=True)
            message = f"{self.folder} vanished in mid-run: records go on in a new one, the earlier ones are lost"
            self._tell(message, once="vanished")
            with self._curves_may_fail():
                self.folder.mkdir(parents=True, exist_ok=True)
                self.log.touch()
                self.told.discard("vanished")
                self.__dict__["writer"] = self._curves()

    def _append(self, *lines: str) -> None:
        """Add lines to the log, behind those that wait; whole or not at all."""
        self.waiting += [f"{line}\n" for line in lines]
        data = "".join(self.waiting).encode()
        try:
            with self.log.open("ab", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                try:
                    if file.write(data) < len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            self._tell(f"{self.log} can't be written ({error.strerror or error}): records wait", once="records")
            return
        self.waiting.clear()
        self.told.discard("records")

    @contextlib.contextmanager
    def _curves_may_fail(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UnicodeError) as error:
            self._tell(f"TensorBoard's curves are not written ({error_reason(error)})", once="curves")

    def _tell(self, message: str, once: str) -> None:
        if once not in self.told:
            log.warning("%s", message)
        self.told.add(once)


def _open_to_append(path: Path) -> int:
    """Open a file to append to; ``OSError`` for a FIFO without a reader, which would block otherwise."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)


class NullSummaryWriter:
    """Takes what TensorBoard's writer takes, and writes nothing."""

    def add_scalar(self, *_: Any, **__: Any) -> None: ...

    def add_image(self, *_: Any, **__: Any) -> None: ...

    def close(self) -> None: ...


def error_reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _summary_writer(folder: Path, purge_step: int | None = None) -> SummaryWriter:
    """What its thread meets on a bad disk comes out of the next call; the thread itself is not to print a trace."""
    before = threading.excepthook
    if before is not _excepthook:
        _excepthooks.append(before)
        threading.excepthook = _excepthook
    return SummaryWriter(str(folder), purge_step=purge_step)


_excepthooks: list[Any] = [threading.__excepthook__]


def _excepthook(told: threading.ExceptHookArgs) -> None:
    if not (isinstance(told.exc_value, OSError) and type(told.thread).__module__.startswith("tensorboard.")):
        _excepthooks[-1](told)


def write_panels(folder: Path, shown: Sequence[VisualSample], tasks: Mapping[str, Task]) -> list[np.ndarray]:
    """One PNG per sample, ``folder/<id>.png``, with its layout as a text of it; the pictures themselves (uint8 RGB)."""
    panels = [draw_panel(sample, tasks) for sample in shown]
    for sample, panel in zip(shown, panels):
        name = re.sub(r"[^\w.-]", "_", sample.id)
        layout = PngInfo()
        layout.add_text(LAYOUT_KEY, json.dumps(panel_layout(sample, tasks)))

        def write(temporary: Path, panel: np.ndarray = panel, layout: PngInfo = layout) -> None:
            Image.fromarray(panel).save(temporary, "PNG", pnginfo=layout)

        write_atomically(folder / f"{name}.png", write, durable=False)
    return panels


def flatten_metrics(metrics: Metrics) -> dict[str, float]:
    """task -> metric -> value as ``task/metric`` -> value."""
    return {f"{task}/{name}": value for task, values in metrics.items() for name, value in values.items()}


def _is_before(record: Mapping[str, Any], start_step: int) -> bool:
    """Step s's losses are of the update from s to s + 1, its validation is of the state before that update."""
    return record["step"] < start_step or (record["kind"] == "val" and record["step"] == start_step > 0)
