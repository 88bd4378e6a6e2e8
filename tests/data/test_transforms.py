"""Each rule of the training augmentation by itself, over image sizes and sets of tasks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl import UserError
from mtcl.data import Augment, Sample, finalize_labels
from mtcl.data.transforms import (
    CROP_RETRIES,
    Window,
    distort_colors,
    flip,
    has_varied_classes,
    resize_nearest,
    sample_window,
    scale_and_crop,
)
from mtcl.tasks import NYUD40, TASK_NAMES, Task, build_task

ALL = {name: build_task(name, **({"class_names": NYUD40} if name == "semseg" else {})) for name in TASK_NAMES}
settings.register_profile("quick", max_examples=40, deadline=None)
settings.load_profile("quick")

sides = st.integers(1, 24)
sizes = st.tuples(sides, sides)
seeds = st.integers(0, 2**32 - 1)
task_sets = st.sets(st.sampled_from(TASK_NAMES), min_size=1).map(lambda names: {name: ALL[name] for name in names})


def coordinates(size: tuple[int, int], tasks: dict[str, Task]) -> Sample:
    """Every pixel's image and labels are functions of its row and column (up to 24 x 24)."""
    rows, columns = (axis.astype(np.float32) for axis in np.mgrid[: size[0], : size[1]])
    number = rows * 24 + columns
    labels = {
        "semseg": (number % 40).astype(np.uint8),
        "human_parts": (1 + number % 6).astype(np.uint8),
        "sal": (number % 2).astype(np.uint8),
        "depth": number + 1,
        "normals": np.stack([columns - 12, rows, np.ones(size, np.float32)], axis=-1),
        "edge": (number % 3 == 0).astype(np.uint8),
    }
    image = np.stack([rows, columns, np.zeros(size)], axis=-1).astype(np.uint8)
    return Sample("0001", image, {name: labels[name] for name in tasks})


def assert_equal(a: Sample, b: Sample) -> None:
    np.testing.assert_array_equal(a.image, b.image)
    assert a.labels.keys() == b.labels.keys()
    for name, label in a.labels.items():
        np.testing.assert_array_equal(label, b.labels[name])
        assert label.dtype == b.labels[name].dtype


@given(sizes, sizes, task_sets, st.floats(0, 1), seeds)
def test_labels_stay_with_the_picture_through_crop_and_flip(size, crop, tasks, chance, seed) -> None:
    augment = Augment(crop, scale=(1, 1), flip=chance, photometric=False)
    sample = augment(coordinates(size, tasks), tasks, np.random.default_rng(seed))
    height, width = sample.image.shape[:2]
    assert (height, width) == (min(size[0], crop[0]), min(size[1], crop[1]))
    rows, columns = sample.image[..., 0].astype(int), sample.image[..., 1].astype(int)
    flipped = width > 1 and columns[0, 0] > columns[0, 1]
    original = coordinates(size, tasks).labels
    for name, label in sample.labels.items():
        expected = original[name][rows, columns]
        if name == "normals" and width > 1:
            expected = ALL["normals"].finalize_label(expected * np.float32([-1 if flipped else 1, 1, 1]))
        if name != "normals" or width > 1:
            np.testing.assert_array_equal(label, expected)
            assert label.dtype == original[name].dtype


def test_a_picture_without_semseg_labels_takes_its_first_crop() -> None:
    tasks = {name: ALL[name] for name in ("semseg", "depth")}
    sample = coordinates((24, 24), tasks)
    sample.labels["semseg"][:] = 255
    augment = Augment((8, 8), scale=(1, 1), flip=0, photometric=False)
    only_depth = {"depth": ALL["depth"]}
    for seed in range(5):
        with_void = augment(sample, tasks, np.random.default_rng(seed))
        without = augment(coordinates((24, 24), only_depth), only_depth, np.random.default_rng(seed))
        np.testing.assert_array_equal(with_void.labels["depth"], without.labels["depth"])


@given(sizes, task_sets)
def test_flip_mirrors_negates_x_and_is_its_own_inverse(size, tasks) -> None:
    sample = coordinates(size, tasks)
    once = flip(sample, tasks)
    np.testing.assert_array_equal(once.image, sample.image[:, ::-1])
    for name, label in once.labels.items():
        sign = np.float32([-1, 1, 1]) if name == "normals" else label.dtype.type(1)
        np.testing.assert_array_equal(label, sample.labels[name][:, ::-1] * sign)
    assert_equal(flip(once, tasks), sample)


@given(sizes, task_sets, st.floats(0.5, 2))
def test_scaling_divides_depth_and_keeps_every_other_value(size, tasks, factor) -> None:
    sample = coordinates(size, tasks)
    scaled = tuple(max(1, round(side * factor)) for side in size)
    result = scale_and_crop(sample, tasks, factor, scaled, Window(0, 0, *scaled))
    assert result.image.shape == (*scaled, 3)
    assert result.image.dtype == np.uint8
    for name, label in result.labels.items():
        assert label.shape[:2] == scaled
        expected = resize_nearest(sample.labels[name], scaled)
        if name == "depth":
            expected = expected / np.float32(factor)
        np.testing.assert_array_equal(label, expected)
        assert label.dtype == sample.labels[name].dtype


@given(sizes, sizes, seeds)
def test_resampling_a_window_equals_cropping_the_resampled(size, scaled, seed) -> None:
    rng = np.random.default_rng(seed)
    label = rng.random((*size, 3), dtype=np.float32)
    window = sample_window(scaled, (7, 7), rng)
    np.testing.assert_array_equal(resize_nearest(label, scaled, window), window.crop(resize_nearest(label, scaled)))
    rows = ((np.arange(scaled[0]) + 0.5) * size[0] / scaled[0] + 1e-9).astype(int)
    columns = ((np.arange(scaled[1]) + 0.5) * size[1] / scaled[1] + 1e-9).astype(int)
    np.testing.assert_array_equal(resize_nearest(label, scaled), label[rows][:, columns])


@given(st.floats(0.5, 2), seeds)
def test_labels_stay_with_the_picture_through_scaling(factor, seed) -> None:
    ramp = np.tile(np.arange(60, dtype=np.uint8), (30, 1))
    sample = Sample("0001", np.stack([4 * ramp] * 3, axis=-1), {"depth": 1 + ramp.astype(np.float32)})
    tasks = {"depth": ALL["depth"]}
    augment = Augment((20, 20), scale=(factor, factor), photometric=False)
    result = augment(sample, tasks, np.random.default_rng(seed))
    column = result.labels["depth"] * np.float32(factor) - 1
    assert np.abs(column - result.image[..., 0] / 4).max() <= 0.8  # pixels: half for nearest, rounding of 1/4 level


@given(sizes, st.integers(1, 30), st.integers(1, 30), seeds)
def test_windows_lie_inside(size, height, width, seed) -> None:
    window = sample_window(size, (height, width), np.random.default_rng(seed))
    assert (window.height, window.width) == (min(size[0], height), min(size[1], width))
    assert 0 <= window.row <= size[0] - window.height
    assert 0 <= window.column <= size[1] - window.width


def test_windows_reach_every_corner() -> None:
    rng = np.random.default_rng(0)
    places = {sample_window((5, 6), (4, 4), rng)[:2] for _ in range(200)}
    assert places == {(top, left_edge) for top in range(2) for left_edge in range(3)}


def test_a_crop_is_varied_below_the_cap_with_void_left_out() -> None:
    classes = np.uint8([[0] * 3 + [1], [255] * 4])
    assert not has_varied_classes(classes, 255, 0.75)  # exactly at the cap
    assert has_varied_classes(classes, 255, 0.76)
    assert not has_varied_classes(np.uint8([[5, 5, 255]]), 255, 1.0)
    assert not has_varied_classes(np.uint8([[255]]), 255, 1.0)


def test_class_cap_is_respected_where_it_can_be() -> None:
    tasks = {"semseg": ALL["semseg"]}
    classes = np.zeros((40, 40), np.uint8)
    classes[:, 20:] = np.arange(20) % 5
    sample = Sample("0001", np.zeros((40, 40, 3), np.uint8), {"semseg": classes})

    def dull(augment: Augment) -> float:
        crops = [augment(sample, tasks, np.random.default_rng(seed)).labels["semseg"] for seed in range(200)]
        return float(np.mean([not has_varied_classes(crop, 255, 0.75) for crop in crops]))

    share = dull(Augment((16, 16), scale=(1, 1), class_cap=1))  # what chance alone gives, but for one-class crops
    assert share > 0.05
    assert dull(Augment((16, 16), scale=(1, 1))) < 0.01


def test_a_hopeless_picture_ends_the_search_for_a_crop(monkeypatch) -> None:
    drawn = []

    def counting(*args):
        drawn.append(args)
        return sample_window(*args)

    monkeypatch.setattr("mtcl.data.transforms.sample_window", counting)
    labels = {"semseg": np.zeros((9, 9), np.uint8), "edge": np.zeros((9, 9), np.uint8)}
    sample = Sample("0001", np.zeros((9, 9, 3), np.uint8), labels)
    augment = Augment((4, 4), scale=(1, 1))
    result = augment(sample, {name: ALL[name] for name in labels}, np.random.default_rng(0))
    assert result.image.shape == (4, 4, 3)
    assert len(drawn) == 1 + CROP_RETRIES
    augment(sample, {"edge": ALL["edge"]}, np.random.default_rng(0))  # without semseg there is no cap
    assert len(drawn) == 2 + CROP_RETRIES


@given(sizes, seeds)
def test_distortion_keeps_grey_grey_and_in_order(size, seed) -> None:
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 256, size, dtype=np.uint8)
    image = np.stack([levels] * 3, axis=-1)
    result = distort_colors(image, rng)
    assert result.dtype == np.uint8
    assert result.shape == image.shape
    assert (result == result[..., :1]).all()  # neither hue nor saturation colours grey
    by_level = result[..., 0].ravel()[np.argsort(levels.ravel(), kind="stable")].astype(int)
    assert (np.diff(by_level) >= 0).all()
    assert np.abs(by_level[:1] - np.sort(levels.ravel())[:1]).max() <= 32 + 0.5 * 255


class Scripted:
    """A generator whose coins (random) and values (uniform, integers) are given."""

    def __init__(self, coins: list[bool], values: list[float]) -> None:
        self.coins, self.values = coins, values

    def random(self) -> float:
        return 0.0 if self.coins.pop(0) else 0.9

    def uniform(self, low: float, high: float) -> float:
        assert low <= self.values[0] <= high
        return self.values.pop(0)

    def integers(self, low: int, high: int, endpoint: bool) -> int:
        return int(self.uniform(low, high))


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)


def test_nothing_drawn_changes_nothing(image) -> None:
    assert distort_colors(image, Scripted([False] * 5, [])) is image


@pytest.mark.parametrize("contrast_first", [True, False])
def test_brightness_and_contrast_are_the_fields_arithmetic(image, contrast_first) -> None:
    def convert(pixels: np.ndarray, gain: float, offset: float) -> np.ndarray:
        return np.clip(pixels.astype(np.float32) * gain + offset, 0, 255).astype(np.uint8)

    result = distort_colors(image, Scripted([True, True, False, False, contrast_first], [21.7, 1.37]))
    np.testing.assert_array_equal(result, convert(convert(image, 1, 21.7), 1.37, 0))


def test_saturation_and_hue() -> None:
    red = np.full((1, 1, 3), (200, 100, 100), np.uint8)
    paler = distort_colors(red, Scripted([False, False, True, False, False], [0.5]))
    assert paler.ravel().tolist() == pytest.approx([200, 150, 150], abs=2)
    turned = distort_colors(red, Scripted([False, False, False, True, False], [15]))  # 30 degrees: towards yellow
    assert turned.ravel().tolist() == pytest.approx([200, 150, 100], abs=2)
    back = distort_colors(red, Scripted([False, False, False, True, False], [-15]))  # wraps around
    assert back.ravel().tolist() == pytest.approx([200, 100, 150], abs=2)


def test_distortion_reaches_the_picture_only() -> None:
    sample = coordinates((24, 24), ALL)
    plain, coloured = (Augment((9, 9), photometric=on)(sample, ALL, np.random.default_rng(4)) for on in (False, True))
    assert (plain.image != coloured.image).any()
    assert_equal(plain._replace(image=coloured.image), coloured)


def test_labels_are_finished_in_training_and_evaluation() -> None:
    tasks = {"human_parts": ALL["human_parts"]}
    parts = np.zeros((8, 8), np.uint8)
    sample = Sample("0001", np.zeros((8, 8, 3), np.uint8), {"human_parts": parts})
    assert (finalize_labels(sample, tasks).labels["human_parts"] == 255).all()
    assert not parts.any()  # the reader's array is not written to
    parts[:, 0] = 3
    assert_equal(finalize_labels(sample, tasks), sample)
    augment = Augment((8, 1), scale=(1, 1), photometric=False)
    columns = [augment(sample, tasks, np.random.default_rng(seed)).labels["human_parts"] for seed in range(40)]
    assert {int(column[0, 0]) for column in columns} == {
        3,
        255,
    }  # never 0 alone: no part in the crop is no label


@given(sizes, task_sets, seeds)
def test_the_same_generator_gives_the_same_view_and_leaves_the_sample(size, tasks, seed) -> None:
    sample, untouched = coordinates(size, tasks), coordinates(size, tasks)
    augment = Augment((16, 16))
    assert_equal(
        augment(sample, tasks, np.random.default_rng(seed)),
        augment(sample, tasks, np.random.default_rng(seed)),
    )
    assert_equal(sample, untouched)


def test_only_the_tasks_in_use_are_kept() -> None:
    tasks = {"depth": ALL["depth"]}
    assert list(Augment((4, 4))(coordinates((9, 9), ALL), tasks, np.random.default_rng(0)).labels) == ["depth"]


@pytest.mark.parametrize(
    "options", [{"size": (0, 4)}, {"scale": (2, 1)}, {"scale": (0, 1)}, {"flip": 1.1}, {"class_cap": 0}]
)
def test_impossible_settings_are_named(options) -> None:
    ((_, value),) = options.items()
    with pytest.raises(UserError, match=str(value).replace("(", r"\(").replace(")", r"\)")):
        Augment(**({"size": (4, 4)} | options))
