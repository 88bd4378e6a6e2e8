"""Pixels at which the prediction of the target is wrong, against slow loops over candidates."""

import numpy as np
import pytest
import torch
from helpers.contrast_reference import NAMES, make_case, make_tasks, ref_distance, ref_label, ref_places
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtcl import UserError
from mtcl.regularizers import mispredicted
from mtcl.regularizers.sampling import pixel_index


def make_predictions(seed, size, images=2, layout=torch.contiguous_format):
    """Raw predictions, of which some are near the labels' values."""
    generator = torch.Generator().manual_seed(seed)
    channels = {"semseg": 3, "depth": 1, "normals": 3, "edge": 1}
    raw = {name: torch.randn(images, c, *size, generator=generator) for name, c in channels.items()}
    raw["depth"] = raw["depth"] + 1.4
    raw["normals"] = raw["normals"] * torch.tensor([1.0, 0.1, 1.0])[:, None, None]
    return {name: x.contiguous(memory_format=layout) for name, x in raw.items()}


def ref_candidates(wrong, count, fraction):
    """The indices of the chosen candidates, ``m`` of ``n`` of a kind at equal steps."""
    bad = [i for i, w in enumerate(wrong) if w]
    good = [i for i, w in enumerate(wrong) if not w]
    from_bad = min(len(bad), round(fraction * count))
    from_good = min(len(good), count - from_bad)
    from_bad = count - from_good
    chosen = []
    for kind, m in ((bad, from_bad), (good, from_good)):
        n = len(kind)
        chosen += [kind[r] for r in range(n) if (r + 1) * m // n > r * m // n]
    return sorted(chosen)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 30), st.floats(0, 1), st.sampled_from([0, 0.1, 0.6, 1]))
@example(0, 8, 24, 0.5, 0.1)
def test_candidates_are_the_reference_s(seed, count, more, fraction, rate):
    wrong = np.random.default_rng(seed).random((2, 3, count + more)) < rate
    quota = round(fraction * count)
    chosen = mispredicted.choose_candidates(torch.from_numpy(wrong), count, quota)
    assert chosen.shape == (2, 3, count)
    for row, index in zip(wrong.reshape(6, -1), chosen.reshape(6, -1).tolist(), strict=True):
        assert index == ref_candidates(row, count, fraction)
        assert len(set(index)) == count
        num_wrong = row.sum()
        assert row[index].sum() >= min(quota, num_wrong)
        if len(row) - num_wrong >= count - quota:
            assert row[index].sum() == min(quota, num_wrong)


def test_both_kinds_are_spread_over_the_candidates():
    wrong = torch.arange(400) % 20 == 0  # a twentieth
    chosen = mispredicted.choose_candidates(wrong, 100, 50)
    assert wrong[chosen].sum() == 20
    for part in chosen.view(4, 25):
        assert 4 <= wrong[part].sum() <= 6


@pytest.mark.parametrize("name", NAMES)
def test_a_raw_prediction_says_what_its_decoded_map_says(name):
    task = make_tasks()[name]
    raw = make_predictions(1, (5, 6))[name]
    decoded = torch.from_numpy(np.stack([task.decode(x) for x in raw])).float().reshape(2, 30, -1)
    if name == "edge":
        decoded = (decoded > 0.5).float()
    got = task.embed_label(task.to_label(raw.flatten(2).mT))
    torch.testing.assert_close(got, task.embed_label(decoded))


def ref_wrong(regularizer, target, labels, predictions, image, places):
    """Return whether the prediction of each place is further from its label than a positive pair's labels may be."""
    task, wrong = regularizer.tasks[target], []
    for row, column in places:
        value = ref_label(target, labels[target], image, (row, column))
        raw = predictions[target][image, :, row, column].double()
        if target == "semseg":
            predicted = int(raw.argmax())
        elif target == "edge":
            predicted = float(1 / (1 + (-raw[0]).exp()) > 0.5)
        else:
            predicted = raw.tolist() if target == "normals" else max(raw.item(), 1e-6)
        wrong.append(
            value is not None and ref_distance(task.name, value, predicted) > regularizer.thresholds[target][0]
        )
    return wrong


CASES = {
    "half": {},
    "all": {"mispredicted_fraction": 1.0},
    "across images": {"across_images": True, "mispredicted_fraction": 0.3},
    "ranked, thresholds": {"criterion": "ranked", "thresholds": {"depth": (0.5, 0.9), "normals": (35.0, 100.0)}},
    "infonce, distance": {"criterion": "infonce", "source_labels": "distance"},
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_the_contrast_is_that_of_the_chosen_pixels(name, layout):
    """For each target, a plain regulariser that draws the reference's choice has the same loss and gradient."""
    options = {"mispredicted_fraction": 0.5} | CASES[name]
    size = (9, 10)
    regularizer, features, labels, draw, frame = make_case(seed=3, size=size, pixels=12, step=1, **options)
    fraction = options.pop("mispredicted_fraction")
    predictions = make_predictions(3, size, layout=layout)
    leaves = {t: x.requires_grad_() for t, x in features.items()}
    output = regularizer(leaves, labels, draw, frame, predictions)
    assert draw.pixels.shape[1] == 4 * 12
    candidates_wrong = 0
    for i, target in enumerate(NAMES):
        chosen = []
        for image, candidates in enumerate(draw.pixels):
            wrong = ref_wrong(regularizer, target, labels, predictions, image, ref_places(candidates, size))
            index = ref_candidates(wrong, 12, fraction)
            chosen.append(candidates[index])
            candidates_wrong += sum(wrong)
        plain = make_case(seed=3, size=size, pixels=12, targets=[target], **options)[0]
        reduced = draw._replace(sources=draw.sources[[i]], pixels=torch.stack(chosen))
        want = plain(leaves, labels, reduced, frame).losses[target]
        assert output.losses[target].item() == pytest.approx(want.item(), rel=1e-5)
        got_gradient, want_gradient = (
            torch.autograd.grad(loss, leaves[target], retain_graph=True)[0] for loss in (output.losses[target], want)
        )
        torch.testing.assert_close(got_gradient, want_gradient)
    assert want.item() > 0
    assert 0 < candidates_wrong < 4 * 2 * 48


def test_all_sources_of_a_target_have_the_same_wrong_pixels():
    regularizer, features, labels, draw, frame = make_case(
        size=(9, 10), pixels=12, all_sources=True, mispredicted_fraction=0.5
    )
    predictions = make_predictions(0, (9, 10))
    output = regularizer(features, labels, draw, frame, predictions)
    drawn = make_case(size=(9, 10), pixels=12, source_tasks="depth", mispredicted_fraction=0.5)[0]
    drawn.load_state_dict(regularizer.state_dict())
    sources = drawn.sample(0, ["0", "1"]).sources
    single = drawn(features, labels, draw._replace(sources=sources), frame, predictions).losses
    for target in ("semseg", "normals", "edge"):
        torch.testing.assert_close(output.losses[f"{target}<-depth"], single[target])


def test_void_pixels_and_broken_predictions_are_not_wrong():
    regularizer, _, labels, draw, _ = make_case(size=(9, 10), pixels=12, mispredicted_fraction=0.5)
    predictions = make_predictions(0, (9, 10))
    predictions["depth"][0] = torch.nan
    labels["normals"][:, :, :, :5] = 0
    pixels = regularizer.label_reader.read(labels, draw, regularizer.target, (9, 10))
    limits = regularizer.embedded_thresholds[regularizer.target, 0]
    wrong = mispredicted.find_mispredicted(pixels, predictions, regularizer.target_tasks, limits)
    assert not wrong[1, 0].any()
    assert wrong[1, 1].any()
    row, column = pixel_index(draw.pixels, (9, 10))
    assert not wrong[2][column < 5].any()
    assert wrong[2][column >= 5].any()
    image = torch.arange(2)[:, None]
    assert not wrong[0][labels["semseg"][image, row, column] == 255].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_balanced": True}, r"mispredicted_fraction=0\.5 chooses pixels, and so does class_balanced"),
        ({"criterion": "boundary"}, r"criterion=boundary takes all pairs .*leave out .*mispredicted_fraction"),
        ({"mispredicted_fraction": 1.5}, r"mispredicted_fraction=1\.5 must be from 0 to 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_case(**{"mispredicted_fraction": 0.5} | options)


def test_without_predictions_it_says_so():
    regularizer, *case = make_case(mispredicted_fraction=0.5)
    with pytest.raises(UserError, match=r"mispredicted_fraction=0\.5 needs the model's predictions"):
        regularizer(*case)
