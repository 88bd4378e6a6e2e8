"""Backbones of every family, weights from files, the multi-task baseline, and what a model promises."""

import math
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.common import ROOT
from safetensors.torch import load_file, save_file
from torch import nn

from mtcl import UserError
from mtcl.models import EncoderDecoder, build_backbone
from mtcl.models.decoders import MultiHead
from mtcl.models.decoders.blocks import Fusion, resize
from mtcl.regularizers import Contrastive, MaskedAdamW
from mtcl.tasks import build_task

TASKS = {"semseg": 7, "depth": 1, "normals": 3, "edge": 1}
VIT = {"depth": 4, "embed_dim": 48, "num_heads": 3}
SWIN = {"embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2)}
FAMILIES = {  # name -> timm's name, its options, strides
    "cnn": ("test_resnet", {}, [4, 8, 16, 32]),
    "mobile": ("mobilenetv2_050", {}, [4, 8, 16, 32]),
    "vit": ("vit_tiny_patch16_224", VIT, [16] * 4),
    "vit with patches of 14": ("vit_small_patch14_dinov2", VIT, [14] * 4),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, [4, 8, 16, 32]),
    "hrnet": ("hrnet_w18_small", {}, [4, 8, 16, 32]),
}
IMAGENET = ROOT.parent / "shared/weights/mobilenetv2_100_imagenet.safetensors"


def make_model(family="cnn", tasks=TASKS, seed=0, **options):
    torch.manual_seed(seed)
    name, kwargs, _ = FAMILIES[family]
    backbone = build_backbone(name, kwargs=kwargs)
    return EncoderDecoder(
        backbone, MultiHead(backbone.channels, backbone.strides, tasks, width=12, head_width=8, **options)
    )


def make_image(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def cnn():
    return make_model().eval()


# --- Shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_any_backbone_takes_any_size(family):
    model = make_model(family).eval()
    backbone = model.backbone
    assert backbone.strides == FAMILIES[family][2]
    multiple = backbone.multiple
    assert multiple == max(backbone.strides)
    for batch, height, width in ((1, 50, 70), (2, 3 * multiple, 2 * multiple)):
        image = make_image(batch, 3, height, width)
        with torch.no_grad():
            output = model(image)
            features = backbone(make_image(batch, 3, *output.frame))
        assert output.frame[0] % multiple == output.frame[1] % multiple == 0
        assert 0 <= output.frame[0] - height < multiple
        assert 0 <= output.frame[1] - width < multiple
        for feature, channels, stride in zip(features, backbone.channels, backbone.strides, strict=True):
            assert feature.shape == (batch, channels, output.frame[0] // stride, output.frame[1] // stride)
        assert {t: tuple(p.shape) for t, p in output.predictions.items()} == {
            t: (batch, channels, height, width) for t, channels in TASKS.items()
        }
        assert all(p.isfinite().all() for p in output.predictions.values())
        assert {
            k: {t: f.shape[1] for t, f in features.items()} for k, features in output.features.items()
        } == model.feature_channels
        size = tuple(-(-side // 4) for side in output.frame)
        assert all(
            f.shape[0] == batch and f.shape[2:] == size
            for features in output.features.values()
            for f in features.values()
        )


def test_features_depend_on_where_the_picture_shows_something():
    """Height and width are not confused: a spot shows in the feature place that lies over it."""
    for family in ("cnn", "swin", "vit"):
        backbone = make_model(family).backbone.eval()
        plain = torch.zeros(1, 3, 64, 160)
        spot = plain.clone()
        spot[..., 8:24, 130:150] = 5.0
        with torch.no_grad():
            before, after = backbone(plain)[0], backbone(spot)[0]
        change = (after - before).abs().sum(dim=(0, 1))
        stride = backbone.strides[0]
        row, column = divmod(int(change.argmax()), change.shape[1])
        assert 0 <= row * stride <= 32, family
        assert 120 <= column * stride <= 156, family


@pytest.mark.parametrize("tasks", [("depth",), ("edge", "semseg"), ("normals", "depth", "edge"), tuple(TASKS)])
@pytest.mark.parametrize("training", [False, True])
def test_any_subset_of_tasks(tasks, training):
    channels = {t: TASKS[t] for t in tasks}
    model = make_model(tasks=channels).train(training)
    assert model.feature_channels == {"final": dict.fromkeys(tasks, 8), "trunk": dict.fromkeys(tasks, 12)}
    output = model(make_image(1, 3, 50, 70))
    assert list(output.predictions) == list(tasks)
    assert output.intermediate == []
    assert [list(features) for features in output.features.values()] == [list(tasks)] * 2
    for t, prediction in output.predictions.items():
        assert prediction.shape == (1, TASKS[t], 50, 70)
        if len(tasks) > 1:
            assert output.features["trunk"][t] is output.features["trunk"][tasks[0]]
    sum(p.square().mean() for p in output.predictions.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decoder.parameters())


def test_padding_lies_at_the_right_and_bottom(cnn):
    image = make_image(2, 3, 50, 70)
    padded = F.pad(image, (0, 96 - 70, 0, 64 - 50))
    with torch.no_grad():
        small, large = cnn(image), cnn(padded)
    assert small.frame == large.frame == (64, 96)
    for t in TASKS:
        assert torch.equal(small.predictions[t], large.predictions[t][..., :50, :70])
        assert torch.equal(small.features["final"][t], large.features["final"][t])


def test_batch_of_one_is_as_in_a_larger_batch(cnn):
    image = make_image(3, 3, 64, 64)
    with torch.no_grad():
        alone, together = cnn.predict(image[1:2]), cnn.predict(image)
    for t in TASKS:
        torch.testing.assert_close(alone[t], together[t][1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 96), (112, 64)])
def test_position_embeddings_fit_the_pictures_shape(size):
    """A ViT at another shape is the ViT made for that shape, with its position embedding resampled."""
    torch.manual_seed(0)
    any_size = build_backbone("vit_tiny_patch16_224", kwargs=VIT).eval()
    made_for = build_backbone("vit_tiny_patch16_224", kwargs={**VIT, "img_size": size}).eval()
    state = any_size.state_dict()
    (key,) = [key for key in state if key.endswith("pos_embed")]
    state[key] = state[key] * 20  # so that it matters
    any_size.load_state_dict(state)
    first, rest = state[key][:, :1], state[key][:, 1:]
    grid = rest.view(1, 14, 14, 48).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, [s // 16 for s in size], mode="bicubic", antialias=True, align_corners=False)
    resampled = torch.cat([first, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    made_for.load_state_dict({**state, key: resampled})
    image = make_image(2, 3, *size)
    with torch.no_grad():
        got, want = any_size(image), made_for(image)
        state[key] = torch.zeros_like(state[key])
        any_size.load_state_dict(state)
        without = any_size(image)
    for a, b, c in zip(got, want, without):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(a, c, rtol=1e-2, atol=1e-2)


def test_default_levels():
    assert build_backbone("test_resnet").strides == [4, 8, 16, 32]  # not the stem's stride 2
    chosen = build_backbone("test_resnet", out_indices=[0, 2])
    assert chosen.strides == [2, 8]
    assert [f.shape[-1] for f in chosen(make_image(1, 3, 32, 32))] == [16, 4]
    vit = build_backbone("vit_tiny_patch16_224", kwargs={**VIT, "depth": 8})
    assert list(vit.net.feature_info.out_indices) == [1, 3, 5, 7]  # the ends of the quarters


def test_normalisation_is_timms_unless_given():
    assert build_backbone("test_resnet").mean == timm.get_pretrained_cfg("test_resnet").mean
    vit = build_backbone("vit_tiny_patch16_224", kwargs=VIT)
    assert (vit.mean, vit.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    given = build_backbone("test_resnet", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    model = EncoderDecoder(given, MultiHead(given.channels, given.strides, TASKS))
    assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


# --- Weights from files

# HRNet's feature net is built apart from its whole model; the others are the whole model, cut.
FROM_FILE = ["cnn", "mobile", "vit", "swin", "hrnet"]


def make_whole(family, seed=1):
    """The full timm model, every tensor of it changed, so that none keeps a value it would have anyway."""
    name, kwargs, _ = FAMILIES[family]
    whole = timm.create_model(name, **kwargs).eval()
    generator = torch.Generator().manual_seed(seed)
    for tensor in whole.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(0.8 + 0.4 * torch.rand(tensor.shape, generator=generator))
            tensor.add_(0.02 * torch.rand(tensor.shape, generator=generator))
        else:
            tensor.fill_(5)  # num_batches_tracked
    return whole


def write(path, state, wrap=None):
    if path.suffix == ".safetensors":
        save_file({key: value.clone() for key, value in state.items()}, path)
    else:
        torch.save({wrap: state, "epoch": 3} if wrap else state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("family", FROM_FILE)
def test_features_of_a_file_are_the_whole_models(family, suffix, tmp_path):
    whole = make_whole(family)
    path = write(tmp_path / f"weights{suffix}", whole.state_dict())
    name, kwargs, _ = FAMILIES[family]
    backbone = build_backbone(name, weights=path, kwargs=kwargs).eval()
    size = (224, 224) if family in ("vit", "swin") else (64, 96)
    image = make_image(1, 3, *size)
    with torch.no_grad():
        got = backbone(image)
        if family == "hrnet":
            branches = whole.stages(whole.act2(whole.bn2(whole.conv2(whole.act1(whole.bn1(whole.conv1(image)))))))
            want = [grow(branch) for grow, branch in zip(whole.incre_modules, branches)]
        else:
            indices = list(backbone.net.feature_info.out_indices)
            options = {"norm": False} if family == "vit" else {}
            want = whole.forward_intermediates(image, indices=indices, intermediates_only=True, **options)
            if family == "vit":  # the last map has the final normalisation, as the whole model's features
                whole_map = whole.forward_features(image)[:, whole.num_prefix_tokens :]
                want[-1] = whole_map.transpose(1, 2).unflatten(2, want[-1].shape[-2:])
    assert len(got) == len(want) == 4
    for a, b in zip(got, want):
        assert torch.equal(a, b)
        assert a.isfinite().all()
        assert a.std() > 0


@pytest.mark.parametrize("wrap", ["state_dict", "model", "state_dict_ema"])
def test_wrapped_and_prefixed_files(wrap, tmp_path):
    state = make_whole("cnn").state_dict()
    plain = build_backbone("test_resnet", weights=write(tmp_path / "plain.pth", state))
    prefixed = {f"module.{key}": value for key, value in state.items()}
    other = build_backbone("test_resnet", weights=str(write(tmp_path / "other.pth", prefixed, wrap)))
    own = plain.state_dict()
    assert own.keys() == other.state_dict().keys()
    assert all(torch.equal(value, own[key]) for key, value in other.state_dict().items())
    assert all(torch.equal(value, state[key.removeprefix("net.")]) for key, value in own.items())


def test_position_embedding_of_another_size_is_resampled(tmp_path):
    name = "vit_tiny_patch16_224"
    torch.manual_seed(0)
    whole = timm.create_model(name, img_size=160, **VIT)
    path = write(tmp_path / "at160.pth", whole.state_dict())
    state = build_backbone(name, weights=path, kwargs=VIT).state_dict()
    (key,) = [key for key in state if key.endswith("pos_embed")]
    assert state[key].shape == (1, 1 + 14 * 14, 48)
    assert torch.equal(state[key][:, 0], whole.pos_embed[:, 0])
    grid = whole.pos_embed[:, 1:].view(1, 10, 10, 48).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (14, 14), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    torch.testing.assert_close(state[key][:, 1:], grid.flatten(1, 2))


class Evil:
    """Would create a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def bad_file(what, folder):
    path = folder / "bad.pth"
    if what == "missing":
        return path
    if what == "folder":
        return folder
    if what in ("truncated", "truncated safetensors"):
        path = path.with_suffix(".safetensors" if what.endswith("safetensors") else ".pth")
        write(path, make_whole("cnn").state_dict())
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif what == "empty file":
        path.touch()
    elif what == "text":
        path.write_text("not weights at all\n")
    elif what == "pickled code":
        torch.save({"weight": torch.ones(1), "x": Evil(folder / "executed")}, path)
    elif what == "plain pickle of code":
        path.write_bytes(pickle.dumps(Evil(folder / "executed"), protocol=2))
    else:
        content = {
            "list": [torch.ones(1)],
            "one tensor": torch.ones(3),
            "numbers": {"weight": 1.0},
            "numbers beside tensors": {**make_whole("cnn").state_dict(), "epoch": 3},
            "keys that are numbers": {0: torch.ones(1)},
            "nothing": {},
            "nothing inside": {"state_dict": {}},
            "another family": make_whole("mobile").state_dict(),
            "a prefix of its own": {f"encoder.{k}": v for k, v in make_whole("cnn").state_dict().items()},
            **{
                f"of {kind}": {k: v.to(kind) if v.dim() == 4 else v for k, v in make_whole("cnn").state_dict().items()}
                for kind in (torch.int8, torch.complex64)
            },
            "not finite": {k: v * math.inf if v.dim() == 4 else v for k, v in make_whole("cnn").state_dict().items()},
            "one tensor missing": {
                k: v for k, v in make_whole("cnn").state_dict().items() if k != "layer3.0.bn1.weight"
            },
        }[what]
        torch.save(content, path)
    return path


BAD_FILES = {
    "missing": "is not a file",
    "folder": "is not a file",
    "truncated": "can't be read",
    "truncated safetensors": "can't be read",
    "empty file": "can't be read",
    "text": "can't be read",
    "pickled code": "can't be read",
    "plain pickle of code": "can't be read",
    "list": "no state dict",
    "one tensor": "no state dict",
    "numbers": "no state dict",
    "numbers beside tensors": "no state dict",
    "keys that are numbers": "no state dict",
    "nothing": "no state dict",
    "nothing inside": "no state dict",
    "another family": "lacks",
    "a prefix of its own": "lacks",
    "one tensor missing": "lacks 1 of",
    "of torch.int8": "numbers of type torch.int8",
    "of torch.complex64": "numbers of type torch.complex64",
    "not finite": "NaN or infinite",
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files_are_refused(what, tmp_path):
    path = bad_file(what, tmp_path)
    with pytest.raises(UserError) as error:
        build_backbone("test_resnet", weights=path)
    assert f"{path} " in str(error.value)
    assert BAD_FILES[what] in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "kwargs", "other", "other_kwargs", "reason"),
    [
        ("resnet18", {}, "resnet26", {}, "does not fit"),  # every name is there, with other shapes
        ("mobilenetv2_100", {}, "mobilenetv2_050", {}, "does not fit"),  # half as wide
        ("vit_tiny_patch16_224", VIT, "vit_tiny_patch16_224", {**VIT, "embed_dim": 96}, "does not fit"),
        ("resnet18", {}, "resnet34", {}, "deeper"),  # every name with its shape, and more
        ("vit_tiny_patch16_224", VIT, "vit_tiny_patch16_224", {**VIT, "depth": 6}, "deeper"),
        ("vit_tiny_patch16_224", {**VIT, "depth": 6}, "vit_tiny_patch16_224", VIT, "lacks"),
    ],
)
def test_files_of_relatives_are_refused(name, kwargs, other, other_kwargs, reason, tmp_path):
    path = write(tmp_path / "relative.pth", timm.create_model(other, **other_kwargs).state_dict())
    with pytest.raises(UserError, match=reason) as error:
        build_backbone(name, weights=path, kwargs=kwargs)
    assert str(path) in str(error.value)
    assert name in str(error.value)


def test_a_file_without_the_classifier_will_do(tmp_path):
    state = make_whole("cnn").state_dict()
    bare = {key: value for key, value in state.items() if not key.startswith("fc.")}
    bare["fc.weight"] = torch.ones(3, 5)  # nor need it have timm's number of classes
    backbone = build_backbone("test_resnet", weights=write(tmp_path / "bare.pth", bare))
    assert torch.equal(backbone.net.state_dict()["conv1.0.weight"], state["conv1.0.weight"])


@pytest.mark.skipif(not IMAGENET.is_file(), reason="the shared ImageNet weights are not here")
def test_real_imagenet_weights():
    kwargs = {"pad_type": "same"}
    backbone = build_backbone("mobilenetv2_100", weights=IMAGENET, kwargs=kwargs, mean=[0.5] * 3, std=[0.5] * 3).eval()
    whole = timm.create_model("mobilenetv2_100", **kwargs).eval()
    whole.load_state_dict(load_file(IMAGENET), strict=True)
    image = make_image(2, 3, 96, 64)
    indices = list(backbone.net.feature_info.out_indices)
    with torch.no_grad():
        got = backbone(image)
        want = whole.forward_intermediates(image, indices=indices, intermediates_only=True)
    assert [f.shape[1] for f in got] == backbone.channels
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)


# --- The hub and names: no test here touches the network


@pytest.mark.parametrize(
    "error", [ConnectionError("no route to host"), OSError("403 Forbidden\nmore"), RuntimeError("")]
)
def test_an_unreachable_hub_is_a_user_error(error, monkeypatch):
    create, asked = timm.create_model, []

    def offline(name, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        if pretrained:
            raise error
        return create(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="weights=hub gave no weights for backbone test_resnet") as caught:
        build_backbone("test_resnet", weights="hub")
    assert asked[-1] == ("test_resnet", True)  # and no second try without weights
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_without_weights_the_hub_is_never_asked(monkeypatch, tmp_path):
    create = timm.create_model

    def offline(name, pretrained=False, **kwargs):
        assert not pretrained
        return create(name, pretrained=False, **kwargs)

    path = write(tmp_path / "weights.pth", make_whole("cnn").state_dict())
    monkeypatch.setattr(timm, "create_model", offline)
    build_backbone("test_resnet")
    build_backbone("test_resnet", weights=path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("resnet19", "did you mean resnet18"), ("vit_tiny_patch16_223", "did you mean vit_tiny_patch16_224"),
     ("", "list_models"), ("resnet18.no_such_tag", "tag")],
)  # fmt: skip
def test_unknown_names(name, hint):
    with pytest.raises(UserError, match=hint) as error:
        build_backbone(name)
    assert f"name={name} " in str(error.value)


def test_a_known_tag_is_accepted():
    assert build_backbone("test_resnet.r160_in1k").channels == build_backbone("test_resnet").channels


def test_a_model_of_a_fixed_size():
    with pytest.raises(UserError, match=r"its own size only.*kwargs \{img_size"):
        build_backbone("mixer_s16_224")
    backbone = build_backbone("mixer_s16_224", kwargs={"img_size": (32, 64)})
    assert [tuple(f.shape) for f in backbone(make_image(2, 3, 32, 64))] == [(2, 512, 2, 4)] * 4


@pytest.mark.parametrize("options", [{"kwargs": {"window_size": 7}}, {"out_indices": (1, 99)}])
def test_options_that_timm_refuses(options):
    with pytest.raises(UserError, match="backbone test_resnet with kwargs"):
        build_backbone("test_resnet", **options)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"pretrained": True},
        {"checkpoint_path": "weights.pth"},
        {"pretrained_cfg": {"url": "http://127.0.0.1:9/x", "architecture": "mobilenetv2_100"}},
        {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/.bashrc", "source": "url", "hf_hub_id": None}},
        {"cache_dir": "folder"},
        {"feature_cls": "fx"},
        {"scriptable": True},
        {"num_classes": 5},
        {"norm_layer": "../../x"},
        {"embed_dim": 10**9},
        {"depths": [[[[1]]]]},
        {"stage1": {"a/b": 1}},
        {5: 1},
    ],
    ids=str,
)
def test_only_architecture_arguments_reach_timm(kwargs, monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("timm was asked"))
    with pytest.raises(UserError, match=rf"kwargs\.{next(iter(kwargs))}[ =]"):
        build_backbone("mobilenetv2_100", kwargs=kwargs)


# --- The decoder


@pytest.mark.parametrize("training", [True, False])
def test_fusion_is_a_convolution_of_the_concatenation(training):
    torch.manual_seed(0)
    channels, sides, size, width = (3, 5, 2), ((8, 12), (4, 6), (3, 2)), (8, 12), 7
    fusion = Fusion(channels, width).train(training)
    reference = nn.BatchNorm2d(width).train(training)
    with torch.no_grad():
        for parameter in (fusion.norm.weight, fusion.norm.bias, fusion.norm.running_mean):
            parameter.uniform_(-1, 1)
    reference.load_state_dict(fusion.norm.state_dict())
    features = [torch.randn(2, c, *side) for c, side in zip(channels, sides)]
    stacked = torch.cat([F.interpolate(f, size, mode="bilinear", align_corners=False) for f in features], dim=1)
    weight = torch.cat([conv.weight for conv in fusion.project], dim=1)
    want = reference(F.conv2d(stacked, weight)).clamp(min=0)
    torch.testing.assert_close(fusion(features, size), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fusion.norm.running_var, reference.running_var)
    assert 0.1 < (want > 0).float().mean() < 0.9


def test_resize():
    x = make_image(1, 2, 4, 6)
    assert resize(x, [4, 6]) is x
    assert resize(x, (8, 3)).shape == (1, 2, 8, 3)
    row = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    assert resize(row, (1, 4)).flatten().tolist() == [0, 0.25, 0.75, 1]


def ids(parameters):
    parameters = [id(p) for p in parameters]
    assert len(parameters) == len(set(parameters))
    return set(parameters)


def test_parameters_are_shared_or_of_one_task(cnn):
    every, backbone, shared = ids(cnn.parameters()), ids(cnn.backbone_parameters()), ids(cnn.shared_parameters())
    decoder = ids(cnn.decoder.parameters())
    assert backbone
    assert backbone < shared < every
    assert backbone | decoder == every
    assert not backbone & decoder
    own = {t: ids([*cnn.decoder.heads[t].parameters(), *cnn.decoder.logits[t].parameters()]) for t in TASKS}
    assert sum(len(own[t]) for t in TASKS) + len(shared) == len(every)  # disjoint, and nothing else
    assert set().union(*own.values()) | shared == every


def test_a_tasks_loss_reaches_what_is_shared_and_its_own_head():
    model = make_model()
    model(make_image(2, 3, 64, 64)).predictions["depth"].square().mean().backward()
    reached = {id(p) for p in model.parameters() if p.grad is not None}
    head = [*model.decoder.heads["depth"].parameters(), *model.decoder.logits["depth"].parameters()]
    assert reached == ids(model.shared_parameters()) | ids(head)


def test_stride_and_depth_of_the_heads():
    model = make_model(stride=8, depth=3).eval()
    output = model(make_image(1, 3, 50, 70))
    assert output.features["final"]["edge"].shape == (1, 8, 8, 12)
    assert len(model.decoder.heads["edge"]) == 3


def test_compiles_as_one_graph(cnn):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    image = make_image(1, 3, 50, 70)
    with torch.no_grad():
        want = cnn(image)
        got = torch.compile(cnn, fullgraph=True, backend="eager")(image)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert got.frame == want.frame
    for t in TASKS:
        torch.testing.assert_close(got.predictions[t], want.predictions[t])
        torch.testing.assert_close(got.features["final"][t], want.features["final"][t])
    torch._dynamo.reset()


# --- Nothing of training in a model


@pytest.mark.parametrize("training", [True, False])
def test_predict_is_forward(training):
    first, second = make_model().train(training), make_model().train(training)
    image = make_image(2, 3, 50, 70)
    with torch.no_grad():
        predictions, output = first.predict(image), second(image)
    assert list(predictions) == list(output.predictions)
    assert all(torch.equal(predictions[t], output.predictions[t]) for t in TASKS)


def test_a_regulariser_leaves_no_trace_in_the_model():
    plain = make_model()
    torch.manual_seed(0)
    tasks = {t: build_task(t) for t in ("depth", "normals", "edge")}
    model = make_model()
    regularizer = Contrastive(tasks, model.feature_channels["final"], num_pixels=32, embed_dim=4, hidden_dim=4)
    optimizer = MaskedAdamW(regularizer.parameters(), lr=0.1)
    model.eval()
    output = model(make_image(2, 3, 50, 70))
    labels = {
        "depth": torch.rand(2, 1, 50, 70) * 5 + 1,
        "normals": F.normalize(torch.randn(2, 3, 50, 70), dim=1),
        "edge": torch.rand(2, 1, 50, 70).round(),
    }
    features = {t: output.features["final"][t] for t in tasks}
    before = [p.detach().clone() for p in regularizer.parameters()]
    regularizer(features, labels, regularizer.sample(0, ["a", "b"]), output.frame).loss.backward()
    assert all(p.grad is not None for p in model.backbone_parameters() if p.requires_grad)  # it does teach the model
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, regularizer.parameters()))
    one, other = plain.state_dict(), model.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())
    image = make_image(1, 3, 64, 32, seed=1)
    with torch.no_grad():
        a, b = plain.eval()(image), model(image)
    assert all(torch.equal(a.predictions[t], b.predictions[t]) for t in TASKS)
    assert all(torch.equal(a.features[k][t], b.features[k][t]) for k in a.features for t in TASKS)
