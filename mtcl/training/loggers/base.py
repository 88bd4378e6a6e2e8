"""Define what a logger takes: curves, panels, and the scores of a finished run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

Hparams = Mapping[str, bool | int | float | str]


class MetricLogger(ABC):
    """Takes a run's curves and panels.

    :class:`~mtcl.training.run_logger.RunLogger` calls it: :meth:`open` before the first record, in process 0 alone,
    and :meth:`close` at the end. What a method raises is one warning, and the training goes on. No method may take
    long; a logger with a network behind it works in a thread (:mod:`mtcl.training.loggers.background`).
    """

    subject: str  # of a warning, in the plural: "TensorBoard's curves"

    @abstractmethod
    def open(self) -> None:
        """Prepare for the first record; the run folder exists."""

    @abstractmethod
    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log finite or infinite numbers by name (``train/depth``), of one step; NaN is left out by the caller."""

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:  # noqa: B027  # a table has no images
        """Log an image, uint8 (H, W, 3)."""

    def log_result(self, step: int, hparams: Hparams, scores: Mapping[str, float]) -> None:  # noqa: B027
        """Log what a finished run was started with and the scores of its final state."""

    def restart(self) -> None:  # noqa: B027
        """Begin anew in a run folder that was removed during the run and has just been created again."""

    @abstractmethod
    def close(self, is_finished: bool) -> None:
        """Write what is waiting; no record follows.

        Args:
            is_finished: whether the run has come to its end; else it failed or was interrupted.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return where the curves are or how to see them, as one line for the end of a run."""
