"""Write a run's log: TensorBoard curves, a line per record in ``log.jsonl``, and panels."""

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
from mtcl.run_folder import RunFolder
from mtcl.run_log import read_lines
from mtcl.tasks.base import Task
from mtcl.visualization.panel_format import LAYOUT_KEY
from mtcl.visualization.panels import draw_panel, panel_layout

log = logging.getLogger(__name__)

DAMAGED = "log.damaged.jsonl"  # beside a log: its lines that are no records


class RunLogger:
    """Writes losses, metrics, events and panels into a run folder; nothing before the first record.

    If the folder vanishes during the run, or the disk is full, there is one warning and the run continues: records
    wait until they can be written.

    Args:
        folder: the run folder.
        start_step: the step from which the run is resumed; records of an interrupted run from there on are dropped.
    """

    def __init__(self, folder: Path, start_step: int = 0):
        self.folder, self.start_step = folder, start_step
        self.log = RunFolder(folder).log
        self.waiting: list[str] = []  # lines that the disk did not take yet
        self.warned: set[str] = set()

    @cached_property
    def writer(self) -> "SummaryWriter | NullSummaryWriter":
        """Return TensorBoard's writer; the first call creates the folder and rewrites the log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep_earlier_records()
        return self._make_writer(self.start_step + 1 if self.start_step else None)

    def _make_writer(self, purge_step: int | None = None) -> "SummaryWriter | NullSummaryWriter":
        """Return TensorBoard's writer; one that writes nothing where it can't write into the folder."""
        try:
            return _summary_writer(self.folder, purge_step)
        except (OSError, UnicodeError) as error:  # a name that is not UTF-8
            self._warn_once(f"TensorBoard's curves are not written ({error_reason(error)})", topic="curves")
            return NullSummaryWriter()

    def _keep_earlier_records(self) -> None:
        """Rewrite the log with the records before ``start_step``; move damaged lines into a file beside it."""
        aside = self.log.with_name(DAMAGED)
        damaged = 0

        def write(temporary: Path) -> None:
            nonlocal damaged
            with temporary.open("wb") as file, contextlib.ExitStack() as stack:
                for line in read_lines(self.log) if self.start_step else ():
                    if line.record is None:
                        if not damaged:
                            rest = stack.enter_context(os.fdopen(_open_to_append(aside), "ab"))
                        rest.write(line.data if line.data.endswith(b"\n") else line.data + b"\n")
                        damaged += 1
                    elif _is_before(line.record, self.start_step):
                        file.write(line.data)

        with convert_disk_errors(self.log):
            write_atomically(self.log, write)
        if damaged:
            lines = f"{damaged} damaged line{'s' * (damaged > 1)}"
            log.warning("%s had %s: moved to %s, training goes on", self.log, lines, aside.name)

    def log_scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Log numbers.

        Args:
            step: of the record.
            kind: ``train``, ``labelled_images``, ``contrast``, ``balancing``, ``loss_scale`` or ``val``.
            values: name -> number, NaN where there was nothing to measure.
        """
        self._prepare_folder()
        with self._curves_may_fail():
            for name, value in values.items():
                if not math.isnan(value):
                    self.writer.add_scalar(f"{kind}/{name}", value, step)
        self._append(json.dumps(replace_non_finite({"step": step, "kind": kind, **values}), allow_nan=False))

    def log_event(self, step: int, kind: str, content: Mapping[str, Any]) -> None:
        """Log something else than numbers, as plain containers."""
        self._prepare_folder()
        self._append(json.dumps({"step": step, "kind": kind, **content}))

    def log_panels(self, step: int, samples: Sequence[VisualSample], tasks: Mapping[str, Task]) -> None:
        """Write a panel (image, predictions and labels) per sample."""
        self._prepare_folder()
        try:
            panels = write_panels(RunFolder(self.folder).panels, samples, tasks)
        except OSError as error:
            self._warn_once(f"panels of step {step} are not written ({error.strerror or error})", topic="panels")
            return
        with self._curves_may_fail():
            for sample, panel in zip(samples, panels):
                self.writer.add_image(f"panel/{sample.id}", panel, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left and close the files."""
        if self.waiting:
            self._append()
        if "writer" in self.__dict__:
            with self._curves_may_fail():
                self.writer.close()

    def _prepare_folder(self) -> None:
        """Create the folder, with its log, or create it anew if it has been removed."""
        if "writer" not in self.__dict__:
            self.writer  # noqa: B018 - creates it
        elif not self.log.exists():
            existing = set(self.folder.glob("events.*"))
            with contextlib.suppress(OSError):
                self.writer.close()
            for path in set(self.folder.glob("events.*")) - existing:  # the end of a file whose beginning is gone
                path.unlink(missing_ok=True)
            message = f"{self.folder} vanished during the run: records continue in a new one, the earlier ones are lost"
            self._warn_once(message, topic="vanished")
            with self._curves_may_fail():
                self.folder.mkdir(parents=True, exist_ok=True)
                self.log.touch()
                self.warned.discard("vanished")
                self.__dict__["writer"] = self._make_writer()

    def _append(self, *lines: str) -> None:
        """Append the waiting lines and these to the log: all of them or none."""
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
            self._warn_once(f"{self.log} can't be written ({error.strerror or error}): records wait", topic="records")
            return
        self.waiting.clear()
        self.warned.discard("records")

    @contextlib.contextmanager
    def _curves_may_fail(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UnicodeError) as error:
            self._warn_once(f"TensorBoard's curves are not written ({error_reason(error)})", topic="curves")

    def _warn_once(self, message: str, topic: str) -> None:
        if topic not in self.warned:
            log.warning("%s", message)
        self.warned.add(topic)


def _open_to_append(path: Path) -> int:
    """Open a file to append to; ``OSError`` for a FIFO without a reader, which would block otherwise."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)


class NullSummaryWriter:
    """Has the methods of TensorBoard's writer that are used here, and writes nothing."""

    def add_scalar(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def add_image(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def error_reason(error: Exception) -> str:
    """Return an error's reason without its number and path."""
    return getattr(error, "strerror", None) or str(error)


def _summary_writer(folder: Path, purge_step: int | None = None) -> SummaryWriter:
    """Build a writer whose thread prints no traceback of a disk error; the next call raises the error."""
    current = threading.excepthook
    if current is not _excepthook:
        _excepthooks.append(current)
        threading.excepthook = _excepthook
    return SummaryWriter(str(folder), purge_step=purge_step)


_excepthooks: list[Any] = [threading.__excepthook__]


def _excepthook(args: threading.ExceptHookArgs) -> None:
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
        _excepthooks[-1](args)


def write_panels(folder: Path, samples: Sequence[VisualSample], tasks: Mapping[str, Task]) -> list[np.ndarray]:
    """Write a PNG per sample, ``folder/<id>.png``, with its layout as a text chunk; return the panels (uint8 RGB)."""
    panels = [draw_panel(sample, tasks) for sample in samples]
    for sample, panel in zip(samples, panels):
        name = re.sub(r"[^\w.-]", "_", sample.id)
        layout = PngInfo()
        layout.add_text(LAYOUT_KEY, json.dumps(panel_layout(sample, tasks)))

        def write(temporary: Path, panel: np.ndarray = panel, layout: PngInfo = layout) -> None:
            Image.fromarray(panel).save(temporary, "PNG", pnginfo=layout)

        write_atomically(folder / f"{name}.png", write, durable=False)
    return panels


def flatten_metrics(metrics: Metrics) -> dict[str, float]:
    """Convert task -> metric -> value to ``task/metric`` -> value."""
    return {f"{task}/{name}": value for task, values in metrics.items() for name, value in values.items()}


def _is_before(record: Mapping[str, Any], start_step: int) -> bool:
    """Return whether a record belongs to the part of the run before ``start_step``.

    Step s's losses are of the update from s to s + 1, its validation is of the state before that update.
    """
    return record["step"] < start_step or (record["kind"] == "val" and record["step"] == start_step > 0)
