"""PASCAL-Context in the archives in circulation, with the labels that have to be derived."""

import contextlib
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mtcl.atomic import write_atomically
from mtcl.data import image_io as files
from mtcl.data.datasets import pascal_labels
from mtcl.data.datasets.base import IMAGE, FileDataset, find_dataset_root, list_folder, read_id_list, same_aspect
from mtcl.data.datasets.pascal_classes import PERSON
from mtcl.data.transforms import resize_nearest
from mtcl.data.worker_pool import run_jobs
from mtcl.errors import UserError
from mtcl.tasks import VOC21

LAYOUT = (
    "JPEGImages/<id>.jpg, semseg/VOC12/<id>.png or semseg/pascal-context/<id>.png, human_parts/<id>.mat, "
    "sal_distill/<id>.png, normals_distill/<id>.png, pascal-context/trainval/<id>.mat for normals and edges, and "
    "ImageSets/Context/train.txt, val.txt"
)
ROOTS = ("PASCALContext", "PASCAL_MT")  # the archives' own folders
TASKS = ("semseg", "human_parts", "sal", "normals", "edge")
FILES_PER_WORKER = 256  # in the search for persons; fewer files do not justify another process


class PascalContext(FileDataset):
    """The training or the validation list of PASCAL-Context, or of anything in its archives' layout.

    Only the folders of the ``tasks`` in use have to exist. With human parts alone, images without a person are left
    out, as is standard. Nothing is written below ``root``.

    Args:
        root: the archive's folder or the folder that holds it.
        subset: "train" or "val".
        tasks: names of the tasks in use.
        split: "standard" for ``ImageSets/Context/train.txt`` and ``val.txt``, X for ``X_train.txt`` and ``X_val.txt``.
        limit: keep the first so many ids, of those with persons if human parts are the only task.
        cache: see :meth:`FileDataset.open_cache`.
        memory_map: see :meth:`FileDataset.open_cache`.
        missing_labels: whether files of labels may be missing, see :meth:`FileDataset.list_present_labels`.

    Raises:
        UserError: what is on disk does not fit.
    """

    def __init__(
        self,
        root: str | Path,
        subset: Literal["train", "val"],
        tasks: Sequence[str],
        split: str = "standard",
        limit: int | None = None,
        cache: str | Path | None = None,
        memory_map: bool = False,
        missing_labels: bool = False,
    ) -> None:
        if unknown := [name for name in tasks if name not in TASKS]:
            raise UserError(f"PASCAL-Context has no labels for {unknown}; choose tasks among {list(TASKS)}.")
        super().__init__()
        self.root = find_dataset_root(Path(root), ROOTS, "ImageSets/Context", "PASCAL-Context", LAYOUT)
        self.tasks, self.missing_labels = tuple(tasks), missing_labels
        self._only_parts = set(tasks) == {"human_parts"}
        self._in_voc = frozenset(entry.stem for entry in list_folder(self.root / "semseg" / "VOC12"))
        read_ids = functools.partial(read_id_list, self.root / "ImageSets" / "Context", subset, split)
        self.ids = read_ids(limit)
        if self._only_parts:  # the limit counts images with persons
            self.ids = read_ids(None)
        self.check_files(LAYOUT)
        self.open_cache(cache, memory_map)
        if self._only_parts:
            if missing_labels:
                present = self.list_present_labels()
                self.ids = [name for name in self.ids if present[name]]
                if not self.ids:
                    raise UserError(
                        f"{self.root}/human_parts has no file for any image of this list; human_parts needs some."
                    )
            self.ids = self._with_persons(subset, limit)

    @classmethod
    def task_options(cls, **_options: Any) -> Mapping[str, Mapping[str, Any]]:
        """Return task name -> options for ``mtcl.tasks.build_task``, whatever the dataset's options."""
        return {"semseg": {"class_names": VOC21}, "human_parts": {}, "sal": {}, "normals": {}, "edge": {}}

    def summary(self) -> str:
        """Describe the list and how derived labels are made, in one line for the log."""
        texts = [f"{self.root}: {len(self.ids)} images"]
        if self._only_parts:
            texts[0] += " with persons"
        if "semseg" in self.tasks:
            texts[0] += f", {sum(name in self._in_voc for name in self.ids)} with labels of VOC12"
        derived = {"human_parts": "parts", "normals": "masks of normals", "edge": "edges"}
        if kinds := ", ".join(derived[task] for task in self.tasks if task in derived):
            where = (
                "at each access (no cache)" if self.array_cache is None else f"once, kept in {self.array_cache.folder}"
            )
            texts.append(f"{kinds} derived {where}")
        return "; ".join(texts)

    def source_files(self, kind: str, name: str) -> tuple[Path, ...]:
        """Return the files of an array; a derived label can have two."""
        image = self.root / "JPEGImages" / f"{name}.jpg"
        context = self.root / "pascal-context" / "trainval" / f"{name}.mat"
        match kind:
            case "image":
                return (image,)
            case "semseg":
                folder = "VOC12" if name in self._in_voc else "pascal-context"
                return (self.root / "semseg" / folder / f"{name}.png",)
            case "human_parts":  # without any object, the label takes its size from the image
                return self.root / "human_parts" / f"{name}.mat", image
            case "normals":
                return self.root / "normals_distill" / f"{name}.png", context
            case "edge":
                return (context,)
            case _:
                return (self.root / "sal_distill" / f"{name}.png",)

    def decode_settings(self) -> Mapping[str, Any]:
        """Return no settings."""
        return {}

    def array_kinds(self) -> Sequence[str]:
        """Return "image" and the five tasks."""
        return (IMAGE, *TASKS)

    def decode(self, kind: str, name: str) -> np.ndarray:
        """Return the array at the size of its file."""
        sources = self.source_files(kind, name)
        match kind:
            case "image":
                return files.read_image(sources[0])
            case "semseg":
                return pascal_labels.validate_voc_classes(files.read_label_image(sources[0]), sources[0])
            case "human_parts":
                return self.cached_label("human_parts", name, sources, lambda: _read_human_parts(*sources))
            case "normals":
                return self._decode_normals(name, *sources)
            case "edge":
                return self.cached_label(
                    "edge", name, sources, lambda: pascal_labels.semantic_edges(_read_context(sources[0]))
                )
            case _:
                return (files.read_label_image(sources[0]) >= 128).astype(np.uint8)  # v / 255 > 0.5

    def _decode_normals(self, name: str, path: Path, context: Path) -> np.ndarray:
        """Return the file's codes, uint8 (H, W, 3), (0, 0, 0) where the image's class has no normals."""
        codes = files.read_color_label(path)
        gate = self.cached_label("gate", name, (context,), lambda: pascal_labels.has_normals(_read_context(context)))
        size = codes.shape[0], codes.shape[1]
        if not same_aspect((gate.shape[0], gate.shape[1]), size):
            raise UserError(
                f"{context} is {gate.shape[0]}x{gate.shape[1]} pixels (height x width), but {path} is "
                f"{size[0]}x{size[1]}; both must show the same view."
            )
        return codes * resize_nearest(gate, size)[..., None]

    def _with_persons(self, subset: str, limit: int | None) -> list[str]:
        """Return the first ``limit`` ids with a person.

        ``ImageSets/Parts`` lists them; without it they are searched for, and the result is stored. The search goes
        through the list in chunks, so that a small limit costs little.
        """
        has_person = _listed_persons(self.root / "ImageSets" / "Parts" / f"{subset}.txt", self.ids)
        memory = None if self.array_cache is None else self.array_cache.folder / "persons.json"
        if has_person is None:
            has_person = {} if memory is None else self._stored_search(memory)
        chunk = len(self.ids) if limit is None else max(limit, FILES_PER_WORKER)
        ids: list[str] = []
        for start in range(0, len(self.ids), chunk):
            names = self.ids[start : start + chunk]
            self._search_persons([name for name in names if name not in has_person], has_person, memory)
            ids += [name for name in names if has_person[name]]
            if limit is not None and len(ids) >= limit:
                break
        if not ids:
            raise UserError(f"{self.root} shows no person in any image of this list; human_parts needs some.")
        return ids[:limit]

    def _stored_search(self, memory: Path) -> dict[str, bool]:
        """Return the stored search results of files that are unchanged."""
        results = _read_search_results(memory)
        names = [name for name in self.ids if name in results]
        return {
            n: bool(results[n][0]) for n in names if results[n][1:] == _stamp(self.source_files("human_parts", n)[0])
        }

    def _search_persons(self, names: Sequence[str], has_person: dict[str, bool], memory: Path | None) -> None:
        """Add to ``has_person`` whether ``names`` show persons, from their files, and store it in ``memory``."""
        if not names:
            return
        paths = [self.source_files("human_parts", name)[0] for name in names]
        workers = min(os.cpu_count() or 1, len(paths) // FILES_PER_WORKER)
        flags = run_jobs(_shows_person, paths, workers if workers > 1 else 0, "images with persons")
        has_person.update(zip(names, flags))
        if memory is not None:
            results = {name: [flag, *_stamp(path)] for name, flag, path in zip(names, flags, paths)}
            text = json.dumps({**_read_search_results(memory), **results})  # keep what another process added
            with contextlib.suppress(OSError):  # a full disk: the search is repeated next time
                write_atomically(memory, lambda temporary: temporary.write_text(text, "utf-8"))


def _read_context(path: Path) -> np.ndarray:
    """Read the LabelMap of PASCAL-Context."""
    return pascal_labels.validate_context_classes(files.read_mat(path, "LabelMap"), path)


def _read_persons(path: Path) -> list[pascal_labels.Person]:
    """Read the persons of PASCAL-Part."""
    return pascal_labels.parse_persons(files.read_mat(path, "anno"), path)


def _read_human_parts(path: Path, image: Path) -> np.ndarray:
    """Return the label of native size, all 0 where there is no part."""
    persons = _read_persons(path)
    reference = persons[0].mask if persons else files.read_image(image)
    return pascal_labels.draw_human_parts(persons, (reference.shape[0], reference.shape[1]), path)


def _shows_person(path: Path) -> bool:
    """Return whether an annotation file shows a person."""
    return pascal_labels.shows_person(_read_persons(path))


def _stamp(path: Path) -> list[int]:
    """Return size and modification time of a file, which tell a changed one."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _listed_persons(path: Path, ids: Sequence[str]) -> dict[str, bool] | None:
    """Return id -> whether the archive's list names a person among its objects; None if it lacks an id."""
    listed = _json_object(path)
    if any(not isinstance(listed.get(name), list) for name in ids):
        return None
    return {name: PERSON in listed[name] for name in ids}


def _read_search_results(path: Path) -> dict[str, list[Any]]:
    """Return id -> [shows a person, stamp of the file] as a search stored it; damaged entries are dropped."""
    return {
        name: result for name, result in _json_object(path).items() if isinstance(result, list) and len(result) == 3
    }


def _json_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; empty if it is missing or damaged."""
    try:
        content = json.loads(files.read_bytes(path))  # times in nanoseconds have more digits than read_json accepts
    except (UserError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
