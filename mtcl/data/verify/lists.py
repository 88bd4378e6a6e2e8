"""The lists of a dataset, and which files of the pictures in them are there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mtcl.data.datasets.base import IMAGE, FileDataset, list_folder
from mtcl.data.image_io import INVALID_ID_MESSAGE, find_invalid_id, read_bytes
from mtcl.data.verify.facts import DatasetFacts
from mtcl.data.verify.table import Row
from mtcl.errors import UserError, escape_control_characters

PARTS = ("train", "val")


@dataclass(frozen=True)
class VerifiedList:
    """One list that can be read; the ids once each, in their order."""

    name: str
    ids: tuple[str, ...]
    reader: FileDataset
    files: Mapping[str, frozenset[str]]  # kind -> the ids whose files are all there


def list_rows(folder: Path, official: Mapping[str, int]) -> tuple[list[Row], dict[str, list[str]]]:
    """Rows about the lists in ``folder``, and the ids of train and val (no key where a list can't be read)."""
    found: dict[str, list[str]] = {}
    rows = []
    for part in PARTS:
        row, ids = _list_row(folder / f"{part}.txt", part, official[part])
        rows.append(row)
        if ids:
            found[part] = ids
    if len(found) == 2:
        shared = sorted(set(found["train"]) & set(found["val"]))
        what = f"{_number(len(shared), 'id')} in both" if shared else "none"
        details = (f"train.txt and val.txt in {folder} share {_first(shared)}.",) if shared else ()
        rows.append(Row("lists train and val", what, "no id in both", "damage" if shared else "ok", details))
    others = sorted(path for path in list_folder(folder) if path.suffix == ".txt" and path.stem not in PARTS)
    rows += [_other_row(path, found) for path in others]
    return rows, found


def open_datasets(root: Path, facts: DatasetFacts) -> dict[str, FileDataset]:
    """A reader for each list; that of a faulty list is made from the other one."""
    readers: dict[str, FileDataset] = {}
    faults = []
    for part in PARTS:
        try:
            readers[part] = facts.reader(root, part, tuple(facts.reader.task_options()))  # type: ignore[call-arg, attr-defined]
        except UserError as error:
            faults.append(error)
    if not readers:
        raise faults[0]
    return {part: readers.get(part) or next(iter(readers.values())) for part in PARTS}


def open_lists(
    readers: Mapping[str, FileDataset], found: Mapping[str, list[str]], limit: int | None
) -> list[VerifiedList]:
    """The lists that have ids, with the files that are there."""
    parts = []
    for part in found:
        ids = tuple(dict.fromkeys(found[part]))[:limit]
        parts.append(VerifiedList(part, ids, readers[part], {}))
    listings: dict[Path, set[str]] = {}
    return [replace(part, files=_files(part, listings)) for part in parts]


def file_rows(root: Path, parts: Sequence[VerifiedList]) -> tuple[list[Row], list[str]]:
    """A row for the pictures and one per task, and the tasks that are there (one file in any list is enough)."""
    rows, tasks = [], []
    kinds = list(parts[0].reader.array_kinds())
    for kind in kinds:
        wanted = sum(len(part.ids) for part in parts)
        missing = [(part, name) for part in parts for name in part.ids if name not in part.files[kind]]
        if len(missing) == wanted:
            where = _sources(root, *missing[0])[kind]
            if kind == IMAGE:
                raise UserError(f"{root} holds no picture of its lists, not even {where}; unpack the archive there.")
            rows.append(Row(f"files {kind}", f"not there ({where})", "there", "deviation"))
            continue
        if kind != IMAGE:
            tasks.append(kind)
        details: tuple[str, ...] = ()
        if missing:
            first = [_sources(root, part, name)[kind] for part, name in missing[:3]]
            details = (f"{root} lacks {_number(len(missing), 'file')} of {kind}, first {', '.join(first)}.",)
        what = f"{wanted - len(missing)}, missing {len(missing)}" if missing else f"{wanted}"
        rows.append(Row(f"files {kind}", what, f"{wanted}, as listed", "damage" if missing else "ok", details))
    if not tasks:
        raise UserError(f"{root} holds no label of any task ({', '.join(kinds[1:])}); unpack the archive there.")
    return rows, tasks


def _list_row(path: Path, part: str, official: int) -> tuple[Row, list[str]]:
    check, expected = f"list {part}", f"{official}, each once"
    try:
        ids = _ids(path)
    except UserError as error:
        return Row(check, "can't be read", expected, "damage", (str(error),)), []
    if not ids:
        return Row(check, "empty", expected, "damage", (f"{path} lists no picture.",)), []
    twice = sorted({name for name in ids if ids.count(name) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        details = (f"{path} lists more than once: {_first(twice)}.",)
        return Row(check, f"{len(ids)}, {_number(len(twice), 'id')} repeated", expected, "damage", details), ids
    same = len(ids) == official
    detail = f"{len(ids)} pictures, the official list has {official}: results don't compare"
    return Row(check, str(len(ids)), expected, "ok" if same else "deviation", () if same else (detail,)), ids


def _other_row(path: Path, found: Mapping[str, list[str]]) -> Row:
    """tune_train and the like must be parts of train; other lists, of all there is."""
    split = path.stem.endswith(("_train", "_val"))
    where = set(found.get("train", ())) | (set() if split else set(found.get("val", ())))
    expected = "part of train" if split else "part of train and val"
    check = f"list {path.stem}"
    try:
        ids = _ids(path)
    except UserError as error:
        return Row(check, "can't be read", expected, "damage", (str(error),))
    strange = [name for name in ids if name not in where]
    if not strange:
        return Row(check, str(len(ids)), expected)
    details = (f"{path} lists what is not in {'train' if split else 'train or val'}: {_first(strange)}.",)
    found_text = f"{len(ids)}, {len(strange)} elsewhere"
    return Row(check, found_text, expected, "damage" if split else "deviation", details)


def _files(part: VerifiedList, listings: dict[Path, set[str]]) -> dict[str, frozenset[str]]:
    def there(path: Path) -> bool:
        if path.parent not in listings:
            listings[path.parent] = {entry.name for entry in list_folder(path.parent)}
        return path.name in listings[path.parent]

    return {
        kind: frozenset(name for name in part.ids if all(map(there, part.reader.source_files(kind, name))))
        for kind in part.reader.array_kinds()
    }


def _sources(root: Path, part: VerifiedList, name: str) -> dict[str, str]:
    """kind -> the first file of a picture that is not there (the first of all, if they are)."""
    named = {}
    for kind in part.reader.array_kinds():
        paths = part.reader.source_files(kind, name)
        absent = next((path for path in paths if not path.is_file()), paths[0])
        named[kind] = str(absent.relative_to(root))
    return named


def _ids(path: Path) -> list[str]:
    try:
        ids = read_bytes(path).decode("utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); it must hold one id per line.") from error
    if (strange := find_invalid_id(ids)) is not None:
        raise UserError(f"{path} lists {escape_control_characters(strange[:80])!r}, {INVALID_ID_MESSAGE}.")
    return ids


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
