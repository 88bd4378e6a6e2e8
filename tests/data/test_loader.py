"""Order, randomness, frames and errors of the loaders, and the step onto the device."""

import gc
import os
import resource
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl import UserError
from mtcl.data import Augment, Batch, EpochBatchSampler, Sample, collate, eval_loader, prepare_batch, train_loader
from mtcl.data.loader import choose_view
from mtcl.tasks import NYUD40, TASK_NAMES, build_task

ALL = {name: build_task(name, **({"class_names": NYUD40} if name == "semseg" else {})) for name in TASK_NAMES}
TASKS = {name: ALL[name] for name in ("semseg", "normals", "depth")}
VOID = {"semseg": 255, "human_parts": 255, "sal": 255, "depth": 0, "normals": 0, "edge": 255}


def random_sample(name: str, size: tuple[int, int], tasks=TASKS) -> Sample:
    rng = np.random.default_rng([len(name), *name.encode()])
    labels = {
        task: rng.uniform(1, 5, (*size, 3) if task == "normals" else size).astype(np.float32)
        if task in ("depth", "normals")
        else rng.integers(0, 2, size, dtype=np.uint8)
        for task in tasks
    }
    return Sample(name, rng.integers(1, 256, (*size, 3), dtype=np.uint8), labels)


class Images:
    """A reader of random images, one size each; the one named in ``bad`` cannot be read."""

    def __init__(self, sizes: list[tuple[int, int]], bad: int | None = None) -> None:
        self.ids = [f"{index:04d}" for index in range(len(sizes))]
        self.sizes, self.bad = sizes, bad

    @classmethod
    def task_options(cls) -> dict:
        return {}

    def read(self, index: int) -> Sample:
        if index == self.bad:
            raise UserError(f"image {self.ids[index]} is damaged; mend it.")
        return random_sample(self.ids[index], self.sizes[index])

    def fingerprint(self) -> str:
        return ""


READER = Images([(12 + index % 3, 10 + index % 4) for index in range(11)])
AUGMENT = Augment((8, 9))


def ids(batch: Batch) -> list[str]:
    return [meta.id for meta in batch["meta"]]


def assert_equal(a: Batch, b: Batch) -> None:
    assert a["meta"] == b["meta"]
    assert torch.equal(a["image"], b["image"])
    assert a["labels"].keys() == b["labels"].keys()
    assert all(torch.equal(label, b["labels"][name]) for name, label in a["labels"].items())


def test_workers_change_nothing() -> None:
    alone, crowd = (islice(train_loader(READER, TASKS, AUGMENT, 4, 7, workers), 7) for workers in (0, 2))
    for a, b in zip(alone, crowd, strict=True):
        assert a["image"].shape == (4, 3, 8, 9)
        assert_equal(a, b)
    for a, b in zip(*(eval_loader(READER, TASKS, None, 4, workers) for workers in (0, 2)), strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("start", [1, 2, 5])
def test_a_resumed_stream_is_the_tail_of_the_whole_one(start: int) -> None:
    uninterrupted = islice(train_loader(READER, TASKS, AUGMENT, 4, 7, 0), start, start + 4)
    resumed = islice(train_loader(READER, TASKS, AUGMENT, 4, 7, 0, start_step=start), 4)
    for a, b in zip(uninterrupted, resumed, strict=True):
        assert_equal(a, b)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 60), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_epochs_are_permutations_without_their_last_incomplete_batch(count, batch_size, start, seed) -> None:
    if batch_size > count:
        with pytest.raises(UserError, match=rf"{batch_size} .* {count} "):
            EpochBatchSampler(count, batch_size, seed)
        return
    stream = list(islice(EpochBatchSampler(count, batch_size, seed), 80))
    assert list(islice(EpochBatchSampler(count, batch_size, seed, start), 80 - start)) == stream[start:]
    per_epoch = count // batch_size
    for step, batch in enumerate(stream):
        assert len(batch) == batch_size
        assert {epoch for epoch, _ in batch} == {step // per_epoch}
    first = [index for batch in stream[:per_epoch] for _, index in batch]
    assert len(set(first)) == per_epoch * batch_size
    assert set(first) <= set(range(count))


def test_order_differs_between_epochs_and_seeds() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = islice(EpochBatchSampler(64, 8, seed), epoch * 8, epoch * 8 + 8)
        return [index for batch in batches for _, index in batch]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(each) == list(range(64)) for each in orders)
    assert len({tuple(each) for each in orders}) == 4


def test_views_differ_between_epochs_seeds_and_samples() -> None:
    reader = Images([(30, 30)])
    views = [
        next(iter(train_loader(reader, TASKS, AUGMENT, 1, seed, 0, start_step=epoch)))["image"].numpy().tobytes()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(views)) == 4


def rows(batch: Batch, chosen: slice) -> Batch:
    """Some rows of a batch."""
    labels = {name: label[chosen] for name, label in batch["labels"].items()}
    return {"image": batch["image"][chosen], "labels": labels, "meta": batch["meta"][chosen]}


def view_loader_of(views_per_step: int = 2, workers: int = 0, **options):
    return train_loader(READER, TASKS, AUGMENT, 4, 7, workers, views_per_step=views_per_step, **options)


@pytest.mark.parametrize("views", [None, 3])
def test_two_views_per_step_are_those_of_one_and_then_others_of_the_same_images(views) -> None:
    differ = 0
    for one, two in zip(islice(view_loader_of(1, views=views), 6), view_loader_of(views=views)):
        assert two["image"].shape == (8, 3, 8, 9)
        assert_equal(rows(two, slice(4)), one)
        assert [meta.view for meta in two["meta"]] == [0] * 4 + [1] * 4
        assert ids(two)[4:] == ids(two)[:4] == ids(one)
        assert len({meta.row_id for meta in two["meta"]}) == 8
        differ += sum(not torch.equal(two["image"][i], two["image"][i + 4]) for i in range(4))
    assert differ == 24


@pytest.mark.parametrize("views", [None, 3])
def test_two_views_per_step_are_functions_of_seed_epoch_image_and_view(views) -> None:
    """Other workers, a start in mid-epoch and a batch split over two processes change no view."""
    batches = list(islice(view_loader_of(views=views), 7))
    for a, b in zip(batches, view_loader_of(views=views, workers=2)):
        assert_equal(a, b)
    for a, b in zip(batches[3:], view_loader_of(views=views, start_step=3)):
        assert_equal(a, b)
    shards = [view_loader_of(views=views, shard=(i, 2)) for i in range(2)]
    for batch, first, second in zip(batches, *shards):
        assert_equal(rows(batch, slice(0, None, 2)), first)
        assert_equal(rows(batch, slice(1, None, 2)), second)


def test_the_second_view_has_the_labels_of_its_own_geometry() -> None:
    """Depth that is written into the image, too, is the same at every pixel of both views."""

    class Ramp(Images):
        def read(self, index: int) -> Sample:
            levels = np.add.outer(10 * np.arange(16), np.arange(12)).astype(np.uint8) + 1
            return Sample(self.ids[index], np.dstack([levels] * 3), {"depth": levels.astype(np.float32)})

    tasks, augment = {"depth": ALL["depth"]}, Augment((8, 9), scale=(1, 1), photometric=False)
    batch = next(iter(train_loader(Ramp([(16, 12)] * 4), tasks, augment, 4, 0, 0, views_per_step=2)))
    assert torch.equal(batch["image"][:, :1].float(), batch["labels"]["depth"])
    assert not any(torch.equal(batch["image"][i], batch["image"][i + 4]) for i in range(4))


def test_two_of_the_limited_views_of_an_image_always_differ() -> None:
    for views, index in ((2, 0), (3, 5)):
        shown = [[choose_view(4, epoch, index, views, number) for number in (0, 1)] for epoch in range(4 * views)]
        assert all(first != second for first, second in shown)
        for number in (0, 1):  # each once in every cycle
            cycles = [sorted(view[number] for view in shown[k : k + views]) for k in range(0, len(shown), views)]
            assert cycles == [list(range(views))] * 4
    with pytest.raises(UserError, match=r"views=1 is fewer than .*views_per_step=2.*; give 2 or more"):
        view_loader_of(views=1)


def test_both_views_of_an_image_that_can_not_be_read_are_replaced() -> None:
    reader = Images([(12, 10)] * 4, bad=2)
    batch = next(iter(train_loader(reader, TASKS, AUGMENT, 4, 0, 0, skip_unreadable=True, views_per_step=2)))
    assert batch["unreadable"] == ["image 0002 is damaged; mend it."]
    assert "0002" not in ids(batch)
    assert ids(batch)[:4] == ids(batch)[4:]
    assert [meta.view for meta in batch["meta"]] == [0] * 4 + [1] * 4


@pytest.mark.parametrize("workers", [0, 1])
def test_torch_and_numpy_generators_stay_untouched(workers: int) -> None:
    torch.manual_seed(3)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    loader = train_loader(READER, TASKS, AUGMENT, 4, 0, workers)
    next(iter(loader))
    list(eval_loader(READER, TASKS, None, 4, workers))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


@pytest.mark.parametrize("batch_size", [1, 4, 11, 20])
def test_evaluation_covers_everything_once_in_order(batch_size: int) -> None:
    loader = eval_loader(READER, TASKS, None, batch_size, 0)
    assert [name for batch in loader for name in ids(batch)] == READER.ids
    assert len(loader) == -(-11 // batch_size)
    for batch in loader:  # again: a loader may be used every epoch
        assert batch["image"].shape[-2:] == (32, 32)


def complaint(loader) -> str | None:
    # Not pytest.raises: it keeps the frames, and with them the workers until a garbage collection (seconds).
    try:
        list(islice(loader, 9))
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_readers_error_arrives_with_its_own_sentence(workers: int) -> None:
    reader = Images([(8, 8)] * 6, bad=3)
    for loader in (
        eval_loader(reader, TASKS, None, 2, workers),
        train_loader(reader, TASKS, AUGMENT, 6, 0, workers),
    ):
        assert complaint(loader) == "image 0003 is damaged; mend it."


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files can't be counted here")
@pytest.mark.parametrize("spare", [2, 6, 9, 14, 20])
def test_too_few_open_files_for_workers_are_one_sentence_and_never_a_wait(
    spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits that fail when workers start, when they send a batch, and when it is received."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # for which a stuck worker is joined
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    loader = train_loader(READER, TASKS, AUGMENT, 2, 0, workers=2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + spare, hard))
    try:
        with pytest.raises(UserError, match=r"too many open files .*ulimit -n|open files .*fewer data workers"):
            list(islice(loader, 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    gc.collect()  # ends the workers now, not in a later test


@pytest.mark.slow  # ten seconds pass until torch gives its worker up
def test_a_batch_that_can_not_be_sent_is_told_by_its_worker() -> None:
    """A lambda can't be sent; Python's queue would print a trace and the other side wait for ever."""
    loader = eval_loader(READER, TASKS, None, 2, workers=1)
    loader.collate_fn = lambda samples: lambda: None
    with pytest.raises(UserError, match=r"can't send its batch .*0 data workers"):
        next(iter(loader))


def test_impossible_batches_and_seeds_are_named() -> None:
    with pytest.raises(UserError, match=r"12 .* 11 "):
        train_loader(READER, TASKS, AUGMENT, 12, 0, 0)
    with pytest.raises(UserError, match="0 images"):
        eval_loader(READER, TASKS, None, 0, 0)
    with pytest.raises(UserError, match="seed=-1"):
        train_loader(READER, TASKS, AUGMENT, 2, -1, 0)


def channels_first(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 0, 1) if array.ndim == 3 else array


@pytest.mark.parametrize(
    ("size", "multiple", "frame"),
    [
        (None, 1, (9, 14)),
        (None, 8, (16, 16)),
        ((8, 30), 1, (9, 30)),
        ((20, 20), 32, (32, 32)),
        ((40, 8), 4, (40, 16)),
    ],
)
def test_collate_pads_mixed_sizes_around_their_centres(size, multiple, frame) -> None:
    samples = [random_sample("a", (9, 7), ALL), random_sample("b", (4, 14), ALL)]
    batch = collate(samples, ALL, size, multiple)
    assert batch["image"].shape == (2, 3, *frame)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous()
    alone = {name: task.collate(np.stack([channels_first(samples[0].labels[name])])) for name, task in ALL.items()}
    for index, (sample, meta) in enumerate(zip(samples, batch["meta"])):
        height, width = sample.image.shape[:2]
        top, left_edge = (frame[0] - height) // 2, (frame[1] - width) // 2
        assert meta == (sample.id, (height, width), (top, left_edge), 0)
        inside = (..., slice(top, top + height), slice(left_edge, left_edge + width))
        assert (batch["image"][index][inside].permute(1, 2, 0).numpy() == sample.image).all()
        outside = torch.ones(frame, dtype=torch.bool)
        outside[inside] = False
        assert (batch["image"][index][:, outside] == 0).all()
        for name, label in batch["labels"].items():
            assert label.dtype == alone[name].dtype
            assert (label[index][..., outside] == VOID[name]).all()
            if index == 0:
                assert torch.equal(label[:1][inside], alone[name])
        for name, task in ALL.items():
            assert not task.valid(batch["labels"][name])[index][outside].any()


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_prepare_normalises_pictures_and_zeroes_padding(sizes) -> None:
    samples = [random_sample(str(index), size) for index, size in enumerate(sizes)]
    batch = collate(samples, TASKS, (10, 10), 1)
    image_before = batch["image"].clone()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image, labels = prepare_batch(batch, mean, std, "cpu")
    assert image.dtype == torch.float32
    assert image.shape == (len(sizes), 3, 10, 10)
    for index, (sample, meta) in enumerate(zip(samples, batch["meta"])):
        (height, width), (top, left_edge) = meta.native_size, meta.offset
        inside = (index, slice(None), slice(top, top + height), slice(left_edge, left_edge + width))
        expected = (sample.image / 255 - np.array(mean)) / np.array(std)
        np.testing.assert_allclose(image[inside].permute(1, 2, 0), expected, atol=1e-5)
        rest = image[index].clone()
        rest[inside[1:]] = 0
        assert (rest == 0).all()
        assert not torch.signbit(rest).any()
    assert torch.equal(batch["image"], image_before)
    assert all(labels[name] is batch["labels"][name] for name in TASKS)  # on the CPU nothing is copied
