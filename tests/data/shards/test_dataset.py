"""Training from shards: the samples of the dataset, own shards for each worker, exact resume, faults."""

import io
import json
import shutil
import sys
import tarfile
from itertools import islice

import numpy as np
import pytest
import torch
from helpers.common import flip

from mtcl import UserError
from mtcl.data import Augment, Sample, apply_label_assignment, train_loader
from mtcl.data.shards.dataset import ShardDataset
from mtcl.data.shards.tar_files import read_shard
from mtcl.data.shards.write import write_shards
from mtcl.tasks import NYUD40, build_task

pytest.importorskip("webdataset")
TASKS = {"semseg": build_task("semseg", class_names=NYUD40), "depth": build_task("depth")}
AUGMENT = Augment((8, 9))
SETTINGS = {"split": "standard", "options.resize": None}


class Images:
    """Random images of several sizes."""

    def __init__(self) -> None:
        self.ids = [f"image.{number:02d}" for number in range(23)]

    def read(self, index: int, tasks=None) -> Sample:
        rng = np.random.default_rng(index)
        size = (10 + index % 3, 9 + index % 4)
        labels = {
            "semseg": rng.integers(0, 40, size, dtype=np.uint8),
            "depth": rng.uniform(1, 5, size).astype(np.float32),
        }
        chosen = {name: label for name, label in labels.items() if tasks is None or name in tasks}
        return Sample(self.ids[index], rng.integers(0, 256, (*size, 3), dtype=np.uint8), chosen)

    def summary(self) -> str:
        return ""

    def fingerprint(self) -> str:
        return "images"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of six shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(Images(), list(TASKS), SETTINGS, folder, 6)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of the shards, to be damaged."""
    return shutil.copytree(written, tmp_path / "copy")


def open_shards(folder, pattern: str = "train-{000000..000005}.tar", tasks=TASKS, **options) -> ShardDataset:
    return ShardDataset(f"{folder}/{pattern}", list(tasks), **{"settings": SETTINGS, **options})


def load(dataset, start: int, count: int, workers: int = 0, shard=(0, 1), **options):
    loader = train_loader(
        dataset, TASKS, AUGMENT, 2 * shard[1], 7, workers, start, shard=shard, shuffle_buffer=5, **options
    )
    return list(islice(loader, count))


def list_ids(batches) -> list[list[str]]:
    return [[meta.id for meta in batch["meta"]] for batch in batches]


def assert_equal(batches, others) -> None:
    for a, b in zip(batches, others, strict=True):
        assert a["meta"] == b["meta"]
        assert torch.equal(a["image"], b["image"])
        assert all(torch.equal(label, b["labels"][name]) for name, label in a["labels"].items())


def test_samples_ids_and_limit_are_those_of_the_dataset(written):
    shards, images = open_shards(written, limit=20), Images()
    assert shards.ids == images.ids[:20]
    assert sum(map(len, shards.samples_by_shard.values())) == 20
    for index in (0, 7, 19):
        sample, expected = shards.read(index), images.read(index)
        np.testing.assert_array_equal(sample.image, expected.image, strict=True)
        for name in TASKS:
            np.testing.assert_array_equal(sample.labels[name], expected.labels[name], strict=True)
    assert list(shards.read(3, ["depth"]).labels) == ["depth"]
    assert shards.fingerprint() != open_shards(written).fingerprint()
    assert "20 images in 6 shards" in shards.summary()


@pytest.mark.parametrize("assignment", ["full", "one"])
def test_a_sample_is_augmented_and_labelled_as_that_of_the_dataset(written, assignment):
    """The augmentation of (epoch, image) and the tasks of an image do not depend on where it is read from."""
    shards = apply_label_assignment(open_shards(written), TASKS, assignment, 0)
    images = apply_label_assignment(Images(), TASKS, assignment, 0)
    views = {}
    for batch in load(images, 0, 11):
        views |= {meta.id: (batch["image"][i], batch["labels"]["depth"][i]) for i, meta in enumerate(batch["meta"])}
    compared = 0
    for batch in load(shards, 0, 9):
        for i, meta in enumerate(batch["meta"]):
            if meta.id in views:
                assert torch.equal(batch["image"][i], views[meta.id][0])
                assert torch.equal(batch["labels"]["depth"][i], views[meta.id][1])
                compared += 1
    assert compared >= 17


@pytest.mark.parametrize("start", [1, 5, 10, 12, 27])
def test_a_resumed_stream_is_the_tail_of_the_whole_one(written, start):
    """In mid-epoch and beyond: an epoch has 11 batches."""
    assert_equal(load(open_shards(written), start, 3), load(open_shards(written), 0, start + 3)[start:])


def test_each_worker_reads_its_own_shards_and_resumes(written):
    uncut = load(open_shards(written), 0, 9, workers=2)
    assert_equal(load(open_shards(written), 3, 6, workers=2), uncut[3:])
    owner = {id: shard.name for shard in open_shards(written).index.shards for id in shard.ids}
    files = [{owner[id] for ids in list_ids(uncut[worker:8:2]) for id in ids} for worker in range(2)]
    assert not files[0] & files[1]


def test_processes_show_different_samples(written):
    first, second = (
        [id for ids in list_ids(load(open_shards(written), 0, 5, shard=(rank, 2))) for id in ids] for rank in range(2)
    )
    assert len({*first, *second}) == 20


def test_no_more_samples_wait_than_the_buffer_has_and_passed_shards_stay_closed(written, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "mtcl.data.shards.dataset.read_shard", lambda path: opened.append(path[-10:-4]) or read_shard(path)
    )
    shards = open_shards(written)
    most, read = 0, shards.read

    def count_and_read(*args):
        nonlocal most
        most = max(most, len(shards._pending))
        return read(*args)

    monkeypatch.setattr(shards, "read", count_and_read)
    load(shards, 0, 11)
    assert 1 < most <= 5
    assert sorted(opened) == [f"{number:06d}" for number in range(6)]
    opened.clear()
    (ids,) = list_ids(load(open_shards(written), 10, 1))  # the last batch of an epoch
    assert set(opened) == {shard.name[-10:-4] for shard in shards.index.shards if set(ids) & set(shard.ids)}


def test_shards_are_read_from_a_command(written):
    piped = ShardDataset(f"pipe:cat {written}/train-{{000000..000005}}.tar", list(TASKS), SETTINGS)
    assert_equal(load(piped, 4, 2), load(open_shards(written), 4, 2))
    with pytest.raises(UserError, match=r"^pipe:cat /nowhere/index\.json .* can't be read \(its command .* code 1\)"):
        ShardDataset("pipe:cat /nowhere/a.tar 2>&-", list(TASKS), SETTINGS)


def rewrite(path, change) -> None:
    """Rewrite a shard and its size in the index with the files that ``change`` returns for its files."""
    with tarfile.open(path) as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}
    with tarfile.open(path, "w") as tar:
        for name, data in change(files).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = json.loads((path.parent / "index.json").read_text())
    next(shard for shard in index["shards"] if shard["name"] == path.name)["bytes"] = path.stat().st_size
    (path.parent / "index.json").write_text(json.dumps(index))


def drop_a_label(folder):
    rewrite(folder / "train-000002.tar", lambda files: {k: v for k, v in files.items() if "semseg" not in k})


def rename_a_sample(folder):
    rewrite(folder / "train-000002.tar", lambda files: {f"x{name}": data for name, data in files.items()})


def drop_the_last_sample(folder):
    rewrite(folder / "train-000002.tar", lambda files: dict(list(files.items())[:-3]))


def damage_the_tar(folder):
    flip(folder / "train-000002.tar", 1000)
    flip(folder / "train-000002.tar", 150)


def damage_the_index(folder):
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text.replace("image.03", "image.04"))


def truncate(folder):
    path = folder / "train-000002.tar"
    path.write_bytes(path.read_bytes()[:-600])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (drop_a_label, r"train-000002\.tar has no label semseg of image\.\d\d; make this shard anew"),
        (rename_a_sample, r"train-000002\.tar has a sample 'ximage\.\d\d' that .*index\.json does not list"),
        (drop_the_last_sample, r"train-000002\.tar ends after \d of its \d samples; it is truncated or damaged"),
        (damage_the_tar, r"train-000002\.tar can't be read \(.*\); check the path and the file"),
        (damage_the_index, r"index\.json lists a sample more than once; make the shards anew"),
        (truncate, r"train-000002\.tar has [\d,]+ bytes, not [\d,]+; copy or make it again"),
        (lambda folder: (folder / "train-000002.tar").unlink(), r"the shard .*train-000002\.tar is missing"),
        (lambda folder: (folder / "index.json").write_text("{}"), r"index\.json is no index of shards of this version"),
        (lambda folder: (folder / "index.json").unlink(), r"^shards=.* matches nothing: .*index\.json does not exist"),
    ],
)
def test_a_damaged_file_is_one_sentence(folder, damage, sentence):
    damage(folder)
    with pytest.raises(UserError, match=sentence):
        load(open_shards(folder), 0, 11)


def test_an_unreadable_sample_is_replaced_where_that_is_asked_for(folder):
    drop_a_label(folder)
    batches = load(open_shards(folder), 0, 11, skip_unreadable=True)
    assert any("has no label semseg" in text for batch in batches for text in batch.get("unreadable", ()))


@pytest.mark.parametrize(
    ("pattern", "options", "sentence"),
    [
        ("train-{000000..000003}.tar", {}, r"^shards=.* names 4 of 6 shards, not train-00000\d\.tar; name all"),
        ("train-{000000..000006}.tar", {}, r"index\.json does not list the shard train-000006\.tar"),
        ("train-{000000..000005.tar", {}, r"^shards=.* has unbalanced braces"),
        ("train-000000", {}, r"^shards=.* names no \.tar file"),
        ("train-{000000,000000}.tar", {}, r"^shards=.* names a shard more than once"),
        (
            "train-{000000..000005}.tar",
            {"tasks": ["edge"]},
            r"^shards=.* have labels of semseg, depth, but not of edge",
        ),
        (
            "train-{000000..000005}.tar",
            {"settings": {**SETTINGS, "split": "tune"}},
            r"^shards=.* were made with split=standard, but this run has tune",
        ),
    ],
)
def test_a_pattern_or_run_that_does_not_fit_is_one_sentence(written, pattern, options, sentence):
    with pytest.raises(UserError, match=sentence):
        open_shards(written, pattern, **options)


def test_fewer_shards_than_workers_are_one_sentence(written):
    with pytest.raises(UserError, match=r"^shards names 6 shards, but 4 processes x 2 workers"):
        train_loader(open_shards(written), TASKS, AUGMENT, 4, 0, 2, shard=(0, 4))


def test_webdataset_is_needed(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match=r"^shards needs webdataset: pip install 'mtcl\[shards\]'"):
        open_shards(written)
