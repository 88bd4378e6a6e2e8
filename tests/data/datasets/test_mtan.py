"""The datasets in MTAN's layout, on releases of a few pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.common import TINY, composed
from helpers.mtan_miniature import make_arrays, write_release

from mtcl import UserError
from mtcl.cli.train import train
from mtcl.config.build_data import build_dataset, build_tasks
from mtcl.config.resolve import plain
from mtcl.config.schema import check_config
from mtcl.data import NYUD13, finalize_labels
from mtcl.tasks import NYUD13 as NAMES

TASKS = ("semseg", "depth", "normals")


@pytest.fixture
def nyuv2(tmp_path: Path) -> Path:
    return write_release(tmp_path / "nyuv2")


def test_every_array_has_its_stored_values(nyuv2):
    for subset, start, count in (("train", 0, 3), ("val", 1000, 2)):
        dataset = NYUD13(nyuv2, subset, TASKS)
        assert list(dataset.ids) == [f"{subset}_{number}" for number in range(count)]
        for index in range(count):
            stored, sample = make_arrays(start + index, 13, (6, 8), inverse=False), dataset.read(index)
            np.testing.assert_array_equal(sample.image, np.round(255 * stored["image"]))
            label = stored["label"]
            np.testing.assert_array_equal(sample.labels["semseg"], np.where(label < 0, 255, label))
            np.testing.assert_array_equal(sample.labels["depth"], stored["depth"][..., 0])
            np.testing.assert_array_equal(sample.labels["normals"], stored["normal"].astype(np.float32))
            dtypes = [sample.image.dtype, *(array.dtype for array in sample.labels.values())]
            assert dtypes == [np.uint8, np.uint8, np.float32, np.float32]


def test_the_config_keeps_short_vectors_and_scores_by_the_file(nyuv2, tmp_path):
    config = composed("data=nyuv2_13", f"data.root={nyuv2.parent}", f"data.cache={tmp_path}/cache")
    check_config(plain(config))
    tasks = build_tasks(config)
    assert {name: task.channels for name, task in tasks.items()} == {"semseg": 13, "depth": 1, "normals": 3}
    assert tasks["semseg"].classes == NAMES
    dataset = build_dataset(config, "val", tasks)
    stored = make_arrays(1001, 13, (6, 8), inverse=False)["normal"].astype(np.float32)
    for _ in range(2):  # decoded, then from the cache
        labels = finalize_labels(dataset.read(1), tasks).labels
        np.testing.assert_array_equal(labels["normals"], stored)
    assert "image, label, depth, normal .npy, images 6x8; decoded once" in dataset.summary()
    assert list((tmp_path / "cache" / "nyud13").iterdir())


def test_images_of_eight_bits_and_maps_without_a_last_axis_are_the_same(nyuv2):
    original = NYUD13(nyuv2, "train", TASKS).read(0)
    for folder in ("image", "label", "depth"):
        path = nyuv2 / "train" / folder / "0.npy"
        array = np.load(path)
        np.save(path, np.round(255 * array).astype(np.uint8) if folder == "image" else array.squeeze().astype(float))
    changed = NYUD13(nyuv2, "train", TASKS).read(0)
    np.testing.assert_array_equal(changed.image, original.image)
    for name in TASKS:
        np.testing.assert_array_equal(changed.labels[name], original.labels[name])


def test_the_tune_split_is_blocks_of_the_training_images(tmp_path):
    root = write_release(tmp_path, counts=(70, 1), size=(1, 1))
    train, val = (NYUD13(root, subset, ["depth"], split="tune") for subset in ("train", "val"))
    assert list(train.ids) == [f"train_{number}" for number in range(64)]
    assert list(val.ids) == [f"train_{number}" for number in range(64, 70)]
    assert [path.parent.parent.name for path in val.source_files("depth", "train_64")] == ["train"]
    assert val.fingerprint() != train.fingerprint()


@pytest.mark.slow
def test_a_tiny_model_is_trained_and_scored_by_mtan(nyuv2, tmp_path):
    overrides = [
        "data=nyuv2_13",
        f"data.root={nyuv2}",
        "data.cache=null",
        "evaluation=mtan",
        "loss=mtan",
        "data.size=[6,8]",
    ]
    metrics = train(composed(*TINY, *overrides, "trainer.max_steps=1"), tmp_path / "run")
    assert {"mIoU", "pixel_accuracy"} <= set(metrics["semseg"])
    assert set(metrics["depth"]) == {"abs_err", "rel_err", "not_finite"}
    assert {"mErr", "median", "within_11.25", "within_22.5", "within_30"} <= set(metrics["normals"])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["num_images"] == 2
    assert record["evaluation"]["options"]["depth"]["protocol"] == "mtan"


def broken(root: Path, folder: str, array: np.ndarray | None) -> None:
    """Put another array in the place of image 0, or remove it."""
    path = root / "train" / folder / "0.npy"
    path.unlink()
    if array is not None:
        np.save(path, array)


HALVES = np.full((6, 8), 0.5)
BAD_FILES = {
    "an image of 0 to 255": ("image", np.full((6, 8, 3), 200.0), ["image/0.npy", "200", "fractions from 0 to 1"]),
    "an image that is NaN": ("image", np.full((6, 8, 3), np.nan), ["image/0.npy", "nan"]),
    "an image of one channel": ("image", HALVES, ["image/0.npy", "(height, width, 3)"]),
    "classes of another list": ("label", np.full((6, 8), 39), ["label/0.npy", "class 39", "num_classes"]),
    "classes below void": ("label", np.full((6, 8), -2), ["label/0.npy", "class -2"]),
    "classes in between": ("label", HALVES, ["label/0.npy", "whole numbers"]),
    "whole depth": ("depth", np.ones((6, 8), int), ["depth/0.npy", "metres"]),
    "long normals": ("normal", np.full((6, 8, 3), 127.0), ["normal/0.npy", "-1..1"]),
    "normals of two": ("normal", np.zeros((6, 8, 2)), ["normal/0.npy", "(height, width, 3)"]),
    "another view": ("depth", np.ones((6, 12, 1)), ["depth/0.npy", "6x12"]),
    "no image": ("image", None, ["train/image lacks 0.npy", "unpack"]),
    "no label": ("label", None, ["train/label/0.npy", "unpack the full archive"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_sentence_that_names_it(nyuv2, case):
    folder, array, fragments = BAD_FILES[case]
    broken(nyuv2, folder, array)
    with pytest.raises(UserError) as error:
        NYUD13(nyuv2, "train", TASKS).read(0)
    for fragment in fragments:
        assert fragment in str(error.value), error.value


def test_wrong_arguments_are_one_sentence(nyuv2, tmp_path):
    with pytest.raises(UserError, match=r"no labels for \['edge'\]"):
        NYUD13(nyuv2, "train", ["edge"])
    with pytest.raises(UserError, match="split=other does not exist"):
        NYUD13(nyuv2, "train", TASKS, split="other")
    with pytest.raises(UserError, match="too few images for split=tune"):
        NYUD13(nyuv2, "val", TASKS, split="tune")
    with pytest.raises(UserError, match="is not a folder; give the folder that holds NYUv2"):
        NYUD13(tmp_path / "gone", "train", TASKS)
    (tmp_path / "other" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match="no folder train or val"):
        NYUD13(tmp_path / "other", "train", TASKS)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match=r"train/image holds no image 0\.npy"):
        NYUD13(tmp_path / "empty", "train", TASKS)
