"""MQTransformer: its blocks against loops, and what every decoder promises."""

import pytest
import torch
import torch.nn.functional as F

from mtcl.models.decoders import MQTransformer
from mtcl.models.decoders.mqtransformer import CrossAttention

TASKS = {"semseg": 7, "depth": 1, "normals": 3}
CHANNELS, STRIDES = [6, 10], [4, 8]


def make_decoder(tasks=TASKS, seed=0, **options):
    torch.manual_seed(seed)
    options = {"width": 12, "head_width": 6, "queries": 4, "heads": 3, **options}
    return MQTransformer(CHANNELS, STRIDES, tasks, **options)


def make_features(batch, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, height // s, width // s, generator=generator) for c, s in zip(CHANNELS, STRIDES)]


def test_attention_is_one_query_and_head_at_a_time():
    torch.manual_seed(0)
    attention = CrossAttention(12, 3)
    x, source = torch.randn(2, 4, 12), torch.randn(2, 7, 12)
    at, of = torch.randn(4, 4), torch.randn(7, 4)
    got = attention(x, source, query_position=at, key_position=of)
    for b in range(2):
        for i in range(4):
            q = attention.query(x[b, i] + torch.cat([at[i]] * 3))
            k = torch.stack([attention.key(source[b, j] + torch.cat([of[j]] * 3)) for j in range(7)])
            v = attention.value(source[b])
            heads = []
            for h in range(3):
                channels = slice(4 * h, 4 * h + 4)
                weights = torch.stack([(q[channels] * k[j, channels]).sum() / 2 for j in range(7)]).softmax(dim=0)
                heads.append(sum(weights[j] * v[j, channels] for j in range(7)))
            torch.testing.assert_close(got[b, i], attention.out(torch.cat(heads)), rtol=1e-4, atol=1e-5)


def test_task_features_are_those_of_the_concatenation():
    decoder = make_decoder()
    features = make_features(2, 32, 48)
    layers = decoder.project["depth"]
    grown = [F.interpolate(x, features[0].shape[-2:], mode="bilinear", align_corners=False) for x in features]
    weight = torch.cat([layer.weight for layer in layers], dim=1)
    want = F.conv2d(torch.cat(grown, dim=1), weight, layers[0].bias).flatten(2).transpose(1, 2)
    torch.testing.assert_close(decoder._task_features("depth", features), want, rtol=1e-4, atol=1e-5)


def test_tasks_hear_each_other_through_their_queries_alone():
    decoder = make_decoder().eval()
    features = make_features(1, 16, 16)
    output_before = decoder.predict(features, (16, 16))
    with torch.no_grad():
        for layer in decoder.project["depth"]:
            layer.weight.mul_(2)
    output_after = decoder.predict(features, (16, 16))
    assert not torch.allclose(output_before["semseg"], output_after["semseg"])
    with torch.no_grad():
        decoder.reason.out_proj.weight.zero_()
        silent = decoder.predict(features, (16, 16))
        for layer in decoder.project["depth"]:
            layer.weight.mul_(0.5)
        still = decoder.predict(features, (16, 16))
    assert torch.equal(silent["semseg"], still["semseg"])
    assert not torch.equal(silent["depth"], still["depth"])


@pytest.mark.parametrize("tasks", [("depth",), ("normals", "semseg"), tuple(TASKS)])
@pytest.mark.parametrize("training", [False, True])
def test_any_tasks_any_size(tasks, training):
    decoder = make_decoder({t: TASKS[t] for t in tasks}).train(training)
    assert decoder.feature_channels == {"final": dict.fromkeys(tasks, 6)}
    output = decoder(make_features(1, 24, 40), (24, 40))
    assert {t: tuple(p.shape) for t, p in output.predictions.items()} == {t: (1, TASKS[t], 24, 40) for t in tasks}
    assert all(m.shape == (1, 6, 6, 10) for m in output.features["final"].values())
    assert output.intermediate == []


def test_every_parameter_learns_in_bf16_too():
    decoder = make_decoder().train()
    for precise in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            output = decoder(make_features(2, 16, 24), (16, 24))
        assert all(p.dtype == torch.float32 for p in output.predictions.values())
        decoder.zero_grad()
        sum((p**2).mean() for p in output.predictions.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
    assert {id(p) for p in decoder.shared_parameters()} < {id(p) for p in decoder.parameters()}


def test_a_picture_does_not_depend_on_the_others_of_its_batch():
    decoder = make_decoder().eval()
    features = make_features(3, 16, 24)
    together = decoder.predict(features, (16, 24))
    alone = decoder.predict([x[1:2] for x in features], (16, 24))
    for task in TASKS:
        torch.testing.assert_close(alone[task], together[task][1:2], rtol=1e-4, atol=1e-5)
