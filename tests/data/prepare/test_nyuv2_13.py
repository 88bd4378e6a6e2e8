"""From miniatures of NYU Depth v2's official files (three frames of the true size) to MTAN's layout."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from mtcl import UserError
from mtcl.data import NYUD13
from mtcl.data.prepare import normals, nyuv2_13
from mtcl.data.prepare.nyud import RawFrame
from mtcl.data.prepare.nyuv2_13 import prepare_nyuv2_13
from mtcl.tasks import NYUD13 as NAMES
from mtcl.tasks import NYUD40
from mtcl.tasks.class_names import NYUD13_OF_NYUD40

CLASSES = (np.arange(894) * 7 % 40 + 1).astype(np.uint8)  # of labels 1 to 894
TRAIN, TEST = (3, 1), (2,)
ROWS, COLUMNS = (2 * np.arange(288) + 1) * 420 // 576 + 47, (2 * np.arange(384) + 1) * 560 // 768 + 41
NEAREST = np.ix_(ROWS, COLUMNS)


def raw_frame(number: int) -> RawFrame:
    """Two planes of depth with a hole, blocks of labels with a void one, a gradient as image."""
    v, u = np.mgrid[:480, :640]
    image = np.stack([u * 255 // 639, v * 255 // 479, np.full_like(u, 40 * number)], axis=-1).astype(np.uint8)
    labels = (1 + ((v // 40 * 16 + u // 40) * 37 + number) % 894).astype(np.uint16)
    labels[200:300, 100:200] = 0
    depth = np.where(u < 300, 1.5 + number / 10 + u / 2000, 3 - v / 1000).astype(np.float32)
    depth[100:200, 400:500] = 0
    return RawFrame(image, depth, labels, np.ones((480, 640), np.uint8))


FRAMES = [raw_frame(number) for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """A folder of the three files; the large one as MATLAB's format 7.3 has it, columns first."""
    folder = tmp_path_factory.mktemp("official")
    names = {"images": "image", "depths": "depth", "labels": "labels", "instances": "instances"}
    with h5py.File(folder / "labeled.mat", "w") as file:
        for variable, name in names.items():
            arrays = [getattr(frame, name) for frame in FRAMES]
            file[variable] = np.stack([array.T for array in arrays])
    lists = {"trainNdxs": np.float64([TRAIN]).T, "testNdxs": np.float64([TEST]).T}
    scipy.io.savemat(folder / "splits.mat", lists)
    scipy.io.savemat(folder / "classes.mat", {"mapClass": np.float64(CLASSES)[None]})
    return folder


def list_arguments(official: Path, out: Path) -> dict[str, Path]:
    return {**{name: official / f"{name}.mat" for name in ("labeled", "splits", "classes")}, "out": out}


def tilt(depth: np.ndarray) -> np.ndarray:
    """Unit vectors that cost no time, zero where there is no depth; the real normals: test_nyud.py."""
    vectors = np.stack([depth, 0 * depth, 1 + 0 * depth], axis=-1) / np.sqrt(1 + depth[..., None] ** 2)
    return np.where(depth[..., None] > 0, vectors, 0).astype(np.float32)


@pytest.fixture(autouse=True)
def fast_normals(monkeypatch) -> None:
    assert nyuv2_13.estimate_normals is normals.estimate_normals
    monkeypatch.setattr(nyuv2_13, "estimate_normals", tilt)


def test_the_command_writes_a_folder_that_the_dataset_reads(official, tmp_path, cli):
    out = tmp_path / "nyuv2"
    arguments = [text for name, path in list_arguments(official, out).items() for text in (f"--{name}", str(path))]
    result = cli("scripts/prepare_nyuv2_13.py", *arguments, "--workers", "0")
    assert result.code == 0, result.err
    assert "2 training and 1 validation images (official: 795 and 654) of 384x288 pixels, 13 classes." in result.out
    assert result.out.endswith(f"Next: python train.py data=nyuv2_13 data.root={out}\n")
    middle = 41 + (np.arange(384) + 0.5) * 560 / 384 - 0.5
    for subset, numbers in (("train", (1, 3)), ("val", (2,))):
        dataset = NYUD13(out, subset, ("semseg", "depth", "normals"))
        assert len(dataset.ids) == len(numbers)
        for index, number in enumerate(numbers):
            sample, raw = dataset.read(index), FRAMES[number - 1]
            assert sample.image.shape == (288, 384, 3)
            assert np.abs(sample.image[..., 0] - middle * 255 / 639).max() < 1.2  # a mean of a ramp is its middle
            assert (sample.image[..., 2] == 40 * number).all()
            expected = np.full((288, 384), 255)
            for label in np.unique(raw.labels[NEAREST]):
                if label:  # the name of the class of 40 says which of 13 it is
                    expected[raw.labels[NEAREST] == label] = NYUD13_OF_NYUD40[CLASSES[label - 1] - 1] - 1
            np.testing.assert_array_equal(sample.labels["semseg"], expected)
            np.testing.assert_array_equal(sample.labels["depth"], raw.depth[NEAREST])
            np.testing.assert_array_equal(sample.labels["normals"], tilt(raw.depth)[NEAREST])
            assert not sample.labels["normals"][sample.labels["depth"] == 0].any()
    stored = np.load(out / "val" / "label" / "0.npy")
    assert (stored.dtype, stored.min()) == (np.int8, -1)
    shapes = {folder: np.load(out / "val" / folder / "0.npy").shape for folder in nyuv2_13.FOLDERS}
    plane = (288, 384)
    assert shapes == {"image": (*plane, 3), "label": plane, "depth": (*plane, 1), "normal": (*plane, 3)}


@pytest.mark.parametrize(
    ("of_40", "of_13"),
    [
        ("wall", "wall"),
        ("door", "wall"),
        ("floor mat", "floor"),
        ("cabinet", "furniture"),
        ("bed", "bed"),
        ("curtain", "window"),
        ("desk", "table"),
        ("picture", "picture"),
        ("television", "tv"),
        ("books", "books"),
        ("ceiling", "ceiling"),
        ("sofa", "sofa"),
        ("chair", "chair"),
        ("lamp", "objects"),
        ("otherfurniture", "furniture"),
        ("otherprop", "objects"),
    ],
)
def test_the_table_of_classes(of_40, of_13):
    assert NAMES[NYUD13_OF_NYUD40[NYUD40.index(of_40)] - 1] == of_13
    assert set(NYUD13_OF_NYUD40) == set(range(1, 14))
    assert len(NYUD13_OF_NYUD40) == 40


def test_a_second_run_makes_what_is_missing_and_image_0_last(official, tmp_path, monkeypatch):
    made = []
    real = nyuv2_13.convert_frame
    monkeypatch.setattr(nyuv2_13, "convert_frame", lambda frame, classes: made.append(frame) or real(frame, classes))
    arguments = list_arguments(official, tmp_path / "out")
    prepare_nyuv2_13(**arguments, workers=0)
    assert [int(frame.image[0, 0, 2]) for frame in made] == [120, 40, 80]  # train 1, train 0, val 0
    (tmp_path / "out" / "train" / "depth" / "0.npy").unlink()
    with pytest.raises(UserError, match=r"train/depth/0\.npy"):
        NYUD13(tmp_path / "out", "train", ["depth"])
    prepare_nyuv2_13(**arguments, workers=0)
    assert [int(frame.image[0, 0, 2]) for frame in made[3:]] == [40]
    assert NYUD13(tmp_path / "out", "train", ["depth"]).read(0).labels["depth"].any()


def test_what_can_t_be_made_is_one_sentence(official, tmp_path):
    arguments = list_arguments(official, tmp_path / "out")
    with pytest.raises(UserError, match="--workers -1"):
        prepare_nyuv2_13(**arguments, workers=-1)
    with pytest.raises(UserError, match=r"gone\.mat is not a file; give nyu_depth_v2_labeled\.mat"):
        prepare_nyuv2_13(**{**arguments, "labeled": tmp_path / "gone.mat"}, workers=0)
    scipy.io.savemat(tmp_path / "few.mat", {"mapClass": np.float64(CLASSES[:5])[None]})
    with pytest.raises(UserError, match=r"Frame 3 of .*labeled\.mat has the label \d+, but mapClass has 1 to 5"):
        prepare_nyuv2_13(**{**arguments, "classes": tmp_path / "few.mat"}, workers=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UserError, match="full is not empty and was not started by this command"):
        prepare_nyuv2_13(**{**arguments, "out": tmp_path / "full"}, workers=0)
