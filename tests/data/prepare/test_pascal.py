"""From miniatures of the official PASCAL releases to the layout of the field's archive."""

import dataclasses
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
from helpers.common import ROOT, Result
from helpers.pascal_miniature import (
    TRAIN,
    VAL,
    Devkit,
    Picture,
    image,
    write_archive,
    write_context,
    write_devkit,
    write_list,
    write_palette,
    write_png,
)

from mtcl import UserError
from mtcl.cli.prepared import format_prepared
from mtcl.data import image_io as files
from mtcl.data.datasets.pascal_classes import VOC_TO_CONTEXT
from mtcl.data.datasets.pascal_context import TASKS, PascalContext
from mtcl.data.prepare import pascal
from mtcl.data.prepare.jobs import STAMP_FILE, split_tuning_ids, start_output
from mtcl.data.prepare.pascal import CONTEXT_TO_VOC, prepare_pascal

SCRIPT = "scripts/prepare_pascal.py"
FOLDERS = ("voc", "labels", "context", "parts", "distilled")


@pytest.fixture
def kit(tmp_path: Path) -> Devkit:
    return write_devkit(tmp_path / "releases")


def prepared(kit: Devkit, out: Path, **options) -> str:
    """Everything that there is, converted in this process; options replace or, if None, take out arguments."""
    sources = {
        "voc": kit.voc,
        "context": kit.context,
        "parts": kit.parts,
        "voc_labels": kit.labels,
        "normals": kit.distilled,
        "saliency": kit.distilled,
        "workers": 0,
    }
    return format_prepared(prepare_pascal(out=out, **{**sources, **options}))


def message(kit: Devkit, out: Path, **options) -> str:
    """The one sentence of the error; the lists that would make the result readable must not be there."""
    with pytest.raises(UserError) as error:
        prepared(kit, out, **options)
    assert not (out / "ImageSets").exists()
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def state(out: Path) -> dict[str, int]:
    """Each file below ``out`` and when it was written."""
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in sorted(out.rglob("*")) if path.is_file()}


def check_picture(out: Path, shown: Picture, labelled: bool) -> None:
    """One id's files hold the arrays of the releases; ``labelled``: VOC's own label is used."""
    assert (out / "JPEGImages" / f"{shown.id}.jpg").read_bytes() == shown.jpeg
    voc, context = out / "semseg" / "VOC12" / f"{shown.id}.png", out / "semseg" / "pascal-context" / f"{shown.id}.png"
    assert (voc.exists(), context.exists()) == (labelled, not labelled)
    expected = shown.voc if labelled else shown.from_context
    np.testing.assert_array_equal(files.read_label_image(voc if labelled else context), expected)
    np.testing.assert_array_equal(
        files.read_mat(out / "pascal-context" / "trainval" / f"{shown.id}.mat", "LabelMap"), shown.context
    )
    check_parts(out / "human_parts" / f"{shown.id}.mat", shown)
    np.testing.assert_array_equal(files.read_color_label(out / "normals_distill" / f"{shown.id}.png"), shown.normals)
    np.testing.assert_array_equal(files.read_label_image(out / "sal_distill" / f"{shown.id}.png"), shown.saliency)


def check_parts(path: Path, shown: Picture) -> None:
    """`anno`, read by the very indexings with which the field reads PASCAL-Part."""
    objects = scipy.io.loadmat(path)["anno"][0][0][1][0]
    assert len(objects) == len(shown.objects)
    for actual, expected in zip(objects, shown.objects):
        assert actual[1][0][0] == expected.kind
        np.testing.assert_array_equal(actual[2], expected.mask)
        assert actual[3].size == len(expected.parts)
        for i, (name, mask) in enumerate(expected.parts):
            assert actual[3][0][i][0][0] == name
            np.testing.assert_array_equal(actual[3][0][i][1], mask)


def check_lists(out: Path) -> None:
    tune_train, tune_val = split_tuning_ids(TRAIN)
    for part, ids in {"train": TRAIN, "val": VAL, "tune_train": tune_train, "tune_val": tune_val}.items():
        assert (out / "ImageSets" / "Context" / f"{part}.txt").read_text().split() == list(ids)


@pytest.mark.slow
def test_the_command_converts_everything_and_a_second_run_rewrites_only_the_lists(
    kit: Devkit, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    out = tmp_path / "data" / "PASCALContext"
    arguments = ["--voc", kit.voc, "--context", kit.context, "--parts", kit.parts, "--voc-labels", kit.labels]
    arguments += ["--normals", kit.distilled, "--saliency", kit.distilled, "--out", out]
    summary = subprocess.run(
        [sys.executable, ROOT / SCRIPT, *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    for shown in kit.images.values():
        check_picture(out, shown, labelled=shown.voc is not None)
    check_lists(out)
    assert "has 4 training and 4 validation images (official: 4998 and 5105)" in summary
    assert [line.split() for line in summary.splitlines() if line.startswith(" ")] == [
        ["JPEGImages", "8"],
        ["semseg/VOC12", "4"],
        ["semseg/pascal-context", "4"],
        ["pascal-context/trainval", "8"],
        ["human_parts", "8"],
        ["normals_distill", "8"],
        ["sal_distill", "8"],
    ]
    assert "Tasks: semseg, human_parts, sal, normals, edge." in summary
    assert "can't" not in summary
    assert summary.endswith(f"\nNext: python train.py data=pascal data.root={out}\n")
    state_before = state(out)
    assert cli(SCRIPT, *map(str, arguments)).out == summary
    assert {name: time for name, time in state(out).items() if "ImageSets" not in name} == {
        name: time for name, time in state_before.items() if "ImageSets" not in name
    }


def test_the_result_has_the_files_of_the_archive_and_no_others(kit: Devkit, tmp_path: Path) -> None:
    prepared(kit, tmp_path / "out")
    images = write_archive(tmp_path / "archive")
    unused = {f"semseg/pascal-context/{name}.png" for name, shown in images.items() if shown.voc is not None}
    stamps = {STAMP_FILE, f"human_parts/{STAMP_FILE}", f"normals_distill/{STAMP_FILE}", f"sal_distill/{STAMP_FILE}"}
    assert set(state(tmp_path / "out")) - stamps == set(state(tmp_path / "archive")) - unused


def test_only_what_was_deleted_is_written_again(kit: Devkit, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepared(kit, out)
    state_before = state(out)
    deleted = {f"{folder}/{TRAIN[1]}{suffix}" for folder, suffix in (pascal.FROM_CONTEXT, pascal.CONTEXT)}
    deleted |= {f"JPEGImages/{VAL[2]}.jpg", f"semseg/VOC12/{VAL[2]}.png", f"human_parts/{VAL[0]}.mat"}
    for name in deleted:
        (out / name).unlink()
    prepared(kit, out)
    state_after = state(out)
    assert state_after.keys() == state_before.keys()
    assert {name for name in state_after if state_after[name] != state_before[name]} - deleted == {
        f"ImageSets/Context/{part}.txt" for part in ("train", "val", "tune_train", "tune_val")
    }
    for shown in kit.images.values():
        check_picture(out, shown, labelled=shown.voc is not None)


def test_an_interrupted_run_leaves_no_lists_and_goes_on(
    kit: Devkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, convert, converted = tmp_path / "out", pascal._convert, []

    def interrupted(plan, item) -> None:
        if len(converted) == 3:
            raise KeyboardInterrupt
        convert(plan, item)
        converted.append(item[0])

    monkeypatch.setattr(pascal, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared(kit, out)
    monkeypatch.undo()
    assert not (out / "ImageSets").exists()
    state_before = state(out)
    prepared(kit, out)
    assert state_before.items() <= state(out).items()
    check_lists(out)
    for shown in kit.images.values():
        check_picture(out, shown, labelled=shown.voc is not None)


def test_a_full_disk_says_that_the_command_goes_on(
    kit: Devkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sync, calls = tmp_path / "out", os.fsync, []

    def full(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):  # a file, not its folder
            calls.append(descriptor)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    sentence = message(kit, out)
    assert f"{out} can't be written (No space left on device)" in sentence
    assert "repeat the command, which continues" in sentence
    monkeypatch.undo()
    state_before = state(out)
    assert len(state_before) == 20
    assert not any(".tmp" in name for name in state_before)
    prepared(kit, out)
    assert state_before.items() <= state(out).items()
    for shown in kit.images.values():
        check_picture(out, shown, labelled=shown.voc is not None)


@pytest.mark.slow
def test_what_a_worker_process_can_not_write_is_told_too(kit: Devkit, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError):
        prepared(kit, out, workers=-1)
    pascal._start_outputs(pascal.Plan(pascal._find_sources(kit.voc, kit.context, kit.labels, {}), out, False))
    (out / "JPEGImages").touch()
    assert f"{out} can't be written (File exists)" in message(kit, out, workers=1)


def test_link_copies_nothing_and_mends_broken_links(
    kit: Devkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kit.voc.parents[1])
    relative = {"voc": Path("VOCdevkit/VOC2010"), "voc_labels": Path("VOCdevkit/VOC2012"), "context": Path("context")}
    out = tmp_path / "out"
    prepared(kit, out, link=True, **relative)
    for shown in kit.images.values():
        check_picture(out, shown, labelled=shown.voc is not None)
    written = {path.relative_to(out) for path in out.rglob("*") if path.is_file() and not path.is_symlink()}
    assert {str(path.parent) for path in written if path.name != STAMP_FILE} == {
        "ImageSets/Context",
        pascal.FROM_CONTEXT[0],
    }
    for kind, source in ((pascal.IMAGES, kit.voc / "JPEGImages"), (pascal.PARTS, kit.parts / "Annotations_Part")):
        for path in (out / kind[0]).glob(f"*{kind[1]}"):
            assert Path(os.readlink(path)) == source / path.name
    broken = out / "JPEGImages" / f"{TRAIN[0]}.jpg"
    broken.unlink()
    broken.symlink_to(tmp_path / "gone.jpg")
    prepared(kit, out, **relative)  # without --link, so that a copy takes its place
    assert not broken.is_symlink()
    broken.unlink()
    broken.symlink_to(tmp_path / "gone.jpg")
    prepared(kit, out, link=True, **relative)
    assert Path(os.readlink(broken)) == kit.voc / "JPEGImages" / broken.name
    assert not (tmp_path / "gone.jpg").exists()


def test_the_inner_folders_may_be_given_themselves(kit: Devkit, tmp_path: Path) -> None:
    prepared(
        kit,
        tmp_path / "out",
        context=kit.context / "trainval",
        parts=kit.parts / "Annotations_Part",
        normals=kit.distilled / "normals_distill",
        saliency=kit.distilled / "sal_distill",
    )
    for shown in kit.images.values():
        check_picture(tmp_path / "out", shown, labelled=shown.voc is not None)


def test_distilled_maps_may_have_another_size_but_not_another_aspect(tmp_path: Path) -> None:
    kit = write_devkit(tmp_path / "releases")
    for name, shown in kit.images.items():
        larger = np.repeat(np.repeat(shown.normals, 2, axis=0), 2, axis=1)
        assert cv2.imwrite(str(kit.distilled / "normals_distill" / f"{name}.png"), larger[..., ::-1])
    prepared(kit, tmp_path / "out")
    reader = PascalContext(tmp_path / "out", "val", ["normals"])
    for index, name in enumerate(reader.ids):
        assert reader.read(index).labels["normals"].shape == kit.images[name].image.shape
    odd = write_devkit(tmp_path / "odd", distilled=(11, 17))
    assert "11x17 pixels (height x width), but its image" in message(odd, tmp_path / "other")


def test_optional_releases_may_be_absent_and_added_later(kit: Devkit, tmp_path: Path) -> None:
    out = tmp_path / "out 1"
    summary = prepared(kit, out, parts=None, normals=None, saliency=None)
    assert {path.name for path in out.iterdir()} == {"ImageSets", "JPEGImages", "semseg", "pascal-context", STAMP_FILE}
    assert "Tasks: semseg, edge." in summary
    assert "human_parts can't be trained: it needs PASCAL-Part, --parts DIR." in summary
    for task, option in (("sal", "--saliency"), ("normals", "--normals")):
        line = next(line for line in summary.splitlines() if line.startswith(f"{task} can't"))
        assert "no official release" in line
        assert option in line
    assert summary.endswith(f"\nNext: python train.py data=pascal 'data.root={out}' 'tasks.names=[semseg,edge]'")
    state_before = state(out)
    assert "'tasks.names=[semseg,human_parts,edge]'" in prepared(kit, out, normals=None, saliency=None)
    assert "Tasks: semseg, human_parts, normals, edge." in prepared(kit, out, parts=None, saliency=None)
    state_after = state(out)
    assert all(state_after[name] == time for name, time in state_before.items() if "ImageSets" not in name)
    (out / "human_parts" / f"{VAL[0]}.mat").unlink()
    summary = prepared(kit, out, parts=None, normals=None, saliency=None)
    assert "Tasks: semseg, normals, edge." in summary  # half of PASCAL-Part is no task
    assert ["human_parts", "7"] in [line.split() for line in summary.splitlines()]


def test_labels_come_from_voc2010_itself_unless_another_folder_is_given(kit: Devkit, tmp_path: Path) -> None:
    prepared(kit, tmp_path / "out", voc_labels=None)
    last = [name for name, shown in kit.images.items() if shown.voc is not None][-1]
    assert not (kit.voc / "SegmentationClass" / f"{last}.png").exists()
    for name, shown in kit.images.items():
        check_picture(tmp_path / "out", shown, labelled=shown.voc is not None and name != last)


def test_pixels_without_a_context_label_are_void(tmp_path: Path) -> None:
    kit = write_devkit(tmp_path / "releases", unlabelled=True)
    prepared(kit, tmp_path / "out")
    shown = kit.images[TRAIN[1]]
    label = files.read_label_image(tmp_path / "out" / "semseg" / "pascal-context" / f"{TRAIN[1]}.png")
    np.testing.assert_array_equal(label == 255, shown.context == 0)
    assert (label == 255).any()


def test_every_context_class_becomes_its_voc_class_or_background() -> None:
    for label in range(1, 460):
        expected = VOC_TO_CONTEXT.index(label) + 1 if label in VOC_TO_CONTEXT else 0
        assert CONTEXT_TO_VOC[label] == expected
    assert CONTEXT_TO_VOC[0] == 255
    assert sorted(CONTEXT_TO_VOC)[-22:-1] == [0, *range(1, 21)]


@pytest.mark.parametrize("kind", [np.int32, np.float64])
def test_a_label_map_may_be_stored_in_any_type_of_number(kit: Devkit, tmp_path: Path, kind: type) -> None:
    shown = kit.images[TRAIN[1]]
    write_context(kit.context / "trainval" / f"{shown.id}.mat", shown.context.astype(kind))
    prepared(kit, tmp_path / "out")
    check_picture(tmp_path / "out", shown, labelled=False)


def test_the_reader_reads_the_result(kit: Devkit, tmp_path: Path) -> None:
    prepared(kit, tmp_path / "out")
    for part, ids in (("train", TRAIN), ("val", VAL)):
        reader = PascalContext(tmp_path / "out", part, TASKS)  # type: ignore[arg-type]
        assert list(reader.ids) == list(ids)
        for index, name in enumerate(ids):
            sample = reader.read(index)
            np.testing.assert_array_equal(sample.image, kit.images[name].image)
            np.testing.assert_array_equal(sample.labels["semseg"], kit.images[name].semseg)
            assert tuple(sample.labels) == TASKS


def test_missing_folders_are_named(kit: Devkit, tmp_path: Path) -> None:
    out, nowhere = tmp_path / "out", tmp_path / "nowhere"
    assert f"{nowhere} has no folder ImageSets/Main; give VOC2010" in message(kit, out, voc=nowhere)
    assert f"{nowhere / 'SegmentationClass'} is not a folder" in message(kit, out, voc_labels=nowhere)
    for key, release in {
        "context": "PASCAL-Context",
        "parts": "PASCAL-Part",
        "normals": "the distilled normals",
        "saliency": "the distilled saliency",
    }.items():
        sentence = message(kit, out, **{key: nowhere})
        assert f"{nowhere} is not a folder" in sentence
        assert f"into which {release} was unpacked, --{key} DIR" in sentence
    assert "workers=-2" in message(kit, out, workers=-2)
    (kit.voc / "ImageSets" / "Main" / "val.txt").unlink()
    assert message(kit, out).startswith(f"{kit.voc / 'ImageSets' / 'Main' / 'val.txt'} does not exist")
    assert not out.exists()


@pytest.mark.parametrize(
    ("folder", "suffix"),
    [
        ("VOCdevkit/VOC2010/JPEGImages", ".jpg"),
        ("context/trainval", ".mat"),
        ("parts/Annotations_Part", ".mat"),
        ("distilled/normals_distill", ".png"),
        ("distilled/sal_distill", ".png"),
    ],
)
def test_missing_files_are_counted_and_the_first_three_named(
    kit: Devkit, tmp_path: Path, folder: str, suffix: str
) -> None:
    source = tmp_path / "releases" / folder
    removed = [TRAIN[2], TRAIN[3], VAL[1], VAL[3]]
    for name in removed:
        (source / f"{name}{suffix}").unlink()
    sentence = message(kit, tmp_path / "out")
    first = ", ".join(f"{name}{suffix}" for name in removed[:3])
    assert f"{source} lacks the files of 4 of 8 images, first {first};" in sentence
    assert not (tmp_path / "out").exists()


def test_a_path_in_place_of_an_id_is_refused_and_nothing_is_written(kit: Devkit, tmp_path: Path) -> None:
    voc = tmp_path / "VOC2010"
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    for part in ("train", "val"):
        (voc / "ImageSets" / "Main" / f"{part}.txt").write_text("../../../x\n")
    with pytest.raises(UserError, match="which is not a valid id"):
        prepare_pascal(voc, kit.context, tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_another_years_lists_are_refused(kit: Devkit, tmp_path: Path) -> None:
    write_list(kit.voc / "ImageSets" / "Main" / "train.txt", [*TRAIN, "2011_000001"])
    sentence = message(kit, tmp_path / "out")
    assert "lacks the files of 1 of 9 images, first 2011_000001.jpg" in sentence
    assert "the VOC of 2010" in sentence


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


GREY, COLOURS = np.zeros((31, 20), np.uint8), np.zeros((31, 20, 3), np.uint8)
DAMAGE = {  # case: file of an image of 31x20 pixels, how to spoil it, what is said
    "image": ("VOCdevkit/VOC2010/JPEGImages/{}.jpg", truncated, "is not a readable image"),
    "context size": (
        "context/trainval/{}.mat",
        lambda path: write_context(path, np.ones((31, 21), np.uint16)),
        "is 31x21 pixels (height x width), but its image",
    ),
    "context class": (
        "context/trainval/{}.mat",
        lambda path: write_context(path, np.full((31, 20), 460, np.uint16)),
        "holds the class 460",
    ),
    "context fraction": (
        "context/trainval/{}.mat",
        lambda path: write_context(path, np.full((31, 20), 1.5)),
        "not whole numbers",
    ),
    "context key": (
        "context/trainval/{}.mat",
        lambda path: scipy.io.savemat(path, {"Labels": GREY}),
        "has no variable LabelMap; it holds Labels",
    ),
    "context file": ("context/trainval/{}.mat", truncated, "is not a readable .mat file"),
    "parts key": (
        "parts/Annotations_Part/{}.mat",
        lambda path: scipy.io.savemat(path, {"other": GREY}),
        "has no variable anno",
    ),
    "parts form": (
        "parts/Annotations_Part/{}.mat",
        lambda path: scipy.io.savemat(path, {"anno": GREY}),
        "is not a structure of PASCAL-Part",
    ),
    "parts file": ("parts/Annotations_Part/{}.mat", truncated, "is not a readable .mat file"),
    "voc size": (
        "VOCdevkit/VOC2012/SegmentationClass/{}.png",
        lambda path: write_palette(path, GREY.T),
        "is 20x31 pixels (height x width), but its image",
    ),
    "voc class": (
        "VOCdevkit/VOC2012/SegmentationClass/{}.png",
        lambda path: write_palette(path, GREY + np.uint8(21)),
        "holds the class 21",
    ),
    "normals": ("distilled/normals_distill/{}.png", lambda path: write_png(path, GREY), "8-bit image of 3 channels"),
    "saliency": ("distilled/sal_distill/{}.png", lambda path: write_png(path, COLOURS), "8-bit image of 1 channel"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_named(kit: Devkit, tmp_path: Path, case: str) -> None:
    pattern, spoil, fragment = DAMAGE[case]
    name = VAL[2]
    assert kit.images[name].image.shape == (31, 20, 3)
    path = tmp_path / "releases" / pattern.format(name)
    spoil(path)
    sentence = message(kit, tmp_path / "out")
    assert str(path) in sentence
    assert fragment in sentence


def test_a_bad_label_map_leaves_no_label_derived_from_it(kit: Devkit, tmp_path: Path) -> None:
    path = kit.context / "trainval" / f"{TRAIN[1]}.mat"  # of an image without VOC label
    write_context(path, np.ones((3, 3), np.uint16))
    assert str(path) in message(kit, tmp_path / "out")
    assert not (tmp_path / "out" / "semseg" / "pascal-context" / f"{TRAIN[1]}.png").exists()
    write_context(path, kit.images[TRAIN[1]].context)
    prepared(kit, tmp_path / "out")
    check_picture(tmp_path / "out", kit.images[TRAIN[1]], labelled=False)


def test_a_folder_of_something_else_is_left_alone(kit: Devkit, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert f"{tmp_path / 'out'} is not empty" in message(kit, tmp_path / "out")
    assert mine.read_text() == "mine"
    assert list(mine.parent.iterdir()) == [mine]


def test_a_run_killed_while_it_began_can_be_started_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / f".{STAMP_FILE}.0123456789ab.tmp").write_text("{")
    start_output(out, {"made": "anything"})
    assert [path.name for path in out.iterdir()] == [STAMP_FILE]


def test_a_result_of_other_releases_is_not_mixed_with_these(kit: Devkit, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepared(kit, out)
    with pytest.raises(UserError, match=f"{out} was started with another voc-labels"):
        prepared(kit, out, voc_labels=kit.voc)
    (kit.parts / "Annotations_Part" / "2007_000001.mat").write_bytes(b"one more than before")
    with pytest.raises(UserError, match=f"{out / 'human_parts'} was started with another parts"):
        prepared(kit, out)


def test_releases_may_move_and_links_are_mended(tmp_path: Path) -> None:
    kit = write_devkit(tmp_path / "before")
    out = tmp_path / "out"
    assert "keep the releases where they are" in prepared(kit, out, link=True)
    (tmp_path / "before").rename(tmp_path / "after")
    folders = {key: tmp_path / "after" / getattr(kit, key).relative_to(tmp_path / "before") for key in FOLDERS}
    moved = dataclasses.replace(kit, **folders)
    prepared(moved, out, link=True)
    assert all(path.exists() for path in (out / "JPEGImages").iterdir())


def test_the_wrong_folder_of_a_release_is_named_with_its_option(kit: Devkit, tmp_path: Path) -> None:
    sentence = message(kit, tmp_path / "out", parts=kit.context)
    assert "holds no human_parts" in sentence
    assert "--parts" in sentence
    inner = tmp_path / "unpacked" / "trainval"
    inner.mkdir(parents=True)
    (inner / "Annotations_Part").symlink_to(kit.parts / "Annotations_Part")
    prepared(kit, tmp_path / "out", parts=tmp_path / "unpacked")


def test_the_command_prints_mistakes_in_one_line(kit: Devkit, tmp_path: Path, cli: Callable[..., Result]) -> None:
    arguments = ["--voc", str(kit.voc), "--context", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]
    result = cli(SCRIPT, *arguments)
    assert result.code == 1
    assert result.err.startswith(f"error: {tmp_path / 'nowhere'} is not a folder")
    assert result.err.count("\n") == 1


def test_the_command_needs_only_two_releases_and_links_on_request(
    kit: Devkit, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    out = tmp_path / "out"
    arguments = ["--voc", str(kit.voc), "--context", str(kit.context), "--out", str(out), "--workers", "0"]
    result = cli(SCRIPT, *arguments, "--link")
    assert result.code == 0
    assert "Tasks: semseg, edge." in result.out
    assert (out / "JPEGImages" / f"{VAL[0]}.jpg").is_symlink()
    check_lists(out)


def test_the_miniature_has_the_cases_that_readers_must_get_right() -> None:
    shown = [image(name, position) for position, name in enumerate((*TRAIN, *VAL))]
    persons = [[thing for thing in p.objects if thing.kind == 15] for p in shown]
    assert [len(masks) for masks in persons[:4]] == [2, 1, 0, 2]
    assert not any(thing.parts for thing in persons[1])
    torso, second = (dict(thing.parts)["torso"] for thing in persons[0])
    assert (torso & second).any()
    assert all(p.voc is None or ((p.voc == 255).any() and (p.voc != p.from_context).any()) for p in shown)
