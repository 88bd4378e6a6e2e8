"""The lists of a dataset, and which files of their images exist."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mtcl.data.datasets.base import IMAGE, FileDataset, list_folder
from mtcl.data.datasets.mtan import list_numbers
from mtcl.data.image_io import INVALID_ID_MESSAGE, find_invalid_id, read_bytes
from mtcl.data.verify.facts import DatasetFacts
from mtcl.data.verify.table import Row
from mtcl.errors import UserError, escape_control_characters

SUBSETS = ("train", "val")


@dataclass(frozen=True)
class VerifiedList:
    """One readable list; the ids once each, in their order."""

    name: str
    ids: tuple[str, ...]
    dataset: FileDataset
    files: Mapping[str, frozenset[str]]  # kind -> the ids whose files are all there


def list_rows(folder: Path, official: Mapping[str, int]) -> tuple[list[Row], dict[str, list[str]]]:
    """Return rows on the lists in ``folder``, and the ids of train and val (no key where a list can't be read)."""
    ids_by_subset: dict[str, list[str]] = {}
    rows = []
    for subset in SUBSETS:
        row, ids = _list_row(folder / f"{subset}.txt", subset, official[subset])
        rows.append(row)
        if ids:
            ids_by_subset[subset] = ids
    if len(ids_by_subset) == 2:
        shared = sorted(set(ids_by_subset["train"]) & set(ids_by_subset["val"]))
        text = f"{_number(len(shared), 'id')} in both" if shared else "none"
        details = (f"train.txt and val.txt in {folder} share {_first(shared)}.",) if shared else ()
        rows.append(Row("lists train and val", text, "no id in both", "damage" if shared else "ok", details))
    others = sorted(path for path in list_folder(folder) if path.suffix == ".txt" and path.stem not in SUBSETS)
    rows += [_other_row(path, ids_by_subset) for path in others]
    return rows, ids_by_subset


def numbered_rows(root: Path, official: Mapping[str, int]) -> tuple[list[Row], dict[str, list[str]]]:
    """Return a row on the images of train and of val, numbered from 0, and their ids (no key where there is a gap)."""
    rows, ids_by_subset = [], {}
    for subset in SUBSETS:
        check, expected = f"list {subset}", f"{official[subset]}, numbered from 0"
        folder = root / subset / "image"
        try:
            numbers = list_numbers(folder)
        except UserError as error:
            rows.append(Row(check, "incomplete", expected, "damage", (str(error),)))
            continue
        if not numbers:
            rows.append(Row(check, "empty", expected, "damage", (f"{folder} holds no image 0.npy, 1.npy, ....",)))
            continue
        count = len(numbers)
        ids_by_subset[subset] = [f"{subset}_{number}" for number in numbers]
        detail = f"{count} images, the official list has {official[subset]}: results don't compare"
        same = count == official[subset]
        rows.append(Row(check, str(count), expected, "ok" if same else "deviation", () if same else (detail,)))
    return rows, ids_by_subset


def open_datasets(root: Path, facts: DatasetFacts) -> dict[str, FileDataset]:
    """Open a dataset for each list; for a faulty list, that of the other one."""
    datasets: dict[str, FileDataset] = {}
    errors = []
    for subset in SUBSETS:
        try:
            datasets[subset] = facts.dataset_class(root, subset, tuple(facts.dataset_class.task_options()))  # type: ignore[call-arg, attr-defined]
        except UserError as error:
            errors.append(error)
    if not datasets:
        raise errors[0]
    return {subset: datasets.get(subset) or next(iter(datasets.values())) for subset in SUBSETS}


def open_lists(
    datasets: Mapping[str, FileDataset], ids_by_subset: Mapping[str, list[str]], limit: int | None
) -> list[VerifiedList]:
    """Return the lists that have ids, with the files that exist."""
    lists = []
    for part in ids_by_subset:
        ids = tuple(dict.fromkeys(ids_by_subset[part]))[:limit]
        lists.append(VerifiedList(part, ids, datasets[part], {}))
    listings: dict[Path, set[str]] = {}
    return [replace(part, files=_files(part, listings)) for part in lists]


def file_rows(root: Path, lists: Sequence[VerifiedList]) -> tuple[list[Row], list[str]]:
    """Return a row for the images and one per task, and the available tasks (one file in any list is enough)."""
    rows, tasks = [], []
    kinds = list(lists[0].dataset.array_kinds())
    for kind in kinds:
        num_expected = sum(len(verified.ids) for verified in lists)
        missing = [(verified, name) for verified in lists for name in verified.ids if name not in verified.files[kind]]
        if len(missing) == num_expected:
            where = _sources(root, *missing[0])[kind]
            if kind == IMAGE:
                raise UserError(f"{root} holds no image of its lists, not even {where}; unpack the archive there.")
            rows.append(Row(f"files {kind}", f"not there ({where})", "there", "deviation"))
            continue
        if kind != IMAGE:
            tasks.append(kind)
        details: tuple[str, ...] = ()
        if missing:
            first = [_sources(root, verified, name)[kind] for verified, name in missing[:3]]
            details = (f"{root} lacks {_number(len(missing), 'file')} of {kind}, first {', '.join(first)}.",)
        text = f"{num_expected - len(missing)}, missing {len(missing)}" if missing else f"{num_expected}"
        rows.append(Row(f"files {kind}", text, f"{num_expected}, as listed", "damage" if missing else "ok", details))
    if not tasks:
        raise UserError(f"{root} holds no label of any task ({', '.join(kinds[1:])}); unpack the archive there.")
    return rows, tasks


def _list_row(path: Path, subset: str, official: int) -> tuple[Row, list[str]]:
    """Return the row of train or val and its ids."""
    check, expected = f"list {subset}", f"{official}, each once"
    try:
        ids = _ids(path)
    except UserError as error:
        return Row(check, "can't be read", expected, "damage", (str(error),)), []
    if not ids:
        return Row(check, "empty", expected, "damage", (f"{path} lists no image.",)), []
    repeated = sorted({name for name in ids if ids.count(name) > 1}) if len(set(ids)) < len(ids) else []
    if repeated:
        details = (f"{path} lists more than once: {_first(repeated)}.",)
        return Row(check, f"{len(ids)}, {_number(len(repeated), 'id')} repeated", expected, "damage", details), ids
    same = len(ids) == official
    detail = f"{len(ids)} images, the official list has {official}: results don't compare"
    return Row(check, str(len(ids)), expected, "ok" if same else "deviation", () if same else (detail,)), ids


def _other_row(path: Path, ids_by_subset: Mapping[str, list[str]]) -> Row:
    """Return the row of another list; tune_train and the like must be parts of train, others of all ids."""
    split = path.stem.endswith(("_train", "_val"))
    allowed = set(ids_by_subset.get("train", ())) | (set() if split else set(ids_by_subset.get("val", ())))
    expected = "part of train" if split else "part of train and val"
    check = f"list {path.stem}"
    try:
        ids = _ids(path)
    except UserError as error:
        return Row(check, "can't be read", expected, "damage", (str(error),))
    unlisted = [name for name in ids if name not in allowed]
    if not unlisted:
        return Row(check, str(len(ids)), expected)
    details = (f"{path} lists what is not in {'train' if split else 'train or val'}: {_first(unlisted)}.",)
    text = f"{len(ids)}, {len(unlisted)} elsewhere"
    return Row(check, text, expected, "damage" if split else "deviation", details)


def _files(verified: VerifiedList, listings: dict[Path, set[str]]) -> dict[str, frozenset[str]]:
    """Return kind -> the ids whose files all exist."""

    def exists(path: Path) -> bool:
        """Return whether a file exists, by a listing of its folder."""
        if path.parent not in listings:
            listings[path.parent] = {entry.name for entry in list_folder(path.parent)}
        return path.name in listings[path.parent]

    return {
        kind: frozenset(name for name in verified.ids if all(map(exists, verified.dataset.source_files(kind, name))))
        for kind in verified.dataset.array_kinds()
    }


def _sources(root: Path, verified: VerifiedList, name: str) -> dict[str, str]:
    """Return, by kind, the first missing file of an image (the first of all, if none is missing)."""
    names = {}
    for kind in verified.dataset.array_kinds():
        paths = verified.dataset.source_files(kind, name)
        absent = next((path for path in paths if not path.is_file()), paths[0])
        names[kind] = str(absent.relative_to(root))
    return names


def _ids(path: Path) -> list[str]:
    """Read the ids of a list."""
    try:
        ids = read_bytes(path).decode("utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); it must hold one id per line.") from error
    if (invalid := find_invalid_id(ids)) is not None:
        raise UserError(f"{path} lists {escape_control_characters(invalid[:80])!r}, {INVALID_ID_MESSAGE}.")
    return ids


def _first(names: Sequence[str]) -> str:
    """Join the first three names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _number(count: int, noun: str) -> str:
    """Format a count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
