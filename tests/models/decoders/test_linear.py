"""The linear probe: against its formula in float64, the contract, sizes of the public heads."""

import pytest
import torch
import torch.nn.functional as F
from helpers import decoder_checks as checks
from helpers.decoder_checks import CHANNELS, NYUD4, PYRAMID, TASKS, VIT, features, parameters
from torch import nn

from mtcl.models.decoders import Linear


def make(channels, strides, tasks, **options):
    return Linear(channels, strides, tasks, **options)


def test_predictions_are_a_linear_map_of_normalised_features():
    torch.manual_seed(0)
    decoder = make(CHANNELS, PYRAMID, TASKS).train()
    for task in TASKS:
        nn.init.uniform_(decoder.logits[task].scale, 0.5, 2)
        nn.init.uniform_(decoder.logits[task].shift, -1, 1)
    maps = features((64, 32))
    output = decoder(maps, (64, 32))
    resized = [F.interpolate(x.double(), (16, 8), mode="bilinear", align_corners=False) for x in maps]
    for task, prediction in output.predictions.items():
        logits = decoder.logits[task]
        expected = torch.zeros(2, TASKS[task], 16, 8, dtype=torch.float64)
        channel = 0
        for x in resized:
            for values in x.unbind(1):
                centred = (values - values.mean()) / (values.var(unbiased=False) + decoder.norm.eps).sqrt()
                normed = logits.scale[channel] * centred + logits.shift[channel]
                torch.testing.assert_close(
                    output.features["final"][task][:, channel].double(), normed, rtol=1e-4, atol=1e-5
                )
                expected += logits.weight[:, channel][:, None, None] * normed[:, None]
                channel += 1
        expected += logits.bias[:, None, None]
        expected = F.interpolate(expected, (64, 32), mode="bilinear", align_corners=False)
        torch.testing.assert_close(prediction.double(), expected, rtol=1e-4, atol=1e-5)


def test_logits_begin_small_and_without_bias():
    torch.manual_seed(0)
    layer = make([384] * 4, VIT, {"semseg": 40}).logits["semseg"]
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not layer.bias.any()


@pytest.mark.parametrize("strides", [PYRAMID, VIT])
@pytest.mark.parametrize("tasks", [("depth",), tuple(TASKS)])
def test_shapes(strides, tasks):
    checks.check_shapes(make, tasks, strides, batch=1, training=True)


@pytest.mark.parametrize(
    "check",
    [checks.check_predict, checks.check_bf16, checks.check_shared],
)
def test_contract(check):
    check(make)


def test_learns_labels_that_are_linear_in_the_features():
    torch.manual_seed(0)
    decoder, maps = make(CHANNELS, VIT, {"depth": 1}), features((32, 64), VIT)
    labels = F.interpolate(2 * maps[1][:, 2:3] - maps[3][:, :1] + 3, (32, 64), mode="bilinear")
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (decoder(maps, (32, 64)).predictions["depth"] - labels).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01 * labels.var().item()


@pytest.mark.parametrize("width", [384, 768, 1024])
def test_size_of_the_public_heads(width):
    """A batch norm's two vectors and a 1x1 convolution per task (DINOv2's four blocks; one task with 40 classes)."""
    assert parameters(make([width] * 4, VIT, {"semseg": 40})) == 2 * 4 * width + 40 * (4 * width + 1)
    assert parameters(make([width] * 4, VIT, NYUD4)) == 4 * 2 * 4 * width + 45 * (4 * width + 1)


def test_dropout_leaves_out_whole_channels():
    torch.manual_seed(0)
    decoder = make(CHANNELS, VIT, TASKS, dropout=0.5).train()
    dropped = decoder.dropout(torch.ones(1, 28, 4, 6))
    assert {tuple(x.unique().tolist()) for x in dropped[0]} == {(0.0,), (2.0,)}


def test_features_may_be_left_out():
    torch.manual_seed(0)
    decoder, maps = make(CHANNELS, VIT, TASKS), features((32, 64), VIT)
    expected = decoder(maps, (32, 64))
    decoder.builds_features = False
    output = decoder(maps, (32, 64))
    assert output.features == {}
    assert all(torch.equal(p, expected.predictions[task]) for task, p in output.predictions.items())
