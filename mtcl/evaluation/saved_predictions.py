"""Read and write saved predictions, ``DIR/<task>/<id>.<suffix>``.

The folders, names and values are those that published code writes (MTI = Multi-Task-Learning-PyTorch,
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

Maps have the size of their label, without padding. That code writes no map of an image without any label of the task
(MTI/evaluation/evaluate_utils.py:213-214), so those may be missing here, too.

What we write differs in one respect: normals are rounded, not truncated, which halves their error (to about 0.3 degrees
per pixel). Classes and depth are read back exactly.
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
from mtcl.errors import ParameterError, UserError, escape_control_characters
from mtcl.progress import progress_bar
from mtcl.tasks import TASK_NAMES
from mtcl.tasks.base import Task

_PNG = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _PALETTE = 0, 2, 3  # colour types of PNG
_CHANNELS = {_GREY: "1 channel", _RGB: "3 channels", _PALETTE: "a palette", 4: "2 channels", 6: "4 channels"}
_MAX_LISTED = 3  # files that a message names


@dataclass(frozen=True)
class MapFormat(ABC):
    """File format of one task's maps, and their conversion to raw predictions."""

    task: Task

    suffixes: ClassVar[tuple[str, ...]]  # read; the first is written
    dtype: ClassVar[type] = np.uint8  # of loaded values
    trailing: ClassVar[tuple[int, ...]] = ()  # further axes of loaded values, after (H, W)

    @abstractmethod
    def load(self, path: Path) -> np.ndarray:
        """Load a file's values, (H, W, *trailing); raise ``UserError`` if it is not such a map."""

    @abstractmethod
    def to_raw(self, values: Tensor) -> Tensor:
        """Convert loaded values (B, H, W, *trailing) to raw predictions float32 (B, C, H, W), on the same device."""

    @abstractmethod
    def from_raw(self, prediction: Tensor) -> np.ndarray:
        """Convert a raw prediction (C, H, W) to the values to write."""


class ClassMaps(MapFormat):
    """Predicted classes from 0; as raw predictions, logits of 1 for the class and 0 for the others."""

    suffixes = (".png",)

    def load(self, path: Path) -> np.ndarray:
        """Load classes (H, W), uint8."""
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
        """Convert classes (B, H, W) to logits."""
        index = values.long().unsqueeze(1)
        logits = torch.zeros(len(index), self.task.channels, *index.shape[2:], device=index.device)
        return logits.scatter_(1, index, 1.0)

    def from_raw(self, prediction: Tensor) -> np.ndarray:
        """Decode a prediction to classes."""
        return self.task.decode(prediction)


@dataclass(frozen=True)
class ProbabilityMaps(MapFormat):
    """Probabilities in 8 bits.

    Args:
        binary: the files hold 0 and 1, as label files may, instead of 0 and 255.
    """

    binary: bool = False

    suffixes = (".png",)

    def load(self, path: Path) -> np.ndarray:
        """Load codes of probabilities (H, W), uint8."""
        values = _read_png(path, self.task, (_GREY,))
        return values * np.uint8(255) if self.binary else values


class SaliencyMaps(ProbabilityMaps):
    """Probabilities v / 255, as two logits.

    Their softmax is larger by a thousandth of a step of 1 / 255, so that rounding can't push a map's pixel below a
    threshold that v / 255 reaches.
    """

    offset: ClassVar[float] = 2**-10  # of a step

    def to_raw(self, values: Tensor) -> Tensor:
        """Convert codes (B, H, W) to two logits."""
        logit = _logits(self.offset).to(values.device)[values.long()]
        return torch.stack([torch.zeros_like(logit), logit], dim=1)

    def from_raw(self, prediction: Tensor) -> np.ndarray:
        """Convert two logits to codes."""
        return _truncate(prediction.float().softmax(dim=0)[1])


class EdgeMaps(ProbabilityMaps):
    """Truncated probabilities; as raw predictions, the logit of the middle (v + 0.5) / 255 of a code's range.

    The code 255 is certainty.
    """

    offset: ClassVar[float] = 0.5

    def to_raw(self, values: Tensor) -> Tensor:
        """Convert codes (B, H, W) to a logit."""
        return _logits(self.offset).to(values.device)[values.long()].unsqueeze(1)

    def from_raw(self, prediction: Tensor) -> np.ndarray:
        """Convert a logit to codes."""
        return _truncate(prediction[0].float().sigmoid())


class DepthMaps(MapFormat):
    """Metres; values that are not finite are left for the metric to count. Written ones are clamped at 0, as by it."""

    suffixes = (".npy", ".mat")
    dtype = np.float32

    def load(self, path: Path) -> np.ndarray:
        """Load metres (H, W), float32."""
        array = read_npy(path) if path.suffix == ".npy" else read_mat(path, "depth")
        flat = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
        if flat.ndim != 2 or flat.dtype.kind != "f":
            raise UserError(
                f"{path} holds {describe_array(array)}, but depth is a floating-point array (height, width), metres."
            )
        return flat.astype(np.float32)

    def to_raw(self, values: Tensor) -> Tensor:
        """Add the channel axis."""
        return values.unsqueeze(1)

    def from_raw(self, prediction: Tensor) -> np.ndarray:
        """Decode a prediction to metres."""
        return self.task.decode(prediction)


class NormalMaps(MapFormat):
    """Vectors, taken as they are: black pixels of a PNG are a prediction, too, as in published code."""

    suffixes = (".png", ".npy")
    dtype = np.float32
    trailing = (3,)

    def load(self, path: Path) -> np.ndarray:
        """Load vectors (H, W, 3), float32."""
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
        """Move the channels to the front."""
        return values.permute(0, 3, 1, 2)

    def from_raw(self, prediction: Tensor) -> np.ndarray:
        """Encode vectors as 8-bit RGB."""
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
    """Saved maps of a dataset's images, as raw predictions for its evaluation batches.

    Args:
        folder: holds a folder of maps per task.
        tasks: name -> task, those that are scored.
        dataset: the images.
        device: of the predictions.
        allow_extra_maps: allow maps of images that the dataset does not list.

    Raises:
        UserError: a map is missing of an image that has a label, there are maps of other images, or two of one.
    """

    def __init__(
        self,
        folder: Path,
        tasks: Mapping[str, Task],
        dataset: MultiTaskDataset,
        device: torch.device | str = "cpu",
        allow_extra_maps: bool = False,
    ) -> None:
        self.formats = {name: FORMATS[name](task) for name, task in tasks.items()}
        self.device = device
        self.paths = {name: list_maps(folder / name, maps.suffixes) for name, maps in self.formats.items()}
        self._digests: dict[str, str] = {}
        listed = set(dataset.ids)
        for name, paths in self.paths.items():
            extra = [id for id in paths if id not in listed]
            if extra and not allow_extra_maps:
                raise UserError(
                    f"{folder / name} holds {_count_maps(len(extra))} of images that are not in the list of "
                    f"{len(dataset.ids)}: {_shorten(extra)}; remove them, or choose the dataset and split of the maps."
                )
            _check_missing(folder / name, self.formats[name], paths, dataset)
        self.problems: list[str] = []  # sentences for the user about how the maps are read
        for name, maps in self.formats.items():
            scored = [path for id, path in self.paths[name].items() if id in listed]
            if isinstance(maps, ProbabilityMaps) and _is_binary(maps, scored):
                self.formats[name] = replace(maps, binary=True)
                self.problems.append(
                    f"the maps of {name} in {folder / name} hold 0 and 1 only and are read so; probabilities are 0..255"
                )

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Return task -> raw predictions float32 (B, C, H, W) of a batch's images, in the frame of the batch.

        They are arbitrary in the padding and where an image has no map.

        Raises:
            UserError: a map can't be read, or has another form or size.
        """
        frame = batch["image"].shape[-2:]
        return {name: self.formats[name].to_raw(self._load_batch(name, batch["meta"], frame)) for name in self.formats}

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits of a SHA-256 of all maps read so far: their tasks, ids and contents."""
        content = repr(sorted(self._digests.items()))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _load_batch(self, name: str, meta: Sequence[SampleMeta], frame: tuple[int, ...]) -> Tensor:
        """Load the maps of a batch's samples into frames of zeros: (B, *frame, *trailing)."""
        frames: np.ndarray = np.zeros((len(meta), *frame, *self.formats[name].trailing), self.formats[name].dtype)
        for target, sample in zip(frames, meta):
            if sample.id in self.paths[name]:  # else it has no label either
                (y, x), (height, width) = sample.offset, sample.native_size
                target[y : y + height, x : x + width] = self._load(name, sample)
        return torch.from_numpy(frames).to(self.device)

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
    """Writes every image's predictions.

    Args:
        folder: where to write, new or empty.
        tasks: name -> task.
        data_root: folder of the dataset, in which ``folder`` must not lie.

    Raises:
        ParameterError: ``folder`` is not empty or lies in the dataset.
    """

    def __init__(self, folder: Path, tasks: Mapping[str, Task], data_root: str | Path | None) -> None:
        self.folder, self.formats = folder, {name: FORMATS[name](task) for name, task in tasks.items()}
        if folder.exists() and (not folder.is_dir() or list_folder(folder)):
            state = "is not empty" if folder.is_dir() else "is a file"
            raise ParameterError("save_predictions", f"={folder} {state}; give a new folder.")
        if data_root is not None and folder.resolve().is_relative_to(Path(data_root).resolve()):
            raise ParameterError(
                "save_predictions", f"={folder} lies in the dataset {data_root}; give a folder outside."
            )

    def write(self, id: str, predictions: Mapping[str, Tensor]) -> None:
        """Write one file per task of an image's unpadded raw predictions (C, H, W).

        Raises:
            UserError: NaN, which 8 bits can't hold, or an id that would lead out of the folder (a custom dataset).
        """
        if find_invalid_id([id]) is not None:
            raise ParameterError(
                "save_predictions",
                f": the dataset has {escape_control_characters(id[:80])!r}, {INVALID_ID_MESSAGE}.",
            )
        for name, maps in self.formats.items():
            path = self.folder / name / f"{id}{maps.suffixes[0]}"
            if path.suffix == ".png" and predictions[name].isnan().any():
                raise UserError(
                    f"the prediction of {name} for {id} holds NaN, which a map of 8 bits can't; evaluate without "
                    "save_predictions to see how much, and fix the model."
                )
            data = _encode(maps.from_raw(predictions[name]), path.suffix)
            try:
                write_atomically(path, partial(Path.write_bytes, data=data), durable=False)
            except OSError as error:
                raise UserError(
                    f"{path} can't be written ({error.strerror}); give another folder, save_predictions=DIR."
                ) from error


def find_map_folder(root: Path, task_names: Sequence[str]) -> tuple[Path, list[str]]:
    """Find the folder with a folder of maps per task: ``root``, or the ``results`` that published code makes in it.

    Args:
        root: folder that the user named.
        task_names: tasks that the dataset labels.

    Returns:
        the folder, and which of the tasks have maps in it.

    Raises:
        ParameterError: none has.
    """
    if not root.is_dir():
        raise ParameterError("predictions", f"={root} is not a folder; give the one with a folder of maps per task.")
    for folder in (root, root / "results"):
        names = [name for name in TASK_NAMES if name in task_names and (folder / name).is_dir()]
        if names:
            return folder, names
    raise ParameterError(
        "predictions", f"={root} holds none of the folders {', '.join(task_names)}; maps are <task>/<id>.png."
    )


def list_maps(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """List the maps in a task's folder, id -> file; ignore hidden files and those with another suffix.

    Raises:
        UserError: no folder, or two maps of one image.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; save the task's maps there or leave the task out.")
    paths: dict[str, Path] = {}
    for path in sorted(list_folder(folder)):
        if path.suffix in suffixes and not path.name.startswith("."):
            if path.stem in paths:
                raise UserError(f"{folder} holds both {paths[path.stem].name} and {path.name}; keep one of them.")
            paths[path.stem] = path
    return paths


def _is_binary(maps: MapFormat, paths: Sequence[Path]) -> bool:
    """Return whether maps hold 0 and 1 only, and both; the first that holds more ends the search."""
    highest = 0
    for path in paths:
        highest = max(highest, int(maps.load(path).max(initial=0)))
        if highest > 1:
            return False
    return highest == 1


def _check_missing(folder: Path, maps: MapFormat, paths: Mapping[str, Path], dataset: MultiTaskDataset) -> None:
    """Raise ``UserError`` if an image has a label of the task, but no map; name the first three of them."""
    missing = [index for index, id in enumerate(dataset.ids) if id not in paths]
    labelled: list[str] = []
    description = f"labels without a map of {maps.task.name}"
    for index in progress_bar(missing, desc=description, leave=False, disable=not missing):
        if _is_labelled(dataset, index, maps.task):
            labelled.append(dataset.ids[index])
        if len(labelled) == _MAX_LISTED:  # the others need not be read
            break
    if labelled:
        others = describe_other_files(folder, {dataset.ids[index] for index in missing})
        raise UserError(
            f"{folder} has no map ({', '.join(maps.suffixes)}) of {len(missing)} of the {len(dataset.ids)} images, "
            f"among them {', '.join(labelled)}{others}; add them, or choose the dataset and split that "
            "the maps were made for."
        )


def _is_labelled(dataset: MultiTaskDataset, index: int, task: Task) -> bool:
    """Return whether an image has any valid pixel of a task."""
    return has_label(task, finalize_labels(dataset.read(index), {task.name: task}).labels[task.name])


def has_label(task: Task, label: np.ndarray) -> bool:
    """Return whether a finalized label (layout of the data pipeline) has any valid pixel."""
    planes = label if label.ndim == 2 else label.transpose(2, 0, 1)
    return bool(task.valid(task.collate(np.ascontiguousarray(planes[None]))).any())


def _read_png(path: Path, task: Task, colour_types: Sequence[int]) -> np.ndarray:
    """Read an 8-bit PNG of one of the given colour types: uint8 (H, W), of a palette its indices, or RGB (H, W, 3)."""
    data = read_bytes(path)
    if not data.startswith(_PNG) or len(data) < 26:
        raise UserError(f"{path} is not a PNG; write it again.")
    bits, colour_type = data[24], data[25]
    if colour_type not in colour_types or (bits != 8 and colour_type != _PALETTE):
        raise UserError(
            f"{path} is an image of {bits} bits and {_CHANNELS.get(colour_type, 'an unknown type')}, but maps of "
            f"{task.name} are 8-bit images of {_CHANNELS[colour_types[0]]}; write them so."
        )
    return read_png(path, data)


def _logits(offset: float) -> Tensor:
    """Return the logit of the probability (v + offset) / 255 of every code v, float32 (256,).

    That of 255 is of a probability that is 1 in float64, too.
    """
    p = (torch.arange(255, dtype=torch.float64) + offset) / 255
    return torch.cat([p.logit(), torch.tensor([40.0])]).float()


def _truncate(probability: Tensor) -> np.ndarray:
    """Convert probabilities (H, W) to codes of 8 bits, truncated as in InvPT/evaluation/evaluate_utils.py:106."""
    return (255 * probability).to(torch.uint8).cpu().numpy()


def _encode(values: np.ndarray, suffix: str) -> bytes:
    """Encode values as the content of a .npy or .png file."""
    if suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, values)
        return buffer.getvalue()
    return cv2.imencode(suffix, values if values.ndim == 2 else cv2.cvtColor(values, cv2.COLOR_RGB2BGR))[1].tobytes()


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + (" ..." if len(names) > _MAX_LISTED else "")


def _count_maps(count: int) -> str:
    return f"{count} map{'' if count == 1 else 's'}"


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}"
