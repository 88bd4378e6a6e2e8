"""What of a backbone is trained: all of it, or nothing."""

import pytest
import torch
from helpers.small_models import FAMILIES, VIT, make_image, make_model

from mtcl import UserError
from mtcl.models import TaskPrompter, build_backbone
from mtcl.models.trainable import set_trainable

DROPS = {  # every kind of noise that a backbone of that family knows
    "mobile": {"drop_path_rate": 0.9, "drop_rate": 0.9},
    "vit": {"drop_path_rate": 0.9, "drop_rate": 0.9, "attn_drop_rate": 0.9, "pos_drop_rate": 0.9},
    "swin": {"drop_path_rate": 0.9, "attn_drop_rate": 0.9},
    "hrnet": {},
}
IMAGE = make_image(2, 3, 64, 96)


def make_backbone(family, seed=0):
    torch.manual_seed(seed)
    name, kwargs, _ = FAMILIES[family]
    return build_backbone(name, kwargs={**kwargs, **DROPS.get(family, {})})


@pytest.mark.parametrize("family", DROPS)
def test_a_frozen_backbone_gives_the_maps_of_evaluation_without_a_graph(family):
    plain, frozen = make_backbone(family).eval(), make_backbone(family)
    set_trainable(frozen, "frozen")
    frozen.train()
    assert frozen.is_frozen
    assert frozen.training
    assert not any(module.training for module in frozen.net.modules())
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    with torch.no_grad():
        expected = plain(IMAGE)
    features = frozen(IMAGE.clone().requires_grad_())
    for feature, value in zip(features, expected, strict=True):
        assert torch.equal(feature, value)
        assert not feature.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_trained_backbone_is_as_it_was():
    """The comparison above can fail: noise and running statistics are at work where nothing is frozen."""
    backbone = make_backbone("mobile").train()
    set_trainable(backbone, "full")
    assert not backbone.is_frozen
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    first, second = backbone(IMAGE), backbone(IMAGE)
    assert first[0].requires_grad
    assert not torch.equal(first[-1], second[-1])
    assert any(not torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_evaluation_mode_comes_and_goes_around_a_frozen_backbone():
    model = make_model("mobile")
    set_trainable(model.backbone, "frozen")
    model.train()
    assert model.decoder.training
    assert not model.backbone.net.training
    model.eval()
    assert not model.backbone.training


def test_prompts_learn_through_a_frozen_backbone():
    """TaskPrompter runs the backbone's blocks itself: frozen are their weights, not their graph."""
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny_patch16_224", kwargs={**VIT, "drop_path_rate": 0.9})
    model = TaskPrompter(backbone, {"depth": 1, "normals": 3}, size=(32, 48), width=8, head_width=6)
    set_trainable(model.backbone, "frozen")
    model.train()
    image = make_image(2, 3, 32, 48)
    maps, again = (model(image).predictions for _ in range(2))
    assert torch.equal(maps["depth"], again["depth"])  # no path is dropped
    (maps["depth"].square().sum() + maps["normals"].sum()).backward()
    assert all(parameter.grad is None for parameter in model.backbone_parameters())
    assert model.prompts.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.channel_prompts.parameters())


def test_unknown_choice():
    with pytest.raises(UserError, match=r"^trainable=some is not known; choose full"):
        set_trainable(make_backbone("mobile"), "some")
