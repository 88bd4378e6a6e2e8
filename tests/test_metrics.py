"""Every metric against NumPy on the pooled pixels, whatever the batches."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.utilities import dim_zero_sum

from mtcl import UserError
from mtcl.losses import build_loss
from mtcl.metrics import METRICS, build_metric

CLASSES = 5
TASKS = ["semseg", "human_parts", "sal", "depth", "normals", "edge"]
CHANNELS = {"semseg": CLASSES, "human_parts": CLASSES, "sal": 2, "depth": 1, "normals": 3, "edge": 1}


def fresh(task):
    return build_metric(task, **({"num_classes": CLASSES} if task in ("semseg", "human_parts") else {}))


def values(metric):
    return {name: float(value) for name, value in metric.compute().items()}


def make_case(task, b=4, h=6, w=7, seed=0, void=0.25):
    """Random prediction (B, C, H, W), better than chance, and label in batch layout."""
    rng = np.random.default_rng(seed)
    p = rng.normal(size=(b, CHANNELS[task], h, w)).astype(np.float32)
    valid = rng.random((b, h, w)) >= void
    if task in ("semseg", "human_parts", "sal"):
        y = rng.integers(0, CHANNELS[task], (b, h, w))
        p += 1.5 * (y[:, None] == np.arange(CHANNELS[task])[:, None, None])
        return torch.from_numpy(p), torch.from_numpy(np.where(valid, y, 255))
    if task == "edge":
        y = (rng.random((b, 1, h, w)) < 0.2).astype(np.float32)
        return torch.from_numpy(p + 2 * y), torch.from_numpy(np.where(valid[:, None], y, np.float32(255)))
    if task == "depth":
        y = rng.uniform(0.5, 9, (b, 1, h, w)).astype(np.float32)
        return torch.from_numpy(y + 1.5 * p), torch.from_numpy(np.where(valid[:, None], y, np.float32(0)))
    y = rng.normal(size=(b, 3, h, w)).astype(np.float32)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    return torch.from_numpy(3 * y + p), torch.from_numpy(np.where(valid[:, None], y, np.float32(0)))


def expected_segmentation(p, y):
    kept = y != 255
    guess, truth = p.argmax(1)[kept], y[kept]
    iou = []
    for c in range(CLASSES):
        union = ((guess == c) | (truth == c)).sum()
        iou.append(((guess == c) & (truth == c)).sum() / union if union else 0.0)
    return {"mIoU": np.mean(iou), "pixel_accuracy": (guess == truth).mean()}


def expected_saliency(p, y):
    kept = y != 255
    probability = np.exp(p[:, 1]) / np.exp(p).sum(1)
    probability, truth = probability[kept], y[kept] == 1
    best = 0.0
    for k in range(1, 20):
        taken = probability >= k / 20
        if (taken & truth).any():
            precision, recall = (taken & truth).sum() / taken.sum(), (taken & truth).sum() / truth.sum()
            best = max(best, 1.3 * precision * recall / (0.3 * precision + recall))
    return {"maxF": best}


def expected_depth(p, y):
    kept = y > 0
    p, y = np.maximum(p[kept], 0), y[kept]
    with np.errstate(divide="ignore"):
        ratio = np.maximum(p / y, y / p)
    return {
        "rmse": np.sqrt(((p - y) ** 2).mean()),
        "abs_rel": (abs(p - y) / y).mean(),
        "delta1": (ratio < 1.25).mean(),
    }


def expected_normals(p, y):
    kept = (y != 0).any(1)
    p, y = np.moveaxis(p, 1, -1)[kept], np.moveaxis(y, 1, -1)[kept]
    cosine = (p * y).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(y, axis=-1)
    angle = np.degrees(np.arccos(cosine.clip(-1, 1)))
    return {"mErr": angle.mean()} | {f"within_{t}": (angle < t).mean() for t in (11.25, 22.5, 30)}


def expected_edge(p, y):
    kept = y != 255
    s, y = 1 / (1 + np.exp(-p[kept])), y[kept]
    return {"loss": -(0.95 * y * np.log(s) + 0.05 * (1 - y) * np.log(1 - s)).mean()}


EXPECTED = {
    "semseg": expected_segmentation,
    "human_parts": expected_segmentation,
    "sal": expected_saliency,
    "depth": expected_depth,
    "normals": expected_normals,
    "edge": expected_edge,
}


def expected(task, p, y):
    y = y.numpy() if task in ("semseg", "human_parts", "sal") else y.double().numpy()
    return EXPECTED[task](p.double().numpy(), y)


@pytest.mark.parametrize("void", [0.0, 0.25, 0.8])
@pytest.mark.parametrize("task", TASKS)
def test_equals_formula(task, void):
    p, y = make_case(task, void=void)
    metric = fresh(task)
    metric.update(p, y)
    assert values(metric) == pytest.approx(expected(task, p, y), rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_batches_and_their_order_do_not_matter(task):
    p, y = make_case(task, b=5)
    together = fresh(task)
    together.update(p, y)
    for order in ([[0, 1, 2], [3], [4]], [[4], [2, 0], [1, 3]]):
        metric = fresh(task)
        for batch in order:
            metric.update(p[batch], y[batch])
        assert values(metric) == pytest.approx(values(together), rel=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_ranks_add_up(task):
    """What torchmetrics does over ranks: every state is the sum of the ranks' states."""
    p, y = make_case(task)
    together, ranks = fresh(task), [fresh(task), fresh(task)]
    together.update(p, y)
    for rank, metric in enumerate(ranks):
        metric.update(p[rank::2], y[rank::2])
    merged = fresh(task)
    for name in merged._defaults:
        assert merged._reductions[name] is dim_zero_sum
        setattr(merged, name, sum(getattr(metric, name) for metric in ranks))
    merged._update_count = 1
    assert values(merged) == pytest.approx(values(together), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("task", TASKS)
def test_half_precision_predictions(task, dtype):
    p, y = make_case(task, b=1)
    metric = fresh(task)
    metric.update(p.to(dtype), y)
    assert values(metric) == pytest.approx(expected(task, p.to(dtype), y), rel=1e-6)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("task", TASKS)
def test_nothing_valid_is_nan_and_reset_forgets(task):
    assert all(math.isnan(value) for value in values(fresh(task)).values())
    p, y = make_case(task, void=1.1)
    metric = fresh(task)
    metric.update(p, y)
    assert all(math.isnan(value) for value in values(metric).values())
    p, y = make_case(task)
    metric.update(p, y)
    assert values(metric) == pytest.approx(expected(task, p, y), rel=1e-6)
    metric.reset()
    p, y = make_case(task, seed=1)
    metric.update(p, y)
    assert values(metric) == pytest.approx(expected(task, p, y), rel=1e-6)


def one_hot(classes):
    return torch.nn.functional.one_hot(classes, CLASSES).movedim(-1, 1).float()


def test_class_that_never_occurs_counts_as_zero():
    y = torch.tensor([[[0, 1, 2, 255]]])
    metric = fresh("semseg")
    metric.update(one_hot(torch.tensor([[[0, 1, 1, 4]]])), y)
    assert metric.iou_per_class().tolist() == [1, 0.5, 0, 0, 0]
    assert values(metric) == pytest.approx({"mIoU": 1.5 / 5, "pixel_accuracy": 2 / 3})
    assert metric.confusion.dtype == torch.int64
    assert metric.confusion.nonzero().tolist() == [[0, 0], [1, 1], [2, 1]]  # (label, prediction)


def test_saliency_thresholds_include_their_value():
    p = torch.tensor([0.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 4)  # probability 0.5 exactly
    metric = fresh("sal")
    metric.update(p, torch.tensor([[[1, 1, 0, 255]]]))
    assert metric.histogram.tolist() == [[0] * 10 + [1] + [0] * 9, [0] * 10 + [2] + [0] * 9]
    precision, recall = 2 / 3, 1
    assert values(metric)["maxF"] == pytest.approx(1.3 * precision * recall / (0.3 * precision + recall))


def test_saliency_without_positives_is_zero():
    metric = fresh("sal")
    metric.update(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.int64))  # and nobody reaches 0.55
    assert values(metric)["maxF"] == 0


def test_negative_depth_counts_as_zero():
    metric = fresh("depth")
    label = torch.tensor([[[[2.0, 2.0, 0.0, math.inf, math.nan, -1.0]]]])  # the last four are void
    metric.update(torch.tensor([[[[-3.0, 2.0, 5.0, 5.0, 5.0, 5.0]]]]), label)
    assert values(metric) == pytest.approx({"rmse": math.sqrt(2), "abs_rel": 0.5, "delta1": 0.5})


def test_rmse_is_pooled_over_pixels_not_pictures():
    metric = fresh("depth")
    metric.update(torch.tensor([[[[2.0, 2.0, 2.0]]]]), torch.tensor([[[[1.0, 1.0, 1.0]]]]))
    metric.update(torch.tensor([[[[4.0, 9.0, 9.0]]]]), torch.tensor([[[[1.0, 0.0, 0.0]]]]))
    assert values(metric)["rmse"] == pytest.approx(math.sqrt((3 + 9) / 4))


@pytest.mark.parametrize("degrees", [0.0, 1e-3, 11.2, 90.0, 179.999, 180.0])
def test_angles_are_exact_at_both_ends(degrees):
    label = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    radian = math.radians(degrees)
    prediction = 7 * torch.tensor([math.sin(radian), 0.0, math.cos(radian)], dtype=torch.float64).view(1, 3, 1, 1)
    metric = fresh("normals")
    metric.update(prediction, label)
    result = values(metric)
    assert result["mErr"] == pytest.approx(degrees, rel=1e-9, abs=1e-9)
    assert [result[f"within_{t}"] for t in (11.25, 22.5, 30)] == [float(degrees < t) for t in (11.25, 22.5, 30)]


@pytest.mark.parametrize("positive_weight", [0.95, 0.8])
def test_edge_metric_is_the_loss_of_all_pixels(positive_weight):
    p, y = make_case("edge", b=6)
    metric = build_metric("edge", positive_weight=positive_weight)
    for batch in (slice(0, 1), slice(1, 4), slice(4, 6)):
        metric.update(p[batch], y[batch])
    loss = build_loss("edge", positive_weight=positive_weight)(p, y)
    assert values(metric)["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_registry_names_the_choices():
    assert list(METRICS) == TASKS
    with pytest.raises(UserError, match=r"'boundary'.*normals, edge"):
        build_metric("boundary")
