"""Every loss against its formula written out pixel by pixel, and the promises of ``mtcl.losses``."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl.losses import CrossEntropyLoss, DepthLoss, EdgeLoss, NormalsCosineLoss, NormalsLoss, SaliencyLoss

CLASSES = 5
CHANNELS = {"semseg": CLASSES, "human_parts": CLASSES, "sal": 2, "depth": 1, "normals": 3, "edge": 1}
LOSSES = {
    "semseg": CrossEntropyLoss,
    "human_parts": CrossEntropyLoss,
    "sal": SaliencyLoss,
    "depth": DepthLoss,
    "normals": NormalsLoss,
    "edge": EdgeLoss,
}
TASKS = list(CHANNELS)


def make_case(task, shape, seed, void=0.3, dtype=torch.float32):
    """Random prediction (B, C, H, W), label in batch layout, and its valid pixels (B, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    b, h, w = shape
    valid = torch.rand(b, h, w, generator=generator) >= void
    prediction = (2 * torch.randn(b, CHANNELS[task], h, w, generator=generator)).to(dtype)
    if task in ("semseg", "human_parts", "sal"):
        label = torch.randint(CHANNELS[task], (b, h, w), generator=generator)
        return prediction, torch.where(valid, label, 255), valid
    if task == "edge":
        label = (torch.rand(b, 1, h, w, generator=generator) < 0.3).float()
        return prediction, torch.where(valid[:, None], label, 255.0), valid
    if task == "depth":
        label = 0.5 + 8 * torch.rand(b, 1, h, w, generator=generator)
    else:
        label = torch.nn.functional.normalize(torch.randn(b, 3, h, w, generator=generator), dim=1)
    return prediction, torch.where(valid[:, None], label, 0.0), valid


def log_softmax(logits, index):
    top = max(logits)
    return logits[index] - top - math.log(sum(math.exp(v - top) for v in logits))


def log_sigmoid(x):
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def reference(task, prediction, label, positive_weight=0.95):
    """The formulas of the docstrings in float64, one pixel after the other."""
    p = prediction.double().numpy()
    y = label.double().numpy()
    y = y if y.ndim == 4 else y[:, None]
    pixels = [
        (p[b, :, i, j].tolist(), y[b, :, i, j].tolist())
        for b in range(p.shape[0])
        for i in range(p.shape[2])
        for j in range(p.shape[3])
    ]
    if task == "depth":
        costs = [abs(a[0] - t[0]) for a, t in pixels if t[0] > 0]
    elif task == "normals":
        costs = [
            sum(abs(c / math.sqrt(sum(v * v for v in a)) - n) for c, n in zip(a, t))
            for a, t in pixels
            if any(v != 0 for v in t)
        ]
    else:
        valid = [(a, int(t[0])) for a, t in pixels if t[0] != 255]
        if task == "edge":
            w = positive_weight
            costs = [-w * log_sigmoid(a[0]) if t else -(1 - w) * log_sigmoid(-a[0]) for a, t in valid]
        elif task == "sal":
            w = sum(t == 0 for _, t in valid) / max(len(valid), 1)
            costs = [-(w if t else 1 - w) * log_softmax(a, t) for a, t in valid]
        else:
            costs = [-log_softmax(a, t) for a, t in valid]
    return sum(costs) / len(costs) if costs else 0.0


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=12, deadline=None, database=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    void=st.sampled_from([0.0, 0.3, 0.9, 1.1]),
    seed=st.integers(0, 10**6),
)
def test_equals_formula(task, shape, void, seed):
    prediction, label, _ = make_case(task, shape, seed, void)
    assert LOSSES[task]()(prediction, label).item() == pytest.approx(
        reference(task, prediction, label), rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("task", TASKS)
def test_weighted_images_are_losses_of_single_images(task):
    prediction, label, _ = make_case(task, (3, 4, 5), 0)
    label[1] = 0 if task in ("depth", "normals") else 255  # an image without a label
    weights = torch.tensor([0.7, 2.0, 0.2])
    loss = LOSSES[task]()(prediction, label, weights)
    want = sum(w * reference(task, prediction[i : i + 1], label[i : i + 1]) for i, w in enumerate(weights.tolist()))
    assert loss.item() == pytest.approx(want, rel=1e-5)


def test_edge_weight_is_an_option():
    prediction, label, _ = make_case("edge", (2, 4, 5), 0)
    loss = EdgeLoss(positive_weight=0.8)(prediction, label)
    assert loss.item() == pytest.approx(reference("edge", prediction, label, 0.8), rel=1e-5)
    assert loss.item() != pytest.approx(EdgeLoss()(prediction, label).item(), rel=1e-2)


def test_normals_near_zero_have_the_gradients_of_normalize():
    generator = torch.Generator().manual_seed(0)
    directions, lengths = torch.randn(1, 3, 4, 6, generator=generator), torch.tensor([0.0, 1e-8, 1e-3, 1, 30, 1e6])
    vectors = (F.normalize(directions, dim=1) * lengths).requires_grad_()
    label = F.normalize(torch.randn(1, 3, 4, 6, generator=generator), dim=1)
    want = (F.normalize(vectors, dim=1, eps=1e-6) - label).abs().sum(dim=1).mean()
    losses = NormalsLoss()(vectors, label), want
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    got, expected = (torch.autograd.grad(loss, vectors)[0] for loss in losses)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert got.isfinite().all()
    assert got[..., 0].any()


def test_the_cosine_loss_of_normals_is_that_of_libmtl():
    """1 - sum(p / |p| . n over valid pixels) / their number, also of labels that are shorter than 1."""
    prediction, label, valid = make_case("normals", (2, 4, 5), 3)
    label *= torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(0)) + 0.1
    prediction.requires_grad_()
    loss = NormalsCosineLoss()(prediction, label)
    p, n = prediction.detach().double().numpy(), label.double().numpy()
    cosines = [p[b, :, i, j] @ n[b, :, i, j] / np.linalg.norm(p[b, :, i, j]) for b, i, j in np.argwhere(valid.numpy())]
    assert loss.item() == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-5)
    loss.backward()
    assert not prediction.grad[~valid[:, None].expand_as(prediction)].any()
    nothing = NormalsCosineLoss()(prediction, torch.zeros_like(label))
    assert nothing.item() == 0
    nothing.backward()


def test_saliency_of_one_class_only_is_zero():
    prediction, _, _ = make_case("sal", (1, 3, 3), 0)
    assert SaliencyLoss()(prediction, torch.ones(1, 3, 3, dtype=torch.int64)).item() == 0


@pytest.mark.parametrize("size", [1e30, -1e30])
@pytest.mark.parametrize("task", TASKS)
def test_invalid_pixels_neither_count_nor_pull(task, size):
    prediction, label, valid = make_case(task, (2, 4, 5), 1)
    calm = LOSSES[task]()(prediction, label)
    wild = torch.where(valid[:, None], prediction, size * torch.sign(prediction)).requires_grad_()
    loss = LOSSES[task]()(wild, label)
    loss.backward()
    assert loss.item() == calm.item()
    assert wild.grad.isfinite().all()
    assert (wild.grad.movedim(1, -1)[~valid] == 0).all()
    assert (wild.grad.movedim(1, -1)[valid] != 0).any(dim=1).all()


@pytest.mark.parametrize("task", TASKS)
def test_no_valid_pixel_gives_a_zero_with_a_graph(task):
    prediction, label, _ = make_case(task, (2, 3, 4), 2, void=1.1)
    prediction = (1e4 * prediction).requires_grad_()
    loss = LOSSES[task]()(prediction, label)
    loss.backward()
    assert loss.item() == 0
    assert loss.shape == ()
    assert (prediction.grad == 0).all()


@pytest.mark.parametrize("bad", [math.inf, math.nan, -1.0])
def test_depth_that_is_no_depth_is_void(bad):
    prediction, label, _ = make_case("depth", (1, 3, 3), 3, void=0)
    expected = DepthLoss()(prediction, torch.where(torch.arange(9).view(1, 1, 3, 3) == 4, 0.0, label))
    label[0, 0, 1, 1] = bad
    prediction.requires_grad_()
    loss = DepthLoss()(prediction, label)
    loss.backward()
    assert loss.item() == expected.item()
    assert prediction.grad[0, 0, 1, 1] == 0
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("task", TASKS)
def test_computes_in_fp32(task, dtype):
    prediction, label, _ = make_case(task, (2, 3, 4), 4, dtype=dtype)
    prediction.requires_grad_()
    loss = LOSSES[task]()(prediction, label)
    loss.backward()
    assert loss.dtype == torch.float32
    assert prediction.grad.dtype == dtype
    assert loss.item() == pytest.approx(reference(task, prediction.detach(), label), rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_gradient_equals_finite_differences(task):
    prediction, label, valid = make_case(task, (1, 2, 3), 5)
    prediction.requires_grad_()
    LOSSES[task]()(prediction, label).backward()
    step = 1e-6
    expected = np.zeros(prediction.shape)
    for index in np.ndindex(*prediction.shape):
        ends = []
        for sign in (1, -1):
            moved = prediction.detach().double().clone()
            moved[index] += sign * step
            ends.append(reference(task, moved, label))
        expected[index] = (ends[0] - ends[1]) / (2 * step)
    assert valid.any()
    np.testing.assert_allclose(prediction.grad.numpy(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_runs_with_deterministic_algorithms(task):
    prediction, label, _ = make_case(task, (2, 3, 4), 6)
    expected = LOSSES[task]()(prediction, label)
    original = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        prediction.requires_grad_()
        loss = LOSSES[task]()(prediction, label)
        loss.backward()
    finally:
        torch.use_deterministic_algorithms(original)
    assert loss.item() == expected.item()


@pytest.mark.parametrize("task", TASKS)
def test_never_asks_for_a_value(task):
    """Meta tensors have no values: whatever needs one (.item(), a mask as an index, an if) raises."""
    prediction, label, _ = make_case(task, (2, 3, 4), 7)
    prediction = prediction.to("meta").requires_grad_()
    loss = LOSSES[task]()(prediction, label.to("meta"))
    loss.backward()
    assert loss.shape == ()
    assert prediction.grad.shape == prediction.shape


@pytest.mark.parametrize("task", TASKS)
def test_autocast_changes_nothing(task):
    prediction, label, _ = make_case(task, (2, 3, 4), 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = LOSSES[task]()(prediction, label)
    assert inside.dtype == torch.float32
    assert inside.item() == LOSSES[task]()(prediction, label).item()
