"""Building blocks of decoders."""

import pytest
import torch
import torch.nn.functional as F
from helpers.small_models import make_image
from torch import nn

from mtcl.models.decoders.blocks import MAX_PRODUCT_SIDE, Fusion, resize, resize_trained


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


@pytest.mark.parametrize(
    ("side", "size"), [((4, 6), (20, 31)), ((7, 5), (3, 10)), ((MAX_PRODUCT_SIDE + 1, 2), (90, 4))]
)
def test_resizing_in_training_has_the_values_and_gradients_of_resizing(side, size):
    x = make_image(2, 3, *side).double().requires_grad_()
    gradient = make_image(2, 3, *size).double()
    want, got = resize(x, size), resize_trained(x, size)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(y, x, gradient)[0] for y in (got, want)]
    torch.testing.assert_close(*gradients)
    assert torch.equal(resize_trained(x.detach(), size), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert resize_trained(x, size).dtype == torch.float64
