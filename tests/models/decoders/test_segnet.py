"""SegNet's decoder: unpooling against loops and torch, the network against MTAN's in plain torch, the contract."""

import pytest
import torch
import torch.nn.functional as F
from helpers import decoder_checks as checks
from helpers.common import composed
from helpers.decoder_checks import PYRAMID, TASKS, VIT
from helpers.published import get_published_parameters
from torch import Tensor, nn

from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.models.decoders import SegNet
from mtcl.models.decoders.segnet import unpool

VGG = ([64, 128, 256, 512, 512], [1, 2, 4, 8, 16])


def make(channels, strides, tasks):
    return SegNet(channels, strides, tasks)


@pytest.mark.parametrize(("height", "width", "pooling"), [(4, 6, 2), (5, 7, 2), (1, 3, 2), (8, 8, 4), (3, 3, 1)])
def test_unpooling_against_loops(height, width, pooling):
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(2, 3, height, width, generator=generator)
    x = torch.randn(2, 3, -(-height // pooling), -(-width // pooling), generator=generator)
    expected = torch.zeros_like(feature)
    for b in range(2):
        for c in range(3):
            for i in range(x.shape[2]):
                for j in range(x.shape[3]):
                    window = feature[b, c, i * pooling : (i + 1) * pooling, j * pooling : (j + 1) * pooling]
                    u, v = divmod(int(window.argmax()), window.shape[1])
                    expected[b, c, i * pooling + u, j * pooling + v] = x[b, c, i, j]
    assert torch.equal(unpool(x, feature, pooling), expected)


def test_of_equal_maxima_the_first_is_taken_as_by_torch():
    feature, x = torch.zeros(1, 1, 4, 4), torch.arange(1.0, 5.0).view(1, 1, 2, 2)
    _, indices = F.max_pool2d(feature, 2, return_indices=True)
    assert torch.equal(unpool(x, feature, 2), F.max_unpool2d(x, indices, 2))


class Reference(nn.Module):
    """MTAN's SegNet with hard sharing in torch's own layers, after its code; no biases in front of the norms."""

    def __init__(self, widths: list[int], counts: list[int], tasks: dict[str, int]):
        super().__init__()
        finer = [widths[0], *widths[:-1]]
        self.encoder = nn.ModuleList(
            self.block(w if i else inputs, w, bias=True)
            for inputs, w, count in zip([3, *widths], widths, counts)
            for i in range(count)
        )
        self.decoder = nn.ModuleList(
            self.block(f if i else w, f, bias=False)
            for w, f, count in zip(widths, finer, [2, 2, 3, 3, 3])
            for i in range(count)
        )
        self.ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        self.starts = [0, 2, 4, 7, 10, 13]
        self.tasks = nn.ModuleDict(
            {
                t: nn.Sequential(nn.Conv2d(widths[0], widths[0], 3, padding=1), nn.Conv2d(widths[0], c, 1))
                for t, c in tasks.items()
            }
        )

    @staticmethod
    def block(inputs: int, outputs: int, bias: bool) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        indices = []
        for number, layers in enumerate(self.encoder, start=1):
            x = layers(x)
            if number in self.ends:
                x, chosen = F.max_pool2d(x, 2, return_indices=True)
                indices.append(chosen)
        for level in reversed(range(5)):
            x = F.max_unpool2d(x, indices[level], 2)
            for layers in self.decoder[self.starts[level] : self.starts[level + 1]]:
                x = layers(x)
        return {task: layers(x) for task, layers in self.tasks.items()}


def make_reference() -> Reference:
    return Reference(VGG[0], [2, 2, 3, 3, 3], {"semseg": 13, "depth": 1, "normals": 3})


@pytest.mark.slow
def test_the_network_is_mtans_on_shared_weights():
    torch.manual_seed(0)
    config = composed("experiment=nyuv2_13_segnet", "trainer.channels_last=false")
    model = build_model(config, build_tasks(config), pretrained=False).eval()
    reference = make_reference()
    for norm in (m for m in reference.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.momentum = 1.0
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        reference(image)  # statistics with which no map fades and every layer matters
    reference.eval()
    parts = [(model.backbone, reference.encoder), (model.decoder.levels, reference.decoder)]
    parts += [(model.decoder.heads[t], layers[0]) for t, layers in reference.tasks.items()]
    parts += [(model.decoder.logits[t], layers[1]) for t, layers in reference.tasks.items()]
    for ours, theirs in parts:
        names, tensors = list(ours.state_dict()), list(theirs.state_dict().values())
        ours.load_state_dict(dict(zip(names, tensors, strict=True)))
    with torch.no_grad():
        expected, predictions = reference(image), model.predict(image)
    assert list(predictions) == list(expected)
    for task, prediction in predictions.items():
        assert prediction.std() > 0
        torch.testing.assert_close(prediction, expected[task], rtol=1e-4, atol=1e-5)


def test_size_of_the_public_code():
    """MTAN's class has 25,055,185 parameters without its loss weights; its 13 decoder blocks have biases of no use."""
    with torch.device("meta"):
        decoder, reference = make(*VGG, {"semseg": 13, "depth": 1, "normals": 3}), make_reference()
    biases = sum(layers[0].out_channels for layers in reference.decoder)
    assert (checks.parameters(reference) + biases, biases) == (get_published_parameters("nyuv2_13_segnet"), 2944)
    assert checks.parameters(decoder) == checks.parameters(reference) - checks.parameters(reference.encoder)


@pytest.mark.parametrize("tasks", [("depth",), ("normals", "semseg")])
def test_any_subset_of_tasks(tasks):
    checks.check_shapes(make, tasks, PYRAMID, batch=1, training=True)


@pytest.mark.parametrize("strides", [PYRAMID, VIT, [4, 8, 8, 8]])
@pytest.mark.parametrize("training", [True, False])
def test_any_backbone(strides, training):
    checks.check_shapes(make, TASKS, strides, batch=2, training=training)


@pytest.mark.slow
def test_compiles():
    checks.check_compiles(make)


@pytest.mark.parametrize("check", [checks.check_predict, checks.check_bf16, checks.check_shared])
def test_promises(check):
    check(make)
