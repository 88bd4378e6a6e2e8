"""Predict images: read ahead and written behind by threads, while the model works."""

import errno
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mtcl.cli.predict.batches import explain_too_large, predict_group, split_groups
from mtcl.cli.predict.output import describe_conflict, output_files, write_maps
from mtcl.cli.predict.record import Job
from mtcl.errors import UserError, escape_control_characters
from mtcl.inference import Predictor
from mtcl.runtime import is_out_of_memory

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)  # of the disk, not of one file name
NUM_WRITERS = 4  # threads that write maps
MAX_UNWRITTEN_PIXELS = 2**24  # of images whose maps wait for the writers


class ImageWriter:
    """Write the maps of images in threads, keep count, and skip files that can't be predicted or written.

    Args:
        total: Number of files, the unreadable ones included.
        skipped: File -> why it is skipped; grows.
        bar: The progress bar.
    """

    def __init__(self, total: int, skipped: dict[Path, str], bar: tqdm) -> None:
        self.total, self.skipped, self.bar, self.num_done = total, skipped, bar, 0
        self.threads = ThreadPoolExecutor(NUM_WRITERS)
        self.pending: deque[tuple[Path, np.ndarray, Future[None]]] = deque()

    def skip(self, path: Path, reason: object) -> None:
        """Note that a file is skipped; with several files, say so."""
        self.skipped[path] = str(reason)
        if self.total > 1:
            self.bar.write(escape_control_characters(f"skipped: {reason}"), file=sys.stderr)

    def submit(self, path: Path, image: np.ndarray, *args: Any) -> None:
        """Start :func:`write_maps` with ``args`` once few enough maps are pending."""
        self.wait(MAX_UNWRITTEN_PIXELS)
        self.pending.append((path, image, self.threads.submit(write_maps, *args)))

    def wait(self, max_pixels: int) -> None:
        """Count what is written; wait until the pending images have at most ``max_pixels`` pixels."""
        while self.pending and (
            self.pending[0][2].done()
            or sum(image.shape[0] * image.shape[1] for _, image, _ in self.pending) > max_pixels
        ):
            path, image, future = self.pending.popleft()
            try:
                future.result()
                self.num_done += 1
            except UserError as error:
                if getattr(error.__cause__, "errno", None) in DISK_ERRORS:
                    raise
                self.skip(path, error)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                size = f"{path}: {image.shape[1]} x {image.shape[0]} pixels"
                self.skip(path, f"{size} are too many for the memory of this machine; make it smaller")
            self.bar.update()


def predict_images(names: Mapping[Path, str], skipped: dict[Path, str], job: Job) -> None:
    """Predict and write images.

    They are read ahead and their maps written behind, by threads, while the model works.

    Args:
        names: Path of an image -> name of what is written.
        skipped: Unreadable path -> reason.
        job: The model, and where to write.

    Raises:
        UserError: Some could not be predicted; raised at the end.
    """
    total, start_time = len(names) + len(skipped), time.perf_counter()
    waiting = select_unwritten(names, skipped, job)
    with tqdm(total=len(waiting), desc="predict", unit="image", disable=len(waiting) < 2) as bar:
        writer, reader = ImageWriter(total, skipped, bar), ThreadPoolExecutor(1)
        with reader, writer.threads:
            for path, reason in list(skipped.items()):
                writer.skip(path, reason)
            try:
                for group in read_ahead(reader, job.predictor, split_groups(waiting, job.settings.batch_size)):
                    predict_and_submit(group, names, job, writer)
                writer.wait(-1)
            except BaseException as error:
                reader.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, UserError):  # of the disk; otherwise what is predicted is written
                    writer.threads.shutdown(wait=False, cancel_futures=True)
                raise
    seconds = time.perf_counter() - start_time
    if total == 1 and skipped:
        raise UserError(*skipped.values())
    rate = f"{writer.num_done / max(seconds, 1e-9):.2f} per second"
    print(escape_control_characters(f"{writer.num_done} images in {seconds:.1f} s ({rate}): {job.settings.output}"))
    if skipped:
        examples = ", ".join(map(str, islice(skipped, 3))) + (", ..." if len(skipped) > 3 else "")
        raise UserError(f"{len(skipped)} of {total} images could not be predicted, see above: {examples}")


def select_unwritten(names: Mapping[Path, str], skipped: dict[Path, str], job: Job) -> list[Path]:
    """Return the files whose maps are still to be written; add those with another input's maps to ``skipped``."""
    settings, record = job.settings, job.record
    total, num_written, waiting = len(names) + len(skipped), 0, []
    for path, name in names.items():
        exist = [os.path.isfile(file) for file in output_files(settings, job.predictor.tasks, name).values()]
        if record.is_foreign(name, any(exist)):
            skipped[path] = f"{path}: {describe_conflict(settings, name)}"
        elif all(exist) and not settings.overwrite:
            num_written += 1
        else:
            waiting.append(path)
    record.begin(name for path, name in names.items() if path not in skipped)
    if num_written:
        print(f"{num_written} of {total} images have been predicted before; --overwrite predicts them again")
    return waiting


def predict_and_submit(
    group: Sequence[tuple[Path, Future[np.ndarray]]],
    names: Mapping[Path, str],
    job: Job,
    writer: ImageWriter,
) -> None:
    """Predict a group of images and hand their maps to the writer."""
    images: dict[Path, np.ndarray] = {}
    for path, future in group:
        try:
            images[path] = future.result()
        except UserError as error:
            writer.skip(path, error)
            writer.bar.update()
    results = deque(predict_group(job.predictor, list(images.values())))
    for path, image in images.items():
        maps = results.popleft()  # freed once written
        if maps is None:
            writer.skip(path, explain_too_large(path, image, job.predictor))
            writer.bar.update()
            continue
        writer.submit(path, image, job.settings, job.predictor.tasks, names[path], image, maps)


def read_ahead(
    reader: ThreadPoolExecutor, predictor: Predictor, groups: Iterable[Sequence[Path]]
) -> Iterator[list[tuple[Path, Future[np.ndarray]]]]:
    """Yield paths with the futures of their images; the next group is read while one is in use."""
    previous = None
    for group in groups:
        current = [(path, reader.submit(predictor.read_image, path)) for path in group]
        if previous is not None:
            yield previous
        previous = current
    if previous is not None:
        yield previous
