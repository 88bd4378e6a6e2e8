"""A run that is told to make room: it finishes its step, saves and ends, to be continued later."""

import signal
from types import FrameType, TracebackType
from typing import Any

import torch

from mtcl import distributed

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGHUP")  # what schedulers send, and a terminal that is closed
AGREE_EVERY = 10  # steps at which several processes ask each other


class Preempted(Exception):
    """Training ended early at :attr:`step`, its state saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}")
        self.step = step


class PreemptionHandler:
    """Inside ``with``, a signal of :data:`SIGNALS` does no more than to make :meth:`wanted` true.

    Of several processes not all may have it at the same step: they agree every :data:`AGREE_EVERY` steps.
    """

    def __init__(self) -> None:
        self.signalled = False
        self._before: dict[int, Any] = {}

    def should_stop(self, step: int) -> bool:
        """To be asked after every step, by all processes."""
        if distributed.world_size() == 1:
            return self.signalled
        if step % AGREE_EVERY:
            return False
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        return bool(distributed.all_reduce_sum(torch.tensor(float(self.signalled), device=device)).item())

    def __enter__(self) -> None:
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows lacks some
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                try:
                    self._before[number] = signal.signal(number, self._note)
                except ValueError:  # not the main thread: whoever runs us there handles signals
                    return

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
