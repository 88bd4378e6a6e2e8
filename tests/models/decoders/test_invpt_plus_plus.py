"""InvPT++: both attentions against loops over queries, heads, tasks and keys; what is InvPT's; the contract."""

import math
from functools import partial

import pytest
import torch
from helpers import decoder_checks as checks
from helpers.attention_loops import looped_attention
from helpers.decoder_checks import CHANNELS, PASCAL, PYRAMID, TASKS, VIT, features

from mtcl import UserError
from mtcl.models.decoders import InvPT, InvPTPlusPlus
from mtcl.models.decoders.invpt import SpatialNorm, TaskAttention, upsample_scores
from mtcl.models.decoders.invpt_plus_plus import CROSS_SCALE, SelectiveAttention, as_ratio, select_keys

FRACTION = 0.3  # of 8 keys: 3


def make(channels, strides, tasks, **options):
    return InvPTPlusPlus(channels, strides, tasks, **{"width": 12, "prediction_width": 4, **options})


def make_stages(cross_scale):
    """The attentions of two stages, in evaluation mode, with batch norms that do something."""
    torch.manual_seed(0)
    kinds = {"fusion": TaskAttention}
    for name in ("selective", "both"):
        kinds[name] = partial(SelectiveAttention, key_fraction=FRACTION, also_fuses=name == "both")
    stages = [
        kinds[cross_scale](["a", "b"], width, heads=2, pool=pool, fuses_scores=pool > 2).eval()
        for width, pool in ((4, 2), (6, 4))
    ]
    for module in stages:
        for norm in (m for m in module.modules() if isinstance(m, SpatialNorm)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return stages


@pytest.mark.parametrize("cross_scale", CROSS_SCALE)
@pytest.mark.parametrize("size", [(4, 8), (5, 6)])
def test_attention_is_that_of_loops(cross_scale, size):
    first, second = make_stages(cross_scale)
    coarse = torch.randn(2, 2, math.ceil(size[0] / 2), math.ceil(size[1] / 2), 4) * 3
    fine = torch.randn(2, 2, *size, 6) * 3
    fraction = None if cross_scale == "fusion" else FRACTION
    with torch.no_grad():
        results = [first(coarse, None)]
        results.append(second(fine, results[0][1]))
        expected = [[looped_attention(first, x, None, fraction) for x in coarse]]
        expected.append([looped_attention(second, x, s, fraction) for x, (_, s) in zip(fine, expected[0])])
    for pair, images in zip(results, expected, strict=True):
        for got, loops in zip(pair, zip(*images), strict=True):
            torch.testing.assert_close(got, torch.stack(loops), rtol=1e-4, atol=1e-5)


def test_the_previous_scores_alone_choose_the_keys():
    """Values of keys that were not selected change nothing; those of selected keys do."""
    _, second = make_stages("selective")
    x = torch.randn(1, 2, 4, 8, 6)
    scores = torch.zeros(1, 2, 2, 1, 2, 4)
    scores[..., 1], scores[..., 2] = 2.0, 1.0  # two of four keys: the first task's right half, the second's left one
    with torch.no_grad():
        output, _ = second(x, scores)
        for task, columns, matters in ((0, slice(0, 4), False), (0, slice(4, 8), True), (1, slice(4, 8), False)):
            # A change that the norm of queries would feel, too: only the other task's queries are compared.
            changed = x.clone()
            changed[:, task, :, columns] += 1.0
            difference = (second(changed, scores)[0] - output)[:, 1 - task].abs().max()
            assert (difference > 1e-3) == matters, (task, columns)


def test_all_keys_selected_is_attention_without_a_previous_stage():
    _, second = make_stages("selective")
    second.key_ratio = (1, 1)
    x, scores = torch.randn(1, 2, 4, 8, 6), torch.randn(1, 2, 2, 1, 2, 4)
    with torch.no_grad():
        for got, expected in zip(second(x, scores), second(x, None), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("fraction", "number"), [(1e-6, 1), (1e-9, 1), (0.25, 2), (0.26, 3), (0.625, 5), (1.0, 8)])
def test_number_of_selected_keys(fraction, number):
    scores = torch.randn(2, 3, 5, 8)
    mask = select_keys(scores, as_ratio(fraction))
    assert mask.sum(dim=-1).eq(number).all()
    assert (scores.masked_fill(~mask, math.inf).amin(-1) >= scores.masked_fill(mask, -math.inf).amax(-1)).all()
    assert select_keys(torch.zeros(1, 8), as_ratio(fraction)).sum() == number, "equal scores"


def test_fractions_are_those_that_are_meant():
    assert [as_ratio(value) for value in (0.25, 0.1, 1 / 3, 1.0)] == [(1, 4), (1, 10), (1, 3), (1, 1)]


def test_scores_of_selected_keys_and_older_ones_go_on():
    _, second = make_stages("selective")
    scores = torch.randn(1, 2, 2, 1, 2, 4)
    with torch.no_grad():
        passed = second(torch.randn(1, 2, 4, 8, 6), scores)[1]
    older = upsample_scores(scores, (2, 4))
    assert passed.eq(older).equal(~select_keys(older, as_ratio(FRACTION)))


def test_fusion_is_invpt():
    sizes = (CHANNELS, VIT, TASKS)
    torch.manual_seed(0)
    plain = InvPT(*sizes, width=12, prediction_width=4).eval()
    torch.manual_seed(0)
    decoder = make(*sizes, cross_scale="fusion").eval()
    assert decoder.state_dict().keys() == plain.state_dict().keys()
    maps = features((64, 96), VIT)
    with torch.no_grad():
        predictions, expected = decoder.predict(maps, (64, 96)), plain.predict(maps, (64, 96))
    assert all(predictions[task].equal(expected[task]) for task in TASKS)


def test_parameters_are_those_of_invpt():
    """Selection alone lacks the two convolutions of scores: 8 weights and 2 biases each."""
    sizes = ([1024] * 4, VIT, PASCAL)
    with torch.device("meta"):
        plain = checks.parameters(InvPT(*sizes))
        counts = {kind: checks.parameters(InvPTPlusPlus(*sizes, cross_scale=kind)) for kind in CROSS_SCALE}
    assert counts == {"fusion": plain, "both": plain, "selective": plain - 2 * 10}


@pytest.mark.parametrize("cross_scale", ["selective", "both"])
@pytest.mark.parametrize("tasks", [("depth",), tuple(TASKS)])
@pytest.mark.parametrize("strides", [PYRAMID, VIT])
def test_any_tasks_on_any_backbone(tasks, strides, cross_scale):
    # One task has two keys here: of a single selected key, no score would learn.
    make_decoder = partial(make, cross_scale=cross_scale, key_fraction=0.75)
    checks.check_shapes(make_decoder, tasks, strides, batch=1, training=True)


@pytest.mark.parametrize("cross_scale", ["selective", "both"])
def test_bf16(cross_scale):
    checks.check_bf16(partial(make, cross_scale=cross_scale))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_scale": "sparse"}, "cross_scale=sparse must be one of fusion, selective, both"),
        ({"key_fraction": 0}, "key_fraction=0 must be above 0"),
        ({"key_fraction": 1.5}, r"key_fraction=1\.5 must be above 0 and at most 1"),
        ({"heads": 3}, r"heads=3 must divide the widths of the stages \[16, 8, 4\]"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        make(CHANNELS, VIT, TASKS, **options)
