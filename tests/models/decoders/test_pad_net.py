"""PAD-Net: the distillation against loops, the contract, sizes of the public code."""

import pytest
import torch
import torch.nn.functional as F
from helpers import decoder_checks as checks
from helpers.decoder_checks import HRNET18, HRNET48, NYUD2, NYUD4, PASCAL, PYRAMID, TASKS, VIT
from helpers.published import get_published_parameters

from mtcl import UserError
from mtcl.models.decoders import PADNet
from mtcl.models.decoders.blocks import Distillation, projection_shortcut


def make(channels, strides, tasks, **options):
    return PADNet(channels, strides, tasks, **{"width": 8, "trunk_width": 6, **options})


def test_distillation_against_loops():
    torch.manual_seed(0)
    tasks, channels, (height, width) = ("a", "b", "c"), 2, (3, 4)
    module = Distillation(tasks, channels)
    maps = {t: torch.randn(2, channels, height, width) for t in tasks}
    got = module(maps)
    for k in tasks:
        want = maps[k].clone()
        for other in tasks:
            if other == k:
                continue
            weight = module.messages[k][other][0].weight.detach()
            padded = F.pad(maps[other], (1, 1, 1, 1))
            for b in range(2):
                for c in range(channels):
                    for y in range(height):
                        for x in range(width):
                            patch = padded[b, :, y : y + 3, x : x + 3]
                            message = (weight[c] * patch).sum()
                            gate = (weight[channels + c] * patch).sum()
                            want[b, c, y, x] += message / (1 + (-gate).exp())
        torch.testing.assert_close(got[k], want)


def test_a_task_on_its_own_is_not_distilled():
    module = Distillation(["a"], 4)
    maps = {"a": torch.randn(1, 4, 2, 2)}
    assert module(maps)["a"] is maps["a"]
    assert not list(module.parameters())


def test_shortcuts_are_projected_only_where_widths_differ():
    assert projection_shortcut(4, 4) is None
    assert projection_shortcut(4, 6)(torch.randn(2, 4, 3, 3)).shape == (2, 6, 3, 3)


@pytest.mark.parametrize("tasks", [("depth",), ("normals", "semseg")])
def test_any_subset_of_tasks(tasks):
    checks.check_shapes(make, tasks, PYRAMID, batch=1, training=True)


@pytest.mark.parametrize("strides", [PYRAMID, VIT])
@pytest.mark.parametrize("training", [True, False])
def test_any_backbone(strides, training):
    checks.check_shapes(make, TASKS, strides, batch=1, training=training)


def test_initial_predictions_are_of_the_maps_before_the_distillation():
    decoder = checks.build_decoder(make).eval()
    with torch.no_grad():
        output_before = decoder(checks.features((64, 64)), (64, 64))
        for parameter in decoder.distillation.parameters():
            parameter.zero_()
        output_after = decoder(checks.features((64, 64)), (64, 64))
    assert len(output_before.intermediate) == 1
    for t in TASKS:
        assert torch.equal(output_before.intermediate[0][t], output_after.intermediate[0][t])
        assert torch.equal(output_before.features["initial"][t], output_after.features["initial"][t])
        assert not torch.allclose(output_before.predictions[t], output_after.predictions[t], atol=1e-4)
        assert torch.equal(output_after.features["final"][t], decoder.heads[t](output_after.features["initial"][t]))


@pytest.mark.parametrize("check", [checks.check_predict, checks.check_bf16, checks.check_shared])
def test_promises(check):
    check(make)


def test_width_of_no_bottleneck():
    with pytest.raises(UserError, match=r"width=6 must be a multiple of 4"):
        make([4], [4], TASKS, width=6)


# The authors' public code (Vandenhende et al.) built with these channels, less its backbone.
@pytest.mark.parametrize(
    ("channels", "tasks", "public"),
    [(HRNET18, NYUD2, 3158336), (HRNET18, NYUD4, 15661128), (HRNET18, PASCAL, 25444786),
     (HRNET48, NYUD2, 3893186), (HRNET48, NYUD4, 16683978), (HRNET48, PASCAL, 26611636)],
)  # fmt: skip
def test_size_of_the_public_code(channels, tasks, public):
    if (channels, tasks) == (HRNET18, NYUD4):
        assert get_published_parameters("nyud_pad_net_hrnet18") == public + 3_860_720
    with torch.device("meta"):
        decoder = PADNet(channels, PYRAMID, tasks)
    assert checks.parameters(decoder) == public - sum(channels)  # its fusion has a bias before the batch norm
