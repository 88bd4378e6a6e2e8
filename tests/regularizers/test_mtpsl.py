"""Cross-task consistency (regularizer=mtpsl): the loss against an obvious reference, its draws, what it may touch."""

import copy
import json
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers.common import TINY, composed
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_regularizer
from mtcl.errors import UserError
from mtcl.models.base import DenseOutput
from mtcl.regularizers import CrossTaskConsistency
from mtcl.regularizers.map_encoding import encode_label, encode_prediction
from mtcl.regularizers.mtpsl import FilmLayer, choose_sources, encode_map
from mtcl.regularizers.task_loss import TaskLossOptions
from mtcl.tasks import build_task
from mtcl.training.checkpoint_file import read_checkpoint_file

NAMES = ("semseg", "depth", "normals", "edge")
CLASSES = ("a", "b", "c")


def see_label(task, label):
    """Encode a label as the mapping reads it."""
    return encode_map(task, encode_label(task, label))


def see_prediction(task, x):
    """Encode raw predictions as the mapping reads them."""
    return encode_map(task, encode_prediction(task, x))


def make_tasks(names=NAMES):
    return {name: build_task(name, **({"class_names": CLASSES} if name == "semseg" else {})) for name in names}


def make_case(seed=0, size=(24, 40), frame=(32, 64), batch=3, unlabelled=(), void=0.3, **options):
    """A regulariser with something in every FiLM, an output, labels of which ``unlabelled`` (task, image) are void."""
    g = torch.Generator().manual_seed(seed)
    tasks = make_tasks()
    options = {"stride": 2, "widths": [4, 5], **options}
    regularizer = CrossTaskConsistency(tasks, dict.fromkeys(NAMES, 6), seed=seed, **options)
    with torch.no_grad():
        for name, p in regularizer.named_parameters():
            if name.rpartition(".")[2] in ("scale", "shift", "gamma", "beta"):
                p.add_(torch.randn(p.shape, generator=g), alpha=0.3)
    predictions = {n: torch.randn(batch, t.channels, *size, generator=g).mul(3) for n, t in tasks.items()}
    trunk = torch.rand(batch, 6, frame[0] // 4, frame[1] // 4, generator=g)
    labels = {
        "semseg": torch.randint(0, 3, (batch, *size), generator=g),
        "depth": torch.rand(batch, 1, *size, generator=g) * 6 + 0.5,
        "normals": F.normalize(torch.randn(batch, 3, *size, generator=g), dim=1),
        "edge": torch.rand(batch, 1, *size, generator=g).round(),
    }
    for name, label in labels.items():
        void_pixels = torch.rand(batch, *size, generator=g) < void
        void_pixels[:, :8, :8] = True  # a whole cell
        for task, image in unlabelled:
            void_pixels[image] |= task == name
        label.copy_(torch.where(void_pixels if label.ndim == 3 else void_pixels[:, None], tasks[name].void, label))
    output = DenseOutput(predictions, {"trunk": dict.fromkeys(NAMES, trunk)}, [], frame)
    return regularizer, output, labels


def in_double(regularizer, output):
    """Copies for a reference in float64."""
    features = {"trunk": {name: x.detach().double() for name, x in output.features["trunk"].items()}}
    predictions = {name: x.double() for name, x in output.predictions.items()}
    return copy.deepcopy(regularizer).double(), output._replace(predictions=predictions, features=features)


def map_one(regularizer, x, task, pair):
    """One map (1, c, h, w) through the mapping, as in the authors' code: a batch norm of one image, then FiLM."""

    def layer(x, m, row=None):
        x = F.batch_norm(F.conv2d(x, m.weight, padding=1), None, None, m.scale, m.shift, training=True)
        if row is not None:
            x = x * m.gamma[row].view(1, -1, 1, 1) + m.beta[row].view(1, -1, 1, 1)
        return x.clamp(min=0)

    x = layer(x.to(regularizer.stems[task].weight), regularizer.stems[task])
    layers = iter(regularizer.mapping.layers)
    for level in range(3):
        for _ in range(2 if level < 2 else 3):
            x = layer(x, next(layers), pair)
        x = F.max_pool2d(x, 2, ceil_mode=True)
    assert not list(layers)
    return x


def map_cells(regularizer, output, labels, target, source, image):
    """The mapped prediction, the mapped label and the feature of each labelled cell, by loops over cells of pixels."""
    tasks, (height, width), n = regularizer.tasks, output.frame, regularizer.stride
    size = labels["semseg"].shape[-2:]
    valid = tasks[target].valid(labels[target])[image]

    def cell(i, j, step):
        rows, columns = range(i * step, min((i + 1) * step, height)), range(j * step, min((j + 1) * step, width))
        return list(product(rows, columns))

    def inside(pixels):
        return [(y, x) for y, x in pixels if y < size[0] and x < size[1]]

    def cells(of, step):
        h, w = -(-height // step), -(-width // step)
        return torch.stack([torch.stack([of(i, j) for j in range(w)], dim=-1) for i in range(h)], dim=-2)[None]

    raw, label = output.predictions[source][image], see_label(tasks[target], labels[target])[image]

    def mean_prediction(i, j):
        pixels = cell(i, j, n)
        return sum((raw[:, y, x] for y, x in inside(pixels)), start=torch.zeros(len(raw))) / len(pixels)

    def mean_label(i, j):
        pixels = [(y, x) for y, x in inside(cell(i, j, n)) if valid[y, x]]
        return sum((label[:, y, x] for y, x in pixels), start=torch.zeros(len(label))) / max(len(pixels), 1)

    s, t = NAMES.index(source), NAMES.index(target)
    pair = t * 3 + [k for k in range(4) if k != t].index(s)
    a = map_one(regularizer, see_prediction(tasks[source], cells(mean_prediction, n)), source, pair)
    b = map_one(regularizer, cells(mean_label, n), target, pair)
    feature = output.features["trunk"][target][image]
    f = F.adaptive_avg_pool2d(feature, a.shape[-2:])[None]
    return [
        (a[0, :, i, j], b[0, :, i, j], f[0, :, i, j])
        for i, j in product(range(a.shape[2]), range(a.shape[3]))
        if any(valid[y, x] for y, x in inside(cell(i, j, n * 8)))
    ]


def reference_pair(regularizer, output, labels, target, source, image):
    """L_st in one image, after its three terms."""
    losses = []
    for u, v, w in map_cells(regularizer, output, labels, target, source, image):
        apart = [1 - F.cosine_similarity(p, q, dim=0) for p, q in ((u, v), (u, w), (v, w))]
        losses.append(torch.stack([*apart, apart[0] + regularizer.image_weight * (apart[1] + apart[2])]))
    return sum(losses) / len(losses)


def reference_spreads(regularizer, output, labels, target, source, images):
    """The root mean squared distance of a pair's unit vectors from their mean, of predictions and of labels."""
    cells = [c for i in images for c in map_cells(regularizer, output, labels, target, source, i)]
    spreads = []
    for side in (0, 1):
        vectors = [F.normalize(cell[side], dim=0) for cell in cells]
        mean = sum(vectors) / len(vectors)
        spreads.append((sum((v - mean).square().sum() for v in vectors) / len(vectors)).sqrt())
    return spreads


@pytest.mark.parametrize(("size", "frame"), [((24, 40), (32, 64)), ((32, 32), (32, 32)), ((30, 34), (30, 34))])
def test_loss_of_all_pairs_against_loops(size, frame):
    regularizer, output, labels = make_case(size=size, frame=frame, batch=1, num_sources=3, image_weight=0.7)
    result = regularizer.compute_loss(output, labels, regularizer.sample(0, ["a"]))
    summary = regularizer.summary()
    total = 0.0
    for target in NAMES:
        want = {s: reference_pair(regularizer, output, labels, target, s, 0) for s in NAMES if s != target}
        torch.testing.assert_close(result.losses[target], sum(w[3] for w in want.values()), rtol=1e-4, atol=1e-5)
        total += result.losses[target]
        for source, values in want.items():
            for name, value in zip(("apart", "source_image", "target_image"), values.tolist()):
                assert summary.pop(f"{target}<-{source}/{name}") == pytest.approx(value, rel=1e-3, abs=1e-5)
    assert all(name.endswith("_spread") for name in summary)
    assert not regularizer.summary()
    torch.testing.assert_close(result.loss, total)


def test_partial_labels_teach_the_other_tasks():
    """Images with semseg only, with semseg and depth, and with nothing: the unlabelled tasks are the sources."""
    missing = [(n, 0) for n in NAMES[1:]] + [(n, 1) for n in NAMES[2:]] + [(n, 2) for n in NAMES]
    regularizer, output, labels = make_case(unlabelled=missing, num_sources=3)
    result = regularizer.compute_loss(output, labels, regularizer.sample(0, ["a", "b", "c"]))

    def pairs(target, *sources):
        return sum(reference_pair(regularizer, output, labels, target, s, i)[3] for s, i in sources) / 3

    want = pairs("semseg", *((s, 0) for s in NAMES[1:]), *((s, 1) for s in NAMES[2:]))
    torch.testing.assert_close(result.losses["semseg"], want, rtol=1e-4, atol=1e-5)
    want = pairs("depth", *((s, 1) for s in NAMES[2:]))
    torch.testing.assert_close(result.losses["depth"], want, rtol=1e-4, atol=1e-5)
    assert result.losses["normals"] == result.losses["edge"] == 0


def test_the_mapping_works_on_the_second_views():
    """Against loops in float64 over the rows from the middle on; the first views get no gradient."""
    missing = [("semseg", 2), ("normals", 1), ("edge", 3), ("depth", 3)]
    options = {"num_sources": 3, "source_rule": "any", "size": (16, 32), "frame": (16, 32)}
    regularizer, output, labels = make_case(batch=4, unlabelled=missing, **options)
    regularizer.task_loss = TaskLossOptions(views_per_step=2, views="first")
    for prediction in output.predictions.values():
        prediction.requires_grad_()
    result = regularizer.compute_loss(output, labels, regularizer.sample(0, ["a", "b", "a#1", "b#1"]))
    double = in_double(regularizer, output)
    for target in NAMES:
        images = [i for i in (2, 3) if (target, i) not in missing]
        want = sum(reference_pair(*double, labels, target, s, i)[3] for i in images for s in NAMES if s != target) / 2
        assert result.losses[target].item() == pytest.approx(want.item(), rel=1e-4)
    result.loss.backward()
    for prediction in output.predictions.values():
        assert not prediction.grad[:2].any()
        assert all(row.any() for row in prediction.grad[2:])


def test_the_guard_against_loops():
    """The hinges of all pairs, in float64; pairs count by the images that have them."""
    missing = [(n, 0) for n in NAMES[1:]] + [("edge", 1)]
    options = {"batch": 2, "unlabelled": missing, "num_sources": 3, "size": (16, 32), "frame": (16, 32)}
    regularizer, output, labels = make_case(**options, variance_weight=0.6, min_spread=0.75)
    plain, *_ = make_case(**options)
    draw = regularizer.sample(0, "ab")
    result, without = (r.compute_loss(output, labels, draw) for r in (regularizer, plain))
    summary, double = regularizer.summary(), in_double(regularizer, output)
    total = torch.zeros((), dtype=torch.float64)
    for target, hinges in ((t, torch.zeros((), dtype=torch.float64)) for t in NAMES):
        for source in (s for s in NAMES if s != target):
            pairs = [(target, i) not in missing and (source, i) in missing for i in (0, 1)]
            if any(pairs):
                spreads = reference_spreads(*double, labels, target, source, [i for i in (0, 1) if pairs[i]])
                hinges = hinges + sum((0.75 - s).clamp(min=0) for s in spreads) * sum(pairs) / 2
                for side, spread in zip(("source", "target"), spreads):
                    assert summary[f"{target}<-{source}/{side}_spread"] == pytest.approx(spread.item(), abs=1e-4)
        difference = result.losses[target] - without.losses[target]
        assert difference.item() == pytest.approx(0.6 * hinges.item(), rel=1e-3, abs=1e-5)
        total = total + 0.6 * hinges
    assert total > 0.1
    parameters = list(regularizer.parameters())
    gradients = torch.autograd.grad(result.loss, parameters)
    others = torch.autograd.grad(without.loss, list(plain.parameters()))
    want = torch.autograd.grad(total, list(double[0].parameters()), allow_unused=True)
    for one, two, three in zip(gradients, others, want):
        expected = torch.zeros_like(one) if three is None else three.float()
        torch.testing.assert_close(one - two, expected, rtol=1e-3, atol=1e-4)
    assert sum(w is not None and bool(w.any()) for w in want) > 5


def collapse(regularizer, output, gamma=0.0):
    """Let every pixel of every pair map to (nearly) one vector, which is the image's feature, too."""
    with torch.no_grad():
        last = regularizer.mapping.layers[-1]
        last.gamma.fill_(gamma)
        last.beta.fill_(1.0)
        last.scale.fill_(1.0)
        last.shift.fill_(0.0)
        output.features["trunk"]["depth"].fill_(3.0)


def test_a_collapsed_mapping_has_no_loss_without_the_guard():
    losses = []
    for weight in (0.0, 0.5):
        regularizer, output, labels = make_case(num_sources=3, variance_weight=weight, min_spread=0.2)
        collapse(regularizer, output)
        losses.append(regularizer.compute_loss(output, labels, regularizer.sample(0, "abc")).loss.item())
    assert losses[0] == pytest.approx(0, abs=1e-5)
    assert losses[1] == pytest.approx(0.5 * 12 * 2 * 0.2, rel=0.02)  # 12 pairs, 2 sides


def test_the_guard_leads_out_of_a_collapse():
    regularizer, output, labels = make_case(num_sources=3, variance_weight=1.0, min_spread=0.5)
    collapse(regularizer, output, gamma=0.01)
    optimizer = torch.optim.SGD(regularizer.parameters(), lr=0.02)
    spreads = []
    for step in range(6):
        result = regularizer.compute_loss(output, labels, regularizer.sample(step, "abc"))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        spreads.append(min(v for name, v in regularizer.summary().items() if name.endswith("_spread")))
    assert spreads[0] < 0.02
    assert spreads == sorted(spreads)
    assert spreads[-1] > 2 * spreads[0]


def test_a_collapse_is_logged_once(caplog):
    regularizer, output, labels = make_case(num_sources=3, min_spread=0.05)
    regularizer.compute_loss(output, labels, regularizer.sample(0, "abc"))
    regularizer.summary()
    assert not caplog.records
    collapse(regularizer, output)
    for step in range(2):
        regularizer.compute_loss(output, labels, regularizer.sample(step, "abc"))
        regularizer.summary()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "spread is 0.001, below min_spread=0.05; raise variance_weight (0), e.g. to 1" in record.getMessage()


def test_drawn_sources_estimate_all_of_them():
    """The mean over the draws of one source per target is the loss over all pairs."""
    regularizer, output, labels = make_case(num_sources=1)
    full, *_ = make_case(num_sources=3)
    want = full.compute_loss(output, labels, full.sample(0, "abc")).losses
    draw = regularizer.sample(0, "abc")
    with torch.no_grad():
        results = [
            regularizer.compute_loss(output, labels, draw._replace(sources=draw.sources.roll(k, 1))) for k in range(3)
        ]
    for name in NAMES:
        torch.testing.assert_close(sum(f.losses[name] for f in results) / 3, want[name].detach())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_choice_of_sources(data):
    tasks, images = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 4))
    count = data.draw(st.integers(1, tasks - 1))
    rule = data.draw(st.sampled_from(["auto", "any", "unlabelled"]))
    labelled = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=images, max_size=images),
                                               min_size=tasks, max_size=tasks)))  # fmt: skip
    order = torch.stack([torch.tensor(data.draw(st.permutations([s for s in range(tasks) if s != t])))
                         for t in range(tasks)])  # fmt: skip
    source, weight = choose_sources(order, labelled, count, rule)
    assert source.shape == weight.shape == (tasks, count, images)
    for t, b in product(range(tasks), range(images)):
        free = rule == "any" or (rule == "auto" and bool(labelled[:, b].all()))
        could = [s for s in order[t].tolist() if labelled[t, b] and (free or not labelled[s, b])]
        assert [s for s, w in zip(source[t, :, b].tolist(), weight[t, :, b]) if w > 0] == could[:count]
        assert weight[t, :, b].sum().item() == pytest.approx(len(could))


def test_gradients_reach_predictions_and_mapping_but_not_the_feature():
    regularizer, output, labels = make_case(num_sources=3)
    trunk = output.features["trunk"]["depth"].requires_grad_()
    for prediction in output.predictions.values():
        prediction.requires_grad_()
    regularizer.compute_loss(output, labels, regularizer.sample(0, "abc")).loss.backward()
    assert trunk.grad is None
    for name, p in [*output.predictions.items(), *regularizer.named_parameters()]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name
    assert all(row.any() for row in regularizer.mapping.layers[0].gamma.grad)  # every pair has its own


def test_gradient_against_loops():
    """Of one pair in one image, with respect to the source's prediction and to the mapping."""
    missing = [(name, i) for name in NAMES for i in range(3) if (name, i) != ("normals", 1)]
    regularizer, output, labels = make_case(unlabelled=missing)
    draw = regularizer.sample(0, "abc")
    source = NAMES[draw.sources[NAMES.index("normals"), 0]]
    leaves = [output.predictions[source].requires_grad_(), *regularizer.parameters()]
    gradients = torch.autograd.grad(regularizer.compute_loss(output, labels, draw).loss, leaves)
    # Drawn from three, which it stands for; one image of three.
    value = reference_pair(regularizer, output, labels, "normals", source, 1)[3] * 3 / 3
    want = torch.autograd.grad(value, leaves, allow_unused=True)
    for leaf, one, two in zip(leaves, gradients, want):
        torch.testing.assert_close(one, torch.zeros_like(leaf) if two is None else two, rtol=1e-3, atol=1e-5)
    assert want[0][1].any()


def test_all_void_is_zero_with_a_graph():
    regularizer, output, labels = make_case(unlabelled=list(product(NAMES, range(3))))
    for prediction in output.predictions.values():
        prediction.requires_grad_()
    result = regularizer.compute_loss(output, labels, regularizer.sample(0, "abc"))
    assert result.loss == 0
    assert all(value == 0 for value in result.losses.values())
    result.loss.backward()
    for p in (*output.predictions.values(), *regularizer.parameters()):
        assert p.grad is not None
        assert not p.grad.any()
    assert regularizer.summary() == {}


def test_values_under_void_pixels_do_not_matter():
    regularizer, output, labels = make_case()
    draw = regularizer.sample(0, "abc")
    want = regularizer.compute_loss(output, labels, draw).loss
    depth = labels["depth"]
    nothing = torch.tensor([torch.nan, torch.inf, -1.0]).view(3, 1, 1, 1)  # for each image
    changed = torch.where(depth > 0, depth, nothing)
    assert not changed.isfinite().all()
    assert torch.equal(regularizer.compute_loss(output, {**labels, "depth": changed}, draw).loss, want)


def test_encodings():
    """What the mapping sees of each kind of task."""
    tasks = make_tasks() | {"sal": build_task("sal")}
    label = see_label(tasks["semseg"], torch.tensor([[[0, 2, 255]]]))
    assert label[0, :, 0].tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]  # classes x pixels
    logits = torch.tensor([0.0, 1.0, -2.0]).view(1, 3, 1, 1)
    assert see_prediction(tasks["semseg"], logits).flatten().tolist() == pytest.approx(
        (logits.exp() / logits.exp().sum()).flatten().tolist()
    )
    assert see_label(tasks["sal"], torch.tensor([[[1, 255]]])).shape == (1, 2, 1, 2)
    depth = torch.tensor([[0.0, 2.0, 4.0], [0.2, 0.1, 0.0]]).view(2, 1, 1, 3)
    assert see_label(tasks["depth"], depth).flatten().tolist() == pytest.approx([0, 0.5, 1, 0.2, 0.1, 0])
    assert see_prediction(tasks["depth"], depth - 1).flatten().tolist() == pytest.approx(
        [-1 / 3, 1 / 3, 1, -0.8, -0.9, -1]
    )
    inverse = build_task("depth", inverse=True)  # 0.05 counts as 1 m
    assert see_label(inverse, depth / 20).flatten().tolist() == pytest.approx([0, 0.5, 1, 0.2, 0.1, 0])
    assert see_prediction(inverse, depth / 20).equal(see_label(inverse, depth / 20))
    normals = torch.tensor([[0.0, 0.6], [0.0, 0.8], [0.0, 0.0]]).view(1, 3, 1, 2)
    assert torch.equal(see_label(tasks["normals"], normals), normals)
    torch.testing.assert_close(see_prediction(tasks["normals"], 7 * normals), normals)
    edge = see_label(tasks["edge"], torch.tensor([0.0, 1.0, 255.0]).view(1, 1, 1, 3))
    assert edge.flatten().tolist() == [0, 1, 0]
    assert see_prediction(tasks["edge"], torch.zeros(1, 1, 1, 1)).item() == 0.5


def test_a_map_of_one_cell_is_its_shift():
    layer = FilmLayer(2, 3, 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.shift.copy_(torch.tensor([1.0, 2.0, -1.0]))
    maps = torch.randn(2, 2, 1, 1, generator=torch.Generator().manual_seed(1))
    # x / sqrt(eps) - mean / sqrt(eps): sqrt(eps) = 1 / 316 magnifies the rounding of a map without a spread
    torch.testing.assert_close(layer(maps).flatten(1), torch.tensor([[1.0, 2.0, 0.0]] * 2), rtol=0, atol=1e-4)


def test_half_precision_changes_nothing():
    regularizer, output, labels = make_case()
    draw = regularizer.sample(0, "abc")
    want = regularizer.compute_loss(output, labels, draw).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = regularizer.compute_loss(output, labels, draw).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, want)


def test_builds_and_draws_follow_the_seed_alone():
    state_before = torch.get_rng_state()
    a, b, other = (make_case(seed=seed)[0] for seed in (3, 3, 4))
    draws = [a.sample(step, ["x", "y"]).sources for step in range(300)]
    assert torch.equal(torch.get_rng_state(), state_before)
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q)
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), other.parameters()))
    assert all(torch.equal(b.sample(step, ["z"]).sources, draw) for step, draw in enumerate(draws))
    for t in range(4):
        assert all(sorted(draw[t].tolist()) == [s for s in range(4) if s != t] for draw in draws)
        counts = [sum(draw[t, 0].item() == s for draw in draws) for s in range(4) if s != t]
        assert min(counts) > 70, counts


def test_films_learn_ten_times_as_fast():
    regularizer, *_ = make_case()
    rest, films = regularizer.build_optimizer(1e-4, 0.0).param_groups
    assert (rest["lr"], films["lr"]) == (1e-4, pytest.approx(1e-3))
    assert {tuple(p.shape) for p in films["params"]} == {(12, 4), (12, 5), (12, 6)}  # pairs x channels
    assert len(rest["params"]) + len(films["params"]) == len(list(regularizer.parameters()))


def test_what_a_user_may_get_wrong():
    with pytest.raises(UserError, match="at least two tasks"):
        CrossTaskConsistency(make_tasks(("depth",)), {"depth": 4})
    with pytest.raises(UserError, match=r"source_rule=none.*auto"):
        CrossTaskConsistency(make_tasks(), dict.fromkeys(NAMES, 4), source_rule="none")
    with pytest.raises(UserError, match=r"feature=final.*4, 5"):
        CrossTaskConsistency(make_tasks(), dict.fromkeys(NAMES, 4) | {"edge": 5}, feature="final")


@pytest.mark.parametrize("labels", ["full", "one"])
def test_training_takes_steps(labels, tmp_path):
    overrides = [*TINY, "regularizer=mtpsl", f"data.label_assignment={labels}"]
    train(composed(*overrides), tmp_path)
    state = read_checkpoint_file(tmp_path / "checkpoints" / "last.pt")
    config = composed(*overrides)
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False)
    regularizer = build_regularizer(config, tasks, model)
    assert isinstance(regularizer, CrossTaskConsistency)
    assert state["model"].keys() == model.state_dict().keys()
    initial = regularizer.state_dict()
    assert state["regularizer"].keys() == initial.keys()
    moved = [name for name, start in initial.items() if not torch.equal(start, state["regularizer"][name])]
    assert any("gamma" in name for name in moved)
    assert any("stems" in name for name in moved)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    regularizer_records = [record for record in records if record["kind"] == "regularizer"]
    assert any(key.endswith("/apart") for record in regularizer_records for key in record)
