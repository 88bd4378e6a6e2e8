"""Every metric against NumPy on the pooled pixels, whatever the batches."""

import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.common import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.utilities import dim_zero_sum

from mtcl import UserError
from mtcl.losses import EdgeLoss
from mtcl.metrics.masked import count, count_by_scatter
from mtcl.metrics.normals import NormalsMetric
from mtcl.metrics.saliency import STEPS, count_thresholds_reached
from mtcl.metrics.segmentation import max_and_argmax
from mtcl.tasks import build_metric

CLASSES = 5
TASKS = ["semseg", "human_parts", "sal", "depth", "normals", "edge"]
COUNTED = TASKS[:5]  # edges are scored otherwise
CHANNELS = {"semseg": CLASSES, "human_parts": CLASSES, "sal": 2, "depth": 1, "normals": 3, "edge": 1}
# Every protocol of every task.
VARIANTS = [(task, {}) for task in COUNTED]
VARIANTS += [("sal", {"protocol": "invpt"}), ("sal", {"protocol": "mtinet"})]
VARIANTS += [("depth", {"protocol": "astmt"}), ("depth", {"max_depth": 6.0})]
VARIANTS += [("semseg", {"protocol": "mtan"}), ("depth", {"protocol": "mtan"})]  # normals: test_mtan_protocol.py


def fresh(task, **options):
    return build_metric(task, **({"num_classes": CLASSES} if task in ("semseg", "human_parts") else {}), **options)


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


def expected_segmentation(p, y, protocol="standard"):
    del protocol  # all classes occur
    valid = y != 255
    guess, truth = p.argmax(1)[valid], y[valid]
    iou = []
    for c in range(CLASSES):
        union = ((guess == c) | (truth == c)).sum()
        iou.append(((guess == c) & (truth == c)).sum() / union if union else 0.0)
    names = {f"IoU/{c}": value for c, value in enumerate(iou)}
    present = [c for c in range(CLASSES) if (truth == c).any()]
    second = {"mIoU_present": np.mean([iou[c] for c in present]), "absent_classes": CLASSES - len(present)}
    return {"mIoU": np.mean(iou), **second, "pixel_accuracy": (guess == truth).mean(), **names}


def ratio(a, b):
    return a / b if b else 0.0


def expected_saliency(p, y, protocol="standard"):
    """Picture by image, threshold by threshold; p, y: (B, 2, H, W), (B, H, W)."""
    probability = np.exp(p[:, 1]) / np.exp(p).sum(1)
    thresholds = [k / 20 for k in range(1, 20)]
    if protocol == "invpt":
        probability = 1 / (1 + np.exp(-probability))
    if protocol == "mtinet":
        thresholds = np.linspace(0.2, 0.9, 15)
    best_f = best_iou = 0.0
    for t in thresholds:
        counts, precisions, recalls, ious = np.zeros(3), [], [], []
        for one, label in zip(probability, y):
            valid = label != 255
            if not valid.any():
                continue
            predicted, truth = (one > t if protocol == "mtinet" else one >= t)[valid], label[valid] == 1
            counts += (predicted & truth).sum(), predicted.sum(), truth.sum()
            precisions.append(ratio((predicted & truth).sum(), predicted.sum()))
            recalls.append(ratio((predicted & truth).sum(), truth.sum()))
            ious.append(
                ratio((predicted & truth).sum(), (predicted | truth).sum()) if (predicted | truth).any() else 1.0
            )
        precision, recall, beta2 = ratio(counts[0], counts[1]), ratio(counts[0], counts[2]), 0.3
        if protocol == "mtinet":
            precision, recall, beta2 = np.mean(precisions), np.mean(recalls), 1
        best_f = max(best_f, ratio((1 + beta2) * precision * recall, beta2 * precision + recall))
        best_iou = max(best_iou, np.mean(ious))
    return {"maxF": best_f if (y == 1).any() else math.nan, "mIoU": best_iou}


def expected_depth(p, y, protocol="standard", max_depth=math.inf):
    valid = (y > 0) & (y < max_depth)
    images = [np.sqrt(((np.maximum(a, 0) - b)[k] ** 2).mean()) for a, b, k in zip(p, y, valid) if k.any()]
    if protocol == "mtan":
        error = abs(p[valid] - y[valid])
        return {"abs_err": error.mean(), "rel_err": (error / y[valid]).mean()}
    p, y = np.maximum(p[valid], 0), y[valid]
    q = np.maximum(p, 1e-9)
    deltas = {f"delta{k}": (np.maximum(q / y, y / q) < 1.25**k).mean() for k in (1, 2, 3)}
    return {
        "rmse": np.mean(images) if protocol == "astmt" else np.sqrt(((p - y) ** 2).mean()),
        "abs_rel": (abs(p - y) / y).mean(),
        "sq_rel": ((p - y) ** 2 / y).mean(),
        "log_rmse": np.sqrt(((np.log(q) - np.log(y)) ** 2).mean()),
        **deltas,
    }


def expected_normals(p, y):
    valid = (y != 0).any(1)
    p, y = np.moveaxis(p, 1, -1)[valid], np.moveaxis(y, 1, -1)[valid]
    cosine = (p * y).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(y, axis=-1)
    angle = np.degrees(np.arccos(cosine.clip(-1, 1)))
    within = {f"within_{t}": (angle < t).mean() for t in (11.25, 22.5, 30)}
    median = pytest.approx(np.median(angle), abs=0.005)
    return {"mErr": angle.mean(), "median": median, "rmse": np.sqrt((angle**2).mean()), **within}


def expected_edge(p, y, score_boundaries=False):
    valid = y != 255
    s, y = 1 / (1 + np.exp(-p[valid])), y[valid]
    return {"loss": -(0.95 * y * np.log(s) + 0.05 * (1 - y) * np.log(1 - s)).mean()}


EXPECTED = {
    "semseg": expected_segmentation,
    "human_parts": expected_segmentation,
    "sal": expected_saliency,
    "depth": expected_depth,
    "normals": expected_normals,
    "edge": expected_edge,
}


def agrees(task, result, p, y, not_finite=0, **options):
    """Whether ``found`` is the reference's dict, key by key, and the number of pixels not finite."""
    y = y.numpy() if task in ("semseg", "human_parts", "sal") else y.double().numpy()
    expected = EXPECTED[task](p.double().numpy(), y, **options)
    if task != "edge":
        expected["not_finite"] = not_finite
    assert set(result) == set(expected)
    for name, value in expected.items():
        assert result[name] == (
            pytest.approx(value, rel=1e-6, nan_ok=True) if isinstance(value, float | int) else value
        ), name
    return True


@pytest.mark.parametrize("void", [0.0, 0.25, 0.8])
@pytest.mark.parametrize(("task", "options"), [*VARIANTS, ("edge", {"score_boundaries": False})])
def test_equals_formula(task, options, void):
    p, y = make_case(task, void=void)
    metric = fresh(task, **options)
    metric.update(p, y)
    assert agrees(task, values(metric), p, y, **options)


def exact_and_close(metric, other):
    """Counts equal to the last one, sums of float64 but for their rounding."""
    for name in metric._defaults:
        a, b = getattr(metric, name), getattr(other, name)
        assert a.dtype == b.dtype
        if a.dtype == torch.int64:
            assert torch.equal(a, b), name
        else:
            assert a.dtype == torch.float64
            assert torch.allclose(a, b, rtol=1e-13, atol=0), name
    assert values(metric) == pytest.approx(values(other), rel=1e-12)
    return True


@pytest.mark.parametrize(("task", "options"), [*VARIANTS, ("edge", {"score_boundaries": False})])
@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(5)), cuts=st.sets(st.integers(1, 4)))
def test_any_split_into_batches_gives_the_same(task, options, order, cuts):
    p, y = make_case(task, b=5)
    together, split = fresh(task, **options), fresh(task, **options)
    together.update(p, y)
    for batch in np.split(np.array(order), sorted(cuts)):
        split.update(p[batch], y[batch])
    assert exact_and_close(split, together)


@pytest.mark.parametrize(("task", "options"), [*VARIANTS, ("edge", {"score_boundaries": False})])
def test_ranks_add_up(task, options):
    """Join states as torchmetrics does over ranks: every state is the sum of the ranks' states."""
    p, y = make_case(task)
    together, ranks = fresh(task, **options), [fresh(task, **options), fresh(task, **options)]
    together.update(p, y)
    for rank, metric in enumerate(ranks):
        metric.update(p[rank::2], y[rank::2])
    merged = fresh(task, **options)
    for name in merged._defaults:
        assert merged._reductions[name] is dim_zero_sum
        setattr(merged, name, sum(getattr(metric, name) for metric in ranks))
    merged._update_count = 1
    assert exact_and_close(merged, together)


def one_of_two(rank, port, folder):
    """A process of the test below: scores its half of the images, and saves what both of them get."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    result = {}
    for index, (task, options) in enumerate(VARIANTS):
        metric = fresh(task, **options)
        p, y = make_case(task, b=5)
        metric.update(p[rank::2], y[rank::2])  # three images and two
        with metric.sync_context():
            states = {name: getattr(metric, name).clone() for name in metric._defaults}
        result[index] = (states, values(metric))
    exact_metrics = fresh("normals", protocol="mtan"), fresh("normals", protocol="mtan")
    p, y = make_case("normals", b=5)
    exact_metrics[0].update(p[rank::2], y[rank::2])
    if rank == 0:  # the other process has no image
        exact_metrics[1].update(p, y)
    result["mtan"] = [values(metric) for metric in exact_metrics]
    bad = fresh("semseg")
    bad.update(torch.zeros(1, CLASSES, 1, 1), torch.tensor([[[77 if rank else 0]]]))
    with pytest.raises(UserError, match=r"1 pixel has"):  # raised by both, or one would wait for the other for ever
        bad.compute()
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_count_as_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(one_of_two, (port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        for index, (task, options) in enumerate(VARIANTS):
            alone = fresh(task, **options)
            alone.update(*make_case(task, b=5))
            states, numbers = result[index]
            for name, state in states.items():
                exact = state.dtype == torch.int64
                assert torch.allclose(state, getattr(alone, name), rtol=0 if exact else 1e-13, atol=0), (task, name)
            assert numbers == pytest.approx(values(alone), rel=1e-12)
        alone = fresh("normals", protocol="mtan")
        alone.update(*make_case("normals", b=5))
        for numbers in result["mtan"]:
            assert numbers == pytest.approx(values(alone), rel=1e-6)


@pytest.mark.parametrize("task", ["semseg", "human_parts"])
def test_perfect_predictions_of_a_list_without_some_classes_reach_one_in_the_second_miou(task):
    label = torch.tensor([[[0, 0, 2, 255]]])
    metric = fresh(task)
    metric.update(torch.nn.functional.one_hot(label.clamp(max=CLASSES - 1), CLASSES).permute(0, 3, 1, 2).float(), label)
    result = values(metric)
    assert result["mIoU"] == pytest.approx(2 / CLASSES)  # the field's
    assert (result["mIoU_present"], result["absent_classes"]) == (1, CLASSES - 2)


@pytest.mark.parametrize("options", [{}, {"protocol": "invpt"}, {"protocol": "mtinet"}])
def test_a_list_without_a_salient_pixel_has_no_f_measure(options):
    metric = fresh("sal", **options)
    metric.update(torch.randn(2, 2, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long))
    assert math.isnan(values(metric)["maxF"])
    metric.update(torch.randn(1, 2, 4, 5), torch.ones(1, 4, 5, dtype=torch.long))
    assert not math.isnan(values(metric)["maxF"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("task", "options"), [*VARIANTS, ("edge", {"score_boundaries": False})])
def test_predictions_of_other_precision(task, options, dtype):
    p, y = make_case(task, b=1)
    metric = fresh(task, **options)
    metric.update(p.to(dtype), y)
    assert agrees(task, values(metric), p.to(dtype), y, **options)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize(("task", "options"), [*VARIANTS, ("edge", {"score_boundaries": False})])
def test_nothing_valid_is_nan_and_reset_forgets(task, options):
    def nothing(result):
        return all(value == 0 if name == "not_finite" else math.isnan(value) for name, value in result.items())

    assert nothing(values(fresh(task, **options)))
    p, y = make_case(task, void=1.1)
    metric = fresh(task, **options)
    metric.update(p, y)
    assert nothing(values(metric))
    p, y = make_case(task)
    metric.update(p, y)
    assert agrees(task, values(metric), p, y, **options)
    metric.reset()
    p, y = make_case(task, seed=1)
    metric.update(p, y)
    assert agrees(task, values(metric), p, y, **options)


@pytest.mark.parametrize(("task", "options"), VARIANTS)
def test_update_never_waits_for_the_device(task, options):
    """A tensor on ``meta`` has no values: whatever asks the host for one, or for a size that depends on one, fails."""
    p, y = make_case(task)
    metric = fresh(task, **options).to("meta")
    metric.update(p.to("meta"), y.to("meta"))
    with pytest.raises(RuntimeError, match="meta"):
        metric.update(p.to("meta"), y.to("meta")[y.to("meta") > 0])


def test_both_ways_of_counting_count_the_same():
    cells = torch.randint(0, 9, (3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for number in (9, 12):
        assert torch.equal(count(cells, number), count_by_scatter(cells, number))
        assert count(cells, number).tolist() == [int((cells == k).sum()) for k in range(number)]
    assert count(cells[:0], 3).tolist() == count_by_scatter(cells[:0], 3).tolist() == [0, 0, 0]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("task", "options"), VARIANTS)
def test_on_cuda_the_counts_are_the_same_and_nothing_waits(task, options):
    p, y = make_case(task)
    here, on_cuda = fresh(task, **options), fresh(task, **options).to("cuda")
    here.update(p, y)
    p, y = p.cuda(), y.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_cuda.update(p, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert values(on_cuda) == pytest.approx(values(here), rel=1e-9)


@pytest.mark.parametrize("task", COUNTED)
def test_large_images_are_scored_in_bands_to_the_same_numbers(task, monkeypatch):
    p, y = make_case(task, b=3, h=9)
    full, banded = fresh(task), fresh(task)
    full.update(p, y)
    for module in ("masked", "segmentation"):
        monkeypatch.setattr(f"mtcl.metrics.{module}.BAND", 2 * 3 * 7)
    banded.update(p, y)
    assert exact_and_close(banded, full)


@pytest.mark.parametrize("task", COUNTED)
def test_billions_of_pixels_are_counted_to_the_last_one(task):
    p, y = make_case(task)
    few, many = fresh(task), fresh(task)
    few.update(p, y)
    counts = [name for name in few._defaults if getattr(few, name).dtype == torch.int64]
    for name in counts:
        setattr(many, name, getattr(many, name) + 2**60)  # float64 knows whole numbers up to 2**53
    many.update(p, y)
    assert counts
    for name in counts:
        assert torch.equal(getattr(many, name) - 2**60, getattr(few, name))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("task", COUNTED)
def test_not_finite_counts_as_no_prediction_and_is_reported(task, bad):
    p, y = make_case(task)
    where = torch.zeros(y.shape[0], *y.shape[-2:], dtype=torch.bool)
    where[0, 0, :3] = where[2] = True
    void = torch.tensor(255) if task in ("semseg", "human_parts", "sal") else torch.tensor(0.0)
    y[2, ..., :4] = void  # those of void pixels are nobody's business
    valid = ((y != void).any(1) if y.ndim == 4 else y != void) & where
    spoilt, none = p.clone(), p.clone()
    if task == "sal":  # nothing reaches any threshold
        none[:, 1] = torch.where(where, -1e4, none[:, 1])
        spoilt[:, 1] = torch.where(where, bad, spoilt[:, 1])
    elif task in ("semseg", "human_parts"):
        if bad < 0:
            spoilt = torch.where(where[:, None], bad, spoilt)  # one class at -inf is a decision; all are none
        else:
            spoilt[:, 1] = torch.where(where, bad, spoilt[:, 1])
        none = None
    else:
        none = torch.where(where[:, None], 0.0, none)
        spoilt[:, -1] = torch.where(where, bad, spoilt[:, -1])
    metric = fresh(task)
    metric.update(spoilt, y)
    result = values(metric)
    assert result.pop("not_finite") == valid.sum() > 0
    if none is None:
        guess, truth = p.argmax(1).masked_fill(where, -1)[y != 255], y[y != 255]
        hits = torch.stack([((guess == c) & (truth == c)).sum() for c in range(CLASSES)])
        unions = torch.stack([((guess == c) | (truth == c)).sum() for c in range(CLASSES)])
        assert result["mIoU"] == pytest.approx((hits / unions).double().mean().item(), rel=1e-6)
        assert result["pixel_accuracy"] == pytest.approx((guess == truth).double().mean().item())
        return
    clean = fresh(task)
    clean.update(none, y)
    expected = values(clean)
    assert expected.pop("not_finite") == 0
    assert result == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("task", "wrong", "allowed"),
    [
        ("semseg", 200, "0..4 and 255"),
        ("semseg", -1, "0..4"),
        ("human_parts", 5, "0..4"),
        ("human_parts", 256, "0..4"),
        ("sal", 2, "0, 1 and 255"),
        ("sal", -300, "0, 1"),
        ("sal", 2**40 + 1, "0, 1"),
        ("normals", 127.0, "-1..1"),
        ("normals", math.nan, "-1..1"),
        ("normals", -math.inf, "-1..1"),
    ],
)
def test_labels_out_of_range_are_an_error_that_names_the_task_and_how_many(task, wrong, allowed):
    p, y = make_case(task)
    metric = fresh(task)
    metric.update(p, y)
    original = [metric.not_finite.clone()] if task == "normals" else []
    (y[1, 0] if task == "normals" else y[1])[2, :3] = wrong
    metric.update(p, y)
    with pytest.raises(UserError, match=rf"{task}: 3 pixels have labels out of range;.*{allowed}"):
        metric.compute()
    assert [metric.not_finite] == original if original else True
    metric.reset()
    metric.update(*make_case(task))
    assert agrees(task, values(metric), *make_case(task))


@pytest.mark.parametrize("task", COUNTED)
def test_sizes_that_differ_are_an_error_with_both_sizes(task):
    p, y = make_case(task)
    with pytest.raises(UserError, match=rf"{task}: the prediction is 4x{CHANNELS[task]}x6x7 and its label .*5x7"):
        fresh(task).update(p, y[..., :5, :])
    with pytest.raises(UserError, match=rf"{task}: the prediction is 4x9x6x7, not batch x "):
        fresh(task).update(p[:, :1].expand(-1, 9, -1, -1), y)
    with pytest.raises(UserError, match=rf"{task}: .* 3x"):
        fresh(task).update(p[:3], y)
    with pytest.raises(UserError, match=rf"{task}: "):
        fresh(task).update(p[0], y[0])


def test_labels_of_eight_bits_are_the_same_labels():
    for task in ("semseg", "sal"):
        p, y = make_case(task)
        metric = fresh(task)
        metric.update(p, y.to(torch.uint8))
        assert agrees(task, values(metric), p, y)


def one_hot(classes):
    return torch.nn.functional.one_hot(classes, CLASSES).movedim(-1, 1).float()


def test_class_that_never_occurs_counts_as_zero():
    y = torch.tensor([[[0, 1, 2, 255]]])
    metric = fresh("semseg", class_names=["wall", "floor mat", "a", "b", "c"])
    metric.update(one_hot(torch.tensor([[[0, 1, 1, 4]]])), y)
    assert metric.iou_per_class().tolist() == [1, 0.5, 0, 0, 0]
    names = {"IoU/wall": 1, "IoU/floor mat": 0.5, "IoU/a": 0, "IoU/b": 0, "IoU/c": 0, "not_finite": 0}
    assert values(metric) == pytest.approx(
        {"mIoU": 1.5 / 5, "mIoU_present": 0.5, "absent_classes": 2, "pixel_accuracy": 2 / 3, **names}
    )
    assert metric.confusion.dtype == torch.int64
    assert metric.confusion.nonzero().tolist() == [[0, 0], [1, 1], [2, 1]]  # (label, prediction)


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c", "d", "a"], []])
def test_every_class_has_a_name_of_its_own(names):
    with pytest.raises(UserError, match="class_names"):
        fresh("semseg", class_names=names)


@pytest.mark.parametrize("count", [0, 256])
def test_the_number_of_classes_leaves_room_for_void(count):
    with pytest.raises(UserError, match=f"num_classes={count}"):
        build_metric("semseg", num_classes=count)


def logits_like(kind):
    p = torch.randint(0, 4, (3, 7, 5, 6), generator=torch.Generator().manual_seed(1)).float()  # full of ties
    if kind == "nan":
        p[torch.rand(p.shape, generator=torch.Generator().manual_seed(2)) < 0.1] = math.nan
    if kind == "infinite":
        p[torch.rand(p.shape, generator=torch.Generator().manual_seed(2)) < 0.5] = -math.inf
    if kind == "cropped":
        p = p[..., 1:4]
    if kind == "one class":
        p = p[:, :1].contiguous()
    if kind == "channels last":
        p = p.contiguous(memory_format=torch.channels_last)
    return p[:0] if kind == "no image" else p.half() if kind == "half" else p.bfloat16() if kind == "bf16" else p


KINDS = ["ties", "nan", "infinite", "cropped", "one class", "channels last", "no image", "half", "bf16"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_argmax_takes_the_first_of_the_largest(kind):
    p = logits_like(kind)
    value, index = max_and_argmax(p)
    assert torch.equal(value.nan_to_num(77.0), p.amax(1).nan_to_num(77.0) if p.numel() else p[:, 0])
    first = torch.from_numpy(p.float().numpy().argmax(1)) if p.numel() else index
    assert torch.equal(index[~value.isnan()], first[~value.isnan()])


def test_saliency_thresholds_include_their_value():
    p = torch.tensor([0.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 4)  # probability 0.5 exactly
    y = torch.tensor([[[1, 1, 0, 255]]])
    metric = fresh("sal")
    metric.update(p, y)
    assert metric.histogram.tolist() == [[0] * 11 + [1] + [0] * 9, [0] * 11 + [2] + [0] * 9]
    precision, recall = 2 / 3, 1
    assert values(metric)["maxF"] == pytest.approx(1.3 * precision * recall / (0.3 * precision + recall))
    strict = fresh("sal", protocol="mtinet")
    strict.update(p, y)
    assert strict.histogram.tolist() == [[0] * 7 + [1] + [0] * 9, [0] * 7 + [2] + [0] * 9]  # 0.20 .. 0.45


def test_codes_of_eight_bits_that_are_a_threshold_reach_it():
    metric = fresh("sal")
    codes = torch.arange(256)
    metric.update(codes.view(1, 1, 16, 16) / 255, torch.ones(1, 16, 16, dtype=torch.int64))
    reached = (codes * 20 // 255).clamp(max=19)  # in whole numbers: v / 255 >= k / 20
    assert torch.equal(metric.histogram[1, 1:], torch.bincount(reached))


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("steps", [STEPS, STEPS[3:18], tuple(math.log(t / (1 - t)) for t in STEPS), (0.25, 0.5)])
def test_the_fast_search_finds_what_bucketize_finds(steps, inclusive):
    thresholds = torch.tensor(steps, dtype=torch.float32)
    near = [torch.nextafter(thresholds, torch.full_like(thresholds, way)) for way in (-9.0, 9.0)]
    cells = torch.arange(65) / 64
    p = torch.cat([thresholds, *near, cells, cells - 1e-7, torch.rand(10000)]).clamp(0, 1)
    result = count_thresholds_reached(p, thresholds, inclusive)
    assert torch.equal(result, torch.bucketize(p, thresholds, right=inclusive, out_int32=True))


def test_only_four_thresholds_bite_after_a_second_sigmoid():
    metric = fresh("sal", protocol="invpt")
    bite = metric.thresholds[(metric.thresholds > 0) & (metric.thresholds <= 1)]
    assert bite.tolist() == pytest.approx([0.2007, 0.4055, 0.6190, 0.8473], abs=5e-5)


@pytest.mark.parametrize("protocol", ["standard", "invpt", "mtinet"])
def test_saliency_of_no_salient_pixel(protocol):
    metric = fresh("sal", protocol=protocol)
    nobody = torch.tensor([8.0, -8.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)  # below every threshold that bites
    metric.update(nobody, torch.zeros(1, 3, 3, dtype=torch.int64))
    assert values(metric) == pytest.approx({"maxF": math.nan, "mIoU": 1, "not_finite": 0}, nan_ok=True)  # the two agree
    metric.update(-nobody, torch.zeros(1, 3, 3, dtype=torch.int64))
    expected = 1 if protocol == "invpt" else 0.5  # its upper thresholds are never reached
    assert values(metric) == pytest.approx({"maxF": math.nan, "mIoU": expected, "not_finite": 0}, nan_ok=True)


def test_salient_pixels_and_an_empty_prediction_score_zero():
    metric = fresh("sal")
    nobody = torch.tensor([8.0, -8.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    metric.update(nobody, torch.ones(1, 3, 3, dtype=torch.int64))
    assert values(metric) == {"maxF": 0, "mIoU": 0, "not_finite": 0}


def test_an_image_all_void_does_not_count():
    for protocol in ("standard", "mtinet"):
        p, y = make_case("sal", void=0)
        alone, beside = fresh("sal", protocol=protocol), fresh("sal", protocol=protocol)
        alone.update(p[:3], y[:3])
        y[3] = 255
        beside.update(p, y)
        assert exact_and_close(beside, alone)


def test_negative_depth_counts_as_zero():
    metric = fresh("depth")
    label = torch.tensor([[[[2.0, 2.0, 0.0, math.inf, math.nan, -1.0]]]])  # the last four are void
    metric.update(torch.tensor([[[[-3.0, 2.0, 5.0, 5.0, 5.0, 5.0]]]]), label)
    result = values(metric)
    assert result.pop("log_rmse") == pytest.approx(math.sqrt(math.log(2e9) ** 2 / 2))
    expected = {"rmse": math.sqrt(2), "abs_rel": 0.5, "sq_rel": 1.0, "not_finite": 0}
    assert result == pytest.approx(expected | {"delta1": 0.5, "delta2": 0.5, "delta3": 0.5})


def test_a_ratio_at_its_limit_is_not_within_it():
    metric = fresh("depth")
    metric.update(torch.tensor([[[[5.0, 4.0, 25.0, 4.9]]]]), torch.tensor([[[[4.0, 5.0, 16.0, 4.0]]]]))
    result = values(metric)
    assert [result[f"delta{k}"] for k in (1, 2, 3)] == [0.25, 0.75, 1.0]


def test_rmse_is_pooled_over_pixels_not_images_but_in_astmt():
    pooled, images = fresh("depth"), fresh("depth", protocol="astmt")
    for metric in (pooled, images):
        metric.update(torch.tensor([[[[2.0, 2.0, 2.0]]]]), torch.tensor([[[[1.0, 1.0, 1.0]]]]))
        metric.update(torch.tensor([[[[4.0, 9.0, 9.0]]]]), torch.tensor([[[[1.0, 0.0, 0.0]]]]))
        metric.update(torch.tensor([[[[4.0, 9.0, 9.0]]]]), torch.zeros(1, 1, 1, 3))  # no image
    assert values(pooled)["rmse"] == pytest.approx(math.sqrt((3 + 9) / 4))
    assert values(images)["rmse"] == pytest.approx((1 + 3) / 2)


def test_labels_from_max_depth_on_are_void():
    metric = fresh("depth", max_depth=80)
    metric.update(torch.tensor([[[[1.0, 1.0, 1.0]]]]), torch.tensor([[[[2.0, 80.0, 200.0]]]]))
    assert values(metric)["rmse"] == 1
    with pytest.raises(UserError, match="max_depth=0"):
        fresh("depth", max_depth=0)


@pytest.mark.parametrize("task", ["sal", "depth"])
def test_an_unknown_protocol_names_the_choices(task):
    with pytest.raises(UserError, match=rf"{task}: protocol='seism'.*standard, "):
        fresh(task, protocol="seism")


def at_angles(*degrees):
    """Predictions that far from their label."""
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    prediction = torch.stack([radians.sin(), torch.zeros_like(radians), radians.cos()]).view(1, 3, 1, -1)
    return prediction, torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 1, len(degrees))


@pytest.mark.parametrize("angles", [[3.0], [3, 170], [1, 2, 50], [1, 2, 50, 60], [0, 180], [180], [7, 7, 7, 7]])
def test_the_median_is_within_half_a_bin(angles):
    metric = fresh("normals")
    metric.update(*at_angles(*angles))
    assert values(metric)["median"] == pytest.approx(np.median(angles), abs=0.005 + 1e-9)


def test_a_prediction_of_length_zero_is_a_right_angle_off():
    metric = fresh("normals")
    metric.update(torch.zeros(1, 3, 1, 1), at_angles(0)[1])
    result = values(metric)
    assert result["mErr"] == pytest.approx(90, rel=1e-12)
    assert result["not_finite"] == result["within_30"] == 0


def test_limits_of_angles_are_edges_of_bins():
    assert all(limit * NormalsMetric.BINS_PER_DEGREE == int(limit * 100) for limit in NormalsMetric.LIMITS)


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
    loss = EdgeLoss(positive_weight)(p, y)
    assert values(metric)["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("task", COUNTED)
def test_the_benchmark_s_loops_score_the_same(task, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    import benchmark_metrics

    monkeypatch.setattr(benchmark_metrics, "HEIGHT", 20)
    monkeypatch.setattr(benchmark_metrics, "WIDTH", 30)
    row = benchmark_metrics.measure(task, num_images=3, batch=2)
    assert benchmark_metrics.find_disagreements(row) == []
    assert min(row.ours, row.reference) > 0
    row.reference_scores[next(iter(row.reference_scores))] += 0.01
    assert benchmark_metrics.find_disagreements(row)


def test_an_unknown_task_names_the_choices():
    with pytest.raises(UserError, match=r"'boundary'.*normals, edge"):
        build_metric("boundary")
