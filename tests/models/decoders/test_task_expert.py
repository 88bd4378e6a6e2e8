"""TaskExpert: against its steps written slowly, expert by expert and pixel by pixel; the contract."""

import pytest
import torch
import torch.nn.functional as F
from helpers import decoder_checks as checks
from helpers.decoder_checks import CHANNELS, PASCAL, PYRAMID, TASKS, VIT, features
from torch import Tensor

from mtcl import UserError
from mtcl.models.decoders import TaskExpert
from mtcl.models.decoders.task_expert import Gate, MemorialExperts

EXPERTS, WIDTH, GATE, HEAD = 3, 4, 5, 6


def make(channels, strides, tasks, **options):
    sizes = {"num_experts": EXPERTS, "width": WIDTH, "gate_width": GATE, "head_width": HEAD}
    return TaskExpert(channels, strides, tasks, **{**sizes, **options})


class SlowSteps:
    """The decoder's steps for one image in evaluation mode, with the weights of a decoder."""

    def __init__(self, decoder: TaskExpert, gating: str, memory_update: str):
        self.state = {name: value.double() for name, value in decoder.state_dict().items()}
        self.tasks, self.gating, self.memory_update = list(decoder.tasks), gating, memory_update

    def block(self, name: str, x: Tensor, part: slice = slice(None)) -> Tensor:
        """Convolution, batch norm and GELU with some of the output channels."""
        weight = self.state[f"{name}.0.weight"][part]
        norm = [self.state[f"{name}.1.{key}"][part] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.gelu(F.batch_norm(F.conv2d(x[None], weight, padding=weight.shape[-1] // 2), *norm))[0]

    def gates(self, name: str, x: Tensor) -> list[list[Tensor]]:
        """Return the weights (N + 1,) at each row and column."""
        state, hidden = self.state, []
        for row in range(x.shape[1]):
            hidden.append([])
            for column in range(x.shape[2]):
                h = state[f"{name}.hidden.weight"][:, :, 0, 0] @ x[:, row, column] + state[f"{name}.hidden.bias"]
                h = (h - h.mean()) / (h.var(correction=0) + 1e-5).sqrt()
                hidden[-1].append(F.gelu(h * state[f"{name}.norm.weight"] + state[f"{name}.norm.bias"]))
        mean = sum(h for line in hidden for h in line) / (x.shape[1] * x.shape[2])
        shared = state[f"{name}.context.weight"] @ mean + state[f"{name}.context.bias"]
        weights = []
        for line in hidden:
            weights.append([])
            for h in line:
                scores = shared + state[f"{name}.local.weight"] @ h if self.gating == "pixel" else shared
                weights[-1].append(scores.exp() / scores.exp().sum())
        return weights

    def __call__(self, maps: list[Tensor], grid: tuple[int, int], finer: tuple[int, int]) -> dict[str, Tensor]:
        """Return the final maps."""
        memory = {task: torch.zeros(WIDTH, *grid).double() for task in self.tasks}
        for level, x in enumerate(maps):
            x = F.interpolate(x[None], grid, mode="bilinear", align_corners=False)[0]
            name = f"levels.{level}"
            experts = [self.block(f"{name}.experts", x, slice(n * WIDTH, (n + 1) * WIDTH)) for n in range(EXPERTS)]
            for task in self.tasks:
                weights, mixed = self.gates(f"{name}.gates.{task}", x), torch.zeros(WIDTH, *grid).double()
                for row in range(grid[0]):
                    for column in range(grid[1]):
                        for n, expert in enumerate([*experts, memory[task]]):
                            mixed[:, row, column] += weights[row][column][n] * expert[:, row, column]
                written = self.block(f"{name}.write.{task}", mixed)
                memory[task] = written + memory[task] if self.memory_update == "add" else written
        final = {}
        for task, m in memory.items():
            enlarged = F.interpolate(m[None], finer, mode="bilinear", align_corners=False)[0]
            final[task] = self.block(f"heads.{task}", enlarged)
        return final


@pytest.mark.parametrize(
    ("gating", "memory_update", "strides", "kernel"),
    [("pixel", "add", VIT, 3), ("image", "replace", VIT, 1), ("pixel", "replace", PYRAMID, 3)],
)
def test_it_computes_what_its_docstring_says(gating, memory_update, strides, kernel):
    options = {"gating": gating, "memory_update": memory_update, "kernel": kernel}
    decoder = make(CHANNELS, strides, TASKS, **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in decoder.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) - (0.5 if value.dim() > 1 else 0.0))
    maps = features((32, 64), strides)
    with torch.no_grad():
        output = decoder(maps, (32, 64))
    slow = SlowSteps(decoder, gating, memory_update)
    for image in range(2):
        final = slow([x[image].double() for x in maps], (2, 4), (8, 16))
        for task, want in final.items():
            torch.testing.assert_close(output.features["final"][task][image].double(), want, rtol=1e-4, atol=1e-5)
            layer = decoder.logits[task]
            scores = F.conv2d(want[None], layer.weight.double(), layer.bias.double())
            enlarged = F.interpolate(scores, (32, 64), mode="bilinear", align_corners=False)[0]
            torch.testing.assert_close(output.predictions[task][image].double(), enlarged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gating", ["pixel", "image"])
def test_gates_sum_to_one_and_depend_on_the_image(gating):
    torch.manual_seed(0)
    gate = Gate(6, GATE, EXPERTS + 1, gating)
    with torch.no_grad():
        weights = gate(torch.randn(2, 6, 3, 5))
    assert weights.shape == (2, EXPERTS + 1, 3, 5)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, 3, 5))
    assert not torch.equal(weights[0, :, 0, 0], weights[1, :, 0, 0])
    assert torch.equal(weights, weights[:, :, :1, :1].expand_as(weights)) == (gating == "image")


@pytest.mark.parametrize("memory_update", ["add", "replace"])
def test_a_memory_that_the_gates_do_not_read(memory_update):
    """It stays as it is where a mixture is added, and is gone where one stands in for it."""
    torch.manual_seed(0)
    level = MemorialExperts(6, ["depth", "edge"], EXPERTS, WIDTH, 3, GATE, "pixel", memory_update).eval()
    with torch.no_grad():
        for gate in level.gates.values():
            gate.context.bias[-1] = -1e4
        x, memory = torch.randn(2, 6, 3, 5), torch.randn(2, 2, WIDTH, 3, 5)
        difference = level(x, memory) - level(x, torch.zeros_like(memory))
    torch.testing.assert_close(difference, memory if memory_update == "add" else torch.zeros_like(memory))


def test_a_task_reaches_all_experts_and_no_other_gates():
    decoder = checks.build_decoder(make)
    decoder(features((32, 64)), (32, 64)).predictions["depth"].square().mean().backward()
    for level in decoder.levels:
        per_expert = level.experts[0].weight.grad.unflatten(0, (EXPERTS, WIDTH)).flatten(1)
        assert per_expert.any(dim=1).all()
        assert all(p.grad.any() for p in level.gates["depth"].parameters())
        assert all(p.grad is None or not p.grad.any() for p in level.gates["semseg"].parameters())


def test_size_for_vit_large_on_pascal():
    """Parameters of the default sizes; with those of ViT-L about 420 M, which was passed on to us as published."""
    c, n, w, g = 1024, 4, 448, 256
    shared = 4 * (9 * c * n * w + 2 * n * w)
    per_task = 4 * ((c + 1) * g + 2 * g + (g + 1) * (n + 1) + g * (n + 1))  # gates
    per_task += (4 + 1) * (9 * w * w + 2 * w)  # writing into the memory, head
    logits = sum((w + 1) * outputs for outputs in PASCAL.values())
    with torch.device("meta"):
        decoder = TaskExpert([c] * 4, VIT, PASCAL)
    assert checks.parameters(decoder) == shared + len(PASCAL) * per_task + logits
    assert 303e6 + checks.parameters(decoder) == pytest.approx(420e6, rel=0.005)


@pytest.mark.parametrize(("gating", "memory_update"), [("pixel", "add"), ("image", "replace")])
@pytest.mark.parametrize("tasks", [("depth",), tuple(TASKS)])
@pytest.mark.parametrize("strides", [PYRAMID, VIT])
def test_any_tasks_on_any_backbone(tasks, strides, gating, memory_update):
    def build(*sizes):
        return make(*sizes, gating=gating, memory_update=memory_update)

    checks.check_shapes(build, tasks, strides, batch=1, training=True)


@pytest.mark.parametrize("check", [checks.check_predict, checks.check_bf16, checks.check_shared])
def test_contract(check):
    check(make)


def test_the_head_is_where_gradients_are_compared():
    decoder = checks.build_decoder(make)
    assert decoder.head_weight("depth") is decoder.heads["depth"][0].weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 2}, "kernel=2 must be odd"),
        ({"gating": "all"}, "gating=all must be one of pixel, image"),
        ({"memory_update": "keep"}, "memory_update=keep must be one of add, replace"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        checks.build_decoder(lambda *sizes: make(*sizes, **options))
