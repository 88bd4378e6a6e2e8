"""A trained model on a person's own pictures, video or camera."""

import errno
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from tqdm import tqdm

from mtcl.atomic import disk_errors_told
from mtcl.entry import words as read
from mtcl.entry.loading import Loaded, load_model, predictor_of
from mtcl.errors import UserError
from mtcl.inference import Predictor
from mtcl.inference.maps import DEPTH_UNIT, write_jpeg, write_map
from mtcl.inference.pictures import SUFFIXES
from mtcl.inference.predictor import LARGE
from mtcl.tasks.base import Task
from mtcl.training.panels import draw_predictions
from mtcl.training.recorder import write_json

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif")
KEYS: dict[str, Any] = {
    "checkpoint": str,
    "input": str,
    "output": Path,
    "tasks": read.names,
    "large": read.choice(*LARGE),
    "flip": read.flag,
    "scales": read.numbers,
    "batch": read.whole,
    "device": read.choice("auto", "cpu", "cuda"),
    "precision": read.choice("auto", "bf16", "fp32"),
    "panel": read.flag,
    "overwrite": read.flag,
    "frames": read.flag,
    "seconds": float,
}


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
    source = given.pop("input")
    loaded = load_model(given.pop("checkpoint"))
    options = {
        key: given.pop(key) for key in ("tasks", "large", "flip", "scales", "device", "precision") if key in given
    }
    predictor = predictor_of(loaded, **options)
    settings = Settings(**given)
    if settings.output.is_file():
        raise UserError(f"output={settings.output} is a file; give a folder")
    with disk_errors_told(settings.output / "predict.json", "run it again"):
        settings.output.mkdir(parents=True, exist_ok=True)
        write_json(settings.output / "predict.json", facts(loaded, predictor, source, words))
    if source.isdecimal():
        film(int(source), f"camera_{source}", predictor, settings)
    elif Path(source).is_file() and Path(source).suffix.lower() in VIDEOS:
        film(source, Path(source).stem, predictor, settings)
    else:
        pictures(Path(source), predictor, settings)


def facts(loaded: Loaded, predictor: Predictor, source: str, words: Sequence[str]) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for name, task in predictor.tasks.items():
        classes = list(getattr(task, "classes", ()))
        tasks[name] = {"classes": classes} if classes else {}
    if "depth" in tasks:
        tasks["depth"] = {"metres_per_step": DEPTH_UNIT}
    if "normals" in tasks:
        tasks["normals"] = {"value": "2 v / 255 - 1", "axes": ["left", "up", "to the viewer"]}
    return {
        "checkpoint": str(loaded.saved.path),
        "step": loaded.saved.step,
        "input": source,
        "words": list(words),
        "tasks": tasks,
    }


# Pictures


def pictures(source: Path, predictor: Predictor, settings: Settings) -> None:
    """Every picture of a file or folder; UserError at the end where some could not be done."""
    files = found(source)
    names = named(files, source)
    bad: dict[Path, str] = {}
    began, done = time.perf_counter(), 0
    waiting = [path for path in files if settings.overwrite or not is_there(settings, predictor, names[path])]
    if len(waiting) < len(files):
        before = len(files) - len(waiting)
        print(f"{before} of {len(files)} pictures have been predicted before; overwrite=true does it again")
    with tqdm(total=len(waiting), desc="predict", unit="picture", disable=len(waiting) < 2) as bar:
        for group in batched(waiting, settings.batch):
            arrays: dict[Path, np.ndarray] = {}
            for path in group:
                try:
                    arrays[path] = predictor.read(path)
                except UserError as error:
                    bad[path] = tell(bar, error)
            for path, maps in zip(arrays, each(predictor, arrays, bad, bar), strict=True):
                if maps is not None:
                    write(settings, predictor.tasks, names[path], arrays[path], maps)
                    done += 1
            bar.update(len(group))
    seconds = time.perf_counter() - began
    print(f"{done} pictures in {seconds:.1f} s ({done / max(seconds, 1e-9):.2f} per second): {settings.output}")
    if bad:
        few = ", ".join(map(str, islice(bad, 3))) + (", ..." if len(bad) > 3 else "")
        raise UserError(f"{len(bad)} of {len(files)} pictures could not be predicted, see above: {few}")


def each(
    predictor: Predictor, arrays: Mapping[Path, np.ndarray], bad: dict[Path, str], bar: tqdm
) -> Iterator[dict[str, np.ndarray] | None]:
    """The maps of every picture; None where the device has too little memory for it."""
    try:
        yield from predictor.batch(list(arrays.values()))
        return
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    for path, array in arrays.items():
        try:
            yield predictor(array)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            height, width = array.shape[:2]
            bad[path] = tell(
                bar, f"{path}: {width} x {height} pixels are too many for {predictor.device}; use large=shrink"
            )
            yield None


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error) or "alloc" in str(error)


def tell(bar: tqdm, message: object) -> str:
    bar.write(f"left out: {message}", file=sys.stderr)
    return str(message)


def found(source: Path) -> list[Path]:
    """The pictures of a folder, with all below it; a file as it is, whatever its name."""
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not files:
            raise UserError(f"input={source} holds no picture ({', '.join(SUFFIXES)})")
        return files
    if not source.is_file():
        raise UserError(f"input={source} does not exist; give a picture, a folder, a video or a camera's number")
    return [source]


def named(files: Sequence[Path], source: Path) -> dict[Path, str]:
    """Names of what is written: the path below ``source`` without its ending, with it where two would be one."""
    whole = {path: (path.relative_to(source) if source.is_dir() else Path(path.name)).as_posix() for path in files}
    bare = {path: name.removesuffix(path.suffix) for path, name in whole.items()}
    count: dict[str, int] = {}
    for name in bare.values():
        count[name] = count.get(name, 0) + 1
    return {path: name if count[name] == 1 else whole[path] for path, name in bare.items()}


def is_there(settings: Settings, predictor: Predictor, name: str) -> bool:
    targets = [settings.output / task / f"{name}.png" for task in predictor.tasks]
    targets += [settings.output / "panel" / f"{name}.jpg"] * settings.panel
    return all(path.is_file() for path in targets)


def write(
    settings: Settings, tasks: Mapping[str, Task], name: str, picture: np.ndarray, maps: Mapping[str, np.ndarray]
) -> None:
    with disk_errors_told(settings.output / name, "run it again: what is there stays"):
        for task, array in maps.items():
            write_map(settings.output / task / f"{name}.png", tasks[task], array)
        if settings.panel:
            write_jpeg(settings.output / "panel" / f"{name}.jpg", draw_predictions(picture, maps, tasks))


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    stream = iter(items)
    while group := list(islice(stream, size)):
        yield group


# Films


def film(source: str | int, name: str, predictor: Predictor, settings: Settings) -> None:
    """``output/name.mp4``: each frame with all tasks beside it. A camera goes on until Ctrl-C."""
    target = settings.output / f"{name}.mp4"
    if target.exists() and not settings.overwrite:
        raise UserError(f"{target} exists already; overwrite=true writes it again")
    capture = cv2.VideoCapture(source)
    rate = capture.get(cv2.CAP_PROP_FPS)
    rate = rate if 1 <= rate <= 240 else 25.0
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    limit = None if settings.seconds is None else max(1, round(settings.seconds * rate))
    count, began, writer = 0, time.perf_counter(), None
    temporary = target.with_name(f".{name}.part.mp4")
    shown = min(n for n in (total if total > 0 else None, limit, 10**9) if n is not None)
    try:
        with (
            closing(frames(capture)) as stream,
            tqdm(total=shown if shown < 10**9 else None, desc="predict", unit="frame") as bar,
        ):
            for group in batched(islice(stream, limit), settings.batch):
                for picture, maps in zip(group, predictor.batch(group)):
                    panel = even(draw_predictions(picture, maps, predictor.tasks, legends=False))
                    if writer is None:
                        writer = opened(temporary, rate, panel.shape[:2])
                    writer.write(cv2.cvtColor(panel, cv2.COLOR_RGB2BGR))
                    if settings.frames:
                        write(settings, predictor.tasks, f"{name}/{count:06d}", picture, maps)
                    count += 1
                    bar.update()
    except KeyboardInterrupt:
        if isinstance(source, str):
            raise
    finally:
        if writer is not None:
            writer.release()
            with disk_errors_told(target, "run it again"):
                temporary.replace(target)
    if count == 0:
        what = (
            f"camera {source} can't be opened" if isinstance(source, int) else f"{source} has no frame that can be read"
        )
        raise UserError(f"{what}; is it whole, and of a kind that OpenCV reads?")
    if isinstance(source, str) and limit is None and 0 < count < total - 1:
        print(f"{source}: only {count} of {total} frames could be read", file=sys.stderr)
    seconds = time.perf_counter() - began
    print(f"{count} frames in {seconds:.1f} s ({count / seconds:.2f} frames/s): {target}")


def frames(capture: Any) -> Generator[np.ndarray]:
    """uint8 RGB."""
    try:
        while True:
            there, frame = capture.read()
            if not there:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()


def even(picture: np.ndarray) -> np.ndarray:
    """Video codecs want even sides."""
    height, width = picture.shape[:2]
    return cv2.copyMakeBorder(picture, 0, height % 2, 0, width % 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def opened(path: Path, rate: float, size: tuple[int, int]) -> cv2.VideoWriter:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, (size[1], size[0]))
    if not writer.isOpened():
        raise OSError(errno.EACCES, "no video can be written", str(path))
    return writer
