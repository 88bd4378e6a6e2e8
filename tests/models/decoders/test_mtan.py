"""MTAN on SegNet: the network against plain torch, its size, the maps of a VGG net's convolutions, the contract."""

from itertools import pairwise

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
from mtcl.models.decoders import MTAN

WIDTHS = [64, 128, 256, 512, 512]
VGG = ([w for w in WIDTHS for _ in "up"], [1, 1, 2, 2, 4, 4, 8, 8, 16, 16])
NYUV2 = {"semseg": 13, "depth": 1, "normals": 3}
CITYSCAPES = {"semseg": 7, "depth": 1}


def make(channels, strides, tasks):
    return MTAN(channels, strides, tasks)


def conv(inputs: int, outputs: int, kernel: int = 3) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs)]


class Reference(nn.Module):
    """MTAN on SegNet in torch's own layers, after its formulas and as the authors' code sizes it, biases and all."""

    def __init__(self, tasks: dict[str, int]):
        super().__init__()
        counts, finer, coarser = [2, 2, 3, 3, 3], [WIDTHS[0], *WIDTHS[:-1]], [*WIDTHS[1:], WIDTHS[-1]]

        def stage(inputs: int, width: int, count: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Sequential(*conv(inputs if i == 0 else width, width), nn.ReLU())
                                 for i in range(count))  # fmt: skip

        def mask(inputs: int, width: int) -> nn.Sequential:
            return nn.Sequential(*conv(inputs, width, 1), nn.ReLU(), *conv(width, width, 1), nn.Sigmoid())

        self.encoder = nn.ModuleList(map(stage, [3, *WIDTHS[:-1]], WIDTHS, counts))
        self.decoder = nn.ModuleList(map(stage, WIDTHS, finer, counts))
        self.encoder_blocks = nn.ModuleList(nn.Sequential(*conv(a, b), nn.ReLU()) for a, b in zip(WIDTHS, coarser))
        self.decoder_blocks = nn.ModuleList(nn.Sequential(*conv(a, b), nn.ReLU()) for a, b in zip(WIDTHS, finer))
        self.encoder_masks = nn.ModuleDict({t: nn.ModuleList(map(mask, [64, 256, 512, 1024, 1024], WIDTHS))
                                            for t in tasks})  # fmt: skip
        self.decoder_masks = nn.ModuleDict({t: nn.ModuleList(mask(a + b, b) for a, b in zip(WIDTHS, finer))
                                            for t in tasks})  # fmt: skip
        self.heads = nn.ModuleDict({t: nn.Conv2d(64, 64, 3, padding=1) for t in tasks})
        self.logits = nn.ModuleDict({t: nn.Conv2d(64, c, 1) for t, c in tasks.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first, last, unpooled, decoded, indices = {}, {}, {}, {}, {}
        for k in range(5):
            first[k] = x = self.encoder[k][0](x)
            for layers in self.encoder[k][1:]:
                x = layers(x)
            last[k] = x
            x, indices[k] = F.max_pool2d(x, 2, return_indices=True)
        for k in (4, 3, 2, 1, 0):
            unpooled[k] = x = F.max_unpool2d(x, indices[k], 2)
            for layers in self.decoder[k]:
                x = layers(x)
            decoded[k] = x
        predictions = {}
        for task, head in self.heads.items():
            mask = self.encoder_masks[task]
            a = F.max_pool2d(self.encoder_blocks[0](mask[0](first[0]) * last[0]), 2)
            for k in (1, 2, 3, 4):
                a = F.max_pool2d(self.encoder_blocks[k](mask[k](torch.cat([first[k], a], 1)) * last[k]), 2)
            for k in (4, 3, 2, 1, 0):
                b = F.interpolate(a, scale_factor=2, mode="bilinear", align_corners=True)
                b = self.decoder_blocks[k](b)
                a = self.decoder_masks[task][k](torch.cat([unpooled[k], b], 1)) * decoded[k]
            predictions[task] = self.logits[task](head(a))
        return predictions

    def list_parts(self) -> list[nn.Module]:
        decoder = [self.decoder, self.heads, self.logits, self.encoder_blocks, self.decoder_blocks]
        return [self.encoder, *decoder, self.encoder_masks, self.decoder_masks]

    def list_convolutions_before_norms(self) -> list[nn.Conv2d]:
        """Return those of the decoder's part, where ours have no biases."""
        blocks = [m for part in self.list_parts()[1:] for m in part.modules() if isinstance(m, nn.Sequential)]
        return [a for block in blocks for a, b in pairwise(block) if isinstance(b, nn.BatchNorm2d)]


@pytest.mark.slow
def test_the_network_is_mtans_on_shared_weights():
    torch.manual_seed(0)
    config = composed("experiment=nyuv2_13_mtan", "trainer.channels_last=false")
    model = build_model(config, build_tasks(config), pretrained=False).eval()
    reference = Reference(NYUV2)
    for layer in reference.list_convolutions_before_norms():
        layer.bias = None
    for norm in (m for m in reference.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.momentum = 1.0
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        reference(image)  # statistics with which no map fades and every mask matters
    reference.eval()
    names = ["levels", "heads", "logits", "encoder_blocks", "decoder_blocks", "encoder_masks", "decoder_masks"]
    parts = [model.backbone, *(model.decoder.get_submodule(name) for name in names)]
    for ours, theirs in zip(parts, reference.list_parts(), strict=True):
        ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    with torch.no_grad():
        expected, predictions = reference(image), model.predict(image)
    assert list(predictions) == list(expected)
    for task, prediction in predictions.items():
        assert prediction.std() > 0
        torch.testing.assert_close(prediction, expected[task], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tasks", "published", "biases"),
    [
        (NYUV2, get_published_parameters("nyuv2_13_mtan"), 20_864),
        (CITYSCAPES, get_published_parameters("cityscapes_mtan"), 15_872),
    ],
)
def test_size_of_the_public_code(tasks, published, biases):
    """MTAN's and CAGrad's classes without loss weights; the biases in front of the decoder's norms have no use."""
    with torch.device("meta"):
        decoder, reference = make(*VGG, tasks), Reference(tasks)
    needless = sum(layer.out_channels for layer in reference.list_convolutions_before_norms())
    assert (checks.parameters(reference), needless) == (published, biases)
    assert checks.parameters(decoder) == published - biases - checks.parameters(reference.encoder)


def test_first_and_last_map_of_each_stride_are_read():
    torch.manual_seed(0)
    strides = [4, 8, 8, 8, 16]
    decoder = MTAN([4, 6, 6, 8, 10], strides, TASKS)  # in training, where norms let no layer be all zero
    assert decoder.used_levels == {0, 1, 3, 4}
    maps = [torch.randn(1, c, 64 // s, 96 // s) for c, s in zip([4, 6, 6, 8, 10], strides)]
    with torch.no_grad():
        unchanged = decoder.predict(maps, (64, 96))
        for index, feature in enumerate(maps):
            changed = decoder.predict([*maps[:index], feature.roll(1, 3), *maps[index + 1 :]], (64, 96))
            assert all(torch.equal(p, changed[t]) == (index == 2) for t, p in unchanged.items())


def test_masks_are_a_tasks_own():
    decoder = checks.build_decoder(make)
    maps = checks.features((64, 96))
    with torch.no_grad():
        unchanged = decoder(maps, (64, 96))
        for mask in (decoder.encoder_masks["depth"][1], decoder.decoder_masks["depth"][0]):
            mask[1].weight.mul_(-1)
            output = decoder(maps, (64, 96))
            mask[1].weight.mul_(-1)
            assert [t for t in TASKS if not torch.equal(unchanged.predictions[t], output.predictions[t])] == ["depth"]
            assert torch.equal(unchanged.features["trunk"]["depth"], output.features["trunk"]["depth"])


@pytest.mark.parametrize("tasks", [("depth",), ("normals", "semseg")])
def test_any_subset_of_tasks(tasks):
    checks.check_shapes(make, tasks, PYRAMID, batch=1, training=True)


@pytest.mark.parametrize("strides", [PYRAMID, VIT, [4, 8, 8, 8]])
@pytest.mark.parametrize("training", [True, False])
def test_any_backbone(strides, training):
    checks.check_shapes(make, TASKS, strides, batch=2, training=training)


@pytest.mark.parametrize("check", [checks.check_predict, checks.check_bf16, checks.check_shared])
def test_promises(check):
    check(make)


@pytest.mark.slow
def test_compiles():
    checks.check_compiles(make)
