"""Boundary triplets against a slow reference in float64, and what they refuse."""

import math

import pytest
import torch
from helpers.contrast_reference import NAMES, make_case, ref_distance, ref_label, ref_project

from mtcl import UserError
from mtcl.regularizers import boundary


def compute_reference(regularizer, features, labels, draw, frame):
    """Loss per target, its anchors, their share of labelled patches, gradients; patch by patch, cell by cell."""
    size = labels["depth"].shape[-2:]
    leaves = {t: features[t].detach().double().requires_grad_() for t in NAMES}
    losses, anchors, shares = {}, {}, {}
    for number, t in enumerate(NAMES):
        shape = features[t].shape[-2:]
        layers = None
        if regularizer.projectors[t].state_dict():
            projector = regularizer.projectors[t]
            layers = [(w.detach().double(), b.detach().double()) for w, b in zip(projector.weights, projector.biases)]
        costs, labelled = [], 0
        for image, places in enumerate(draw.pixels.tolist()):
            patches = [place_cells(at, shape, size, frame) for at in places]
            order = [NAMES[s] for s in draw.sources[number].tolist()]
            source = next((s for s in order if has_label(s, labels[s], image, patches)), order[0])

            def read(pixel, source=source, image=image):
                inside = pixel is not None and pixel[0] < size[0] and pixel[1] < size[1]
                return ref_label(source, labels[source], image, pixel) if inside else None

            def embed(cell, source=source, image=image, t=t, layers=layers):
                x = leaves[t][image, :, *cell]
                return x / x.norm() if layers is None else ref_project(layers, NAMES.index(source), x)

            near, far = regularizer.thresholds[source]
            for patch in patches:
                (centre, pixel), *others = [patch[12], *patch[:12], *patch[13:]]
                if read(pixel) is None:
                    continue
                labelled += 1
                apart = [(c, ref_distance(source, read(pixel), read(p))) for c, p in others if read(p) is not None]
                alike, different = [c for c, d in apart if d <= near], [c for c, d in apart if d >= far]
                if min(len(alike), len(different)) < 4:
                    continue
                z = embed(centre)
                mean = torch.stack([embed(c) for c in alike]).mean(dim=0)
                hardest = torch.stack([z @ embed(c) for c in different]).max()
                costs.append(
                    (2 - 2 * z @ mean).clamp(min=1e-4).sqrt()
                    + (regularizer.negative_margin - (2 - 2 * hardest).clamp(min=1e-4).sqrt()).relu()
                )
        anchors[t], shares[t] = len(costs), len(costs) / max(1, labelled)
        losses[t] = torch.stack(costs).mean() if costs else 0 * leaves[t].sum()
    total = sum(losses[t] for t in NAMES if anchors[t]) / max(1, sum(n > 0 for n in anchors.values()))
    return losses, anchors, shares, torch.autograd.grad(total, list(leaves.values()))


def place_cells(at, shape, size, frame):
    """Cells of a patch and the label pixel at the centre of each, None outside of the map."""
    middle = [min(int(at[i] * size[i] * shape[i] / frame[i]), shape[i] - 1) for i in range(2)]
    cells = [(middle[0] + dy, middle[1] + dx) for dy in range(-2, 3) for dx in range(-2, 3)]
    return [
        (c, tuple(int((c[i] + 0.5) * frame[i] / shape[i]) for i in range(2)) if is_inside(c, shape) else None)
        for c in cells
    ]


def is_inside(cell, shape):
    return all(0 <= c < n for c, n in zip(cell, shape))


def has_label(source, label, image, patches):
    pixels = [pixel for patch in patches for _, pixel in patch if pixel is not None]
    return any(ref_label(source, label, image, p) is not None for p in pixels if is_inside(p, label.shape[-2:]))


CASES = {
    "map as fine as the labels": {"size": (9, 10), "tap": (9, 10)},
    "coarser map": {"size": (17, 22), "tap": (7, 9)},
    "finer map": {"size": (8, 9), "tap": (11, 14)},
    "no projector": {"size": (9, 10), "tap": (9, 10), "embed_dim": None, "hidden": None},
    "linear projector": {"size": (9, 10), "tap": (9, 10), "hidden": None},
    "frame larger than the labels": {"size": (9, 10), "tap": (10, 10), "extra": (5, 6)},
    "partial labels": {
        "size": (9, 10),
        "tap": (9, 10),
        "kinds": {n: ["void" if (i + k) % 2 else "random" for k in range(2)] for i, n in enumerate(NAMES)},
    },
    "smaller than a patch": {"size": (4, 3), "tap": (4, 3)},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_boundary_triplets_agree_with_reference(name, layout):
    regularizer, features, labels, draw, frame = make_case(
        seed=4, pixels=16, criterion="boundary", **{"negative_margin": 1.2, **CASES[name]}
    )
    losses, anchors, shares, gradients = compute_reference(regularizer, features, labels, draw, frame)
    assert sum(anchors.values()) > 10
    leaves = {t: x.contiguous(memory_format=layout).requires_grad_() for t, x in features.items()}
    output = regularizer(leaves, labels, draw, frame)
    for t in NAMES:
        assert output.losses[t].item() == pytest.approx(losses[t].item(), rel=1e-4)
    got = torch.autograd.grad(output.loss, list(leaves.values()))
    for gradient, expected in zip(got, gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=2e-5)
    if "kinds" not in CASES[name]:  # each target has one source, so that its anchors are all the reference's
        summary = regularizer.summary()
        assert {k.partition("<-")[0]: v for k, v in summary.items() if k.endswith("/anchors")} == pytest.approx(shares)


def test_equal_features_cost_the_negative_margin_and_stay_finite():
    regularizer, features, labels, draw, frame = make_case(
        pixels=16, criterion="boundary", size=(9, 10), tap=(9, 10), embed_dim=None, negative_margin=0.65
    )
    leaves = {t: torch.full_like(x, 0.7).requires_grad_() for t, x in features.items()}
    output = regularizer(leaves, labels, draw, frame)
    assert output.loss.item() == pytest.approx(0.65, abs=1e-5)  # sqrt(1e-4) is added and subtracted
    assert all(g.isfinite().all() for g in torch.autograd.grad(output.loss, list(leaves.values())))


def test_a_stripe_has_anchors_along_its_edge_alone():
    label = torch.zeros(1, 1, 12, 12)
    label[..., 6:] = 1
    labels = {"edge": label, "depth": torch.ones(1, 1, 12, 12)}
    regularizer, features, _, _, frame = make_case(
        names=("edge", "depth"), size=(12, 12), tap=(12, 12), criterion="boundary", images=1
    )
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    centres = (torch.stack([rows, columns], dim=-1).view(1, -1, 2) + 0.5) / 12
    patches = boundary.place_patches(centres, (12, 12), (12, 12), (12, 12))
    draw = regularizer.sample(0, ["a"])._replace(pixels=centres)
    regularizer(features, labels, draw, frame)
    assert patches.cell[0, 12::25].tolist() == list(range(144))
    assert regularizer.summary()["depth<-edge/anchors"] == pytest.approx(
        (4 * 12 - 4) / 144
    )  # columns 4 to 7, without four at the rim that have 3


def test_without_projector_an_optimizer_has_nothing_to_train():
    regularizer, features, labels, draw, frame = make_case(embed_dim=None, hidden=None)
    optimizer = regularizer.build_optimizer(1e-3, 0.0)
    assert not list(regularizer.parameters())
    leaves = {t: x.requires_grad_() for t, x in features.items()}
    regularizer(leaves, labels, draw, frame).loss.backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(math.isfinite(x.grad.norm()) for x in leaves.values())


def test_boundary_refuses_what_chooses_other_pairs():
    with pytest.raises(UserError, match="criterion=boundary takes all pairs of a patch"):
        make_case(criterion="boundary", window=0.5)


@pytest.mark.parametrize("criterion", ["triplet", "ranked", "infonce", "boundary"])
def test_a_task_that_is_no_target_gets_no_gradient(criterion):
    options = {"pixels": 16, "size": (9, 10), "tap": (9, 10), "criterion": criterion}
    full, features, labels, draw, frame = make_case(**options)
    chosen = make_case(targets=["depth", "normals"], **options)[0]
    everywhere = full(features, labels, draw, frame).losses
    leaves = {t: x.requires_grad_() for t, x in features.items()}
    rows = [NAMES.index("depth"), NAMES.index("normals")]
    output = chosen(leaves, labels, draw._replace(sources=draw.sources[rows]), frame)
    output.loss.backward()
    assert list(output.losses) == ["depth", "normals"]
    for t in NAMES:
        if t in output.losses:
            assert torch.equal(output.losses[t], everywhere[t])
            assert leaves[t].grad.any()
        else:
            assert leaves[t].grad is None


@pytest.mark.parametrize("labels_of", ["full", "one"])
@pytest.mark.parametrize("criterion", ["triplet", "ranked", "infonce", "boundary"])
def test_all_sources_are_compared_each_as_if_it_were_the_only_one(criterion, labels_of):
    options = {"pixels": 16, "size": (9, 10), "tap": (9, 10), "criterion": criterion, "images": 4}
    if labels_of == "one":
        options["kinds"] = {t: ["random" if i == j else "void" for j in range(4)] for i, t in enumerate(NAMES)}
    every, features, labels, draw, frame = make_case(all_sources=True, excluded_pairs=["edge<-depth"], **options)
    output = every(features, labels, draw, frame)
    assert len(output.losses) == 11
    single = {}
    for s in NAMES:
        alone = make_case(source_tasks=s, **options)[0]
        alone.load_state_dict(every.state_dict())
        sources = alone.sample(0, [str(i) for i in range(4)]).sources
        for t, loss in alone(features, labels, draw._replace(sources=sources), frame).losses.items():
            if t != s:
                single[f"{t}<-{s}"] = loss
    for name, loss in output.losses.items():
        torch.testing.assert_close(loss, single[name])
    summary = every.summary()
    present = [loss for name, loss in output.losses.items() if summary[f"{name}/anchors"]]
    torch.testing.assert_close(output.loss, sum(present) / len(present))
    assert {key.split("/")[0] for key in summary} == set(output.losses)


def test_targets_must_be_tasks_in_use():
    with pytest.raises(UserError, match="targets="):
        make_case(targets=["sal"])
