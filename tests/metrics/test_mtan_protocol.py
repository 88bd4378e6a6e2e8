"""The metrics of MTAN and LibMTL, ``protocol="mtan"``, against a slow reference written from LibMTL's formulas."""

import math

import numpy as np
import pytest
import torch

from mtcl import UserError
from mtcl.metrics import DepthMetric, NormalsMetric, SegmentationMetric
from mtcl.metrics.delta import delta_p

CLASSES = 4
BATCHES = (3, 1, 2)  # images


def reference_segmentation(batches):
    """Pooled confusion matrix; IoU of each class, 0 / 0 is NaN; void is -1 in LibMTL and 255 here."""
    confusion = np.zeros((CLASSES, CLASSES))
    for logits, label in batches:
        for guess, truth in zip(logits.argmax(1).ravel(), label.ravel()):
            if 0 <= truth < CLASSES:
                confusion[truth, guess] += 1
    hits = confusion.diagonal()
    with np.errstate(invalid="ignore"):
        iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)
    return {"mIoU": iou.mean(), "pixel_accuracy": hits.sum() / confusion.sum()}


def reference_depth(batches):
    """Means of each batch over the pixels whose label is not 0, averaged with the number of those pixels as weight."""
    rows = []
    for prediction, label in batches:
        pairs = [(p, z) for p, z in zip(prediction.ravel(), label.ravel()) if z != 0]
        absolute = sum(abs(p - z) for p, z in pairs) / len(pairs)
        relative = sum(abs(p - z) / z for p, z in pairs) / len(pairs)
        rows.append((absolute, relative, len(pairs)))
    weight = sum(row[2] for row in rows)
    return {"abs_err": sum(r[0] * r[2] for r in rows) / weight, "rel_err": sum(r[1] * r[2] for r in rows) / weight}


def reference_normals(batches):
    """Angles of all valid pixels in one list: the prediction made a unit vector, the label as it is."""
    angles = []
    for prediction, label in batches:
        for p, g in zip(np.moveaxis(prediction, 1, -1).reshape(-1, 3), np.moveaxis(label, 1, -1).reshape(-1, 3)):
            if g.sum() != 0:
                cosine = float(np.dot(p / np.linalg.norm(p), g))
                angles.append(math.degrees(math.acos(min(max(cosine, -1.0), 1.0))))
    within = {f"within_{t:g}": np.mean([angle < t for angle in angles]) for t in (11.25, 22.5, 30.0)}
    return {"mErr": np.mean(angles), "median": np.median(angles), **within}


def make_batches(task, seed, height=5, width=7):
    """Random batches of NumPy arrays in float64, better than chance, with a quarter of the pixels void."""
    rng = np.random.default_rng(seed)
    batches = []
    for images in BATCHES:
        valid = rng.random((images, height, width)) > 0.25
        if task == "semseg":
            label = rng.integers(0, CLASSES, valid.shape)
            logits = rng.normal(size=(images, CLASSES, height, width)) + 1.5 * np.moveaxis(
                np.eye(CLASSES)[label], -1, 1
            )
            batches.append((logits, np.where(valid, label, 255)))
            continue
        if task == "depth":
            label = rng.uniform(0.01, 9, (images, 1, height, width))
            batches.append((label + 3 * rng.normal(size=label.shape), np.where(valid[:, None], label, 0)))
            continue
        label = rng.normal(size=(images, 3, height, width))
        label *= rng.uniform(0.5, 1, valid[:, None].shape) / np.linalg.norm(
            label, axis=1, keepdims=True
        )  # interpolated
        batches.append((7 * label + 2 * rng.normal(size=label.shape), np.where(valid[:, None], label, 0)))
    return batches


def make_metric(task):
    if task == "semseg":
        return SegmentationMetric(num_classes=CLASSES, protocol="mtan")
    return (DepthMetric if task == "depth" else NormalsMetric)(protocol="mtan")


def score(task, batches):
    metric = make_metric(task)
    for prediction, label in batches:
        metric.update(torch.from_numpy(prediction), torch.from_numpy(label))
    return {name: float(value) for name, value in metric.compute().items()}


REFERENCES = {"semseg": reference_segmentation, "depth": reference_depth, "normals": reference_normals}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", list(REFERENCES))
def test_equals_libmtl(task, seed):
    batches = make_batches(task, seed)
    result, expected = score(task, batches), REFERENCES[task](batches)
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert result["not_finite"] == 0
    assert set(result) - set(expected) - {"not_finite"} <= (
        {"rmse"} if task == "normals" else {"mIoU_present", "absent_classes", *(f"IoU/{c}" for c in range(CLASSES))}
    )


def test_a_class_that_never_occurs_has_no_iou():
    label = np.array([[[0, 1, 2, 255]]])
    logits = np.moveaxis(np.eye(CLASSES)[np.minimum(label, CLASSES - 1)], -1, 1)
    result = score("semseg", [(logits[..., :3], label[..., :3])])
    assert math.isnan(result["mIoU"])
    assert math.isnan(result["IoU/3"])
    assert (result["IoU/0"], result["mIoU_present"], result["pixel_accuracy"]) == (1, 1, 1)


def test_depth_is_neither_clamped_nor_limited_to_positive_labels():
    prediction, label = np.array([[[[-1.0, 3.0, 5.0, 2.0]]]]), np.array([[[[1.0, 0.0, math.inf, -4.0]]]])
    assert score("depth", [(prediction, label)]) == pytest.approx(
        {"abs_err": (2 + 6) / 2, "rel_err": (2 / 1 + 6 / -4) / 2, "not_finite": 0}
    )


def one_row(*vectors):
    return np.array(vectors, dtype=np.float64).T.reshape(1, 3, 1, -1)


def test_labels_keep_their_length_and_those_that_cancel_are_void():
    prediction = one_row([0, 0, 9], [0, 0, 9], [0, 0, 9], [0, 0, 0])
    label = one_row([0, 0, 0.5], [0.6, -0.6, 0], [0, 0, 0], [0, 0, 1])
    result = score("normals", [(prediction, label)])
    assert result["mErr"] == pytest.approx((60 + 90) / 2)  # acos 0.5; a prediction of length 0 is 90 degrees off
    assert result["median"] == pytest.approx(75)


@pytest.mark.parametrize("angles", [[], [3.0], [10, 170], [1, 2, 50], [1, 2, 50, 60], [7, 7, 7, 7]])
def test_the_median_is_exact(angles):
    radians = np.radians(np.array([*angles, 5.0]))  # the last pixel is void
    prediction = np.stack([np.sin(radians), 0 * radians, np.cos(radians)]).reshape(1, 3, 1, -1)
    label = np.broadcast_to(np.array([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1), prediction.shape).copy()
    label[..., -1] = 0
    expected = np.median(angles) if angles else math.nan
    assert score("normals", [(prediction, label)])["median"] == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_normals_of_two_processes_are_those_of_one():
    """Join states as torchmetrics does over ranks: sums are added, the lists of angles are concatenated."""
    batches = make_batches("normals", 5)
    ranks = [make_metric("normals"), make_metric("normals"), make_metric("normals")]
    for rank, batch in zip((0, 1, 1), batches):
        ranks[rank].update(*map(torch.from_numpy, batch))  # the third had no image
    merged = make_metric("normals")
    for name, reduce in merged._reductions.items():
        states = [getattr(rank, name) for rank in ranks]
        joined = [angles for state in states for angles in state] if name == "angles" else torch.stack(states)
        setattr(merged, name, reduce(joined))
    merged._update_count = 1
    assert {k: float(v) for k, v in merged.compute().items()} == pytest.approx(score("normals", batches), rel=1e-12)


def test_predictions_that_are_not_finite_are_right_angles():
    batches = make_batches("normals", 1)
    spoilt, label = batches[0][0].copy(), batches[0][1]
    spoilt[0, 0, 0], spoilt[1, 2, 1] = math.nan, -math.inf
    zero = np.where(np.isfinite(spoilt).all(1, keepdims=True), spoilt, 0)
    result, expected = score("normals", [(spoilt, label)]), score("normals", [(zero, label)])
    count = (~np.isfinite(spoilt).all(1) & (label.sum(1) != 0)).sum()
    assert result.pop("not_finite") == count > 0
    assert expected.pop("not_finite") == 0
    assert result == pytest.approx(expected, rel=1e-12)


def test_update_never_waits_for_the_device():
    prediction, label = (torch.from_numpy(array).to("meta") for array in make_batches("normals", 0)[0])
    metric = make_metric("normals").to("meta")
    metric.update(prediction, label)
    assert sum(angles.numel() for angles in metric.angles) == prediction[:, 0].numel()
    assert {angles.dtype for angles in metric.angles} == {torch.float32}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("task", list(REFERENCES))
def test_on_cuda_the_numbers_are_the_same_and_nothing_waits(task):
    metric = make_metric(task).to("cuda")
    batches = make_batches(task, 0)
    for batch in batches:
        prediction, label = (torch.from_numpy(array).cuda() for array in batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            metric.update(prediction, label)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert {k: float(v) for k, v in metric.compute().items()} == pytest.approx(score(task, batches), rel=1e-6)


@pytest.mark.parametrize("task", ["semseg", "normals"])
def test_an_unknown_protocol_names_the_choices(task):
    metric_class, options = {"semseg": (SegmentationMetric, {"num_classes": 3}), "normals": (NormalsMetric, {})}[task]
    with pytest.raises(UserError, match=rf"{task}: protocol='seism'.*standard, mtan"):
        metric_class(protocol="seism", **options)


SINGLE = {
    "semseg": {"mIoU": 0.4, "pixel_accuracy": 0.6},
    "depth": {"abs_err": 0.5, "rel_err": 0.2},
    "normals": {"mErr": 25.0, "median": 20.0, "within_11.25": 0.3, "within_22.5": 0.5, "within_30": 0.7},
}


def test_delta_p_is_the_mean_over_tasks_of_the_mean_over_metrics():
    """LibMTL/utils.py, ``count_improvement``: (1 / T) sum_t (1 / M_t) sum_m (-1)^w (B - N) / B."""
    multi = {task: {name: value * 1.1 for name, value in metrics.items()} for task, metrics in SINGLE.items()}
    assert delta_p(multi, SINGLE) == pytest.approx(100 * (0.1 - 0.1 + (2 * -0.1 + 3 * 0.1) / 5) / 3)
    assert delta_p(SINGLE, SINGLE) == 0
    extra = {**multi, "semseg": {**multi["semseg"], "IoU/wall": 0.0}}  # not one of the protocol's metrics
    assert delta_p(extra, SINGLE) == delta_p(multi, SINGLE)
    unknown = {**multi, "semseg": {**multi["semseg"], "mIoU": math.nan}}
    assert math.isnan(delta_p(unknown, SINGLE))


def test_delta_p_refuses_what_can_t_be_compared():
    with pytest.raises(UserError, match="same tasks"):
        delta_p({"depth": SINGLE["depth"]}, SINGLE)
    with pytest.raises(UserError, match="depth lacks abs_err"):
        delta_p({**SINGLE, "depth": {"rmse": 1.0}}, SINGLE)
    with pytest.raises(UserError, match=r"baseline of depth/rel_err is 0"):
        delta_p(SINGLE, {**SINGLE, "depth": {"abs_err": 1.0, "rel_err": 0.0}})
    with pytest.raises(UserError, match="edge has no metric"):
        delta_p({"edge": {"odsF": 1.0}}, {"edge": {"odsF": 1.0}})
