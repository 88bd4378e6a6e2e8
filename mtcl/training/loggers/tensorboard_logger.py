"""Write TensorBoard's event files into a run folder."""

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from mtcl.training.loggers.base import Hparams, MetricLogger

HPARAMS = "hparams"  # subfolder of the run folder: the session that the HPARAMS tab shows


class TensorBoardLogger(MetricLogger):
    """Writes curves, panels and the entry of the HPARAMS tab.

    Args:
        folder: the run folder.
        start_step: the step from which the run is resumed; TensorBoard drops later points of the interrupted run.
    """

    subject = "TensorBoard's curves"

    def __init__(self, folder: Path, start_step: int = 0):
        self.folder, self.start_step = folder, start_step
        self.writer: SummaryWriter | None = None  # None where the folder can't be written to

    def open(self) -> None:
        """Create the event file."""
        self.writer = _summary_writer(self.folder, self.start_step + 1 if self.start_step else None)

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Add an image."""
        if self.writer is not None:
            self.writer.add_image(name, image, step, dataformats="HWC")

    def log_result(self, step: int, hparams: Hparams, scores: Mapping[str, float]) -> None:
        """Write a finished session of the HPARAMS tab.

        It has a subfolder because the tab shows every curve of a session's folder as a metric; here it has the scores
        alone. There is no description of an experiment: TensorBoard would apply one run's to all runs that it reads,
        and without one it collects the hyperparameters of all.
        """
        if self.writer is None:
            return
        writer = _summary_writer(self.folder / HPARAMS)
        _, session_start, session_end = hparams_summaries(dict(hparams), {})
        file_writer = writer._get_file_writer()
        file_writer.add_summary(session_start)
        for name, value in scores.items():
            writer.add_scalar(f"score/{name}", value, step)
        file_writer.add_summary(session_end)
        writer.close()

    def restart(self) -> None:
        """Begin a new event file; remove the end of one whose beginning is gone."""
        existing = set(self.folder.glob("events.*"))
        if self.writer is not None:
            with contextlib.suppress(OSError):
                self.writer.close()
        for path in set(self.folder.glob("events.*")) - existing:
            path.unlink(missing_ok=True)
        self.writer = _summary_writer(self.folder)

    def close(self, is_finished: bool) -> None:  # noqa: ARG002
        """Write what is waiting and close the file."""
        if self.writer is not None:
            self.writer.close()

    def describe(self) -> str:
        """Return the command that shows the curves."""
        folder = self.folder.relative_to(Path.cwd()) if self.folder.is_relative_to(Path.cwd()) else self.folder
        return f"tensorboard --logdir {folder}"


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
