"""Writing shards: whole files, the image's own bytes, a second run."""

import json
import tarfile

import cv2
import numpy as np
import pytest
from helpers.common import tiny_nyud

from mtcl import UserError
from mtcl.data import NYUD
from mtcl.data.shards.write import write_shards

pytest.importorskip("webdataset")
TASKS = ("semseg", "depth", "normals", "edge")


@pytest.fixture
def dataset(tmp_path):
    return NYUD(tiny_nyud(tmp_path / "nyud"), "train", TASKS)


def write(dataset, out, shards: int = 3, **options):
    return write_shards(dataset, TASKS, {"split": "standard"}, out, shards, **options)


def test_shards_hold_every_sample_once_and_the_images_own_files(tmp_path, dataset):
    result = write(dataset, tmp_path / "out")
    assert (result.num_samples, result.pattern) == (4, f"{tmp_path}/out/train-{{000000..000002}}.tar")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert sorted(id for shard in index["shards"] for id in shard["ids"]) == list("abcd")
    for shard in index["shards"]:
        with tarfile.open(tmp_path / "out" / shard["name"]) as tar:
            names = tar.getnames()
            assert list(dict.fromkeys(name.split(".")[0] for name in names)) == shard["ids"]
            assert {name.partition(".")[2] for name in names} == {
                "image.png",
                "semseg.png",
                "depth.npz",
                "normals.png",
                "edge.png",
            }
            for id in shard["ids"]:
                assert tar.extractfile(f"{id}.image.png").read() == (dataset.root / f"images/{id}.png").read_bytes()
    assert result.num_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))


def test_an_image_that_was_made_smaller_is_not_the_files(tmp_path, dataset):
    small = NYUD(dataset.root, "train", TASKS, resize=(32, 48))
    write(small, tmp_path / "out", 1)
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        pixels = cv2.imdecode(np.frombuffer(tar.extractfile("b.image.png").read(), np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(pixels[..., ::-1], small.read(1).image)


def test_a_second_run_writes_what_is_missing_as_the_first_did(tmp_path, dataset):
    write(dataset, tmp_path / "out")
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    (tmp_path / "out" / "train-000001.tar").unlink()
    (tmp_path / "out" / "index.json").unlink()
    write(dataset, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
    changed = [path.name for path in (tmp_path / "out").glob("*.tar") if path.stat().st_mtime_ns != times[path.name]]
    assert changed == ["train-000001.tar"]


def test_a_damaged_image_leaves_no_shard_and_no_index(tmp_path, dataset):
    (dataset.root / "images" / "c.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"c\.png is not a readable image"):
        write(dataset, tmp_path / "out", 1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["prepared.json"]


def test_what_cannot_be_written_is_one_sentence(tmp_path, dataset):
    with pytest.raises(UserError, match=r"^shards=5 is more than the 4 training images"):
        write(dataset, tmp_path / "out", 5)
    write(dataset, tmp_path / "out")
    with pytest.raises(UserError, match="was started with another seed; choose another folder"):
        write(dataset, tmp_path / "out", seed=1)
