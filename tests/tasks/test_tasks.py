"""The interface of every task: layouts, losses, metrics, label geometry and drawing."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl import UserError
from mtcl.tasks import HUMAN_PARTS, NYUD40, TASK_NAMES, VOC21, build_task

H, W = 6, 7
DISCRETE = ["semseg", "human_parts", "sal", "edge"]


def make_task(name, **options):
    return build_task(name, **({"class_names": VOC21} if name == "semseg" else {}), **options)


def make_array(name, seed=0):
    """A label in the pipeline's layout whose first row is void."""
    rng = np.random.default_rng(seed)
    task = make_task(name)
    if name == "depth":
        array = rng.uniform(0.5, 12, (H, W)).astype(np.float32)
    elif name == "normals":
        array = rng.normal(size=(H, W, 3)).astype(np.float32)
        array /= np.linalg.norm(array, axis=-1, keepdims=True)
    else:
        array = rng.integers(0, 2 if name == "edge" else task.channels, (H, W)).astype(np.uint8)
    array[0] = task.void
    return array


def make_prediction(task, seed=0):
    return torch.randn(task.channels, H, W, generator=torch.Generator().manual_seed(seed))


def stacked(*arrays: np.ndarray) -> np.ndarray:
    """(H, W[, 3]) each -> (B[, 3], H, W)."""
    return np.moveaxis(np.stack(arrays), -1, 1) if arrays[0].ndim == 3 else np.stack(arrays)


@pytest.mark.parametrize(
    ("name", "channels", "primary", "higher", "weight", "void"),
    [
        ("semseg", 21, "mIoU", True, 1, 255),
        ("human_parts", 7, "mIoU", True, 2, 255),
        ("sal", 2, "maxF", True, 5, 255),
        ("depth", 1, "rmse", False, 1, 0),
        ("normals", 3, "mErr", False, 10, 0),
        ("edge", 1, "odsF", True, 50, 255),
    ],
)
def test_facts(name, channels, primary, higher, weight, void):
    task = make_task(name)
    facts = (task.name, task.channels, task.primary_metric, task.higher_is_better, task.weight, task.void)
    assert facts == (name, channels, primary, higher, weight, void)
    assert make_task(name, weight=0.5).weight == 0.5
    assert make_task(name, weight=0).weight == 0


@pytest.mark.parametrize("name", TASK_NAMES)
def test_equal_labels_are_near_and_opposite_ones_far(name):
    a, b = {"depth": ([2.0], [4.0]), "normals": ([0.0, 0.0, 1.0], [1.0, 0.0, 0.0])}.get(name, ([0.0], [1.0]))
    task = make_task(name)
    same, other = task.distance(torch.tensor([[a]]), torch.tensor([[a, b]]))[0, 0].tolist()
    assert same <= task.positive_threshold < task.negative_threshold <= other


def test_names_and_classes():
    assert TASK_NAMES == ("semseg", "human_parts", "sal", "depth", "normals", "edge")
    assert [len(set(names)) for names in (NYUD40, VOC21, HUMAN_PARTS)] == [40, 21, 7]
    assert (NYUD40[0], NYUD40[19], NYUD40[39]) == ("wall", "floor mat", "otherprop")
    assert (VOC21[0], VOC21[15], VOC21[20]) == ("background", "person", "tvmonitor")
    assert build_task("semseg", class_names=list(NYUD40)) == build_task("semseg", class_names=NYUD40)


def test_unknown_task_is_a_user_error():
    with pytest.raises(UserError, match=r"'normal' \(did you mean normals\?\): choose one of semseg, .*edge"):
        build_task("normal")
    with pytest.raises(UserError, match=r"'xyz'.*edge\.$"):
        build_task("xyz")


@pytest.mark.parametrize("name", TASK_NAMES)
def test_is_frozen_and_travels_to_workers(name):
    task = make_task(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.weight = 3
    task.loss(make_prediction(task)[None], task.collate(stacked(make_array(name))))
    again = pickle.loads(pickle.dumps(task))
    assert again == task
    assert hash(again) == hash(task)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_batch_layout(name):
    task = make_task(name)
    arrays = [make_array(name, seed) for seed in (0, 1)]
    batch = task.collate(stacked(*arrays))
    if name in ("semseg", "human_parts", "sal"):
        assert batch.dtype == torch.int64
        np.testing.assert_array_equal(batch.numpy(), np.stack(arrays))
    else:
        channels = 3 if name == "normals" else 1
        assert batch.dtype == torch.float32
        assert batch.shape == (2, channels, H, W)
        np.testing.assert_array_equal(batch.movedim(1, -1).numpy(), np.stack(arrays).reshape(2, H, W, channels))
    batch[0, ..., 0, 0] = 5
    assert arrays[0].ravel()[0] == task.void, "a batch shares no memory with the arrays"


@pytest.mark.parametrize("name", TASK_NAMES)
def test_valid(name):
    task = make_task(name)
    valid = task.valid(task.collate(stacked(make_array(name), make_array(name, 1))))
    assert valid.dtype == torch.bool
    assert valid.shape == (2, H, W)
    assert not valid[:, 0].any()
    assert valid[:, 1:].all()


def test_valid_depth_and_normals_at_their_limits():
    depth = np.array([[1e-3, 0, -1, np.inf, np.nan]], np.float32)
    task = make_task("depth")
    assert task.valid(task.collate(stacked(depth))).tolist() == [[[True, False, False, False, False]]]
    normals = np.array([[[0, 0, 1], [0, -1, 0], [0, 0, 0], [-0.0, 0, -0.0]]], np.float32)
    task = make_task("normals")
    assert task.valid(task.collate(stacked(normals))).tolist() == [[[True, True, False, False]]]


@pytest.mark.parametrize("name", TASK_NAMES)
def test_loss_and_metric_fit_the_layouts(name):
    task = make_task(name)
    prediction = torch.stack([make_prediction(task), make_prediction(task, 1)]).requires_grad_()
    label = task.collate(stacked(make_array(name), make_array(name, 1)))
    loss = task.loss(prediction, label)
    loss.backward()
    used = (prediction.grad != 0).any(dim=1)
    assert torch.equal(used, task.valid(label))
    metric = task.metric()
    metric.update(prediction.detach(), label)
    result = metric.compute()
    assert result[task.choose_metric(result)[0]].isfinite()
    assert task.metric() is not metric


def test_the_headline_of_edges_is_their_loss_until_boundaries_are_matched():
    edge, depth = make_task("edge"), make_task("depth")
    assert edge.choose_metric(("loss", "odsF")) == ("odsF", True)
    assert edge.choose_metric(("loss",)) == ("loss", False)
    assert depth.choose_metric(()) == ("rmse", False)


def test_edge_weight_reaches_loss_and_metric():
    prediction = torch.full((1, 1, H, W), 2.0)
    label = torch.ones(1, 1, H, W)
    losses = []
    for weight in (0.95, 0.8):
        task = make_task("edge", positive_weight=weight)
        metric = task.metric()
        metric.update(prediction, label)
        losses.append(task.loss(prediction, label).item())
        assert float(metric.compute()["loss"]) == pytest.approx(losses[-1], rel=1e-5)
    assert losses[0] / losses[1] == pytest.approx(0.95 / 0.8, rel=1e-5)


# Distances


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("name", DISCRETE)
def test_distance_of_classes(name, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(3, (2, k, 1), generator=generator).to(dtype) for k in (4, 5))
    distance = make_task(name).distance(a, b)
    assert distance.dtype == torch.float32
    assert distance.shape == (2, 4, 5)
    for i, k, j in np.ndindex(2, 4, 5):
        assert distance[i, k, j] == float(a[i, k, 0] != b[i, j, 0])


def test_distance_of_depths():
    generator = torch.Generator().manual_seed(0)
    a, b = (0.5 + 9 * torch.rand(2, k, 1, generator=generator) for k in (4, 5))
    a[0, 0] = b[1, 1] = 0
    distance = make_task("depth").distance(a, b)
    assert distance.dtype == torch.float32
    assert distance.shape == (2, 4, 5)
    assert distance.isfinite().all()
    for i, k, j in np.ndindex(2, 4, 5):
        if a[i, k, 0] > 0 and b[i, j, 0] > 0:
            ratio = a[i, k, 0].item() / b[i, j, 0].item()
            assert distance[i, k, j].item() == pytest.approx(abs(math.log(ratio)), abs=1e-6)


def test_distance_of_normals():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(2, k, 3, generator=generator), dim=-1) for k in (30, 31))
    b[:, 1], b[:, 2] = a[:, 0], -a[:, 0]
    distance = make_task("normals").distance(a, b)
    assert distance.dtype == torch.float32
    cosine = np.einsum("bkc,blc->bkl", a.double().numpy(), b.double().numpy()).clip(-1, 1)
    np.testing.assert_allclose(distance.numpy(), np.degrees(np.arccos(cosine)), atol=2e-2)
    assert distance[:, 0, 1].tolist() == [0, 0]
    assert distance[:, 0, 2].tolist() == [180, 180]


@pytest.mark.parametrize("degrees", [1e-3, 0.02, 45, 179.99, 179.999])
def test_distance_of_normals_is_stable_at_both_ends(degrees):
    radian = math.radians(degrees)
    a = torch.tensor([0.0, 0.0, 1.0]).expand(1, 40, 3)  # as many as make cdist prefer a matrix product
    b = torch.tensor([0.0, math.sin(radian), math.cos(radian)]).expand(1, 40, 3)
    small = min(degrees, 180 - degrees)
    distance = make_task("normals").distance(a, b)[0, 0, 0].item()
    assert min(distance, 180 - distance) == pytest.approx(small, rel=0.02)
    assert make_task("normals").distance(a, torch.zeros(1, 2, 3)).isfinite().all()


# Places and strata: what the regulariser compares


def make_samples(name, seed, count=12):
    """Valid labels as sampled from two images: (2, count, c)."""
    generator = torch.Generator().manual_seed(seed)
    if name == "depth":
        return (5 * torch.rand(2, count, 1, generator=generator) - 2).exp()
    if name == "normals":  # of any length, a third of them close to each other
        vector = torch.randn(2, count, 3, generator=generator)
        vector[:, : count // 3] = vector[:, :1] + 0.2 * vector[:, : count // 3]
        return vector
    label = torch.randint(2 if name == "edge" else min(make_task(name).channels, 4), (2, count, 1), generator=generator)
    return label.float() if name == "edge" else label


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(TASK_NAMES), st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_embedded_labels_are_as_far_apart_as_labels(name, seed, low, high):
    task, label = make_task(name), make_samples(name, seed)
    points = task.embed_label(label)
    assert points.dtype == torch.float32
    assert points.shape == (2, 12, 3)
    distance, apart = task.distance(label, label), torch.cdist(points.double(), points.double())
    most = {"depth": 4.0, "normals": 175.0}.get(name, 1.0)
    for near, far in (
        (task.positive_threshold, task.negative_threshold),
        (0.99 * low * most, (0.01 + 0.99 * high) * most),
    ):
        clear = [name in DISCRETE or (distance - bound).abs() > 1e-3 * most for bound in (near, far)]  # of rounding
        assert not (((apart <= task.embedded_distance(near)) != (distance <= near)) & clear[0]).any()
        assert not (((apart >= task.embedded_distance(far)) != (distance >= far)) & clear[1]).any()
        if near < far:
            assert task.embedded_distance(near) < task.embedded_distance(far)


def test_no_normals_are_further_apart_than_opposite_ones():
    task = make_task("normals")
    assert task.embedded_distance(180) == 2
    assert task.embedded_distance(181) == math.inf


@pytest.mark.parametrize("name", TASK_NAMES)
def test_invalid_labels_have_a_place_and_a_stratum(name):
    task = make_task(name)
    channels = 3 if name == "normals" else 1
    void = torch.full((2, 3, 4, channels), task.void)
    void[0] = math.inf if name == "depth" else void[0]
    void = void.long() if task.collate(stacked(make_array(name))).dtype == torch.int64 else void
    assert task.embed_label(void).shape == (2, 3, 4, 3)
    assert task.embed_label(void).isfinite().all()
    stratum = task.sampling_bin(void)
    assert stratum.shape == (2, 3, 4)
    assert stratum.dtype == torch.int64
    assert 0 <= stratum.min() <= stratum.max() < 256


@pytest.mark.parametrize("name", DISCRETE)
def test_a_class_is_a_stratum(name):
    label = make_samples(name, 0)
    assert torch.equal(make_task(name).sampling_bin(label), label[..., 0].long())


def test_strata_of_depth_are_steps_of_its_far_threshold():
    task = make_task("depth")
    metres = torch.logspace(-1, 2, 500)[:, None]
    stratum = task.sampling_bin(metres)
    steps = stratum.diff()
    assert set(steps.tolist()) == {0, 1}
    assert stratum[-1] == int(math.log(1000) / task.negative_threshold)
    distance = task.distance(metres[None], metres[None])[0]
    same = stratum[:, None] == stratum[None]
    assert (distance[same] <= task.negative_threshold + 1e-4).all()
    assert (distance[~same] > 0).all()
    assert not same[distance > task.negative_threshold + 1e-4].any()


def test_strata_of_normals_are_the_sides_of_a_cube():
    vectors = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    sides = [[sign * (axis == k) for k in range(3)] for axis in range(3) for sign in (1, -1)]
    for vector, stratum in zip(vectors.tolist(), make_task("normals").sampling_bin(vectors).tolist()):
        along = [sum(a * b for a, b in zip(vector, side)) for side in sides]
        assert along[stratum] == max(along)


# The data pipeline's rules


def test_scale_label():
    label = make_array("depth")
    original = label.copy()
    scaled = make_task("depth").scale_label(label, 1.5)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, original / 1.5, rtol=1e-6)
    assert make_task("depth").scale_label(label, np.float64(1.5)).dtype == np.float32
    np.testing.assert_array_equal(label, original)
    for name in set(TASK_NAMES) - {"depth"}:
        np.testing.assert_array_equal(make_task(name).scale_label(make_array(name), 1.5), make_array(name))


@given(codes=st.integers(0, 2**32 - 1).map(lambda seed: make_codes(seed)), field=st.booleans())
@settings(max_examples=40, deadline=None)
def test_codes_of_normals_are_decoded_and_the_short_ones_void(codes, field):
    task = build_task("normals", normals_valid="standard" if field else "length")
    finished = task.finalize_label(codes)
    assert finished.dtype == np.float32
    for row, column in np.ndindex(*codes.shape[:2]):
        vector = 2 * codes[row, column].astype(float) / 255 - 1
        length = np.linalg.norm(vector)
        if not codes[row, column].any() or (length < 0.5 and not field):
            expected = np.zeros(3)
        else:
            expected = vector if field else vector / length
        np.testing.assert_allclose(finished[row, column], expected, atol=2e-6)


def make_codes(seed):
    """Anything 8 bits can say, short vectors and black among it."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    codes[0] = rng.integers(90, 166, (6, 3))
    codes[1, :2] = 0
    codes[1, 2:4] = [[127, 127, 127], [128, 127, 128]]
    return codes


@pytest.mark.parametrize("validity", ["length", "standard"])
@pytest.mark.parametrize("form", ["codes", "vectors"])
def test_flipping_normals_before_or_after_they_are_finalized_is_the_same(validity, form):
    task = build_task("normals", normals_valid=validity)
    label = make_codes(3) if form == "codes" else np.random.default_rng(0).normal(size=(5, 6, 3)).astype(np.float32)
    original = label.copy()
    one = task.finalize_label(task.flip_label(label[:, ::-1]))
    other = task.finalize_label(label)[:, ::-1] * np.float32([-1, 1, 1])
    np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_array_equal(label, original)


def test_vectors_of_normals_become_units_or_stay_as_they_are():
    vectors = np.float32([[[0, 0, 2], [0, 0.3, 0.3], [0, 0, 0], [0.6, 0, 0]]])
    expected = np.float32([[[0, 0, 1], [0, 0, 0], [0, 0, 0], [1, 0, 0]]])
    np.testing.assert_array_equal(build_task("normals").finalize_label(vectors), expected)
    np.testing.assert_array_equal(build_task("normals", normals_valid="standard").finalize_label(vectors), vectors)
    with pytest.raises(UserError, match=r"^normals_valid=8bit"):
        build_task("normals", normals_valid="8bit")


def test_flip_label():
    label = make_array("normals")
    original = label.copy()
    flipped = make_task("normals").flip_label(label)
    assert flipped.dtype == np.float32
    np.testing.assert_array_equal(flipped[..., 0], -original[..., 0])
    np.testing.assert_array_equal(flipped[..., 1:], original[..., 1:])
    np.testing.assert_array_equal(label, original)
    for name in set(TASK_NAMES) - {"normals"}:
        np.testing.assert_array_equal(make_task(name).flip_label(make_array(name)), make_array(name))


def test_finalize_label():
    task = make_task("human_parts")
    without = np.array([[0, 255], [0, 0]], np.uint8)
    original = without.copy()
    assert task.finalize_label(without).tolist() == [[255, 255], [255, 255]]
    assert task.finalize_label(without).dtype == np.uint8
    np.testing.assert_array_equal(without, original)
    with_part = np.array([[0, 255], [6, 0]], np.uint8)
    assert task.finalize_label(with_part).tolist() == [[0, 255], [6, 0]]
    empty = np.zeros((2, 2), np.uint8)
    assert make_task("sal").finalize_label(empty).tolist() == [[0, 0], [0, 0]]
    assert make_task("semseg").finalize_label(empty).tolist() == [[0, 0], [0, 0]]


# Predictions as images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", TASK_NAMES)
def test_decode(name, dtype):
    task = make_task(name)
    prediction = make_prediction(task).to(dtype)
    array = task.decode(prediction.requires_grad_())
    raw = prediction.detach().double().numpy()
    if name in ("semseg", "human_parts", "sal"):
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, raw.argmax(0))
        return
    assert array.dtype == np.float32
    if name == "depth":
        expected = np.maximum(raw[0], 0)
    elif name == "edge":
        expected = 1 / (1 + np.exp(-raw[0]))
    else:
        expected = np.moveaxis(raw / np.linalg.norm(raw, axis=0), 0, -1)
    np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_drawn_labels_and_predictions(name):
    task = make_task(name)
    label = make_array(name)
    decoded = task.decode(make_prediction(task))
    for array in (label, decoded):
        image = task.draw(array)
        assert image.dtype == np.uint8
        assert image.shape == (H, W, 3)
        np.testing.assert_array_equal(image, task.draw(array))
    image = task.draw(label)
    void_colour = image[0, 0]
    assert (image[0] == void_colour).all()
    assert (image[1:] != void_colour).any(axis=-1).all()
    legend = task.legend([label])
    assert legend[-1] == ("void", tuple(void_colour.tolist()))
    assert "void" not in dict(task.legend([label[1:]]))


@pytest.mark.parametrize("name", ["semseg", "human_parts", "sal"])
def test_class_colours_are_distinct_and_legends_short(name):
    task = build_task(name, class_names=NYUD40) if name == "semseg" else make_task(name)
    everything = np.arange(task.channels, dtype=np.uint8)[None]
    colours = task.draw(everything)[0].astype(int)
    gaps = np.abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(len(colours), dtype=int)
    assert gaps.min() > 30
    full = task.legend([everything])
    assert [colour for _, colour in full] == [tuple(colour) for colour in colours.tolist()]
    assert task.legend([np.uint8([[1]]), np.uint8([[0, 1]])]) == full[:2]


def test_edges_are_dark_lines_on_white_paper():
    task = make_task("edge")
    label = task.draw(np.uint8([[0, 1, 255]]))[0].astype(int)
    assert label[0].tolist() == [255, 255, 255]
    assert label[1].max() < 64
    assert label[2].min() > 128
    probability = task.draw(np.float32([[0, 0.5, 1]]))[0].astype(int)
    assert probability[[0, 2]].tolist() == label[:2].tolist()
    assert label[1, 0] < probability[1, 0] < label[0, 0]
    assert task.legend([np.uint8([[0, 1]])]) == [
        ("edge", tuple(label[1].tolist())),
        ("no edge", (255, 255, 255)),
    ]


def test_depth_colours_have_one_range():
    task = make_task("depth")
    alone = task.draw(np.float32([[2]]))[0, 0]
    among = task.draw(np.float32([[0.5, 2, 30, np.nan, 0]]))[0]
    np.testing.assert_array_equal(among[1], alone)
    np.testing.assert_array_equal(among[2], task.draw(np.float32([[10]]))[0, 0])
    np.testing.assert_array_equal(among[3], among[4])
    assert dict(task.legend([]))["2 m"] == tuple(alone.tolist())


def test_legend_of_normals():
    rows = make_task("normals").legend([make_array("normals")[1:]])
    assert rows == [("left", (255, 128, 128)), ("up", (128, 255, 128)), ("to the viewer", (128, 128, 255))]


def test_a_predicted_depth_that_was_clipped_is_near_and_not_void():
    task = make_task("depth")
    prediction = task.decode(torch.tensor([[[-1.0, 0.0, 2.0, math.nan]]]))
    colours = task.draw(task.to_drawable(prediction))[0]
    nearest = task.draw(np.float32([[0.001]]))[0, 0]
    assert (colours[:2] == nearest).all()
    legend = dict(task.legend([task.to_drawable(prediction)]))
    assert legend["0 m or less"] == tuple(nearest.tolist())
    assert "void" not in legend
    np.testing.assert_array_equal(colours[3], task.draw(np.float32([[0]]))[0, 0])  # no number, as a label's void
    assert "0 m or less" not in dict(task.legend([np.float32([[0, 1]])]))
