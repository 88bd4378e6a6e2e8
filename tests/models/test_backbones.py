"""Backbones: levels, normalisation, and weights from files and hubs."""

import math
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.common import ROOT
from helpers.small_models import FAMILIES, TASKS, VIT, make_image
from safetensors.torch import load_file, save_file

from mtcl import UserError
from mtcl.models import EncoderDecoder, build_backbone
from mtcl.models.decoders import MultiHead

IMAGENET = ROOT.parent / "shared/weights/mobilenetv2_100_imagenet.safetensors"


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
    backbone = build_backbone("test_resnet", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    model = EncoderDecoder(backbone, MultiHead(backbone.channels, backbone.strides, TASKS))
    assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_upsample_mode_of_an_hrnet():
    name, kwargs, _ = FAMILIES["hrnet"]
    image = make_image(1, 3, 64, 96)
    maps = {}
    for mode in (None, "bilinear"):
        torch.manual_seed(0)
        backbone = build_backbone(name, kwargs=kwargs, upsample_mode=mode).eval()
        with torch.no_grad():
            maps[mode] = backbone(image)
    assert maps[None][0].shape == maps["bilinear"][0].shape
    assert not torch.allclose(maps[None][0], maps["bilinear"][0])
    with pytest.raises(UserError, match="upsample_mode=bicubic must be one of nearest, bilinear, or null"):
        build_backbone(name, kwargs=kwargs, upsample_mode="bicubic")
    with pytest.raises(UserError, match="upsample_mode=bilinear is for HRNets; test_resnet upsamples nothing"):
        build_backbone("test_resnet", upsample_mode="bilinear")


def test_maps_after_the_convolutions_of_a_vgg_net():
    with torch.device("meta"):
        backbone = build_backbone("vgg11", maps_after="convolutions", out_indices=[0, 1, 2, 3, 7])
        sides = [f.shape[1:] for f in backbone(torch.zeros(1, 3, 32, 64))]
    assert (backbone.channels, backbone.strides) == ([64, 128, 256, 256, 512], [1, 2, 4, 4, 16])
    assert sides == [(c, 32 // s, 64 // s) for c, s in zip(backbone.channels, backbone.strides)]
    with pytest.raises(UserError, match="maps_after=blocks must be one of stages, convolutions"):
        build_backbone("vgg11", maps_after="blocks")
    with pytest.raises(UserError, match="maps_after=convolutions is for VGG nets; give stages for test_resnet"):
        build_backbone("test_resnet", maps_after="convolutions", out_indices=[0])
    with pytest.raises(UserError, match="out_indices=null with maps_after=convolutions; say which"):
        build_backbone("vgg11", maps_after="convolutions")


# HRNet's feature net is built apart from its whole model; the others are the whole model, cut.
FROM_FILE = ["cnn", "mobile", "vit", "swin", "hrnet"]


def make_whole(family, seed=1):
    """The full timm model, every tensor of it changed, so that none keeps a value it would have anyway."""
    name, kwargs, _ = FAMILIES[family]
    network = timm.create_model(name, **kwargs).eval()
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(0.8 + 0.4 * torch.rand(tensor.shape, generator=generator))
            tensor.add_(0.02 * torch.rand(tensor.shape, generator=generator))
        else:
            tensor.fill_(5)  # num_batches_tracked
    return network


def write(path, state, wrap=None):
    if path.suffix == ".safetensors":
        save_file({key: value.clone() for key, value in state.items()}, path)
    else:
        torch.save({wrap: state, "epoch": 3} if wrap else state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("family", FROM_FILE)
def test_features_of_a_file_are_the_whole_models(family, suffix, tmp_path):
    network = make_whole(family)
    path = write(tmp_path / f"weights{suffix}", network.state_dict())
    name, kwargs, _ = FAMILIES[family]
    backbone = build_backbone(name, weights=path, kwargs=kwargs).eval()
    size = (224, 224) if family in ("vit", "swin") else (64, 96)
    image = make_image(1, 3, *size)
    with torch.no_grad():
        got = backbone(image)
        if family == "hrnet":
            branches = network.stages(
                network.act2(network.bn2(network.conv2(network.act1(network.bn1(network.conv1(image))))))
            )
            want = [grow(branch) for grow, branch in zip(network.incre_modules, branches)]
        else:
            indices = list(backbone.net.feature_info.out_indices)
            options = {"norm": False} if family == "vit" else {}
            want = network.forward_intermediates(image, indices=indices, intermediates_only=True, **options)
            if family == "vit":  # the last map has the final normalisation, as the whole model's features
                whole_map = network.forward_features(image)[:, network.num_prefix_tokens :]
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
    plain_state = plain.state_dict()
    assert plain_state.keys() == other.state_dict().keys()
    assert all(torch.equal(value, plain_state[key]) for key, value in other.state_dict().items())
    assert all(torch.equal(value, state[key.removeprefix("net.")]) for key, value in plain_state.items())


def test_position_embedding_of_another_size_is_resampled(tmp_path):
    name = "vit_tiny_patch16_224"
    torch.manual_seed(0)
    network = timm.create_model(name, img_size=160, **VIT)
    path = write(tmp_path / "at160.pth", network.state_dict())
    state = build_backbone(name, weights=path, kwargs=VIT).state_dict()
    (key,) = [key for key in state if key.endswith("pos_embed")]
    assert state[key].shape == (1, 1 + 14 * 14, 48)
    assert torch.equal(state[key][:, 0], network.pos_embed[:, 0])
    grid = network.pos_embed[:, 1:].view(1, 10, 10, 48).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (14, 14), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    torch.testing.assert_close(state[key][:, 1:], grid.flatten(1, 2))


class Evil:
    """Would create a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def bad_file(fault, folder):
    path = folder / "bad.pth"
    if fault == "missing":
        return path
    if fault == "folder":
        return folder
    if fault in ("truncated", "truncated safetensors"):
        path = path.with_suffix(".safetensors" if fault.endswith("safetensors") else ".pth")
        write(path, make_whole("cnn").state_dict())
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif fault == "empty file":
        path.touch()
    elif fault == "text":
        path.write_text("not weights at all\n")
    elif fault == "pickled code":
        torch.save({"weight": torch.ones(1), "x": Evil(folder / "executed")}, path)
    elif fault == "plain pickle of code":
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
        }[fault]
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


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_files_are_refused(fault, tmp_path):
    path = bad_file(fault, tmp_path)
    with pytest.raises(UserError) as error:
        build_backbone("test_resnet", weights=path)
    assert f"{path} " in str(error.value)
    assert BAD_FILES[fault] in str(error.value)
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


def name_as_dinov3(state, bias, depth=4):
    """A state dict of timm's under the names of DINOv3's code, its biases of queries, keys and values alike."""
    renames = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    for old, new in renames.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    width = state["cls_token"].shape[-1]
    for i in range(depth):
        state[f"blocks.{i}.attn.qkv.bias"] = torch.full((3 * width,), bias)
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(3 * width)
    return {**state, "mask_token": torch.zeros(1, width), "rope_embed.periods": torch.ones(4)}


def test_the_authors_files_of_dinov3(tmp_path):
    """timm's models have no biases of queries and values, which are 0 in the larger files; others are refused."""
    kwargs, path = {"embed_dim": 32, "depth": 4, "num_heads": 2}, tmp_path / "dinov3.pth"
    name = "vit_small_patch16_dinov3"
    state = timm.create_model(name, **kwargs).state_dict()
    torch.save(name_as_dinov3(state, 0.0), path)
    backbone = build_backbone(name, weights=path, kwargs=kwargs)
    assert all(
        torch.equal(value, state[key.removeprefix("model.")]) for key, value in backbone.net.state_dict().items()
    )
    torch.save(name_as_dinov3(state, 0.5), path)
    with pytest.raises(UserError, match=f"has biases .*choose timm's model with them .backbone {name}_qkvb"):
        build_backbone(f"{name}.lvd1689m", weights=path, kwargs=kwargs)
    parameters = dict(build_backbone(f"{name}_qkvb", weights=path, kwargs=kwargs).net.named_parameters())
    assert all(parameters[f"model.blocks.{i}.attn.{kind}_bias"].eq(0.5).all() for i in range(4) for kind in "qv")


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
    network = timm.create_model("mobilenetv2_100", **kwargs).eval()
    network.load_state_dict(load_file(IMAGENET), strict=True)
    image = make_image(2, 3, 96, 64)
    indices = list(backbone.net.feature_info.out_indices)
    with torch.no_grad():
        got = backbone(image)
        want = network.forward_intermediates(image, indices=indices, intermediates_only=True)
    assert [f.shape[1] for f in got] == backbone.channels
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)


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
