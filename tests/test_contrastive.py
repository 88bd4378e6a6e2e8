"""The regulariser against a slow reference in float64, its draws, its optimiser, and what it leaves alone."""

import io
import math
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtcl import UserError
from mtcl.contrastive import Contrastive, Draw, SliceAdamW
from mtcl.contrastive.diagnostics import gradients_at_taps
from mtcl.contrastive.regularizer import first_available
from mtcl.contrastive.sampling import draw_pixels, draw_sources, pixel_index, read_features, read_labels
from mtcl.contrastive.triplets import pick, triplet_loss
from mtcl.tasks import build_task

KINDS = ("random", "void", "single", "one")  # what one task says of one picture
NAMES = ("semseg", "depth", "normals", "edge")
# Values whose pairwise distances keep clear of the thresholds: rounding cannot decide a pair.
CLASSES = (0, 1, 2)
METRES = (1.0, 1.03, 1.5, 1.56, 3.0)
DEGREES = (0.0, 10.0, 30.0, 75.0, 150.0)


def make_tasks(names=NAMES):
    options = {"semseg": {"class_names": ("wall", "floor", "chair")}}
    return {name: build_task(name, **options.get(name, {})) for name in names}


def make_label(name, kinds, size, rng, void=0.3):
    """A batch's label of that task, picture by picture of the kind asked for (see KINDS)."""
    count = len(kinds)
    valid = np.zeros((count, *size), bool)
    value = rng.integers(0, 5, (count, *size))
    for i, kind in enumerate(kinds):
        if kind == "one":
            valid[i, rng.integers(size[0]), rng.integers(size[1])] = True
        elif kind != "void":
            valid[i] = rng.random(size) >= void
        if kind == "single":
            value[i] = value[i, 0, 0]
    if name == "semseg":
        return torch.from_numpy(np.where(valid, np.array(CLASSES)[value % 3], 255)).long()
    if name == "edge":
        return torch.from_numpy(np.where(valid, value % 2, 255)).float()[:, None]
    if name == "depth":
        return torch.from_numpy(np.where(valid, np.array(METRES)[value], 0)).float()[:, None]
    angle = np.radians(np.array(DEGREES)[value])
    vector = np.stack([np.sin(angle), np.zeros_like(angle), np.cos(angle)], axis=1)
    return torch.from_numpy(np.where(valid[:, None], vector, 0)).float()


# --- The reference: Python loops over targets, images and anchors, float64 throughout.


def ref_label(name, label, image, row, column):
    """The value of one pixel, None where it is void."""
    value = label[image, row, column].item() if label.ndim == 3 else label[image, :, row, column].tolist()
    if name == "semseg":
        return None if value == 255 else value
    if name == "normals":
        return None if value == [0.0, 0.0, 0.0] else value
    (value,) = value
    return None if value == (255.0 if name == "edge" else 0.0) else value


def ref_distance(name, a, b):
    if name == "depth":
        return abs(math.log(a / b))
    if name == "normals":
        cosine = sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)
        return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
    return float(a != b)


def ref_bilinear(feature, row, column, frame):
    """The map (C, h, w), which covers ``frame`` pixels, at the centre of pixel (row, column)."""
    height, width = feature.shape[1:]
    y = min(max((row + 0.5) * height / frame[0] - 0.5, 0.0), height - 1)
    x = min(max((column + 0.5) * width / frame[1] - 0.5, 0.0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    above = (1 - dx) * feature[:, top, left] + dx * feature[:, top, right]
    below = (1 - dx) * feature[:, bottom, left] + dx * feature[:, bottom, right]
    return (1 - dy) * above + dy * below


def ref_project(layers, source, x):
    for number, (weight, bias) in enumerate(layers):
        x = x if number == 0 else x.clamp(min=0)
        x = (x[:, None] * weight[source]).sum(0) + bias[source, 0]
    return x / x.pow(2).sum().sqrt()


class Reference(NamedTuple):
    loss: torch.Tensor
    losses: dict
    summary: dict
    gradients: list  # of the taps, then of each projector's weights and biases
    anchors: int


def reference(regularizer, taps, labels, draw, frame):
    names = regularizer.names
    size = labels[names[0]].shape[-2:]
    images, count = draw.pixels.shape[:2]
    leaves = {t: taps[t].detach().double().requires_grad_() for t in names}
    layers = {}
    for t in names:
        projector = regularizer.projectors[t]
        layers[t] = [
            (w.detach().double().requires_grad_(), b.detach().double().requires_grad_())
            for w, b in zip(projector.weights, projector.biases)
        ]
    places = [
        [tuple(min(int(np.float32(f) * np.float32(n)), n - 1) for f, n in zip(pixel, size)) for pixel in image]
        for image in draw.pixels.numpy()
    ]
    losses, with_anchor, sums = {}, [], {}
    for t, target in enumerate(names):
        hinges = []
        for i in range(images):
            seen = {s: [ref_label(s, labels[s], i, *place) for place in places[i]] for s in names}
            order = [names[s] for s in draw.sources[t].tolist()]
            source = next((s for s in order if any(v is not None for v in seen[s])), order[0])
            near, far = regularizer.thresholds[source]
            value = seen[source]
            z = [
                ref_project(layers[target], names.index(source), ref_bilinear(leaves[target][i], *place, frame))
                for place in places[i]
            ]
            cell = sums.setdefault(f"{target}<-{source}", [0.0] * 5)
            cell[0] += count
            for a in range(count):
                if value[a] is None:
                    continue
                others = [(a + step) % count for step in range(1, count)]
                distance = {j: ref_distance(source, value[a], value[j]) for j in others if value[j] is not None}
                alike = [j for j in others if j in distance and distance[j] <= near]
                different = [j for j in others if j in distance and distance[j] >= far]
                if not alike or not different:
                    continue
                d_ap = 2 - 2 * (z[a] * z[alike[0]]).sum()
                d_an = 2 - 2 * (z[a] * z[different[0]]).sum()
                hinge = (regularizer.margin + d_ap - d_an).clamp(min=0)
                hinges.append(hinge)
                active = float(hinge > 0)
                cell[:] = [x + y for x, y in zip(cell, [0, 1, active, d_ap.item(), d_an.item()])]
        zero = leaves[target].sum() * 0
        losses[target] = torch.stack(hinges).mean() if hinges else zero
        if hinges:
            with_anchor.append(losses[target])
    zero = sum(leaf.sum() for leaf in leaves.values()) * 0
    total = torch.stack(with_anchor).mean() if with_anchor else zero
    wanted = [leaves[t] for t in names] + [p for t in names for layer in layers[t] for p in layer]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, gradients)]
    summary = {}
    for key, (pixels, anchors, active, d_ap, d_an) in sums.items():
        summary[f"{key}/anchors"] = anchors / pixels
        if anchors:
            values = {"active": active, "d_ap": d_ap, "d_an": d_an}
            summary |= {f"{key}/{name}": value / anchors for name, value in values.items()}
    return Reference(total, losses, summary, gradients, int(sum(cell[1] for cell in sums.values())))


def agrees_with_reference(regularizer, taps, labels, draw, frame):
    """Assert that losses, gradients and diagnostics are the reference's; the number of its anchors."""
    want = reference(regularizer, taps, labels, draw, frame)
    leaves = {t: tap.detach().clone().requires_grad_() for t, tap in taps.items()}
    output = regularizer(leaves, labels, draw, frame)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss.double(), want.loss, rtol=1e-4, atol=1e-5)
    assert list(output.losses) == regularizer.names
    for t, loss in output.losses.items():
        torch.testing.assert_close(loss.double(), want.losses[t].detach(), rtol=1e-4, atol=1e-5)
    parameters = [
        p
        for t in regularizer.names
        for layer in zip(regularizer.projectors[t].weights, regularizer.projectors[t].biases)
        for p in layer
    ]
    assert len(parameters) == len(list(regularizer.parameters()))
    gradients = torch.autograd.grad(output.loss, [*leaves.values(), *parameters])
    for got, expected in zip(gradients, want.gradients, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=2e-5)
    found = regularizer.summary()
    assert found.keys() == want.summary.keys()
    assert found == pytest.approx(want.summary, rel=1e-4, abs=1e-5)
    assert regularizer.summary() == {}
    return want.anchors


def make_case(
    seed=0, kinds=None, names=NAMES, size=(6, 7), tap=(3, 4), extra=(0, 0), pixels=7, hidden=5, images=2, step=0
):
    """``kinds``: task -> a kind per picture; by default random labels everywhere."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    tasks = make_tasks(names)
    channels = {name: 2 + i for i, name in enumerate(names)}
    kinds = kinds or {name: ["random"] * images for name in names}
    labels = {name: make_label(name, kinds[name], size, rng) for name in names}
    taps = {name: torch.randn(images, channels[name], *tap, generator=generator) for name in names}
    regularizer = Contrastive(tasks, channels, seed=seed, pixels=pixels, dim=4, hidden=hidden)
    draw = regularizer.sample(step, [str(i) for i in range(images)])
    return regularizer, taps, labels, draw, (size[0] + extra[0], size[1] + extra[1])


@st.composite
def cases(draw):
    images = draw(st.integers(1, 2))
    kinds = st.lists(st.sampled_from(KINDS), min_size=images, max_size=images)
    side = st.integers(1, 6)
    return {
        "seed": draw(st.integers(0, 10**6)),
        "kinds": {name: draw(kinds) for name in NAMES},
        "size": draw(st.tuples(side, side)),
        "tap": draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        "extra": draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        "pixels": draw(st.integers(1, 8)),
        "hidden": draw(st.sampled_from([None, 5])),
        "images": images,
        "step": draw(st.integers(0, 50)),
    }


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(cases())
@example({"kinds": {name: ["void", "void"] for name in NAMES}})
@example({"kinds": {name: ["one", "one"] for name in NAMES}, "size": (2, 2), "pixels": 8})
@example({"kinds": {name: ["single", "random"] for name in NAMES}})
def test_any_labels_agree_with_reference(case):
    agrees_with_reference(*make_case(**case))


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("hidden", [None, 5])
def test_each_kind_of_source_agrees_with_reference(source, hidden):
    regularizer, taps, labels, draw, frame = make_case(seed=3, pixels=16, hidden=hidden)
    index = NAMES.index(source)
    sources = [[index, *(s for s in range(4) if s not in (t, index))] for t in range(4) if t != index]
    sources.insert(index, [s for s in range(4) if s != index])
    draw = Draw(torch.tensor(sources), draw.pixels)
    assert agrees_with_reference(regularizer, taps, labels, draw, frame) > 50


SPECIAL = {
    "a task void everywhere": {"kinds": {n: ["void" if n == "depth" else "random"] * 2 for n in NAMES}},
    "partial labels, picture by picture": {
        "kinds": {n: ["void" if (i + k) % 2 else "random" for k in range(2)] for i, n in enumerate(NAMES)}
    },
    "one class per picture in one task": {"kinds": {n: ["single" if n == "edge" else "random"] * 2 for n in NAMES}},
    "more pixels than there are": {"size": (2, 3), "pixels": 20},
    "a frame larger than the picture": {"size": (5, 7), "extra": (3, 9), "tap": (4, 6)},
    "a tap finer than the label": {"size": (4, 4), "tap": (9, 11)},
    "a tap of one place": {"tap": (1, 1)},
    "two tasks": {"names": ("normals", "semseg")},
    "one picture": {"images": 1},
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_labels_agree_with_reference(name):
    case = SPECIAL[name] | {"seed": 5}
    assert agrees_with_reference(*make_case(**{"pixels": 12, **case})) > 10


def test_thresholds_replace_the_tasks_own():
    regularizer, taps, labels, draw, frame = make_case(seed=1, pixels=12, names=("depth", "normals"))
    own = regularizer(taps, labels, draw, frame).loss
    wide = Contrastive(
        regularizer.tasks,
        {"depth": 2, "normals": 3},
        seed=1,
        pixels=12,
        dim=4,
        hidden=5,
        thresholds={"depth": (0.5, 0.9), "normals": (35.0, 100.0)},
    )
    assert agrees_with_reference(wide, taps, labels, draw, frame) > 5
    assert not torch.equal(wide(taps, labels, draw, frame).loss, own)


# --- Pairs and triplets


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(cases())
def test_no_pair_is_both_and_no_anchor_pairs_with_itself(case):
    regularizer, _, labels, draw, _ = make_case(**case)
    valid, positive, negative = regularizer._relations(labels, draw.pixels)
    assert not (positive & negative).any()
    assert not positive.diagonal(dim1=2, dim2=3).any()
    assert not negative.diagonal(dim1=2, dim2=3).any()
    assert torch.equal(positive, positive.transpose(2, 3))
    assert torch.equal(negative, negative.transpose(2, 3))
    assert not (positive | negative)[~valid].any()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([0.05, 0.3, 0.7]))
def test_pick_takes_the_first_after_the_anchor(count, seed, share):
    generator = torch.Generator().manual_seed(seed)
    positive = torch.rand(2, count, count, generator=generator) < share
    negative = ~positive & (torch.rand(2, count, count, generator=generator) < share)
    positive.diagonal(dim1=1, dim2=2).fill_(False)
    negative.diagonal(dim1=1, dim2=2).fill_(False)
    p, n, anchor = pick(positive, negative)
    assert p.dtype == n.dtype == torch.int64
    assert 0 <= int(p.min()) <= int(p.max()) < count
    assert 0 <= int(n.min()) <= int(n.max()) < count
    for b in range(2):
        for i in range(count):
            ahead = [(i + step) % count for step in range(1, count)]
            alike = [j for j in ahead if positive[b, i, j]]
            different = [j for j in ahead if negative[b, i, j]]
            assert bool(anchor[b, i]) == bool(alike and different)
            if alike:
                assert p[b, i] == alike[0]
            if different:
                assert n[b, i] == different[0]


def chi_square(table):
    """Of observed counts against equal ones."""
    table = np.asarray(table, float)
    expected = table.sum() / table.size
    return float(((table - expected) ** 2 / expected).sum())


def test_pick_is_uniform_when_the_pixels_stand_in_random_order():
    rounds, count = 6000, 8  # thing 0 is alike to 1, 2, 3 and differs from 4, 5; 6 and 7 are neither
    alike, different = torch.zeros(count, count, dtype=torch.bool), torch.zeros(count, count, dtype=torch.bool)
    alike[0, 1:4] = alike[1:4, 0] = True
    different[0, 4:6] = different[4:6, 0] = True
    order = torch.argsort(torch.rand(rounds, count, generator=torch.Generator().manual_seed(0)), dim=1)
    rows, columns = order[:, :, None], order[:, None, :]
    p, n, anchor = pick(alike[rows, columns], different[rows, columns])
    place = (order == 0).int().argmax(dim=1)  # where thing 0 stands in each round
    each = torch.arange(rounds)
    assert anchor[each, place].all()
    chosen = order[each, p[each, place]] - 1, order[each, n[each, place]] - 4
    table = np.zeros((3, 2))
    np.add.at(table, tuple(c.numpy() for c in chosen), 1)
    assert chi_square(table) < 25  # 5 degrees of freedom: exceeded by chance once in 7000


def test_identical_features_cost_the_margin():
    regularizer, taps, labels, draw, frame = make_case(pixels=12)
    taps = {t: torch.full_like(tap, 0.7) for t, tap in taps.items()}
    output = regularizer(taps, labels, draw, frame)
    for loss in (output.loss, *output.losses.values()):
        assert loss.item() == pytest.approx(regularizer.margin, abs=1e-5)
    assert all(v == 1 for key, v in regularizer.summary().items() if key.endswith("active"))


def test_satisfied_triplets_cost_nothing():
    z = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])
    p, n, anchor = torch.tensor([[1, 0, 0]]), torch.tensor([[2, 2, 0]]), torch.tensor([[True, True, False]])
    loss, stats = triplet_loss(z, p, n, anchor, 0.5)
    assert loss == 0
    assert stats.tolist() == [[2, 0, 0, 8]]  # anchors, active, sum of d_ap, sum of d_an = 4 each
    assert triplet_loss(z, p, n, anchor, 5.0)[0] == 1  # 5 + 0 - 4


NOTHING = {
    "all void": dict.fromkeys(NAMES, "void"),
    "one valid pixel": dict.fromkeys(NAMES, "one"),
    "one value per picture": dict.fromkeys(NAMES, "single"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_no_anchor_gives_exactly_zero_with_a_graph(name):
    kinds = {task: [kind, kind] for task, kind in NOTHING[name].items()}
    regularizer, taps, labels, draw, frame = make_case(kinds=kinds, pixels=12)
    taps = {t: tap.requires_grad_() for t, tap in taps.items()}
    output = regularizer(taps, labels, draw, frame)
    assert output.loss.item() == 0
    assert all(loss.item() == 0 and loss.requires_grad for loss in output.losses.values())
    output.loss.backward()
    for tensor in (*taps.values(), *regularizer.parameters()):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))
    summary = regularizer.summary()
    assert set(summary.values()) == {0.0}
    assert all(key.endswith("/anchors") for key in summary)
    assert len(summary) == 4


def test_broken_labels_are_void():
    regularizer, taps, labels, draw, frame = make_case(pixels=12)
    broken = {name: label.clone() for name, label in labels.items()}
    broken["depth"][0] = float("nan")
    broken["depth"][1] = float("inf")
    void = {**labels, "depth": torch.zeros_like(labels["depth"])}
    got, want = regularizer(taps, broken, draw, frame), regularizer(taps, void, draw, frame)
    assert math.isfinite(got.loss.item())
    assert torch.equal(got.loss, want.loss)


# --- Reading maps


def test_reading_a_ramp_gives_the_pixels_own_centre():
    """A map that holds its own place is read at the drawn pixel's centre, whatever it covers beyond the picture."""
    frame, size, height, width = (32, 64), (25, 50), 8, 16
    row = (torch.arange(height) + 0.5) * frame[0] / height  # centre of each place, in pixels
    column = (torch.arange(width) + 0.5) * frame[1] / width
    ramp = torch.stack([row[:, None].expand(height, width), column[None].expand(height, width)])[None]
    pixels = torch.rand(1, 200, 2, generator=torch.Generator().manual_seed(0))
    r, c = pixel_index(pixels, size)
    got = read_features(ramp, pixels, size, frame)[0]
    want = torch.stack([(r[0] + 0.5).clamp(2, 30), (c[0] + 0.5).clamp(2, 62)], dim=1)
    torch.testing.assert_close(got, want)


def test_labels_are_read_at_the_nearest_pixel():
    label = torch.arange(2 * 3 * 4).view(2, 3, 4)
    pixels = torch.tensor([[[0.0, 0.0], [0.5, 0.5], [0.99999994, 0.99999994]]] * 2)
    assert read_labels(label, pixels)[..., 0].tolist() == [[0, 6, 11], [12, 18, 23]]
    both = torch.stack([label, -label], dim=1)
    assert read_labels(both, pixels)[0].tolist() == [[0, 0], [6, -6], [11, -11]]


# --- Draws


def test_sources_are_uniform_and_independent():
    steps, count = 3000, 4
    orders = np.stack([draw_sources(7, step, count).numpy() for step in range(steps)])  # (steps, T, T - 1)
    for target in range(count):
        others = [t for t in range(count) if t != target]
        assert (np.sort(orders[:, target], axis=1) == others).all()  # each other task once, never the target itself
        _, permutations = np.unique(orders[:, target], axis=0, return_counts=True)
        assert len(permutations) == 6
        assert chi_square(permutations) < 25  # 5 degrees of freedom
    # Of each target the index of the first choice among its others: pairs of targets, and of steps, are independent.
    first = orders[..., 0] - (orders[..., 0] > np.arange(count))
    for a in range(count):
        for b in range(count):
            x, y = (first[:, a], first[:, b]) if a != b else (first[:-1, a], first[1:, a])
            assert chi_square(np.bincount(3 * x + y, minlength=9)) < 32  # 8 degrees of freedom: 1 in 10 000


def test_pixels_are_uniform():
    pixels = draw_pixels(0, 3, [str(i) for i in range(50)], 100).numpy()
    assert pixels.dtype == np.float32
    assert pixels.shape == (50, 100, 2)
    assert 0 <= pixels.min() <= pixels.max() < 1
    row, column = pixel_index(torch.from_numpy(pixels), (4, 5))
    table = np.bincount((row * 5 + column).flatten().numpy(), minlength=20)
    assert chi_square(table) < 50  # 19 degrees of freedom


def test_draws_are_pure_functions():
    regularizer, *_ = make_case(seed=3)
    other, *_ = make_case(seed=4)
    together = regularizer.sample(11, ["a", "b", "c"])
    again = make_case(seed=3)[0].sample(11, ["a", "b", "c"])
    assert torch.equal(together.sources, again.sources)
    assert torch.equal(together.pixels, again.pixels)
    # A picture's pixels depend on its id, not on the batch; the sources on neither.
    apart = regularizer.sample(11, ["b"])
    assert torch.equal(apart.pixels[0], together.pixels[1])
    assert torch.equal(apart.sources, together.sources)
    assert torch.equal(regularizer.sample(11, ["c", "x", "a"]).pixels[[2, 0]], together.pixels[[0, 2]])
    drawn = [together.pixels[0], together.pixels[1], regularizer.sample(12, ["a"]).pixels[0]]
    drawn.append(other.sample(11, ["a"]).pixels[0])
    assert all(not torch.equal(x, y) for i, x in enumerate(drawn) for y in drawn[:i])
    many = [torch.stack([r.sample(step, ["a"]).sources for step in range(20)]) for r in (regularizer, other)]
    assert not torch.equal(*many)
    assert len({tuple(s.flatten().tolist()) for s in many[0]}) > 10


def test_draw_moves_to_a_device():
    draw = make_case()[3].to("meta")
    assert draw.sources.device.type == draw.pixels.device.type == "meta"


def test_global_generators_stay_untouched():
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002
    random.seed(123)

    def states():
        return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002

    before = states()
    case = make_tasks(), dict.fromkeys(NAMES, 3)
    regularizer = Contrastive(*case, pixels=9)
    draw = regularizer.sample(0, ["a"])
    taps = {name: torch.zeros(1, 3, 4, 4, requires_grad=True) for name in NAMES}
    labels = {name: make_label(name, ["random"], (8, 8), np.random.default_rng(0)) for name in NAMES}
    regularizer(taps, labels, draw).loss.backward()
    after = states()
    assert torch.equal(before[0], after[0])
    assert (before[1] == after[1]).all()
    assert before[2] == after[2]


# --- Partial labels


def test_first_available():
    order = torch.tensor([2, 0, 3])
    has = torch.tensor(
        [  # rows: tasks; columns: pictures
            [1, 1, 0, 0],
            [1, 1, 1, 1],  # the target itself
            [1, 0, 0, 0],
            [1, 1, 1, 0],
        ]
    ).bool()
    assert first_available(order, has).tolist() == [2, 0, 3, 2]


def test_next_source_is_uniform_among_those_a_picture_has():
    has = torch.tensor([[True], [True], [False], [True], [True]])  # nobody labels task 2
    counts = np.zeros(5)
    for step in range(3000):
        counts[first_available(draw_sources(0, step, 5)[0], has).item()] += 1
    assert counts[0] == counts[2] == 0
    assert chi_square(counts[[1, 3, 4]]) < 19  # 2 degrees of freedom


def test_a_void_picture_does_not_change_another():
    """What a picture costs is its own affair: a picture without any label adds nothing to the batch's mean."""
    regularizer, taps, labels, draw, frame = make_case(seed=2, pixels=12)
    void = {n: make_label(n, ["void"], (6, 7), np.random.default_rng(0)) for n in NAMES}
    alone = {n: label[:1] for n, label in labels.items()}
    half = {n: torch.cat([alone[n], void[n]]) for n in NAMES}
    one = regularizer({n: tap[:1] for n, tap in taps.items()}, alone, Draw(draw.sources, draw.pixels[:1]), frame)
    two = regularizer(taps, half, draw, frame)
    assert one.loss > 0
    torch.testing.assert_close(one.loss, two.loss)


# --- Projectors and their optimiser


def test_projectors_start_is_a_function_of_the_seed():
    def start(seed, global_seed):
        torch.manual_seed(global_seed)
        return make_case(seed=seed)[0].state_dict()

    first, second, third = start(0, 1), start(0, 2), start(1, 1)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], third[key]) for key in first)
    assert "sums" not in first
    weight = Contrastive(make_tasks(), dict.fromkeys(NAMES, 16)).projectors["depth"].weights[0]
    assert weight.shape == (4, 16, 64)
    assert 0.24 < weight.abs().max() <= 0.25  # uniform in +-1/sqrt(16), as nn.Linear


def test_undrawn_sources_get_exactly_zero_gradient():
    regularizer, taps, labels, draw, frame = make_case(seed=0, pixels=24)
    regularizer(taps, labels, draw, frame).loss.backward()
    for t, name in enumerate(NAMES):
        drawn = draw.sources[t, 0].item()
        for parameter in regularizer.projectors[name].parameters():
            for source in range(4):
                assert parameter.grad[source].any() == (source == drawn), (name, source)


def make_slices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, *shape, generator=generator) for shape in ((3, 5), (1, 5))]


def random_gradients(step, parameters):
    """(S, ...) gradients of which a random subset of slices, sometimes none or all, is zero."""
    generator = torch.Generator().manual_seed(1000 + step)
    drawn = torch.rand(4, generator=generator) < 0.5
    shape = (-1, 1, 1)
    return drawn, [torch.randn(p.shape, generator=generator) * drawn.view(shape) for p in parameters]


@pytest.mark.parametrize("options", [{"lr": 0.01, "weight_decay": 0.1}, {"lr": 3e-3, "betas": (0.5, 0.8), "eps": 1e-3}])
def test_slice_adamw_equals_adamw_over_separate_parameters(options):
    start = make_slices()
    stacked = [torch.nn.Parameter(p.clone()) for p in start]
    separate = [[torch.nn.Parameter(row.clone()) for row in p] for p in start]
    ours = SliceAdamW(stacked, **options)
    theirs = torch.optim.AdamW([row for rows in separate for row in rows], **options)
    for step in range(200):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = options["lr"] * (1 - step / 300)
        drawn, gradients = random_gradients(step, stacked)
        for parameter, rows, gradient in zip(stacked, separate, gradients):
            parameter.grad = gradient
            for s, row in enumerate(rows):
                row.grad = gradient[s].clone() if drawn[s] else None
        before = [p.detach().clone() for p in stacked]
        ours.step()
        theirs.step()
        for parameter, old, rows in zip(stacked, before, separate):
            assert torch.equal(parameter[~drawn], old[~drawn])
            changed = (parameter != old).flatten(1).any(dim=1)
            assert torch.equal(changed, drawn)
            torch.testing.assert_close(
                parameter.detach(), torch.stack([r.detach() for r in rows]), rtol=2e-5, atol=2e-6
            )


def test_slice_adamw_resumes_identically():
    def steps(optimizer, parameters, first, last):
        for step in range(first, last):
            for parameter, gradient in zip(parameters, random_gradients(step, parameters)[1]):
                parameter.grad = gradient
            optimizer.step()

    parameters = [torch.nn.Parameter(p) for p in make_slices()]
    optimizer = SliceAdamW(parameters, lr=0.02)
    steps(optimizer, parameters, 0, 17)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in parameters]], file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    copies = [torch.nn.Parameter(p) for p in values]
    resumed = SliceAdamW(copies, lr=0.5)
    resumed.load_state_dict(state)
    steps(optimizer, parameters, 17, 40)
    steps(resumed, copies, 17, 40)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies))
    assert resumed.param_groups[0]["lr"] == 0.02


def test_slice_adamw_closure_and_missing_gradients():
    used, unused = (torch.nn.Parameter(p) for p in make_slices())
    before = unused.detach().clone()
    optimizer = SliceAdamW([used, unused], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert torch.equal(unused, before)


def test_only_drawn_projectors_train():
    regularizer, taps, labels, draw, frame = make_case(seed=0, pixels=24)
    optimizer = SliceAdamW(regularizer.parameters(), lr=0.1)
    before = {key: value.clone() for key, value in regularizer.state_dict().items()}
    regularizer(taps, labels, draw, frame).loss.backward()
    optimizer.step()
    for t, name in enumerate(NAMES):
        drawn = torch.arange(4) == draw.sources[t, 0]
        for key, value in regularizer.projectors[name].state_dict().items():
            changed = (value != before[f"projectors.{name}.{key}"]).flatten(1).any(dim=1)
            assert torch.equal(changed, drawn)


# --- Precision, compilation, determinism


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_taps(dtype):
    regularizer, taps, labels, draw, frame = make_case(pixels=12)
    half = {t: tap.to(dtype).requires_grad_() for t, tap in taps.items()}
    output = regularizer(half, labels, draw, frame)
    assert {loss.dtype for loss in (output.loss, *output.losses.values())} == {torch.float32}
    # All arithmetic is in fp32: the taps' own rounding is the only difference.
    exact = regularizer({t: tap.detach().float() for t, tap in half.items()}, labels, draw, frame)
    assert torch.equal(output.loss, exact.loss)
    output.loss.backward()
    assert all(tap.grad.dtype == dtype and tap.grad.isfinite().all() for tap in half.values())
    assert any(tap.grad.any() for tap in half.values())


def test_autocast_changes_nothing():
    regularizer, taps, labels, draw, frame = make_case(pixels=300, size=(16, 16))  # counts that bf16 would round
    leaves = {t: tap.requires_grad_() for t, tap in taps.items()}
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = regularizer(leaves, labels, draw, frame).loss
        found.append((loss, torch.autograd.grad(loss, list(leaves.values())), regularizer.summary()))
    assert found[0][0].item() > 0
    assert found[0][0].dtype == found[1][0].dtype == torch.float32
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))
    assert found[0][2] == found[1][2]


def test_one_compiled_graph_serves_every_draw():
    regularizer, taps, labels, _, frame = make_case(pixels=12)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(regularizer, fullgraph=True, backend="eager")
    seen = set()
    for step in range(6):
        draw = regularizer.sample(step, [f"{step}", "b"])
        seen.add(tuple(draw.sources[:, 0].tolist()))
        leaves = {t: tap.clone().requires_grad_() for t, tap in taps.items()}
        loss = compiled(leaves, labels, draw, frame).loss
        got = torch.autograd.grad(loss, list(leaves.values()))
        counted = regularizer.summary()
        eager = regularizer(leaves, labels, draw, frame).loss
        want = torch.autograd.grad(eager, list(leaves.values()))
        torch.testing.assert_close(loss, eager)
        torch.testing.assert_close(got, want)
        assert counted == pytest.approx(regularizer.summary())
    assert len(seen) > 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_deterministic_mode():
    def run():
        regularizer, taps, labels, draw, frame = make_case(pixels=64)
        leaves = {t: tap.requires_grad_() for t, tap in taps.items()}
        loss = regularizer(leaves, labels, draw, frame).loss
        loss.backward()
        return [loss, *(t.grad for t in (*leaves.values(), *regularizer.parameters()))]

    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a, b) for a, b in zip(first, run()))


# --- What a user may get wrong, and what is reported


def test_one_task_is_refused():
    with pytest.raises(UserError, match="at least two tasks"):
        Contrastive(make_tasks(("depth",)), {"depth": 4})


@pytest.mark.parametrize("pair", [(0.5, 0.5), (0.5, 0.2), (-0.1, 0.2), (math.nan, 1.0), (0.1, math.nan)])
def test_thresholds_that_make_no_sense_are_refused(pair):
    with pytest.raises(UserError, match=r"regularizer\.thresholds\.depth"):
        Contrastive(make_tasks(), dict.fromkeys(NAMES, 4), thresholds={"depth": pair})


def test_summary_gathers_several_steps():
    regularizer, taps, labels, _, frame = make_case(pixels=12)
    assert regularizer.summary() == {}
    pairs, anchors, pixels = set(), {}, {}
    for step in range(5):
        draw = regularizer.sample(step, ["a", "b"])
        want = reference(regularizer, taps, labels, draw, frame)
        regularizer(taps, labels, draw, frame)
        for key, value in want.summary.items():
            pair, name = key.split("/")
            pairs.add(pair)
            if name == "anchors":
                anchors[pair] = anchors.get(pair, 0) + value
                pixels[pair] = pixels.get(pair, 0) + 1
    found = regularizer.summary()
    assert set(found) == {f"{pair}/{name}" for pair in pairs for name in ("anchors", "active", "d_ap", "d_an")}
    for pair in pairs:  # every picture is labelled by every task, so that each step counts alike
        assert found[f"{pair}/anchors"] == pytest.approx(anchors[pair] / pixels[pair])
        assert 0 <= found[f"{pair}/active"] <= 1
        assert 0 <= found[f"{pair}/d_ap"] <= 4
        assert 0 <= found[f"{pair}/d_an"] <= 4
    assert regularizer.summary() == {}


def test_gradients_at_taps():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2, 4, 4, generator=generator, requires_grad=True)
    taps = {"a": weight * 2, "b": weight.sin(), "c": weight + 1, "d": weight * 3}
    task = taps["a"].square().sum() + taps["b"].sum() + 5 * taps["c"].sum()  # does not look at d
    contrast = 0.5 * taps["a"].exp().mean() + taps["a"].mul(taps["b"]).sum() + 2 * taps["d"].sum()  # nor this at c
    found = gradients_at_taps(task, contrast, taps)
    assert weight.grad is None
    assert all(not value.requires_grad and value.shape == () for value in found.values())
    assert set(found) == {f"{t}/{k}" for t in taps for k in ("norm_task", "norm_contrast", "cosine")}
    a, b = taps["a"].detach().double(), taps["b"].detach().double()
    expected = {
        "a": (2 * a, 0.5 * a.exp() / a.numel() + b),
        "b": (torch.ones_like(b), a),
        "c": (torch.full_like(b, 5), torch.zeros_like(b)),
        "d": (torch.zeros_like(b), torch.full_like(b, 2)),
    }
    for name, (own, ours) in expected.items():
        assert found[f"{name}/norm_task"].item() == pytest.approx(own.norm().item(), rel=1e-5)
        assert found[f"{name}/norm_contrast"].item() == pytest.approx(ours.norm().item(), rel=1e-5)
        product = (own.norm() * ours.norm()).item()
        cosine = (own * ours).sum().item() / product if product else 0.0
        assert found[f"{name}/cosine"].item() == pytest.approx(cosine, abs=1e-5)
    (task + contrast).backward()  # the graph is still there
    x = weight.detach().double()
    want = 2 * (4 * x + x.exp().pow(2) / (2 * x.numel()) + x.sin()) + (1 + 2 * x) * x.cos() + 5 + 6
    torch.testing.assert_close(weight.grad.double(), want, rtol=1e-5, atol=1e-5)
