"""Predict a video or a camera: every frame with all tasks beside it."""

import errno
import math
import os
import sys
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from mtcl.atomic import convert_disk_errors
from mtcl.cli.predict.batches import explain_too_large, predict_group, split_groups
from mtcl.cli.predict.output import Settings, describe_conflict, write_maps
from mtcl.cli.predict.record import Job
from mtcl.errors import UserError, escape_control_characters
from mtcl.visualization.panels import draw_predictions


def predict_video(source: str | int, name: str, job: Job) -> None:
    """Write ``output/name.mp4``, each frame with all tasks beside it, completely or not at all.

    A camera is read until Ctrl-C.

    Args:
        source: A video's path, or a camera's number.
        name: Name of what is written.
        job: The model, and where to write.
    """
    predictor, settings, record = job
    is_video = isinstance(source, str)
    target = settings.output / f"{name}.mp4"
    check_video_paths(str(source), target, is_video, settings)
    folders = [settings.output / task / name for task in predictor.tasks] if settings.save_frames else []
    if folders and record.is_foreign(f"{name}/", any(folder.exists() for folder in folders)):
        raise UserError(describe_conflict(settings, f"{name}/"))
    _silence_opencv()
    capture = cv2.VideoCapture(source)
    rate, expected = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    rate = rate if 0.1 <= rate <= 240 else 25.0
    # The length in a container's header may be wrong: all frames are read.
    total = int(expected) if is_video and 0 < expected < sys.maxsize else None
    limit = max(1, round(settings.seconds * rate)) if settings.seconds is not None and is_video else None
    total = min(limit, total or limit) if limit is not None else total
    start_time = time.perf_counter()
    with closing(read_frames(capture, math.inf if is_video else settings.seconds or math.inf)) as stream:
        first = next(stream, None)
        if first is None and is_video:
            raise UserError(f"{source} has no frame that can be read; is it complete, and a video that OpenCV reads?")
        if first is None:
            raise UserError(
                f"camera {source} can't be opened; is it connected, does another program use it, may you use it?"
            )
        record.begin([f"{name}.mp4", *[f"{name}/"] * settings.save_frames])
        with (
            convert_disk_errors(target, "run it again"),
            TemporaryDirectory(prefix=".predict-", dir=settings.output) as folder,
            closing(VideoWriter(Path(folder) / "film.mp4", rate)) as video,
        ):
            limited = islice(chain([first], stream), limit)
            with tqdm(total=total, desc="predict", unit="frame") as bar:
                count = predict_frames(limited, source, name, job, video, bar, start_time)
            video.close()
            if not video.is_complete():
                raise OSError(errno.EIO, "OpenCV did not write all of it; is there space?")
            os.replace(video.path, target)
    seconds = time.perf_counter() - start_time
    print(escape_control_characters(f"{count} frames in {seconds:.1f} s ({count / seconds:.2f} frames/s): {target}"))
    if total is not None and expected > 0 and count < 0.9 * total - 1:  # containers count roughly
        raise UserError(f"only {count} of about {total} frames of {source} could be read; is it complete?")


def check_video_paths(source: str, target: Path, is_video: bool, settings: Settings) -> None:
    """Raise ``UserError`` where the video can't be opened or written, or would be replaced."""
    for path in (source, str(target)):
        if not _is_utf8(path):  # OpenCV crashes
            raise UserError(f"{path} has a name that is not UTF-8, which OpenCV can't open; rename it")
    if is_video and Path(source).resolve() == target.resolve():
        raise UserError(f"{target} is the video itself; choose another --output")
    if target.exists() and not settings.overwrite:
        raise UserError(f"{target} exists already; --overwrite writes it again")


def predict_frames(
    stream: Iterable[np.ndarray],
    source: str | int,
    name: str,
    job: Job,
    video: "VideoWriter",
    bar: tqdm,
    start_time: float,
) -> int:
    """Predict frames, add them to ``video`` and return their number; Ctrl-C ends a camera's recording."""
    predictor, settings = job.predictor, job.settings
    count, is_camera = 0, isinstance(source, int)
    try:
        for group in split_groups(stream, settings.batch_size):
            for frame, maps in zip(group, predict_group(predictor, group)):
                if maps is None:
                    raise UserError(explain_too_large(source, frame, predictor))
                # A camera's video is as long as its recording, however fast the model is.
                due = round((time.perf_counter() - start_time) * video.rate) - video.count if is_camera else 0
                video.add(draw_predictions(frame, maps, predictor.tasks, legends=False), max(1, due))
                if settings.save_frames:
                    maps_only = settings._replace(panel=False)
                    write_maps(maps_only, predictor.tasks, f"{name}/{count:06d}", frame, maps)
                count += 1
                bar.update()
    except KeyboardInterrupt:
        if not is_camera or not count:
            raise
    return count


class VideoWriter:
    """A video that is written frame by frame, uint8 RGB (H, W, 3) of one size."""

    def __init__(self, path: Path, rate: float):
        self.path, self.rate, self.count = path, rate, 0
        self.writer: cv2.VideoWriter | None = None

    def add(self, frame: np.ndarray, times: int = 1) -> None:
        """Write a frame, ``times`` times."""
        height, width = frame.shape[:2]
        # Codecs need even sides.
        frame = cv2.copyMakeBorder(frame, 0, height % 2, 0, width % 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        if self.writer is None:
            size = (frame.shape[1], frame.shape[0])
            self.writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, size)
            if not self.writer.isOpened():
                raise OSError(errno.EIO, "OpenCV can't write such a video")
        for _ in range(times):
            self.writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            self.count += 1

    def close(self) -> None:
        """Finish the file."""
        if self.writer is not None:
            self.writer.release()

    def is_complete(self) -> bool:
        """Count the frames of the file: OpenCV does not report a full disk."""
        capture = cv2.VideoCapture(str(self.path))
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        capture.release()
        return count >= self.count  # Ctrl-C may come between a frame and its count


def read_frames(capture: Any, seconds: float) -> Generator[np.ndarray]:
    """Yield frames, uint8 RGB (H, W, 3), for that long."""
    start_time = time.perf_counter()
    try:
        while time.perf_counter() - start_time < seconds:
            is_read, frame = capture.read()
            if not is_read:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _silence_opencv() -> None:
    """Silence messages of OpenCV and FFmpeg, which would break the progress bar."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
