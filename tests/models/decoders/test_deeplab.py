"""DeepLab heads: the pyramid against loops, the contract, sizes of the public code."""

import pytest
import torch
import torch.nn.functional as F
from helpers import decoder_checks as checks
from helpers.common import composed
from helpers.decoder_checks import NYUD2, NYUD4, PASCAL, PYRAMID, TASKS, VIT
from helpers.published import get_published_parameters
from torch import nn
from torchvision.models import resnet50
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_regularizer
from mtcl.models.decoders import DeepLab
from mtcl.models.decoders.deeplab import ASPP

NYUV2_13 = {"semseg": 13, "depth": 1, "normals": 3}
CITYSCAPES = {"semseg": 7, "depth": 1}


def make(channels, strides, tasks, **options):
    options = {"width": 8, "rates": (1, 2), "skip_width": 4, "dropout": 0.0, **options}
    return DeepLab(channels, strides, tasks, **options)


def make_v3(channels, strides, tasks):
    return make(channels, strides, tasks, skip_width=0, depth=1)


def test_pyramid_against_loops():
    torch.manual_seed(0)
    inputs, width, rates, (rows, columns) = 3, 2, (2, 3), (5, 4)
    module = ASPP(inputs, width, rates, dropout=0.5).eval()
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    x = torch.randn(2, inputs, rows, columns)

    def convolved(convolution, norm, rate):
        weight = convolution.weight.detach()
        reach = weight.shape[-1] // 2
        out = torch.zeros(2, width, rows, columns)
        for y in range(rows):
            for z in range(columns):
                for i in range(-reach, reach + 1):
                    for j in range(-reach, reach + 1):
                        u, v = y + i * rate, z + j * rate
                        if 0 <= u < rows and 0 <= v < columns:
                            out[:, :, y, z] += x[:, :, u, v] @ weight[:, :, i + reach, j + reach].T
        return norm(out).clamp(min=0)

    with torch.no_grad():
        parts = [convolved(b[0], b[1], rate) for b, rate in zip(module.branches, (1, *rates), strict=True)]
        mean = x.flatten(2).mean(2) @ module.pooled.weight[:, :, 0, 0].T + module.pooled.bias
        parts.append(mean.clamp(min=0)[:, :, None, None].repeat(1, 1, rows, columns))
        convolution, norm, _ = module.project[0]
        want = norm(F.conv2d(torch.cat(parts, dim=1), convolution.weight)).clamp(min=0)
        torch.testing.assert_close(module(x), want)


def test_the_mean_of_one_picture_can_be_trained():
    x = torch.randn(1, 3, 4, 4)
    ASPP(3, 4, (1,), dropout=0.5).train()(x).sum().backward()


@pytest.mark.parametrize("tasks", [("depth",), ("normals", "semseg")])
def test_any_subset_of_tasks(tasks):
    checks.check_shapes(make, tasks, PYRAMID, batch=1, training=True)


@pytest.mark.parametrize("strides", [PYRAMID, VIT])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [make, make_v3])
def test_any_backbone(make, strides, training):
    checks.check_shapes(make, TASKS, strides, batch=1, training=training)


def test_the_skip_keeps_the_finest_stride():
    maps = checks.features((64, 96))
    assert checks.build_decoder(make)(maps, (64, 96)).features["final"]["depth"].shape[2:] == (16, 24)
    assert checks.build_decoder(make_v3)(maps, (64, 96)).features["final"]["depth"].shape[2:] == (2, 3)


@pytest.mark.parametrize("make", [make, make_v3])
def test_what_tasks_share_is_the_coarsest_map_of_the_backbone(make):
    maps = checks.features((64, 96))
    decoder = checks.build_decoder(make)
    trunk = decoder(maps, (64, 96)).features["trunk"]
    assert list(trunk) == list(TASKS)
    assert all(x is maps[-1] for x in trunk.values())
    assert decoder.feature_channels["trunk"] == dict.fromkeys(TASKS, checks.CHANNELS[-1])


@pytest.mark.parametrize("regularizer", ["mtpsl", "rep_mtl"])
def test_regularizers_of_the_shared_map_are_built(regularizer):
    config = composed("decoder=deeplab", "backbone=test_resnet", "decoder.width=8", f"regularizer={regularizer}")
    tasks = build_tasks(config)
    assert build_regularizer(config, tasks, build_model(config, tasks, pretrained=False)) is not None


@pytest.mark.parametrize("check", [checks.check_predict, checks.check_bf16, checks.check_shared])
def test_promises(check):
    check(make)


@pytest.mark.parametrize("check", [checks.check_predict, checks.check_shared])
def test_promises_without_skip(check):
    check(make_v3)


@pytest.mark.parametrize(
    ("inputs", "tasks", "public"),
    [(2048, NYUD2, 32261417), (2048, NYUD4, 64513325), (2048, PASCAL, 80635938), (512, PASCAL, 23619618),
     (2048, NYUV2_13, 48380689), (2048, CITYSCAPES, 32252936)],
)  # fmt: skip
def test_size_of_the_public_code(inputs, tasks, public):
    """Vandenhende et al.'s, LibMTL's. A task's pooled branch has a bias (256) where theirs has a norm (512)."""
    for data, others in (("nyuv2_13", NYUV2_13), ("cityscapes", CITYSCAPES)):
        if tasks == others:
            assert get_published_parameters(f"{data}_deeplab_resnet50") == public + 23_508_032  # ResNet-50
    with torch.device("meta"):
        decoder = DeepLab([256, inputs], [4, 8], tasks, skip_width=0, depth=1)
    assert checks.parameters(decoder) == public - 256 * len(tasks)


def fold_pooled_norm(head: DeepLabHead) -> dict[str, torch.Tensor]:
    """The weights of torchvision's head under our names; the norm of the pooled branch as scale and bias."""
    pyramid, *last = head
    *branches, pooled = pyramid.convs
    weights = {f"aspp.branches.{i}.{name}": w for i, b in enumerate(branches) for name, w in b.state_dict().items()}
    _, convolution, norm, _ = pooled
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    weights["aspp.pooled.weight"] = convolution.weight * scale[:, None, None, None]
    weights["aspp.pooled.bias"] = norm.bias - norm.running_mean * scale
    weights |= {f"aspp.project.0.{name}": w for name, w in pyramid.project[:2].state_dict().items()}
    return weights | {f"layers.0.{name}": w for name, w in nn.Sequential(*last[:2]).state_dict().items()}


def randomize_norms(module: nn.Module) -> None:
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)


@pytest.mark.slow
def test_libmtls_model_is_torchvisions_dilated_resnet_with_its_heads():
    """LibMTL's classes are torchvision's, layer for layer: equal maps and logits on the same weights."""
    torch.manual_seed(0)
    config = composed("experiment=nyuv2_13_deeplab_resnet50")
    model = build_model(config, build_tasks(config), pretrained=False).eval()
    assert {task: layer.out_channels for task, layer in model.decoder.logits.items()} == NYUV2_13
    network = resnet50(replace_stride_with_dilation=[False, True, True])
    network.avgpool, network.fc = nn.Identity(), nn.Identity()
    heads = {task: DeepLabHead(2048, channels) for task, channels in NYUV2_13.items()}
    for module in (network, *heads.values()):
        randomize_norms(module.eval())
    model.backbone.net.load_state_dict(network.state_dict())
    for task, head in heads.items():
        model.decoder.heads[task].load_state_dict(fold_pooled_norm(head))
        model.decoder.logits[task].load_state_dict(head[-1].state_dict())
    image = torch.rand(1, 3, 32, 48, dtype=torch.double)
    with torch.no_grad():
        maps = network.double()(image).unflatten(1, (2048, 4, 6))
        features = model.backbone.double()(image)
        torch.testing.assert_close(features[-1], maps)
        scaled = [(feature / maps.abs().max()).float() for feature in features]  # random norms make them large
        predictions = model.decoder.predict(scaled, (4, 6))
        for task, head in heads.items():
            torch.testing.assert_close(predictions[task], head(scaled[-1]))
