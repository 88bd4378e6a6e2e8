"""SAK against a slow reading of the authors' code, at any size, for any tasks, and at its published size."""

import pytest
import torch
import torch.nn.functional as F
from helpers.invpt_reference import random_state
from helpers.published import get_published_parameters
from helpers.sak_reference import published_shapes

from mtcl import UserError
from mtcl.models import SwissArmyKnife, build_backbone
from mtcl.models.published import METHODS, check_state_dict, sak, translate_state_dict
from mtcl.models.sak import Adapter, Router, mix

TASKS = {"semseg": 7, "depth": 1, "normals": 3}
TEACHERS = ["first", "second"]
VIT = {"depth": 4, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 2.0}
NATIVE = (48, 80)
NYUD = {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}
PASCAL = {"semseg": 21, "human_parts": 7, "sal": 2, "normals": 3, "edge": 1}


def make_model(tasks=TASKS, seed=0, name="vit_tiny_patch16_224", kwargs=VIT, out_indices=None, **options):
    torch.manual_seed(seed)
    options = {"teachers": TEACHERS, "size": NATIVE, **options}
    return SwissArmyKnife(build_backbone(name, kwargs=kwargs, out_indices=out_indices), tasks, **options)


def stir(model, seed=1):
    """Every parameter and statistic moved, so that none is at a value that hides it."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return model


def make_image(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Against a slow reading


def slow_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def slow_linear(layer, vector):
    return torch.stack([(row * vector).sum() for row in layer.weight]) + layer.bias


def slow_norm(layer, vector):
    deviation = ((vector - vector.mean()).square().mean() + layer.eps).sqrt()
    return (vector - vector.mean()) / deviation * layer.weight + layer.bias


def slow_adapter(adapter, vector):
    inner = slow_gelu(slow_linear(adapter.down, vector))
    return vector + adapter.scale * slow_linear(adapter.up, inner)


def slow_scores(router, stem):
    """The mean over the cells of one image (C, h, w) of the scores of each: one cell at a time."""
    first, norm, _, second = router.layers
    cells = [slow_linear(second, slow_gelu(slow_norm(norm, slow_linear(first, c)))) for c in stem.flatten(1).T]
    return torch.stack(cells).mean(dim=0)


def test_adapter_is_that_of_a_slow_reading():
    adapter = stir(Adapter(8, 4))
    assert adapter.down.weight.shape == (2, 8)
    tokens = make_image(2, 3, 8)
    want = torch.stack([torch.stack([slow_adapter(adapter, token) for token in image]) for image in tokens])
    torch.testing.assert_close(adapter(tokens), want)


@pytest.mark.parametrize("noisy", [True, False])
def test_router_is_that_of_a_slow_reading(noisy):
    router = stir(Router(8, 3, noisy)).eval()
    stem = make_image(2, 8, 2, 3)
    weights = router(stem)
    assert weights.shape == (2, 3, 1, 1)
    scores = torch.stack([slow_scores(router, image)[:3] for image in stem])
    torch.testing.assert_close(weights[..., 0, 0], scores.exp() / scores.exp().sum(dim=1, keepdim=True))


def test_noise_of_a_router_differs_between_cells_and_has_the_learned_size():
    router = stir(Router(8, 3, noisy=True)).train()
    stem = make_image(1, 8, 100, 120)
    torch.manual_seed(0)
    weights = router(stem)
    assert weights.shape == (1, 3, 100, 120)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(1, 100, 120))
    scores = router.layers(stem.flatten(2).transpose(1, 2)).mean(dim=1)[0]
    # log p_k - log p_j = s_k - s_j + noise_k - noise_j
    difference = (weights[0, 1] / weights[0, 0]).log() - (scores[1] - scores[0])
    deviation = F.softplus(scores[3:]) + 0.01
    assert difference.mean().abs() < 0.05
    assert difference.std().item() == pytest.approx((deviation[0] ** 2 + deviation[1] ** 2).sqrt().item(), rel=0.03)


def test_mixture_weights_each_map():
    weights, maps = make_image(2, 2, 1, 1), [make_image(2, 5, 3, 4, seed=s) for s in (1, 2)]
    want = torch.empty(2, 5, 3, 4)
    for image in range(2):
        want[image] = sum(weights[image, k, 0, 0] * maps[k][image] for k in range(2))
    torch.testing.assert_close(mix(weights, maps), want)


def slow_model(model, image):
    """The same model in loops, for pictures of the size it is made for: returns task -> final map, name -> adapted."""
    vit = model.backbone.net.model
    x = vit.patch_embed.proj(image)
    h, w = x.shape[2:]
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + vit.pos_embed
    residuals = {name: adapters[0](x) for name, adapters in model.adapters.items()}
    chosen, levels, adapted = list(model.backbone.net.feature_info.out_indices), [], {}
    for index, block in enumerate(vit.blocks):
        x = block(x)
        for name, adapters in model.adapters.items():
            residuals[name] = adapters[index + 1](residuals[name] + x)
        if index in chosen:
            maps = [x[:, 1:]]
            for name in model.teachers:
                maps.append(model.norms[name][chosen.index(index)](residuals[name][:, 1:]))
                adapted[f"{name}_level{chosen.index(index) + 1}"] = maps[-1].transpose(1, 2).unflatten(2, (h, w))
            levels.append([m.transpose(1, 2).unflatten(2, (h, w)) for m in maps])
    final = {}
    for task in model.tasks:
        parts = []
        for level, maps in enumerate(levels):
            mixed = torch.zeros_like(maps[0])
            for image_index in range(len(image)):
                weights = slow_scores(model.routers[task][level], maps[0][image_index])[: len(maps)].softmax(dim=0)
                for weight, m in zip(weights, maps):
                    mixed[image_index] += weight * m[image_index]
            projected = model.heads[task].project[level](mixed)
            parts.append(F.interpolate(projected, scale_factor=4, mode="bilinear", align_corners=False))
        conv, norm, _ = model.heads[task].fuse
        fused = conv(torch.cat(parts, dim=1))
        mean, var = (v[:, None, None] for v in (norm.running_mean, norm.running_var))
        normed = (fused - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        final[task] = slow_gelu(normed)
    return final, adapted


@torch.no_grad()
def test_is_what_a_slow_reading_computes():
    model = stir(make_model()).eval()
    image = make_image(2, 3, *NATIVE)
    output = model(image)
    final, adapted = slow_model(model, image)
    assert list(output.features["adapted"]) == list(adapted) or set(output.features["adapted"]) == set(adapted)
    for name, m in adapted.items():
        torch.testing.assert_close(output.features["adapted"][name], m, rtol=1e-4, atol=1e-4)
    for task, m in final.items():
        torch.testing.assert_close(output.features["final"][task], m, rtol=1e-4, atol=1e-4)
        logits = F.interpolate(model.logits[task](m), size=NATIVE, mode="bilinear", align_corners=False)
        torch.testing.assert_close(output.predictions[task], logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sum_has_no_routers_and_adds_up_all_maps():
    model = stir(make_model(routing="sum")).eval()
    assert not list(model.routers.parameters())
    stem, maps = list(model._run_levels(make_image(1, 3, *NATIVE)))[-1]
    mixed = [stem + maps["first"] + maps["second"]]
    assert torch.equal(torch.stack([stem, *maps.values()]).sum(dim=0), mixed[0])
    assert set(model.predict(make_image(1, 3, 50, 70))) == set(TASKS)


# --- Without tasks: the student of the first stage


def test_without_tasks_it_has_adapted_maps_alone():
    student = make_model(tasks={})
    output = student(make_image(2, 3, *NATIVE))
    assert output.predictions == {}
    assert output.features["final"] == {}
    assert {m.shape for m in output.features["adapted"].values()} == {(2, 24, 3, 5)}
    assert output.device == torch.device("cpu")
    assert not [name for name, _ in student.named_parameters() if name.startswith(("routers", "heads", "logits"))]


@pytest.mark.parametrize("size", [NATIVE, (32, 96)])
def test_takes_a_distilled_student_at_another_size(size):
    """Its stem and paths; the position embedding is that of the other size, resampled."""
    student, model = stir(make_model(tasks={}, seed=1, size=size)), make_model()
    initial = {name: p.clone() for name, p in model.state_dict().items()}
    model.load_student(student.state_dict(), size, "student.pt")
    for name, value in model.state_dict().items():
        if name.startswith(("routers", "heads", "logits")):
            assert torch.equal(value, initial[name]), name
        elif not name.endswith("pos_embed"):
            assert torch.equal(value, student.state_dict()[name]), name
    want = student.eval()(make_image(1, 3, *NATIVE)).features["adapted"]
    got = model.eval()(make_image(1, 3, *NATIVE)).features["adapted"]
    assert all(torch.allclose(got[name], want[name], atol=1e-5) for name in want)


def test_refuses_a_student_of_other_teachers():
    student, model = make_model(tasks={}, teachers=["first"]), make_model()
    with pytest.raises(UserError, match=r"student\.pt.*second.* is missing"):
        model.load_student(student.state_dict(), NATIVE, "student.pt")
    with pytest.raises(UserError, match="positions"):
        model.load_student(make_model(tasks={}).state_dict(), (320, 320), "student.pt")


# --- Frozen, other ViTs, wrong options


def test_a_frozen_stem_has_no_graph_and_the_rest_learns():
    model = make_model().train()
    model.backbone.requires_grad_(False)
    model.backbone.is_frozen, model.backbone.frozen_modules = True, ("",)
    output = model(make_image(2, 3, *NATIVE))
    sum(p.square().mean() for p in output.predictions.values()).backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("backbone"))


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_base_patch16_clip_224"])
def test_other_plain_vits(name):
    model = make_model(name=name, kwargs={"depth": 4, "embed_dim": 24, "num_heads": 3})
    assert {p.shape[2:] for p in model.predict(make_image(1, 3, 50, 71)).values()} == {(50, 71)}


def test_refuses_what_it_cannot_be_built_from():
    with pytest.raises(UserError, match="SAK puts adapters beside the blocks of a plain ViT; choose one"):
        SwissArmyKnife(build_backbone("test_resnet"), TASKS)
    with pytest.raises(UserError, match="routing=some is not known; choose mixture or sum"):
        make_model(routing="some")
    with pytest.raises(UserError, match="name at least one teacher"):
        make_model(teachers=[])
    with pytest.raises(UserError, match="reduction=50"):
        make_model(reduction=50)


# --- At its published size


def count_public_parameters(dim, depth, size, tasks, teachers=3, levels=4, reduction=4):
    """The parameters that the authors' classes define, layer by layer (models/backbones/sak.py, vit.py, heads.py)."""

    def linear(inputs, outputs):
        return inputs * outputs + outputs

    norm = 2 * dim
    block = norm + linear(dim, 3 * dim) + linear(dim, dim) + norm + linear(dim, 4 * dim) + linear(4 * dim, dim)
    patches = linear(3 * 16 * 16, dim)
    positions = (size[0] // 16 * (size[1] // 16) + 1) * dim
    vit = patches + dim + positions + depth * block  # its norm is set to None, its classifier has no classes
    inner = dim // reduction
    adapter = linear(dim, inner) + linear(inner, dim) + 1
    router = linear(dim, dim // 2) + 2 * (dim // 2) + linear(dim // 2, 2 * (teachers + 1))
    backbone = vit + teachers * ((depth + 1) * adapter + levels * norm) + levels * len(tasks) * router
    head = 4 * linear(dim, dim // 4) + linear(9 * dim, dim) + norm
    return backbone + sum(head + linear(dim, channels) for channels in tasks.values())


@pytest.mark.parametrize(
    ("name", "dim", "depth", "size", "tasks", "total"),
    [
        ("vit_base_patch16_384", 768, 12, (448, 576), NYUD, get_published_parameters("nyud_sak_vit_base")),
        ("vit_base_patch16_384", 768, 12, (512, 512), PASCAL, get_published_parameters("pascal_sak_vit_base")),
        ("vit_large_patch16_384", 1024, 24, (448, 576), NYUD, get_published_parameters("nyud_sak_vit_large")),
        ("vit_large_patch16_384", 1024, 24, (512, 512), PASCAL, get_published_parameters("pascal_sak_vit_large")),
        ("vit_small_patch16_384", 384, 12, (384, 384), {}, 24_714_183),
        ("vit_base_patch16_384", 768, 12, (384, 384), {}, 97_646_439),
        ("vit_large_patch16_384", 1024, 24, (384, 384), {}, 343_130_955),
    ],
)
def test_has_the_parameters_of_the_public_code(name, dim, depth, size, tasks, total):
    with torch.device("meta"):
        model = SwissArmyKnife(build_backbone(name), tasks, size=size)
    assert count_public_parameters(dim, depth, size, tasks) == total
    assert sum(p.numel() for p in model.parameters()) == total


# --- Published checkpoints


PUBLISHED_VIT = {**VIT, "mlp_ratio": 4.0}


def make_published(tasks):
    shapes = published_shapes(tasks, TEACHERS, NATIVE, VIT["embed_dim"], VIT["depth"])
    return random_state(shapes)


@pytest.mark.parametrize(("tasks", "prefix"), [(TASKS, "backbone."), ({}, "")], ids=["second stage", "first stage"])
def test_published_names_fill_the_model(tasks, prefix):
    model, state = make_model(tasks=tasks, kwargs=PUBLISHED_VIT), make_published(tasks)
    overrides = sak.get_config_overrides(state, NATIVE)
    expected = {"size": list(NATIVE), "teachers": TEACHERS, "reduction": 4}
    expected |= {"routing": "mixture", "noisy_gating": True} if tasks else {}
    assert overrides["decoder"] == expected
    assert overrides["backbone"] == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    ours, unused_keys = translate_state_dict(state, METHODS["sak"], list(tasks))
    check_state_dict(ours, model.state_dict(), "sak")
    assert len(unused_keys) == 16
    assert all("ts_aligners" in key for key in unused_keys)
    level = model.level_blocks.index(2)
    assert torch.equal(ours[f"norms.second.{level}.bias"], state[f"{prefix}out_norms.2_second.bias"])
    if tasks:
        name = "backbone.mor.2_depth.router.module.3.bias"
        assert torch.equal(ours[f"routers.depth.{level}.layers.3.bias"], state[name])
        assert torch.equal(ours["heads.depth.project.1.weight"][..., 0, 0], state["heads.depth.linears.1.weight"])


def test_a_file_of_another_method_is_refused():
    with pytest.raises(UserError, match="has no adapters"):
        sak.get_config_overrides({"backbone.pos_embed": torch.ones(1, 3, 4)}, NATIVE)
    state = make_published(TASKS)
    with pytest.raises(UserError, match="15 patches, images of 32x32 have 2x2"):
        sak.get_config_overrides(state, (32, 32))
    with pytest.raises(UserError, match=r"1 of .* not known .* backbone\.novelty"):
        translate_state_dict({**state, "backbone.novelty": torch.ones(1)}, METHODS["sak"], list(TASKS))
