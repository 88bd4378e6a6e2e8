"""Work on many files in several processes, with one progress bar."""

import concurrent.futures
import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from mtcl.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def run_jobs(work: Callable[[T], R], items: Sequence[T], workers: int, label: str) -> list[R]:
    """``work(item)`` of every item, in order, from ``workers`` processes (0: this one), with a progress bar ``label``.

    ``work`` and the items must be picklable. The first exception, or Ctrl-C, ends everything and is raised here.
    """
    with tqdm(total=len(items), desc=label, dynamic_ncols=True, disable=not items) as bar:
        if workers == 0:
            results = []
            for item in items:
                results.append(work(item))
                bar.update()
            return results
        context = multiprocessing.get_context("spawn")  # forked locks of OpenCV, HDF5 or torch can hang
        pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
        try:
            with _without_interrupts():
                futures = [pool.submit(work, item) for item in items]
            for future in concurrent.futures.as_completed(futures):
                future.result()
                bar.update()
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {workers} processes died: for want of memory (use fewer), or because the program that started "
                'them lacks `if __name__ == "__main__":`.'
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started here never see Ctrl-C: this one does, and ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
