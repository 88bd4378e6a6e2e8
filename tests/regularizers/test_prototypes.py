"""Prototypes: the loss and the bank over several steps against a slow reference in float64; what a bank survives."""

import copy
import math

import pytest
import torch
from helpers.common import TINY, composed
from helpers.contrast_reference import (
    NAMES,
    has_losses,
    make_case,
    ref_picture,
    ref_project,
    ref_stratum,
    ref_weights,
)

from mtcl import UserError
from mtcl.cli.train import train
from mtcl.regularizers.prototypes import PrototypeBank
from mtcl.training.checkpoint_file import read_checkpoint_file


class Reference:
    """The bank as a dictionary (target, source, bin) -> vector, pixel by pixel in float64."""

    def __init__(self, regularizer):
        self.regularizer, self.bank = regularizer, {}

    def step(self, features, labels, draw, frame):
        """Return target -> (loss, anchors, active, sums of d_ap and d_an), and gradients; then update the bank."""
        regularizer, names = self.regularizer, self.regularizer.task_names
        leaves = {t: x.detach().double().requires_grad_() for t, x in features.items()}
        twins = {id(p): p.detach().double().requires_grad_() for p in regularizer.parameters()}
        losses, counts, by_bin = {}, {}, {}
        for target in names:
            projector, costs = regularizer.projectors[target], []
            layers = [(twins[id(w)], twins[id(b)]) for w, b in zip(projector.weights, projector.biases)]
            counts[target] = torch.zeros(4, dtype=torch.float64)
            for image in range(len(draw.pixels)):
                for pixel in ref_picture(regularizer, target, image, labels, draw):
                    if pixel.value is None:
                        continue
                    x = leaves[target][image].flatten(1) @ ref_weights(pixel.position, leaves[target].shape[-2:], frame)
                    row = names.index(pixel.source) if regularizer.projector_sharing == "pair" else 0
                    z = ref_project(layers, row, x)
                    own_key = (target, pixel.source, ref_stratum(pixel.source, pixel.value))
                    by_bin.setdefault(own_key, []).append(z.detach())
                    others = [p for key, p in self.bank.items() if key[:2] == own_key[:2] and key != own_key]
                    if own_key not in self.bank or not others:
                        continue
                    weights = [(z @ p / regularizer.temperature).exp() for p in (self.bank[own_key], *others)]
                    costs.append(-(weights[0] / sum(weights)).log())
                    d_an = sum(2 - 2 * (z @ p) for p in others) / len(others)
                    d_ap, d_an = 2 - 2 * (z @ self.bank[own_key]).item(), d_an.item()
                    counts[target] += torch.tensor([1, costs[-1].item() > 0.1, d_ap, d_an], dtype=torch.float64)
            losses[target] = sum(costs) / len(costs) if costs else 0 * leaves[target].sum()
        with_anchor = [losses[t] for t in names if counts[t][0]]
        total = sum(with_anchor) / max(1, len(with_anchor)) if with_anchor else sum(losses.values())
        tensors = [*leaves.values(), *twins.values()]
        gradients = torch.autograd.grad(total, tensors, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, gradients)]
        for key, vectors in by_bin.items():
            mean = sum(vectors) / len(vectors)
            mean = 0.99 * self.bank[key] + 0.01 * mean if key in self.bank else mean
            self.bank[key] = mean / mean.norm()
        return total, losses, counts, gradients


PARTIAL = {name: ["void" if (i + k) % 2 else "random" for k in range(4)] for i, name in enumerate(NAMES)}
CASES = {
    "full": {},
    "partial labels": {"images": 4, "kinds": PARTIAL},
    "a projector per target": {"projector_sharing": "target"},
    "hot": {"temperature": 1.5},
    "class_balanced": {"class_balanced": True},
    "other image": {"images": 3, "source_labels": "other_image"},
    "self": {"source_tasks": "self"},
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_bank_are_the_reference_s(name):
    options = {"seed": 5, "pixels": 16, "images": 2, "criterion": "prototypes"} | CASES[name]
    regularizer, features, labels, _, frame = make_case(**options)
    reference, anchors = Reference(regularizer), 0
    ids = [str(i) for i in range(options["images"])]
    for step in range(5):
        draw = regularizer.sample(step, ids)
        total, losses, counts, gradients = reference.step(features, labels, draw, frame)
        has_losses(regularizer, (features, labels, draw, frame), total, losses, gradients)
        sums = dict(
            zip(NAMES, regularizer.stats.sums.sum(dim=1).double())
        )  # over sources: pixels, labelled ones, anchors, ...
        for target in NAMES:
            torch.testing.assert_close(sums[target][2:], counts[target], rtol=1e-4, atol=1e-3)
        regularizer.summary()
        anchors += sum(int(c[0]) for c in counts.values())
    assert anchors > 100
    expected = torch.zeros_like(regularizer.prototypes.prototypes)
    for (target, source, number), vector in reference.bank.items():
        expected[NAMES.index(target), NAMES.index(source), number] = vector.float()
    torch.testing.assert_close(regularizer.prototypes.prototypes, expected, rtol=1e-4, atol=1e-5)


def test_the_first_step_has_no_loss_but_a_graph():
    regularizer, features, labels, draw, frame = make_case(pixels=16, criterion="prototypes")
    leaves = {t: x.requires_grad_() for t, x in features.items()}
    output = regularizer(leaves, labels, draw, frame)
    assert output.loss == 0
    output.loss.backward()
    assert all(not x.grad.any() for x in leaves.values())
    assert regularizer(leaves, labels, draw, frame).loss > 0


def test_a_single_bin_has_nothing_to_be_told_from():
    regularizer, features, labels, draw, frame = make_case(names=("depth", "edge"), pixels=16, criterion="prototypes")
    labels["edge"] = torch.zeros_like(labels["edge"])
    for _ in range(2):
        output = regularizer(features, labels, draw, frame)
    assert output.losses["depth"] == 0  # edge is the source
    assert output.losses["edge"] > 0


def test_a_step_that_is_not_finite_leaves_the_bank_finite():
    regularizer, features, labels, draw, frame = make_case(pixels=16, criterion="prototypes")
    regularizer(features, labels, draw, frame)
    bank = regularizer.prototypes.prototypes.clone()
    regularizer({t: torch.full_like(x, math.nan) for t, x in features.items()}, labels, draw, frame)
    assert torch.equal(regularizer.prototypes.prototypes, bank)


def test_broken_labels_take_no_part():
    regularizer, features, labels, draw, frame = make_case(pixels=16, criterion="prototypes", source_tasks="depth")
    void = {**labels, "depth": labels["depth"].clone()}
    broken = {**labels, "depth": labels["depth"].clone()}
    void["depth"][:, :, :3], broken["depth"][:, :, :3] = 0, math.nan
    twin = copy.deepcopy(regularizer)
    for _ in range(2):
        losses = [r(features, which, draw, frame).loss for r, which in ((regularizer, broken), (twin, void))]
    assert losses[0] > 0
    assert torch.equal(*losses)
    assert torch.equal(regularizer.prototypes.prototypes, twin.prototypes.prototypes)


def test_two_processes_have_one_bank(monkeypatch):
    """Sums over both halves of a batch make the bank of the batch."""
    regularizer, features, labels, draw, frame = make_case(pixels=16, images=4, criterion="prototypes")
    regularizer(features, labels, draw, frame)
    halves = []
    for part in (slice(2), slice(2, 4)):
        half = make_case(pixels=16, images=4, criterion="prototypes")[0]
        monkeypatch.setattr("mtcl.regularizers.prototypes.all_reduce_sum", lambda x: halves.append(x) or x)
        half(
            {t: x[part] for t, x in features.items()},
            {t: x[part] for t, x in labels.items()},
            draw._replace(pixels=draw.pixels[part]),
            frame,
        )
    monkeypatch.setattr("mtcl.regularizers.prototypes.all_reduce_sum", lambda _: sum(halves))
    joint = make_case(pixels=16, images=4, criterion="prototypes")[0]
    joint(features, labels, draw, frame)
    torch.testing.assert_close(joint.prototypes.prototypes, regularizer.prototypes.prototypes)


def test_a_state_of_another_criterion_is_loaded_with_an_empty_bank():
    old, features, labels, draw, frame = make_case(pixels=16)
    regularizer = make_case(seed=1, pixels=16, criterion="prototypes")[0]
    regularizer(features, labels, draw, frame)
    assert "prototypes.prototypes" in regularizer.state_dict()
    assert "prototypes.prototypes" not in old.state_dict()
    regularizer.load_state_dict(old.state_dict())
    assert not regularizer.prototypes.prototypes.any()
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), regularizer.parameters(), strict=True))
    bank = PrototypeBank(2, 3, 0.1)
    bank.load_state_dict({"prototypes": torch.ones(2, 2, 256, 3)})
    assert bank.prototypes.all()


RUN = [*TINY, "backbone.name=test_resnet", "schedule=constant", "trainer.validate_first=false", "trainer.num_panels=0"]
RUN += ["trainer.val_interval=null", "trainer.checkpoint_interval=null", "data.limit=5", "regularizer.weight=1"]
RUN += ["regularizer.options.criterion=prototypes", "regularizer.options.num_pixels=32"]


def test_a_run_that_was_cut_goes_on_as_if_not(tmp_path):
    def run(folder, *overrides):
        train(composed(*RUN, *overrides), tmp_path / folder)
        return read_checkpoint_file(tmp_path / folder / "checkpoints" / "last.pt")

    uncut = run("uncut", "trainer.max_steps=4")
    cut = run("cut", "trainer.max_steps=2")["regularizer"]["prototypes.prototypes"]
    resumed = run("cut", "trainer.max_steps=4", "resume=auto")
    for part in ("model", "regularizer"):
        assert uncut[part].keys() == resumed[part].keys()
        assert all(torch.equal(uncut[part][key], resumed[part][key]) for key in uncut[part])
    bank = uncut["regularizer"]["prototypes.prototypes"]
    assert bank.any()
    assert not torch.equal(bank, cut)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0.5}, r"criterion=prototypes takes each pixel by itself; leave out window"),
        ({"across_images": True}, r"criterion=prototypes takes each pixel by itself"),
        ({"drop_conflicting_negatives": True}, r"criterion=prototypes takes each pixel by itself"),
        ({"source_labels": "distance"}, r"criterion=prototypes needs labels"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_case(criterion="prototypes", **options)
