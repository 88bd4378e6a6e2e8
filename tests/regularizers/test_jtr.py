"""Joint-task regularization (regularizer=jtr): the loss against a slow reference, its gradients, its draws."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.common import TINY, composed

from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_regularizer
from mtcl.errors import UserError
from mtcl.models.base import DenseOutput
from mtcl.regularizers import CrossTaskConsistency, JointTaskRegularization
from mtcl.regularizers.jtr import Decoder, Encoder, MapEncoding, hash_uniform, sample_classes
from mtcl.regularizers.task_loss import TaskLossOptions
from mtcl.tasks import build_task

NAMES = ("semseg", "depth", "normals", "edge")
IDS = ("a", "b", "c", "d")
# Images with one label, with two, with all, with none.
MISSING = [(name, 0) for name in NAMES[1:]] + [(name, 1) for name in NAMES[::2]] + [(name, 3) for name in NAMES]


def make_tasks(names=NAMES):
    options = {"semseg": {"class_names": ("a", "b", "c")}}
    return {name: build_task(name, **options.get(name, {})) for name in names}


def make_case(unlabelled=MISSING, views=1, size=(17, 26), batch=4, **options):
    """A regulariser whose layers scale and shift, predictions, and labels of which ``unlabelled`` ones are void."""
    g = torch.Generator().manual_seed(1)
    tasks = make_tasks()
    regularizer = JointTaskRegularization(tasks, seed=3, **{"stride": 2, "widths": [4, 5, 6], **options})
    regularizer.task_loss = TaskLossOptions(views_per_step=views, views="first" if views > 1 else "all")
    with torch.no_grad():
        for p in regularizer.parameters():
            p.add_(torch.randn(p.shape, generator=g), alpha=0.2)
    rows = batch * views
    predictions = {n: torch.randn(rows, t.channels, *size, generator=g).requires_grad_() for n, t in tasks.items()}
    labels = {
        "semseg": torch.randint(0, 3, (rows, *size), generator=g),
        "depth": torch.rand(rows, 1, *size, generator=g) * 6 + 0.5,
        "normals": F.normalize(torch.randn(rows, 3, *size, generator=g), dim=1),
        "edge": torch.rand(rows, 1, *size, generator=g).round(),
    }
    for name, label in labels.items():
        void = torch.rand(rows, *size, generator=g) < 0.1
        for task, image in unlabelled:
            void[image::batch] |= task == name
        label.copy_(torch.where(void if label.ndim == 3 else void[:, None], tasks[name].void, label))
    return regularizer, DenseOutput(predictions, {}, [], size), labels


# --- The reference: image by image, in double precision


def reference_uniform(seed, count, stream, first):
    """The random numbers of one image, with Python's whole numbers."""

    def mix(x):
        x %= 2**32
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    bits = [mix(mix(mix(i) + stream * 0x9E3779B1) ^ seed) for i in range(first, first + count)]
    return torch.tensor([((b >> 9) + 0.5) / 2**23 for b in bits], dtype=torch.float64)


def reference_layer(x, layer):
    x = F.conv2d(x, layer.weight, padding=1)
    mean, variance = x.mean(dim=(2, 3), keepdim=True), x.var(dim=(2, 3), keepdim=True, unbiased=False)
    x = (x - mean) / (variance + 1e-5).sqrt()
    return (x * layer.scale[:, None, None] + layer.shift[:, None, None]).clamp(min=0)


def reference_encode(encoder, x):
    pooled_from = []
    for level in encoder.levels:
        for layer in level:
            x = reference_layer(x, layer)
        pooled, index = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
        pooled_from.append((index, x.shape[-2:]))
        x = pooled
    return x, pooled_from


def reference_decode(decoder, x, pooled_from):
    for level, (index, size) in zip(decoder.levels, pooled_from[::-1]):
        x = F.max_unpool2d(x, index, 2, output_size=size)
        for layer in level:
            x = reference_layer(x, layer)
    x = F.conv2d(x, decoder.last[0], decoder.biases[0], padding=1)
    return F.conv2d(x, decoder.last[1], decoder.biases[1])


def phi(z):
    return 0.5 * (1 + torch.erf((z - 2.3618) / 1.5876 / math.sqrt(2)))


def reference_maps(regularizer, output, labels, row, seed, is_detached):
    """Return what enters the auto-encoder of one image, as a function of whether it is Y, hard, and the stream."""
    step = regularizer.stride
    start = (step - 1) // 2
    valid = {n: regularizer.tasks[n].valid(labels[n])[row, start::step, start::step] for n in NAMES}
    labelled = {n for n in NAMES if valid[n].any()}
    mask = torch.stack([valid[n] for n in labelled]).all(dim=0) if labelled else torch.ones_like(valid["depth"])

    def stacked(is_target, hard, stream):
        maps, first = [], 0
        for name in NAMES:
            x = output.predictions[name][row, :, start::step, start::step].double()
            x = x.detach() if is_detached(name, labelled) else x
            label = labels[name][row, ..., start::step, start::step]
            uses_label = is_target and name in labelled
            if name == "semseg":
                shown = F.one_hot(label.clamp(max=2), 3).permute(2, 0, 1).double() if uses_label else x.softmax(0)
                if hard and not uses_label:
                    noise = -(-reference_uniform(seed, x.numel(), stream, first).log()).log().view_as(x)
                    soft = (x + noise).softmax(0)
                    shown = F.one_hot(soft.argmax(0), 3).permute(2, 0, 1) + soft - soft.detach()
            elif name == "depth":
                shown = phi(label.double() if uses_label else x)
            elif name == "normals":
                shown = ((label.double() if uses_label else x / x.norm(dim=0)) + 1) / 2
            else:
                shown = label.double() if uses_label else x.sigmoid()
            void = {"depth": phi(torch.zeros((), dtype=torch.float64)), "normals": 0.5}.get(name, 0.0)
            maps.append(torch.where(mask, shown, void))
            first += x.numel()
        return torch.cat(maps)[None]

    return stacked, mask, bool(labelled)


def reference_reconstruction(x, target, mask):
    """Of one image: cross-entropies, depth, normals, each the mean over the pixels of the mask."""
    x, target = x[0][:, mask], target[0][:, mask]  # (C, pixels)
    classes = [0, 1, 2, 7]
    p, y = x[classes].sigmoid(), target[classes]
    error = -(y * p.log() + (1 - y) * (1 - p).log()).sum(0)
    error = error + (x[3].sigmoid() - target[3]).abs()
    n = 2 * target[4:7] - 1
    error = error + 1 - (x[4:7] * n).sum(0) / x[4:7].norm(dim=0) / n.norm(dim=0)
    return error.mean()


def apart(a, b):
    return (1 - (a * b).sum(1) / a.norm(dim=1).clamp(min=1e-6) / b.norm(dim=1).clamp(min=1e-6)).mean()


def reference_loss(regularizer, output, labels, draw, is_detached, hard=True):
    """The three terms, each the mean over the images, of which those without a label count as zero."""
    views = regularizer.task_loss.views_per_step
    batch = len(draw.seeds) // views
    encoder, decoder = (
        type(m)(*arguments, torch.Generator()).double()
        for m, arguments in ((Encoder(*ENCODER), ENCODER[:1]), (Decoder(*DECODER), DECODER[:2]))
    )
    encoder.load_state_dict(regularizer.encoder.state_dict())
    decoder.load_state_dict(regularizer.decoder.state_dict())
    constant = Encoder(*ENCODER).double().requires_grad_(False)
    constant.load_state_dict(regularizer.encoder.state_dict())
    terms = [0.0, 0.0, 0.0]
    for image in range(batch):
        row = image + batch * (views - 1)
        maps, _, has_label = reference_maps(regularizer, output, labels, row, draw.seeds[row].item(), is_detached)
        if not has_label:
            continue
        y, y_hat = maps(True, hard, 1), maps(False, hard, 0)
        terms[0] += apart(reference_encode(constant, y)[0], reference_encode(constant, y_hat)[0])
        maps, mask, _ = reference_maps(regularizer, output, labels, image, draw.seeds[image].item(), is_detached)
        y, y_hat = maps(True, True, 2).detach(), maps(False, False, 3).detach()
        codes = [reference_encode(encoder, y), reference_encode(encoder, y_hat)]
        terms[1] += apart(codes[0][0], codes[1][0])
        for code, target in zip(codes, (maps(True, False, 4).detach(), y_hat)):
            terms[2] += reference_reconstruction(reference_decode(decoder, *code), target, mask)
    return [term / batch for term in terms], [*encoder.parameters(), *decoder.parameters()]


ENCODER = ([8, 4, 5, 6], torch.Generator())
DECODER = ([6, 5, 4], 8, torch.Generator())
RULES = {
    "auto": lambda name, labelled: name in labelled and len(labelled) < len(NAMES),
    "labelled": lambda name, labelled: name in labelled,
    "none": lambda name, labelled: False,
}


@pytest.mark.parametrize(
    ("rule", "options"), [("auto", {}), ("labelled", {"views": 2}), ("none", {"hard_classes": False})]
)
def test_loss_and_gradients_against_one_image_after_the_other(rule, options):
    regularizer, output, labels = make_case(detach_rule=rule, **options)
    draw = regularizer.sample(5, IDS * regularizer.task_loss.views_per_step)
    single = regularizer.compute_loss(output, labels, draw).loss
    regularizer.summary()
    regularizer.double()
    output = output._replace(
        predictions={n: x.detach().double().requires_grad_() for n, x in output.predictions.items()}
    )
    result = regularizer.compute_loss(output, labels, draw)
    leaves = list(output.predictions.values())
    gradients = torch.autograd.grad(result.loss, [*leaves, *regularizer.parameters()])

    hard = options.get("hard_classes", True)
    terms, parameters = reference_loss(regularizer, output, labels, draw, RULES[rule], hard)
    for name, term in zip(("distance", "encoder_distance", "reconstruction"), terms):
        torch.testing.assert_close(result.losses[name], term)
    torch.testing.assert_close(single.double(), result.loss, rtol=1e-4, atol=0)
    want = torch.autograd.grad(4 * terms[0] + 8 * terms[1] + 2 * terms[2], [*leaves, *parameters])
    assert len(gradients) == len(want)
    for one, two in zip(gradients, want):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)  # labels are encoded in single precision
    summary = regularizer.summary()
    assert summary["reconstruction"] == pytest.approx(terms[2].item() * 4 / 3, rel=1e-4)  # three images have a label
    assert regularizer.summary() == {}


@pytest.mark.parametrize("rule", RULES)
def test_every_prediction_the_rule_leaves_has_a_gradient(rule):
    regularizer, output, labels = make_case(detach_rule=rule)
    regularizer.compute_loss(output, labels, regularizer.sample(0, IDS)).loss.backward()
    for name, image in product(NAMES, range(4)):
        labelled = {n for n in NAMES if (n, image) not in MISSING}
        expected = bool(labelled) and not RULES[rule](name, labelled)
        assert bool(output.predictions[name].grad[image].any()) == expected, (name, image)
    assert all(p.grad.any() for p in regularizer.parameters())


def test_the_models_distance_leaves_the_auto_encoder_alone():
    regularizer, output, labels = make_case(encoder_distance_weight=0.0, reconstruction_weight=0.0)
    regularizer.compute_loss(output, labels, regularizer.sample(0, IDS)).loss.backward()
    assert not any(p.grad.any() for p in regularizer.parameters())
    assert output.predictions["depth"].grad.any()


def test_heads_and_backbone_have_gradients():
    """Of the regulariser's loss alone, in images with one label each: wherever the tasks' losses have one."""
    config = composed(*TINY, "backbone.name=test_resnet", "regularizer=jtr", "tasks.names=[semseg,depth,normals]")
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False).train()
    regularizer = build_regularizer(config, tasks, model)
    labels = {
        "semseg": torch.full((3, 32, 64), 255),
        "depth": torch.zeros(3, 1, 32, 64),
        "normals": torch.zeros(3, 3, 32, 64),
    }
    labels["semseg"][0], labels["depth"][1], labels["normals"][2] = 1, 2.0, 0.6
    output = model(torch.randn(3, 3, 32, 64, generator=torch.Generator().manual_seed(0)))
    task_loss = sum(task.loss(output.predictions[name], labels[name]) for name, task in tasks.items())
    loss = regularizer.compute_loss(output, labels, regularizer.sample(0, "abc")).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    trained, expected = (
        [bool(gradient.any()) for gradient in torch.autograd.grad(x, parameters, retain_graph=True)]
        for x in (loss, task_loss)
    )
    assert trained == expected
    assert sum(trained) > len(trained) / 2


def test_nothing_labelled_is_zero_with_a_graph():
    regularizer, output, labels = make_case(unlabelled=list(product(NAMES, range(4))))
    result = regularizer.compute_loss(output, labels, regularizer.sample(0, IDS))
    assert result.loss == 0
    result.loss.backward()
    for p in (*output.predictions.values(), *regularizer.parameters()):
        assert p.grad is not None
        assert not p.grad.any()


def test_values_under_void_pixels_do_not_matter():
    regularizer, output, labels = make_case()
    draw = regularizer.sample(0, IDS)
    want = regularizer.compute_loss(output, labels, draw).loss
    changed = torch.where(labels["depth"] > 0, labels["depth"], torch.nan)
    assert changed.isnan().any()
    assert torch.equal(regularizer.compute_loss(output, {**labels, "depth": changed}, draw).loss, want)


def test_half_precision_changes_nothing():
    regularizer, output, labels = make_case()
    draw = regularizer.sample(0, IDS)
    want = regularizer.compute_loss(output, labels, draw).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = regularizer.compute_loss(output, labels, draw).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, want)


def test_a_part_of_a_batch_is_the_batch():
    """Noise, normalisation and weights are those of single images: the mean over parts is the loss of all."""
    regularizer, output, labels = make_case()
    want = regularizer.compute_loss(output, labels, regularizer.sample(2, IDS)).loss
    losses = []
    for rows in (slice(0, 2), slice(2, 4)):
        part = output._replace(predictions={n: x[rows] for n, x in output.predictions.items()})
        part_labels = {n: x[rows] for n, x in labels.items()}
        losses.append(regularizer.compute_loss(part, part_labels, regularizer.sample(2, IDS[rows])).loss)
    torch.testing.assert_close(sum(losses) / 2, want)


def test_random_numbers_are_those_of_whole_numbers():
    seeds = torch.tensor([0, 7, 2**32 - 1])
    numbers = hash_uniform(seeds, 50, stream=3, first=20)
    for row, seed in zip(numbers, seeds.tolist()):
        torch.testing.assert_close(row.double(), reference_uniform(seed, 50, 3, 20), rtol=0, atol=0)
    many = hash_uniform(seeds, 20_000, stream=0)
    assert many.min() > 0
    assert many.max() < 1
    np.testing.assert_allclose(many.mean(dim=1), 0.5, atol=0.01)
    assert (torch.corrcoef(torch.cat([many, hash_uniform(seeds, 20_000, stream=1)])) - torch.eye(6)).abs().max() < 0.03


def test_classes_are_drawn_by_their_probabilities():
    logits = torch.tensor([0.0, 1.0, -1.0]).view(1, 3, 1, 1).expand(2, 3, 60, 60)
    drawn = sample_classes(logits, torch.tensor([1, 2]), stream=0)
    torch.testing.assert_close(drawn, drawn.round(), atol=1e-6, rtol=0)
    torch.testing.assert_close(drawn.mean(dim=(0, 2, 3)), logits[0, :, 0, 0].softmax(0), atol=0.02, rtol=0)


def test_builds_and_draws_follow_the_seed_alone():
    state_before = torch.get_rng_state()
    a, b, other = (JointTaskRegularization(make_tasks(), seed=seed, widths=[4]) for seed in (3, 3, 4))
    draw = a.sample(7, ["x", "y"])
    assert torch.equal(torch.get_rng_state(), state_before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), other.parameters()))
    assert b.sample(7, ["y", "x"]).seeds.tolist() == draw.seeds.tolist()[::-1]
    seeds = [draw.seeds, a.sample(8, ["x", "y"]).seeds, other.sample(7, ["x", "y"]).seeds]
    assert len(set(torch.cat(seeds).tolist())) == 6
    assert torch.equal(draw.to("cpu").seeds, draw.seeds)


def test_levels_are_those_of_segnet():
    regularizer = JointTaskRegularization(make_tasks(), widths=[4, 5, 6, 7, 7])
    shapes = [[tuple(layer.weight.shape[:2]) for layer in level] for level in regularizer.encoder.levels]
    assert [len(level) for level in shapes] == [2, 2, 3, 3, 3]
    assert [level[0] for level in shapes] == [(4, 8), (5, 4), (6, 5), (7, 6), (7, 7)]
    shapes = [[tuple(layer.weight.shape[:2]) for layer in level] for level in regularizer.decoder.levels]
    assert [len(level) for level in shapes] == [3, 3, 3, 2, 2]
    assert [level[0] for level in shapes] == [(7, 7), (6, 7), (5, 6), (4, 5), (4, 4)]
    assert [tuple(w.shape) for w in regularizer.decoder.last] == [(4, 4, 3, 3), (8, 4, 1, 1)]


def test_what_a_user_may_get_wrong():
    with pytest.raises(UserError, match="at least two tasks"):
        JointTaskRegularization(make_tasks(("depth",)))
    with pytest.raises(UserError, match=r"detach_rule=all.*auto"):
        JointTaskRegularization(make_tasks(), detach_rule="all")


@pytest.mark.parametrize("method", [JointTaskRegularization, CrossTaskConsistency])
def test_predictions_without_an_encoding_are_refused(method):
    tasks = make_tasks(("depth", "edge"))
    object.__setattr__(tasks["edge"], "prediction_type", "flow")
    with pytest.raises(UserError, match=r"those of edge are flow; leave edge out"):
        method(tasks, dict.fromkeys(tasks, 4))


def test_inverse_depth_fills_the_range_as_metres_do():
    metres, inverse = build_task("depth"), build_task("depth", inverse=True)
    encoding, z = MapEncoding(2.3618, 1.5876), torch.tensor([0.0, 0.5, 2.0, 10.0]).view(1, 1, 2, 2)
    for encode in (encoding.encode_label, encoding.encode_prediction):
        torch.testing.assert_close(encode(inverse, z / 20), encode(metres, z))
