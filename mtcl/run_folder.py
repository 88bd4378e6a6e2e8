"""Name the files of a run folder, and tell how far its run is."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mtcl.run_lock import is_locked

METRICS = "metrics.json"
RECORD = "run.json"
CONFIG = "config.yaml"
LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"
PANELS = "panels"
LAST_CHECKPOINT = "last.pt"
BEST_CHECKPOINT = "best.pt"
LOGGER_FOLDERS = ("hparams", "profile", "wandb")  # of TensorBoard, the profiler, Weights & Biases: it has a config.yaml

MARKERS = (METRICS, CONFIG, LOG)  # a folder with any of these is a run folder


@dataclass(frozen=True)
class RunFolder:
    """The folder that a run writes into. An evaluation leaves one, too, with metrics, record and panels only.

    ::

        config.yaml     the resolved config, written first
        log.jsonl       one record per logged step and per validation
        checkpoints/    last.pt, the one before it, best.pt, step_N.pt
        panels/         images with labels and predictions
        run.json        the record: seed, data, machine, versions, command
        metrics.json    the final numbers, written last
    """

    path: Path

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> "RunFolder | None":
        """Return the run folder that contains ``RUN/checkpoints/NAME.pt``; None for a checkpoint elsewhere."""
        return cls(checkpoint.parent.parent) if checkpoint.parent.name == CHECKPOINTS else None

    @property
    def metrics(self) -> Path:
        """Path of the final numbers, ``{task: {metric: value}}``."""
        return self.path / METRICS

    @property
    def record(self) -> Path:
        """Path of the record of seed, data, machine, versions and command."""
        return self.path / RECORD

    @property
    def config(self) -> Path:
        """Path of the resolved config."""
        return self.path / CONFIG

    @property
    def log(self) -> Path:
        """Path of the log, one JSON record per line."""
        return self.path / LOG

    @property
    def checkpoints(self) -> Path:
        """Path of the folder of checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def panels(self) -> Path:
        """Path of the folder of images."""
        return self.path / PANELS

    @property
    def last_checkpoint(self) -> Path:
        """Path of the newest checkpoint, which a resumed run continues."""
        return self.checkpoints / LAST_CHECKPOINT

    @property
    def best_checkpoint(self) -> Path:
        """Path of the checkpoint with the best monitored metric."""
        return self.checkpoints / BEST_CHECKPOINT

    @property
    def is_run(self) -> bool:
        """Does the folder contain any file that marks it as a run folder?"""
        return any((self.path / name).is_file() for name in MARKERS)

    @property
    def has_metrics(self) -> bool:
        """Is there a metrics file, be it readable or not?"""
        return os.path.lexists(self.metrics)

    @property
    def has_checkpoints(self) -> bool:
        """Is there a checkpoint to continue from?"""
        return any(self.checkpoints.glob("*.pt"))

    @property
    def is_finished(self) -> bool:
        """Did a run end here? Its last act is to write the record and the metrics."""
        return self.metrics.is_file() and self.record.is_file()

    @property
    def is_locked(self) -> bool:
        """Does a process hold the folder at this moment?"""
        return is_locked(self.path)

    @property
    def modified(self) -> float:
        """When log, metrics or config were last written, in seconds since 1970; 0 if there are none."""
        paths = [self.path / name for name in MARKERS]
        return max((os.lstat(path).st_mtime for path in paths if os.path.lexists(path)), default=0.0)


def find_run_folders(source: Path) -> Iterator[RunFolder]:
    """Yield every run folder at or below ``source``, parents before children, skipping hidden folders."""
    for root, folders, files in os.walk(source):
        is_run = any(name in files for name in MARKERS)
        skipped = (CHECKPOINTS, PANELS, *(LOGGER_FOLDERS if is_run else ()))
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        if is_run:
            yield RunFolder(Path(root))
