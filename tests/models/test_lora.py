"""Adapters: which layers get one, that they begin as nothing, and that merged weights give the same output."""

import sys

import pytest
import torch
from helpers.small_models import FAMILIES, VIT, make_image, make_model

from mtcl import UserError
from mtcl.models import TaskPrompter, build_backbone
from mtcl.models.lora import add_adapters, merge_adapters
from mtcl.models.trainable import number_layers, set_trainable

pytest.importorskip("peft")

EVA = {"depth": 4, "embed_dim": 48, "num_heads": 3}
SWIN2 = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
MODELS = {  # timm's name, its options, names of the layers with adapters in a block
    "vit": ("vit_tiny_patch16_224", VIT, {"qkv", "proj"}),
    "dinov3": ("vit_small_patch16_dinov3", EVA, {"qkv", "proj"}),
    "swin": (*FAMILIES["swin"][:2], {"qkv", "proj"}),
    "swin2": ("swinv2_tiny_window8_256", SWIN2, {"proj"}),  # reads the weight of qkv instead of calling it
}
IMAGE = make_image(2, 3, 64, 96)


def make_backbone(kind, seed=0):
    torch.manual_seed(seed)
    name, kwargs, _ = MODELS[kind]
    return build_backbone(name, kwargs=kwargs).eval()


def stir(backbone, seed=1):
    """Give B random values, at which adapters matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in backbone.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        elif ".gamma_" in name or (".norm" in name and name.endswith(".weight")):
            parameter.data.fill_(1)  # DINOv3 and Swin 2 begin with branches that are multiplied by almost nothing
    return backbone


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_begin_as_nothing_and_learn_alone(kind):
    plain, adapted = make_backbone(kind), make_backbone(kind)
    add_adapters(adapted, rank=2, alpha=3)
    with torch.no_grad():
        expected = plain(IMAGE)
    features = adapted(IMAGE)
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    names = [name for name, p in adapted.net.named_parameters() if p.requires_grad]
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == MODELS[kind][2]
    stir(adapted)
    sum(feature.square().mean() for feature in adapted(IMAGE)).backward()
    grads = {name: p.grad for name, p in adapted.net.named_parameters()}
    assert all((grads[name] is not None) == (name in names) for name in grads)
    assert all(grads[name].abs().sum() > 0 for name in names)  # each adapter is called


@pytest.mark.parametrize("kind", MODELS)
def test_merged_weights_give_the_same_output(kind):
    plain, adapted = make_backbone(kind), make_backbone(kind)
    add_adapters(adapted, rank=2, alpha=3)
    stir(adapted)
    with torch.no_grad():
        features_before, features = plain(IMAGE), adapted(IMAGE)
        merged = merge_adapters(adapted.state_dict(), alpha=3)
        assert merged.keys() == plain.state_dict().keys()
        plain.load_state_dict(merged)
        for old, new, unmerged in zip(features_before, plain(IMAGE), features, strict=True):
            torch.testing.assert_close(new, unmerged, rtol=1e-5, atol=1e-5)
            assert (old - new).abs().max() > 1e-3


def test_merging_is_the_product_of_the_paper():
    weights = {
        "a.base_layer.weight": torch.ones(2, 3),
        "a.base_layer.bias": torch.zeros(2),
        "a.lora_A.default.weight": torch.tensor([[1.0, 2.0, 3.0]]),
        "a.lora_B.default.weight": torch.tensor([[1.0], [-1.0]]),
        "b.weight": torch.ones(1),
    }
    merged = merge_adapters(weights, alpha=2)
    assert list(merged) == ["a.weight", "a.bias", "b.weight"]
    assert merged["a.weight"].tolist() == [[3, 5, 7], [-1, -3, -5]]
    assert merge_adapters({"b.weight": weights["b.weight"]}, alpha=2) == {"b.weight": weights["b.weight"]}
    for name, value in (("a.lora_B.default.weight", None), ("a.lora_A.default.weight", torch.ones(2, 5))):
        with pytest.raises(UserError, match=r"the adapter of a\.weight does not fit"):
            merge_adapters({**weights, name: value}, alpha=2)


def test_targets_are_names_or_their_ends():
    backbone = make_backbone("vit")
    add_adapters(backbone, targets=["mlp.fc1", "model.blocks.0.attn.qkv"])
    layers = {name.split(".lora_")[0] for name, p in backbone.net.named_parameters() if p.requires_grad}
    assert layers == {f"model.blocks.{i}.mlp.fc1" for i in range(4)} | {"model.blocks.0.attn.qkv"}


def test_an_adapter_is_of_its_layer():
    backbone = make_backbone("vit")
    numbers = number_layers(backbone)
    add_adapters(backbone)
    adapted = number_layers(backbone)
    assert adapted["model.blocks.2.attn.qkv.lora_A.default.weight"] == numbers["model.blocks.2.attn.qkv.weight"]
    assert set(adapted.values()) == set(numbers.values())


def test_prompts_go_through_adapters():
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny_patch16_224", kwargs=VIT)
    model = TaskPrompter(backbone, {"depth": 1, "normals": 3}, size=(32, 48), width=8, head_width=6)
    set_trainable(model.backbone, "lora", {"rank": 2})
    stir(model.backbone)
    sum(m.square().mean() for m in model(make_image(2, 3, 32, 48)).predictions.values()).backward()
    adapters = [p for name, p in model.backbone.named_parameters() if ".lora_" in name]
    assert adapters
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)


def test_bad_input(monkeypatch):
    for family in ("cnn", "mobile", "hrnet"):
        with pytest.raises(
            UserError, match=r"^trainable=lora adapts the projections of attention, and backbone .* has"
        ):
            set_trainable(make_model(family).backbone, "lora")
    for kind, target in (("vit", "query"), ("vit", "patch_embed.proj"), ("swin2", "qkv"), ("vit", "kv")):
        with pytest.raises(UserError, match=rf"^lora\.targets={target} is no linear layer that backbone .* calls"):
            add_adapters(make_backbone(kind), targets=["mlp.fc1", target])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^trainable=lora needs peft: pip install 'mtcl\[lora\]'"):
        add_adapters(make_backbone("vit"))
