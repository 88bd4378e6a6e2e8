"""DiffusionMTL: against its public code written anew, under its names; the process against formulas; the contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import decoder_checks as checks
from helpers.decoder_checks import PYRAMID, TASKS, VIT, features
from helpers.diffusion_mtl_reference import Reference, published_shapes, published_state
from torch import Tensor

from mtcl import UserError
from mtcl.models.decoders import DiffusionMTL
from mtcl.models.decoders.diffusion_mtl import DiffusionProcess, embed_step
from mtcl.models.published import METHODS, check_state_dict, translate_state_dict

NAMES = {"semseg": 5, "normals": 3}  # in the order of the authors' code
WIDTH, HEAD, HEADS = 8, 6, 2


def make(channels, strides, tasks, **options):
    return DiffusionMTL(channels, strides, tasks, **{"width": WIDTH, "head_width": HEAD, "heads": HEADS, **options})


@pytest.mark.parametrize(("steps", "with_noise"), [(2, True), (3, True), (2, False)])
def test_it_computes_what_the_public_code_computes(steps, with_noise, monkeypatch):
    """With its noise, too; an imported network as a whole is compared in tests/cli/test_import_diffusion_mtl.py."""
    state = published_state(published_shapes(NAMES, checks.CHANNELS, WIDTH, HEAD, steps))
    state = {key: value.double() for key, value in state.items() if not key.startswith("backbone.")}
    translated = translate_state_dict(state, METHODS["diffusion_mtl"], list(NAMES))
    assert all(key.startswith("diffusion_model.") for key in translated.unused_keys)
    decoder = make(checks.CHANNELS, PYRAMID, NAMES, steps=steps, noise_at_inference=with_noise).double().eval()
    ours = {key.removeprefix("decoder."): value for key, value in translated.state.items()}
    check_state_dict(ours, decoder.state_dict(), "DiffusionMTL")
    decoder.load_state_dict(ours)

    def draw(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=noise).to(x.dtype) if with_noise else torch.zeros_like(x)

    monkeypatch.setattr(torch, "randn_like", draw)
    maps = [x.double() for x in features((128, 64), batch=1)]
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        output = decoder(maps, (128, 64))
        noise = torch.Generator().manual_seed(1)
        initial, final = Reference(state, list(NAMES), HEADS, draw).decode(maps)
    for task in NAMES:
        for got, want in ((output.intermediate[0], initial), (output.predictions, final)):
            want_resized = F.interpolate(want[task], (128, 64), mode="bilinear", align_corners=False)
            torch.testing.assert_close(got[task], want_resized, rtol=1e-5, atol=1e-7)


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


@pytest.mark.parametrize("denoise", ["features", "predictions"])
@pytest.mark.parametrize("check", [checks.check_bf16, checks.check_shared])
def test_contract(check, denoise):
    check(lambda *sizes: make(*sizes, head_width=16, denoise=denoise))


@pytest.mark.slow
def test_it_overfits_a_batch_where_predictions_are_denoised():
    checks.check_overfits(lambda *sizes: make(*sizes, width=16, head_width=16, denoise="predictions"), lr=0.01)


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
