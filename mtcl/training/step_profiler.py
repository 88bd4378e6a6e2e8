"""Profile some steps of a training with torch's profiler."""

import logging
from pathlib import Path
from types import TracebackType

import torch

log = logging.getLogger(__name__)

WAIT, WARMUP = 3, 2  # steps before the trace: first those that compile and allocate, then those that start the profiler
FOLDER = "profile"


class StepProfiler:
    """Writes a trace of ``num_steps`` training steps, after :data:`WAIT` + :data:`WARMUP` others.

    The trace is a file of Chrome's format, ``RUN/profile/steps_A-B.pt.trace.json.gz``.

    Args:
        folder: the run folder.
        num_steps: to record; None: the profiler does nothing.
        start_step: the step that the training begins with.
    """

    def __init__(self, folder: Path, num_steps: int | None, start_step: int = 0):
        first = start_step + WAIT + WARMUP
        self.path = folder / FOLDER / f"steps_{first}-{first + (num_steps or 0) - 1}.pt.trace.json.gz"
        self.remaining = WAIT + WARMUP + (num_steps or 0)
        self.profiler: torch.profiler.profile | None = None
        if num_steps:
            schedule = torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=num_steps, repeat=1)
            self.profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write)

    def __enter__(self) -> "StepProfiler":
        if self.profiler is not None:
            self.profiler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.profiler is not None:
            self.profiler.stop()

    def step(self) -> None:
        """Count a step; after the last one the trace is written and the profiler ends."""
        if self.profiler is None:
            return
        self.profiler.step()
        self.remaining -= 1
        if not self.remaining:
            self.profiler.stop()
            self.profiler = None

    def _write(self, profiler: torch.profiler.profile) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:
            log.warning("the trace of the profiler is not written (%s): the training goes on", error)
            return
        log.info("trace of the profiler: %s; open it in ui.perfetto.dev or chrome://tracing", self.path)
