"""Maps of predictions on the disk, ``DIR/<task>/<id>.<suffix>``: reading anyone's, writing our own.

The folders, names and values are those that the field's code writes (MTI = Multi-Task-Learning-PyTorch,
MTI/evaluation/evaluate_utils.py:197-222 and MTI/utils/utils.py:58-76; InvPT/evaluation/evaluate_utils.py:69-106 and
InvPT/utils/utils.py:20-50; TaskPrompter alike), with .npy as a further choice:

======================  ===========================================================================================
semseg, human_parts     .png, 8 bits: the class as argmax gives it, from 0 (NYUD 0..39, PASCAL 0..20, parts 0..6).
                        This is not the numbering of NYUD's label files, in which 0 is void and 1 the first class.
sal, edge               .png, 8 bits: 255 times the probability (softmax, sigmoid), truncated.
depth                   .npy, or .mat with the variable ``depth``: floating-point metres (H, W) or (H, W, 1).
normals                 .png, 3 x 8 bits RGB: v stands for 2 v / 255 - 1 (MTI/evaluation/eval_normals.py:39); or
                        .npy: floating-point vectors (H, W, 3) of any length. x to the left, y up, z to the viewer.
======================  ===========================================================================================

Maps have the size of their label, without padding. That code writes no map of a picture without any label of the task
(MTI/evaluation/evaluate_utils.py:213-214), so those may be missing here, too.

What we write differs in one thing: normals are rounded, not truncated, which halves their error (to about 0.3 degrees
a pixel). Classes and depth are read back exactly.
"""

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mtcl.atomic import write_atomically
from mtcl.data.datasets.base import describe_other_files, list_folder
from mtcl.data.image_io import (
    INVALID_ID_MESSAGE,
    describe_array,
    find_invalid_id,
    read_bytes,
    read_mat,
    read_npy,
    read_png,
)
from mtcl.data.sample import Batch, MultiTaskDataset, SampleMeta
from mtcl.data.transforms import finalize_labels
from mtcl.errors import UserError, escape_control_characters
from mtcl.tasks import TASK_NAMES
from mtcl.tasks.base import Task

_PNG = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _PALETTE = 0, 2, 3  # colour types of PNG
_CHANNELS = {_GREY: "1 channel", _RGB: "3 channels", _PALETTE: "a palette", 4: "2 channels", 6: "4 channels"}
_NAMED = 3  # how many files a complaint names


@dataclass(frozen=True)
class MapFormat(ABC):
    """How the maps of one task lie on the disk, and how they become what its metric takes."""

    task: Task

    suffixes: ClassVar[tuple[str, ...]]  # that are read; the first is written
    dtype: ClassVar[type] = np.uint8  # of loaded values
    trailing: ClassVar[tuple[int, ...]] = ()  # their shape behind (H, W)

    @abstractmethod
    def load(self, path: Path) -> np.ndarray:
        """The file's values, (H, W, *trailing); ``UserError``: not such a map."""

    @abstractmethod
    def to_raw(self, values: Tensor) -> Tensor:
        """Loaded values (B, H, W, *trailing) as raw predictions float32 (B, C, H, W), on the same device."""

    @abstractmethod
    def from_raw(self, prediction: Tensor) -> np.ndarray:
        """A raw prediction (C, H, W) as the values to write."""


class ClassMaps(MapFormat):
    """Predicted classes from 0, as logits 1 for the class and 0 for the others."""

    suffixes = (".png",)

    def load(self, path: Path) -> np.ndarray:
        values = _read_png(path, self.task, (_GREY, _PALETTE))
        highest = int(values.max(initial=0))
        if highest >= self.task.channels:
            one_more = " (not 1 for the first class, as in label files)" if highest == self.task.channels else ""
            raise UserError(
                f"{path} holds the class {highest}, but the {self.task.channels} classes of {self.task.name} are "
                f"numbered 0 to {self.task.channels - 1}, as argmax gives them{one_more}; write such maps, without "
                "a void."
            )
        return values

    def to_raw(self, values: Tensor) -> Tensor:
        index = values.long().unsqueeze(1)
        logits = torch.zeros(len(index), self.task.channels, *index.shape[2:], device=index.device)
        return logits.scatter_(1, index, 1.0)

    def from_raw(self, prediction: Tensor) -> np.ndarray:
        return self.task.decode(prediction)


@dataclass(frozen=True)
class ProbabilityMaps(MapFormat):
    """Probabilities in 8 bits. ``binary``: the files hold 0 and 1, as label files may, in place of 0 and 255."""

    binary: bool = False

    suffixes = (".png",)

    def load(self, path: Path) -> np.ndarray:
        values = _read_png(path, self.task, (_GREY,))
        return values * np.uint8(255) if self.binary else values


class SaliencyMaps(ProbabilityMaps):
    """Probabilities v / 255, as two logits.

    Their softmax is larger by a thousandth of a step of 1 / 255, so that rounding can't push a map's pixel below a
    threshold that v / 255 reaches.
    """

    above: ClassVar[float] = 2**-10  # of a step

    def to_raw(self, values: Tensor) -> Tensor:
        logit = _logits(self.above).to(values.device)[values.long()]
        return torch.stack([torch.zeros_like(logit), logit], dim=1)

    def from_raw(self, prediction: Tensor) -> np.ndarray:
        return _truncated(prediction.float().softmax(dim=0)[1])


class EdgeMaps(ProbabilityMaps):
    """Truncated probabilities, as the logit of the middle (v + 0.5) / 255 of what v stands for; 255 as certainty."""

    above: ClassVar[float] = 0.5

    def to_raw(self, values: Tensor) -> Tensor:
        return _logits(self.above).to(values.device)[values.long()].unsqueeze(1)

    def from_raw(self, prediction: Tensor) -> np.ndarray:
        return _truncated(prediction[0].float().sigmoid())


class DepthMaps(MapFormat):
    """Metres; what is not finite is left for the metric to count. Written: clamped at 0, as the metric does."""

    suffixes = (".npy", ".mat")
    dtype = np.float32

    def load(self, path: Path) -> np.ndarray:
        array = read_npy(path) if path.suffix == ".npy" else read_mat(path, "depth")
        flat = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
        if flat.ndim != 2 or flat.dtype.kind != "f":
            raise UserError(
                f"{path} holds {describe_array(array)}, but depth is a floating-point array (height, width), metres."
            )
        return flat.astype(np.float32)

    def to_raw(self, values: Tensor) -> Tensor:
        return values.unsqueeze(1)

    def from_raw(self, prediction: Tensor) -> np.ndarray:
        return self.task.decode(prediction)


class NormalMaps(MapFormat):
    """Vectors, taken as they are: also black pixels of a picture are a prediction, as in the field's code."""

    suffixes = (".png", ".npy")
    dtype = np.float32
    trailing = (3,)

    def load(self, path: Path) -> np.ndarray:
        if path.suffix == ".png":
            levels = (2 * np.arange(256) / 255 - 1).astype(np.float32)
            return levels[_read_png(path, self.task, (_RGB,))]
        array = read_npy(path)
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype.kind != "f":
            raise UserError(
                f"{path} holds {describe_array(array)}, but normals are floating-point vectors (height, width, 3)."
            )
        return array.astype(np.float32)

    def to_raw(self, values: Tensor) -> Tensor:
        return values.permute(0, 3, 1, 2)

    def from_raw(self, prediction: Tensor) -> np.ndarray:
        return np.round(255 * (self.task.decode(prediction) + 1) / 2).clip(0, 255).astype(np.uint8)


FORMATS: dict[str, type[MapFormat]] = {
    "semseg": ClassMaps,
    "human_parts": ClassMaps,
    "sal": SaliencyMaps,
    "depth": DepthMaps,
    "normals": NormalMaps,
    "edge": EdgeMaps,
}


class SavedPredictions:
    """The maps below ``folder`` of the pictures that ``reader`` lists: raw predictions for its evaluation batches.

    ``UserError``, here: a map is missing of a picture that has a label, there are maps of other pictures (unless
    ``may_hold_more``) or two of one. In :meth:`predict`: a map that can't be read, of another form, or another size.
    """

    def __init__(
        self,
        folder: Path,
        tasks: Mapping[str, Task],
        reader: MultiTaskDataset,
        device: torch.device | str = "cpu",
        allow_extra_maps: bool = False,
    ) -> None:
        self.formats = {name: FORMATS[name](task) for name, task in tasks.items()}
        self.device = device
        self.paths = {name: list_maps(folder / name, maps.suffixes) for name, maps in self.formats.items()}
        self._digests: dict[str, str] = {}
        listed = set(reader.ids)
        for name, paths in self.paths.items():
            more = [id for id in paths if id not in listed]
            if more and not allow_extra_maps:
                raise UserError(
                    f"{folder / name} holds {_maps(len(more))} of pictures that are not in the list of "
                    f"{len(reader.ids)}: {_few(more)}; take them out or choose their list (data=, data.split=)."
                )
            _check_missing(folder / name, self.formats[name], paths, reader)
        self.problems: list[str] = []  # for the user, of how the maps are taken
        for name, maps in self.formats.items():
            wanted = [path for id, path in self.paths[name].items() if id in listed]
            if isinstance(maps, ProbabilityMaps) and _is_binary(maps, wanted):
                self.formats[name] = replace(maps, binary=True)
                self.problems.append(
                    f"the maps of {name} in {folder / name} hold 0 and 1 only and are read so; probabilities are 0..255"
                )

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Task -> raw predictions float32 (B, C, H, W) in the batch's frame, arbitrary in its padding and where a
        picture has no map."""
        frame = batch["image"].shape[-2:]
        return {name: self.formats[name].to_raw(self._framed(name, batch["meta"], frame)) for name in self.formats}

    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of a SHA-256 of all maps read so far: their tasks, ids and contents."""
        known = repr(sorted(self._digests.items()))
        return hashlib.sha256(known.encode()).hexdigest()[:16]

    def _framed(self, name: str, meta: Sequence[SampleMeta], frame: tuple[int, ...]) -> Tensor:
        """Values of the maps of a batch's samples in frames of zeros: (B, *frame, *trailing)."""
        framed: np.ndarray = np.zeros((len(meta), *frame, *self.formats[name].trailing), self.formats[name].dtype)
        for target, sample in zip(framed, meta):
            if sample.id in self.paths[name]:  # else it has no label either
                (top, left), (height, width) = sample.offset, sample.native_size
                target[top : top + height, left : left + width] = self._load(name, sample)
        return torch.from_numpy(framed).to(self.device)

    def _load(self, name: str, sample: SampleMeta) -> np.ndarray:
        path = self.paths[name][sample.id]
        values = self.formats[name].load(path)
        if values.shape[:2] != sample.native_size:
            raise UserError(
                f"{path} is {_size(values.shape)} pixels (height x width), but its label is "
                f"{_size(sample.native_size)}; save predictions at the resolution of the label, without padding."
            )
        self._digests[f"{name}/{sample.id}"] = hashlib.sha256(read_bytes(path)).hexdigest()
        return values


class PredictionWriter:
    """Writes every picture's predictions below ``folder``, which must be new or empty and outside of the data."""

    def __init__(self, folder: Path, tasks: Mapping[str, Task], data_root: str | Path | None) -> None:
        self.folder, self.formats = folder, {name: FORMATS[name](task) for name, task in tasks.items()}
        if folder.exists() and (not folder.is_dir() or list_folder(folder)):
            what = "is not empty" if folder.is_dir() else "is a file"
            raise UserError(f"save_predictions={folder} {what}; give a new folder.")
        if data_root is not None and folder.resolve().is_relative_to(Path(data_root).resolve()):
            raise UserError(f"save_predictions={folder} lies in the dataset {data_root}; give a folder outside.")

    def write(self, id: str, predictions: Mapping[str, Tensor]) -> None:
        """One file per task of the un-padded raw predictions (C, H, W); ``UserError``: NaN that 8 bits can't hold, or
        an id that would lead out of the folder (a dataset of one's own)."""
        if find_invalid_id([id]) is not None:
            raise UserError(
                f"save_predictions: the dataset has {escape_control_characters(id[:80])!r}, {INVALID_ID_MESSAGE}."
            )
        for name, maps in self.formats.items():
            path = self.folder / name / f"{id}{maps.suffixes[0]}"
            if path.suffix == ".png" and predictions[name].isnan().any():
                raise UserError(
                    f"the prediction of {name} for {id} holds NaN, which a map of 8 bits can't; evaluate without "
                    "save_predictions to see how much, and mend the model."
                )
            data = _encoded(maps.from_raw(predictions[name]), path.suffix)
            try:
                write_atomically(path, partial(Path.write_bytes, data=data), durable=False)
            except OSError as error:
                raise UserError(
                    f"{path} can't be written ({error.strerror}); give another folder, save_predictions=DIR."
                ) from error


def find_map_folder(given: Path, offered: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder that holds the tasks' folders (``given``, or the ``results`` in it that the field's code makes), and
    which of the ``offered`` tasks have one. ``UserError``: none."""
    if not given.is_dir():
        raise UserError(f"predictions={given} is not a folder; give the one that holds a folder of maps per task.")
    for folder in (given, given / "results"):
        names = [name for name in TASK_NAMES if name in offered and (folder / name).is_dir()]
        if names:
            return folder, names
    raise UserError(f"predictions={given} holds none of the folders {', '.join(offered)}; maps are <task>/<id>.png.")


def list_maps(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """id -> file of the maps in a task's folder; other and hidden files are left alone. ``UserError``: two of one."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; give the task's maps there or leave it out, tasks.names=[...].")
    paths: dict[str, Path] = {}
    for path in sorted(list_folder(folder)):
        if path.suffix in suffixes and not path.name.startswith("."):
            if path.stem in paths:
                raise UserError(f"{folder} holds both {paths[path.stem].name} and {path.name}; keep one of them.")
            paths[path.stem] = path
    return paths


def _is_binary(maps: MapFormat, paths: Sequence[Path]) -> bool:
    """Tell whether maps hold 0 and 1 only, and both; the first that holds more ends the search."""
    highest = 0
    for path in paths:
        highest = max(highest, int(maps.load(path).max(initial=0)))
        if highest > 1:
            return False
    return highest == 1


def _check_missing(folder: Path, maps: MapFormat, paths: Mapping[str, Path], reader: MultiTaskDataset) -> None:
    """``UserError`` if a picture has a label of the task, but no map; names the first three of them."""
    missing = [index for index, id in enumerate(reader.ids) if id not in paths]
    labelled: list[str] = []
    what = f"labels without a map of {maps.task.name}"
    for index in tqdm(missing, desc=what, leave=False, mininterval=1, disable=not missing):
        if _is_labelled(reader, index, maps.task):
            labelled.append(reader.ids[index])
        if len(labelled) == _NAMED:  # the others need not be read
            break
    if labelled:
        others = describe_other_files(folder, {reader.ids[index] for index in missing})
        raise UserError(
            f"{folder} has no map ({', '.join(maps.suffixes)}) of {len(missing)} of the {len(reader.ids)} pictures, "
            f"among them {', '.join(labelled)}{others}; add them or choose the list they were made for (data=, "
            "data.split=)."
        )


def _is_labelled(reader: MultiTaskDataset, index: int, task: Task) -> bool:
    """Has a picture any valid pixel of a task?"""
    return has_label(task, finalize_labels(reader.read(index), {task.name: task}).labels[task.name])


def has_label(task: Task, label: np.ndarray) -> bool:
    """Tell whether a label (layout of the data pipeline, finished) has any valid pixel."""
    planes = label if label.ndim == 2 else label.transpose(2, 0, 1)
    return bool(task.valid(task.collate(np.ascontiguousarray(planes[None]))).any())


def _read_png(path: Path, task: Task, kinds: Sequence[int]) -> np.ndarray:
    """An 8-bit PNG of one of the colour types ``kinds``: uint8 (H, W), of a palette its indices, or RGB (H, W, 3)."""
    data = read_bytes(path)
    if not data.startswith(_PNG) or len(data) < 26:
        raise UserError(f"{path} is not a PNG; write it again.")
    bits, kind = data[24], data[25]
    if kind not in kinds or (bits != 8 and kind != _PALETTE):
        raise UserError(
            f"{path} is a picture of {bits} bits and {_CHANNELS.get(kind, 'no known kind')}, but maps of {task.name} "
            f"are 8-bit pictures of {_CHANNELS[kinds[0]]}; write them so."
        )
    return read_png(path, data)


def _logits(above: float) -> Tensor:
    """float32 (256,): the logit of the probability (v + ``above``) / 255 of every code v; of 255 a probability that is
    1 in float64, too."""
    p = (torch.arange(255, dtype=torch.float64) + above) / 255
    return torch.cat([p.logit(), torch.tensor([40.0])]).float()


def _truncated(probability: Tensor) -> np.ndarray:
    """Probabilities (H, W) as codes of 8 bits, truncated as in the field (InvPT/evaluation/evaluate_utils.py:106)."""
    return (255 * probability).to(torch.uint8).cpu().numpy()


def _encoded(values: np.ndarray, suffix: str) -> bytes:
    """The content of a .npy or .png file."""
    if suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, values)
        return buffer.getvalue()
    return cv2.imencode(suffix, values if values.ndim == 2 else cv2.cvtColor(values, cv2.COLOR_RGB2BGR))[1].tobytes()


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")


def _maps(count: int) -> str:
    return f"{count} map{'' if count == 1 else 's'}"


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}"
