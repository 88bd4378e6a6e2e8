"""The regulariser against a slow reference in float64, its draws, its optimiser, and what it leaves alone."""

import io
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.contrast_reference import (
    NAMES,
    agrees_with_reference,
    cases,
    make_case,
    make_label,
    make_tasks,
    reference,
    relations,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtcl import UserError
from mtcl.regularizers import Contrastive, Draw, MaskedAdamW, triplet
from mtcl.regularizers.diagnostics import compare_feature_gradients
from mtcl.regularizers.sampling import draw_pixels, draw_sources, pixel_index, sample_features, sample_labels
from mtcl.regularizers.sources import choose_available_source, list_allowed_sources

# --- The paper's choices against the reference


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
    regularizer, features, labels, draw, frame = make_case(seed=3, pixels=16, hidden=hidden)
    index = NAMES.index(source)
    sources = [[index, *(s for s in range(4) if s not in (t, index))] for t in range(4) if t != index]
    sources.insert(index, [s for s in range(4) if s != index])
    draw = Draw(torch.tensor(sources), draw.pixels)
    assert agrees_with_reference(regularizer, features, labels, draw, frame) > 50


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
    regularizer, features, labels, draw, frame = make_case(seed=1, pixels=12, names=("depth", "normals"))
    narrow_loss = regularizer(features, labels, draw, frame).loss
    wide = Contrastive(
        regularizer.tasks,
        {"depth": 2, "normals": 3},
        seed=1,
        num_pixels=12,
        embed_dim=4,
        hidden_dim=5,
        thresholds={"depth": (0.5, 0.9), "normals": (35.0, 100.0)},
    )
    assert agrees_with_reference(wide, features, labels, draw, frame) > 5
    assert not torch.equal(wide(features, labels, draw, frame).loss, narrow_loss)


# --- Pairs and triplets


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(cases())
@example({"size": (2, 2), "pixels": 8})
def test_no_pair_is_both_and_no_pixel_pairs_with_itself(case):
    regularizer, features, labels, draw, frame = make_case(**case)
    positive, negative = relations(regularizer, features, labels, draw, frame)
    images, count = draw.pixels.shape[:2]
    assert positive.shape == negative.shape == (4, images, count, count)
    assert not (positive & negative).any()
    assert torch.equal(positive, positive.transpose(2, 3))
    assert torch.equal(negative, negative.transpose(2, 3))
    row, column = pixel_index(draw.pixels, labels["semseg"].shape[-2:])
    same = (row[:, :, None] == row[:, None]) & (column[:, :, None] == column[:, None])
    assert same.diagonal(dim1=1, dim2=2).all()
    assert not ((positive | negative) & same).any()
    valid = [sample_labels(task.valid(labels[name]), draw.pixels)[..., 0] for name, task in regularizer.tasks.items()]
    for t in range(4):
        source = choose_available_source(draw.sources[t], torch.stack(valid).any(dim=2))
        for image, s in enumerate(source.tolist()):
            assert not (positive | negative)[t, image][~valid[s][image]].any()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([0.05, 0.3, 0.7]))
def test_pick_takes_the_first_after_the_pixel(count, seed, share):
    generator = torch.Generator().manual_seed(seed)
    relation = torch.rand(2, 3, count, count, generator=generator) < share
    relation.diagonal(dim1=2, dim2=3).fill_(False)
    chosen, has = triplet.sample_related(relation)
    assert chosen.dtype == torch.int64
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < count
    for row, j, has_one in zip(relation.flatten(0, 1), chosen.flatten(0, 1), has.flatten(0, 1)):
        for i in range(count):
            ahead = [(i + step) % count for step in range(1, count) if row[i, (i + step) % count]]
            assert bool(has_one[i]) == bool(ahead)
            if ahead:
                assert j[i] == ahead[0]


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
    (p, has_positive), (n, has_negative) = (triplet.sample_related(x[rows, columns]) for x in (alike, different))
    rank = (order == 0).int().argmax(dim=1)  # where thing 0 stands in each round
    each = torch.arange(rounds)
    assert (has_positive & has_negative)[each, rank].all()
    chosen = order[each, p[each, rank]] - 1, order[each, n[each, rank]] - 4
    table = np.zeros((3, 2))
    np.add.at(table, tuple(c.numpy() for c in chosen), 1)
    assert chi_square(table) < 25  # 5 degrees of freedom: exceeded by chance once in 7000


def test_identical_features_cost_the_margin():
    regularizer, features, labels, draw, frame = make_case(pixels=12)
    features = {t: torch.full_like(tap, 0.7) for t, tap in features.items()}
    output = regularizer(features, labels, draw, frame)
    for loss in (output.loss, *output.losses.values()):
        assert loss.item() == pytest.approx(regularizer.margin, abs=1e-5)
    assert all(v == 1 for key, v in regularizer.summary().items() if key.endswith("active"))


def test_satisfied_triplets_cost_nothing():
    z = torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]]])  # (T, B, K, D)
    p, n, anchor = torch.tensor([[[1, 0, 0]]]), torch.tensor([[[2, 2, 0]]]), torch.tensor([[[True, True, False]]])
    hinge = triplet.triplet_hinge(z, p, n, anchor, 0.5)
    assert hinge.losses.tolist() == [0]
    assert hinge.has_anchor.tolist() == [True]
    assert hinge.stats.tolist() == [[[2, 0, 0, 8]]]  # anchors, active, sum of d_ap, sum of d_an = 4 each
    assert triplet.triplet_hinge(z, p, n, anchor, 5.0).losses.tolist() == [1]  # 5 + 0 - 4
    assert triplet.triplet_hinge(z, p, n, anchor & False, 5.0).has_anchor.tolist() == [False]


NOTHING = {
    "all void": dict.fromkeys(NAMES, "void"),
    "one valid pixel": dict.fromkeys(NAMES, "one"),
    "one value per picture": dict.fromkeys(NAMES, "single"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_no_anchor_gives_exactly_zero_with_a_graph(name):
    kinds = {task: [kind, kind] for task, kind in NOTHING[name].items()}
    regularizer, features, labels, draw, frame = make_case(kinds=kinds, pixels=12)
    features = {t: tap.requires_grad_() for t, tap in features.items()}
    output = regularizer(features, labels, draw, frame)
    assert output.loss.item() == 0
    assert all(loss.item() == 0 and loss.requires_grad for loss in output.losses.values())
    output.loss.backward()
    for tensor in (*features.values(), *regularizer.parameters()):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))
    summary = regularizer.summary()
    assert set(summary.values()) == {0.0}
    assert all(key.endswith("/anchors") for key in summary)
    assert len(summary) == 4


def test_broken_labels_are_void():
    regularizer, features, labels, draw, frame = make_case(pixels=12)
    broken = {name: label.clone() for name, label in labels.items()}
    broken["depth"][0] = float("nan")
    broken["depth"][1] = float("inf")
    void = {**labels, "depth": torch.zeros_like(labels["depth"])}
    got, want = regularizer(features, broken, draw, frame), regularizer(features, void, draw, frame)
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
    got = sample_features(ramp, pixels, size, frame)[0]
    want = torch.stack([(r[0] + 0.5).clamp(2, 30), (c[0] + 0.5).clamp(2, 62)], dim=1)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(4, 6), (1, 1), (1, 5), (9, 20)])
@pytest.mark.parametrize("channels", [1, 3])
def test_both_layouts_are_read_as_grid_sample_does(shape, channels):
    size, frame = (7, 9), (8, 12)
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(2, channels, *shape, generator=generator)
    pixels = torch.rand(2, 30, 2, generator=generator)
    upstream = torch.randn(2, 30, channels, generator=generator)
    row, column = pixel_index(pixels, size)
    grid = torch.stack([(column + 0.5) / frame[1], (row + 0.5) / frame[0]], dim=-1).double() * 2 - 1

    def sample(feature):
        sampled = F.grid_sample(feature.double(), grid[:, None], padding_mode="border", align_corners=False)
        return sampled[:, :, 0].transpose(1, 2)

    results = []
    for layout, read in (
        (torch.contiguous_format, sample),
        (torch.contiguous_format, lambda feature: sample_features(feature, pixels, size, frame)),
        (torch.channels_last, lambda feature: sample_features(feature, pixels, size, frame)),
    ):
        leaf = feature.clone(memory_format=layout).requires_grad_()
        values = read(leaf)
        (values * upstream).sum().backward()
        results.append((values.detach(), leaf.grad))
    want, *both = results
    for values, gradient in both:
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), want[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, want[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[0], both[1], rtol=1e-6, atol=1e-6)


def test_labels_are_read_at_the_nearest_pixel():
    label = torch.arange(2 * 3 * 4).view(2, 3, 4)
    pixels = torch.tensor([[[0.0, 0.0], [0.5, 0.5], [0.99999994, 0.99999994]]] * 2)
    assert sample_labels(label, pixels)[..., 0].tolist() == [[0, 6, 11], [12, 18, 23]]
    both = torch.stack([label, -label], dim=1)
    assert sample_labels(both, pixels)[0].tolist() == [[0, 0], [6, -6], [11, -11]]


# --- Draws


def test_sources_are_uniform_and_independent():
    steps, count = 3000, 4
    allowed = list_allowed_sources(NAMES, "other", [])
    orders = np.stack([draw_sources(7, step, allowed).numpy() for step in range(steps)])  # (steps, T, T - 1)
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

    states_before = states()
    case = make_tasks(), dict.fromkeys(NAMES, 3)
    regularizer = Contrastive(*case, num_pixels=9)
    draw = regularizer.sample(0, ["a"])
    features = {name: torch.zeros(1, 3, 4, 4, requires_grad=True) for name in NAMES}
    labels = {name: make_label(name, ["random"], (8, 8), np.random.default_rng(0)) for name in NAMES}
    regularizer(features, labels, draw).loss.backward()
    states_after = states()
    assert torch.equal(states_before[0], states_after[0])
    assert (states_before[1] == states_after[1]).all()
    assert states_before[2] == states_after[2]


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
    assert choose_available_source(order, has).tolist() == [2, 0, 3, 2]


def test_next_source_is_uniform_among_those_a_picture_has():
    has = torch.tensor([[True], [True], [False], [True], [True]])  # nobody labels task 2
    counts, allowed = np.zeros(5), [[1, 2, 3, 4]]
    for step in range(3000):
        counts[choose_available_source(draw_sources(0, step, allowed)[0], has).item()] += 1
    assert counts[0] == counts[2] == 0
    assert chi_square(counts[[1, 3, 4]]) < 19  # 2 degrees of freedom


def test_a_void_picture_does_not_change_another():
    """What a picture costs is its own affair: a picture without any label adds nothing to the batch's mean."""
    regularizer, features, labels, draw, frame = make_case(seed=2, pixels=12)
    void = {n: make_label(n, ["void"], (6, 7), np.random.default_rng(0)) for n in NAMES}
    alone = {n: label[:1] for n, label in labels.items()}
    half = {n: torch.cat([alone[n], void[n]]) for n in NAMES}
    one = regularizer({n: tap[:1] for n, tap in features.items()}, alone, Draw(draw.sources, draw.pixels[:1]), frame)
    two = regularizer(features, half, draw, frame)
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
    regularizer, features, labels, draw, frame = make_case(seed=0, pixels=24)
    regularizer(features, labels, draw, frame).loss.backward()
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
    ours = MaskedAdamW(stacked, **options)
    theirs = torch.optim.AdamW([row for rows in separate for row in rows], **options)
    for step in range(200):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = options["lr"] * (1 - step / 300)
        drawn, gradients = random_gradients(step, stacked)
        for parameter, rows, gradient in zip(stacked, separate, gradients):
            parameter.grad = gradient
            for s, row in enumerate(rows):
                row.grad = gradient[s].clone() if drawn[s] else None
        values_before = [p.detach().clone() for p in stacked]
        ours.step()
        theirs.step()
        for parameter, old, rows in zip(stacked, values_before, separate):
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
    optimizer = MaskedAdamW(parameters, lr=0.02)
    steps(optimizer, parameters, 0, 17)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in parameters]], file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    copies = [torch.nn.Parameter(p) for p in values]
    resumed = MaskedAdamW(copies, lr=0.5)
    resumed.load_state_dict(state)
    steps(optimizer, parameters, 17, 40)
    steps(resumed, copies, 17, 40)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies))
    assert resumed.param_groups[0]["lr"] == 0.02


def test_slice_adamw_closure_and_missing_gradients():
    used, unused = (torch.nn.Parameter(p) for p in make_slices())
    value_before = unused.detach().clone()
    optimizer = MaskedAdamW([used, unused], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert torch.equal(unused, value_before)


def test_only_drawn_projectors_train():
    regularizer, features, labels, draw, frame = make_case(seed=0, pixels=24)
    optimizer = MaskedAdamW(regularizer.parameters(), lr=0.1)
    state_before = {key: value.clone() for key, value in regularizer.state_dict().items()}
    regularizer(features, labels, draw, frame).loss.backward()
    optimizer.step()
    for t, name in enumerate(NAMES):
        drawn = torch.arange(4) == draw.sources[t, 0]
        for key, value in regularizer.projectors[name].state_dict().items():
            changed = (value != state_before[f"projectors.{name}.{key}"]).flatten(1).any(dim=1)
            assert torch.equal(changed, drawn)


# --- Precision, compilation, determinism


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_taps(dtype):
    regularizer, features, labels, draw, frame = make_case(pixels=12)
    half = {t: tap.to(dtype).requires_grad_() for t, tap in features.items()}
    output = regularizer(half, labels, draw, frame)
    assert {loss.dtype for loss in (output.loss, *output.losses.values())} == {torch.float32}
    # All arithmetic is in fp32: the taps' own rounding is the only difference.
    exact = regularizer({t: tap.detach().float() for t, tap in half.items()}, labels, draw, frame)
    assert torch.equal(output.loss, exact.loss)
    output.loss.backward()
    assert all(tap.grad.dtype == dtype and tap.grad.isfinite().all() for tap in half.values())
    assert any(tap.grad.any() for tap in half.values())


def test_autocast_changes_nothing():
    regularizer, features, labels, draw, frame = make_case(pixels=300, size=(16, 16))  # counts that bf16 would round
    leaves = {t: tap.requires_grad_() for t, tap in features.items()}
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = regularizer(leaves, labels, draw, frame).loss
        results.append((loss, torch.autograd.grad(loss, list(leaves.values())), regularizer.summary()))
    assert results[0][0].item() > 0
    assert results[0][0].dtype == results[1][0].dtype == torch.float32
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))
    assert results[0][2] == results[1][2]


def test_one_compiled_graph_serves_every_draw():
    regularizer, features, labels, _, frame = make_case(pixels=12)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(regularizer, fullgraph=True, backend="eager")
    drawn = set()
    for step in range(6):
        draw = regularizer.sample(step, [f"{step}", "b"])
        drawn.add(tuple(draw.sources[:, 0].tolist()))
        leaves = {t: tap.clone().requires_grad_() for t, tap in features.items()}
        loss = compiled(leaves, labels, draw, frame).loss
        got = torch.autograd.grad(loss, list(leaves.values()))
        counted = regularizer.summary()
        eager = regularizer(leaves, labels, draw, frame).loss
        want = torch.autograd.grad(eager, list(leaves.values()))
        torch.testing.assert_close(loss, eager)
        torch.testing.assert_close(got, want)
        assert counted == pytest.approx(regularizer.summary())
    assert len(drawn) > 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_deterministic_mode():
    def run():
        regularizer, features, labels, draw, frame = make_case(pixels=64)
        leaves = {t: tap.requires_grad_() for t, tap in features.items()}
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
    with pytest.raises(UserError, match=r"^thresholds\.depth=\["):
        Contrastive(make_tasks(), dict.fromkeys(NAMES, 4), thresholds={"depth": pair})


def test_summary_gathers_several_steps():
    regularizer, features, labels, _, frame = make_case(pixels=12)
    assert regularizer.summary() == {}
    sums = {}
    for step in range(5):
        draw = regularizer.sample(step, ["a", "b"])
        for pair, values in reference(regularizer, features, labels, draw, frame).sums.items():
            sums[pair] = sums.get(pair, 0) + values
        regularizer(features, labels, draw, frame)
    summary = regularizer.summary()
    assert set(summary) == {f"{pair}/{name}" for pair in sums for name in ("anchors", "active", "d_ap", "d_an")}
    for pair, (labelled, anchors, *_) in sums.items():
        assert summary[f"{pair}/anchors"] == pytest.approx(anchors / labelled)
        assert 0 <= summary[f"{pair}/active"] <= 1
        assert 0 <= summary[f"{pair}/d_ap"] <= 4
        assert 0 <= summary[f"{pair}/d_an"] <= 4
    assert regularizer.summary() == {}


def test_gradients_at_taps():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2, 4, 4, generator=generator, requires_grad=True)
    features = {"a": weight * 2, "b": weight.sin(), "c": weight + 1, "d": weight * 3}
    task = features["a"].square().sum() + features["b"].sum() + 5 * features["c"].sum()  # does not look at d
    contrast = (
        0.5 * features["a"].exp().mean() + features["a"].mul(features["b"]).sum() + 2 * features["d"].sum()
    )  # nor this at c
    statistics = compare_feature_gradients(task, contrast, features)
    assert weight.grad is None
    assert all(not value.requires_grad and value.shape == () for value in statistics.values())
    assert set(statistics) == {f"{t}/{k}" for t in features for k in ("norm_task", "norm_regularizer", "cosine")}
    a, b = features["a"].detach().double(), features["b"].detach().double()
    expected = {
        "a": (2 * a, 0.5 * a.exp() / a.numel() + b),
        "b": (torch.ones_like(b), a),
        "c": (torch.full_like(b, 5), torch.zeros_like(b)),
        "d": (torch.zeros_like(b), torch.full_like(b, 2)),
    }
    for name, (task_gradient, ours) in expected.items():
        assert statistics[f"{name}/norm_task"].item() == pytest.approx(task_gradient.norm().item(), rel=1e-5)
        assert statistics[f"{name}/norm_regularizer"].item() == pytest.approx(ours.norm().item(), rel=1e-5)
        product = (task_gradient.norm() * ours.norm()).item()
        cosine = (task_gradient * ours).sum().item() / product if product else 0.0
        assert statistics[f"{name}/cosine"].item() == pytest.approx(cosine, abs=1e-5)
    (task + contrast).backward()  # the graph is still there
    x = weight.detach().double()
    want = 2 * (4 * x + x.exp().pow(2) / (2 * x.numel()) + x.sin()) + (1 + 2 * x) * x.cos() + 5 + 6
    torch.testing.assert_close(weight.grad.double(), want, rtol=1e-5, atol=1e-5)
