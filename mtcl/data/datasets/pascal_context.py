"""PASCAL-Context in the archives that the field passes around, with the labels that have to be derived."""

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
FILES_PER_WORKER = 256  # files that are worth a process of their own when persons are searched


class PascalContext(FileDataset):
    """The training or the validation list of PASCAL-Context, or of anything in its archives' layout.

    ``root`` is the archive's folder or the folder that holds it. ``split="standard"`` reads
    ``ImageSets/Context/train.txt`` and ``val.txt``, another name ``X`` reads ``X_train.txt`` and ``X_val.txt``; only
    the folders of the ``tasks`` in use have to exist. With human parts alone, pictures without a person are left out,
    as the field does. ``limit`` keeps the first so many of what there is then. ``cache`` and ``memory_map``:
    :meth:`FileDataset.open_cache`; nothing is written below ``root``.
    """

    def __init__(
        self,
        root: str | Path,
        part: Literal["train", "val"],
        tasks: Sequence[str],
        split: str = "standard",
        limit: int | None = None,
        cache: str | Path | None = None,
        memory_map: bool = False,
    ) -> None:
        if unknown := [name for name in tasks if name not in TASKS]:
            raise UserError(f"PASCAL-Context has no labels for {unknown}; choose tasks among {list(TASKS)}.")
        super().__init__()
        self.root = find_dataset_root(Path(root), ROOTS, "ImageSets/Context", "PASCAL-Context", LAYOUT)
        self.tasks = tuple(tasks)
        self._only_parts = set(tasks) == {"human_parts"}
        self._in_voc = frozenset(entry.stem for entry in list_folder(self.root / "semseg" / "VOC12"))
        listed = functools.partial(read_id_list, self.root / "ImageSets" / "Context", part, split)
        self.ids = listed(limit)
        if self._only_parts:  # the limit counts pictures with persons
            self.ids = listed(None)
        self.check_files(LAYOUT)
        self.open_cache(cache, memory_map)
        if self._only_parts:
            self.ids = self._with_persons(part, limit)

    @classmethod
    def task_options(cls, **options: Any) -> Mapping[str, Mapping[str, Any]]:
        """Task name -> options for ``mtcl.tasks.build_task``; the same whatever the reader's options."""
        return {"semseg": {"class_names": VOC21}, "human_parts": {}, "sal": {}, "normals": {}, "edge": {}}

    def summary(self) -> str:
        told = [f"{self.root}: {len(self.ids)} pictures"]
        if self._only_parts:
            told[0] += " with persons"
        if "semseg" in self.tasks:
            told[0] += f", {sum(name in self._in_voc for name in self.ids)} with labels of VOC12"
        derived = {"human_parts": "parts", "normals": "masks of normals", "edge": "edges"}
        if kinds := ", ".join(derived[task] for task in self.tasks if task in derived):
            where = (
                "at each access: data.cache is null"
                if self.array_cache is None
                else f"once, kept in {self.array_cache.folder}"
            )
            told.append(f"{kinds} derived {where}")
        return "; ".join(told)

    def source_files(self, kind: str, name: str) -> tuple[Path, ...]:
        image = self.root / "JPEGImages" / f"{name}.jpg"
        context = self.root / "pascal-context" / "trainval" / f"{name}.mat"
        match kind:
            case "image":
                return (image,)
            case "semseg":
                folder = "VOC12" if name in self._in_voc else "pascal-context"
                return (self.root / "semseg" / folder / f"{name}.png",)
            case "human_parts":  # without any object, the label takes its size from the picture
                return self.root / "human_parts" / f"{name}.mat", image
            case "normals":
                return self.root / "normals_distill" / f"{name}.png", context
            case "edge":
                return (context,)
            case _:
                return (self.root / "sal_distill" / f"{name}.png",)

    def decode_settings(self) -> Mapping[str, Any]:
        return {}

    def array_kinds(self) -> Sequence[str]:
        return (IMAGE, *TASKS)

    def decode(self, kind: str, name: str) -> np.ndarray:
        sources = self.source_files(kind, name)
        match kind:
            case "image":
                return files.read_image(sources[0])
            case "semseg":
                return pascal_labels.validate_voc_classes(files.read_label_image(sources[0]), sources[0])
            case "human_parts":
                return self.cached_label("human_parts", name, sources, lambda: _human_parts(*sources))
            case "normals":
                return self._normals(name, *sources)
            case "edge":
                return self.cached_label(
                    "edge", name, sources, lambda: pascal_labels.semantic_edges(_context(sources[0]))
                )
            case _:
                return (files.read_label_image(sources[0]) >= 128).astype(np.uint8)  # v / 255 > 0.5

    def _normals(self, name: str, path: Path, context: Path) -> np.ndarray:
        """The file's codes, uint8 (H, W, 3), (0, 0, 0) where the class of the picture has no normals."""
        codes = files.read_color_label(path)
        gate = self.cached_label("gate", name, (context,), lambda: pascal_labels.has_normals(_context(context)))
        size = codes.shape[0], codes.shape[1]
        if not same_aspect((gate.shape[0], gate.shape[1]), size):
            raise UserError(
                f"{context} is {gate.shape[0]}x{gate.shape[1]} pixels (height x width), but {path} is "
                f"{size[0]}x{size[1]}; both must show the same."
            )
        return codes * resize_nearest(gate, size)[..., None]

    def _with_persons(self, part: str, limit: int | None) -> list[str]:
        """The first ``limit`` ids with a person; as ``ImageSets/Parts`` says, or else by a search that is remembered.

        The search goes through the list in pieces, so that a small limit costs little.
        """
        known = _listed_persons(self.root / "ImageSets" / "Parts" / f"{part}.txt", self.ids)
        memory = None if self.array_cache is None else self.array_cache.folder / "persons.json"
        if known is None:
            known = {} if memory is None else self._remembered(memory)
        piece = len(self.ids) if limit is None else max(limit, FILES_PER_WORKER)
        kept: list[str] = []
        for start in range(0, len(self.ids), piece):
            names = self.ids[start : start + piece]
            self._search_persons([name for name in names if name not in known], known, memory)
            kept += [name for name in names if known[name]]
            if limit is not None and len(kept) >= limit:
                break
        if not kept:
            raise UserError(f"{self.root} shows no person in any picture of this list; human_parts needs some.")
        return kept[:limit]

    def _remembered(self, memory: Path) -> dict[str, bool]:
        """What a search has written of files that are unchanged."""
        told = _told(memory)
        listed = [name for name in self.ids if name in told]
        return {n: bool(told[n][0]) for n in listed if told[n][1:] == _stamp(self.source_files("human_parts", n)[0])}

    def _search_persons(self, names: Sequence[str], known: dict[str, bool], memory: Path | None) -> None:
        """Add to ``known`` whether ``names`` show persons, from their files, and keep it in ``memory``."""
        if not names:
            return
        paths = [self.source_files("human_parts", name)[0] for name in names]
        workers = min(os.cpu_count() or 1, len(paths) // FILES_PER_WORKER)
        found = run_jobs(_shows_person, paths, workers if workers > 1 else 0, "pictures with persons")
        known.update(zip(names, found))
        if memory is not None:
            told = {name: [shown, *_stamp(path)] for name, shown, path in zip(names, found, paths)}
            text = json.dumps({**_told(memory), **told})  # what another process added stays
            with contextlib.suppress(OSError):  # a full disk: the search is made again
                write_atomically(memory, lambda temporary: temporary.write_text(text, "utf-8"))


def _context(path: Path) -> np.ndarray:
    return pascal_labels.validate_context_classes(files.read_mat(path, "LabelMap"), path)


def _persons(path: Path) -> list[pascal_labels.Person]:
    return pascal_labels.parse_persons(files.read_mat(path, "anno"), path)


def _human_parts(path: Path, image: Path) -> np.ndarray:
    """The label of native size, all 0 where there is no part."""
    persons = _persons(path)
    shown = persons[0].mask if persons else files.read_image(image)
    return pascal_labels.draw_human_parts(persons, (shown.shape[0], shown.shape[1]), path)


def _shows_person(path: Path) -> bool:
    return pascal_labels.shows_person(_persons(path))


def _stamp(path: Path) -> list[int]:
    """What changes with a file."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _listed_persons(path: Path, ids: Sequence[str]) -> dict[str, bool] | None:
    """id -> whether a person is among the objects that an archive's list gives it; None if that is not all of it."""
    listed = _json_object(path)
    if any(not isinstance(listed.get(name), list) for name in ids):
        return None
    return {name: PERSON in listed[name] for name in ids}


def _told(path: Path) -> dict[str, list[Any]]:
    """id -> whether it shows a person, and its file's stamp, as a search has written it; what is damaged is dropped."""
    return {name: told for name, told in _json_object(path).items() if isinstance(told, list) and len(told) == 3}


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty if it is missing or damaged."""
    try:
        content = json.loads(files.read_bytes(path))  # times in nanoseconds have more digits than read_json takes
    except (UserError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
