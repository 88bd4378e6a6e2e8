"""The regulariser's options against the slow reference, what each of them means, and the weight of the contrast."""

import json
import math
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.common import TINY, composed
from helpers.contrast_reference import NAMES, agrees_with_reference, cases, make_case, make_tasks, relations
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtcl import UserError
from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_lambda, build_regularizer
from mtcl.config.schema import check_config
from mtcl.regularizers import Contrastive, GradientNormWeight
from mtcl.regularizers.criteria import CRITERIA
from mtcl.regularizers.diagnostics import compare_feature_gradients
from mtcl.regularizers.null_labels import SOURCE_LABELS
from mtcl.regularizers.sampling import draw_sources, pixel_index
from mtcl.regularizers.sampling_ablations import balanced_sample
from mtcl.regularizers.sources import list_allowed_sources
from mtcl.regularizers.triplet import sample_related
from mtcl.regularizers.weighting import Lambda
from mtcl.training.checkpoint_file import read_checkpoint_file

# --- Against the reference

ANY_PIXELS = tuple(name for name in CRITERIA if name not in ("boundary", "prototypes"))  # which have tests of their own
PARTIAL = {name: ["void" if (i + k) % 2 else "random" for k in range(2)] for i, name in enumerate(NAMES)}
SHARED = {name: ["void" if (i + k) % 2 else "random" for k in range(4)] for i, name in enumerate(NAMES)}
OPTIONS = {
    "semihard": {"criterion": "semihard", "tap": (6, 7)},  # a coarser tap has features that are equal
    "ranked": {"criterion": "ranked"},
    "ranked, one threshold": {"criterion": "ranked", "thresholds": {"depth": (0.0, 0.3)}},
    "infonce": {"criterion": "infonce"},
    "infonce, hot": {"criterion": "infonce", "temperature": 1.5},
    "infonce, cold": {"criterion": "infonce", "temperature": 0.025},
    "self": {"source_tasks": "self"},
    "any": {"source_tasks": "any", "step": 3},
    "normals": {"source_tasks": "normals"},
    "excluded_pairs": {"excluded_pairs": [f"{t}<-{s}" for t in NAMES for s in ("semseg", "edge")][1:-1]},
    "source_weights": {"source_weights": {t: {s: 1 for s in NAMES[::-2] if s != t} for t in NAMES}},
    "random labels": {"source_labels": "random"},
    "another image's labels": {"source_labels": "other_image", "images": 3},
    "another image's labels, partial": {"source_labels": "other_image", "images": 4, "pixels": 20, "kinds": SHARED},
    "distance": {"source_labels": "distance"},
    "distance, ranked": {"source_labels": "distance", "criterion": "ranked"},
    "distance, partial labels": {"source_labels": "distance", "kinds": PARTIAL},
    "class_balanced": {"class_balanced": True},
    "window": {"window": 0.4},
    "drop_conflicting_positives": {"drop_conflicting_positives": True},
    "drop_conflicting_negatives": {"drop_conflicting_negatives": True},
    "drop_conflicting, both": {"drop_conflicting_positives": True, "drop_conflicting_negatives": True},
    "across images": {"across_images": True},
    "across images, partial labels": {"across_images": True, "kinds": PARTIAL},
    "across images, infonce, window": {"across_images": True, "criterion": "infonce", "window": 0.5},
    "a projector per target": {"projector_sharing": "target"},
    "one projector": {"projector_sharing": "all", "channels": dict.fromkeys(NAMES, 3)},
    "thresholds": {"thresholds": {"depth": (0.5, 0.9), "normals": (35.0, 100.0)}},
    "many": {
        "criterion": "semihard",
        "tap": (6, 7),
        "class_balanced": True,
        "drop_conflicting_positives": True,
        "window": 0.7,
        "projector_sharing": "target",
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_agrees_with_reference_and_matters(name):
    options = {"seed": 6, "pixels": 14, "step": 1} | OPTIONS[name]
    case = make_case(**options)
    assert agrees_with_reference(*case) > 15
    facts = {
        key: options[key] for key in ("seed", "pixels", "step", "tap", "kinds", "images", "channels") if key in options
    }
    plain, features, labels, draw, frame = make_case(**facts)
    assert not torch.equal(case[0](*case[1:]).loss, plain(features, labels, draw, frame).loss)


@st.composite
def options_of_any_kind(draw):
    criterion = draw(st.sampled_from(ANY_PIXELS))
    case = draw(cases()) | {
        "criterion": criterion,
        "source_tasks": draw(st.sampled_from(["other", "self", "any", "depth"])),
        "source_labels": draw(st.sampled_from(SOURCE_LABELS)),
        "projector_sharing": draw(st.sampled_from(["pair", "target", "all"])),
        "channels": dict.fromkeys(NAMES, 3),
    }
    case["class_balanced"] = draw(st.booleans()) and case["source_labels"] != "distance"
    if criterion != "ranked":
        case["window"] = draw(st.none() | st.floats(0.2, 1))
        case["drop_conflicting_positives"] = draw(st.booleans())
        case["drop_conflicting_negatives"] = draw(st.booleans())
        case["across_images"] = draw(st.booleans())
    if criterion == "semihard":  # no two pixels with equal features, between which rounding would choose
        case |= {"tap": case["size"], "extra": (0, 0), "hidden": None}
    return case


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(options_of_any_kind())
def test_any_options_agree_with_reference(case):
    agrees_with_reference(*make_case(**case))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(options_of_any_kind().filter(lambda case: case["criterion"] != "ranked"))
def test_with_any_options_no_pair_is_both_and_no_pixel_pairs_with_itself(case):
    positive, negative = relations(*make_case(**case))
    assert not (positive & negative).any()
    for relation in (positive, negative):
        assert torch.equal(relation, relation.transpose(2, 3))
        assert not relation.diagonal(dim1=2, dim2=3).any()


@pytest.mark.parametrize("criterion", ANY_PIXELS)
def test_a_pixel_sampled_twice_is_no_pair_with_itself(criterion):
    """Of one pixel, drawn again and again, there is nothing to learn; nor of two, which have no third."""
    for size in ((1, 1), (1, 2)):
        regularizer, features, labels, draw, frame = make_case(
            names=("semseg", "edge"), size=size, tap=size, pixels=20, criterion=criterion, margin=3.0
        )
        labels = {name: torch.arange(2).view(1, 1, 2)[..., : size[1]].expand(2, *size) for name in labels}
        labels["edge"] = labels["edge"][:, None].float()
        assert regularizer(features, labels, draw, frame).loss == 0
        assert {value for key, value in regularizer.summary().items() if key.endswith("anchors")} == {0.0}


@pytest.mark.parametrize("criterion", ["triplet", "semihard", "ranked"])
def test_identical_features_cost_the_margin(criterion):
    regularizer, features, labels, draw, frame = make_case(
        names=("semseg", "edge"), pixels=12, criterion=criterion, margin=0.7
    )
    output = regularizer({t: torch.full_like(tap, 0.7) for t, tap in features.items()}, labels, draw, frame)
    for loss in (output.loss, *output.losses.values()):
        assert loss.item() == pytest.approx(0.7, abs=1e-5)


@pytest.mark.parametrize("criterion", ANY_PIXELS)
def test_half_precision_and_broken_labels(criterion):
    regularizer, features, labels, draw, frame = make_case(pixels=16, criterion=criterion, source_tasks="depth")
    half = {t: tap.bfloat16().requires_grad_() for t, tap in features.items()}
    broken, void = ({**labels, "depth": labels["depth"].clone()} for _ in range(2))
    broken["depth"][0, :, :3] = math.nan
    broken["depth"][1, :, :3] = math.inf
    void["depth"][:, :, :3] = 0
    got = regularizer(half, broken, draw, frame).loss
    assert got.item() > 0
    assert torch.equal(got, regularizer({t: tap.float() for t, tap in half.items()}, void, draw, frame).loss)
    got.backward()
    for tensor in (*half.values(), *regularizer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, NO_CUDA])


def bits(device, **options):
    regularizer, features, labels, draw, frame = make_case(size=(24, 32), tap=(12, 16), pixels=64, **options)
    leaves = {t: tap.to(device).requires_grad_() for t, tap in features.items()}
    labels = {t: label.to(device) for t, label in labels.items()}
    loss = regularizer.to(device)(leaves, labels, draw.to(device), frame).loss
    loss.backward()
    return [loss, *(tensor.grad for tensor in (*leaves.values(), *regularizer.parameters()))]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "semihard", "class_balanced": True, "drop_conflicting_positives": True, "window": 0.5},
        {"criterion": "ranked", "source_labels": "random", "projector_sharing": "target"},
        {"criterion": "infonce", "across_images": True, "source_tasks": "any"},
    ],
    ids=str,
)
def test_the_same_draw_gives_the_same_bits(device, options):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = bits(device, **options), bits(device, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert first[0] > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- Sources


@pytest.mark.parametrize(
    ("sources", "exclude", "expected"),
    [
        ("other", [], [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]),
        ("any", [], [[0, 1, 2, 3]] * 4),
        ("self", [], [[0], [1], [2], [3]]),
        ("depth", [], [[1], [0, 2, 3], [1], [1]]),
        ("other", ["semseg<-depth", "edge<-semseg", "sal<-depth"], [[2, 3], [0, 2, 3], [0, 1, 3], [1, 2]]),
        ("any", ["semseg<-semseg", "depth<-semseg", "depth<-edge"], [[1, 2, 3], [1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]),
        ("depth", ["depth<-edge"], [[1], [0, 2], [1], [1]]),
    ],
)
def test_sources_are_uniform_among_those_allowed(sources, exclude, expected):
    regularizer = Contrastive(
        make_tasks(), dict.fromkeys(NAMES, 3), num_pixels=1, source_tasks=sources, excluded_pairs=exclude
    )
    assert [c.sources for c in regularizer.comparisons] == expected
    steps = 600
    orders = np.stack([regularizer.sample(step, ["a"]).sources.numpy() for step in range(steps)])  # (steps, T, n)
    for available, drawn in zip(expected, orders.transpose(1, 0, 2)):
        assert all(
            set(order) == set(available) for order in drawn.tolist()
        )  # what an image falls back on is allowed, too
        share = np.bincount(drawn[:, 0], minlength=4)[available] / steps
        assert share == pytest.approx(1 / len(available), abs=0.1)  # 5 standard deviations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_tasks": "others"}, r"source_tasks=others .*other, self, any or a task"),
        ({"source_tasks": "sal"}, r"source_tasks=sal "),  # not in use
        ({"excluded_pairs": ["semseg->depth"]}, r"excluded_pairs: semseg->depth is no pair .*semseg<-depth"),
        ({"excluded_pairs": ["semseg"]}, r"excluded_pairs: semseg is no pair"),
        ({"excluded_pairs": ["depth<-tiefe"]}, r"excluded_pairs: depth<-tiefe"),
        ({"excluded_pairs": [f"edge<-{s}" for s in NAMES]}, r"excluded_pairs leaves edge without a source"),
        ({"source_tasks": "self", "excluded_pairs": ["depth<-depth"]}, r"excluded_pairs leaves depth without"),
        ({"source_tasks": "depth", "excluded_pairs": ["normals<-depth"]}, r"excluded_pairs leaves normals without"),
        ({"source_labels": False}, r"source_labels=False is not known; choose true, other_image, random, distance"),
        ({"source_labels": "distance", "class_balanced": True}, r"class_balanced=true needs labels"),
        ({"criterion": "hinge"}, r"criterion=hinge .*triplet, semihard, ranked, infonce"),
        *(
            (
                {"criterion": "ranked"} | option,
                r"criterion=ranked .*leave out window, drop_conflicting_positives, drop_conflicting_neg.*across_images",
            )
            for option in (
                {"window": 0.0},
                {"drop_conflicting_positives": True},
                {"drop_conflicting_negatives": True},
                {"across_images": True},
            )
        ),
        ({"projector_sharing": "none"}, r"projector_sharing=none .*pair, target or all"),
        ({"projector_sharing": "all"}, r"projector_sharing=all .*equal width"),
        ({"criterion": "infonce", "temperature": 0.02}, r"temperature=0\.02 underflows .* give 0\.025 or more"),
        ({"num_pixels": 0}, r"num_pixels=0 .*1 to 32767"),
        ({"num_pixels": 2**15}, r"num_pixels=32768 "),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        Contrastive(make_tasks(), {name: 2 + i for i, name in enumerate(NAMES)}, **options)


def test_draws_of_targets_with_unequally_many_sources_are_independent():
    allowed = list_allowed_sources(NAMES, "other", ["semseg<-depth"])
    first = np.stack([draw_sources(1, step, allowed)[:, 0].numpy() for step in range(1500)])
    for a, b in ((0, 1), (1, 2), (0, 3)):
        table = np.zeros((4, 4))
        np.add.at(table, (first[:, a], first[:, b]), 1)
        table = table[np.ix_(allowed[a], allowed[b])]
        expected = table.sum() / table.size
        assert ((table - expected) ** 2 / expected).sum() < 32  # at most 8 degrees of freedom: 1 in 10 000


# --- Which labels and pixels


@pytest.mark.parametrize(
    "options", [{}, {"class_balanced": True}, {"criterion": "ranked"}, {"source_tasks": "self"}], ids=str
)
def test_random_labels_are_those_of_another_picture(options):
    regularizer, features, labels, _, frame = make_case(seed=2, images=3, pixels=12, source_labels="random", **options)
    plain = make_case(seed=2, images=3, pixels=12, **options)[0]
    draw = regularizer.sample(4, ["a", "a", "a"])  # the same places in each picture
    moved = {name: label.roll(1, dims=0) for name, label in labels.items()}
    shuffled = regularizer(features, labels, draw, frame).loss
    assert torch.equal(shuffled, plain(features, moved, draw, frame).loss)
    assert not torch.equal(shuffled, plain(features, labels, draw, frame).loss)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 30), st.integers(1, 6), st.sampled_from([0, 0.1, 0.9]))
@example(0, 8, 3, 2, 1)
def test_quotas_share_the_sample_equally_among_the_strata(seed, candidates, count, strata, void):
    """Systematic resampling: among the first m candidates there are, rounded, as many as their weights say."""
    rng = np.random.default_rng(seed)
    stratum = rng.integers(0, strata, (2, 3, candidates)) * 37
    valid = rng.random((2, 3, candidates)) >= void
    sample = balanced_sample(torch.from_numpy(stratum), torch.from_numpy(valid), count)
    assert sample.shape == (2, 3, count)
    for picked, group, ok in zip(sample.reshape(6, -1).numpy(), stratum.reshape(6, -1), valid.reshape(6, -1)):
        if ok.any():
            assert ok[picked].all()
            weight = np.array([ok[i] / (ok & (group == group[i])).sum() if ok[i] else 0.0 for i in range(candidates)])
            assert weight.sum() == pytest.approx(len(set(group[ok])))
        else:
            weight = np.ones(candidates)
        assert (np.diff(picked) >= 0).all()
        for first in range(1, candidates + 1):
            share = count * weight[:first].sum() / weight.sum()
            assert abs((picked < first).sum() - share) <= 0.5 + 1e-3


def test_quotas_bring_rare_classes_up():
    """Where a fiftieth of a picture is an edge, half of the sampled pixels are."""
    regularizer, features, labels, *_ = make_case(
        names=("semseg", "edge"), size=(40, 50), pixels=100, class_balanced=True
    )
    labels["edge"] = torch.zeros(2, 1, 40, 50)
    labels["edge"][:, :, :, 20] = 1
    draw = regularizer.sample(0, ["a", "b"])
    assert draw.pixels.shape == (2, 800, 2)
    negative = relations(regularizer, features, labels, draw, (40, 50)).negative[0]  # of semseg, by edges: (B, K, K)
    assert negative.shape == (2, 100, 100)
    assert (negative.sum(dim=2) - 50).abs().max() <= 8
    uniform = make_case(names=("semseg", "edge"), size=(40, 50), pixels=100)
    assert relations(*uniform[:2], labels, *uniform[3:]).negative[0].sum(dim=2).median() < 10


def test_pairs_lie_within_the_window():
    case = make_case(size=(12, 16), pixels=40, window=0.25)
    positive, negative = relations(*case)
    pixels = case[3].pixels
    apart = (pixels[:, :, None] - pixels[:, None]).abs().amax(dim=-1)  # (B, K, K)
    assert ((positive | negative) & (apart <= 0.25)).any()
    assert not ((positive | negative) & (apart > 0.25)).any()
    everywhere = make_case(size=(12, 16), pixels=40)
    wide = make_case(size=(12, 16), pixels=40, window=1.0)
    assert torch.equal(everywhere[0](*everywhere[1:]).loss, wide[0](*wide[1:]).loss)


@pytest.mark.parametrize("positives", [False, True])
@pytest.mark.parametrize("negatives", [False, True])
def test_a_targets_own_labels_take_back_pairs_only_where_they_have_a_say(positives, negatives):
    options = {"names": ("semseg", "edge"), "size": (8, 8), "pixels": 40}
    regularizer, features, labels, draw, frame = make_case(
        drop_conflicting_positives=positives, drop_conflicting_negatives=negatives, **options
    )
    plain = make_case(**options)[0]
    alike, same = (relations(r, features, labels, draw, frame) for r in (plain, regularizer))
    row, column = pixel_index(draw.pixels, (8, 8))
    images = torch.arange(2)[:, None]
    for t, label in enumerate((labels["semseg"], labels["edge"][:, 0])):
        values = label[images, row, column]
        both = (values[:, :, None] != 255) & (values[:, None] != 255)
        equal = values[:, :, None] == values[:, None]
        assert (alike.positive[t] & both & ~equal).any()
        assert (alike.negative[t] & both & equal).any()
        assert torch.equal(same.positive[t], alike.positive[t] & ~(both & ~equal) if positives else alike.positive[t])
        assert torch.equal(same.negative[t], alike.negative[t] & ~(both & equal) if negatives else alike.negative[t])


def test_across_images_only_labels_of_one_source_compare():
    kinds = {"semseg": ["random", "random", "void"], "depth": ["void", "random", "random"], "edge": ["random"] * 3}
    regularizer, features, labels, draw, frame = make_case(
        names=tuple(kinds), kinds=kinds, images=3, pixels=10, across_images=True
    )
    draw = draw._replace(sources=torch.tensor([[1, 2], [0, 2], [0, 1]]))  # of edge: semseg, else depth
    positive, negative = relations(regularizer, features, labels, draw, frame)
    assert positive.shape == (3, 1, 30, 30)
    by_image = draw.order.argsort()
    pairs = (positive | negative)[2, 0][by_image][:, by_image].view(3, 10, 3, 10).any(dim=3).any(dim=1)
    assert pairs.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    agrees_with_reference(regularizer, features, labels, draw, frame)


def test_choices_are_uniform_over_images():
    regularizer, features, labels, _, frame = make_case(
        names=("semseg", "edge"), size=(40, 50), images=4, pixels=32, across_images=True
    )
    count = torch.zeros(2, 4)
    for step in range(20):
        draw = regularizer.sample(step, ["a", "b", "c", "d"])
        image = draw.order // 32
        for row, relation in zip(count, relations(regularizer, features, labels, draw, frame)):
            index, has_one = sample_related(relation[0, 0])  # by edges
            row += torch.bincount(((image[index] - image) % 4)[has_one], minlength=4)
    assert (count / count.sum(dim=1, keepdim=True) - 0.25).abs().max() < 0.04  # independent ones: deviation 0.01


def test_choices_are_uniform_over_pixels_that_balancing_repeats():
    regularizer, features, labels, _, frame = make_case(
        names=("depth", "semseg"), size=(40, 50), images=2, pixels=64, class_balanced=True
    )
    labels["semseg"] = torch.zeros(2, 40, 50, dtype=torch.int64)
    labels["semseg"][:, :16] = 1
    labels["semseg"][:, 39, :40] = 2  # 2 % of the image, a third of the pixels
    chosen = 0.0
    for step in range(20):
        draw = regularizer.sample(step, ["a", "b"])
        with mock.patch.object(regularizer, "select_pairs", wraps=regularizer.select_pairs) as spy:
            regularizer(features, labels, draw, frame)
        pixels = spy.call_args.args[0]
        index, _ = sample_related(regularizer.select_pairs(*spy.call_args.args).negative[0])
        classes = pixels.label[0, ..., 0].long()
        chosen += (classes.gather(1, index)[classes == 0] == 2).float().mean().item() / 20
    assert chosen == pytest.approx(0.5, abs=0.08)


# --- Projectors


@pytest.mark.parametrize(("share", "projectors"), [("pair", 16), ("target", 4), ("all", 1)])
@pytest.mark.parametrize("hidden", [None, 5])
def test_projectors_are_shared_as_asked(share, projectors, hidden):
    channels = dict.fromkeys(NAMES, 3)
    regularizer = make_case(channels=channels, projector_sharing=share, hidden=hidden)[0]
    each = 3 * 4 + 4 if hidden is None else 3 * 5 + 5 + 5 * 4 + 4
    assert sum(p.numel() for p in regularizer.parameters()) == projectors * each
    fresh = make_case(seed=1, channels=channels, projector_sharing=share, hidden=hidden)[0]
    fresh.load_state_dict(regularizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), regularizer.parameters(), strict=True))


# --- How much the contrast weighs


def test_a_gradient_share_makes_the_norms_at_the_taps_equal():
    regularizer, features, labels, draw, frame = make_case(pixels=16)
    leaves = {t: tap.requires_grad_() for t, tap in features.items()}
    task = sum(10**i * leaf.square().mean() for i, leaf in enumerate(leaves.values()))
    losses = regularizer(leaves, labels, draw, frame).losses
    share = GradientNormWeight(regularizer.task_names)
    assert share.weighted_sum(losses) == 0  # nothing measured yet
    untrained = {"untrained": leaves["depth"].detach()}
    norms_before = compare_feature_gradients(task, sum(losses.values()), leaves | untrained)
    assert "untrained/norm_task" not in norms_before
    assert compare_feature_gradients(task, sum(losses.values()), untrained) == {}
    with pytest.raises(UserError, match=r"nothing that is trained comes before that of depth .*weighting=fixed"):
        share.measure(task, losses, leaves | {"depth": untrained["untrained"]})
    share.update(*({t: norms_before[f"{t}/norm_{kind}"] for t in leaves} for kind in ("task", "regularizer")))
    norms_after = compare_feature_gradients(task, share.weighted_sum(losses), leaves)
    for t in leaves:
        assert norms_before[f"{t}/norm_regularizer"].item() != pytest.approx(
            norms_before[f"{t}/norm_task"].item(), rel=0.1
        )
        assert norms_after[f"{t}/norm_regularizer"].item() == pytest.approx(
            norms_before[f"{t}/norm_task"].item(), rel=1e-5
        )


def test_a_gradient_share_is_a_running_mean_of_what_could_be_measured():
    names = ["a", "b", "c", "d"]
    task = [[2.0, 0.0, 3.0, 1.0], [4.0, 6.0, math.inf, 1.0], [1.0, 0.0, 2.0, math.nan], [8.0, 1.0, 5.0, 1.0]]
    contrast = [[1.0, 1.0, 0.0, 4.0], [1.0, 2.0, 1.0, 1.0], [4.0, 3.0, 4.0, 1.0], [2.0, 0.0, 5.0, math.nan]]
    share = GradientNormWeight(names, momentum=0.75)
    expected = dict.fromkeys(names, 0.0)
    for task_gradient, ours in zip(task, contrast):
        for name, a, b in zip(names, task_gradient, ours):
            if 0 < a < math.inf and 0 < b < math.inf:
                expected[name] = 0.75 * expected[name] + 0.25 * a / b if expected[name] else a / b
        values = ({n: torch.tensor(v) for n, v in reversed(list(zip(names, norms)))} for norms in (task_gradient, ours))
        share.update(*values)
        assert share.factor.tolist() == pytest.approx(list(expected.values()))
    losses = {name: torch.tensor(float(i + 1)) for i, name in enumerate(names)}
    assert share.weighted_sum(losses).item() == pytest.approx(sum((i + 1) * expected[n] for i, n in enumerate(names)))


def test_weight_rises_and_ends():
    assert [Lambda(0.5, 10)(step) for step in (0, 9, 10)] == [0.5, 0.5, 0]
    ramped = Lambda(0.5, 8, warmup_steps=2, stop_fraction=0.5)
    assert [ramped(step) for step in range(8)] == [0.25, 0.5, 0.5, 0.5, 0, 0, 0, 0]
    assert all(Lambda(0.5, 8, stop_fraction=0)(step) == 0 for step in range(8))
    late = Lambda(0.5, 10, warmup_steps=2, start_fraction=0.25, stop_fraction=0.8)
    assert [late(step) for step in range(10)] == [0, 0, 0, 0.25, 0.5, 0.5, 0.5, 0.5, 0, 0]


def test_late_start_measures_at_its_first_step_and_ends_after_it_began():
    dry = composed("regularizer=pseudo_labels", "regularizer.warmup_steps=5", "trainer.dry_run=true")
    dry_lambda = build_lambda(dry, None, None, torch.device("cpu"))
    assert [dry_lambda(step) for step in (0, dry.trainer.max_steps + 1)] == [1.0, 1.0], "it measures the costly steps"
    late = Lambda(0.5, 8, start_fraction=0.375, gradient_norm_weight=GradientNormWeight(["depth"], every=2))
    assert [step for step in range(8) if late(step) and late.measures_gradients(step)] == [3, 5, 7]
    with pytest.raises(UserError, match=r"start_fraction=0\.6 must not be above stop_fraction=0\.5"):
        Lambda(0.5, 8, start_fraction=0.6, stop_fraction=0.5)


GRADIENT = [
    *TINY,
    "backbone.name=test_resnet",
    "schedule=constant",
    "trainer.validate_first=false",
    "trainer.num_panels=0",
    "trainer.val_interval=null",
    "trainer.checkpoint_interval=null",
    "data.limit=5",
    "tasks.names=[semseg,depth,normals]",
    "regularizer.weighting=gradient_norm",
    "regularizer.options.criterion=semihard",
    "regularizer.options.class_balanced=true",
    "regularizer.options.excluded_pairs=['semseg<-depth']",
]


def run(folder, *overrides):
    train(composed(*GRADIENT, *overrides), folder)
    return read_checkpoint_file(folder / "checkpoints" / "last.pt")


def contrast_log(folder):
    records_read = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records_read if record["kind"] == "regularizer"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_cap_bounds_the_factors_and_leaves_what_is_measured():
    free, capped = (GradientNormWeight(["a", "b"], cap=cap) for cap in (None, 5.0))
    losses = {"a": torch.tensor(1.0), "b": torch.tensor(10.0)}
    for weight in (free, capped):
        weight.update(
            {"a": torch.tensor(3.0), "b": torch.tensor(40.0)}, {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
        )
    assert free.weighted_sum(losses) == 3 * 1 + 20 * 10
    assert capped.weighted_sum(losses) == 3 * 1 + 5 * 10
    assert torch.equal(free.factor, capped.factor)
    config = composed(*TINY, "regularizer.weighting_cap=7")
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False)
    regularizer = build_regularizer(config, tasks, model)
    assert build_lambda(config, regularizer, model, torch.device("cpu")).gradient_norm_weight.cap == 7


def test_a_factor_per_pair_makes_each_pair_s_gradient_that_of_the_task():
    regularizer, features, labels, draw, frame = make_case(pixels=16, all_sources=True, targets=["depth", "normals"])
    leaves = {t: x.requires_grad_() for t, x in features.items()}
    task = sum(10**i * leaf.square().mean() for i, leaf in enumerate(leaves.values()))
    losses = regularizer(leaves, labels, draw, frame).losses
    targets = [c.target for c in regularizer.comparisons]
    weight = GradientNormWeight(list(losses), targets=targets)
    weight.measure(task, losses, leaves)
    for i, (name, target) in enumerate(zip(losses, targets)):
        (of_task,) = torch.autograd.grad(task, leaves[target], retain_graph=True)
        (of_pair,) = torch.autograd.grad(losses[name], leaves[target], retain_graph=True)
        assert weight.factor[i].item() == pytest.approx((of_task.norm() / of_pair.norm()).item(), rel=1e-5)
    expected = sum(f * loss / 3 for f, loss in zip(weight.factor, losses.values()))
    torch.testing.assert_close(weight.weighted_sum(losses), expected)


def build_contrast(*overrides):
    config = composed(*TINY, *overrides)
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False)
    return config, model, build_regularizer(config, tasks, model)


def test_the_norms_at_the_heads_weights_are_those_of_both_gradients_there():
    config, model, regularizer = build_contrast("regularizer.weighting=head_gradient_norm", "decoder=multi_head")
    lambda_ = build_lambda(config, regularizer, model, torch.device("cpu"))
    image = torch.randn(2, 3, 32, 32)
    features = model(image).features["final"]
    task = sum(10**i * x.square().mean() for i, x in enumerate(features.values()))
    contrast = {name: x.abs().mean() for name, x in features.items()}
    lambda_.update(task, contrast, features)
    for i, name in enumerate(features):
        (weight, *_) = [p for n, p in model.named_parameters() if f"heads.{name}." in n and p.ndim == 4]
        (of_task,) = torch.autograd.grad(task, weight, retain_graph=True)
        (of_contrast,) = torch.autograd.grad(contrast[name], weight, retain_graph=True)
        factor = lambda_.gradient_norm_weight.factor[i]
        assert factor.item() == pytest.approx((of_task.norm() / of_contrast.norm()).item(), rel=1e-4)


def test_the_contrast_trains_the_heads_alone_on_request(tmp_path):
    """The shared parameters' gradients are those without contrast, the heads' those with it."""
    options = ["optimizer=sgd", "optimizer.momentum=0", "optimizer.weight_decay=0", "trainer.clip_norm=null"]
    options += ["trainer.max_steps=1", "regularizer.weighting=fixed", "regularizer.weight=3"]
    none, full, heads = (
        run(tmp_path / name, *options, *overrides)["model"]
        for name, overrides in {
            "none": ["regularizer=none"],
            "full": [],
            "heads": ["regularizer.detach_trunk=true"],
        }.items()
    )
    model = build_contrast(*GRADIENT)[1]
    shared = {id(p) for p in model.shared_parameters()}
    own_names = {name for name, p in model.named_parameters() if id(p) not in shared}
    assert own_names
    for name, _ in model.named_parameters():
        torch.testing.assert_close(heads[name], (full if name in own_names else none)[name], msg=name)
    assert any(not torch.equal(none[name], full[name]) for name in own_names)
    assert any(not torch.equal(none[name], full[name]) for name in none.keys() - own_names)


def test_gradient_balance_in_training(tmp_path, monkeypatch):
    """The ratio of the two gradients is the weight; a run that was cut between two measurements goes on as if not."""
    monkeypatch.setattr("mtcl.config.build_training.GradientNormWeight", partial(GradientNormWeight, every=2))
    overrides = ["regularizer.weight=0.3", "regularizer.stop_fraction=0.75"]
    uncut = run(tmp_path / "whole", *overrides, "trainer.max_steps=4")
    log = contrast_log(tmp_path / "whole")
    targets = {key.split("/")[1] for key in log[0] if key.startswith("gradient/")}
    assert targets == {"semseg", "depth", "normals"}
    for t in targets:
        task_norm, ours = log[0][f"gradient/{t}/norm_task"], log[0][f"gradient/{t}/norm_regularizer"]
        assert ours == pytest.approx(0.3 * task_norm, rel=1e-2)
    assert not any("semseg<-depth" in key for record in log for key in record)
    assert [any(key.startswith("gradient/") for key in record) for record in log] == [True, True, True, False]

    cut = run(tmp_path / "cut", "regularizer.weight=0.3", "trainer.max_steps=1")
    assert (cut["share"]["factor"] > 0).any()
    resumed = run(tmp_path / "cut", *overrides, "trainer.max_steps=4", "resume=auto")
    for part in ("model", "regularizer", "share"):
        assert equal(uncut[part], resumed[part])
    assert not equal(cut["share"], resumed["share"])


def test_gradient_balance_of_weight_zero_is_bit_equal_to_none(tmp_path):
    zero = run(tmp_path / "zero", "regularizer.weight=0", "trainer.max_steps=2")
    none = [word for word in GRADIENT if "regularizer" not in word]
    train(composed(*none, "regularizer=none", "trainer.max_steps=2"), tmp_path / "none")
    assert equal(zero["model"], read_checkpoint_file(tmp_path / "none" / "checkpoints" / "last.pt")["model"])
    assert not zero["share"]["factor"].any()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["regularizer.weighting=gradients"], r"regularizer\.weighting=gradients .*choose fixed, gradient_norm"),
        (
            ["regularizer=mtpsl", "regularizer.weighting=gradient_norm"],
            r"weighting=gradient_norm is for regularizer=contrastive",
        ),
        (["regularizer=mtpsl", "regularizer.weighting_cap=7"], r"regularizer\.weighting_cap=7 .*weighting_cap=null"),
        (["regularizer=jtr", "regularizer.options.stride=33"], r"stride=33 .*the 32 pixels .*data\.size=\[32,64\]"),
        (["regularizer.options.source_labels=random", "data.batch_size=1"], r"source_labels=random .*another image"),
        (
            ["regularizer.options.source_labels=other_image", "data.views_per_step=2"],
            r"source_labels=other_image .*set data\.views_per_step=1",
        ),
        (
            ["regularizer.options.source_labels=other_image", "data.batch_size=1"],
            r"other_image takes labels of another",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(overrides, message):
    config = composed(*TINY, "backbone.name=test_resnet", *overrides)
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False)
    with pytest.raises(UserError, match=message):
        build_lambda(config, build_regularizer(config, tasks, model), model, torch.device("cpu"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("excluded_pairs", "semseg<-depth"),
        ("excluded_pairs", [["semseg<-depth"]]),
        ("window", 1.5),
        ("temperature", 0),
        ("drop_conflicting_positives", 1),
        ("drop_conflicting_negatives", "both"),
    ],
)
def test_values_of_another_kind_are_refused(option, value):
    with pytest.raises(UserError, match=rf"regularizer\.options\.{option}=.* must be "):
        check_config({"regularizer": {"options": {option: value}}})
