"""Preemption: on a signal a run finishes its step, saves and ends, to be continued later."""

import signal
from types import FrameType
from typing import Any

import torch

from mtcl import distributed

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")  # sent by schedulers, submitit, a terminal that is closed
SYNC_INTERVAL = 10  # steps from one exchange among several processes to the next


class PreemptionHandler:
    """Inside ``with``, a signal of :data:`SIGNALS` only makes :meth:`should_stop` true.

    Several processes may receive it at different steps, so they exchange it every :data:`SYNC_INTERVAL` steps.
    """

    def __init__(self) -> None:
        self.is_signalled = False
        self._previous_handlers: dict[int, Any] = {}

    def should_stop(self, step: int) -> bool:
        """Return whether the run should end after this step. All processes must call it after every step."""
        if distributed.world_size() == 1:
            return self.is_signalled
        if step % SYNC_INTERVAL:
            return False
        # On the CPU, where every process group has gloo: nothing waits for a GPU, and a run on CPUs needs none.
        return bool(distributed.all_reduce_sum(torch.tensor(float(self.is_signalled))).item())

    def __enter__(self) -> None:
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows lacks some
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                try:
                    self._previous_handlers[number] = signal.signal(number, self._handle)
                except ValueError:  # not the main thread: the caller handles signals
                    return

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.is_signalled = True
