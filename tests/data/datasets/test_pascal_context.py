"""The PASCAL-Context reader, on archives of a few tiny images."""

import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
import torch
from helpers.pascal_miniature import (
    AEROPLANE,
    DOG,
    TRAIN,
    VAL,
    Object,
    Picture,
    write_archive,
    write_context,
    write_palette,
    write_parts,
    write_png,
)

from mtcl import UserError
from mtcl.data import Augment, eval_loader, train_loader
from mtcl.data.datasets import pascal_context as module
from mtcl.data.datasets.pascal_classes import NORMALS_CLASSES, PART_NAME_TO_ID, PERSON, VOC_TO_CONTEXT
from mtcl.data.datasets.pascal_context import TASKS, PascalContext
from mtcl.data.datasets.pascal_labels import has_normals, semantic_edges
from mtcl.data.transforms import finalize_labels, resize_nearest
from mtcl.tasks import HUMAN_PARTS, VOC21, build_task

FIRST = TRAIN[0]
NEEDED = {  # task -> folders
    "semseg": ["semseg"],
    "human_parts": ["human_parts"],
    "sal": ["sal_distill"],
    "normals": ["normals_distill", "pascal-context"],
    "edge": ["pascal-context"],
}
SUBSETS = [names for count in range(1, 6) for names in itertools.combinations(TASKS, count)]
RNG = np.random.default_rng(0)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    write_archive(tmp_path / "PASCALContext")
    return tmp_path / "PASCALContext"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Picture]]:
    """An archive that no test changes."""
    root = tmp_path_factory.mktemp("pascal") / "PASCALContext"
    return root, write_archive(root)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts the .mat files that the reader opens, by folder."""
    counts: Counter = Counter()
    read_mat = module.files.read_mat

    def counted(path: Path, key: str) -> np.ndarray:
        counts[path.parent.name] += 1
        return read_mat(path, key)

    monkeypatch.setattr(module.files, "read_mat", counted)
    return counts


def message(*args, **kwargs) -> str:
    """The sentence of the error that a reader with these arguments raises when it is made, or read at 0."""
    with pytest.raises(UserError) as error:
        PascalContext(*args, **kwargs).read(0)
    return str(error.value)


def slow_laplacian(classes: np.ndarray) -> np.ndarray:
    """Sum of the four neighbours less four times the pixel; the border is mirrored without its own row."""
    height, width = classes.shape
    boundary = np.zeros(classes.shape, bool)
    for i in range(height):
        for j in range(width):
            up, down = abs(i - 1), height - 1 - abs(height - 1 - (i + 1))
            left_column, right = abs(j - 1), width - 1 - abs(width - 1 - (j + 1))
            around = [classes[up, j], classes[down, j], classes[i, left_column], classes[i, right]]
            boundary[i, j] = sum(map(int, around)) != 4 * int(classes[i, j])
    return boundary


def slow_thin(mask: np.ndarray) -> np.ndarray:
    """Two alternating conditions (Lam, Lee and Suen 1992; Guo and Hall 1989), pixel by pixel, until none changes."""
    mask = np.pad(mask, 1)
    changed = True
    while changed:
        changed = False
        for second in (False, True):
            removed = [at for at in zip(*map(list, np.nonzero(mask))) if removable(mask, *at, second)]
            for at in removed:
                mask[at] = False
            changed |= bool(removed)
    return mask[1:-1, 1:-1]


def removable(mask: np.ndarray, i: int, j: int, second: bool) -> bool:
    ring = [(0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)]  # from the east, against the clock
    x = [bool(mask[i + di, j + dj]) for di, dj in ring]
    crossings = sum(not x[k] and (x[k + 1] or x[(k + 2) % 8]) for k in (0, 2, 4, 6))
    pairs = min(sum(x[k] or x[k + 1] for k in (0, 2, 4, 6)), sum(x[k + 1] or x[(k + 2) % 8] for k in (0, 2, 4, 6)))
    side = (x[5] or x[6] or not x[3]) and x[4] if second else (x[1] or x[2] or not x[7]) and x[0]
    return crossings == 1 and 2 <= pairs <= 3 and not side


def slow_parts(shown: Picture) -> np.ndarray:
    label = np.zeros(shown.context.shape, int)
    for one in shown.objects:
        if one.kind == 15:
            for name, mask in one.parts:
                for i, j in zip(*np.nonzero(mask)):
                    label[i, j] = PART_NAME_TO_ID[name]
    return label


def slow_normals(shown: Picture) -> np.ndarray:
    gate = np.zeros(shown.context.shape, bool)
    for kind in NORMALS_CLASSES:
        gate |= shown.context == kind
    return np.where(resize_nearest(gate, shown.normals.shape[:2])[..., None], shown.normals, 0)


def expected(shown: Picture, task: str) -> np.ndarray:
    """A label of native size by another way than the reader's."""
    match task:
        case "semseg":
            return shown.semseg
        case "human_parts":
            return slow_parts(shown)
        case "sal":
            return shown.saliency / 255 > 0.5
        case "normals":
            return slow_normals(shown)
        case _:
            return slow_thin(slow_laplacian(shown.context))


@pytest.mark.parametrize("part", ["train", "val"])
def test_every_picture_and_label_is_what_the_slow_rules_say(shared, part: str) -> None:
    root, images = shared
    reader = PascalContext(root, part, TASKS)  # type: ignore[arg-type]
    assert reader.ids == list(TRAIN if part == "train" else VAL)
    for index, name in enumerate(reader.ids):
        sample, shown = reader.read(index), images[name]
        assert sample.id == name
        assert tuple(sample.labels) == TASKS
        np.testing.assert_array_equal(sample.image, shown.image)
        for task, label in sample.labels.items():
            assert label.dtype == np.uint8
            assert label.shape[:2] == shown.image.shape[:2]
            np.testing.assert_array_equal(label, expected(shown, task), err_msg=f"{name} {task}")


def test_the_miniature_holds_the_cases_that_the_rules_are_about(shared) -> None:
    root, images = shared
    reader = PascalContext(root, "train", TASKS)
    labels = {name: reader.read(index).labels for index, name in enumerate(TRAIN)}
    assert {int(v) for name in TRAIN for v in np.unique(labels[name]["human_parts"])} == set(range(7))
    assert [bool(labels[name]["human_parts"].any()) for name in TRAIN] == [True, False, False, True]
    for name in TRAIN:
        shares = [(labels[name]["normals"] == 0).all(axis=2).mean(), labels[name]["edge"].mean()]
        assert all(0 < share < 1 for share in shares)
        thick = slow_laplacian(images[name].context)
        assert 0 < labels[name]["edge"].sum() < thick.sum()
        assert not (labels[name]["edge"] > thick).any()
    both = [name for name in TRAIN if images[name].voc is not None]
    assert both
    assert all((images[name].voc != images[name].from_context).any() for name in both)


@pytest.mark.parametrize("seed", range(4))
def test_edges_of_many_small_segments_are_the_slow_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 460, (5, 4), dtype=np.uint16)
    classes = blocks.repeat(rng.integers(1, 5, 5), axis=0).repeat(rng.integers(1, 6, 4), axis=1)
    np.testing.assert_array_equal(semantic_edges(classes), slow_thin(slow_laplacian(classes)))


def test_a_staircase_of_equal_steps_has_no_edge_as_in_the_field() -> None:
    ramp = np.tile(np.arange(9, dtype=np.uint16), (5, 1))
    assert not semantic_edges(ramp)[:, 2:-2].any()


def test_normals_count_on_the_listed_classes_only() -> None:
    counted = has_normals(np.arange(460, dtype=np.uint16)[None])[0]
    assert [kind for kind in range(460) if counted[kind]] == sorted(NORMALS_CLASSES)


def test_void_and_every_class_of_semseg_come_through(archive: Path) -> None:
    values = np.uint8([*range(21), 255, 0, 255]).reshape(4, 6).repeat(6, axis=0)[:, :24].repeat(6, axis=1)[:, :32]
    write_palette(archive / "semseg" / "VOC12" / f"{FIRST}.png", values)
    np.testing.assert_array_equal(PascalContext(archive, "train", ["semseg"]).read(0).labels["semseg"], values)


def test_voc_labels_have_precedence_and_either_folder_will_do(archive: Path) -> None:
    for path in (archive / "semseg" / "pascal-context").iterdir():
        if (archive / "semseg" / "VOC12" / path.name).exists():
            path.write_bytes(b"not read")
    PascalContext(archive, "train", ["semseg"]).read(0)
    images = write_archive(archive)
    for path in (archive / "semseg" / "VOC12").iterdir():
        path.unlink()
    (archive / "semseg" / "VOC12").rmdir()
    label = PascalContext(archive, "train", ["semseg"]).read(0).labels["semseg"]
    np.testing.assert_array_equal(label, images[FIRST].from_context)


def test_a_later_part_covers_an_earlier_one_in_the_order_of_the_file(archive: Path) -> None:
    mask = np.ones((24, 32), np.uint8)
    corner = mask.copy()
    corner[:, 5:] = 0
    path = archive / "human_parts" / f"{FIRST}.mat"
    for parts, values in ([("head", mask), ("lfoot", corner)], (6, 1)), ([("lfoot", corner), ("head", mask)], (1, 1)):
        write_parts(path, FIRST, [Object(PERSON, mask, tuple(parts))])
        label = PascalContext(archive, "train", ["human_parts", "sal"]).read(0).labels["human_parts"]
        assert (label[0, 0], label[0, -1]) == values


def test_a_picture_without_any_object_has_parts_of_its_own_size(archive: Path) -> None:
    write_parts(archive / "human_parts" / f"{FIRST}.mat", FIRST, [])
    sample = PascalContext(archive, "train", ["human_parts", "sal"]).read(0)
    assert sample.labels["human_parts"].shape == sample.image.shape[:2]
    assert not sample.labels["human_parts"].any()


def test_parts_of_animals_are_not_painted_and_their_names_do_not_matter(archive: Path) -> None:
    mask = np.ones((24, 32), np.uint8)
    write_parts(archive / "human_parts" / f"{FIRST}.mat", FIRST, [Object(DOG, mask, (("snout", mask), ("head", mask)))])
    assert not PascalContext(archive, "train", ["human_parts", "sal"]).read(0).labels["human_parts"].any()


@pytest.mark.parametrize("value", [127, 128])
def test_saliency_is_above_half(archive: Path, value: int) -> None:
    write_png(archive / "sal_distill" / f"{FIRST}.png", np.full((24, 32), value, np.uint8))
    assert (PascalContext(archive, "train", ["sal"]).read(0).labels["sal"] == (value == 128)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float64])
def test_a_label_map_may_be_of_any_type_of_number(archive: Path, dtype: type) -> None:
    labels = RNG.integers(0, 250, (24, 32)).astype(dtype)
    write_context(archive / "pascal-context" / "trainval" / f"{FIRST}.mat", labels)
    sample = PascalContext(archive, "train", ["edge"]).read(0)
    np.testing.assert_array_equal(sample.labels["edge"], slow_thin(slow_laplacian(labels)))


# Sizes


def test_distilled_labels_of_another_size_are_resampled(tmp_path: Path) -> None:
    images = write_archive(tmp_path, TRAIN[:1], VAL[:1], distilled=(48, 64))
    sample = PascalContext(tmp_path, "train", TASKS).read(0)
    shown = images[FIRST]
    assert sample.image.shape == (24, 32, 3)
    rows, columns = 2 * np.arange(24) + 1, 2 * np.arange(32) + 1  # a centre on the border of two goes to the later
    np.testing.assert_array_equal(sample.labels["sal"], (shown.saliency >= 128)[rows][:, columns])
    np.testing.assert_array_equal(sample.labels["normals"], slow_normals(shown)[rows][:, columns])
    gate = np.isin(shown.context, NORMALS_CLASSES)
    assert (sample.labels["normals"][gate].any(axis=-1)).mean() > 0.9
    assert not sample.labels["normals"][~gate].any()


@pytest.mark.parametrize("folder", ["sal_distill", "normals_distill"])
def test_a_distilled_label_of_another_aspect_is_refused(archive: Path, folder: str) -> None:
    path = archive / folder / f"{FIRST}.png"
    write_png(path, np.zeros((24, 40, 3) if folder == "normals_distill" else (24, 40), np.uint8))
    sentence = message(archive, "train", ["sal", "normals"])
    assert str(path) in sentence
    assert "24x40" in sentence
    assert "24x32" in sentence


@pytest.mark.parametrize("task", ["edge", "normals"])
def test_a_label_map_of_another_aspect_is_refused(archive: Path, task: str) -> None:
    path = archive / "pascal-context" / "trainval" / f"{FIRST}.mat"
    write_context(path, np.ones((32, 24), np.uint16))
    sentence = message(archive, "train", [task])
    assert str(path) in sentence
    assert "32x24" in sentence
    assert "24x32" in sentence


def test_masks_of_parts_of_another_size_are_resampled_or_refused(archive: Path) -> None:
    path = archive / "human_parts" / f"{FIRST}.mat"
    mask = np.zeros((12, 16), np.uint8)
    mask[2:5, 3:9] = 1
    write_parts(path, FIRST, [Object(PERSON, mask, (("torso", mask),))])
    label = PascalContext(archive, "train", ["human_parts"]).read(0).labels["human_parts"]
    np.testing.assert_array_equal(label, 2 * mask.repeat(2, axis=0).repeat(2, axis=1))
    write_parts(path, FIRST, [Object(PERSON, mask.T, (("torso", mask.T),))])
    assert str(path) in message(archive, "train", ["human_parts"])
    write_parts(path, FIRST, [Object(PERSON, mask, (("torso", mask.T),))])
    sentence = message(archive, "train", ["human_parts"])
    assert str(path) in sentence
    assert "12x16 and 16x12" in sentence


# Lists and roots


def test_root_may_be_the_folder_or_its_parent(archive: Path) -> None:
    for root in (archive, archive.parent, str(archive)):
        assert PascalContext(root, "val", TASKS).ids == list(VAL)
    archive.rename(archive.parent / "PASCAL_MT")
    assert PascalContext(archive.parent, "val", TASKS).ids == list(VAL)


def test_splits_and_limit(archive: Path) -> None:
    assert PascalContext(archive, "train", TASKS, split="tune").ids == list(TRAIN[:-1])
    assert PascalContext(archive, "val", TASKS, split="tune").ids == list(TRAIN[-1:])
    assert PascalContext(archive, "train", TASKS, limit=2).ids == list(TRAIN[:2])
    assert PascalContext(archive, "train", TASKS, limit=9).ids == list(TRAIN)


@pytest.mark.parametrize("tasks", SUBSETS, ids=",".join)
def test_a_set_of_tasks_needs_its_own_folders_only(shared, tmp_path: Path, tasks: tuple[str, ...]) -> None:
    root, images = shared
    for folder in {"JPEGImages", "ImageSets"}.union(*(NEEDED[task] for task in tasks)):
        (tmp_path / folder).symlink_to(root / folder)
    reader = PascalContext(tmp_path, "train", tasks)
    for index, name in enumerate(reader.ids):
        labels = reader.read(index).labels
        assert tuple(labels) == tasks
        for task, label in labels.items():
            if task != "edge":  # the slow one; another test has it
                np.testing.assert_array_equal(label, expected(images[name], task))
    for task in tasks:
        for folder in NEEDED[task]:
            (tmp_path / folder).unlink(missing_ok=True)
        sentence = message(tmp_path, "train", tasks)
        assert "lacks" in sentence
        assert str(tmp_path) in sentence
        for folder in NEEDED[task]:
            (tmp_path / folder).symlink_to(root / folder)


def test_pictures_without_persons_are_dropped_with_human_parts_alone(archive: Path) -> None:
    with_persons = [TRAIN[0], TRAIN[1], TRAIN[3]]
    reader = PascalContext(archive, "train", ["human_parts"])
    assert reader.ids == with_persons
    assert reader.read(2).id == TRAIN[3]
    assert PascalContext(archive, "train", ["human_parts"], limit=3).ids == with_persons  # of those that count
    assert PascalContext(archive, "train", ["human_parts"], limit=1).ids == with_persons[:1]
    assert PascalContext(archive, "train", ["human_parts", "sal"]).ids == list(TRAIN)
    assert PascalContext(archive, "train", ["sal"]).ids == list(TRAIN)


def test_a_person_without_a_pixel_is_none(archive: Path) -> None:
    nothing = np.zeros((24, 32), np.uint8)
    write_parts(archive / "human_parts" / f"{FIRST}.mat", FIRST, [Object(PERSON, nothing, ())])
    assert FIRST not in PascalContext(archive, "train", ["human_parts"]).ids


def test_a_list_without_persons_is_an_error(archive: Path) -> None:
    (archive / "ImageSets" / "Context" / "dogs_train.txt").write_text(f"{TRAIN[2]}\n")
    assert str(archive) in message(archive, "train", ["human_parts"], split="dogs")


def test_the_archives_list_of_objects_is_used_where_it_fits(archive: Path, opened: Counter) -> None:
    (archive / "ImageSets" / "Parts").mkdir()
    listed = {name: [AEROPLANE, -1] for name in TRAIN} | {TRAIN[2]: [DOG, PERSON], TRAIN[1]: []}
    path = archive / "ImageSets" / "Parts" / "train.txt"
    path.write_text(json.dumps(listed))
    assert PascalContext(archive, "train", ["human_parts"]).ids == [TRAIN[2]]  # whatever the files say
    assert not opened
    assert PascalContext(archive, "val", ["human_parts"]).ids == [VAL[0], VAL[1], VAL[3]]
    broken = [
        json.dumps(dict(list(listed.items())[:3])),
        json.dumps(list(TRAIN)),
        "{",
        json.dumps(listed | {FIRST: 15}),
    ]
    for text in broken:
        path.write_text(text)
        assert PascalContext(archive, "train", ["human_parts"]).ids == [TRAIN[0], TRAIN[1], TRAIN[3]], text
    path.write_bytes(b"\xff\xfe{}")
    assert len(PascalContext(archive, "train", ["human_parts"]).ids) == 3


def test_the_search_for_persons_is_remembered_and_a_damaged_memory_is_made_anew(
    archive: Path, tmp_path: Path, opened: Counter
) -> None:
    def searched(part: str = "train", limit: int | None = None) -> int:
        count_before = opened["human_parts"]
        reader = PascalContext(archive, part, ["human_parts"], limit=limit, cache=tmp_path / "cache")  # type: ignore
        expected_ids = [TRAIN[0], TRAIN[1], TRAIN[3]] if part == "train" else [VAL[0], VAL[1], VAL[3]]
        assert reader.ids == expected_ids[:limit]
        return opened["human_parts"] - count_before

    assert [searched(), searched(), searched(limit=2)] == [4, 0, 0]
    assert [searched("val"), searched("val"), searched()] == [4, 0, 0]  # one list does not forget the other
    (memory,) = (tmp_path / "cache").rglob("persons.json")
    good = memory.read_text()
    for damage in (b"", good[:20].encode(), b"\xff\xfe", b"[1]", b'{"x": 3}'):
        memory.write_bytes(damage)
        assert [searched(), searched()] == [4, 0]
    entries = json.loads(memory.read_text())
    assert {name: entry[0] for name, entry in entries.items()} == {
        name: index % 4 != 2 for index, name in enumerate(TRAIN)
    }
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    os.utime(archive / "human_parts" / f"{TRAIN[2]}.mat", (1, 1))  # written again, whatever it holds now
    assert [searched(), searched()] == [1, 0]


def test_the_tables_are_those_of_the_field() -> None:
    """Written down from the field's code (InvPT/data/pascal_context.py and its JSON lists), not from ours."""
    six = {
        1: "hair head lear lebrow leye mouth nose rear rebrow reye",
        2: "neck torso",
        3: "luarm ruarm",
        4: "llarm lhand rlarm rhand",
        5: "luleg ruleg",
        6: "llleg lfoot rlleg rfoot",
    }
    assert {name: part for part, names in six.items() for name in names.split()} == PART_NAME_TO_ID
    voc = dict(zip(VOC21[1:], VOC_TO_CONTEXT, strict=True))
    assert (voc["aeroplane"], voc["bicycle"], voc["bird"], voc["boat"], voc["bottle"]) == (2, 23, 25, 31, 34)
    assert (voc["bus"], voc["car"], voc["cat"], voc["chair"], voc["cow"]) == (45, 59, 65, 72, 98)
    assert (voc["diningtable"], voc["dog"], voc["horse"], voc["motorbike"], voc["person"]) == (397, 113, 207, 258, 284)
    assert (voc["pottedplant"], voc["sheep"], voc["sofa"], voc["train"], voc["tvmonitor"]) == (308, 347, 368, 416, 427)
    assert (len(NORMALS_CLASSES), sum(NORMALS_CLASSES)) == (170, 37556)
    assert zlib.crc32(repr(sorted(NORMALS_CLASSES)).encode()) == 3183749869
    indoors, outdoors = {9, 18, 72, 284, 368, 397, 427}, {2, 98, 207, 258, 347, 416}  # bag, bed, chair, ...; cow, ...
    assert indoors <= set(NORMALS_CLASSES)
    assert not outdoors & set(NORMALS_CLASSES)


def test_a_small_limit_searches_no_further_than_it_must(
    archive: Path, opened: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FILES_PER_WORKER", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # in this process, which counts
    assert PascalContext(archive, "train", ["human_parts"], limit=1).ids == [TRAIN[0]]
    assert opened["human_parts"] == 2
    assert PascalContext(archive, "train", ["human_parts"], limit=3).ids == [TRAIN[0], TRAIN[1], TRAIN[3]]


@pytest.mark.slow
def test_the_search_goes_over_several_processes(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILES_PER_WORKER", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert PascalContext(archive, "train", ["human_parts"]).ids == [TRAIN[0], TRAIN[1], TRAIN[3]]


def test_a_search_that_can_not_be_remembered_counts_all_the_same(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, write: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", full)
    assert len(PascalContext(archive, "train", ["human_parts"], cache=tmp_path / "cache").ids) == 3


# The cache


@pytest.mark.parametrize("memory_map", [False, True])
def test_a_warm_cache_opens_no_mat_file_and_changes_no_pixel(
    archive: Path, tmp_path: Path, opened: Counter, memory_map: bool
) -> None:
    plain = PascalContext(archive, "train", TASKS)
    truth = [plain.read(index) for index in range(4)]
    opened.clear()
    for round_ in range(3):
        if round_ == 2:
            memory_map = not memory_map  # labels are kept in the other form then, the gates of the normals are not
        reader = PascalContext(archive, "train", TASKS, cache=tmp_path / "cache", memory_map=memory_map)
        for _, index in itertools.product(range(2), range(4)):
            sample = reader.read(index)
            np.testing.assert_array_equal(sample.image, truth[index].image)
            for task in TASKS:
                assert sample.labels[task].dtype == np.uint8
                np.testing.assert_array_equal(sample.labels[task], truth[index].labels[task])
        # LabelMap for the edges and for the normals
        assert opened == ({"human_parts": 8, "trainval": 12} if round_ == 2 else {"human_parts": 4, "trainval": 8})


def test_a_label_is_derived_again_when_its_file_is_replaced(archive: Path, tmp_path: Path) -> None:
    PascalContext(archive, "train", TASKS, cache=tmp_path / "cache").read(0)
    write_context(archive / "pascal-context" / "trainval" / f"{FIRST}.mat", np.full((24, 32), 1, np.uint16))
    write_parts(archive / "human_parts" / f"{FIRST}.mat", FIRST, [])
    labels = PascalContext(archive, "train", TASKS, cache=tmp_path / "cache").read(0).labels
    for task in ("edge", "normals", "human_parts"):
        assert not labels[task].any(), task


def test_a_damaged_entry_of_the_cache_is_made_anew(archive: Path, tmp_path: Path, caplog) -> None:
    truth = PascalContext(archive, "train", TASKS, cache=tmp_path / "cache").read(0)
    entries = sorted((tmp_path / "cache").rglob(f"{FIRST}.array"))
    kinds = [path.parent.name.rpartition("-")[0] for path in entries]
    assert kinds == ["derived-edge", "derived-gate", "derived-human_parts"]
    for path in entries:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        again = PascalContext(archive, "train", TASKS, cache=tmp_path / "cache").read(0)
    assert len(caplog.records) == 1  # a line for all of them
    for task in TASKS:
        np.testing.assert_array_equal(again.labels[task], truth.labels[task])


def _digest(reader: PascalContext) -> str:
    digest = hashlib.sha256()
    for index in range(len(reader.ids)):
        for task, label in reader.read(index).labels.items():
            digest.update(f"{index} {task} {label.dtype} {label.shape}".encode() + label.tobytes())
    return digest.hexdigest()


def _derive(root: Path, cache: Path, start: Barrier, result: Path) -> None:
    """In a process of its own: everything of one list, when all the others begin, too."""
    reader = PascalContext(root, "train", TASKS, cache=cache)
    start.wait()
    result.write_text(_digest(reader))


@pytest.mark.slow
def test_several_processes_fill_one_cache_at_once(shared, tmp_path: Path, opened: Counter, caplog) -> None:
    root, _ = shared
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    results = [tmp_path / f"{number}.txt" for number in range(2)]
    children = [context.Process(target=_derive, args=(root, tmp_path / "cache", start, path)) for path in results]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * 2
    assert {path.read_text() for path in results} == {_digest(PascalContext(root, "train", TASKS))}
    opened.clear()
    with caplog.at_level(logging.WARNING):
        assert _digest(PascalContext(root, "train", TASKS, cache=tmp_path / "cache")) == results[0].read_text()
    assert not opened
    assert not caplog.records
    assert len(list((tmp_path / "cache").rglob("*.array"))) == 3 * 4
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.fixture
def sealed(archive: Path) -> Iterator[Path]:
    """An archive whose folders may not be written to."""
    folders = [archive, *(path for path in archive.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield archive
    for folder in folders:
        folder.chmod(0o755)


@pytest.mark.parametrize("tasks", [TASKS, ("human_parts",)])
def test_nothing_is_written_below_the_root(sealed: Path, tmp_path: Path, tasks: tuple[str, ...]) -> None:
    times_before = {path: path.stat().st_mtime_ns for path in sealed.rglob("*")}
    for cache in (None, tmp_path / "cache"):
        reader = PascalContext(sealed, "train", tasks, cache=cache)
        for index in range(len(reader.ids)):
            reader.read(index)
    assert {path: path.stat().st_mtime_ns for path in sealed.rglob("*")} == times_before  # root may write all the same


def test_a_cache_in_the_dataset_is_refused(archive: Path) -> None:
    assert "cache" in message(archive, "train", TASKS, cache=archive / "cache")


# Complaints


@pytest.mark.parametrize(
    "name",
    [
        f"JPEGImages/{FIRST}.jpg",
        f"semseg/VOC12/{FIRST}.png",
        f"human_parts/{FIRST}.mat",
        f"sal_distill/{FIRST}.png",
        f"normals_distill/{FIRST}.png",
        f"pascal-context/trainval/{FIRST}.mat",
    ],
)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_named(archive: Path, name: str, fraction: float) -> None:
    data = (archive / name).read_bytes()
    (archive / name).write_bytes(data[: int(len(data) * fraction)])
    sentence = message(archive, "train", TASKS)
    assert str(archive / name) in sentence
    assert "unpack it again" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("folder", ["human_parts", "pascal-context/trainval"])
@pytest.mark.parametrize(
    "content",
    [
        {"other": np.ones((24, 32))},
        {"LabelMap": "a text", "anno": "a text"},
        {"LabelMap": np.float64(3.5), "anno": np.float64(3.5)},
        {"LabelMap": np.ones((24, 32, 3), np.uint8), "anno": np.ones((24, 32), np.uint8)},
        {"LabelMap": np.full((24, 32), 0.5), "anno": {"imname": "x"}},
        {"LabelMap": np.full((24, 32), np.nan), "anno": {"imname": "x", "objects": "y"}},
        {"LabelMap": np.full((24, 32), 460), "anno": {"imname": "x", "objects": np.ones((2, 2))}},
        {"LabelMap": np.full((24, 32), -1), "anno": {"imname": "x", "objects": {"class": "person", "class_ind": 15}}},
        {"LabelMap": np.full((24, 32), np.inf), "anno": {}},
        {"LabelMap": np.zeros((0, 0)), "anno": np.zeros((0, 0))},
    ],
    ids=lambda content: next(iter(content)),
)
def test_a_mat_file_that_is_something_else_is_named(archive: Path, folder: str, content: dict) -> None:
    path = archive / folder / f"{FIRST}.mat"
    scipy.io.savemat(path, content)
    for tasks in (("human_parts", "edge"), ("human_parts", "normals")):
        sentence = message(archive, "train", tasks)
        assert str(path) in sentence
        assert "\n" not in sentence


@pytest.mark.parametrize("mask", [np.ones((24, 32, 2), np.uint8), np.zeros((0, 0)), "a text"])
def test_a_mask_that_is_none_is_named(archive: Path, mask: object) -> None:
    path = archive / "human_parts" / f"{FIRST}.mat"
    everywhere = np.ones((24, 32), np.uint8)
    for one in (Object(PERSON, mask, ()), Object(PERSON, everywhere, (("head", mask),))):  # type: ignore[arg-type]
        write_parts(path, FIRST, [one])
        assert str(path) in message(archive, "train", ["human_parts"])


def test_a_mat_file_that_is_text_is_named(archive: Path) -> None:
    for folder, task in (("human_parts", "human_parts"), ("pascal-context/trainval", "edge")):
        path = archive / folder / f"{FIRST}.mat"
        path.write_text("<html>quota exceeded</html>\n" * 40)
        assert str(path) in message(archive, "train", [task])


def test_an_unknown_part_of_a_person_is_named(archive: Path) -> None:
    path = archive / "human_parts" / f"{FIRST}.mat"
    mask = np.ones((24, 32), np.uint8)
    write_parts(path, FIRST, [Object(PERSON, mask, (("tail", mask),))])
    sentence = message(archive, "train", ["human_parts", "sal"])
    assert str(path) in sentence
    assert "'tail'" in sentence


@pytest.mark.parametrize("value", [21, 254])
@pytest.mark.parametrize("folder", ["VOC12", "pascal-context"])
def test_a_wrong_index_of_semseg_names_file_and_value(archive: Path, folder: str, value: int) -> None:
    name = FIRST if folder == "VOC12" else TRAIN[1]
    path = archive / "semseg" / folder / f"{name}.png"
    values = np.zeros((24, 32), np.uint8)
    values[3, 4] = value
    write_palette(path, values)
    with pytest.raises(UserError) as error:
        PascalContext(archive, "train", ["semseg"]).read(TRAIN.index(name))
    assert str(path) in str(error.value)
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("folder", "array"),
    [
        ("normals_distill", np.zeros((24, 32), np.uint8)),
        ("normals_distill", np.zeros((24, 32, 4), np.uint8)),
        ("normals_distill", np.zeros((24, 32, 3), np.uint16)),
        ("sal_distill", np.zeros((24, 32, 3), np.uint8)),
        ("sal_distill", np.zeros((24, 32), np.uint16)),
        ("semseg/VOC12", np.zeros((24, 32, 3), np.uint8)),
    ],
)
def test_a_label_of_another_form_names_it(archive: Path, folder: str, array: np.ndarray) -> None:
    path = archive / folder / f"{FIRST}.png"
    assert cv2.imwrite(str(path), array)
    sentence = message(archive, "train", TASKS)
    assert str(path) in sentence
    assert str(array.shape) in sentence


def test_an_id_without_a_semseg_label_names_both_folders(archive: Path) -> None:
    for folder in ("VOC12", "pascal-context"):
        (archive / "semseg" / folder / f"{FIRST}.png").unlink()
    sentence = message(archive, "train", TASKS)
    assert "lacks 1 files" in sentence
    assert f"{FIRST}.png" in sentence
    assert "semseg/VOC12/" in sentence
    assert "semseg/pascal-context/" in sentence


def test_labels_without_files_are_left_out_where_that_is_allowed(archive: Path) -> None:
    for folder in ("VOC12", "pascal-context"):
        (archive / "semseg" / folder / f"{FIRST}.png").unlink()
    (archive / "human_parts" / f"{FIRST}.mat").unlink()
    present = PascalContext(archive, "train", TASKS, missing_labels=True).list_present_labels()
    assert present[FIRST] == set(TASKS) - {"semseg", "human_parts"}
    assert all(names == set(TASKS) for image, names in present.items() if image != FIRST)
    assert FIRST not in PascalContext(archive, "train", ["human_parts"], missing_labels=True).ids
    assert FIRST in message(archive, "train", ["human_parts"])
    for path in (archive / "human_parts").iterdir():
        path.unlink()
    assert "has no file for any image" in message(archive, "train", ["human_parts"], missing_labels=True)


def test_an_id_without_files_names_the_first_of_them(archive: Path) -> None:
    (archive / "ImageSets" / "Context" / "train.txt").write_text(f"{FIRST}\n2007_999999\n")
    sentence = message(archive, "train", TASKS)
    assert "lacks 6 files" in sentence
    assert "JPEGImages/2007_999999.jpg" in sentence
    assert str(archive) in sentence


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (f"{FIRST}\n{FIRST}\n".encode(), FIRST),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"\n", "lists no image"),
    ],
)
def test_a_damaged_list_is_named(archive: Path, content: bytes, part: str) -> None:
    (archive / "ImageSets" / "Context" / "train.txt").write_bytes(content)
    sentence = message(archive, "train", TASKS)
    assert "train.txt" in sentence
    assert part in sentence
    assert PascalContext(archive, "val", TASKS).ids == list(VAL)  # the other list stays closed


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"tasks": ["semseg", "depth"]}, ["['depth']", "human_parts"]),
        ({"subset": "test"}, ["'test'", "'val'"]),
        ({"split": "tuned"}, ["tuned_train.txt", "['standard', 'tune']"]),
        ({"limit": 0}, ["limit=0"]),
        ({"limit": 0, "tasks": ["human_parts"]}, ["limit=0"]),
    ],
)
def test_impossible_options_are_named(archive: Path, options: dict, parts: list[str]) -> None:
    sentence = message(**({"root": archive, "subset": "train", "tasks": TASKS} | options))
    assert all(part in sentence for part in parts)


@pytest.mark.parametrize("state", ["absent", "empty", "no lists"])
def test_root_without_an_archive_tells_the_layout(tmp_path: Path, state: str) -> None:
    root = tmp_path / "data"
    if state != "absent":
        root.mkdir()
    if state == "no lists":
        (root / "ImageSets" / "Main").mkdir(parents=True)
    sentence = message(root, "train", TASKS)
    assert str(root) in sentence
    assert "human_parts/<id>.mat" in sentence


# What it tells, and batches


def test_offered_builds_the_tasks() -> None:
    offered = PascalContext.task_options()
    assert tuple(offered) == TASKS
    channels = {name: build_task(name, **options).channels for name, options in offered.items()}
    assert channels["semseg"] == len(VOC21) == 21
    assert channels["human_parts"] == len(HUMAN_PARTS) == 7


def test_summary_is_one_line_that_tells_what_is_derived_and_where(archive: Path, tmp_path: Path) -> None:
    plain = PascalContext(archive, "train", TASKS).summary()
    assert "\n" not in plain
    assert f"{archive}: 4 images, 2 with labels of VOC12" in plain
    assert "edges derived at each access" in plain
    summary = PascalContext(archive, "train", TASKS, cache=tmp_path / "cache").summary()
    assert f"once, kept in {tmp_path / 'cache'}" in summary
    assert "derived" not in PascalContext(archive, "train", ["sal", "semseg"]).summary()
    assert "3 images with persons" in PascalContext(archive, "train", ["human_parts"]).summary()


def test_fingerprint_tells_lists_and_files_apart_but_not_tasks(archive: Path, tmp_path: Path) -> None:
    fingerprint = PascalContext(archive, "train", TASKS).fingerprint()
    assert fingerprint == PascalContext(archive.parent, "train", ["edge"], cache=tmp_path / "cache").fingerprint()
    others = {
        PascalContext(archive, "val", TASKS).fingerprint(),
        PascalContext(archive, "train", TASKS, limit=2).fingerprint(),
        PascalContext(archive, "train", ["human_parts"]).fingerprint(),  # without the images that it drops
    }
    write_palette(archive / "semseg" / "VOC12" / f"{TRAIN[-1]}.png", RNG.integers(0, 21, (27, 27), dtype=np.uint8))
    others.add(PascalContext(archive, "train", TASKS).fingerprint())
    assert len(others | {fingerprint}) == 5


def _tasks(names: tuple[str, ...]) -> dict:
    offered = PascalContext.task_options()
    return {name: build_task(name, **offered[name]) for name in names}


@pytest.mark.parametrize("names", SUBSETS, ids=",".join)
def test_batches_of_any_set_of_tasks_hold_the_finished_labels(shared, names: tuple[str, ...]) -> None:
    root, _ = shared
    tasks = _tasks(names)
    reader = PascalContext(root, "val", names)
    for batch in eval_loader(reader, tasks, (64, 64), batch_size=3, workers=0):
        assert batch["image"].shape[1:] == (3, 64, 64)
        for row, meta in enumerate(batch["meta"]):
            sample = finalize_labels(reader.read(reader.ids.index(meta.id)), tasks)
            top, left_edge = meta.offset
            inside = (slice(top, top + meta.native_size[0]), slice(left_edge, left_edge + meta.native_size[1]))
            image = batch["image"][row].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(image[inside], sample.image)
            for name, task in tasks.items():
                label = batch["labels"][name][row]
                outside = torch.ones(64, 64, dtype=torch.bool)
                outside[inside] = False
                assert (label[..., outside] == task.void).all()
                values = label.permute(1, 2, 0) if name == "normals" else label.squeeze()
                np.testing.assert_array_equal(values.numpy()[inside], sample.labels[name])
                if name == "human_parts" and meta.id == VAL[2]:
                    assert (label == 255).all()  # no person


@pytest.mark.parametrize("names", SUBSETS, ids=",".join)
def test_augmented_batches_of_any_set_of_tasks_have_possible_values(shared, names: tuple[str, ...]) -> None:
    root, _ = shared
    tasks = _tasks(names)
    loader = train_loader(PascalContext(root, "train", names), tasks, Augment((32, 40)), 3, seed=len(names), workers=0)
    possible = {"semseg": {*range(21), 255}, "human_parts": {*range(7), 255}, "sal": {0, 1, 255}, "edge": {0, 1, 255}}
    for batch in itertools.islice(loader, 3):
        assert batch["image"].shape == (3, 3, 32, 40)
        for name in names:
            label = batch["labels"][name]
            assert label.shape[-2:] == (32, 40)
            if name == "normals":
                lengths = label.norm(dim=1).round(decimals=4)
                assert set(lengths.unique().tolist()) == {0.0, 1.0}
            else:
                assert set(label.unique().tolist()) <= possible[name]


def test_workers_and_a_cache_give_the_same_batches(shared, tmp_path: Path) -> None:
    root, _ = shared
    tasks = _tasks(TASKS)

    def batches(workers: int, **options) -> list:
        reader = PascalContext(root, "train", TASKS, **options)
        return list(itertools.islice(train_loader(reader, tasks, Augment((32, 40)), 2, 0, workers), 4))

    plain = batches(0)
    for workers, memory_map in ((2, False), (2, True), (0, False)):
        for one, other in zip(plain, batches(workers, cache=tmp_path / "cache", memory_map=memory_map)):
            assert torch.equal(one["image"], other["image"])
            assert all(torch.equal(one["labels"][name], other["labels"][name]) for name in TASKS)
