"""Conversion of the official VOC2010, PASCAL-Context and PASCAL-Part releases to the standard ``PASCALContext`` layout.

The normals and the saliency of that layout were made by other networks and belong to no official release.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtcl.atomic import write_atomically
from mtcl.data import image_io as files
from mtcl.data.datasets import pascal_labels
from mtcl.data.datasets.base import list_folder, same_aspect
from mtcl.data.datasets.pascal_classes import NUM_CONTEXT, VOC_TO_CONTEXT
from mtcl.data.prepare import jobs
from mtcl.data.worker_pool import run_jobs
from mtcl.errors import UserError

OFFICIAL = (4998, 5105)  # images to train on and to validate with
IMAGES = ("JPEGImages", ".jpg")  # folder under the result, suffix
VOC_LABELS = ("semseg/VOC12", ".png")
FROM_CONTEXT = ("semseg/pascal-context", ".png")
CONTEXT = ("pascal-context/trainval", ".mat")
PARTS = ("human_parts", ".mat")
NORMALS = ("normals_distill", ".png")
SALIENCY = ("sal_distill", ".png")
OPTIONAL = {"parts": PARTS, "normals": NORMALS, "saliency": SALIENCY}
NEEDS = {  # task -> what it needs that may be missing
    "semseg": None,
    "human_parts": PARTS,
    "sal": SALIENCY,
    "normals": NORMALS,
    "edge": None,
}
OPTION_OF = {IMAGES: "--voc", CONTEXT: "--context", PARTS: "--parts", NORMALS: "--normals", SALIENCY: "--saliency"}
CONTEXT_TO_VOC = np.zeros(NUM_CONTEXT + 1, np.uint8)  # other classes of PASCAL-Context are VOC's background
CONTEXT_TO_VOC[0] = 255  # no label at all; the release has a class on every pixel
CONTEXT_TO_VOC[list(VOC_TO_CONTEXT)] = np.arange(1, len(VOC_TO_CONTEXT) + 1)

Kind = tuple[str, str]


@dataclass(frozen=True)
class Plan:
    """Sources and destination of a conversion."""

    sources: Mapping[Kind, Path]  # the folders of the releases, for the kinds that were given
    out: Path
    link: bool

    def source(self, kind: Kind, name: str) -> Path:
        """Return the release's file of an id."""
        return self.sources[kind] / f"{name}{kind[1]}"

    def target(self, kind: Kind, name: str) -> Path:
        """Return the output file of an id."""
        return self.out / kind[0] / f"{name}{kind[1]}"


def prepare_pascal(
    voc: Path,
    context: Path,
    out: Path,
    parts: Path | None = None,
    voc_labels: Path | None = None,
    normals: Path | None = None,
    saliency: Path | None = None,
    link: bool = False,
    workers: int = 4,
) -> jobs.Prepared:
    """Write the layout to ``out`` from unpacked releases.

    Existing files are kept, so ``parts``, ``normals`` and ``saliency`` can be added later; the lists are written last.

    Args:
        voc: VOCdevkit/VOC2010.
        context: folder that holds trainval/<id>.mat, or trainval itself.
        out: folder to write.
        parts: folder that holds Annotations_Part/<id>.mat, or Annotations_Part itself.
        voc_labels: VOC folder whose SegmentationClass is used; default: ``voc``.
        normals: the normals_distill folder of the published archive, or the folder that holds it.
        saliency: the sal_distill folder of the published archive, or the folder that holds it.
        link: make absolute symbolic links instead of copies.
        workers: see :func:`mtcl.data.worker_pool.run_jobs`.

    Returns:
        A summary to print, and the config group and options that read the result.
    """
    if workers < 0:
        raise UserError(f"workers={workers} is not possible; give the number of processes, 0 for none besides this.")
    lists = _read_lists(voc)
    sources = _find_sources(voc, context, voc_labels, {"parts": parts, "normals": normals, "saliency": saliency})
    names = [name for ids in lists.values() for name in ids]
    _check_complete(sources, names)
    plan = Plan(sources, out, link)
    try:
        _start_outputs(plan)
        work = _missing_kinds(plan, names)
        run_jobs(functools.partial(_convert, plan), work, workers, "PASCAL-Context")
        _write_lists(out, lists)
    except OSError as error:  # of the result: what can't be read is a UserError
        raise UserError(
            f"{out} can't be written ({error.strerror}); solve that (--link needs little space), then repeat the "
            "command, which continues where it stopped."
        ) from error
    return _summarize(out, lists)


def _read_lists(voc: Path) -> dict[str, list[str]]:
    """Read VOC2010's own lists, which PASCAL-Context keeps: "train" and "val"."""
    folder = voc / "ImageSets" / "Main"
    if not folder.is_dir():
        raise UserError(f"{voc} has no folder ImageSets/Main; give VOC2010 as unpacked, --voc VOCdevkit/VOC2010.")
    return {part: files.read_ids(folder / f"{part}.txt", f"VOC2010's {part} list") for part in ("train", "val")}


def _find_sources(
    voc: Path, context: Path, voc_labels: Path | None, optional: Mapping[str, Path | None]
) -> dict[Kind, Path]:
    """Return the folders of the releases by kind of file."""
    labels = (voc_labels or voc) / "SegmentationClass"
    if not labels.is_dir():
        raise UserError(f"{labels} is not a folder; give --voc-labels a VOC folder that has SegmentationClass.")
    sources = {
        IMAGES: voc / "JPEGImages",
        VOC_LABELS: labels,
        CONTEXT: _inner_folder(context, "trainval", "--context", "PASCAL-Context"),
    }
    inner = {"parts": "Annotations_Part", "normals": NORMALS[0], "saliency": SALIENCY[0]}
    titles = {"parts": "PASCAL-Part", "normals": "the distilled normals", "saliency": "the distilled saliency"}
    for key, folder in optional.items():
        if folder is not None:
            sources[OPTIONAL[key]] = _inner_folder(folder, inner[key], f"--{key}", titles[key])
    return {kind: folder.resolve() for kind, folder in sources.items()}


def _inner_folder(folder: Path, inner: str, option: str, title: str) -> Path:
    """Return the folder ``inner`` below ``folder``, or ``folder`` itself."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the one into which {title} was unpacked, {option} DIR.")
    # PASCAL-Part's archive unpacks into trainval/Annotations_Part or Annotations_Part.
    return next(
        (candidate for candidate in (folder / inner, folder / "trainval" / inner) if candidate.is_dir()), folder
    )


def _check_complete(sources: Mapping[Kind, Path], names: Sequence[str]) -> None:
    """Raise ``UserError`` if a release lacks files; VOC's labels exist for some images only."""
    for (folder, suffix), source in sources.items():
        if (folder, suffix) == VOC_LABELS:
            continue
        existing = _file_names(source)
        missing = [name for name in names if f"{name}{suffix}" not in existing]
        if len(missing) == len(names):
            raise UserError(
                f"{source} holds no {folder.split('/')[-1]} of the listed images, such as {names[0]}{suffix}; give "
                f"{OPTION_OF[folder, suffix]} the folder of that release."
            )
        if missing:
            first = ", ".join(f"{name}{suffix}" for name in missing[:3])
            raise UserError(
                f"{source} lacks the files of {len(missing)} of {len(names)} images, first {first}; unpack the "
                "full release there, and give --voc the VOC of 2010, whose lists are used."
            )


def _start_outputs(plan: Plan) -> None:
    """Stamp the result with its sources; the optional folders separately, so that they can be added later."""

    def describe(kind: Kind) -> list[str | int]:  # not where it lies: a release may move
        return [plan.sources[kind].parent.name, len(_file_names(plan.sources[kind]))]

    jobs.start_output(
        plan.out, {"made": "PASCALContext", "voc-labels": describe(VOC_LABELS), "context": describe(CONTEXT)[1]}
    )
    for key, kind in OPTIONAL.items():
        if kind in plan.sources:
            jobs.start_output(plan.out / kind[0], {key: describe(kind)[1]})


def _missing_kinds(plan: Plan, names: Sequence[str]) -> list[tuple[str, tuple[Kind, ...]]]:
    """Return (id, missing kinds) for the ids that lack anything."""
    labelled = _file_names(plan.sources[VOC_LABELS])
    existing = {kind: _file_names(plan.out / kind[0]) for kind in (*plan.sources, FROM_CONTEXT)}
    work = []
    for name in names:
        unused = FROM_CONTEXT if f"{name}.png" in labelled else VOC_LABELS
        lacks = tuple(
            kind
            for kind, names_of_kind in existing.items()
            if kind != unused and f"{name}{kind[1]}" not in names_of_kind
        )
        if lacks:
            work.append((name, lacks))
    return work


def _convert(plan: Plan, item: tuple[str, tuple[Kind, ...]]) -> None:
    """Check and write the missing files of one id."""
    name, lacks = item
    image = plan.source(IMAGES, name)
    size = files.read_image(image).shape[:2]
    for kind in lacks:
        target = plan.target(kind, name)
        if kind == FROM_CONTEXT:
            labels = _read_context(plan.source(CONTEXT, name), image, size)
            jobs.write_image(target, CONTEXT_TO_VOC[labels])
            continue
        source = plan.source(kind, name)
        if kind in _CHECKS:
            _CHECKS[kind](source, image, size)
        _copy_or_link(source, target, plan.link)


def _read_context(path: Path, image: Path, size: tuple[int, ...]) -> np.ndarray:
    """Read a LabelMap of the image's size."""
    labels = pascal_labels.validate_context_classes(files.read_mat(path, "LabelMap"), path)
    _check_size(labels, path, image, size)
    return labels


def _check_voc(path: Path, image: Path, size: tuple[int, ...]) -> None:
    """Check a label image of VOC."""
    _check_size(pascal_labels.validate_voc_classes(files.read_label_image(path), path), path, image, size)


def _check_parts(path: Path, image: Path, size: tuple[int, ...]) -> None:
    """Check an annotation of PASCAL-Part."""
    persons = pascal_labels.parse_persons(files.read_mat(path, "anno"), path)
    shape = persons[0].mask.shape if persons else size
    _check_size(pascal_labels.draw_human_parts(persons, (shape[0], shape[1]), path), path, image, size)


_CHECKS: dict[Kind, Callable[[Path, Path, tuple[int, ...]], object]] = {
    VOC_LABELS: _check_voc,
    CONTEXT: _read_context,
    PARTS: _check_parts,
    NORMALS: lambda path, *image: _check_size(files.read_color_label(path), path, *image),
    SALIENCY: lambda path, *image: _check_size(files.read_label_image(path), path, *image),
}


def _check_size(label: np.ndarray, path: Path, image: Path, size: tuple[int, ...]) -> None:
    """Raise ``UserError`` unless the label has its image's aspect ratio, as the dataset requires."""
    if not same_aspect((label.shape[0], label.shape[1]), (size[0], size[1])):
        raise UserError(
            f"{path} is {_size(label.shape[:2])} pixels (height x width), but its image {image} is {_size(size)}; "
            "both must show the same."
        )


def _size(shape: Sequence[int]) -> str:
    """Format a shape."""
    return "x".join(map(str, shape))


def _copy_or_link(source: Path, target: Path, link: bool) -> None:
    """Copy ``source`` to ``target`` atomically, or link it."""
    if not link:
        content = files.read_bytes(source)
        write_atomically(target, lambda temporary: temporary.write_bytes(content))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a link whose file is gone
    target.symlink_to(source)


def _write_lists(out: Path, lists: Mapping[str, Sequence[str]]) -> None:
    """Write the four lists."""
    tune_train, tune_val = jobs.split_tuning_ids(lists["train"])
    for part, ids in {**lists, "tune_train": tune_train, "tune_val": tune_val}.items():
        jobs.write_lines(out / "ImageSets" / "Context" / f"{part}.txt", ids)


def _summarize(out: Path, lists: Mapping[str, Sequence[str]]) -> jobs.Prepared:
    """Describe what ``out`` holds, the tasks it offers, and what the others lack."""
    names = [name for ids in lists.values() for name in ids]
    counts = {}
    for folder, suffix in (IMAGES, VOC_LABELS, FROM_CONTEXT, CONTEXT, *OPTIONAL.values()):
        existing = _file_names(out / folder)
        counts[folder] = sum(f"{name}{suffix}" in existing for name in names)
    train, val = (len(lists[part]) for part in ("train", "val"))
    tuning = " and ".join(str(len(ids)) for ids in jobs.split_tuning_ids(lists["train"]))
    official = "" if (train, val) == OFFICIAL else f" (official: {OFFICIAL[0]} and {OFFICIAL[1]})"
    lines = [f"{out} has {train} training and {val} validation images{official}; for tuning, {tuning} of the former."]
    lines += [f"  {folder:<24}{count:>6}" for folder, count in counts.items() if count]
    if any(entry.is_symlink() for entry in list_folder(out / IMAGES[0])):
        lines.append("The images are links: keep the releases where they are.")
    if counts[VOC_LABELS[0]] and counts[VOC_LABELS[0]] < 2000:
        lines.append(
            "semseg: the published archive takes VOC2012's labels, of more images than VOC2010's; give them with "
            "--voc-labels VOCdevkit/VOC2012 to compare with published rows."
        )
    tasks = [task for task, kind in NEEDS.items() if kind is None or counts[kind[0]] == len(names)]
    lines.append(f"Tasks: {', '.join(tasks)}.")
    if "human_parts" not in tasks:
        lines.append("human_parts can't be trained: it needs PASCAL-Part, --parts DIR.")
    for task, option in (("sal", "--saliency"), ("normals", "--normals")):
        if task not in tasks:
            lines.append(
                f"{task} can't be trained: its labels were distilled by other networks and are in no official release; "
                f"{option} DIR takes them from the published archive."
            )
    return jobs.Prepared("\n".join(lines), "pascal", {"root": out}, None if len(tasks) == len(NEEDS) else tasks)


def _file_names(folder: Path) -> set[str]:
    """Return the names of the files in a folder; broken links don't count."""
    return {entry.name for entry in folder.iterdir() if entry.is_file()} if folder.is_dir() else set()
