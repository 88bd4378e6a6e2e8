"""Weights of sources: draws and means in proportion, the estimate against a slow reference, and what is refused."""

import logging

import numpy as np
import pytest
import torch
from helpers.common import TINY, composed
from helpers.contrast_reference import NAMES, make_label, make_tasks, reference_right_orders

from mtcl import UserError
from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_lambda, build_regularizer
from mtcl.config.schema import check_config
from mtcl.regularizers import Contrastive, source_weights
from mtcl.regularizers.sampling import draw_pixels, draw_sources
from mtcl.training.checkpoint_file import read_checkpoint_file

IDS, K, SIZE = ["a", "b", "c"], 12, (7, 8)
WEIGHTS = {"semseg": {"depth": 3, "normals": 1}, "depth": {"semseg": 0.5}, "normals": {"edge": 0, "depth": 2}}


def build(names=NAMES, **options):
    return Contrastive(make_tasks(names), dict.fromkeys(names, 3), seed=3, num_pixels=K, **options)


def make_labels(seed, kinds=None):
    rng = np.random.default_rng(seed)
    kinds = kinds or dict.fromkeys(NAMES, ["random"] * 3)
    return {name: make_label(name, kinds[name], SIZE, rng) for name in NAMES}


def observe(regularizer, steps, kinds=None):
    for step in steps:
        regularizer.observe_labels(make_labels(step, kinds), regularizer.sample(step, IDS))


def test_the_first_of_any_subset_is_drawn_in_proportion_to_its_weight():
    allowed, weights = [[0, 1, 2, 3], [1, 2]], [[5, 3, 0, 2], [1, 0]]
    orders = torch.stack([draw_sources(1, step, allowed, weights) for step in range(2000)]).tolist()
    for subset in ({0, 1, 3}, {0, 3}, {1, 3}):  # those that an image has labels of
        first = [next(s for s in order if s in subset) for order, _ in orders]
        for s in subset:
            expected = weights[0][s] / sum(weights[0][i] for i in subset)
            assert first.count(s) / len(first) == pytest.approx(expected, abs=0.05)  # 4 standard deviations
    assert {s for order, _ in orders for s in order} == {0, 1, 3}
    assert {s for _, order in orders for s in order} == {1}


def test_pairs_without_a_weight_are_left_out():
    regularizer = build(source_weights=WEIGHTS, targets=["semseg", "depth", "normals"])
    assert [c.sources for c in regularizer.comparisons] == [[1, 2], [0], [1]]
    drawn = torch.stack([regularizer.sample(step, ["a"]).sources[:, 0] for step in range(400)])
    assert (drawn[:, 0] == 1).double().mean().item() == pytest.approx(0.75, abs=0.1)
    every = build(source_weights=WEIGHTS, targets=["semseg", "depth", "normals"], all_sources=True)
    assert [c.name for c in every.comparisons] == [
        "semseg<-depth",
        "semseg<-normals",
        "depth<-semseg",
        "normals<-depth",
    ]


def test_losses_of_a_target_are_averaged_with_the_weights():
    regularizer = build(source_weights=WEIGHTS, targets=["semseg", "depth", "normals"], all_sources=True)
    losses = torch.tensor([1.0, 2.0, 30.0, 400.0], requires_grad=True)
    output = regularizer.combine(losses, torch.tensor([True, True, False, True]))
    assert output.loss.item() == pytest.approx(((3 * 1 + 1 * 2) / 4 + 400) / 2)
    output.loss.backward()
    assert losses.grad.tolist() == pytest.approx([3 / 8, 1 / 8, 0, 1 / 2])
    assert regularizer.combine(losses, torch.zeros(4, dtype=torch.bool)).loss == 0
    only_one = regularizer.combine(losses, torch.tensor([False, True, False, False]))
    assert only_one.loss.item() == pytest.approx(2.0)


def test_gradient_norm_weighting_uses_the_weights():
    config = composed(
        *TINY,
        "backbone.name=test_resnet",
        "regularizer.weighting=gradient_norm",
        "regularizer.options.all_sources=true",
        "regularizer.options.targets=[depth]",
        "regularizer.options.source_weights={depth:{normals:3,edge:1}}",
    )
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False)
    lambda_ = build_lambda(config, build_regularizer(config, tasks, model), model, torch.device("cpu"))
    lambda_.gradient_norm_weight.factor.copy_(torch.tensor([2.0, 10.0]))
    losses = {"depth<-normals": torch.tensor(1.0), "depth<-edge": torch.tensor(1.0)}
    assert lambda_.rescale(torch.tensor(0.0), losses).item() == pytest.approx(0.75 * 2 + 0.25 * 10)


def test_the_estimate_is_that_of_the_reference():
    regularizer = build(source_weights="auto", source_weight_batches=2)
    plain = build()
    observe(regularizer, range(2))
    expected = np.zeros((4, 4))
    for t, target in enumerate(NAMES):
        for s, source in enumerate(NAMES):
            share = {}
            for kind in ("source", "other_image"):
                counts = [
                    reference_right_orders(
                        kind, target, source, make_labels(step), regularizer.thresholds, draw_pixels(3, step, IDS, K)
                    )
                    for step in range(2)
                ]
                right, total = np.sum(counts, axis=0)
                share[kind] = right / total
            expected[t, s] = max(share["source"] - share["other_image"], 0)
    for comparison, row in zip(regularizer.comparisons, regularizer.source_weights.rows):
        information = expected[NAMES.index(comparison.target), comparison.sources]
        assert row == pytest.approx(information if information.any() else np.ones(3), abs=0.06)
    observe(regularizer, [2])  # the weights are fixed
    assert regularizer.source_weights.num_observed == 2
    assert any(not torch.equal(regularizer.sample(s, IDS).sources, plain.sample(s, IDS).sources) for s in range(9))


def test_sources_are_drawn_as_without_weights_until_they_are_estimated():
    regularizer, plain = build(source_weights="auto", source_weight_batches=3), build()
    observe(regularizer, range(2))
    for step in range(5):
        for a, b in zip(regularizer.sample(step, IDS), plain.sample(step, IDS), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("cut", [1, 3])
def test_an_estimate_continues_from_its_state(cut):
    uncut = build(source_weights="auto", source_weight_batches=3, all_sources=True)
    resumed = build(source_weights="auto", source_weight_batches=3, all_sources=True)
    observe(uncut, range(cut))
    resumed.load_state_dict(uncut.state_dict())
    for regularizer in (uncut, resumed):
        observe(regularizer, range(cut, 4))
    assert resumed.source_weights.rows == uncut.source_weights.rows is not None
    assert torch.equal(resumed.read_share(), uncut.read_share())
    assert not torch.equal(uncut.read_share(), build(source_weights="auto", all_sources=True).read_share())
    fresh = build(source_weights="auto", all_sources=True)
    fresh.load_state_dict(build().state_dict())  # of a training without an estimate
    assert fresh.source_weights.count == 0


def test_labels_of_all_processes_make_one_estimate(monkeypatch):
    other = build(source_weights="auto", source_weight_batches=1)
    observe(other, [7])
    monkeypatch.setattr(source_weights, "all_reduce_sum", lambda sums: sums + other.source_weights.sums)
    both = build(source_weights="auto", source_weight_batches=1)
    observe(both, [8])
    monkeypatch.undo()
    one = build(source_weights="auto", source_weight_batches=2)
    observe(one, [8])
    one.observe_labels(make_labels(7), other.sample(7, IDS))
    assert torch.equal(both.source_weights.sums, one.source_weights.sums)
    assert both.source_weights.rows == one.source_weights.rows


def test_one_label_per_image_gives_uniform_draws_and_one_warning(caplog):
    kinds = {name: ["random" if i == k % 4 else "void" for k in range(3)] for i, name in enumerate(NAMES)}
    regularizer, plain = (build(source_weights=x, source_weight_batches=2) for x in ("auto", None))
    with caplog.at_level(logging.INFO):
        observe(regularizer, range(4), kinds)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "semseg or depth or normals or edge" in record.message
    assert "scripts/label_agreement.py" in record.message
    assert "{target: {source: weight}}" in record.message
    assert regularizer.source_weights.rows == [[1.0] * 3] * 4
    assert [c.sources for c in regularizer.comparisons] == [c.sources for c in plain.comparisons]


def test_a_pair_that_no_image_measures_has_the_mean_weight_and_a_target_that_none_informs_equal_ones(caplog):
    regularizer = build(source_weights="auto", source_weight_batches=1)
    shares = torch.full((4, 9), 0.5)
    shares[0, 1], shares[0, 2], shares[0, 3] = 0.75, torch.nan, 0.625  # semseg <- depth, normals, edge
    shares[1, 0], shares[2, 0] = 0.6, 0.7
    regularizer.source_weights.sums.copy_(torch.stack([shares.T, torch.ones(9, 4)], dim=-1))
    regularizer.source_weights._fix(is_logged=True)
    assert regularizer.source_weights.rows[0] == pytest.approx([0.25, 0.1875, 0.125])
    assert regularizer.source_weights.rows[3] == [1.0, 1.0, 1.0]
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "source_weights=auto: no source says more about edge than the layout of images does, so its sources are drawn "
        "uniformly; leave it out with targets"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_weights": "measured"}, r"source_weights=measured must be auto or a mapping"),
        ({"source_weights": {"tiefe": {"depth": 1}}}, r"source_weights names tiefe, which is no task; .*semseg, depth"),
        ({"source_weights": {"semseg": {"tiefe": 1}}}, r"source_weights names tiefe"),
        ({"source_weights": {"semseg": {"depth": -1}}}, r"source_weights\.semseg\.depth=-1 must be .* at least 0"),
        ({"source_weights": {"semseg": {"semseg": 1}}}, r"source_weights\.semseg\.semseg=1 is of a pair that source_"),
        (
            {"source_weights": {"semseg": {"edge": 1}}, "excluded_pairs": ["semseg<-edge"]},
            r"source_weights\.semseg\.edge=1 is of a pair that source_tasks or excluded_pairs rule out",
        ),
        ({"source_weights": WEIGHTS}, r"source_weights leaves edge without a source; .*leave it out of targets"),
        ({"source_weights": {"depth": {"semseg": 0}}, "targets": ["depth"]}, r"source_weights leaves depth without"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)


def test_tasks_that_are_not_in_use_may_have_weights():
    regularizer = build(
        ("semseg", "depth"), source_weights={"semseg": {"depth": 1, "normals": 2}, "depth": {"semseg": 1}}
    )
    assert [c.sources for c in regularizer.comparisons] == [[1], [0]]


@pytest.mark.parametrize("value", ["none", 1, ["semseg"], {"semseg": 1}, {"semseg": {"depth": "much"}}])
def test_values_of_another_kind_are_refused(value):
    with pytest.raises(UserError, match=r"regularizer\.options\.source_weights=.* must be auto or a mapping"):
        check_config({"regularizer": {"options": {"source_weights": value}}})


def test_an_estimate_needs_two_images_in_a_batch():
    config = composed(
        *TINY, "backbone.name=test_resnet", "regularizer.options.source_weights=auto", "data.batch_size=1"
    )
    tasks = build_tasks(config)
    with pytest.raises(UserError, match=r"source_weights=auto .*data\.batch_size of 2 or more"):
        build_regularizer(config, tasks, build_model(config, tasks, pretrained=False))


@pytest.mark.slow
def test_the_printed_weights_can_be_used(cli):
    result = cli("scripts/label_agreement.py", "--images", "6", "--pixels", "64", *TINY)
    overrides = [line.strip("'") for line in result.out.splitlines() if "regularizer.options." in line]
    assert overrides[0].startswith("regularizer.options.source_weights={")
    assert "regularizer=contrastive" in result.out.splitlines()
    config = composed(*TINY, "backbone.name=test_resnet", *overrides)
    tasks = build_tasks(config)
    regularizer = build_regularizer(config, tasks, build_model(config, tasks, pretrained=False))
    assert all(min(row) > 0 for row in regularizer.source_weights.rows)


@pytest.mark.slow
def test_a_run_that_was_cut_during_the_estimate_continues_bit_exactly(tmp_path):
    options = [*TINY, "backbone.name=test_resnet", "schedule=constant", "trainer.validate_first=false", "data.limit=6"]
    options += ["trainer.num_panels=0", "trainer.val_interval=null", "trainer.checkpoint_interval=null"]
    options += ["regularizer.options.source_weights=auto", "regularizer.options.source_weight_batches=3"]

    def run(folder, *overrides):
        train(composed(*options, *overrides), folder)
        return read_checkpoint_file(folder / "checkpoints" / "last.pt")

    uncut = run(tmp_path / "uncut", "trainer.max_steps=6")
    run(tmp_path / "cut", "trainer.max_steps=2")
    resumed = run(tmp_path / "cut", "trainer.max_steps=6", "resume=auto")
    uniform = run(tmp_path / "uniform", "trainer.max_steps=6", "regularizer.options.source_weights=null")
    for part in ("model", "regularizer"):
        assert uncut[part].keys() == resumed[part].keys()
        assert all(torch.equal(uncut[part][key], resumed[part][key]) for key in uncut[part])
    assert any(not torch.equal(uncut["model"][key], uniform["model"][key]) for key in uncut["model"])
