"""MTI-Net: the feature propagation against loops, the scales' order, the contract, sizes of the public code."""

import pytest
import torch
from helpers import decoder_checks as checks
from helpers.decoder_checks import CHANNELS, HRNET18, HRNET48, NYUD2, NYUD4, PASCAL, PYRAMID, TASKS, VIT
from helpers.published import get_published_parameters
from timm.layers import SqueezeExcite
from torch import nn

from mtcl import UserError
from mtcl.models.decoders import MTINet
from mtcl.models.decoders.mti_net import Propagation


def make(channels, strides, tasks, **options):
    decoder = MTINet(channels, strides, tasks, **options)
    for module in decoder.modules():
        if isinstance(module, SqueezeExcite):  # so narrow a one has a single hidden unit, which may never fire
            nn.init.constant_(module.fc1.bias, 4.0)
    return decoder


def make_pyramid(channels, strides, tasks):
    return make(channels, strides, tasks, pyramid_width=6)


@pytest.mark.parametrize("attention_over", ["tasks", "neighbouring_channels"])
def test_propagation_against_loops(attention_over):
    torch.manual_seed(0)
    tasks, channels, (height, width) = ("a", "b", "c"), 4, (3, 2)
    module = Propagation(tasks, channels, attention_over).eval()
    maps = {t: torch.randn(2, channels, height, width) for t in tasks}
    with torch.no_grad():
        got = module(maps)
        logits = module.attention(torch.cat(list(maps.values()), dim=1))
        weighted = torch.zeros(2, 3 * channels, height, width)
        for b in range(2):
            for y in range(height):
                for x in range(width):
                    for c in range(channels):
                        group = [i * channels + c for i in range(3)]
                        if attention_over == "neighbouring_channels":
                            group = [3 * c + i for i in range(3)]
                        scores = [logits[b, i, y, x].exp() for i in group]
                        for i, score in zip(group, scores):
                            value = maps[tasks[i // channels]][b, i % channels, y, x]
                            weighted[b, i, y, x] = score / sum(scores) * value
        reduced = module.reduction(weighted)
        for t in tasks:
            squeeze, excite = module.excitation[t].fc1, module.excitation[t].fc2
            for b in range(2):
                mean = reduced[b].mean(dim=(1, 2))
                hidden = (squeeze.weight[:, :, 0, 0] @ mean + squeeze.bias).clamp(min=0)
                gate = (excite.weight[:, :, 0, 0] @ hidden + excite.bias).sigmoid()
                torch.testing.assert_close(got[t][b], gate[:, None, None] * reduced[b] + maps[t][b])


def test_an_attention_over_something_else_is_refused():
    with pytest.raises(UserError, match="attention_over=pixels must be one of tasks, neighbouring_channels"):
        make(CHANNELS, PYRAMID, TASKS, attention_over="pixels")


@pytest.mark.parametrize("tasks", [("depth",), ("normals", "semseg")])
def test_any_subset_of_tasks(tasks):
    checks.check_shapes(make, tasks, PYRAMID, batch=1, training=True)


@pytest.mark.parametrize("strides", [PYRAMID, VIT])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("maker", [make, make_pyramid])
def test_any_backbone(maker, strides, training):
    checks.check_shapes(maker, TASKS, strides, batch=1, training=training)


def test_scales_hand_on_from_coarse_to_fine():
    """A feature reaches the initial predictions of its own scale and of all finer ones, and every final one."""
    decoder = checks.build_decoder(make).eval()
    maps = checks.features((64, 96))
    with torch.no_grad():
        output_before = decoder(maps, (64, 96))
        for changed in range(4):
            other = [m + 1 if i == changed else m for i, m in enumerate(maps)]
            output_after = decoder(other, (64, 96))
            for scale in range(4):
                for t in TASKS:
                    same = torch.equal(output_before.intermediate[scale][t], output_after.intermediate[scale][t])
                    assert same == (scale > changed), (changed, scale, t)
            assert all(not torch.equal(output_before.predictions[t], output_after.predictions[t]) for t in TASKS)


def test_a_pyramid_makes_all_scales_of_one_width():
    decoder = checks.build_decoder(make_pyramid)
    assert decoder.feature_channels == {"final": dict.fromkeys(TASKS, 24), "initial": dict.fromkeys(TASKS, 6)}
    assert checks.build_decoder(make).feature_channels["final"] == dict.fromkeys(TASKS, sum(CHANNELS))


@pytest.mark.parametrize("check", [checks.check_predict, checks.check_bf16, checks.check_shared])
def test_promises(check):
    check(make)


@pytest.mark.parametrize("check", [checks.check_predict, checks.check_shared])
def test_promises_with_a_pyramid(check):
    check(make_pyramid)


@pytest.mark.slow  # for the many blocks to trace
def test_compiles_as_one_graph_without_a_pyramid():
    checks.check_compiles(make)


# The authors' public code (Vandenhende et al.) built with these channels, less its backbone.
@pytest.mark.parametrize(
    ("channels", "tasks", "public"),
    [(HRNET18, NYUD2, 4717459), (HRNET18, NYUD4, 14100225), (HRNET18, PASCAL, 20633996),
     (HRNET48, NYUD2, 33402433), (HRNET48, NYUD4, 100077033), (HRNET48, PASCAL, 146547356)],
)  # fmt: skip
def test_size_of_the_public_code(channels, tasks, public):
    if (channels, tasks) == (HRNET18, NYUD4):
        assert get_published_parameters("nyud_mti_net_hrnet18") == public + 3_860_720
    with torch.device("meta"):
        decoder = MTINet(channels, PYRAMID, tasks)
    # its aggregation has a bias before the batch norm, for each task
    assert checks.parameters(decoder) == public - sum(channels) * len(tasks)
