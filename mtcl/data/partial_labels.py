"""Partially annotated training: each image keeps the labels of some tasks only.

The setting of MTPSL (Li et al., CVPR 2022), DiffusionMTL and hierarchical task tokens; validation is always complete.
"""

import codecs
import hashlib
import io
import json
import pickle
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtcl.atomic import convert_disk_errors, write_atomically
from mtcl.data.datasets.base import FileDataset
from mtcl.data.image_io import read_bytes
from mtcl.data.sample import MultiTaskDataset, Sample
from mtcl.errors import ParameterError, UserError, describe_load_error
from mtcl.safe_files import parse_json
from mtcl.tasks import TASK_NAMES
from mtcl.tasks.base import Task

LabelAssignment = Mapping[str, frozenset[str]]  # image id -> the tasks it has labels of

PARAMETER = "label_assignment"  # the parameter that errors name
PRESENT = "present"  # its value for the labels that there are files of

# The columns of the published tables, which do not name them.
MTPSL_NYUD = ("semseg", "depth", "normals")  # nyuv2_settings/*.pth, a row per training image
MTPSL_CITYSCAPES = ("semseg", "depth")  # cityscapes_settings/*.pth, likewise
DIFFUSION_PASCAL = ("semseg", "human_parts", "sal", "normals", "edge")  # ssl_mapping/pascal/new_*.pth, by id


class PartiallyLabeledDataset:
    """A dataset whose images keep the labels that ``label_assignment`` gives them; other labels are void.

    Args:
        dataset: images with all labels.
        tasks: tasks in use, by name.
        label_assignment: image id -> the tasks it keeps labels of; of tasks that are not in use nothing is read.
        source: where the assignment comes from, for the record of a run: a JSON object.
        label_tasks: the tasks among which the labels were distributed; default: those in use.

    Attributes:
        num_unlabeled: number of images that the assignment gives no label of any of ``label_tasks``.
    """

    def __init__(
        self,
        dataset: MultiTaskDataset,
        tasks: Mapping[str, Task],
        label_assignment: LabelAssignment,
        source: Mapping[str, Any] | None = None,
        label_tasks: Sequence[str] | None = None,
    ) -> None:
        self.dataset, self.tasks, self.source = dataset, dict(tasks), dict(source or {})
        self.label_tasks = list(tasks if label_tasks is None else label_tasks)
        self.ids: Sequence[str] = dataset.ids
        self.num_unlabeled = sum(label_assignment[id].isdisjoint(self.label_tasks) for id in self.ids)
        self.label_assignment: LabelAssignment = {id: label_assignment[id] & self.tasks.keys() for id in self.ids}

    def read(self, index: int, tasks: Collection[str] | None = None) -> Sample:
        """Return an image with its assigned labels of ``tasks`` (default: all in use); other labels are void."""
        assigned = self.label_assignment[self.ids[index]]
        sample = self.dataset.read(index, assigned if tasks is None else assigned & set(tasks))
        height, width = sample.image.shape[:2]
        return sample._replace(
            labels={
                name: sample.labels[name] if name in sample.labels else task.empty_label(height, width)
                for name, task in self.tasks.items()
                if tasks is None or name in tasks
            }
        )

    def summary(self) -> str:
        """Describe the dataset and the number of labels of each task."""
        text = ", ".join(f"{name} {count}" for name, count in self.count_labels().items())
        return f"{self.dataset.summary()}; labels of {len(self.ids)} images: {text}"

    def count_labels(self) -> dict[str, int]:
        """Return task -> number of images with its label."""
        return {name: sum(name in self.label_assignment[id] for id in self.ids) for name in self.tasks}

    def fingerprint(self) -> str:
        """Return a short hash of the dataset and the assignment."""
        assignment = [(id, sorted(self.label_assignment[id])) for id in self.ids]
        return hashlib.sha256(repr((self.dataset.fingerprint(), assignment)).encode()).hexdigest()[:16]


def apply_label_assignment(
    dataset: MultiTaskDataset,
    tasks: Mapping[str, Task],
    mode: str,
    seed: int,
    fractions: Mapping[str, float] | None = None,
    *,
    label_tasks: Sequence[str] | None = None,
) -> MultiTaskDataset:
    """Return ``dataset`` restricted to some of its labels.

    With fewer tasks than ``label_tasks`` an image whose labels are of the others has none; it stays in the list, as in
    MTPSL's training of one task (nyu_stl_sl.py).

    Args:
        dataset: images with all labels.
        tasks: tasks in use, by name.
        mode: ``full``; ``one`` or ``random``, drawn from ``seed``; or the path of a mapping file.
        seed: seed of the drawn assignments.
        fractions: task -> fraction of the images that keep its label, for ``full``; tasks not listed keep all.
        label_tasks: tasks among which the other modes distribute labels, all of those in use among them; default: those
            in use.

    Raises:
        UserError: the mode is unknown, the file does not cover the dataset and the tasks, or a fraction is of no task.
    """
    if fractions:
        if mode != "full":
            raise ParameterError("label_fractions", f" needs label_assignment=full, not {mode}.")
        label_assignment = draw_label_fractions(dataset.ids, list(tasks), fractions, seed)
        source: dict[str, Any] = {"rule": "fractions", "fractions": dict(fractions), "seed": seed}
        return PartiallyLabeledDataset(dataset, tasks, label_assignment, source)
    if mode == "full":
        return dataset
    label_tasks = list(tasks if label_tasks is None else label_tasks)
    if mode in ("one", "random"):
        label_assignment = draw_label_assignment(dataset.ids, label_tasks, mode, seed)
        source = {"rule": mode, "seed": seed}
    else:
        if not Path(mode).is_file():
            raise ParameterError(
                PARAMETER, f"={mode} is neither full, one, random or present, nor a file with a mapping."
            )
        label_assignment = read_label_assignment(Path(mode), dataset.ids, label_tasks)
        source = {"file": Path(mode).name, "sha256": hashlib.sha256(read_bytes(Path(mode))).hexdigest()}
    if len(label_tasks) > len(tasks):
        source["tasks"] = label_tasks
    return PartiallyLabeledDataset(dataset, tasks, label_assignment, source, label_tasks)


def keep_present_labels(dataset: FileDataset, tasks: Mapping[str, Task]) -> PartiallyLabeledDataset:
    """Return ``dataset`` with the labels that it has files of; other labels are void.

    Raises:
        UserError: a task has no label at all.
    """
    label_assignment = dataset.list_present_labels()
    for name in tasks:
        if not any(name in present for present in label_assignment.values()):
            raise ParameterError(
                PARAMETER, f"={PRESENT}: none of the {len(label_assignment)} images has files of the labels of {name}."
            )
    return PartiallyLabeledDataset(dataset, tasks, label_assignment, {"rule": PRESENT})


def draw_label_assignment(ids: Sequence[str], tasks: Sequence[str], mode: str, seed: int) -> LabelAssignment:
    """Draw the tasks that each image is labelled for.

    ``one``: a task each, every task equally often, a function of (seed, list of ids, tasks). ``random``: as in MTPSL,
    1 to all but one, every number and then every set of that size equally likely, a function of (seed, id, tasks).
    """
    if len(tasks) < 2:
        raise ParameterError(
            "label_tasks",
            f" must list all tasks that share the images, for label_assignment={mode} chooses among two or more and "
            "there is one in use; or keep all labels by label_assignment=full.",
        )
    if mode == "one":
        order = np.random.default_rng([seed, len(tasks)]).permutation(len(ids))
        return {ids[i]: frozenset([tasks[position % len(tasks)]]) for position, i in enumerate(order)}
    return {id: _draw_tasks(tasks, np.random.default_rng([seed, zlib.crc32(id.encode())])) for id in ids}


def draw_label_fractions(
    ids: Sequence[str], tasks: Sequence[str], fractions: Mapping[str, float], seed: int
) -> LabelAssignment:
    """Draw for each listed task the images that keep its label, a function of (seed, list of ids, task).

    Args:
        ids: of the images.
        tasks: in use.
        fractions: task -> fraction f of the N images, 0 < f <= 1: round(f N) images, at least one, keep its label.
        seed: of the draw.
    """
    if unknown := [name for name in fractions if name not in tasks]:
        raise ParameterError(
            "label_fractions", f" names {unknown[0]}, which is not in use; in use: {', '.join(tasks)}."
        )
    if wrong := [name for name, fraction in fractions.items() if not 0 < fraction <= 1]:
        raise ParameterError("label_fractions", f".{wrong[0]}={fractions[wrong[0]]} must be above 0 and at most 1.")
    labelled: dict[str, set[str]] = {name: set(ids) for name in tasks}
    for name, fraction in fractions.items():
        order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(ids))
        labelled[name] = {ids[i] for i in order[: max(1, round(fraction * len(ids)))]}
    return {id: frozenset(name for name in tasks if id in labelled[name]) for id in ids}


def _draw_tasks(tasks: Sequence[str], rng: np.random.Generator) -> frozenset[str]:
    """Draw a random number of tasks, at least one and not all, and then that many tasks."""
    return frozenset(rng.choice(np.array(tasks), rng.integers(1, len(tasks)), replace=False).tolist())


def read_label_assignment(path: Path, ids: Sequence[str], tasks: Sequence[str]) -> LabelAssignment:
    """Read the tasks that each image is labelled for from a file in one of the published formats.

    - MTPSL, PASCAL-Context (``pascal_settings/*.npy``): task -> ids.
    - DiffusionMTL, PASCAL-Context (``ssl_mapping/pascal/new_*.pth``): id -> flags of semseg, human_parts, sal, normals,
      edge.
    - MTPSL, NYU-v2 (``nyuv2_settings/*.pth``, in DiffusionMTL ``ssl_mapping/nyud_low``): ``labels_weights`` (N, 3) of
      semseg, depth, normals; row i is for image i of the list.
    - MTPSL, Cityscapes (``cityscapes_settings/*.pth``): ``labels_weights`` (N, 2) of semseg and depth, likewise.
    - ours (``*.json``): id -> tasks.

    Code in a file is never run.

    Raises:
        UserError: the format is unknown, or the file lacks an image of the list or a task in use.
    """
    content = _load_mapping(path)
    if not isinstance(content, dict) or not content:
        raise _unknown_format_error(path)
    columns: tuple[str, ...]
    if "labels_weights" in content:
        table = np.asarray(torch.as_tensor(content["labels_weights"]).detach())
        tables = {(3,): ("NYU-v2", MTPSL_NYUD), (2,): ("Cityscapes in MTAN's layout", MTPSL_CITYSCAPES)}
        if table.shape[1:] not in tables:
            raise _unknown_format_error(path)
        dataset, columns = tables[table.shape[1:]]
        if len(table) != len(ids):
            raise UserError(
                f"{path} is a table of {len(table)} images of {dataset} (labels of {', '.join(columns)}), but the "
                f"training list has {len(ids)} images; use it with that dataset's whole standard split."
            )
        assignment = {id: _tasks_of_flags(path, columns, row) for id, row in zip(ids, table.tolist())}
    elif all(_is_list_of(value, (int, float)) for value in content.values()):
        columns = DIFFUSION_PASCAL
        assignment = {str(id): _tasks_of_flags(path, columns, row) for id, row in content.items()}
    elif not all(_is_list_of(value, str) for value in content.values()):
        raise _unknown_format_error(path)
    elif path.suffix == ".npy":
        columns = tuple(str(name) for name in content)
        members = {str(name): {str(id) for id in listed} for name, listed in content.items()}
        listed_ids = set().union(*members.values())
        assignment = {id: frozenset(name for name in columns if id in members[name]) for id in listed_ids}
    else:
        columns = tuple(sorted({str(name) for value in content.values() for name in value}))
        assignment = {str(id): frozenset(map(str, names)) for id, names in content.items()}
    if unknown_tasks := [name for name in columns if name not in TASK_NAMES]:
        raise UserError(f"{path} names {unknown_tasks[0]!r}, which is no task; the tasks are {', '.join(TASK_NAMES)}.")
    if missing_tasks := [name for name in tasks if name not in columns]:
        raise UserError(f"{path} says nothing of {', '.join(missing_tasks)}; choose tasks among {', '.join(columns)}.")
    if missing_ids := [id for id in ids if id not in assignment]:
        raise UserError(
            f"{path} lacks {len(missing_ids)} images of the training list, first {', '.join(missing_ids[:3])}."
        )
    return {id: assignment[id] & frozenset(tasks) for id in ids}


def write_label_assignment(
    path: Path, label_assignment: LabelAssignment, ids: Sequence[str], tasks: Sequence[str]
) -> None:
    """Write the tasks that each image is labelled for, in the published format that the file's ending stands for.

    The same arguments give the same bytes of ``.json``; :func:`read_label_assignment` lists the formats.

    Args:
        path: ``.json``; ``.npy``; or ``.pth``, for the three tasks of NYU-v2's tables or the five of PASCAL-Context's.
        label_assignment: id -> tasks.
        ids: of the images, in the order of the training list.
        tasks: in use.

    Raises:
        UserError: the ending is another, or ``.pth`` has no format for these tasks.
    """
    write: Callable[[Path], object]
    if path.suffix == ".json":
        listed = {id: [name for name in tasks if name in label_assignment[id]] for id in ids}
        text = json.dumps(listed, indent=0) + "\n"
        write = partial(Path.write_text, data=text, encoding="utf-8")
    elif path.suffix == ".npy":
        members = {name: [id for id in ids if name in label_assignment[id]] for name in tasks}
        write = partial(_save_array, array=np.array(members, dtype=object))
    elif path.suffix == ".pth" and set(tasks) == set(MTPSL_NYUD):
        flags = torch.tensor([_flags_of_tasks(MTPSL_NYUD, label_assignment[id]) for id in ids], dtype=torch.float32)
        write = partial(torch.save, {"labels_weights": flags})
    elif path.suffix == ".pth" and set(tasks) == set(DIFFUSION_PASCAL):
        write = partial(torch.save, {id: _flags_of_tasks(DIFFUSION_PASCAL, label_assignment[id]) for id in ids})
    elif path.suffix == ".pth":
        raise UserError(
            f"{path}: .pth has a format for {', '.join(MTPSL_NYUD)} or {', '.join(DIFFUSION_PASCAL)} only, not for "
            f"{', '.join(tasks)}; write .json or .npy"
        )
    else:
        raise UserError(f"{path}: the formats of label files are .json, .npy and .pth; choose one of these endings")
    with convert_disk_errors(path, "choose another path"):
        write_atomically(path, write)


def _save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:  # NumPy adds .npy to a path of another ending
        np.save(file, array, allow_pickle=True)


def _flags_of_tasks(columns: Sequence[str], names: Collection[str]) -> list[int]:
    """Return 1 for each column that is among the tasks, else 0."""
    return [int(column in names) for column in columns]


def _is_list_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Return whether a value is a list of this type only."""
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def _tasks_of_flags(path: Path, columns: Sequence[str], row: Sequence[float]) -> frozenset[str]:
    """Return the tasks whose flag is 1."""
    if len(row) != len(columns) or not set(row) <= {0, 1}:
        raise UserError(f"{path} has {list(row)} for an image, but its form has {len(columns)} flags, 0 or 1.")
    return frozenset(name for name, flag in zip(columns, row) if flag)


def _load_mapping(path: Path) -> Any:
    """Read the object of a mapping file without running code."""
    data = read_bytes(path)
    if path.suffix == ".json":
        return parse_json(data, path)
    try:
        if path.suffix == ".pth":
            with torch.serialization.safe_globals(_STRINGS):
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if path.suffix == ".npy":
            return _unpickle_npy(data)
    except Exception as error:
        raise UserError(f"{path} can't be read as a mapping of labels ({describe_load_error(error)}).") from error
    raise _unknown_format_error(path)


# What NumPy's strings and arrays consist of in a pickle; the published tables are keyed by such strings.
_SCALAR, _ARRAY = np.str_().__reduce__()[0], np.empty(0).__reduce__()[0]
_STRINGS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype("U1")),
]


class _Unpickler(pickle.Unpickler):
    """Unpickles arrays, strings and containers only."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few harmless globals; refuse all others."""
        module = module.replace("numpy.core.", "numpy._core.")
        allowed = {
            ("numpy._core.multiarray", "scalar"): _SCALAR,
            ("numpy._core.multiarray", "_reconstruct"): _ARRAY,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): codecs.encode,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it would run {module}.{name}")
        return allowed[module, name]


def _unpickle_npy(data: bytes) -> Any:
    """Return the single object of a pickled .npy file."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    content = _Unpickler(stream).load() if dtype.hasobject else None
    return content.item() if shape == () and isinstance(content, np.ndarray) else content


def _unknown_format_error(path: Path) -> UserError:
    """Return the error for a file whose format is unknown."""
    return ParameterError(
        PARAMETER,
        f"={path} is not full, one, random, or a mapping in a known format: MTPSL's .npy or .pth, DiffusionMTL's .pth, "
        "or JSON {id: [tasks]}.",
    )
