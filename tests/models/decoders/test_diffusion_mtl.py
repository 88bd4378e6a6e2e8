"""DiffusionMTL: against its public code written anew, under its names; the process against formulas; the contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import decoder_checks as checks
from helpers.decoder_checks import PASCAL, PYRAMID, TASKS, VIT, features
from torch import Tensor

from mtcl import UserError
from mtcl.models.decoders import DiffusionMTL
from mtcl.models.decoders.diffusion_mtl import DiffusionProcess, embed_step
from mtcl.models.published import METHODS, check_state_dict, translate_state_dict

NAMES = {"semseg": 5, "normals": 3}  # in the order of the authors' code
WIDTH, HEAD, HEADS = 8, 6, 2


def make(channels, strides, tasks, **options):
    return DiffusionMTL(channels, strides, tasks, **{"width": WIDTH, "head_width": HEAD, "heads": HEADS, **options})


def published_shapes(channels, tasks, width, head, steps, blocks=4) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a state dict of the authors' code, without backbone."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    layer("backbone_embed", width, sum(channels), 3, 3)
    layer("diffusion_model.pred_combinator.out_layer", width, sum(tasks.values()), 3, 3)
    tables = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
    for table in (*tables, "posterior_variance", "posterior_mean_coef1", "posterior_mean_coef2"):
        shapes[f"diffusion_model.{table}"] = (steps,)
    denoiser = "diffusion_model.denoiser"
    layer(f"{denoiser}.t_embedder.mlp.0", width, 256)
    layer(f"{denoiser}.t_embedder.mlp.2", width, width)
    for n in range(blocks):
        block = f"{denoiser}.crossblocks.{n}"
        for norm in ("norm1", "norm2", "norm_kv", "norm2_kv"):
            layer(f"{block}.{norm}", width)
        layer(f"{block}.attn.q", width, width, bias=False)
        layer(f"{block}.attn.kv", 2 * width, width, bias=False)
        layer(f"{block}.attn.proj", width, width)
        for mlp in ("mlp", "mlp_kv"):
            layer(f"{block}.{mlp}.fc1", 4 * width, width)
            layer(f"{block}.{mlp}.fc2", width, 4 * width)
    for task, outputs in tasks.items():
        for n in range(2):
            for i in (1, 2):
                layer(f"preliminary_dec.{task}.{n}.conv{i}", width, width, 3, 3, bias=False)
                layer(f"preliminary_dec.{task}.{n}.bn{i}", width)
                for statistic in ("running_mean", "running_var"):
                    shapes[f"preliminary_dec.{task}.{n}.bn{i}.{statistic}"] = (width,)
                shapes[f"preliminary_dec.{task}.{n}.bn{i}.num_batches_tracked"] = ()
        layer(f"preliminary_head.{task}.0", outputs, width, 1, 1)
        layer(f"{denoiser}.pre_layer.{task}", width, width, 3, 3)
        for n, (out, into, kernel) in {
            0: (width, width, 1),
            1: (head, width, 3),
            3: (width, head, 3),
            5: (width, width, 3),
        }.items():
            layer(f"{denoiser}.task_heads.{task}.{n}", out, into, kernel, kernel)
        layer(f"{denoiser}.final_task_heads.{task}.linear_pred", outputs, width, 1, 1)
    return shapes


class PublicCode:
    """The authors' network in evaluation mode, one image and task at a time; ``noise`` draws each noise."""

    def __init__(self, state, tasks, steps, noise):
        self.state, self.tasks, self.steps, self.noise = state, tasks, steps, noise
        betas = torch.linspace(1e-3**0.5, 1e-2**0.5, steps, dtype=torch.float64) ** 2
        self.betas, self.signal = betas, torch.cumprod(1 - betas, 0)

    def layer(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        if weight.dim() == 1:
            return F.layer_norm(x, weight.shape, weight, bias)
        return (
            F.linear(x, weight, bias) if weight.dim() == 2 else F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        )

    def basic_block(self, name: str, x: Tensor) -> Tensor:
        out = x
        for i in (1, 2):
            norm = [self.state[f"{name}.bn{i}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
            out = F.batch_norm(self.layer(f"{name}.conv{i}", out), *norm)
            out = out.relu() if i == 1 else (out + x).relu()
        return out

    def attention(self, name: str, x: Tensor, source: Tensor) -> Tensor:
        key, value = self.layer(f"{name}.kv", source).chunk(2, dim=-1)
        query, size = self.layer(f"{name}.q", x), x.shape[-1] // HEADS
        heads = []
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            weights = (query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(size)).softmax(dim=-1)
            heads.append(weights @ value[..., part])
        return self.layer(f"{name}.proj", torch.cat(heads, dim=-1))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.layer(f"{name}.fc2", F.gelu(self.layer(f"{name}.fc1", x)))

    def denoise(self, task: str, noised: Tensor, condition: Tensor, step: int) -> Tensor:
        name = "diffusion_model.denoiser"
        angles = [step * math.exp(-math.log(10000) * i / 128) for i in range(128)]
        time = torch.tensor([[math.cos(a) for a in angles] + [math.sin(a) for a in angles]], dtype=torch.float64)
        time = self.layer(f"{name}.t_embedder.mlp.2", F.silu(self.layer(f"{name}.t_embedder.mlp.0", time)))
        start = self.layer(f"{name}.pre_layer.{task}", noised) + time[:, :, None, None]
        small = [F.interpolate(x, scale_factor=0.25, mode="bilinear", align_corners=False) for x in (condition, start)]
        x, source = (m.flatten(2).transpose(1, 2) for m in small)
        for n in range(4):
            block = f"{name}.crossblocks.{n}"
            source = source + self.mlp(f"{block}.mlp_kv", self.layer(f"{block}.norm2_kv", source))
            x = x + self.attention(
                f"{block}.attn", self.layer(f"{block}.norm1", x), self.layer(f"{block}.norm_kv", source)
            )
            x = x + self.mlp(f"{block}.mlp", self.layer(f"{block}.norm2", x))
        x = x.transpose(1, 2).reshape(small[0].shape)
        x = F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False) + start
        for n in (0, 1, 3, 5):
            x = self.layer(f"{name}.task_heads.{task}.{n}", x)
            x = x if n == 0 else x.relu()
        return x

    def __call__(self, maps: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the initial predictions and the final ones at half the finest map's size."""
        grid = [side // 2 for side in maps[0].shape[-2:]]
        maps = [F.interpolate(x, size=grid, mode="bilinear", align_corners=False) for x in maps]
        shared = self.layer("backbone_embed", torch.cat(maps, dim=1))
        initial = {
            t: self.basic_block(f"preliminary_dec.{t}.1", self.basic_block(f"preliminary_dec.{t}.0", shared))
            for t in self.tasks
        }
        first = {t: self.layer(f"preliminary_head.{t}.0", x) for t, x in initial.items()}
        condition = self.layer("diffusion_model.pred_combinator.out_layer", torch.cat(list(first.values()), dim=1))
        last = self.steps - 1
        x = {
            t: self.signal[last].sqrt() * m + (1 - self.signal[last]).sqrt() * self.noise(m) for t, m in initial.items()
        }
        for step in range(last, 0, -1):
            beta, signal, earlier = self.betas[step], self.signal[step], self.signal[step - 1]
            for task in self.tasks:
                clean = self.denoise(task, x[task], condition, step)
                mean = beta * earlier.sqrt() / (1 - signal) * clean
                x[task] = mean + (1 - earlier) * (1 - beta).sqrt() / (1 - signal) * x[task]
            for task in self.tasks:
                x[task] = x[task] + (beta * (1 - earlier) / (1 - signal)).sqrt() * self.noise(x[task])
        final = {t: self.denoise(t, m, condition, 0) for t, m in x.items()}
        name = "diffusion_model.denoiser.final_task_heads"
        return first, {t: self.layer(f"{name}.{t}.linear_pred", m) for t, m in final.items()}


@pytest.mark.parametrize(("steps", "with_noise"), [(2, True), (3, True), (2, False)])
def test_it_computes_what_the_public_code_computes(steps, with_noise, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = published_shapes(checks.CHANNELS, NAMES, WIDTH, HEAD, steps)
    state = {
        key: torch.rand(shape, generator=generator, dtype=torch.float64) * (0.6 if len(shape) > 1 else 1)
        - (0.3 if len(shape) > 1 else 0)
        for key, shape in shapes.items()
    }
    translated = translate_state_dict(state, METHODS["diffusion_mtl"], list(NAMES))
    assert all(key.startswith("diffusion_model.") for key in translated.unused_keys)
    decoder = make(checks.CHANNELS, PYRAMID, NAMES, steps=steps, noise_at_inference=with_noise).eval()
    ours = {key.removeprefix("decoder."): value.float() for key, value in translated.state.items()}
    check_state_dict(ours, decoder.state_dict(), "DiffusionMTL")
    decoder.load_state_dict(ours)

    def draw(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=noise).to(x.dtype) if with_noise else torch.zeros_like(x)

    monkeypatch.setattr(torch, "randn_like", draw)
    maps = features((128, 64), batch=1)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        output = decoder(maps, (128, 64))
        noise = torch.Generator().manual_seed(1)
        first, final = PublicCode(state, NAMES, steps, draw)([x.double() for x in maps])
    for task in NAMES:
        for got, want in ((output.intermediate[0], first), (output.predictions, final)):
            want_resized = F.interpolate(want[task], (128, 64), mode="bilinear", align_corners=False)
            torch.testing.assert_close(got[task].double(), want_resized, rtol=1e-4, atol=1e-5)


def test_published_size():
    """Parameters that the authors' classes have for ResNet-18 on PASCAL-Context, without its backbone."""
    channels = [64, 128, 256, 512]
    shapes = published_shapes(channels, PASCAL, 512, 512, steps=2)
    learned = {k: s for k, s in shapes.items() if k.endswith((".weight", ".bias"))}
    expected = sum(math.prod(s) for s in learned.values())
    with torch.device("meta"):
        assert checks.parameters(DiffusionMTL(channels, PYRAMID, PASCAL)) == expected


def test_a_step_back_from_the_mean_of_the_noised_maps_keeps_clean_ones():
    """With the clean maps predicted exactly, the mean of x_{t-1} is that of the forward process."""
    process, clean = DiffusionProcess(4), {"depth": torch.randn(2, 3, 4, 4)}
    x = process.add_noise(clean, draw=False)
    for step in (3, 2, 1):
        x = process.step_back(x, clean, step, draw=False)
        torch.testing.assert_close(x["depth"], process.sqrt_signal[step - 1] * clean["depth"])


def test_noise_has_the_deviation_of_the_process():
    process, clean = DiffusionProcess(2), {"depth": torch.zeros(1, 1, 200, 200)}
    torch.manual_seed(0)
    assert process.add_noise(clean, draw=True)["depth"].std().item() == pytest.approx(0.1045, rel=0.03)
    assert process.step_back(clean, clean, 1, draw=True)["depth"].std().item() == pytest.approx(0.0302, rel=0.03)


def test_inference_draws_no_noise_unless_asked_to():
    maps = features((64, 64))
    for asked in (False, True):
        decoder = checks.build_decoder(lambda *sizes, asked=asked: make(*sizes, noise_at_inference=asked)).eval()
        with torch.no_grad():
            first, second = (decoder.predict(maps, (64, 64))["depth"] for _ in range(2))
        assert torch.equal(first, second) != asked


def test_conditions_carry_no_gradient_to_other_tasks_predictions():
    decoder = checks.build_decoder(make).eval()
    decoder(features((64, 64)), (64, 64)).predictions["depth"].sum().backward()
    assert all(layer.weight.grad is None for layer in decoder.initial_logits.values())
    assert not decoder.initial["semseg"][0].conv1.weight.grad.any()
    assert decoder.condition.weight.grad.any()


@pytest.mark.parametrize("denoise", ["features", "predictions"])
@pytest.mark.parametrize("tasks", [("depth",), tuple(TASKS)])
@pytest.mark.parametrize("strides", [PYRAMID, VIT])
def test_any_tasks_on_any_backbone(tasks, strides, denoise):
    size = (384, 256) if strides == VIT else (96, 64)  # a single cell to attend to would leave queries without gradient
    checks.check_shapes(lambda *sizes: make(*sizes, denoise=denoise), tasks, strides, batch=1, training=True, size=size)


@pytest.mark.parametrize("denoise", ["features", "predictions"])
def test_the_inference_path_gives_the_same(denoise):
    decoder = checks.build_decoder(lambda *sizes: make(*sizes, denoise=denoise)).eval()
    maps = features((64, 96))
    with torch.no_grad():
        output, predictions = decoder(maps, (64, 96)), decoder.predict(maps, (64, 96))
    assert all(torch.equal(p, output.predictions[task]) for task, p in predictions.items())
    assert decoder.head_weight("depth") is decoder.initial["depth"][0].conv1.weight


@pytest.mark.parametrize("check", [checks.check_bf16, checks.check_shared])
def test_contract(check):
    check(lambda *sizes: make(*sizes, head_width=16))


def test_it_overfits_a_batch():
    checks.check_overfits(lambda *sizes: make(*sizes, width=16, head_width=16), lr=0.01)


def test_step_embedding():
    got = embed_step(3, torch.zeros(1))
    assert got[:2].tolist() == pytest.approx([math.cos(3), math.cos(3 * 10000 ** (-1 / 128))])
    assert got[128].item() == pytest.approx(math.sin(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"heads": 3}, "=3 must divide"), ({"steps": 0}, "=0 must be"), ({"denoise": "both"}, "=both must be one of")],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        checks.build_decoder(lambda *sizes: make(*sizes, **options))
