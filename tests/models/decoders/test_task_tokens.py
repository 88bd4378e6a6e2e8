"""Hierarchical task tokens: against the public code's steps written anew, token by token; the contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import decoder_checks as checks
from helpers.decoder_checks import CHANNELS, PASCAL, PYRAMID, TASKS, VIT, features
from torch import Tensor

from mtcl import UserError
from mtcl.models.decoders import TaskTokens
from mtcl.models.decoders.atrc import directions, log_bins

KINDS = {
    "depth": {"kind": "log_bins", "count": 4, "low": 0.6395, "high": 10.477},
    "normals": {"kind": "directions", "count": 6},
}
WIDTH, TRUNK, RATES = 6, 7, (2, 3, 4)


def make(channels, strides, tasks, **options):
    sizes = {"width": WIDTH, "trunk_width": TRUNK, "head_width": 5, "rates": RATES, "dropout": 0.0}
    return TaskTokens(channels, strides, tasks, **{**sizes, **options})


class PublicSteps:
    """The steps of the authors' code for one image, in evaluation mode, with the weights of our decoder."""

    def __init__(self, decoder: TaskTokens):
        self.state = {name: value.double() for name, value in decoder.state_dict().items()}
        self.tasks = list(decoder.tasks)

    def layer(self, name: str, x: Tensor, **options) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        return F.linear(x, weight, bias) if weight.dim() == 2 else F.conv2d(x, weight, bias, **options)

    def block(self, name: str, x: Tensor, dilation: int = 1) -> Tensor:
        padding = dilation * (self.state[f"{name}.0.weight"].shape[-1] // 2)
        x = self.layer(f"{name}.0", x, padding=padding, dilation=dilation)
        norm = [self.state[f"{name}.1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *norm).relu()

    def prompt(self, level: int, x: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        name, width = f"levels.{level}", x.shape[1]
        tokens = [self.layer(f"{name}.project.{i}", self.state["tokens"][i]) for i in range(len(self.tasks))]
        down = self.layer(f"{name}.scale", x, groups=width)
        selected = [x * (down * token[None, :, None, None]).sum(1, keepdim=True).sigmoid() for token in tokens]
        q, k = (torch.stack([self.layer(f"{name}.{part}", t) for t in tokens]) for part in ("query", "key"))
        affinity = (q @ k.T * width**-0.5).softmax(dim=-1)
        maps, mixed = {}, []
        for i, task in enumerate(self.tasks):
            maps[task] = self.block(
                f"{name}.layers.{task}", sum(a * x for a, x in zip(affinity[i], selected, strict=True))
            )
            mixed.append(sum(a * t for a, t in zip(affinity[i], tokens, strict=True)))
        return maps, mixed

    def head(self, name: str, x: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        aspp = f"{name}.aspp"
        branches = [self.block(f"{aspp}.branches.0", x)]
        branches += [self.block(f"{aspp}.branches.{i}", x, rate) for i, rate in enumerate(RATES, start=1)]
        mean = self.layer(f"{aspp}.pooled", x.mean((2, 3), keepdim=True)).relu()
        x = self.block(f"{aspp}.project.0", torch.cat([*branches, mean.expand_as(branches[0])], dim=1))
        x = self.layer(f"{name}.conv", x, padding=1)
        parts = []
        for i in range(3):
            reduced = self.layer(f"{name}.reduce.{i}", x, stride=2, groups=WIDTH)
            cells = torch.cat([reduced.flatten(2)[0].T, token[None]])
            parts.append(self.layer(f"{name}.project.{i}", cells))
        q, k, v = parts
        out = (q @ k.T / math.sqrt(WIDTH)).softmax(dim=-1) @ v
        cells = self.layer(f"{name}.restore", out[:-1]).T.reshape(1, WIDTH, *reduced.shape[-2:])
        cells = F.interpolate(cells, size=x.shape[-2:], mode="bilinear", align_corners=False) + x
        return self.block(f"{name}.mix", cells), self.layer(f"{name}.restore_token", out[-1])

    def scores(self, name: str, x: Tensor, token: Tensor) -> Tensor:
        down, labels = self.layer(f"{name}.scale", x, groups=WIDTH), self.state[f"{name}.embedding.weight"].shape[1]
        fine = token[:, None] + self.layer(f"{name}.embedding", torch.eye(labels, dtype=torch.float64)).T
        for n in (0, 3):
            norm = [self.state[f"{name}.mlp.{n + 1}.{part}"] for part in ("weight", "bias")]
            fine = F.gelu(F.layer_norm(self.layer(f"{name}.mlp.{n}", fine), norm[0].shape, *norm))
        fine = self.layer(f"{name}.mlp.6", fine)
        gates = [F.softplus((down * fine[:, i][None, :, None, None]).sum(1, keepdim=True)) for i in range(labels)]
        return self.layer(f"{name}.refine", self.layer(f"{name}.channels", x) * torch.cat(gates, dim=1), padding=1)

    def __call__(self, maps: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Return the final maps, relevances and predictions at the finest map's size."""
        levels = [self.prompt(i, x) for i, x in enumerate(maps)]
        final, relevance, predictions = {}, {}, {}
        for i, task in enumerate(self.tasks):
            size = maps[0].shape[-2:]
            resized = [F.interpolate(m[task], size=size, mode="bilinear", align_corners=False) for m, _ in levels]
            weight = torch.cat([self.state[f"fuse.{task}.project.{n}.weight"] for n in range(4)], dim=1)
            fused = F.conv2d(torch.cat(resized, dim=1), weight, self.state[f"fuse.{task}.project.0.bias"])
            token = sum(self.layer(f"restore.{task}.{n}", mixed[i]) for n, (_, mixed) in enumerate(levels))
            final[task], token = self.head(f"heads.{task}", fused, token)
            relevance[task] = (final[task] * token[None, :, None, None]).sum(1, keepdim=True)
            scores = self.scores(f"logits.{task}", final[task], token)
            if task == "depth":
                scores = (scores.softmax(dim=1) * log_bins(4, 0.6395, 10.477)[None, :, :, None]).sum(1, keepdim=True)
            if task == "normals":
                vectors = directions(6)[None, :, :, None, None].double()
                scores = F.normalize((scores.softmax(dim=1)[:, :, None] * vectors).sum(1), dim=1)
            predictions[task] = scores
        return final, relevance, predictions


def test_it_computes_what_the_public_code_computes():
    decoder = make(CHANNELS, PYRAMID, TASKS, kinds=KINDS).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in decoder.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) - (0.5 if value.dim() > 1 else 0.0))
    maps = features((64, 96), batch=1)
    with torch.no_grad():
        output = decoder(maps, (64, 96))
        final, relevance, predictions = PublicSteps(decoder)([x.double() for x in maps])
    for task in TASKS:
        for name, want in (("final", final), ("relevance", relevance)):
            torch.testing.assert_close(output.features[name][task].double(), want[task], rtol=1e-3, atol=1e-4)
        want_resized = F.interpolate(predictions[task], (64, 96), mode="bilinear", align_corners=False)
        torch.testing.assert_close(output.predictions[task].double(), want_resized, rtol=1e-3, atol=1e-4)


def test_published_size():
    """Parameters of the authors' classes for ResNet-18 on PASCAL-Context, less what the differences are.

    Their tokens are no parameters, ours are.
    """
    channels, tasks, width, trunk = [64, 128, 256, 512], len(PASCAL), 256, 512
    counts = {**PASCAL, "normals": 40}

    def layer(inputs: int, outputs: int, kernel: int = 1, bias: bool = True) -> int:
        return inputs * outputs * kernel**2 + outputs * bias

    total = 0
    for c in channels:  # prompter: depthwise, query and key; per task 3x3 with a norm, projection, restoring
        total += 2 * c + 2 * layer(c, c)
        total += tasks * (layer(c, c, 3, bias=False) + 2 * c + layer(trunk, c) + layer(c, width))
    for k in counts.values():
        total += layer(sum(channels), trunk)
        pyramid = layer(trunk, width, bias=False) + 3 * layer(trunk, width, 3, bias=False) + 4 * 2 * width
        total += pyramid + layer(trunk, width) + layer(5 * width, width, bias=False) + 2 * width
        total += layer(width, width, 3, bias=False)  # after the pyramid
        total += 3 * 4 * width + 5 * layer(width, width) + layer(width, width, 3, bias=False) + 2 * width  # attention
        total += 2 * width + layer(k, width) + layer(k, 128) + layer(128, 128) + layer(128, k) + 4 * 128
        total += layer(width, k) + layer(k, k, 3)
    with torch.device("meta"):
        decoder = TaskTokens(channels, PYRAMID, PASCAL, kinds={"normals": {"kind": "directions", "count": 40}})
    assert checks.parameters(decoder) - decoder.tokens.numel() == total
    assert decoder.tokens.shape == (tasks, trunk)


def test_the_bins_of_the_config_are_the_published_ones():
    bins = log_bins(30, 0.6395, 10.477)[:, 0]
    torch.testing.assert_close(bins, 0.67 * (10 / 0.67) ** torch.linspace(0, 1, 30), rtol=1e-3, atol=0)


def test_a_prediction_depends_on_its_own_image_alone():
    decoder = checks.build_decoder(make).eval()
    maps = features((64, 96), batch=2)
    with torch.no_grad():
        both, first = (decoder.predict(x, (64, 96)) for x in (maps, [x[:1] for x in maps]))
    for task, prediction in first.items():
        torch.testing.assert_close(both[task][:1], prediction, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kinds", [None, KINDS])
@pytest.mark.parametrize("tasks", [("depth",), tuple(TASKS)])
@pytest.mark.parametrize("strides", [PYRAMID, VIT])
def test_any_tasks_on_any_backbone(tasks, strides, kinds):
    checks.check_shapes(lambda *sizes: make(*sizes, kinds=kinds), tasks, strides, batch=1, training=True)


@pytest.mark.parametrize("check", [checks.check_predict, checks.check_bf16, checks.check_shared])
def test_contract(check):
    check(lambda *sizes: make(*sizes, width=8, trunk_width=12, head_width=16, kinds=KINDS))


def test_its_own_layers_begin_after_the_tokens():
    decoder = checks.build_decoder(make)
    assert decoder.head_weight("depth") is decoder.levels[0].layers["depth"][0].weight


def test_the_nearest_label_of_each_cell_is_learned():
    decoder = make(CHANNELS, PYRAMID, TASKS, kinds=KINDS, bin_weights={"depth": 0.5, "normals": 2.0, "edge": 1.0})
    generator = torch.Generator().manual_seed(0)
    output = decoder(features((32, 64)), (32, 64))
    labels = {
        "depth": torch.rand(2, 1, 30, 64, generator=generator) * 10 - 2,
        "normals": F.normalize(torch.randn(2, 3, 30, 64, generator=generator), dim=1),
    }
    labels["depth"] = labels["depth"].clamp(min=0)  # some void
    got = decoder.compute_task_errors(output, labels)
    values = {"depth": log_bins(4, 0.6395, 10.477), "normals": directions(6)}
    for task, weight in (("depth", 0.5), ("normals", 2.0)):
        errors = []
        scores = output.features["labels"][task]
        for b in range(2):
            for i in range(7):  # the eighth row of cells has its middle at 30, beyond the image
                for j in range(16):
                    value = labels[task][b, :, 4 * i + 2, 4 * j + 2]
                    if value.any():
                        nearest = min(range(len(values[task])), key=lambda k: (values[task][k] - value).norm().item())
                        errors.append(scores[b, :, i, j].logsumexp(0) - scores[b, nearest, i, j])
        assert 0 < len(errors) < 2 * 8 * 16
        got_errors, is_valid = got[task]
        torch.testing.assert_close(got_errors[is_valid], weight * torch.stack(errors))
    assert list(got) == ["depth", "normals"]


def test_wrong_kinds():
    with pytest.raises(UserError, match=r"kinds\.depth\.count=1 must be"):
        checks.build_decoder(lambda *sizes: make(*sizes, kinds={"depth": {**KINDS["depth"], "count": 1}}))
