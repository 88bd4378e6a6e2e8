"""The controls of the contrast: what each of them takes from the labels, and what it leaves."""

import pytest
import torch
from helpers.contrast_reference import NAMES, make_case, relations

from mtcl.regularizers.null_labels import choose_other_image, normalize_source_labels


def test_the_other_image_is_the_next_that_has_the_label_and_never_the_image_itself():
    has_labels = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    other, exists = choose_other_image(has_labels)
    assert other[0].tolist() == [1, 2, 3, 0]
    assert other[1].tolist() == [3, 3, 3, 0]
    assert other[2, exists[2]].tolist() == [1, 1, 1]
    assert exists.tolist() == [[True] * 4, [True] * 4, [True, False, True, True], [False] * 4]
    assert not choose_other_image(torch.ones(2, 1).bool())[1].any()


@pytest.mark.parametrize("options", [{}, {"class_balanced": True}, {"criterion": "ranked"}], ids=str)
def test_another_image_s_labels_are_read_at_the_image_s_own_pixels(options):
    case = {"seed": 2, "images": 3, "pixels": 12, "step": 1} | options
    regularizer, features, labels, draw, frame = make_case(**case, source_labels="other_image")
    moved = {name: label.roll(-1, dims=0) for name, label in labels.items()}  # each image has those of the next
    loss = regularizer(features, labels, draw, frame).loss
    assert torch.equal(loss, make_case(**case)[0](features, moved, draw, frame).loss)
    assert not torch.equal(loss, make_case(**case)[0](features, labels, draw, frame).loss)


@pytest.mark.parametrize("kind", ["other_image", "distance"])
def test_sources_and_projectors_are_those_of_the_method(kind):
    case = {"seed": 3, "images": 4, "pixels": 12, "kinds": {n: ["random", "void"] * 2 for n in NAMES[:2]}}
    case["kinds"] |= {n: ["void", "random", "random", "random"] for n in NAMES[2:]}
    plain, _, labels, draw, _ = make_case(**case)
    control = make_case(**case, source_labels=kind)[0]
    assert torch.equal(control.sample(5, ["a"]).sources, plain.sample(5, ["a"]).sources)
    assert torch.equal(control.sample(5, ["a"]).pixels, plain.sample(5, ["a"]).pixels)
    size = labels["depth"].shape[-2:]
    ours, method = (r.label_reader.read(labels, draw, r.target, size) for r in (control, plain))
    assert torch.equal(ours.source, method.source)
    if kind == "distance":
        assert torch.equal(ours.valid, method.valid)


def test_distance_reads_no_value_of_a_label():
    case = {"seed": 1, "pixels": 40, "source_labels": "distance"}
    regularizer, features, labels, draw, frame = make_case(**case)
    changed = labels | {"depth": labels["depth"] * 3, "edge": torch.where(labels["edge"] < 2, 0.0, labels["edge"])}
    loss = regularizer(features, labels, draw, frame).loss
    assert torch.equal(loss, regularizer(features, changed, draw, frame).loss)
    positive, negative = relations(regularizer, features, labels, draw, frame)
    apart = torch.cdist(draw.pixels, draw.pixels).expand_as(positive)
    assert apart[positive].max() <= 0.15 + 1e-6
    assert apart[negative].min() >= 0.3 - 1e-6
    assert positive.any()
    assert negative.any()


def test_true_is_read_as_text_and_as_a_bool():
    assert normalize_source_labels(True) == normalize_source_labels("true") == "true"
