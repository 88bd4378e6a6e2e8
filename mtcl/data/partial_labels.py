"""Partially annotated training: each picture keeps the labels of some tasks only.

The setting of MTPSL (Li et al., CVPR 2022), DiffusionMTL and hierarchical task tokens; validation is always complete.
"""

import codecs
import hashlib
import io
import pickle
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtcl.data.image_io import read_bytes
from mtcl.data.sample import MultiTaskDataset, Sample
from mtcl.errors import UserError, describe_load_error
from mtcl.safe_files import parse_json
from mtcl.tasks import TASK_NAMES
from mtcl.tasks.base import Task

LabelAssignment = Mapping[str, frozenset[str]]  # picture id -> the tasks it has labels of

# The columns of the published tables, which do not name them.
MTPSL_NYUD = ("semseg", "depth", "normals")  # nyuv2_settings/*.pth, a row per training picture
DIFFUSION_PASCAL = ("semseg", "human_parts", "sal", "normals", "edge")  # ssl_mapping/pascal/new_*.pth, by id


class PartiallyLabeledDataset:
    """A reader whose pictures keep the labels that ``labelled`` gives them; the others are void."""

    def __init__(self, reader: MultiTaskDataset, tasks: Mapping[str, Task], label_assignment: LabelAssignment) -> None:
        self.reader, self.tasks, self.label_assignment = reader, dict(tasks), label_assignment
        self.ids: Sequence[str] = reader.ids

    def read(self, index: int, tasks: Collection[str] | None = None) -> Sample:
        sample = self.reader.read(index, self.label_assignment[self.ids[index]])
        height, width = sample.image.shape[:2]
        return sample._replace(
            labels={
                name: sample.labels[name] if name in sample.labels else task.empty_label(height, width)
                for name, task in self.tasks.items()
            }
        )

    def summary(self) -> str:
        counts = {name: sum(name in self.label_assignment[id] for id in self.ids) for name in self.tasks}
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        return f"{self.reader.summary()}; labels of {len(self.ids)} pictures: {told}"

    def fingerprint(self) -> str:
        known = [(id, sorted(self.label_assignment[id])) for id in self.ids]
        return hashlib.sha256(repr((self.reader.fingerprint(), known)).encode()).hexdigest()[:16]


def apply_label_assignment(
    reader: MultiTaskDataset, tasks: Mapping[str, Task], mode: str, seed: int
) -> MultiTaskDataset:
    """``reader`` with the labels that ``choice`` leaves: ``full``, ``one`` or ``random`` (drawn from ``seed``), or
    those of a mapping file."""
    if mode == "full":
        return reader
    if mode in ("one", "random"):
        label_assignment = draw_label_assignment(reader.ids, list(tasks), mode, seed)
    else:
        if not Path(mode).is_file():
            raise UserError(f"data.label_assignment={mode} is neither full, one or random, nor a file with a mapping.")
        label_assignment = read_label_assignment(Path(mode), reader.ids, list(tasks))
    return PartiallyLabeledDataset(reader, tasks, label_assignment)


def draw_label_assignment(ids: Sequence[str], tasks: Sequence[str], mode: str, seed: int) -> LabelAssignment:
    """Which picture has which labels.

    ``one``: a task each, every task equally often, a function of (seed, list of ids, tasks). ``random``: as in MTPSL, 1
    to all but one, every number and then every set of that size equally likely, a function of (seed, id, tasks).
    """
    if len(tasks) < 2:
        raise UserError(
            f"data.label_assignment={mode} needs at least two tasks to choose from; use data.label_assignment=full."
        )
    if mode == "one":
        order = np.random.default_rng([seed, len(tasks)]).permutation(len(ids))
        return {ids[i]: frozenset([tasks[place % len(tasks)]]) for place, i in enumerate(order)}
    return {id: _some(tasks, np.random.default_rng([seed, zlib.crc32(id.encode())])) for id in ids}


def _some(tasks: Sequence[str], rng: np.random.Generator) -> frozenset[str]:
    """A random number of tasks, but all and none, and then random ones."""
    return frozenset(rng.choice(np.array(tasks), rng.integers(1, len(tasks)), replace=False).tolist())


def read_label_assignment(path: Path, ids: Sequence[str], tasks: Sequence[str]) -> LabelAssignment:
    """Which picture has which labels, from a file in one of the published forms.

    - MTPSL, PASCAL-Context (``pascal_settings/*.npy``): task -> ids.
    - DiffusionMTL, PASCAL-Context (``ssl_mapping/pascal/new_*.pth``): id -> flags of semseg, human_parts, sal, normals,
      edge.
    - MTPSL, NYU-v2 (``nyuv2_settings/*.pth``, in DiffusionMTL ``ssl_mapping/nyud_low``): ``labels_weights`` (N, 3) of
      semseg, depth, normals; row i is for picture i of the list.
    - ours (``*.json``): id -> tasks.

    Code in a file is never run. A picture of the list or a task in use that the file does not know is a UserError.
    """
    content = _content(path)
    if not isinstance(content, dict) or not content:
        raise _unknown_form(path)
    columns: tuple[str, ...]
    if "labels_weights" in content:
        columns, table = MTPSL_NYUD, np.asarray(torch.as_tensor(content["labels_weights"]).detach())
        if table.shape != (len(ids), len(columns)):
            raise UserError(
                f"{path} is a table {table.shape} for {len(columns)} tasks, but the training list has {len(ids)} "
                "pictures; use it with the whole standard split."
            )
        found = {id: _flagged(path, columns, row) for id, row in zip(ids, table.tolist())}
    elif all(_is_list_of(value, (int, float)) for value in content.values()):
        columns = DIFFUSION_PASCAL
        found = {str(id): _flagged(path, columns, row) for id, row in content.items()}
    elif not all(_is_list_of(value, str) for value in content.values()):
        raise _unknown_form(path)
    elif path.suffix == ".npy":
        columns = tuple(str(name) for name in content)
        members = {str(name): {str(id) for id in listed} for name, listed in content.items()}
        known = set().union(*members.values())
        found = {id: frozenset(name for name in columns if id in members[name]) for id in known}
    else:
        columns = tuple(sorted({str(name) for value in content.values() for name in value}))
        found = {str(id): frozenset(map(str, names)) for id, names in content.items()}
    if strange := [name for name in columns if name not in TASK_NAMES]:
        raise UserError(f"{path} names {strange[0]!r}, which is no task; the tasks are {', '.join(TASK_NAMES)}.")
    if unknown := [name for name in tasks if name not in columns]:
        raise UserError(f"{path} says nothing of {', '.join(unknown)}; choose tasks.names among {', '.join(columns)}.")
    if missing := [id for id in ids if id not in found]:
        raise UserError(f"{path} lacks {len(missing)} pictures of the training list, first {', '.join(missing[:3])}.")
    return {id: found[id] & frozenset(tasks) for id in ids}


def _is_list_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def _flagged(path: Path, columns: Sequence[str], row: Sequence[float]) -> frozenset[str]:
    if len(row) != len(columns) or not set(row) <= {0, 1}:
        raise UserError(f"{path} has {list(row)} for a picture, but its form has {len(columns)} flags, 0 or 1.")
    return frozenset(name for name, flag in zip(columns, row) if flag)


def _content(path: Path) -> Any:
    data = read_bytes(path)
    if path.suffix == ".json":
        return parse_json(data, path)
    try:
        if path.suffix == ".pth":
            with torch.serialization.safe_globals(_STRINGS):
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if path.suffix == ".npy":
            return _unpickled_npy(data)
    except Exception as error:
        raise UserError(f"{path} can't be read as a mapping of labels ({describe_load_error(error)}).") from error
    raise _unknown_form(path)


# What NumPy's strings and arrays consist of in a pickle; the published tables are keyed by such strings.
_SCALAR, _ARRAY = np.str_().__reduce__()[0], np.empty(0).__reduce__()[0]
_STRINGS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype("U1")),
]


class _Unpickler(pickle.Unpickler):
    """Arrays, strings and containers only."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")
        known = {
            ("numpy._core.multiarray", "scalar"): _SCALAR,
            ("numpy._core.multiarray", "_reconstruct"): _ARRAY,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): codecs.encode,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it would run {module}.{name}")
        return known[module, name]


def _unpickled_npy(data: bytes) -> Any:
    """The one object of a pickled .npy file."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = reader(stream)
    content = _Unpickler(stream).load() if dtype.hasobject else None
    return content.item() if shape == () and isinstance(content, np.ndarray) else content


def _unknown_form(path: Path) -> UserError:
    return UserError(
        f"data.label_assignment={path} is not full, one, random, or a mapping in a form that is known: MTPSL's .npy or .pth, "
        "DiffusionMTL's .pth, or JSON {id: [tasks]}."
    )
