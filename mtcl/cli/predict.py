"""A trained model on a person's own pictures, video or camera."""

import errno
import json
import math
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
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
from mtcl.cli import arguments as read
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

VIDEOS = (
    ".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts", ".3gp"
)  # fmt: skip
KEYS: dict[str, Callable[[str], Any]] = {
    "checkpoint": str,
    "input": str,
    "output": read.path,
    "tasks": read.names,
    "mode": read.choice(*MODES),
    "flip": read.flag,
    "scales": read.numbers,
    "batch": read.whole,
    "device": read.choice("auto", "cpu", "cuda"),
    "precision": read.choice("auto", "bf16", "fp32"),
    "panel": read.flag,
    "overwrite": read.flag,
    "frames": read.flag,
    "seconds": read.positive,
}
OF_THE_PREDICTOR = ("tasks", "mode", "flip", "scales", "device", "precision")
RECORD = "predict.json"
MOST_CAMERAS = 999
KINDS = {*TASK_NAMES, "panel"}  # folders of what is written
AGAIN = "run it again: what is there stays"
FOR_ALL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)  # what ails the disk, not one name
WRITERS, UNWRITTEN = 4, 2**24  # threads that write maps; pixels of pictures whose maps wait for them
NO_MEMORY = ("DefaultCPUAllocator", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")


class Settings(NamedTuple):
    output: Path
    batch: int = 1
    panel: bool = True
    overwrite: bool = False
    frames: bool = False
    seconds: float | None = None


def predict(words: Sequence[str]) -> None:
    """What ``scripts/predict.py`` does with its words."""
    given = read.parse(words, KEYS)
    for key in ("checkpoint", "input", "output"):
        if not given.get(key):
            raise UserError(f"predict.py needs {key}=; python scripts/predict.py --help says more")
    source, checkpoint = given.pop("input"), given.pop("checkpoint")
    options = {key: given.pop(key) for key in OF_THE_PREDICTOR if key in given}
    settings = Settings(**given)
    if settings.output.is_file():
        raise UserError(f"output={settings.output} is a file; give a folder")
    refuse_links(settings.output)
    path, camera = Path(source), source.isdecimal()
    video = path.suffix.lower() in VIDEOS and not os.path.isdir(path) and os.path.exists(path)
    if video:
        open_regular(path).close()  # OpenCV would wait for a FIFO
    files, unread = ([], {}) if camera or video else found(path, settings.output)
    if camera and int(source) > MOST_CAMERAS:
        raise UserError(
            f"input={source}: a camera's number is at most {MOST_CAMERAS}; for a file of that name, ./{source}"
        )
    loaded = load_model(checkpoint)
    predictor = build_predictor(loaded, **options)
    record = Record(settings, source, facts(loaded, predictor))
    if camera:
        predict_video(int(source), f"camera_{int(source)}", predictor, settings, record)
    elif video:
        predict_video(source, path.stem, predictor, settings, record)
    else:
        pictures(files, output_names(files, path), unread, predictor, settings, record)


def refuse_links(output: Path) -> None:
    """Raise ``UserError`` where what is written below ``output`` would lie, or be replaced, elsewhere."""
    for name in sorted({*KINDS, RECORD}):
        if (output / name).is_symlink():
            raise UserError(
                f"output={output} holds the link {name} to {os.readlink(output / name)}; maps are written into folders "
                "of their own only: remove the link, or choose another output="
            )


def is_inside(folder: Path, path: Path) -> bool:
    """Tell whether a file to be written lies below ``folder`` once links are resolved."""
    return path.parent.resolve().is_relative_to(folder.resolve())


# What was done


def facts(loaded: LoadedModel, predictor: Predictor) -> dict[str, Any]:
    """What the maps depend on, and what they mean."""
    return {
        "checkpoint": str(loaded.saved.path.resolve()),
        "step": loaded.saved.step,
        "mode": predictor.mode,
        "flip": predictor.flip,
        "scales": list(predictor.scales),
        "precision": predictor.precision,
        "tasks": {name: describe_values(task) for name, task in predictor.tasks.items()},
    }


class Record:
    """``predict.json`` of an output folder: the maps of one model, and which of them belong to which input.

    Names are those of :func:`output_names`; a video's is ``NAME.mp4``, and ``NAME/`` for the maps of its frames. ``UserError``
    where it was written for another model or with other options, unless they are to be overwritten.
    """

    def __init__(self, settings: Settings, source: str, facts: Mapping[str, Any]) -> None:
        self.path, self.facts, self.overwrite = settings.output / RECORD, facts, settings.overwrite
        self.source = source if source.isdecimal() else str(Path(source).resolve())
        self.before = self._before() if self.path.exists() else {"inputs": {}, "tasks": {}}
        others = [key for key in facts if key in self.before and key != "tasks" and facts[key] != self.before[key]]
        if others and not self.overwrite:
            key = others[0]
            raise UserError(
                f"{settings.output} holds predictions with {key}={self.before[key]}, not {facts[key]}; choose another "
                "output=, or replace them with overwrite=true"
            )
        self.is_stale = bool(others)  # all that is there goes before anything is written
        self.own = set(self.before["inputs"].get(self.source, []))
        self.taken = {n for source, names in self.before["inputs"].items() if source != self.source for n in names}
        self.folders = tuple(name for name in self.taken if name.endswith("/"))

    def is_foreign(self, name: str, is_there: bool) -> bool:
        """Whether these maps are another input's, or nobody's that is known."""
        if self.overwrite:
            return False
        inside = name.endswith("/") and any(other.startswith(name) for other in self.taken)
        return inside or name in self.taken or name.startswith(self.folders) or (is_there and name not in self.own)

    def begin(self, names: Iterable[str]) -> None:
        """These names are this input's from now on."""
        new = set(names)
        inputs = {source: [n for n in found if n not in new] for source, found in self.before["inputs"].items()}
        with convert_disk_errors(self.path, AGAIN):
            if self.is_stale:
                self._clear()
                inputs, self.own = {}, set()
            inputs[self.source] = sorted(self.own | new)
            tasks = self.facts["tasks"] if self.is_stale else self.before["tasks"] | self.facts["tasks"]
            text = json.dumps({**self.facts, "tasks": tasks, "inputs": inputs}, indent=2) + "\n"
            write_atomically(self.path, lambda temporary: temporary.write_text(text, "utf-8"))

    def _clear(self) -> None:
        """Of the model before; its record goes last, so that what is left is known."""
        folder = self.path.parent
        for name in self.taken | self.own:
            if not all(is_inside(folder, folder / kind / name) for kind in KINDS):
                continue
            if name.endswith(".mp4"):
                (folder / name).unlink(missing_ok=True)
            for kind in KINDS:
                if name.endswith("/"):
                    shutil.rmtree(folder / kind / name, ignore_errors=True)
                else:
                    (folder / kind / f"{name}{'.jpg' if kind == 'panel' else '.png'}").unlink(missing_ok=True)

    def _before(self) -> dict[str, Any]:
        try:
            content = read_json(self.path)
            inputs = {source: list(names) for source, names in content["inputs"].items()}
            if any(Path(name).is_absolute() or ".." in Path(name).parts for names in inputs.values() for name in names):
                raise ValueError("these names lead elsewhere")  # and may be deleted
            return {**content, "inputs": inputs, "tasks": dict(content["tasks"])}
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if self.overwrite:
                return {"inputs": {}, "tasks": {}}
            raise UserError(
                f"{self.path} was not written by predict.py, or is damaged; choose another output=, or overwrite=true"
            ) from error


# Pictures


def pictures(
    files: Sequence[Path],
    names: Mapping[Path, str],
    bad: dict[Path, str],
    predictor: Predictor,
    settings: Settings,
    record: Record,
) -> None:
    """Predict and write all files; UserError at the end where some could not be done, or were ``bad`` before.

    Pictures are read ahead and maps written behind, by threads, while the model works.
    """
    total, began, before, done = len(files) + len(bad), time.perf_counter(), 0, 0
    waiting = []
    for path in files:
        exist = [os.path.isfile(target) for target in targets(settings, predictor.tasks, names[path]).values()]
        if record.is_foreign(names[path], any(exist)):
            bad[path] = f"{path}: {others(settings, names[path])}"
        elif all(exist) and not settings.overwrite:
            before += 1
        else:
            waiting.append(path)
    record.begin(names[path] for path in files if path not in bad)
    if before:
        print(f"{before} of {total} pictures have been predicted before; overwrite=true does it again")
    writing: deque[tuple[Path, np.ndarray, Future[None]]] = deque()
    with (
        tqdm(total=len(waiting), desc="predict", unit="picture", disable=len(waiting) < 2) as bar,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(WRITERS) as writers,
    ):

        def leave_out(path: Path, why: object) -> None:
            bad[path] = str(why)
            if total > 1:
                bar.write(escape_control_characters(f"left out: {why}"), file=sys.stderr)

        def settle(pixels: int) -> None:
            """Account for what is written; wait until the maps of no more than so many pixels are not."""
            nonlocal done
            while writing and (writing[0][2].done() or sum(a.shape[0] * a.shape[1] for _, a, _ in writing) > pixels):
                path, array, future = writing.popleft()
                try:
                    future.result()
                    done += 1
                except UserError as error:
                    if getattr(error.__cause__, "errno", None) in FOR_ALL:
                        raise
                    leave_out(path, error)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    what = f"{path}: {array.shape[1]} x {array.shape[0]} pixels"
                    leave_out(path, f"{what} are too many for the memory of this machine; make it smaller")
                bar.update()

        for path, why in list(bad.items()):
            leave_out(path, why)
        try:
            for group in read_ahead(reader, predictor, batched(waiting, settings.batch)):
                arrays: dict[Path, np.ndarray] = {}
                for path, picture in group:
                    try:
                        arrays[path] = picture.result()
                    except UserError as error:
                        leave_out(path, error)
                        bar.update()
                results = deque(predict_group(predictor, list(arrays.values())))
                for path, array in arrays.items():
                    maps = results.popleft()  # written, it can go
                    if maps is None:
                        leave_out(path, too_large(path, array, predictor))
                        bar.update()
                        continue
                    settle(UNWRITTEN)
                    future = writers.submit(write, settings, predictor.tasks, names[path], array, maps)
                    writing.append((path, array, future))
            settle(-1)
        except BaseException as error:
            reader.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, UserError):  # the disk's; else what is predicted is written
                writers.shutdown(wait=False, cancel_futures=True)
            raise
    seconds = time.perf_counter() - began
    if total == 1 and bad:
        raise UserError(*bad.values())
    rate = f"{done / max(seconds, 1e-9):.2f} per second"
    print(escape_control_characters(f"{done} pictures in {seconds:.1f} s ({rate}): {settings.output}"))
    if bad:
        few = ", ".join(map(str, islice(bad, 3))) + (", ..." if len(bad) > 3 else "")
        raise UserError(f"{len(bad)} of {total} pictures could not be predicted, see above: {few}")


def read_ahead(
    reader: ThreadPoolExecutor, predictor: Predictor, groups: Iterable[Sequence[Path]]
) -> Iterator[list[tuple[Path, Future[np.ndarray]]]]:
    """Paths with their pictures to come; the next group is read while one is in use."""
    before = None
    for group in groups:
        now = [(path, reader.submit(predictor.read_image, path)) for path in group]
        if before is not None:
            yield before
        before = now
    if before is not None:
        yield before


def predict_group(predictor: Predictor, pictures: Sequence[np.ndarray]) -> list[dict[str, np.ndarray] | None]:
    """The maps of every picture, one by one where the memory does not suffice for all; None where not even so."""
    try:
        return [*predictor.predict_batch(pictures)]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return [None] if len(pictures) == 1 else [predict_group(predictor, [picture])[0] for picture in pictures]


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device or of this machine."""
    if isinstance(error, cv2.error):
        return error.code == cv2.Error.StsNoMem
    told = isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)


def too_large(what: object, picture: np.ndarray, predictor: Predictor) -> str:
    then = "use mode=resize" if predictor.mode != "resize" else "make it smaller, or use device=cpu"
    height, width = picture.shape[:2]
    return f"{what}: {width} x {height} pixels are too many for the memory of {predictor.device}; {then}"


def found(source: Path, output: Path) -> tuple[list[Path], dict[Path, str]]:
    """The pictures of a folder, with all below it, and why folders could not be read. Of a file that itself, whatever
    its name. Left out: what is hidden, the output folder and others that predict.py wrote, folders that links lead to.

    ``UserError``: there is none; or the maps would lie among the pictures.
    """
    if not os.path.exists(source):
        raise UserError(f"input={source} does not exist; give a picture, a folder, a video or a camera's number")
    inside, place = source.resolve(), output.resolve()
    if inside == place or any(f.parent == place and f.name in KINDS for f in (inside, *inside.parents)):
        raise UserError(f"input={source} lies where output={output} has its maps; choose another output=")
    if not source.is_dir():
        return [source], {}
    files: list[Path] = []
    unread: dict[Path, str] = {}

    def note(error: OSError) -> None:
        unread[Path(error.filename)] = f"{error.filename} can't be read ({error.strerror})"

    for name, folders, names in os.walk(source, onerror=note):
        folder = Path(name)
        folders[:] = [f for f in folders if not f.startswith(".") and (folder / f).resolve() != place]
        if RECORD in names and folder != source:
            folders.clear()
            continue
        paths = (folder / n for n in names if not n.startswith("."))
        # A link that leads nowhere is told when it is read; what is no file (a pipe) is not waited for.
        files += [path for path in paths if path.suffix.lower() in SUFFIXES and (path.is_file() or path.is_symlink())]
    if not files and not unread:
        raise UserError(f"input={source} holds no picture ({', '.join(SUFFIXES)})")
    return sorted(files), unread


def output_names(files: Sequence[Path], source: Path) -> dict[Path, str]:
    """Names of what is written: the path below ``source`` without its ending, with it where two would be one."""
    whole = {path: (path.relative_to(source) if source.is_dir() else Path(path.name)).as_posix() for path in files}
    bare = {path: name.removesuffix(path.suffix) for path, name in whole.items()}
    taken = Counter([*bare.values(), *whole.values()])  # a.jpg.png is a.jpg, too, where a.jpg and a.png are
    return {path: name if taken[name] == 1 else whole[path] for path, name in bare.items()}


def others(settings: Settings, name: str) -> str:
    return (
        f"{settings.output} has maps of another input's {name}; choose another output=, or replace them with "
        "overwrite=true"
    )


def targets(settings: Settings, tasks: Iterable[str], name: str) -> dict[str, Path]:
    """The files of a picture: task -> path, and ``panel``."""
    paths = {task: settings.output / task / f"{name}.png" for task in tasks}
    return paths | ({"panel": settings.output / "panel" / f"{name}.jpg"} if settings.panel else {})


def write(
    settings: Settings, tasks: Mapping[str, Task], name: str, picture: np.ndarray, maps: Mapping[str, np.ndarray]
) -> None:
    for kind, path in targets(settings, tasks, name).items():
        if not is_inside(settings.output, path):
            raise UserError(f"{path.parent} leads out of output={settings.output}; remove the link, or choose another")
        with convert_disk_errors(path, AGAIN):
            if kind == "panel":
                write_jpeg(path, draw_predictions(picture, maps, tasks))
            else:
                write_map(path, tasks[kind], maps[kind])


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    stream = iter(items)
    while group := list(islice(stream, size)):
        yield group


# Films


def predict_video(source: str | int, name: str, predictor: Predictor, settings: Settings, record: Record) -> None:
    """``output/name.mp4``: each frame with all tasks beside it, whole or not at all. A camera goes on until Ctrl-C."""
    video = isinstance(source, str)
    target = settings.output / f"{name}.mp4"
    for path in (str(source), str(target)):
        if not _is_utf8(path):  # OpenCV falls over it
            raise UserError(f"{path} has a name that is not UTF-8, which OpenCV can't open; rename it")
    if video and Path(str(source)).resolve() == target.resolve():
        raise UserError(f"{target} is the video itself; choose another output=")
    if target.exists() and not settings.overwrite:
        raise UserError(f"{target} exists already; overwrite=true writes it again")
    folders = [settings.output / task / name for task in predictor.tasks] if settings.frames else []
    if folders and record.is_foreign(f"{name}/", any(folder.exists() for folder in folders)):
        raise UserError(others(settings, f"{name}/"))
    _silence()
    capture = cv2.VideoCapture(source)
    rate, expected = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    rate = rate if 0.1 <= rate <= 240 else 25.0
    # What a container says of its length may be wrong: the frames that are there are read.
    total = int(expected) if video and 0 < expected < sys.maxsize else None
    limit = max(1, round(settings.seconds * rate)) if settings.seconds is not None and video else None
    total = min(limit, total or limit) if limit is not None else total
    count, began = 0, time.perf_counter()
    with closing(frames(capture, math.inf if video else settings.seconds or math.inf)) as stream:
        first = next(stream, None)
        if first is None and video:
            raise UserError(f"{source} has no frame that can be read; is it whole, and a video that OpenCV reads?")
        if first is None:
            raise UserError(f"camera {source} can't be opened; is it connected, free, and yours to use?")
        record.begin([f"{name}.mp4", *[f"{name}/"] * settings.frames])
        with (
            convert_disk_errors(target, "run it again"),
            TemporaryDirectory(prefix=".predict-", dir=settings.output) as folder,
            closing(VideoWriter(Path(folder) / "film.mp4", rate)) as made,
        ):
            try:
                with tqdm(total=total, desc="predict", unit="frame") as bar:
                    for group in batched(islice(chain([first], stream), limit), settings.batch):
                        for picture, maps in zip(group, predict_group(predictor, group)):
                            if maps is None:
                                raise UserError(too_large(source, picture, predictor))
                            # A camera's film is as long as it took, however fast the model is.
                            due = 0 if video else round((time.perf_counter() - began) * rate) - made.count
                            made.add(draw_predictions(picture, maps, predictor.tasks, legends=False), max(1, due))
                            if settings.frames:
                                extra = settings._replace(panel=False)
                                write(extra, predictor.tasks, f"{name}/{count:06d}", picture, maps)
                            count += 1
                            bar.update()
            except KeyboardInterrupt:
                if video or not count:
                    raise
            made.close()
            if not made.is_whole():
                raise OSError(errno.EIO, "OpenCV did not write all of it; is there space?")
            os.replace(made.path, target)
    seconds = time.perf_counter() - began
    print(escape_control_characters(f"{count} frames in {seconds:.1f} s ({count / seconds:.2f} frames/s): {target}"))
    if total is not None and expected > 0 and count < 0.9 * total - 1:  # containers count roughly
        raise UserError(f"only {count} of about {total} frames of {source} could be read; is it whole?")


class VideoWriter:
    """A video that is written frame by frame, uint8 RGB (H, W, 3) of one size."""

    def __init__(self, path: Path, rate: float):
        self.path, self.rate, self.count = path, rate, 0
        self.writer: cv2.VideoWriter | None = None

    def add(self, picture: np.ndarray, times: int = 1) -> None:
        height, width = picture.shape[:2]
        # Codecs want even sides.
        picture = cv2.copyMakeBorder(picture, 0, height % 2, 0, width % 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        if self.writer is None:
            size = (picture.shape[1], picture.shape[0])
            self.writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, size)
            if not self.writer.isOpened():
                raise OSError(errno.EIO, "OpenCV can't write such a video")
        for _ in range(times):
            self.writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
            self.count += 1

    def close(self) -> None:
        if self.writer is not None:
            self.writer.release()

    def is_whole(self) -> bool:
        """OpenCV does not say when a disk is full."""
        written = cv2.VideoCapture(str(self.path))
        count = int(written.get(cv2.CAP_PROP_FRAME_COUNT))
        written.release()
        return count >= self.count  # Ctrl-C may come between a frame and its count


def frames(capture: Any, seconds: float) -> Generator[np.ndarray]:
    """uint8 RGB, for so long."""
    began = time.perf_counter()
    try:
        while time.perf_counter() - began < seconds:
            there, frame = capture.read()
            if not there:
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


def _silence() -> None:
    """What OpenCV and FFmpeg would write into the progress bar."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
