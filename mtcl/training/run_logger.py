"""Write a run's log: a line per record in ``log.jsonl``, panels, and curves to the loggers that were chosen."""

import contextlib
import errno
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mtcl.atomic import convert_disk_errors, replace_non_finite, write_atomically
from mtcl.evaluation.evaluator import Metrics, VisualSample
from mtcl.run_folder import RunFolder
from mtcl.run_log import read_lines
from mtcl.tasks.base import Task
from mtcl.tasks.names import SCORES
from mtcl.training.loggers.base import Hparams, MetricLogger
from mtcl.training.loggers.tensorboard_logger import TensorBoardLogger
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
        loggers: take curves and panels; None: TensorBoard alone.
    """

    def __init__(self, folder: Path, start_step: int = 0, loggers: Sequence[MetricLogger] | None = None):
        self.folder, self.start_step = folder, start_step
        self.loggers = [TensorBoardLogger(folder, start_step)] if loggers is None else list(loggers)
        self.log = RunFolder(folder).log
        self.waiting: list[str] = []  # lines that the disk did not take yet
        self.warned: set[str] = set()
        self.is_open = self.has_result = False

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
            kind: ``train``, ``labelled_images``, ``regularizer``, ``balancing``, ``loss_scale`` or ``val``.
            values: name -> number, NaN where there was nothing to measure.
        """
        self.log_curves(step, kind, values)
        self._append(json.dumps(replace_non_finite({"step": step, "kind": kind, **values}), allow_nan=False))

    def log_curves(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Give numbers to the loggers alone, such as times, in which equal runs differ: their logs are equal."""
        self._prepare_folder()
        points = {f"{kind}/{name}": value for name, value in values.items() if not math.isnan(value)}
        for logger in self.loggers:
            with self._logger_may_fail(logger):
                logger.log_scalars(step, points)

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
        for logger in self.loggers:
            with self._logger_may_fail(logger):
                for sample, panel in zip(samples, panels):
                    logger.log_image(step, f"panel/{sample.id}", panel)

    def log_result(self, step: int, hparams: Hparams, metrics: Metrics) -> None:
        """Give the loggers what a finished run was started with, and its tasks' primary metrics."""
        self._prepare_folder()
        self.has_result = True
        for logger in self.loggers:
            with self._logger_may_fail(logger):
                logger.log_result(step, hparams, choose_scores(metrics))

    def close(self) -> None:
        """Write what is waiting and close the files."""
        if self.waiting:
            self._append()
        for logger in self.loggers if self.is_open else ():
            with self._logger_may_fail(logger):
                logger.close(self.has_result)

    def describe(self) -> list[str]:
        """Return a line per logger: where the curves are or how to see them."""
        return [logger.describe() for logger in self.loggers] if self.is_open else []

    def _prepare_folder(self) -> None:
        """Create the folder, with its log, or create it anew if it has been removed."""
        if not self.is_open:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._keep_earlier_records()
            self.is_open = True
            for logger in self.loggers:
                with self._logger_may_fail(logger):
                    logger.open()
        elif not self.log.exists():
            message = f"{self.folder} vanished during the run: records continue in a new one, the earlier ones are lost"
            self._warn_once(message, topic="vanished")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.log.touch()
            except OSError as error:
                self._warn_once(f"{self.folder} can't be created ({error_reason(error)})", topic="folder")
                return
            self.warned.discard("vanished")
            for logger in self.loggers:
                with self._logger_may_fail(logger):
                    logger.restart()

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
    def _logger_may_fail(self, logger: MetricLogger) -> Iterator[None]:
        """Turn whatever a logger raises into one warning: the training does not depend on it."""
        try:
            yield
        except Exception as error:  # of any library
            message = f"{logger.subject} are not written ({error_reason(error)}): the training goes on"
            self._warn_once(f"{message}, {self.log.name} has its numbers", topic=logger.subject)

    def _warn_once(self, message: str, topic: str) -> None:
        if topic not in self.warned:
            log.warning("%s", message)
        self.warned.add(topic)


def _open_to_append(path: Path) -> int:
    """Open a file to append to; ``OSError`` for a FIFO without a reader, which would block otherwise."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)


def error_reason(error: Exception) -> str:
    """Return an error's reason without its number and path."""
    return getattr(error, "strerror", None) or str(error)


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


def choose_scores(metrics: Metrics) -> dict[str, float]:
    """Return the metric that represents each task as ``task/metric`` -> value; all metrics of what is no task."""
    scores: dict[str, float] = {}
    for task, values in metrics.items():
        names = [SCORES[task].choose_metric(values)[0]] if task in SCORES else list(values)
        scores |= {f"{task}/{name}": values[name] for name in names if name in values}
    return scores


def _is_before(record: Mapping[str, Any], start_step: int) -> bool:
    """Return whether a record belongs to the part of the run before ``start_step``.

    Step s's losses are of the update from s to s + 1, its validation is of the state before that update.
    """
    return record["step"] < start_step or (record["kind"] == "val" and record["step"] == start_step > 0)
