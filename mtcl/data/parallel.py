"""Work on many files in several processes, with one progress bar."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from mtcl.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def run_jobs(work: Callable[[T], R], items: Sequence[T], workers: int, label: str) -> list[R]:
    """``work(item)`` of every item, in order, from ``workers`` processes (0: this one), with a progress bar ``label``.

    ``work`` and the items must be picklable. The first exception ends everything and is raised here.
    """
    with tqdm(total=len(items), desc=label, dynamic_ncols=True, disable=not items) as bar:
        if workers == 0:
            results = []
            for item in items:
                results.append(work(item))
                bar.update()
            return results
        context = multiprocessing.get_context("spawn")  # forked locks of OpenCV, HDF5 or torch can hang
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
                    bar.update()
                return [future.result() for future in futures]
            except BrokenProcessPool as error:
                raise UserError(f"a process of {workers} was killed, maybe for memory; try fewer workers.") from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
