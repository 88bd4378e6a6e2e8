"""Models of a backbone and the baseline decoder: shapes, padding, parameters, inference."""

import pytest
import torch
import torch.nn.functional as F
from helpers.small_models import FAMILIES, TASKS, VIT, make_image, make_model

from mtcl.models import build_backbone
from mtcl.regularizers import Contrastive, MaskedAdamW
from mtcl.tasks import build_task


@pytest.fixture(scope="module")
def cnn():
    return make_model().eval()


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
            features_before, features_after = backbone(plain)[0], backbone(spot)[0]
        change = (features_after - features_before).abs().sum(dim=(0, 1))
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
    task_ids = {t: ids([*cnn.decoder.heads[t].parameters(), *cnn.decoder.logits[t].parameters()]) for t in TASKS}
    assert sum(len(task_ids[t]) for t in TASKS) + len(shared) == len(every)  # disjoint, and nothing else
    assert set().union(*task_ids.values()) | shared == every


def test_a_tasks_loss_reaches_what_is_shared_and_its_own_head():
    model = make_model()
    model(make_image(2, 3, 64, 64)).predictions["depth"].square().mean().backward()
    reached = {id(p) for p in model.parameters() if p.grad is not None}
    head = [*model.decoder.heads["depth"].parameters(), *model.decoder.logits["depth"].parameters()]
    assert reached == ids(model.shared_parameters()) | ids(head)


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
    values_before = [p.detach().clone() for p in regularizer.parameters()]
    regularizer(features, labels, regularizer.sample(0, ["a", "b"]), output.frame).loss.backward()
    assert all(p.grad is not None for p in model.backbone_parameters() if p.requires_grad)  # it does teach the model
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(values_before, regularizer.parameters()))
    one, other = plain.state_dict(), model.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())
    image = make_image(1, 3, 64, 32, seed=1)
    with torch.no_grad():
        a, b = plain.eval()(image), model(image)
    assert all(torch.equal(a.predictions[t], b.predictions[t]) for t in TASKS)
    assert all(torch.equal(a.features[k][t], b.features[k][t]) for k in a.features for t in TASKS)
