"""Work on many files in several processes, with one progress bar."""

import concurrent.futures
import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from mtcl.errors import UserError
from mtcl.progress import progress_bar

T = TypeVar("T")
R = TypeVar("R")


def run_jobs(work: Callable[[T], R], items: Sequence[T], workers: int, label: str) -> list[R]:
    """Return ``work(item)`` of every item, in order, computed by a pool of processes.

    The first exception, or Ctrl-C, stops everything and is raised here.

    Args:
        work: picklable function.
        items: picklable arguments.
        workers: number of processes; 0 works in this one.
        label: label of the progress bar.
    """
    with progress_bar(total=len(items), desc=label, disable=not items) as bar:
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
                f"one of {workers} processes died: either memory ran out (use fewer), or the program that started them "
                'lacks `if __name__ == "__main__":`.'
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start the enclosed processes with SIGINT ignored: only this process handles Ctrl-C, and stops them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous_handler)
