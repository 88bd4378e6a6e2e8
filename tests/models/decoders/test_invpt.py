"""InvPT: attention message passing against loops, sizes, subsets of tasks, what is shared, and the published size."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.attention_loops import looped_attention

from mtcl import UserError
from mtcl.models import EncoderDecoder, build_backbone
from mtcl.models.decoders import InvPT
from mtcl.models.decoders.invpt import SpatialNorm, TaskAttention, select_encoder_levels, upsample_scores
from mtcl.profiling.flops import count

TASKS = {"semseg": 5, "depth": 1, "normals": 3}
PASCAL = {"semseg": 21, "human_parts": 7, "sal": 2, "normals": 3, "edge": 1}
NYUD = {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}
SMALL = {"width": 12, "prediction_width": 4}  # stages 16, 8 and 4 wide
FAMILIES = {  # channels, strides
    "vit": ((10, 10, 10, 10), (16, 16, 16, 16)),
    "pyramid": ((6, 8, 10, 12), (4, 8, 16, 32)),
    "dilated": ((6, 8, 10, 12), (4, 8, 8, 8)),
    "one map": ((10,), (16,)),
    "patches of 14": ((10, 10, 10, 10), (14, 14, 14, 14)),
}


def make_decoder(family="vit", tasks=TASKS, seed=0, **options):
    torch.manual_seed(seed)
    return InvPT(*FAMILIES[family], tasks, **{**SMALL, **options})


def make_features(family="vit", size=(64, 96), batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, size[0] // s, size[1] // s, generator=generator) for c, s in zip(*FAMILIES[family])]


def total(output):
    maps = [*output.predictions.values(), *(p for maps in output.intermediate for p in maps.values())]
    return sum(m.square().mean() for m in maps)


# --- Attention message passing


@pytest.mark.parametrize("size", [(4, 8), (5, 6)])
def test_attention_hears_the_scores_of_the_stage_before(size):
    torch.manual_seed(0)
    first = TaskAttention(["a", "b"], 4, heads=2, pool=2, fuses_scores=False).eval()
    second = TaskAttention(["a", "b"], 6, heads=2, pool=4, fuses_scores=True).eval()
    for module in (first, second):
        for norm in (m for m in module.modules() if isinstance(m, SpatialNorm)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    coarse = torch.randn(2, 2, math.ceil(size[0] / 2), math.ceil(size[1] / 2), 4) * 3
    fine = torch.randn(2, 2, *size, 6) * 3
    with torch.no_grad():
        output, scores = first(coarse, None)
        want = [looped_attention(first, x, None) for x in coarse]
        torch.testing.assert_close(output, torch.stack([o for o, _ in want]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores, torch.stack([s for _, s in want]), rtol=1e-4, atol=1e-5)
        deaf, _ = second(fine, torch.zeros_like(scores))
        output, fused = second(fine, scores)
        want = [looped_attention(second, x, s) for x, (_, s) in zip(fine, want)]
    torch.testing.assert_close(output, torch.stack([o for o, _ in want]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused, torch.stack([s for _, s in want]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output, deaf, atol=1e-3)


def test_scores_of_tasks_and_keys_do_not_mix_when_they_grow():
    scores = torch.zeros(1, 2, 3, 2, 4, 5)
    scores[0, 1, 2, 0, 3, 4] = 1.0  # head 1, task 2, place (0, 3), key 4
    grown = upsample_scores(scores, (4, 8))
    assert grown.shape == (1, 2, 3, 4, 8, 5)
    lone = grown[0, 1, 2, :, :, 4]
    assert grown.sum() == lone.sum()
    assert lone[0, 7] == 1.0
    assert lone[0].tolist() == [0, 0, 0, 0, 0, 0.25, 0.75, 1.0]
    assert upsample_scores(scores, (2, 4)).equal(scores)


def test_every_task_hears_every_other():
    """Each prediction depends on each task's preliminary features, at the far end of the picture, too."""
    decoder = make_decoder().eval()
    features = make_features(size=(128, 128), batch=1)
    with torch.no_grad():
        output_before = decoder(features, (128, 128))
    for other in TASKS:
        hook = decoder.mix[other].register_forward_hook(lambda m, i, o: o + F.pad(torch.ones(1, 1, 1, 1), (0, 3, 0, 3)))
        with torch.no_grad():
            output_after = decoder(features, (128, 128))
        hook.remove()
        for task in TASKS:
            change = (output_after.predictions[task] - output_before.predictions[task]).abs()
            assert change[..., 100:, 100:].max() > 0, (other, task)


# --- Any size, any backbone, any tasks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"aggregate_first": False}])
def test_shapes(family, options):
    decoder = make_decoder(family, **options).eval()
    stride = FAMILIES[family][1][-1]
    size = (2 * max(FAMILIES[family][1]), 3 * max(FAMILIES[family][1]))
    with torch.no_grad():
        output = decoder(make_features(family, size), size)
        predictions = decoder.predict(make_features(family, size), size)
    assert {t: tuple(p.shape) for t, p in output.predictions.items()} == {t: (2, c, *size) for t, c in TASKS.items()}
    (intermediate,) = output.intermediate
    assert {t: tuple(p.shape) for t, p in intermediate.items()} == {t: (2, c, *size) for t, c in TASKS.items()}
    assert all(torch.equal(predictions[t], output.predictions[t]) for t in TASKS)
    assert {
        k: {t: f.shape[1] for t, f in features.items()} for k, features in output.features.items()
    } == decoder.feature_channels
    quarter = tuple(-(-(s // stride) * 8 // decoder.downsample) for s in size)
    assert output.features["final"]["depth"].shape[2:] == quarter
    assert quarter == tuple(s // 4 for s in size) or family == "patches of 14"


@pytest.mark.parametrize("size", [(16, 16), (16, 80), (48, 32), (112, 144)])
@pytest.mark.parametrize("batch", [1, 2])
def test_odd_sizes_and_a_batch_of_one_train(size, batch):
    decoder = make_decoder().train()
    output = decoder(make_features(size=size, batch=batch), size)
    total(output).backward()
    assert all(p.isfinite().all() for p in output.predictions.values())
    assert all(p.grad.isfinite().all() for p in decoder.parameters() if p.grad is not None)


@pytest.mark.parametrize("tasks", [("depth",), ("normals", "semseg"), tuple(TASKS)])
@pytest.mark.parametrize("aggregate_first", [True, False])
def test_gradients_reach_every_parameter(tasks, aggregate_first):
    decoder = make_decoder(tasks={t: TASKS[t] for t in tasks}, aggregate_first=aggregate_first)
    output = decoder(make_features(size=(128, 128)), (128, 128))
    assert list(output.predictions) == list(output.intermediate[0]) == list(tasks)
    total(output).backward()
    assert [n for n, p in decoder.named_parameters() if p.grad is None] == []
    # What a softmax or a batch norm cancels has a gradient of zero, up to rounding.
    cancelled = re.compile(r".*\.(key|fuse)\.bias|project\..*\.0\.bias")
    still = [n for n, p in decoder.named_parameters() if not p.grad.any() and not cancelled.fullmatch(n)]
    assert still == []


def test_shared_is_what_serves_more_than_one_task():
    decoder = make_decoder()
    reached = {name: set() for name, _ in decoder.named_parameters()}
    for task in TASKS:
        decoder.zero_grad()
        decoder(make_features(), (64, 96)).predictions[task].square().mean().backward()
        for name, parameter in decoder.named_parameters():
            if parameter.grad is not None:
                reached[name].add(task)
    shared = {id(p) for p in decoder.shared_parameters()}
    for name, parameter in decoder.named_parameters():
        # The last stage's queries are masked, not cut off: another task's gradient there is zero, not missing.
        unshared = len(reached[name]) == 1 or name.startswith("stages.2.attention.shrink.")
        assert (id(parameter) in shared) == (not unshared), name


def test_encoder_maps():
    assert select_encoder_levels([16] * 4, 2) == [2, 1, 0]
    assert select_encoder_levels([16] * 12, 2) == [10, 9, 8]
    assert select_encoder_levels([16], 2) == [0, 0, 0]
    assert select_encoder_levels([4, 8, 16, 32], 1) == [3, 2, 1]
    assert select_encoder_levels([4, 8, 8, 8], 4) == [3, 3, 3]
    assert [make_decoder(f).downsample for f in FAMILIES] == [2, 1, 4, 2, 2]
    assert make_decoder(downsample=1).downsample == 1


def test_heads_must_divide_the_widths():
    with pytest.raises(UserError, match=r"heads=3 .*\[16, 8, 4\]"):
        make_decoder(heads=3)


def test_one_value_per_channel_is_normalised_by_what_is_known():
    norm = SpatialNorm(3).train()
    norm.running_mean.fill_(2.0)
    x = torch.randn(1, 3, 1, 1)
    torch.testing.assert_close(norm(x), (x - 2) / math.sqrt(1 + norm.eps))
    assert norm.num_batches_tracked == 0
    other = torch.randn(1, 3, 1, 2)
    assert norm(other).mean().abs() < 1e-6
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_with_a_backbone_a_picture_of_any_size(family):
    name, kwargs = {
        "vit": ("vit_tiny_patch16_224", {"depth": 4, "embed_dim": 24, "num_heads": 2}),
        "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}),
    }[family]
    torch.manual_seed(0)
    backbone = build_backbone(name, kwargs=kwargs)
    model = EncoderDecoder(backbone, InvPT(backbone.channels, backbone.strides, TASKS, **SMALL)).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, 50, 70))
    assert {t: tuple(p.shape) for t, p in output.predictions.items()} == {t: (1, c, 50, 70) for t, c in TASKS.items()}
    assert output.intermediate[0]["semseg"].shape == (1, 5, 50, 70)


# --- How it runs


def test_bf16():
    decoder = make_decoder()
    features = make_features()
    exact = decoder(features, (64, 96))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = decoder(features, (64, 96))
    total(output).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
    for task in TASKS:
        assert output.predictions[task].dtype == torch.float32
        error = (output.predictions[task] - exact.predictions[task]).abs().mean()
        assert error < 0.1 * exact.predictions[task].std(), task


# --- The published size


def published(tasks, size, name="vit_large_patch16_384", **options):
    """Parameters (M) and multiply-adds (G) of one picture, nothing allocated."""
    with torch.device("meta"):
        backbone = build_backbone(name, kwargs={"img_size": size, "dynamic_img_size": True})
        model = EncoderDecoder(backbone, InvPT(backbone.channels, backbone.strides, tasks, **options)).eval()
    cost = count(model, size)
    return cost.parameters / 1e6, cost.multiply_adds / 1e9


@pytest.mark.slow
def test_published_size():
    """423 M parameters, 669 G multiply-adds: of convolutions and matrix products, those of the attention included."""
    parameters, operations = published(PASCAL, (512, 512))
    assert parameters == pytest.approx(423, rel=0.002)
    assert operations == pytest.approx(669, rel=0.002)
    # What the public code's forward leaves idle: two layers of the first stage, and trifles (its norm_mt, fuse_attn).
    alive, _ = published(PASCAL, (512, 512), aggregate_first=False)
    skip, reduction = 1024 * 576 * 9 + 576, 5 * (576 * 576 + 576)
    assert (parameters - alive) * 1e6 == pytest.approx(skip + reduction, abs=1)
