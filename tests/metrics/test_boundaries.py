"""The boundary F-measure: each step against a slow obvious reference, all together against MATLAB."""

import copy
import json
import math
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
import scipy.io
import torch
from helpers.common import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from skimage.morphology import thin

from mtcl import UserError
from mtcl.metrics.boundaries import (
    PRESETS,
    DistanceGraph,
    best_image_counts,
    boundary_counts,
    compute_scores,
    get_preset,
    linspace_thresholds,
    nms,
    seg2bmap,
    thin_masks,
)
from mtcl.metrics.boundaries.suppression import orientation, triangle
from mtcl.tasks import build_metric

REFERENCE = ROOT.parent / "shared" / "edge_reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no reference data")


def blobs(seed, shape=(40, 50)):
    """uint8 map of a few smooth lines, as a network draws them."""
    noise = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=shape), (0, 0), 3)
    return (255 * np.exp(-((noise / noise.std()) ** 2) * 8)).astype(np.uint8)


# Thinning


def test_thinning_equals_skimages_for_more_maps_than_a_word_has_bits():
    rng = np.random.default_rng(0)
    masks = rng.random((130, 30, 41)) < np.linspace(0, 1, 130)[:, None, None]
    for ours, mask in zip(thin_masks(masks), masks, strict=True):
        assert np.array_equal(ours, thin(mask))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 1))
def test_thinning_equals_skimages_on_small_maps(seed, height, width, share):
    masks = np.random.default_rng(seed).random((3, height, width)) < share
    assert np.array_equal(thin_masks(masks), np.stack([thin(mask) for mask in masks]))


def test_thinning_equals_skimages_on_thick_nested_maps():
    levels = cv2.GaussianBlur(blobs(1, (90, 80)).astype(float), (0, 0), 4)
    masks = levels >= np.linspace(1, levels.max(), 99)[:, None, None]
    assert np.array_equal(thin_masks(masks), np.stack([thin(mask) for mask in masks]))


# Non-maximum suppression


def slow_nms(edges, radius, border, multiplier):
    """The published loop, pixel by pixel."""
    height, width = edges.shape
    angle, out = orientation(edges), edges.copy()

    def at(x, y):
        x, y = min(max(x, 0), width - 1.001), min(max(y, 0), height - 1.001)
        x0, y0 = int(x), int(y)
        a, b = x - x0, y - y0
        upper = edges[y0, x0] * (1 - a) + edges[y0, x0 + 1] * a
        return upper * (1 - b) + (edges[y0 + 1, x0] * (1 - a) + edges[y0 + 1, x0 + 1] * a) * b

    for y in range(height):
        for x in range(width):
            for d in range(-radius, radius + 1):
                beside = at(x + d * math.cos(angle[y, x]), y + d * math.sin(angle[y, x]))
                if d and edges[y, x] * multiplier < beside:
                    out[y, x] = 0
    s = min(border, height // 2, width // 2)
    for i in range(s):
        for line in (out[i], out[height - 1 - i], out[:, i], out[:, width - 1 - i]):
            line *= i / s
    return out


@pytest.mark.parametrize(("smoothing", "radius", "shape"), [(1, 4, (40, 50)), (0, 1, (40, 50)), (1, 4, (7, 31))])
def test_suppression_equals_the_published_loop(smoothing, radius, shape):
    edges = blobs(2, shape).astype(np.float32) / 255
    ours = nms(edges, smoothing, radius)
    slow = slow_nms(triangle(edges, smoothing), radius, 5, 1.01)
    assert (np.abs(ours - slow) > 1e-5).mean() < 2e-3  # only ties to the last bit of a float
    assert 0.02 < (ours > 0).mean() < 0.9 * (edges > 0).mean()


def test_the_triangle_filter_is_the_mirrored_convolution():
    image = np.random.default_rng(0).random((9, 12)).astype(np.float32)
    weights = np.outer([1, 2, 3, 4, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 4, 3, 2, 1]) / 625
    wide = np.pad(image, 4, mode="symmetric")
    slow = [[(wide[y : y + 9, x : x + 9] * weights).sum() for x in range(12)] for y in range(9)]
    assert triangle(image, 4) == pytest.approx(np.array(slow), abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (3, 5)])
def test_suppression_takes_tiny_maps(shape):
    assert nms(np.ones(shape, np.float32), 1, 4).shape == shape


def test_seg2bmap_doubles_a_line():
    line = np.zeros((6, 7), np.uint8)
    line[3, 1:6] = 1
    expected = np.zeros((6, 7), bool)
    expected[2, :6] = expected[3, :6] = True
    expected[3, 1:5] = True
    assert np.array_equal(seg2bmap(line), expected)


# Matching


def within(a, b, distance):
    return np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1)) <= distance


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 4), st.floats(0.02, 0.5), st.booleans())
def test_matching_is_as_large_as_the_best_assignment(seed, distance, share, nearest):
    rng = np.random.default_rng(seed)
    predicted, truth = rng.random((2, 9, 11)) < share
    rows, columns = np.nonzero(predicted)
    some = np.flatnonzero(rng.random(rows.size) < 0.7)
    matched = DistanceGraph(rows, columns, truth, distance).match(some, nearest)
    pairs = within(np.argwhere(predicted)[some], np.argwhere(truth), distance)
    assert matched.sum() == pairs[linear_sum_assignment(pairs, maximize=True)].sum()
    assert not matched[~pairs.any(1)].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_nearest_matching_costs_as_little_as_can_be(seed):
    rng = np.random.default_rng(seed)
    predicted, truth = rng.random((2, 8, 8)) < 0.2
    a, b = np.argwhere(predicted), np.argwhere(truth)
    if not len(a) or not len(b):
        return
    lengths = np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1))
    cost = np.where(lengths <= 3, lengths, 300)

    def cheapest(rows):
        return cost[rows][linear_sum_assignment(cost[rows])].sum() + 300 * max(len(rows) - len(b), 0)

    matched = DistanceGraph(*a.T, truth, 3).match(np.arange(len(a)), nearest=True)
    alone = 300 * (~matched).sum()
    assert cheapest(np.flatnonzero(matched)) + alone == pytest.approx(cheapest(np.arange(len(a))))


def test_dense_parallel_lines_are_matched_in_full():
    truth = np.zeros((120, 120), bool)
    truth[20:100:2] = True
    predicted = np.argwhere(truth[1:]) + 1
    matched = DistanceGraph(*predicted.T, truth, 4.4).match(np.arange(len(predicted)))
    assert matched.sum() == len(predicted)


# Counts and scores


def slow_counts(prediction, truths, thresholds, max_distance):
    out = []
    for threshold in thresholds:
        a = np.argwhere(thin(prediction / 255 >= threshold))
        hits, union = 0, np.zeros(len(a), bool)
        for truth in truths:
            pairs = within(a, np.argwhere(truth), max_distance * np.hypot(*prediction.shape))
            i, j = linear_sum_assignment(pairs, maximize=True)
            hits += pairs[i, j].sum()
            union[i[pairs[i, j]]] = True
        out.append([hits, sum(t.sum() for t in truths), union.sum(), len(a)])
    return np.array(out)


def test_counts_equal_the_slow_ones():
    prediction, truth = blobs(3), thin(blobs(4) > 128)
    thresholds = linspace_thresholds(99)
    ours = boundary_counts(prediction, [truth], thresholds, 0.03)
    assert ours.dtype == np.int64
    assert np.array_equal(ours, slow_counts(prediction, [truth], thresholds, 0.03))
    assert np.array_equal(ours, boundary_counts(prediction / 255, [truth], thresholds, 0.03))


def test_recall_adds_up_over_annotators_and_precision_takes_any():
    prediction = np.zeros((20, 20), np.uint8)
    prediction[5, 2:12] = prediction[15, 2:12] = 255
    upper, lower = np.zeros((2, 20, 20), bool)
    upper[5, 2:12] = lower[15, 2:7] = True
    counts = boundary_counts(prediction, [upper, lower, upper], linspace_thresholds(3), 0.01)
    assert counts.tolist() == [[25, 25, 15, 20]] * 3


def test_strict_thresholds_leave_out_equal_values():
    prediction = np.full((1, 1), 51, np.uint8)
    truth = np.ones((1, 1), bool)
    thresholds = np.array([0.1, 0.2])
    assert boundary_counts(prediction, [truth], thresholds, 0.1)[:, 3].tolist() == [1, 1]
    assert boundary_counts(prediction, [truth], thresholds, 0.1, strict=True)[:, 3].tolist() == [1, 0]


@pytest.mark.parametrize("preset", list(PRESETS))
def test_empty_maps_and_single_pixels_are_counted(preset):
    nothing = np.zeros((30, 30), np.uint8)
    truth = nothing.copy()
    truth[10, 5:25] = 1
    chain = PRESETS[preset]
    expected = chain.boundary_of_label(truth).sum()
    assert (chain.counts(nothing, [truth], 0.02) == [0, expected, 0, 0]).all()
    assert (chain.counts(nothing, [nothing], 0.02) == 0).all()
    assert (chain.counts(truth * 255, [truth], 0.02, np.zeros((30, 30), bool)) == 0).all()
    assert (chain.counts(np.ones((1, 1), np.uint8), [np.ones((1, 1), np.uint8)], 0.02)[-1] >= 0).all()
    only_predicted = chain.counts(blobs(0, (30, 30)), [nothing], 0.02)
    assert (only_predicted[:, :3] == 0).all()
    assert only_predicted[0, 3] > 0


def test_the_default_preset_scores_the_label_itself_as_perfect():
    truth = thin(blobs(5, (80, 90)) > 128)
    truth[:8] = truth[-8:] = truth[:, :8] = truth[:, -8:] = False
    counts = PRESETS["bsds"].counts(truth.astype(np.uint8) * 255, [truth], 0.011)
    assert compute_scores(counts, best_image_counts(counts), linspace_thresholds(99), True).odsF > 0.999


def test_scores_take_the_best_of_the_set_and_of_each_image():
    one = np.array([[8, 10, 8, 10], [4, 10, 4, 4]])
    two = np.array([[1, 10, 1, 10], [6, 10, 6, 6]])
    best = best_image_counts(one) + best_image_counts(two)
    assert best.tolist() == [14, 20, 14, 16]
    result = compute_scores(one + two, best, np.array([0.3, 0.6]), interpolate=False)
    assert result.odsF == pytest.approx(2 * 10 / (20 + 10))
    assert (result.threshold, result.precision, result.recall) == (0.6, 1.0, 0.5)
    assert result.oisF == pytest.approx(2 * 14 / (20 + 16))
    # precision 0.45 at recall 0.45 to 1 at 0.5: 0.45, 0.56, ... 1
    assert result.ap == pytest.approx(sum(0.45 + 0.11 * i for i in range(6)) / 100)
    assert compute_scores(one + two, best, np.array([0.3, 0.6]), interpolate=True).odsF >= result.odsF


def test_scores_without_any_true_boundary_are_nan():
    predicted = np.array([[0, 0, 0, 7], [0, 0, 0, 5], [0, 0, 0, 1]])
    assert np.isnan(compute_scores(predicted, np.array([0, 0, 0, 7]), linspace_thresholds(3), True)).all()
    missed = np.array([[0, 4, 0, 0]])
    assert compute_scores(missed, missed[0], linspace_thresholds(1), True).odsF == 0
    assert np.isnan(
        compute_scores(np.zeros((3, 4), np.int64), np.zeros(4, np.int64), linspace_thresholds(3), True)
    ).all()


def test_bad_input_is_refused_in_a_sentence():
    edges = np.zeros((4, 5))
    with pytest.raises(UserError, match="do not increase"):
        boundary_counts(edges, [edges > 0], np.array([0.5, 0.5]), 0.01)
    with pytest.raises(UserError, match="4x5 has a ground truth of 5x4"):
        boundary_counts(edges, [edges.T > 0], np.array([0.5]), 0.01)
    with pytest.raises(UserError, match="20 pixels of an edge map are NaN"):
        boundary_counts(edges * np.nan, [edges > 0], np.array([0.5]), 0.01)
    with pytest.raises(UserError, match="0 thresholds"):
        linspace_thresholds(0)
    with pytest.raises(UserError, match="No edge preset 'sek': choose one of default"):
        get_preset("sek")


# The official output


@needs_reference
def test_the_official_scores_of_five_images(tmp_path):
    """MATLAB's own solver is not exact: it leaves up to 0.1 % of the pixels unmatched that could be."""
    preset, total, best = get_preset("bsds", 5), 0, 0
    images = np.loadtxt(REFERENCE / "expected_eval_bdry_img.txt")
    for path, expected in zip(sorted((REFERENCE / "pred").glob("*.png")), images, strict=True):
        cells = scipy.io.loadmat(REFERENCE / "groundTruth" / f"{path.stem}.mat")["groundTruth"].ravel()
        truths = [cell["Boundaries"][0, 0] for cell in cells]
        counts = preset.counts(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), truths, 0.0075)
        image_best = best_image_counts(counts)
        image = compute_scores(counts, image_best, np.array(preset.thresholds), True)
        assert image.threshold == pytest.approx(expected[1], abs=1e-5)
        assert (image.recall, image.precision, image.odsF) == pytest.approx(expected[2:], abs=1.5e-3)
        assert image.odsF == pytest.approx(expected[4], abs=1e-3)
        total, best = total + counts, best + image_best
    for row, (_, recall, precision, f) in zip(total, np.loadtxt(REFERENCE / "expected_eval_bdry_thr.txt"), strict=True):
        at = compute_scores(row[None], row, np.array([0.5]), False)
        assert (at.recall, at.precision, at.odsF) == pytest.approx((recall, precision, f), abs=6e-4)
    result = compute_scores(total, best, np.array(preset.thresholds), True)
    expected = np.loadtxt(REFERENCE / "expected_eval_bdry.txt")
    assert result.threshold == pytest.approx(expected[0], abs=1e-5)
    assert (result.recall, result.precision) == pytest.approx(expected[1:3], abs=6e-4)
    assert (result.odsF, result.oisF, result.ap) == pytest.approx(expected[[3, 6, 7]], abs=2e-4)


# The metric


def batch(n=3, seed=0, shape=(40, 50), void=False):
    """Logits (n, 1, H, W) near the labels, and the labels."""
    label = np.stack([thin(blobs(seed + i, shape) > 128) for i in range(n)])[:, None].astype(np.float32)
    noise = np.random.default_rng(seed).normal(size=label.shape)
    logit = np.stack([cv2.GaussianBlur(x[0], (0, 0), 1) for x in label])[:, None] * 12 - 3 + noise
    if void:
        label[..., :15] = 255
    return torch.from_numpy(logit).float(), torch.from_numpy(label)


def fresh(**options):
    return build_metric("edge", score_boundaries=True, max_distance=0.02, **options)


def test_the_metric_equals_the_counts_of_8_bit_maps():
    logit, label = batch(void=True)
    metric = fresh()
    metric.update(logit, label)
    total = best = 0
    for x, y in zip(logit[:, 0], label[:, 0].numpy(), strict=True):
        edges = (torch.sigmoid(x) * 255).numpy().astype(np.uint8)
        counts = PRESETS["default"].counts(edges, [y == 1], 0.02, y != 255)
        total, best = total + counts, best + best_image_counts(counts)
    expected = compute_scores(total, best, linspace_thresholds(99), False)
    result = metric.compute()
    assert set(result) == {"loss", "odsF", "oisF", "ap", "threshold", "not_finite"}
    for name in ("odsF", "oisF", "ap", "threshold"):
        assert float(result[name]) == getattr(expected, name)
    assert 0.3 < expected.odsF < 1


def test_void_hides_truth_and_prediction():
    logit, label = batch(void=True)
    other = logit.clone()
    other[..., :3] = 9  # far enough from the valid part for the filters
    a, b = fresh(), fresh()
    a.update(logit, label)
    b.update(other, label)
    assert torch.equal(a.counts, b.counts)
    all_void = fresh()
    all_void.update(logit, torch.full_like(label, 255))
    assert not all_void.counts.any()
    assert all(math.isnan(value) for name, value in all_void.compute().items() if name != "not_finite")


def test_two_halves_add_up_to_the_whole():
    logit, label = batch(4)
    full, halves, merged = fresh(thresholds=9), [fresh(thresholds=9), fresh(thresholds=9)], fresh(thresholds=9)
    full.update(logit, label)
    for i, half in enumerate(halves):
        half.update(logit[i::2], label[i::2])
    for name in merged._defaults:
        setattr(merged, name, sum(getattr(half, name) for half in halves))
    merged._update_count = 1
    assert torch.equal(merged.counts, full.counts)
    assert torch.equal(merged.best, full.best)
    assert {k: float(v) for k, v in merged.compute().items()} == pytest.approx(
        {k: float(v) for k, v in full.compute().items()}, rel=1e-12
    )


def test_a_quick_look_scores_every_second_image_at_few_thresholds():
    logit, label = batch(5)
    quick, chosen = fresh(thresholds=5, every=2), fresh(thresholds=5)
    for part in ([0, 1, 2], [3, 4]):
        quick.update(logit[part], label[part])
    chosen.update(logit[::2], label[::2])
    assert quick.counts.shape == (5, 4)
    assert torch.equal(quick.counts, chosen.counts)
    quick.reset()
    assert not quick.counts.any()


def test_no_process_is_started_for_a_few_small_images():
    logit, label = batch(3)
    here, patient = fresh(thresholds=3), fresh(thresholds=3, workers=2)
    for metric in (here, patient):
        metric.update(logit, label)
    assert patient._pool is None
    assert torch.equal(patient.counts, here.counts)


@pytest.mark.slow
def test_processes_give_the_same_counts(monkeypatch):
    monkeypatch.setattr("mtcl.metrics.edge.MIN_PIXELS_FOR_WORKERS", 0)
    logit, label = batch(3)
    here, parallel = fresh(thresholds=3), fresh(thresholds=3, workers=1)
    here.update(logit, label)
    parallel.update(logit[:2], label[:2])
    value = parallel(logit[2:], label[2:])  # forward keeps what is under way
    assert 0 < value["odsF"] <= 1
    assert {k: float(v) for k, v in parallel.compute().items()} == {k: float(v) for k, v in here.compute().items()}
    assert torch.equal(copy.deepcopy(parallel).counts, here.counts)
    parallel.update(logit, label)
    parallel.reset()
    assert not parallel.counts.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_single(dtype):
    logit, label = batch(1)
    a, b = fresh(thresholds=9), fresh(thresholds=9)
    a.update(logit.to(dtype), label)
    b.update(logit.to(dtype).float(), label)
    assert torch.equal(a.counts, b.counts)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_no_edge_and_counted_outside_the_void(value):
    logit, label = batch(1, void=True)
    logit[..., 5, 5] = logit[..., 5, 30] = value
    metric, without = fresh(thresholds=3), fresh(thresholds=3)
    metric.update(logit, label)
    without.update(logit.masked_fill(~logit.isfinite(), -99), label)
    assert torch.equal(metric.counts, without.counts)
    assert metric.compute()["not_finite"] == 1


def test_labels_and_sizes_are_checked():
    logit, label = batch(1)
    with pytest.raises(UserError, match="bring the prediction to the label's size"):
        fresh().update(logit[..., 1:], label)
    metric = fresh()
    metric.update(logit, label * 2)
    with pytest.raises(UserError, match="labels out of range; 0 is none, 1 an edge"):
        metric.compute()


def test_nonsense_options_are_refused():
    for options, message in [({"every": 0}, "every=0"), ({"thresholds": 0}, "0 thresholds"), ({"preset": "x"}, "'x'")]:
        with pytest.raises(UserError, match=message):
            fresh(**options)
    with pytest.raises(UserError, match="max_distance=11"):
        build_metric("edge", score_boundaries=True, max_distance=11)


# The script


def script(folder, *options):
    command = [
        sys.executable,
        ROOT / "scripts" / "benchmarks" / "evaluate_edges.py",
        "--pred",
        folder / "pred",
        "--gt",
        folder / "gt",
    ]
    command += ["--max-dist", "0.02", "--workers", "0", "--json", folder / "out.json", *options]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT)


def save(path, array):
    path.parent.mkdir(exist_ok=True)
    assert cv2.imwrite(str(path), array)


@pytest.fixture
def folder(tmp_path):
    for i in range(2):
        save(tmp_path / "pred" / f"{i}.png", blobs(i))
    save(tmp_path / "gt" / "0.png", thin(blobs(0) > 150).astype(np.uint8) * 7)
    cell = np.empty((1, 2), object)
    for k in range(2):
        cell[0, k] = {"Boundaries": thin(blobs(1 + k) > 150).astype(np.uint8)}
    scipy.io.savemat(tmp_path / "gt" / "1.mat", {"groundTruth": cell})
    return tmp_path


@pytest.mark.slow
def test_the_script_scores_png_and_mat(folder):
    completed = script(folder, "--thresholds", "9")
    assert completed.returncode == 0, completed.stderr
    result = json.loads((folder / "out.json").read_text())
    assert list(result) == ["odsF", "oisF", "ap", "threshold", "precision", "recall"]
    truths = [[thin(blobs(0) > 150)], [thin(blobs(1) > 150), thin(blobs(2) > 150)]]
    counts = [boundary_counts(blobs(i), truths[i], linspace_thresholds(9), 0.02) for i in range(2)]
    expected = compute_scores(sum(counts), sum(map(best_image_counts, counts)), linspace_thresholds(9), True)
    assert result == pytest.approx(expected._asdict())
    assert f"{expected.odsF:.4f}" in completed.stdout
    suppressed = script(folder, "--thresholds", "9", "--nms", "sak")
    assert suppressed.returncode == 0, suppressed.stderr
    with_name = json.loads((folder / "out.json").read_text())
    assert with_name != result
    assert script(folder, "--thresholds", "9", "--nms").returncode == 0
    assert json.loads((folder / "out.json").read_text()) == with_name


def remove_truth(folder):
    (folder / "gt" / "0.png").unlink()


def remove_map(folder):
    (folder / "pred" / "1.png").unlink()


def larger_map(folder):
    save(folder / "pred" / "1.png", blobs(0, (44, 50)))


def sixteen_bits(folder):
    save(folder / "pred" / "0.png", blobs(0).astype(np.uint16))


def three_channels(folder):
    save(folder / "pred" / "0.png", np.stack([blobs(0)] * 3, -1))


def other_mat(folder):
    scipy.io.savemat(folder / "gt" / "1.mat", {"LabelMap": np.ones((3, 3))})


def twice(folder):
    save(folder / "gt" / "1.png", blobs(1))


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (remove_truth, r"gt has no ground truth of 1 maps \(0\)"),
        (remove_map, r"pred has no prediction of 1 maps \(1\)"),
        (larger_map, r"1\.png is 44x50 but .*1\.mat is 40x50"),
        (sixteen_bits, r"0\.png holds .*8-bit (picture|image) of 1 channel"),
        (three_channels, r"0\.png holds .*8-bit (picture|image) of 1 channel"),
        (other_mat, r"1\.mat holds no groundTruth"),
        (twice, r"gt has both 1\.mat and 1\.png"),
    ],
)
def test_the_scripts_complaints_are_sentences(folder, spoil, pattern, monkeypatch):
    spoil(folder)
    complaint = run_here(folder, monkeypatch)
    assert_matches(complaint, pattern)


def test_the_script_refuses_nonsense_options(folder, monkeypatch):
    assert_matches(
        run_here(folder, monkeypatch, "--thresholds", "0"), "--thresholds: 0 is not a whole number of at least 1"
    )
    assert_matches(run_here(folder, monkeypatch, "--max-dist", "11"), "fraction of the diagonal")
    assert_matches(run_here(folder, monkeypatch, "--gt", str(folder / "none")), "not a folder")
    assert_matches(run_here(folder, monkeypatch, "--gt", str(folder)), "has no .png or .mat files")


def run_here(folder, monkeypatch, *options):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    import evaluate_edges

    base = ["evaluate_edges", "--pred", str(folder / "pred"), "--gt", str(folder / "gt"), "--max-dist", "0.02"]
    monkeypatch.setattr(sys, "argv", [*base, "--workers", "0", "--json", str(folder / "out.json"), *options])
    with pytest.raises(UserError) as caught:
        evaluate_edges.main()
    assert not (folder / "out.json").exists()
    return str(caught.value)


def assert_matches(text, pattern):
    assert re.search(pattern, text), text
