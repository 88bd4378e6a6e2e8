"""What a run leaves behind: TensorBoard, a line per record in ``log.jsonl``, panels, metrics."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch.utils.tensorboard import SummaryWriter

from mtcl.atomic import write_atomically
from mtcl.tasks.base import Task
from mtcl.training.evaluator import Metrics, Shown
from mtcl.training.panels import draw_panel


class Recorder:
    """Writes into one run folder, nothing before the first record.

    A run resumed at ``start_step`` writes what comes after it anew, so an interrupted run's records from there on are
    dropped.
    """

    def __init__(self, folder: Path, start_step: int = 0):
        self.folder, self.start_step = folder, start_step
        self.log = folder / "log.jsonl"

    @cached_property
    def writer(self) -> SummaryWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(self.log) if _is_before(json.loads(line), self.start_step)]
        write_text(self.log, "".join(kept))
        return SummaryWriter(str(self.folder), purge_step=self.start_step + 1 if self.start_step else None)

    def scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """``kind`` is ``train``, ``contrast`` or ``val``; ``values`` by name, NaN where nothing was seen."""
        writer = self.writer
        for name, value in values.items():
            if not math.isnan(value):
                writer.add_scalar(f"{kind}/{name}", value, step)
        with self.log.open("a") as file:
            file.write(json.dumps(_finite({"step": step, "kind": kind, **values}), allow_nan=False) + "\n")

    def panels(self, step: int, shown: Sequence[Shown], tasks: Mapping[str, Task]) -> None:
        for sample, panel in zip(shown, write_panels(self.folder / "panels", shown, tasks)):
            self.writer.add_image(f"panel/{sample.id}", panel, step, dataformats="HWC")

    def close(self) -> None:
        if "writer" in self.__dict__:
            self.writer.close()


def write_panels(folder: Path, shown: Sequence[Shown], tasks: Mapping[str, Task]) -> list[np.ndarray]:
    """One PNG per sample, ``folder/<id>.png``; the pictures themselves are returned (uint8 RGB)."""
    folder.mkdir(parents=True, exist_ok=True)
    panels = [draw_panel(sample, tasks) for sample in shown]
    for sample, panel in zip(shown, panels):
        name = re.sub(r"[^\w.-]", "_", sample.id)
        cv2.imwrite(str(folder / f"{name}.png"), cv2.cvtColor(panel, cv2.COLOR_RGB2BGR))
    return panels


def write_text(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text)

    write_atomically(path, write)


def write_json(path: Path, content: Any) -> None:
    """NaN, as a metric is that saw nothing valid, becomes null: JSON has no NaN."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def flat(metrics: Metrics) -> dict[str, float]:
    """task -> metric -> value as ``task/metric`` -> value."""
    return {f"{task}/{name}": value for task, values in metrics.items() for name, value in values.items()}


def _is_before(record: Mapping[str, Any], start_step: int) -> bool:
    """Step s's losses are of the update from s to s + 1, its validation is of the state before that update."""
    return record["step"] < start_step or (record["kind"] == "val" and record["step"] == start_step > 0)


def _lines(path: Path) -> list[str]:
    """The whole lines: a run that was killed while writing leaves a part of one at the end."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [line for line in lines if line.endswith("\n")]
