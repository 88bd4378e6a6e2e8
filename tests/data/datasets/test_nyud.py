"""The NYUD-v2 reader, on archives of a few pixels and, where they are, on the real small frames."""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import scipy.io
from helpers.common import ROOT
from PIL import Image

from mtcl import UserError
from mtcl.cli.train import find_unlabeled_images
from mtcl.config.build_data import build_dataset, build_tasks
from mtcl.config.compose import compose_config
from mtcl.data import NYUD, Augment, finalize_labels, train_loader
from mtcl.data.datasets.base import resize_edges, resize_image, same_aspect
from mtcl.data.transforms import resize_nearest
from mtcl.evaluation.saved_predictions import PredictionWriter
from mtcl.tasks import NYUD40, build_task

TASKS = ("semseg", "depth", "normals", "edge")
REAL = ROOT.parent / "shared" / "nyud_mini"


def write(path: Path, array: np.ndarray, hdf5: bool = False) -> None:
    """RGB or single-channel arrays as images, any as .npy, or as the one variable of a .mat named as in ASTMT's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".mat":
        key = path.parent.name
        if not hdf5:
            scipy.io.savemat(path, {"other": 1, key: array})
            return
        with h5py.File(path, "w", userblock_size=512) as file:
            file[key] = array.T  # as MATLAB's format 7.3 lies on the disk
        with path.open("r+b") as raw:
            raw.write(b"MATLAB 7.3 MAT-file")
    else:
        assert cv2.imwrite(str(path), array[..., ::-1] if array.ndim == 3 else array)


def arrays(seed: int, size: tuple[int, int] = (6, 8)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "images": rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        "segmentation": rng.integers(0, 41, size, dtype=np.uint8),
        "depth": rng.uniform(0.5, 9, size).astype(np.float32),
        "normals": rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        "edge": rng.choice(np.uint8([0, 127, 128, 255]), size),
    }


NYUDV2 = {"images": ".png", "segmentation": ".png", "depth": ".npy", "normals": ".png", "edge": ".png"}
MTI = {"images": ".jpg", "segmentation": ".png", "depth": ".npy", "normals": ".npy", "edge": ".npy"}
ASTMT = {"images": ".jpg", "segmentation": ".mat", "depth": ".mat", "normals": ".jpg", "edge": ".png"}


def write_archive(root: Path, suffixes: dict[str, str] = NYUDV2, size: tuple[int, int] = (6, 8), hdf5=False) -> Path:
    """Five images: three to train on, two to validate."""
    for number in range(1, 6):
        for folder, array in arrays(number, size).items():
            if (folder, suffixes[folder]) == ("normals", ".npy"):
                array = vectors(array)
            elif (folder, suffixes[folder]) == ("edge", ".npy"):
                array = (array > 127).astype(np.float32)
            write(root / folder / f"{number:04d}{suffixes[folder]}", array, hdf5)
    (root / "gt_sets").mkdir()
    (root / "gt_sets" / "train.txt").write_text("0003\n0001\n0002\n")
    (root / "gt_sets" / "val.txt").write_text("0004\n0005\n")
    (root / "gt_sets" / "tune_train.txt").write_text("0001\n0002\n")
    (root / "gt_sets" / "tune_val.txt").write_text("0003\n")
    return root


def vectors(codes: np.ndarray) -> np.ndarray:
    """Codes as units, zero where the code is too short."""
    raw = codes / 127.5 - 1
    length = np.linalg.norm(raw, axis=-1, keepdims=True)
    return ((length >= 0.5) * raw / length).astype(np.float32)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "NYUDv2")


def message(*args, **kwargs) -> str:
    """The sentence of the error that a reader with these arguments raises when it is made, or read at 0."""
    with pytest.raises(UserError) as error:
        NYUD(*args, **kwargs).read(0)
    return str(error.value)


def test_every_file_round_trips_with_exact_values(archive: Path) -> None:
    reader = NYUD(archive, "train", TASKS)
    assert list(reader.ids) == ["0003", "0001", "0002"]
    for index, number in enumerate((3, 1, 2)):
        stored, sample = arrays(number), reader.read(index)
        assert sample.id == reader.ids[index]
        assert tuple(sample.labels) == TASKS
        np.testing.assert_array_equal(sample.image, stored["images"])
        expected = np.where(stored["segmentation"] == 0, 255, stored["segmentation"].astype(int) - 1)
        np.testing.assert_array_equal(sample.labels["semseg"], expected)
        np.testing.assert_array_equal(sample.labels["depth"], stored["depth"])
        np.testing.assert_array_equal(sample.labels["edge"], stored["edge"] >= 128)
        np.testing.assert_array_equal(sample.labels["normals"], stored["normals"])  # decoded by the task
        dtypes = {task: label.dtype for task, label in sample.labels.items()}
        assert dtypes == {"semseg": np.uint8, "depth": np.float32, "normals": np.uint8, "edge": np.uint8}


def as_used(reader: NYUD, index: int) -> dict[str, np.ndarray]:
    """Labels as losses see them."""
    tasks = {name: build_task(name, **options) for name, options in NYUD.task_options().items()}
    return finalize_labels(reader.read(index), tasks).labels


@pytest.mark.parametrize("size", [(425, 560), (480, 640)])
@pytest.mark.parametrize("name", ["MTI", "ASTMT", "ASTMT with 7.3"])
def test_the_other_archives_give_the_labels_of_the_first(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    small = size if name == "MTI" else (size[0] // 5, size[1] // 5)  # .mat and .jpg are slow
    first = NYUD(write_archive(tmp_path / "a" / "NYUDv2", size=small), "train", TASKS)
    suffixes = MTI if name == "MTI" else ASTMT
    root = write_archive(tmp_path / "b" / "NYUD_MT", suffixes, small, hdf5=name.endswith("7.3"))
    other = NYUD(tmp_path / "b", "train", TASKS)
    assert other.root == root
    for folder, suffix in suffixes.items():
        assert f"{folder} {suffix}" in other.summary()
    assert f"{small[0]}x{small[1]}" in other.summary()
    expected, actual = as_used(first, 0), as_used(other, 0)
    for task in ("semseg", "depth", "edge"):
        np.testing.assert_array_equal(actual[task], expected[task])
        assert actual[task].dtype == expected[task].dtype
    if suffixes is MTI:
        np.testing.assert_allclose(actual["normals"], expected["normals"], atol=1e-6)
    else:  # JPEG changes them
        assert set(np.unique(np.linalg.norm(actual["normals"], axis=-1).round(5))) <= {0.0, 1.0}
    assert other.read(0).image.shape == first.read(0).image.shape


def test_jpeg_pictures_are_close_to_what_was_stored(tmp_path: Path) -> None:
    root = write_archive(tmp_path / "NYUD_MT", MTI)
    smooth = np.dstack([np.tile(np.arange(0, 160, 20, np.uint8), (6, 1))] * 3)
    write(root / "images" / "0003.jpg", smooth)
    assert np.abs(NYUD(root, "train", ["depth"]).read(0).image.astype(int) - smooth).max() < 12


def test_a_rotating_exif_entry_does_not_turn_the_picture_from_its_labels(tmp_path: Path) -> None:
    root = write_archive(tmp_path / "NYUD_MT", MTI)
    image = Image.open(root / "images" / "0003.jpg")
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(root / "images" / "0003.jpg", exif=exif)
    assert NYUD(root, "train", TASKS).read(0).image.shape == (6, 8, 3)


def test_of_two_kinds_of_files_the_complete_one_is_taken(archive: Path) -> None:
    write(archive / "normals" / "0003.npy", vectors(arrays(3)["normals"]))
    assert NYUD(archive, "train", TASKS).suffixes["normals"] == ".png"
    for number in (1, 2, 3):
        write(archive / "normals" / f"{number:04d}.npy", vectors(arrays(number)["normals"]))
        (archive / "normals" / "0002.png").unlink(missing_ok=True)
    assert NYUD(archive, "train", TASKS).suffixes["normals"] == ".npy"


def test_palette_labels_are_indices_not_colours(archive: Path) -> None:
    ids = arrays(3)["segmentation"]
    image = Image.fromarray(ids, mode="P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    classes_before = NYUD(archive, "train", ["semseg"]).read(0).labels["semseg"]
    image.save(archive / "segmentation" / "0003.png")
    np.testing.assert_array_equal(NYUD(archive, "train", ["semseg"]).read(0).labels["semseg"], classes_before)


def test_the_whole_frame_is_not_resampled_to_its_valid_part(tmp_path: Path) -> None:
    """The mix of two archives: nearly the same aspect, but not the same view."""
    assert not same_aspect((425, 560), (480, 640))
    assert not same_aspect((480, 640), (425, 560))
    root = write_archive(tmp_path / "NYUDv2", size=(425, 560))
    write(root / "segmentation" / "0003.png", arrays(3, (480, 640))["segmentation"])
    assert "480x640" in message(root, "train", ["semseg"])


@pytest.mark.parametrize("size", [(12, 16), (3, 4), (13, 17)])
def test_a_label_of_another_size_but_the_same_view_is_resampled(archive: Path, size: tuple[int, int]) -> None:
    other = arrays(3, size)
    for folder in ("segmentation", "edge"):
        write(archive / folder / "0003.png", other[folder])
    sample = NYUD(archive, "train", TASKS).read(0)
    expected = np.where(other["segmentation"] == 0, 255, other["segmentation"].astype(int) - 1)
    np.testing.assert_array_equal(sample.labels["semseg"], resize_nearest(expected, (6, 8)))
    np.testing.assert_array_equal(sample.labels["edge"], resize_nearest(other["edge"] > 127, (6, 8)))


@pytest.mark.parametrize("tasks", [t for n in (1, 2, 4) for t in itertools.combinations(TASKS, n)])
@pytest.mark.parametrize("resize", [None, (3, 4)])
def test_the_cache_changes_nothing_and_saves_decoding(
    archive: Path, tmp_path: Path, monkeypatch, tasks, resize
) -> None:
    plain = NYUD(archive, "train", tasks, resize=resize)
    NYUD(archive, "train", tasks, resize=resize, cache=tmp_path / "cache").read(0)
    cached = NYUD(archive, "train", tasks, resize=resize, cache=tmp_path / "cache")
    expected = plain.read(0)
    monkeypatch.setattr(NYUD, "decode", lambda *args: pytest.fail("decoded again"))
    cached_sample = cached.read(0)
    np.testing.assert_array_equal(cached_sample.image, expected.image)
    for task in tasks:
        np.testing.assert_array_equal(cached_sample.labels[task], expected.labels[task])
        assert cached_sample.labels[task].dtype == expected.labels[task].dtype


def test_settings_and_archives_do_not_share_their_cache(archive: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    small = write_archive(tmp_path / "small" / "NYUDv2", size=(3, 4))
    readers = [NYUD(archive, "train", TASKS, resize=resize, cache=cache) for resize in (None, (3, 4), (2, 2))]
    readers.append(NYUD(small, "train", TASKS, cache=cache))
    assert [reader.read(0).image.shape[:2] for reader in readers] == [(6, 8), (3, 4), (2, 2), (3, 4)]
    assert len(list((cache / "nyud").iterdir())) == 4 * 5
    # The other list of the same archive, and other tasks, do share it.
    NYUD(archive, "val", ["depth"], cache=cache).read(0)
    assert len(list((cache / "nyud").iterdir())) == 4 * 5
    # So does a copy of the archive that differs in one kind of files only, though they have the same sizes.
    copy = shutil.copytree(archive, tmp_path / "copy" / "NYUDv2")
    for path in (copy / "depth").iterdir():
        write(path, np.full((6, 8), 3, np.float32))
    one, other = (NYUD(root, "train", TASKS, cache=cache) for root in (archive, copy))
    for _ in range(2):
        assert (other.read(0).labels["depth"] == 3).all()
        assert not (one.read(0).labels["depth"] == 3).any()
    assert len(list((cache / "nyud").iterdir())) == 4 * 5 + 1


@pytest.mark.parametrize("stray", ["images/.DS_Store", "notes.txt", "images/0009.jpg"])
def test_stray_files_do_not_begin_another_cache(archive: Path, tmp_path: Path, stray: str) -> None:
    NYUD(archive, "train", TASKS, cache=tmp_path / "cache").read(0)
    folders = sorted((tmp_path / "cache" / "nyud").iterdir())
    (archive / stray).write_bytes(b"x")
    NYUD(archive, "train", TASKS, cache=tmp_path / "cache").read(0)
    assert sorted((tmp_path / "cache" / "nyud").iterdir()) == folders


def test_a_changed_file_is_decoded_again(archive: Path, tmp_path: Path) -> None:
    NYUD(archive, "train", TASKS, cache=tmp_path / "cache").read(0)
    write(archive / "depth" / "0003.npy", np.full((6, 8), 7, np.float32))
    assert (NYUD(archive, "train", TASKS, cache=tmp_path / "cache").read(0).labels["depth"] == 7).all()


def test_a_label_of_another_size_is_noticed_through_the_cache_and_resize(archive: Path, tmp_path: Path) -> None:
    write(archive / "edge" / "0003.png", arrays(3, (5, 8))["edge"])
    for _ in range(2):
        assert "5x8" in message(archive, "train", TASKS, cache=tmp_path / "cache", resize=(3, 4))


@pytest.mark.parametrize("inside", [".", "cache", "gt_sets/x"])
def test_a_cache_inside_the_dataset_is_refused(archive: Path, inside: str) -> None:
    files_before = sorted(archive.rglob("*"))
    assert "outside" in message(archive, "train", TASKS, cache=archive / inside)
    assert sorted(archive.rglob("*")) == files_before


def test_a_list_with_an_id_twice_names_it(archive: Path) -> None:
    (archive / "gt_sets" / "train.txt").write_text("0001\n0002\n0001\n")
    sentence = message(archive, "train", TASKS)
    assert "train.txt" in sentence
    assert "0001 more than once" in sentence


def test_a_list_that_is_no_text_is_named(archive: Path) -> None:
    (archive / "gt_sets" / "train.txt").write_bytes(b"0001\n\xff\xfe\n")
    sentence = message(archive, "train", TASKS)
    assert "train.txt" in sentence
    assert "UTF-8" in sentence


def test_a_list_from_windows_is_read(archive: Path) -> None:
    (archive / "gt_sets" / "train.txt").write_bytes(b"\xef\xbb\xbf0001\r\n0002\r\n")
    assert NYUD(archive, "train", TASKS).ids == ["0001", "0002"]


@pytest.mark.parametrize("folder", ["segmentation", "depth"])
@pytest.mark.parametrize("fault", ["text", "truncated", "truncated 7.3", "other variable", "structure", "other form"])
def test_a_mat_that_is_not_what_it_says_is_named(tmp_path: Path, folder: str, fault: str) -> None:
    root = write_archive(tmp_path / "NYUD_MT", ASTMT, hdf5=fault.endswith("7.3"))
    path = root / folder / "0003.mat"
    if fault == "text":
        path.write_text("<html>quota exceeded</html>")
    elif fault.startswith("truncated"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif fault == "other variable":
        scipy.io.savemat(path, {"groundTruth": np.zeros((6, 8))})
    elif fault == "structure":
        scipy.io.savemat(path, {folder: {"labels": np.zeros((6, 8))}})
    else:
        scipy.io.savemat(path, {folder: np.zeros((6, 8, 2))})
    sentence = message(root, "train", TASKS)
    assert str(path) in sentence
    assert "groundTruth" in sentence or fault != "other variable"


def test_depth_without_a_positive_finite_value_is_void(archive: Path) -> None:
    depth = np.float64([[np.nan, np.inf, -np.inf, -1], [0, 1e-3, 2, 80]])
    write(archive / "depth" / "0003.npy", np.tile(depth, (3, 2)))
    label = NYUD(archive, "train", ["depth"]).read(0).labels["depth"]
    assert label.dtype == np.float32
    np.testing.assert_array_equal(label[:2, :4], np.float32([[0, 0, 0, 0], [0, 1e-3, 2, 80]]))


def test_root_may_be_the_folder_or_its_parent(archive: Path) -> None:
    for root in (archive, archive.parent, str(archive)):
        assert NYUD(root, "val", TASKS).ids == ["0004", "0005"]


def test_splits_and_limit(archive: Path) -> None:
    assert NYUD(archive, "train", TASKS, split="tune").ids == ["0001", "0002"]
    assert NYUD(archive, "val", TASKS, split="tune").ids == ["0003"]
    assert NYUD(archive, "train", TASKS, limit=2).ids == ["0003", "0001"]
    assert NYUD(archive, "train", TASKS, limit=9).ids == ["0003", "0001", "0002"]


def test_only_the_list_in_use_is_opened(archive: Path) -> None:
    (archive / "gt_sets" / "val.txt").write_bytes(b"\xff\xfe no such image")
    (archive / "gt_sets" / "tune_train.txt").unlink()
    assert len(NYUD(archive, "train", TASKS).ids) == 3


def test_only_the_folders_of_the_tasks_in_use_are_needed(archive: Path) -> None:
    for folder in ("segmentation", "normals", "edge"):
        for path in (archive / folder).iterdir():
            path.unlink()
        (archive / folder).rmdir()
    assert list(NYUD(archive, "train", ["depth"]).read(0).labels) == ["depth"]
    assert "segmentation/0003.png" in message(archive, "train", ["depth", "semseg"])


def test_half_unpacked_archive_names_the_first_missing_files(archive: Path) -> None:
    for name in ("normals/0003.png", "normals/0001.png", "edge/0003.png", "edge/0001.png"):
        (archive / name).unlink()
    sentence = message(archive, "train", TASKS)
    assert "lacks 4 files" in sentence
    assert "normals/0003.png, normals/0001.png, edge/0003.png;" in sentence
    assert str(archive) in sentence
    assert "segmentation/<id>.png" in sentence


def test_labels_that_have_files_can_be_taken_alone(archive: Path) -> None:
    for name in ("normals/0003.png", "normals/0001.png", "edge/0003.png"):
        (archive / name).unlink()
    overrides = ["data=nyud", f"data.root={archive}", "data.cache=null", "data.label_assignment=present"]
    config = compose_config(overrides, ROOT / "configs")
    dataset = build_dataset(config, "train", build_tasks(config))
    assert [sorted(dataset.label_assignment[name]) for name in ("0003", "0001", "0002")] == [
        ["depth", "semseg"],
        ["depth", "edge", "semseg"],
        ["depth", "edge", "normals", "semseg"],
    ]
    assert dataset.source == {"rule": "present"}
    complete, partial = NYUD(archive, "train", ["semseg", "depth"]).read(0), dataset.read(0)
    np.testing.assert_array_equal(partial.labels["depth"], complete.labels["depth"])
    assert not partial.labels["normals"].any()
    assert (partial.labels["edge"] == 255).all()
    assert find_unlabeled_images(dataset) == []
    config.tasks.names = ["normals"]
    dataset = build_dataset(config, "train", build_tasks(config))
    assert find_unlabeled_images(dataset)[0].startswith("2 of 3 training images have no file of a label of normals, ")
    (archive / "images" / "0001.png").unlink()
    with pytest.raises(UserError, match=r"lacks 1 files of the tasks used, first images/0001\.png"):
        build_dataset(config, "train", build_tasks(config))


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("data.label_fractions={semseg:0.5}", "leave data.label_fractions out"),
        ("data.shards=shards", "leave data.shards out"),
        ("data=rooms", "needs the layout of NYUD-v2 or PASCAL-Context"),
        ("tasks.names=[semseg,edge]", "none of the 3 images has files of the labels of edge"),
    ],
)
def test_labels_that_have_files_need_files(archive: Path, override: str, fragment: str) -> None:
    for path in (archive / "edge").iterdir():
        path.unlink()
    overrides = ["data=nyud", f"data.root={archive}", "data.cache=null", "data.label_assignment=present", override]
    if override == "data=rooms":
        overrides = overrides[3:]
    config = compose_config(overrides, ROOT / "configs")
    with pytest.raises(UserError, match=re.escape(fragment)):
        build_dataset(config, "train", build_tasks(config))


@pytest.mark.parametrize("state", ["absent", "empty", "no lists"])
def test_root_without_an_archive_tells_the_layout(tmp_path: Path, state: str) -> None:
    root = tmp_path / "data"
    if state != "absent":
        root.mkdir()
    if state == "no lists":
        (root / "images").mkdir()
    sentence = message(root, "train", TASKS)
    assert str(root) in sentence
    assert "depth/<id>.npy" in sentence


def test_unknown_split_names_its_list_and_the_splits_there(archive: Path) -> None:
    (archive / "gt_sets" / "odd_train.txt").write_text("0001\n")
    sentence = message(archive, "val", TASKS, split="tuned")
    assert "tuned_val.txt" in sentence
    assert "['standard', 'tune']" in sentence  # `odd` has no validation list


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"tasks": ["semseg", "sal"]}, ["['sal']", "semseg"]),
        ({"subset": "test"}, ["'test'", "'val'"]),
        ({"num_classes": 41}, ["41", "40"]),
        ({"resize": (0, 5)}, ["(0, 5)"]),
        ({"limit": 0}, ["limit=0"]),
    ],
)
def test_impossible_options_are_named(archive: Path, options: dict, parts: list[str]) -> None:
    sentence = message(**({"root": archive, "subset": "train", "tasks": TASKS} | options))
    assert all(part in sentence for part in parts)


def test_empty_list_is_an_error(archive: Path) -> None:
    (archive / "gt_sets" / "train.txt").write_text("\n")
    assert "train.txt" in message(archive, "train", TASKS)


def test_class_id_out_of_range_names_file_and_value(archive: Path) -> None:
    ids = np.zeros((6, 8), np.uint8)
    ids[2, 3] = 14
    write(archive / "segmentation" / "0003.png", ids)
    assert NYUD(archive, "train", ["semseg"], num_classes=14).read(0).labels["semseg"][2, 3] == 13
    sentence = message(archive, "train", ["semseg"], num_classes=13)
    assert str(archive / "segmentation" / "0003.png") in sentence
    assert "14" in sentence


@pytest.mark.parametrize("folder", ["segmentation", "depth", "normals", "edge"])
def test_label_of_another_size_names_both(archive: Path, folder: str) -> None:
    name = f"{folder}/0003{'.npy' if folder == 'depth' else '.png'}"
    write(archive / name, arrays(3, (5, 8))[folder])
    sentence = message(archive, "train", TASKS)
    assert str(archive / name) in sentence
    assert "5x8" in sentence
    assert "6x8" in sentence


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("segmentation/0003.png", np.zeros((6, 8, 3), np.uint8)),
        ("segmentation/0003.png", np.zeros((6, 8), np.uint16)),
        ("normals/0003.png", np.zeros((6, 8), np.uint8)),
        ("edge/0003.png", np.zeros((6, 8, 4), np.uint8)),
        ("depth/0003.npy", np.zeros((6, 8, 1), np.float32)),
        ("depth/0003.npy", np.zeros((6, 8), np.uint16)),
        ("depth/0003.npy", np.full((6, 8), None)),
    ],
)
def test_label_of_another_form_names_it(archive: Path, name: str, array: np.ndarray) -> None:
    write(archive / name, array)
    sentence = message(archive, "train", TASKS)
    assert str(archive / name) in sentence
    assert str(array.shape) in sentence or "readable" in sentence


@pytest.mark.parametrize("suffixes", [NYUDV2, MTI, ASTMT], ids=["NYUDv2", "MTI", "ASTMT"])
@pytest.mark.parametrize("folder", list(NYUDV2))
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.95])
def test_truncated_file_is_named(tmp_path: Path, suffixes: dict[str, str], folder: str, fraction: float) -> None:
    archive = write_archive(tmp_path / "NYUDv2", suffixes)
    path = archive / folder / f"0003{suffixes[folder]}"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    sentence = message(archive, "train", TASKS)
    assert str(path) in sentence
    assert "unpack it again" in sentence


def stream(root: Path, cache: Path | None, workers: int) -> list[np.ndarray]:
    """All that two epochs of training give."""
    tasks = {name: build_task(name, **options) for name, options in NYUD.task_options().items()}
    reader = NYUD(root, "train", TASKS, cache=cache)
    loader = train_loader(reader, tasks, Augment((5, 7)), 1, seed=4, workers=workers)
    batches = itertools.islice(loader, 6)
    return [array.numpy() for batch in batches for array in (batch["image"], *batch["labels"].values())]


def test_neither_the_cache_nor_the_workers_change_what_is_trained_on(archive: Path, tmp_path: Path) -> None:
    expected = stream(archive, None, 0)
    for cache, workers in ((tmp_path / "cache", 2), (tmp_path / "cache", 0), (None, 2)):  # cold, warm, none
        for expected_image, image in zip(expected, stream(archive, cache, workers), strict=True):
            np.testing.assert_array_equal(image, expected_image)


def test_offered_builds_the_tasks() -> None:
    offered = NYUD.task_options(num_classes=13)
    assert tuple(offered) == TASKS
    assert offered["semseg"] == {"class_names": NYUD40[:13]}
    tasks = {name: build_task(name, **options) for name, options in offered.items()}
    assert tasks["semseg"].channels == 13


def test_fingerprint_tells_lists_and_files_apart_but_not_tasks(archive: Path) -> None:
    fingerprint = NYUD(archive, "train", TASKS).fingerprint()
    assert fingerprint == NYUD(archive.parent, "train", ["edge"]).fingerprint()
    others = {
        NYUD(archive, "val", TASKS).fingerprint(),
        NYUD(archive, "train", TASKS, limit=2).fingerprint(),
        NYUD(archive, "train", TASKS, resize=(3, 4)).fingerprint(),
    }
    assert len(others | {fingerprint}) == 4
    write(archive / "images" / "0003.png", np.zeros((6, 8, 3), np.uint8))
    assert NYUD(archive, "train", TASKS).fingerprint() != fingerprint


def test_resize_rules(archive: Path) -> None:
    stored = arrays(3)
    full, half = NYUD(archive, "train", TASKS).read(0), NYUD(archive, "train", TASKS, resize=(3, 4)).read(0)
    blocks = stored["images"].reshape(3, 2, 4, 2, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(half.image - blocks).max() <= 0.5
    for task in ("semseg", "depth", "normals"):
        np.testing.assert_array_equal(half.labels[task], full.labels[task][1::2, 1::2])  # a centre on the border of two
    edges = full.labels["edge"].reshape(3, 2, 4, 2).max(axis=(1, 3))
    np.testing.assert_array_equal(half.labels["edge"], edges)
    assert NYUD(archive, "train", TASKS, resize=(6, 8)).read(0).image.tobytes() == full.image.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 4), (16, 12), (20, 30), (33, 12), (16, 25)])
def test_resized_edges_take_the_maximum_of_the_covered_cell(size: tuple[int, int]) -> None:
    edges = (np.random.default_rng(0).random((16, 12)) < 0.1).astype(np.uint8)
    expected = np.zeros(size, np.uint8)
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(i * 16 // size[0], -(-(i + 1) * 16 // size[0]))
            columns = slice(j * 12 // size[1], -(-(j + 1) * 12 // size[1]))
            expected[i, j] = edges[rows, columns].max()
    np.testing.assert_array_equal(resize_edges(edges, size), expected)


def test_a_thin_line_survives_where_nearest_would_lose_it() -> None:
    line = np.zeros((40, 40), np.uint8)
    line[:, 8] = 1
    assert resize_edges(line, (10, 10))[:, 2].all()
    assert not resize_nearest(line, (10, 10)).any()


def test_resized_image_keeps_a_constant() -> None:
    for size in ((3, 4), (12, 16), (3, 16)):
        image = resize_image(np.full((6, 8, 3), 77, np.uint8), size)
        assert image.shape == (*size, 3)
        assert (image == 77).all()


@pytest.fixture(scope="session")
def real_frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (REAL / "unpack.py").is_file():
        pytest.skip("the small real frames are not beside this repository")
    folder = tmp_path_factory.mktemp("nyud_mini")
    subprocess.run([sys.executable, REAL / "unpack.py", folder], check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_real_frames(real_frames: Path) -> None:
    counts = {
        ("standard", "train"): 795,
        ("standard", "val"): 500,
        ("tune", "train"): 640,
        ("tune", "val"): 155,
    }
    for (split, part), count in counts.items():
        assert len(NYUD(real_frames, part, TASKS, split=split).ids) == count  # type: ignore[arg-type]
    reader = NYUD(real_frames, "train", TASKS)
    for index in range(0, 795, 97):
        sample = reader.read(index)
        assert sample.image.shape == (192, 256, 3)
        assert 10 < sample.image.mean() < 245
        classes, depth, codes = (sample.labels[task] for task in TASKS[:3])
        normals = build_task("normals").finalize_label(codes)
        assert set(np.unique(classes)) <= {*range(39), 255}
        assert depth[depth > 0].min() > 0.3
        assert depth.max() < 10.1
        assert set(np.unique(np.linalg.norm(normals, axis=-1).round(5))) <= {0.0, 1.0}
        assert normals[..., 2].mean() > 0  # towards the viewer
        assert 0 < sample.labels["edge"].mean() < 0.2
        floor = normals[classes == NYUD40.index("floor")]
        assert not len(floor) or floor[:, 1].mean() > 0.5  # up


PATHS = ["../../../x", "/x", "a/b", "..", ".hidden", "a\\b", "C:x", "a\x1b[31m", "x" * 201]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_in_place_of_an_id_is_refused_when_read(tmp_path: Path, path: str) -> None:
    root = write_archive(tmp_path / "deep" / "est" / "NYUDv2")
    (root / "gt_sets" / "train.txt").write_text(f"0001\n{path}\n")
    files_before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"train\.txt lists .* not a valid id") as error:
        NYUD(root, "train", TASKS, cache=tmp_path / "cache")
    assert str(error.value).isprintable()
    assert sorted(tmp_path.rglob("*")) == files_before
    with pytest.raises(UserError, match="not a valid id"):
        PredictionWriter(tmp_path / "maps", {"depth": build_task("depth")}, None).write(path, {})
    assert sorted(tmp_path.rglob("*")) == files_before
