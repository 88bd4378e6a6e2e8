"""Check what of a backbone is trained: all of it, nothing, or its last blocks or stages."""

import pytest
import torch
from helpers.small_models import FAMILIES, VIT, make_image, make_model

from mtcl import UserError
from mtcl.models import TaskPrompter, build_backbone
from mtcl.models.trainable import number_layers, set_trainable

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
    state_before = {name: value.clone() for name, value in frozen.state_dict().items()}
    with torch.no_grad():
        expected = plain(IMAGE)
    features = frozen(IMAGE.clone().requires_grad_())
    for feature, value in zip(features, expected, strict=True):
        assert torch.equal(feature, value)
        assert not feature.requires_grad
    assert all(torch.equal(value, state_before[name]) for name, value in frozen.state_dict().items())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_trained_backbone_is_as_it_was():
    """The comparison above can fail: noise and running statistics are at work where nothing is frozen."""
    backbone = make_backbone("mobile").train()
    set_trainable(backbone, "full")
    assert not backbone.is_frozen
    state_before = {name: value.clone() for name, value in backbone.state_dict().items()}
    first, second = backbone(IMAGE), backbone(IMAGE)
    assert first[0].requires_grad
    assert not torch.equal(first[-1], second[-1])
    assert any(not torch.equal(value, state_before[name]) for name, value in backbone.state_dict().items())
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


# --- The last blocks or stages

LAST = {  # family -> trainable, beginnings of the names of what is trained
    "vit": ("last_2", ("model.blocks.2.", "model.blocks.3.", "model.norm.")),
    "swin": ("last_1", ("layers_3.",)),
    "mobile": ("last_3", ("blocks.4.", "blocks.5.", "blocks.6.")),
    "hrnet": ("last_2", ("stage3.", "transition3.", "stage4.", "incre_modules.")),
    "cnn": ("last_4", ("layer1.", "layer2.", "layer3.", "layer4.")),
}


@pytest.mark.parametrize("family", LAST)
def test_the_last_blocks_or_stages_are_trained(family):
    trainable, beginnings = LAST[family]
    backbone = make_backbone(family)
    set_trainable(backbone, trainable)
    backbone.train()
    assert not backbone.is_frozen
    trained = {name for name, parameter in backbone.net.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in backbone.net.named_parameters() if name.startswith(beginnings)}
    assert all(any(name.startswith(beginning) for name in trained) for beginning in beginnings)
    state_before = {name: value.clone() for name, value in backbone.net.state_dict().items()}
    sum(feature.square().mean() for feature in backbone(IMAGE)).backward()
    assert {name for name, p in backbone.net.named_parameters() if p.grad is not None} == trained
    moved = {name for name, value in backbone.net.state_dict().items() if not torch.equal(value, state_before[name])}
    assert all(name.startswith(beginnings) for name in moved)
    norms = [name for name in state_before if name.endswith("running_mean")]
    assert {name for name in norms if name.startswith(beginnings)} <= moved


@pytest.mark.parametrize(("family", "level"), [("vit", 1), ("swin", 2), ("mobile", 1)])
def test_what_lies_before_them_is_as_in_evaluation_and_has_no_graph(family, level):
    """``level``: the last map that only frozen layers make."""
    plain, part = make_backbone(family).eval(), make_backbone(family)
    set_trainable(part, LAST[family][0])
    part.train()
    expected, features = plain(IMAGE), part(IMAGE)
    assert [feature.requires_grad for feature in features] == [index > level for index in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(features[: level + 1], expected))
    assert not torch.equal(features[-1], expected[-1])  # drop path or batch statistics are at work behind them


def test_unused_layers_stay_frozen():
    backbone = make_backbone("hrnet")
    backbone.freeze_unused([0])
    unused = {name for name, parameter in backbone.net.named_parameters() if not parameter.requires_grad}
    assert unused
    set_trainable(backbone, "last_1")
    assert not any(backbone.net.get_parameter(name).requires_grad for name in unused)


def test_bad_choices():
    for text in ("some", "last_0", "last_", "last_x", "last_-1"):
        with pytest.raises(UserError, match=rf"^trainable={text} is not known; choose full, frozen, lora or last_N"):
            set_trainable(make_backbone("mobile"), text)
    for family, count in (("vit", 4), ("mobile", 7), ("hrnet", 4)):
        with pytest.raises(UserError, match=rf"^trainable=last_9 is more than backbone .* has: {count} blocks or "):
            set_trainable(make_backbone(family), "last_9")
    backbone = make_backbone("mobile")
    backbone.name = "caformer_s18"  # of timm, without groups
    with pytest.raises(UserError, match=r"^trainable=last_1 needs layers: timm knows no layers of backbone caformer_s"):
        set_trainable(backbone, "last_1")
    with pytest.raises(UserError, match=r"^timm knows no layers of backbone caformer_s18"):
        number_layers(backbone)
