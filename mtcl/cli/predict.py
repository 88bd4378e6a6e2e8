"""Predict all tasks of a trained model for your own images: no labels, no dataset.

    mtcl predict CHECKPOINT INPUT --output FOLDER [options]

CHECKPOINT: a .pt file, a run's folder, an exported folder, or a name on the Hugging Face hub. INPUT: an image, a folder
of images (with all below it, but for what is hidden or was written by this command), a video, or a camera's number (0;
until Ctrl-C). Written, per image NAME, without replacing anything (--overwrite does):

FOLDER/semseg/NAME.png   classes (human_parts, sal alike): 8-bit numbers, with the colours of the panel as palette
FOLDER/depth/NAME.png    16 bits, millimetres (65535: that or more)
FOLDER/normals/NAME.png  3 x 8 bits: v stands for 2 v / 255 - 1; red: left, green: up, blue: to the viewer
FOLDER/edge/NAME.png     8 bits, 255 times the probability, smoothed and thinned to lines (non-maximum suppression)
FOLDER/panel/NAME.jpg    the image with all of them in colours; --no-panel leaves it out
FOLDER/predict.json      what was done, with the classes' names and the depth's scale

The same command again continues where it was interrupted (a video starts afresh). A video gives FOLDER/NAME.mp4, the
image and all tasks side by side (and with --save-frames the maps of every frame, NAME/000000 and so on).

A file that can't be predicted is named and skipped; the others are done, and the exit code is then 1.
"""

import argparse
import errno
import json
import math
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from tqdm import tqdm

from mtcl.atomic import convert_disk_errors, write_atomically
from mtcl.cli.arguments import name_list, number_list, output_path, positive_float, positive_int
from mtcl.config.load import LoadedModel, build_predictor, load_model
from mtcl.errors import UserError, escape_control_characters
from mtcl.inference import Predictor
from mtcl.inference.image_reading import SUFFIXES
from mtcl.inference.map_files import describe_values, write_jpeg, write_map
from mtcl.inference.predictor import MODES
from mtcl.safe_files import open_regular, read_json
from mtcl.tasks import TASK_NAMES
from mtcl.tasks.base import Task
from mtcl.visualization.panels import draw_predictions

VIDEO_SUFFIXES = (
    ".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts", ".3gp"
)  # fmt: skip
PREDICTOR_OPTIONS = ("tasks", "mode", "flip", "scales", "device", "precision")
RECORD_FILE = "predict.json"
OLD_MODES = {"shrink": "resize", "slide": "sliding_window", "whole": "full"}
MAX_CAMERA = 999
OUTPUT_FOLDERS = {*TASK_NAMES, "panel"}
RETRY_HINT = "run it again: what is written stays"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)  # of the disk, not of one file name
NUM_WRITERS = 4  # threads that write maps
MAX_UNWRITTEN_PIXELS = 2**24  # of images whose maps wait for the writers
OUT_OF_MEMORY_TEXTS = ("DefaultCPUAllocator", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")


class Settings(NamedTuple):
    """Settings of the output: folder, batch size, and which files are written."""

    output: Path
    batch_size: int = 1
    panel: bool = True
    overwrite: bool = False
    save_frames: bool = False
    seconds: float | None = None  # of a video or camera at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mtcl predict``."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("input", metavar="INPUT", help="an image, a folder, a video, or a camera's number")
    parser.add_argument("--output", type=output_path, required=True, metavar="FOLDER")
    parser.add_argument("--tasks", type=name_list, metavar="TASK,...", help="only these, default: all of the model")
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="how images much larger than the training frame are predicted, default: resize",
    )
    parser.add_argument("--flip", action="store_true", help="average with the prediction of the mirrored image")
    parser.add_argument("--scales", type=number_list, metavar="X,...", help="average over sizes, such as 0.75,1,1.25")
    parser.add_argument(
        "--batch-size", type=positive_int, default=1, metavar="N", help="images of one size at once, default: 1"
    )
    parser.add_argument("--seconds", type=positive_float, metavar="S", help="of a video or camera at most")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--no-panel", action="store_false", dest="panel", help="write no image with all tasks")
    parser.add_argument("--save-frames", action="store_true", help="write the maps of every frame of a video")
    parser.add_argument("--overwrite", action="store_true", help="replace what was written before")


def run(args: argparse.Namespace) -> None:
    """Predict and write what the arguments ask for."""
    options = {key: getattr(args, key) for key in PREDICTOR_OPTIONS if getattr(args, key) is not None}
    settings = Settings(**{key: getattr(args, key) for key in Settings._fields})
    if settings.output.is_file():
        raise UserError(f"--output {settings.output} is a file; give a folder")
    check_links(settings.output)
    path, is_camera = Path(args.input), args.input.isdecimal()
    is_video = path.suffix.lower() in VIDEO_SUFFIXES and not os.path.isdir(path) and os.path.exists(path)
    if is_video:
        open_regular(path).close()  # OpenCV would wait for a FIFO
    files, unreadable = ([], {}) if is_camera or is_video else find_images(path, settings.output)
    if is_camera and int(args.input) > MAX_CAMERA:
        raise UserError(
            f"INPUT {args.input}: a camera's number is at most {MAX_CAMERA}; for a file of that name, ./{args.input}"
        )
    loaded = load_model(args.checkpoint)
    predictor = build_predictor(loaded, **options)
    record = PredictionRecord(settings, args.input, describe_predictions(loaded, predictor))
    if is_camera:
        predict_video(int(args.input), f"camera_{int(args.input)}", predictor, settings, record)
    elif is_video:
        predict_video(args.input, path.stem, predictor, settings, record)
    else:
        predict_images(files, output_names(files, path), unreadable, predictor, settings, record)


def check_links(output: Path) -> None:
    """Raise ``UserError`` where a link in ``output`` would lead written or replaced files elsewhere."""
    for name in sorted({*OUTPUT_FOLDERS, RECORD_FILE}):
        if (output / name).is_symlink():
            raise UserError(
                f"--output {output} holds the link {name} to {os.readlink(output / name)}; maps are written into "
                "folders of their own only: remove the link, or choose another --output"
            )


def is_inside(folder: Path, path: Path) -> bool:
    """Tell whether a file to be written lies below ``folder`` once links are resolved."""
    return path.parent.resolve().is_relative_to(folder.resolve())


# The record


def describe_predictions(loaded: LoadedModel, predictor: Predictor) -> dict[str, Any]:
    """Describe what the maps depend on, and what their values mean."""
    return {
        "checkpoint": str(loaded.saved.path.resolve()),
        "step": loaded.saved.step,
        "mode": predictor.mode,
        "flip": predictor.flip,
        "scales": list(predictor.scales),
        "precision": predictor.precision,
        "tasks": {name: describe_values(task) for name, task in predictor.tasks.items()},
    }


class PredictionRecord:
    """``predict.json`` of an output folder: the maps of one model, and which of them belong to which input.

    Names are those of :func:`output_names`; a video's is ``NAME.mp4``, and ``NAME/`` for the maps of its frames.

    Args:
        settings: The output folder, and whether it may be overwritten.
        source: The input, as it is typed.
        facts: What :func:`describe_predictions` says of the model and its options.

    Raises:
        UserError: The record was written for another model or with other options, and is not to be overwritten.
    """

    def __init__(self, settings: Settings, source: str, facts: Mapping[str, Any]) -> None:
        self.path, self.facts, self.overwrite = settings.output / RECORD_FILE, facts, settings.overwrite
        self.source = source if source.isdecimal() else str(Path(source).resolve())
        self.previous = self._read() if self.path.exists() else {"inputs": {}, "tasks": {}}
        changed = [key for key in facts if key in self.previous and key != "tasks" and facts[key] != self.previous[key]]
        if changed and not self.overwrite:
            key = changed[0]
            raise UserError(
                f"{settings.output} holds predictions with {key}={self.previous[key]}, not {facts[key]}; choose "
                "another --output, or replace them with --overwrite"
            )
        self.is_stale = bool(changed)  # all maps are deleted before anything is written
        inputs = self.previous["inputs"]
        self.names = set(inputs.get(self.source, []))  # of this input
        self.other_names = {name for source, names in inputs.items() if source != self.source for name in names}
        self.other_folders = tuple(name for name in self.other_names if name.endswith("/"))

    def is_foreign(self, name: str, exists: bool) -> bool:
        """Tell whether the maps of this name belong to another input, or to none that is recorded."""
        if self.overwrite:
            return False
        contains_others = name.endswith("/") and any(other.startswith(name) for other in self.other_names)
        return (
            contains_others
            or name in self.other_names
            or name.startswith(self.other_folders)
            or (exists and name not in self.names)
        )

    def begin(self, names: Iterable[str]) -> None:
        """Record that these names belong to this input from now on."""
        new = set(names)
        inputs = {
            source: [name for name in names if name not in new] for source, names in self.previous["inputs"].items()
        }
        with convert_disk_errors(self.path, RETRY_HINT):
            if self.is_stale:
                self._delete_maps()
                inputs, self.names = {}, set()
            inputs[self.source] = sorted(self.names | new)
            tasks = self.facts["tasks"] if self.is_stale else self.previous["tasks"] | self.facts["tasks"]
            text = json.dumps({**self.facts, "tasks": tasks, "inputs": inputs}, indent=2) + "\n"
            write_atomically(self.path, lambda temporary: temporary.write_text(text, "utf-8"))

    def _delete_maps(self) -> None:
        """Delete the maps of the previous model; the record is replaced last, so that remaining ones are known."""
        folder = self.path.parent
        for name in self.other_names | self.names:
            if not all(is_inside(folder, folder / kind / name) for kind in OUTPUT_FOLDERS):
                continue
            if name.endswith(".mp4"):
                (folder / name).unlink(missing_ok=True)
            for kind in OUTPUT_FOLDERS:
                if name.endswith("/"):
                    shutil.rmtree(folder / kind / name, ignore_errors=True)
                else:
                    (folder / kind / f"{name}{'.jpg' if kind == 'panel' else '.png'}").unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            content = read_json(self.path)
            inputs = {source: list(names) for source, names in content["inputs"].items()}
            if any(Path(name).is_absolute() or ".." in Path(name).parts for names in inputs.values() for name in names):
                raise ValueError("a name leads out of the folder")  # and could be deleted
            if "large" in content:  # of version 0.1
                content["mode"] = OLD_MODES[content.pop("large")]
            return {**content, "inputs": inputs, "tasks": dict(content["tasks"])}
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if self.overwrite:
                return {"inputs": {}, "tasks": {}}
            raise UserError(
                f"{self.path} was not written by mtcl predict, or is damaged; choose another --output, or --overwrite"
            ) from error


# Images


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
        """Start :func:`write` with ``args`` once few enough maps are pending."""
        self.wait(MAX_UNWRITTEN_PIXELS)
        self.pending.append((path, image, self.threads.submit(write, *args)))

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


def predict_images(
    files: Sequence[Path],
    names: Mapping[Path, str],
    skipped: dict[Path, str],
    predictor: Predictor,
    settings: Settings,
    record: PredictionRecord,
) -> None:
    """Predict and write images.

    They are read ahead and their maps written behind, by threads, while the model works.

    Args:
        files: Paths of the images.
        names: Path -> name of what is written.
        skipped: Unreadable path -> reason.
        predictor: The model.
        settings: What is written, and where.
        record: The record of the output folder.

    Raises:
        UserError: Some could not be predicted; raised at the end.
    """
    total, start_time = len(files) + len(skipped), time.perf_counter()
    waiting = select_unwritten(files, names, skipped, predictor, settings, record)
    with tqdm(total=len(waiting), desc="predict", unit="image", disable=len(waiting) < 2) as bar:
        writer, reader = ImageWriter(total, skipped, bar), ThreadPoolExecutor(1)
        with reader, writer.threads:
            for path, reason in list(skipped.items()):
                writer.skip(path, reason)
            try:
                for group in read_ahead(reader, predictor, split_groups(waiting, settings.batch_size)):
                    predict_and_submit(group, names, predictor, settings, writer)
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
    print(escape_control_characters(f"{writer.num_done} images in {seconds:.1f} s ({rate}): {settings.output}"))
    if skipped:
        examples = ", ".join(map(str, islice(skipped, 3))) + (", ..." if len(skipped) > 3 else "")
        raise UserError(f"{len(skipped)} of {total} images could not be predicted, see above: {examples}")


def select_unwritten(
    files: Sequence[Path],
    names: Mapping[Path, str],
    skipped: dict[Path, str],
    predictor: Predictor,
    settings: Settings,
    record: PredictionRecord,
) -> list[Path]:
    """Return the files whose maps are still to be written; add those with another input's maps to ``skipped``."""
    total, num_written, waiting = len(files) + len(skipped), 0, []
    for path in files:
        exist = [os.path.isfile(file) for file in output_files(settings, predictor.tasks, names[path]).values()]
        if record.is_foreign(names[path], any(exist)):
            skipped[path] = f"{path}: {describe_conflict(settings, names[path])}"
        elif all(exist) and not settings.overwrite:
            num_written += 1
        else:
            waiting.append(path)
    record.begin(names[path] for path in files if path not in skipped)
    if num_written:
        print(f"{num_written} of {total} images have been predicted before; --overwrite predicts them again")
    return waiting


def predict_and_submit(
    group: Sequence[tuple[Path, Future[np.ndarray]]],
    names: Mapping[Path, str],
    predictor: Predictor,
    settings: Settings,
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
    results = deque(predict_group(predictor, list(images.values())))
    for path, image in images.items():
        maps = results.popleft()  # freed once written
        if maps is None:
            writer.skip(path, explain_too_large(path, image, predictor))
            writer.bar.update()
            continue
        writer.submit(path, image, settings, predictor.tasks, names[path], image, maps)


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


def predict_group(predictor: Predictor, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray] | None]:
    """Return the maps of every image, predicted one by one where memory is too small for all; None where for one."""
    try:
        return [*predictor.predict_batch(images)]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return [None] if len(images) == 1 else [predict_group(predictor, [image])[0] for image in images]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the device or this machine has too little memory."""
    if isinstance(error, cv2.error):
        return error.code == cv2.Error.StsNoMem
    is_allocation = isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
    return is_allocation or isinstance(error, torch.OutOfMemoryError | MemoryError)


def explain_too_large(source: object, image: np.ndarray, predictor: Predictor) -> str:
    """Say that an image needs too much memory, and what to do."""
    advice = "use --mode resize" if predictor.mode != "resize" else "make it smaller, or use --device cpu"
    height, width = image.shape[:2]
    return f"{source}: {width} x {height} pixels are too many for the memory of {predictor.device}; {advice}"


def find_images(source: Path, output: Path) -> tuple[list[Path], dict[Path, str]]:
    """Find the images of a folder and all below it; a file is returned whatever its name.

    Hidden files, the output folder and other folders that this command wrote, and linked folders are not searched.

    Args:
        source: A folder or a file.
        output: Where predictions are written.

    Returns:
        Sorted paths, and for each unreadable folder the reason.

    Raises:
        UserError: There is no image, or the maps would be written among the images.
    """
    if not os.path.exists(source):
        raise UserError(f"INPUT {source} does not exist; give an image, a folder, a video or a camera's number")
    inside, target = source.resolve(), output.resolve()
    if inside == target or any(f.parent == target and f.name in OUTPUT_FOLDERS for f in (inside, *inside.parents)):
        raise UserError(f"INPUT {source} lies where --output {output} has its maps; choose another --output")
    if not source.is_dir():
        return [source], {}
    files: list[Path] = []
    unreadable: dict[Path, str] = {}

    def note(error: OSError) -> None:
        unreadable[Path(error.filename)] = f"{error.filename} can't be read ({error.strerror})"

    for name, folders, names in os.walk(source, onerror=note):
        folder = Path(name)
        folders[:] = [f for f in folders if not f.startswith(".") and (folder / f).resolve() != target]
        if RECORD_FILE in names and folder != source:
            folders.clear()
            continue
        paths = (folder / n for n in names if not n.startswith("."))
        # A broken link fails when it is read; a FIFO or device is not opened.
        files += [path for path in paths if path.suffix.lower() in SUFFIXES and (path.is_file() or path.is_symlink())]
    if not files and not unreadable:
        raise UserError(f"INPUT {source} holds no image ({', '.join(SUFFIXES)})")
    return sorted(files), unreadable


def output_names(files: Sequence[Path], source: Path) -> dict[Path, str]:
    """Return a name for what is written of each file: its path below ``source`` without suffix.

    The suffix stays where two files would have one name.
    """
    full = {path: (path.relative_to(source) if source.is_dir() else Path(path.name)).as_posix() for path in files}
    short = {path: name.removesuffix(path.suffix) for path, name in full.items()}
    counts = Counter([*short.values(), *full.values()])  # a.jpg.png is a.jpg, too, where a.jpg and a.png exist
    return {path: name if counts[name] == 1 else full[path] for path, name in short.items()}


def describe_conflict(settings: Settings, name: str) -> str:
    """Say that maps of this name belong to another input."""
    return (
        f"{settings.output} has maps of another input's {name}; choose another --output, or replace them with "
        "--overwrite"
    )


def output_files(settings: Settings, tasks: Iterable[str], name: str) -> dict[str, Path]:
    """Return the files of an image: task -> path, and ``panel``."""
    paths = {task: settings.output / task / f"{name}.png" for task in tasks}
    return paths | ({"panel": settings.output / "panel" / f"{name}.jpg"} if settings.panel else {})


def write(
    settings: Settings, tasks: Mapping[str, Task], name: str, image: np.ndarray, maps: Mapping[str, np.ndarray]
) -> None:
    """Write the maps and the panel of an image."""
    for kind, path in output_files(settings, tasks, name).items():
        if not is_inside(settings.output, path):
            raise UserError(
                f"{path.parent} leads out of --output {settings.output}; remove the link, or choose another --output"
            )
        with convert_disk_errors(path, RETRY_HINT):
            if kind == "panel":
                write_jpeg(path, draw_predictions(image, maps, tasks))
            else:
                write_map(path, tasks[kind], maps[kind])


def split_groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of ``size`` items; the last may be shorter."""
    stream = iter(items)
    while group := list(islice(stream, size)):
        yield group


# Videos


def predict_video(
    source: str | int, name: str, predictor: Predictor, settings: Settings, record: PredictionRecord
) -> None:
    """Write ``output/name.mp4``, each frame with all tasks beside it, completely or not at all.

    A camera is read until Ctrl-C.

    Args:
        source: A video's path, or a camera's number.
        name: Name of what is written.
        predictor: The model.
        settings: What is written, and where.
        record: The record of the output folder.
    """
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
    with closing(frames(capture, math.inf if is_video else settings.seconds or math.inf)) as stream:
        first = next(stream, None)
        if first is None and is_video:
            raise UserError(f"{source} has no frame that can be read; is it complete, and a video that OpenCV reads?")
        if first is None:
            raise UserError(f"camera {source} can't be opened; is it connected, free, and yours to use?")
        record.begin([f"{name}.mp4", *[f"{name}/"] * settings.save_frames])
        with (
            convert_disk_errors(target, "run it again"),
            TemporaryDirectory(prefix=".predict-", dir=settings.output) as folder,
            closing(VideoWriter(Path(folder) / "film.mp4", rate)) as video,
        ):
            limited = islice(chain([first], stream), limit)
            with tqdm(total=total, desc="predict", unit="frame") as bar:
                count = predict_frames(limited, source, name, predictor, settings, video, bar, start_time)
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
    predictor: Predictor,
    settings: Settings,
    video: "VideoWriter",
    bar: tqdm,
    start_time: float,
) -> int:
    """Predict frames, add them to ``video`` and return their number; Ctrl-C ends a camera's recording."""
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
                    write(maps_only, predictor.tasks, f"{name}/{count:06d}", frame, maps)
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


def frames(capture: Any, seconds: float) -> Generator[np.ndarray]:
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
