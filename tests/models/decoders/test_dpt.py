"""DPT: against the published order of operations, the contract, sizes of the public heads."""

import pytest
import torch
import torch.nn.functional as F
from helpers import decoder_checks as checks
from helpers.decoder_checks import CHANNELS, PYRAMID, TASKS, VIT, features, parameters

from mtcl.errors import ParameterError
from mtcl.models.decoders import DPT
from mtcl.models.decoders.dpt import Neck


def make(channels, strides, tasks, **options):
    options = {"width": 8, "level_widths": (4, 6, 8, 10), "head_width": 8, "final_width": 6, "stride": 4, **options}
    return DPT(channels, strides, tasks, **options)


def make_necks(channels, strides, tasks):
    return make(channels, strides, tasks, shared_neck=False, use_bn=True)


def unit(x, module):
    y = F.conv2d(F.relu(x), module.conv1.weight, padding=1)
    return x + F.conv2d(F.relu(y), module.conv2.weight, padding=1)


def finer(x, factor):
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def test_neck_against_the_published_order():
    """Reassemble, then fuse and double the size four times, each block's 1x1 convolution after the resizing."""
    torch.manual_seed(0)
    neck = Neck(CHANNELS, (4, 6, 8, 10), 8, is_vit=True, use_bn=False)
    maps = features((96, 64), VIT)
    with torch.no_grad():
        levels = [p(x) for p, x in zip(neck.projects, maps)]
        assert neck.resamples[0].kernel_size == (4, 4)
        levels[0] = F.conv_transpose2d(levels[0], neck.resamples[0].weight, neck.resamples[0].bias, stride=4)
        levels[1] = F.conv_transpose2d(levels[1], neck.resamples[1].weight, neck.resamples[1].bias, stride=2)
        levels[3] = F.conv2d(levels[3], neck.resamples[3].weight, neck.resamples[3].bias, stride=2, padding=1)
        assert [tuple(x.shape[-2:]) for x in levels] == [(24, 16), (12, 8), (6, 4), (3, 2)]
        levels = [F.conv2d(x, conv.weight, padding=1) for x, conv in zip(levels, neck.convs)]
        first = neck.fusions[0]
        fused = first.project(finer(unit(levels[3], first.unit), 2))
        for block, level in zip(neck.fusions[1:], levels[2::-1]):
            fused = block.project(finer(unit(fused + unit(level, block.skip_unit), block.unit), 2))
        expected = F.relu(F.conv2d(fused, neck.output[0].weight, neck.output[0].bias, padding=1))
        torch.testing.assert_close(neck(maps, (48, 32)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [make, make_necks])
@pytest.mark.parametrize("strides", [PYRAMID, VIT])
@pytest.mark.parametrize("tasks", [("depth",), tuple(TASKS)])
def test_shapes(make, strides, tasks):
    checks.check_shapes(make, tasks, strides, batch=1, training=True)


@pytest.mark.parametrize(
    "check",
    [checks.check_predict, checks.check_bf16, checks.check_shared],
)
@pytest.mark.parametrize("make", [make, make_necks])
def test_contract(check, make):
    check(make)


@pytest.mark.slow
def test_necks_compile_as_one_graph():
    checks.check_compiles(make_necks)


@pytest.mark.slow
def test_necks_overfit_a_batch():
    checks.check_overfits(make_necks, steps=150, lr=0.01)


def test_maps_of_odd_sizes():
    decoder = make(CHANNELS, VIT, TASKS)
    output = decoder([torch.randn(1, c, 5, 3) for c in CHANNELS], (70, 42))  # patches of 14 pixels
    assert output.predictions["semseg"].shape == (1, 5, 70, 42)
    assert output.features["trunk"]["semseg"].shape == (1, 8, 18, 11)


def test_tasks_share_one_map_or_have_their_own():
    shared = make(CHANNELS, VIT, TASKS)(features((32, 32), VIT), (32, 32)).features["trunk"]
    assert shared["depth"] is shared["semseg"]
    maps = make_necks(CHANNELS, VIT, TASKS)(features((32, 32), VIT), (32, 32)).features["trunk"]
    assert not torch.equal(maps["depth"], maps["semseg"])


def count_published(embed_dim: int, levels: tuple[int, ...], width: int = 256) -> int:
    """DINOv2's DPT head without readout and with a depth head of one channel, from dpt_head.py line by line."""
    projects = sum(embed_dim * c + c for c in levels)
    resize_layers = levels[0] ** 2 * 16 + levels[0] + levels[1] ** 2 * 4 + levels[1] + levels[3] ** 2 * 9 + levels[3]
    convs = sum(c * width * 9 for c in levels)
    residual_unit = 2 * width * width * 9
    fusion = 7 * residual_unit + 4 * (width * width + width)  # the first block has one unit
    project = width * width * 9 + width
    half = width // 2
    head = (width * half * 9 + half) + (half * 32 * 9 + 32) + (32 + 1)
    return projects + resize_layers + convs + fusion + project + head


@pytest.mark.parametrize(
    ("embed_dim", "levels"), [(384, (48, 96, 192, 384)), (768, (96, 192, 384, 768)), (1024, (128, 256, 512, 1024))]
)
def test_size_of_the_public_head(embed_dim, levels):
    with torch.device("meta"):
        decoder = DPT([embed_dim] * 4, VIT, {"depth": 1}, level_widths=levels, final_width=32)
    assert parameters(decoder) == count_published(embed_dim, levels)


@pytest.mark.parametrize(
    ("strides", "widths", "message"),
    [
        (PYRAMID, (4, 6), r"level_widths=\[4, 6\] must have a number for each of the 4 feature maps"),
        ([16, 16], (4, 6), "level_widths is for the 4 maps of a ViT, but the backbone gives 2"),
    ],
)
def test_levels_that_do_not_fit_are_refused(strides, widths, message):
    with pytest.raises(ParameterError, match=message):
        make(CHANNELS[: len(strides)], strides, TASKS, level_widths=widths)
