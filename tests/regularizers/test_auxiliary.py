"""Auxiliary heads (regularizer=auxiliary): the loss against a slow reference, its draws, what it may touch."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.common import TINY, composed
from helpers.contrast_reference import (
    KINDS,
    NAMES,
    has_losses,
    make_case,
    make_label,
    make_tasks,
    ref_label,
    ref_places,
    ref_weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_lambda, build_regularizer
from mtcl.errors import UserError
from mtcl.regularizers import AuxiliaryHeads
from mtcl.regularizers.weighting import GradientNormWeight
from mtcl.training.checkpoint_file import read_checkpoint_file


def make(seed=0, kinds=None, images=2, pixels=7, hidden=5, step=0, **options):
    """(regulariser, features, labels, draw, frame); ``kinds``: see :func:`make_case`."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    channels = {name: 2 + i for i, name in enumerate(NAMES)}
    kinds = kinds or {name: ["random"] * images for name in NAMES}
    labels = {name: make_label(name, kinds[name], (6, 7), rng) for name in NAMES}
    features = {name: torch.randn(images, channels[name], 3, 4, generator=generator) for name in NAMES}
    regularizer = AuxiliaryHeads(make_tasks(), channels, seed=seed, num_pixels=pixels, hidden_dim=hidden, **options)
    return regularizer, features, labels, regularizer.sample(step, [str(i) for i in range(images)]), (8, 8)


def ref_pixel_loss(task, prediction, value):
    """The loss of one pixel, by its formula, times the task's weight."""
    if task.name == "semseg":
        loss = prediction.exp().sum().log() - prediction[value]
    elif task.name == "depth":
        loss = (prediction[0] - value).abs()
    elif task.name == "normals":
        loss = (prediction / prediction.norm() - torch.tensor(value, dtype=torch.float64)).abs().sum()
    else:
        probability = 1 / (1 + (-prediction[0]).exp())
        loss = -0.95 * probability.log() if value == 1 else -0.05 * (1 - probability).log()
    return task.weight * loss


def reference(regularizer, features, labels, draw, frame):
    """(loss, comparison -> loss, gradients of the features and the parameters), pixel by pixel."""
    leaves = {t: feature.double().requires_grad_() for t, feature in features.items()}
    twins = {id(p): p.detach().double().requires_grad_() for p in regularizer.parameters()}
    losses, with_label = {}, []
    for row, (name, target) in enumerate((c.name, c.target) for c in regularizer.comparisons):
        terms = []
        for image in range(len(draw.pixels)):
            places = ref_places(draw.pixels[image], labels["depth"].shape[-2:])
            read = {s: [ref_label(s, labels[s], image, spot) for spot in places] for s in NAMES}
            order = [NAMES[s] for s in draw.sources[row].tolist()]
            source = next((s for s in order if any(v is not None for v in read[s])), order[0])
            for spot, value in zip(places, read[source], strict=True):
                if value is None:
                    continue
                x = leaves[target][image].flatten(1) @ ref_weights(spot, (3, 4), frame)
                head, output = regularizer.heads[target], NAMES.index(source)
                for number, (weight, bias) in enumerate(zip(head.weights, head.biases)):
                    x = (x.clamp(min=0) if number else x) @ twins[id(weight)][output] + twins[id(bias)][output, 0]
                task = regularizer.tasks[source]
                terms.append(ref_pixel_loss(task, x[: task.channels], value))
        losses[name] = torch.stack(terms).mean() if terms else leaves[target].sum() * 0
        with_label += [losses[name]] if terms else []
    total = torch.stack(with_label).mean() if with_label else sum(losses.values())
    tensors = [*leaves.values(), *twins.values()]
    gradients = torch.autograd.grad(total, tensors, allow_unused=True)
    return total, losses, [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, gradients)]


def agrees_with_reference(regularizer, features, labels, draw, frame):
    want, want_losses, want_gradients = reference(regularizer, features, labels, draw, frame)
    return has_losses(regularizer, (features, labels, draw, frame), want, want_losses, want_gradients)


ALL_SOURCES = {  # as in the study of one label per image
    "all_sources": True,
    "targets": ["semseg", "depth", "normals"],
    "excluded_pairs": ["semseg<-edge", "depth<-edge", "normals<-edge"],
}


@pytest.mark.parametrize(
    "options", [{}, {"hidden": None}, {"source_tasks": "self"}, {"source_tasks": "normals"}, ALL_SOURCES], ids=str
)
def test_loss_and_gradients_are_the_reference_s(options):
    output = agrees_with_reference(*make(seed=1, pixels=12, images=3, **options))
    assert all(loss > 0 for loss in output.losses.values())


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 10**6),
    st.fixed_dictionaries({name: st.lists(st.sampled_from(KINDS), min_size=3, max_size=3) for name in NAMES}),
    st.integers(1, 8),
    st.integers(0, 50),
)
def test_partial_labels_are_the_reference_s(seed, kinds, pixels, step):
    for options in ({}, ALL_SOURCES):
        agrees_with_reference(*make(seed=seed, kinds=kinds, images=3, pixels=pixels, step=step, **options))


def test_without_any_label_the_loss_is_zero_with_a_graph():
    regularizer, features, labels, draw, frame = make(kinds={name: ["void"] * 2 for name in NAMES})
    leaves = {t: feature.requires_grad_() for t, feature in features.items()}
    output = regularizer(leaves, labels, draw, frame)
    output.loss.backward()
    assert output.loss == 0
    tensors = [*leaves.values(), *regularizer.parameters()]
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in tensors)
    assert regularizer.summary() == {}


def test_draws_are_those_of_the_contrast():
    ours, contrast = make(seed=4)[0], make_case(seed=4)[0]
    for step in range(3):
        a, b = (regularizer.sample(step, ["a", "b"]) for regularizer in (ours, contrast))
        assert torch.equal(a.sources, b.sources)
        assert torch.equal(a.pixels, b.pixels)


def test_gradient_reaches_the_features_and_the_drawn_heads_only():
    regularizer, features, labels, draw, frame = make(pixels=20)
    leaves = {t: feature.requires_grad_() for t, feature in features.items()}
    start = {key: value.clone() for key, value in regularizer.state_dict().items()}
    optimizer = regularizer.build_optimizer(lr=0.1, weight_decay=0.1)
    regularizer(leaves, labels, draw, frame).losses["depth"].backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None and leaf.grad.any()] == ["depth"]
    optimizer.step()
    for key, value in regularizer.state_dict().items():
        moved = (value != start[key]).flatten(1).any(dim=1)
        drawn = torch.arange(4) == draw.sources[NAMES.index("depth"), 0]
        assert torch.equal(moved, drawn & key.startswith("heads.depth")), key


def test_summary_is_the_mean_loss_of_each_drawn_pair():
    regularizer, features, labels, draw, frame = make(pixels=12)
    losses = regularizer(features, labels, draw, frame).losses
    regularizer(features, labels, draw, frame)
    summary = regularizer.summary()
    pairs = {f"{name}<-{NAMES[draw.sources[t, 0]]}/loss": losses[name].item() for t, name in enumerate(NAMES)}
    assert summary == pytest.approx(pairs)
    assert regularizer.summary() == {}


def test_heads_learn_what_the_source_says():
    """A head that is trained alone fits the classes of the few pixels, one feature vector each."""
    regularizer, features, labels, draw, _ = make(pixels=40, hidden=16, source_tasks="semseg")
    optimizer = torch.optim.Adam(regularizer.parameters(), lr=0.02)
    features["depth"] = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(200):
        loss = regularizer(features, labels, draw, (6, 7)).losses["depth"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_one_compiled_graph_serves_every_draw():
    regularizer, features, labels, _, frame = make(pixels=12)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(regularizer, fullgraph=True, backend="eager")
    for step in range(4):
        draw = regularizer.sample(step, [f"{step}", "b"])
        leaves = {t: feature.clone().requires_grad_() for t, feature in features.items()}
        loss, eager = compiled(leaves, labels, draw, frame).loss, regularizer(leaves, labels, draw, frame).loss
        torch.testing.assert_close(loss, eager)
        got, want = (torch.autograd.grad(x, list(leaves.values())) for x in (loss, eager))
        torch.testing.assert_close(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_what_a_user_may_get_wrong():
    with pytest.raises(UserError, match="at least two tasks"):
        AuxiliaryHeads(make_tasks(("depth",)), {"depth": 4})
    with pytest.raises(UserError, match=r"source_tasks=others is not known"):
        AuxiliaryHeads(make_tasks(), dict.fromkeys(NAMES, 4), source_tasks="others")


def run(folder, *overrides):
    config = composed(*TINY, "trainer.max_steps=3", "trainer.val_interval=null", *overrides)
    train(config, folder)
    return read_checkpoint_file(folder / "checkpoints" / "last.pt"), config


@pytest.mark.parametrize("labels", [pytest.param("full", marks=pytest.mark.slow), "one"])
def test_training_takes_steps(labels, tmp_path):
    state, config = run(tmp_path, "regularizer=auxiliary", f"data.label_assignment={labels}")
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False)
    regularizer = build_regularizer(config, tasks, model)
    assert isinstance(regularizer, AuxiliaryHeads)
    lambda_ = build_lambda(config, regularizer, model, torch.device("cpu"))
    assert isinstance(lambda_.gradient_norm_weight, GradientNormWeight)
    assert state["model"].keys() == model.state_dict().keys()
    assert any(not torch.equal(value, state["regularizer"][key]) for key, value in regularizer.state_dict().items())
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    values = {key: value for record in records if record["kind"] == "regularizer" for key, value in record.items()}
    assert any(key.endswith("/loss") and "<-" in key and math.isfinite(value) for key, value in values.items())


@pytest.mark.slow
def test_weight_zero_is_bit_equal_to_none(tmp_path):
    zero = run(tmp_path / "zero", "regularizer=auxiliary", "regularizer.weight=0")[0]["model"]
    none = run(tmp_path / "none", "regularizer=none")[0]["model"]
    on = run(tmp_path / "on", "regularizer=auxiliary")[0]["model"]
    assert all(torch.equal(zero[key], none[key]) for key in none)
    assert any(not torch.equal(on[key], none[key]) for key in none)
