"""The contrastive regulariser once more, slow and obvious: loops over targets, pictures and anchors, in float64.

:func:`reference` reads the options off a regulariser; :func:`make_case` makes labels of which rounding decides no pair.
"""

import math
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from mtcl.regularizers import Contrastive
from mtcl.regularizers.sampling_ablations import balanced_sample
from mtcl.tasks import build_task

KINDS = ("random", "void", "single", "one")  # what one task says of one picture
NAMES = ("semseg", "depth", "normals", "edge")
# Values whose pairwise distances keep clear of the thresholds, and differ from each other: rounding decides nothing.
CLASSES = (0, 1, 2)
METRES = (1.0, 1.03, 1.5, 1.56, 3.0)
DEGREES = (0.0, 10.0, 30.0, 75.0, 145.0)


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


def make_case(
    seed=0,
    kinds=None,
    names=NAMES,
    size=(6, 7),
    tap=(3, 4),
    extra=(0, 0),
    pixels=7,
    hidden=5,
    images=2,
    step=0,
    channels=None,
    **options,
):
    """(regulariser, taps, labels, draw, frame). ``kinds``: task -> a kind per picture; by default random labels
    everywhere. ``options``: the regulariser's others."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    tasks = make_tasks(names)
    channels = channels or {name: 2 + i for i, name in enumerate(names)}
    kinds = kinds or {name: ["random"] * images for name in names}
    labels = {name: make_label(name, kinds[name], size, rng) for name in names}
    features = {name: torch.randn(images, channels[name], *tap, generator=generator) for name in names}
    options = {"num_pixels": pixels, "embed_dim": 4, "hidden_dim": hidden} | options
    regularizer = Contrastive(tasks, channels, seed=seed, **options)
    draw = regularizer.sample(step, [str(i) for i in range(images)])
    return regularizer, features, labels, draw, (size[0] + extra[0], size[1] + extra[1])


@st.composite
def cases(draw):
    """Arguments of :func:`make_case`, without the regulariser's options."""
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


# --- Labels, one pixel at a time


def ref_label(name, label, image, position):
    """The value of one pixel, None where it is void."""
    value = label[image, *position].item() if label.ndim == 3 else label[image, :, *position].tolist()
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


def ref_span(name, distance):
    """What "ranked" goes by: the chord of an angle."""
    return 2 * math.sin(math.radians(distance) / 2) if name == "normals" else distance


def ref_stratum(name, value):
    if value is None:
        return 0
    if name == "depth":
        return int(math.log(value / 0.1) / 0.2)
    if name == "normals":
        return max(range(6), key=lambda side: value[side // 2] * (-1) ** side)
    return int(value)


# --- Features


def ref_weights(position, shape, frame):
    """By what each cell of a map of ``shape``, which covers ``frame`` pixels, counts at the centre of a pixel."""
    weights = np.zeros(shape)
    y = min(max((position[0] + 0.5) * shape[0] / frame[0] - 0.5, 0.0), shape[0] - 1)
    x = min(max((position[1] + 0.5) * shape[1] / frame[1] - 0.5, 0.0), shape[1] - 1)
    for row in range(shape[0]):
        for column in range(shape[1]):
            weights[row, column] = max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column))
    return torch.from_numpy(weights.flatten())


def ref_project(layers, source, x):
    for number, (weight, bias) in enumerate(layers):
        x = (x if number == 0 else x.clamp(min=0)) @ weight[source] + bias[source, 0]
    return x / x.pow(2).sum(dim=-1, keepdim=True).sqrt()


# --- Pairs, and what they cost


class Pixel(NamedTuple):
    image: int
    at: tuple  # as a part of the picture
    position: tuple  # row, column
    source: str
    value: object  # of the source's label; None: void
    own_value: object  # of the target's own label


def ref_places(pixels, size):
    """Positions (K, 2) as parts of the picture -> (row, column) of each."""
    return [tuple(min(int(np.float32(f) * np.float32(n)), n - 1) for f, n in zip(at, size)) for at in pixels.numpy()]


def ref_picture(regularizer, target, image, labels, draw):
    """The sampled pixels of one picture."""
    names, size = regularizer.task_names, labels[regularizer.task_names[0]].shape[-2:]
    count, kind = len(draw.pixels), regularizer.label_reader.source_labels
    places = [ref_places(draw.pixels[i], size) for i in range(count)]
    by_picture = [
        {s: [ref_label(s, labels[s], i, position) for position in places[i]] for s in names} for i in range(count)
    ]
    read = by_picture[image]
    if kind == "random":  # the picture before; a single one has none
        read = by_picture[image - 1] if count > 1 else {s: [None] * len(places[image]) for s in names}
    if kind == "distance":  # the places themselves, where the source says anything
        spots = draw.pixels[image].tolist()
        read = {s: [None if v is None else at for v, at in zip(by_picture[image][s], spots)] for s in names}
    if kind == "other_image":  # the next picture of which that task says anything
        read = {}
        for s in names:
            others = [(image + step) % count for step in range(1, count)]
            others = [i for i in others if any(v is not None for v in by_picture[i][s])]
            nothing = not others or all(v is None for v in by_picture[image][s])
            read[s] = [None if nothing else ref_label(s, labels[s], others[0], position) for position in places[image]]
    usable = {s: any(v is not None for v in read[s]) for s in names}
    if kind == "other_image":  # that it says nothing here does not make another task the source
        usable = {
            s: any(v is not None for v in by_picture[image][s])
            and any(v is not None for i in range(count) if i != image for v in by_picture[i][s])
            for s in names
        }
    order = [names[s] for s in draw.sources[names.index(target)].tolist()]
    source = next((s for s in order if usable[s]), order[0])
    pixels = [
        Pixel(image, at, position, source, value, ref_label(target, labels[target], image, position))
        for at, position, value in zip(draw.pixels[image].tolist(), places[image], read[source], strict=True)
    ]
    if regularizer.class_balanced:  # which is tested by itself
        strata = torch.tensor([ref_stratum(source, pixel.value) for pixel in pixels])
        valid = torch.tensor([pixel.value is not None for pixel in pixels])
        pixels = [pixels[i] for i in balanced_sample(strata, valid, regularizer.num_pixels).tolist()]
    return pixels


def ref_apart(regularizer, a, b):
    """The thresholds of two pixels' relation, and how far apart they are."""
    if regularizer.label_reader.source_labels == "distance":
        return 0.15, 0.3, math.hypot(a.value[0] - b.value[0], a.value[1] - b.value[1])
    return *regularizer.thresholds[a.source], ref_distance(a.source, a.value, b.value)


def ref_relation(regularizer, target, a, b):
    """+1 for a positive pair, -1 for a negative one, 0 for none."""
    if a.value is None or b.value is None or (a.image, a.position) == (b.image, b.position) or a.source != b.source:
        return 0
    if (
        regularizer.pair_options.window is not None
        and max(abs(x - y) for x, y in zip(a.at, b.at)) > regularizer.pair_options.window
    ):
        return 0
    near, far, distance = ref_apart(regularizer, a, b)
    sign = -1 if distance >= far else 1 if distance <= near else 0
    if a.own_value is None or b.own_value is None:
        return sign
    own_near, own_far = regularizer.thresholds[target]
    own_distance = ref_distance(target, a.own_value, b.own_value)
    if regularizer.pair_options.drop_conflicting_positives and sign > 0 and own_distance >= own_far:
        return 0
    if regularizer.pair_options.drop_conflicting_negatives and sign < 0 and own_distance <= own_near:
        return 0
    return sign


def ref_triplets(regularizer, target, group, d):
    """(anchor, positive, negative, margin) of each anchor of a group of pixels with distances ``d``."""
    count = len(group)
    for a, pixel in enumerate(group):
        ahead = [(a + step) % count for step in range(1, count)]
        if regularizer.criterion == "ranked":
            p, n = (a + 1) % count, (a + 2) % count
            three = [pixel, group[p], group[n]]
            if any(x.value is None for x in three) or pixel.position in (group[p].position, group[n].position):
                continue
            by = "distance" if regularizer.label_reader.source_labels == "distance" else pixel.source
            near, far, _ = (ref_span(by, bound) for bound in ref_apart(regularizer, pixel, pixel))
            top = far if near == 0 else 5 * far
            apart = {j: min(ref_span(by, ref_apart(regularizer, pixel, group[j])[2]) / top, 1) for j in (p, n)}
            p, n = sorted(apart, key=apart.get)
            if apart[n] > apart[p]:
                yield a, p, n, regularizer.margin * (apart[n] - apart[p])
            continue
        alike = [j for j in ahead if ref_relation(regularizer, target, pixel, group[j]) > 0]
        different = [j for j in ahead if ref_relation(regularizer, target, pixel, group[j]) < 0]
        if not alike or not different:
            continue
        p, n = alike[0], different[0]
        if regularizer.criterion == "semihard":
            beyond = [j for j in different if d[a, j] > d[a, p]]
            n = min(beyond, key=lambda j: d[a, j]) if beyond else max(different, key=lambda j: d[a, j])
        yield a, p, n, regularizer.margin


def ref_group(regularizer, target, group, z):
    """What each anchor of a group with features z (K, D) costs, and (is it active?, d_ap, d_an) of each."""
    d = 2 - 2 * z @ z.T
    numbers = d.detach().numpy()
    if regularizer.criterion != "infonce":
        triplets = list(ref_triplets(regularizer, target, group, numbers))
        costs = [(margin + d[a, p] - d[a, n]).clamp(min=0) for a, p, n, margin in triplets]
        counts = [(cost.item() > 0, numbers[a, p], numbers[a, n]) for cost, (a, p, n, _) in zip(costs, triplets)]
        return costs, counts
    costs, counts = [], []
    for a, pixel in enumerate(group):
        relation = [ref_relation(regularizer, target, pixel, other) for other in group]
        alike = [j for j, sign in enumerate(relation) if sign > 0]
        different = [j for j, sign in enumerate(relation) if sign < 0]
        if alike and different:
            weight = ((2 - d[a]) / 2 / regularizer.temperature).exp()
            rest = weight[different].sum()
            costs.append(-(weight[alike] / (weight[alike] + rest)).log().mean())
            counts.append((costs[-1].item() > 0.1, numbers[a, alike].mean(), numbers[a, different].mean()))
    return costs, counts


class Reference(NamedTuple):
    loss: torch.Tensor
    losses: dict
    summary: dict
    gradients: list  # of the taps, then of the regulariser's parameters
    anchors: int
    sums: dict  # target<-source -> pixels with a label of the source, anchors, active triplets, sums of d_ap and d_an


def reference(regularizer, features, labels, draw, frame):
    names, images = regularizer.task_names, len(draw.pixels)
    leaves = {t: features[t].detach().double().requires_grad_() for t in names}
    twins = {id(p): p.detach().double().requires_grad_() for p in regularizer.parameters()}
    losses, with_anchor, sums = {}, [], {}
    for target in names:
        projector, tap = regularizer.projectors[target], leaves[target]
        layers = [(twins[id(w)], twins[id(b)]) for w, b in zip(projector.weights, projector.biases)]
        groups = [ref_picture(regularizer, target, i, labels, draw) for i in range(images)]
        if regularizer.pair_options.across_images:  # one group
            groups = [[pixel for pixels in groups for pixel in pixels]]
        if draw.order is not None:
            groups = [[pixels[i] for i in draw.order.tolist()] for pixels in groups]
        costs = []
        for group in groups:
            shape = tap.shape[-2:]
            feature = torch.stack([tap[p.image].flatten(1) @ ref_weights(p.position, shape, frame) for p in group])
            rows = [names.index(p.source) if regularizer.projector_sharing == "pair" else 0 for p in group]
            z = torch.stack([ref_project(layers, row, x) for row, x in zip(rows, feature)])
            its_costs, counts = ref_group(regularizer, target, group, z)
            costs += its_costs
            cell = sums.setdefault(f"{target}<-{group[0].source}", np.zeros(5))
            cell += [
                sum(p.value is not None for p in group),
                len(counts),
                *np.array(counts, float).reshape(-1, 3).sum(axis=0),
            ]
        losses[target] = torch.stack(costs).mean() if costs else tap.sum() * 0
        if costs:
            with_anchor.append(losses[target])
    total = torch.stack(with_anchor).mean() if with_anchor else sum(loss.sum() for loss in losses.values())
    tensors = [*leaves.values(), *twins.values()]
    gradients = torch.autograd.grad(total, tensors, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(tensors, gradients)]
    summary = {}
    for key, (labelled, anchors, active, d_ap, d_an) in sums.items():
        summary[f"{key}/anchors"] = anchors / labelled if labelled else 0.0
        if anchors:
            summary |= {f"{key}/active": active / anchors, f"{key}/d_ap": d_ap / anchors, f"{key}/d_an": d_an / anchors}
    return Reference(total, losses, summary, gradients, int(sum(cell[1] for cell in sums.values())), sums)


def has_losses(regularizer, batch, loss, losses, gradients, atol=1e-4):
    """Assert that a regularizer's losses of a batch and their gradients are these; return its output.

    ``gradients`` are those of ``loss`` at the features and at the regularizer's parameters, close to ``atol``.
    """
    features, *rest = batch
    leaves = {t: x.detach().clone().requires_grad_() for t, x in features.items()}
    output = regularizer(leaves, *rest)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss.double(), loss.detach(), rtol=1e-4, atol=1e-5)
    assert list(output.losses) == [comparison.name for comparison in regularizer.comparisons]
    for t, value in output.losses.items():
        torch.testing.assert_close(value.double(), losses[t].detach(), rtol=1e-4, atol=1e-5)
    tensors = [*leaves.values(), *regularizer.parameters()]
    computed = torch.autograd.grad(output.loss, tensors, allow_unused=True)  # of tasks that are no targets
    for tensor, gradient, expected in zip(tensors, computed, gradients, strict=True):
        gradient = torch.zeros_like(tensor) if gradient is None else gradient
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=atol)
    return output


def agrees_with_reference(regularizer, features, labels, draw, frame):
    """Assert that losses, gradients and diagnostics are the reference's; the number of its anchors."""
    want = reference(regularizer, features, labels, draw, frame)
    has_losses(regularizer, (features, labels, draw, frame), want.loss, want.losses, want.gradients, atol=2e-5)
    summary = regularizer.summary()
    assert summary.keys() == want.summary.keys()
    assert summary == pytest.approx(want.summary, rel=1e-4, abs=1e-5)
    assert regularizer.summary() == {}
    return want.anchors


def relations(regularizer, features, labels, draw, frame):
    """What the regulariser takes for alike and for different."""
    with mock.patch.object(regularizer, "select_pairs", wraps=regularizer.select_pairs) as spy:
        regularizer(features, labels, draw, frame)
    return regularizer.select_pairs(*spy.call_args.args)


# --- Agreement of labels


def reference_right_orders(kind, target, source, labels, thresholds, pixels):
    """Count triplets in the right order, and all: an anchor with the next positive and negative, in a circle."""
    right = total = 0
    for image, at in enumerate(pixels):
        places = ref_places(at, labels[target].shape[-2:])
        donor = (image - 1) % len(pixels) if kind == "other_image" else image
        source_values = [
            at[i].tolist() if kind == "distance" else ref_label(source, labels[source], donor, p)
            for i, p in enumerate(places)
        ]
        near, far = (0.15, 0.3) if kind == "distance" else thresholds[source]

        def apart(i, j, source_values=source_values):
            return (
                np.hypot(*np.subtract(source_values[i], source_values[j]))
                if kind == "distance"
                else ref_distance(source, source_values[i], source_values[j])
            )

        target_values = [ref_label(target, labels[target], image, p) for p in places]
        for a in range(len(at)):
            ahead = [j % len(at) for j in range(a + 1, a + len(at))]
            others = [j for j in ahead if places[j] != places[a] and source_values[j] is not None]
            if source_values[a] is None:
                continue
            positive = next((j for j in others if apart(a, j) <= near), None)
            negative = next((j for j in others if apart(a, j) >= far), None)
            if (
                positive is None
                or negative is None
                or None in (target_values[a], target_values[positive], target_values[negative])
            ):
                continue
            d_ap, d_an = (ref_distance(target, target_values[a], target_values[j]) for j in (positive, negative))
            total += 1
            right += 0.5 if abs(d_ap - d_an) < 1e-6 else d_ap < d_an
    return right, total
