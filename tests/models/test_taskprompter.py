"""TaskPrompter against a slow reading of the paper, at any size, for any tasks, and at its published size."""

import pytest
import torch
import torch.nn.functional as F
from helpers.common import composed
from helpers.invpt_reference import random_state
from helpers.published import get_published_parameters
from helpers.taskprompter_reference import published_shapes

from mtcl import UserError
from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_regularizer
from mtcl.models import TaskPrompter, build_backbone
from mtcl.models.published import METHODS, check_state_dict, taskprompter, translate_state_dict
from mtcl.models.taskprompter import _over_parts, channel_affinity
from mtcl.profiling.flops import count

TASKS = {"semseg": 7, "depth": 1, "normals": 3}
VIT = {"depth": 4, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 2.0}
NATIVE = (48, 80)


def make_model(tasks=TASKS, seed=0, name="vit_tiny_patch16_224", kwargs=VIT, out_indices=None, **options):
    torch.manual_seed(seed)
    options = {"size": NATIVE, "width": 8, "head_width": 6, "windows": 2, **options}
    return TaskPrompter(build_backbone(name, kwargs=kwargs, out_indices=out_indices), tasks, **options)


def stir(model, seed=1):
    """Every parameter and statistic moved, so that none is at a value that hides it."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return model


def make_image(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Against a slow reading


def parts(side, windows):
    """The slices of a side that its windows cover."""
    step = -(-side // windows)
    return [slice(min(side, i * step), min(side, (i + 1) * step)) for i in range(windows)]


def slow_channel_affinity(maps, patches, windows):
    out = torch.zeros(*maps.shape[:2], patches.shape[1], windows, windows)
    for b, t, c, i, j in torch.cartesian_prod(*(torch.arange(n) for n in out.shape)).tolist():
        rows, columns = parts(patches.shape[2], windows)[i], parts(patches.shape[3], windows)[j]
        out[b, t, c, i, j] = (maps[b, t, rows, columns] * patches[b, c, rows, columns]).sum()
    return out


def slow_model(model, image):
    """The same model in loops, for pictures of the size it is made for, without drop path: one token, head, window,
    channel and task at a time. Returns task -> final map."""
    vit, count = model.backbone.net.model, len(model.tasks)
    x = vit.patch_embed.proj(image)
    h, w = x.shape[2:]
    x = x.flatten(2).transpose(1, 2) + vit.pos_embed
    prompts = torch.stack([model.prompts] * len(x))
    total = dict.fromkeys(model.tasks, 0)
    chosen = list(model.backbone.net.feature_info.out_indices)
    for index, block in enumerate(vit.blocks):
        attention = block.attn
        normed_x, normed_prompts = block.norm1(x), block.norm1(prompts)
        q, k, v = attention.qkv(torch.cat([normed_prompts, normed_x], dim=1)).chunk(3, dim=2)
        heads, width = attention.num_heads, q.shape[2] // attention.num_heads
        raw, attended = [], []
        for head in range(heads):
            channels = slice(head * width, (head + 1) * width)
            raw.append(q[..., channels] @ k[..., channels].transpose(1, 2))
            attended.append((raw[-1] / width**0.5).softmax(dim=2) @ v[..., channels])
        attended = attention.proj(torch.cat(attended, dim=2))
        channel = model.channel_prompts[index]
        maps = channel.spread(normed_prompts)
        back = 0 if channel.gather is None else channel.gather(maps)
        patches = normed_x.transpose(1, 2).unflatten(2, (h, w))
        by_channel = slow_channel_affinity(maps.unflatten(2, (h, w)), patches, model.windows)
        x = x + block.ls1(attended[:, count:])
        x = x + block.ls2(block.mlp(block.norm2(x)))
        prompts = prompts + block.ls1(attended[:, :count] + back)
        prompts = prompts + block.ls2(block.mlp(block.norm2(prompts)))
        if index not in chosen:
            continue
        level = model.levels[chosen.index(index)]
        tokens = (vit.norm(x) if index == chosen[-1] else x).transpose(1, 2).unflatten(2, (h, w))
        features = {}
        for t, task in enumerate(model.tasks):
            first, second = tokens.clone(), tokens.clone()
            for head in range(heads):
                channels = slice(head * width, (head + 1) * width)
                first[:, channels] += tokens[:, channels] * raw[head][:, t, count:].reshape(-1, 1, h, w)
            for i, rows in enumerate(parts(h, model.windows)):
                for j, columns in enumerate(parts(w, model.windows)):
                    gain = by_channel[:, t, :, i, j, None, None]
                    second[:, :, rows, columns] += tokens[:, :, rows, columns] * gain
            both = torch.cat([level.spatial[task](first), level.channel[task](second)], dim=1)
            features[task] = level.fuse[task](both)
        for t, task in enumerate(model.tasks):
            if level.cross is None:
                total[task] = total[task] + features[task]
                continue
            for other, source in enumerate(model.tasks):
                pair = torch.stack([r[:, t, other] for r in raw], dim=1)[..., None, None]
                total[task] = total[task] + level.cross[task](pair) * features[source]
    return {
        task: model.heads[task](F.interpolate(m, scale_factor=4, mode="bilinear", align_corners=False))
        for task, m in total.items()
    }


@pytest.mark.parametrize(
    ("kwargs", "options"),
    [
        (VIT, {"cross_task": True}),
        (VIT, {"cross_task": False, "windows": 1}),
        ({**VIT, "init_values": 0.5, "qk_norm": False, "reg_tokens": 2}, {"out_indices": [1, 3], "windows": 3}),
    ],
)
def test_the_model_is_the_slow_one(kwargs, options):
    model = stir(make_model(kwargs=kwargs, **options)).eval()
    image = make_image(2, 3, *NATIVE)
    with torch.no_grad():
        got, want = model(image), slow_model(model, image)
    assert list(got.features["final"]) == list(want)
    for task, m in want.items():
        assert m.shape == (2, 6, NATIVE[0] // 4, NATIVE[1] // 4)
        torch.testing.assert_close(got.features["final"][task], m, rtol=1e-3, atol=1e-4 * float(m.abs().max()))
        prediction = F.interpolate(model.logits[task](m), NATIVE, mode="bilinear", align_corners=False)
        torch.testing.assert_close(got.predictions[task], prediction, rtol=1e-3, atol=1e-4 * float(m.abs().max()))


@pytest.mark.parametrize(("size", "windows"), [((4, 6), 2), ((5, 7), 2), ((5, 7), 4), ((2, 3), 4), ((1, 1), 3)])
def test_channel_affinity_is_a_sum_over_windows(size, windows):
    maps, patches = make_image(2, 3, *size), make_image(2, 5, *size, seed=1)
    got = channel_affinity(maps, patches, windows)
    torch.testing.assert_close(got, slow_channel_affinity(maps, patches, windows), rtol=1e-4, atol=1e-5)
    spread = _over_parts(got[:, 0], size)
    for i, rows in enumerate(parts(size[0], windows)):
        for j, columns in enumerate(parts(size[1], windows)):
            part = spread[:, :, rows, columns]
            assert torch.equal(part, got[:, 0, :, i, j, None, None].expand_as(part))


def test_affinities_of_a_larger_picture_are_as_large():
    maps, patches = make_image(2, 3, 4, 6), make_image(2, 5, 4, 6, seed=1)
    larger = F.interpolate(patches, scale_factor=4, mode="nearest")
    flat = torch.ones_like(maps)
    for windows in (1, 2):
        want = channel_affinity(flat, patches, windows)
        torch.testing.assert_close(channel_affinity(flat, larger, windows), want, rtol=1e-4, atol=1e-4)
    want = channel_affinity(maps, torch.ones(2, 5, 4, 6), 1)
    torch.testing.assert_close(channel_affinity(maps, torch.ones(2, 5, 16, 24), 1), want, rtol=1e-4, atol=1e-4)


# --- What every model promises


@pytest.mark.parametrize("tasks", [("depth",), ("normals", "semseg"), tuple(TASKS)])
@pytest.mark.parametrize("training", [False, True])
def test_any_tasks_any_size(tasks, training):
    model = make_model({t: TASKS[t] for t in tasks}).train(training)
    assert model.feature_channels == {"final": dict.fromkeys(tasks, 6)}
    for batch, height, width in ((1, 50, 70), (2, 32, 96)):
        output = model(make_image(batch, 3, height, width))
        frame = (-(-height // 16) * 16, -(-width // 16) * 16)
        assert output.frame == frame
        assert output.intermediate == []
        assert {t: tuple(p.shape) for t, p in output.predictions.items()} == {
            t: (batch, TASKS[t], height, width) for t in tasks
        }
        assert all(p.isfinite().all() for p in output.predictions.values())
        for final in output.features["final"].values():
            assert final.shape == (batch, 6, frame[0] // 4, frame[1] // 4)


def test_every_parameter_learns():
    model = make_model().train()
    output = model(make_image(2, 3, 64, 64))
    sum((p**2).mean() for p in output.predictions.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    weights = [(name, p) for name, p in model.named_parameters() if not name.endswith("bias")]  # BN hides some biases
    assert [name for name, p in weights if not p.grad.abs().sum() > 0] == []
    shared = {id(p) for p in model.shared_parameters()}
    assert {id(p) for p in model.backbone_parameters()} < shared
    assert id(model.prompts) in shared
    assert not shared & {id(p) for p in [*model.heads.parameters(), *model.levels.parameters()]}


def test_batch_of_one_padding_and_prediction():
    model = make_model().eval()
    image = make_image(3, 3, 50, 70)
    padded = F.pad(image, (0, 80 - 70, 0, 64 - 50))
    with torch.no_grad():
        together, alone, full = model.predict(image), model.predict(image[1:2]), model(padded)
    for task, prediction in together.items():
        torch.testing.assert_close(alone[task], prediction[1:2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(full.predictions[task][..., :50, :70], prediction, rtol=1e-4, atol=1e-5)


def test_bf16():
    model = make_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(make_image(2, 3, 64, 48))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in output.predictions.values())
    sum((p**2).mean() for p in output.predictions.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_checkpointing_changes_nothing():
    grads = []
    for on in (False, True):
        model = make_model().train()
        model.backbone.net.model.set_grad_checkpointing(on)
        sum((p**2).mean() for p in model(make_image(2, 3, 32, 48)).predictions.values()).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_it_overfits_a_batch():
    model = make_model().train()
    image = make_image(2, 3, *NATIVE)
    targets = {task: make_image(2, c, 3, 5, seed=3) for task, c in TASKS.items()}
    targets = {task: F.interpolate(t, NATIVE, mode="bilinear") for task, t in targets.items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = sum(F.mse_loss(p, targets[task]) for task, p in model(image).predictions.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses


def test_drop_path_is_the_backbones():
    model = make_model(kwargs={**VIT, "drop_path_rate": 0.5})
    assert [block.drop_path1.drop_prob for block in model.backbone.net.model.blocks[1:]][-1] == 0.5
    image = make_image(2, 3, 32, 48)
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(image).predictions["depth"], model(image).predictions["depth"])
        model.eval()
        assert torch.equal(model(image).predictions["depth"], model(image).predictions["depth"])


def test_the_vits_weights_are_kept():
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny_patch16_224", kwargs=VIT)
    state_before = {name: p.clone() for name, p in backbone.state_dict().items()}
    model = TaskPrompter(backbone, TASKS, size=(224, 224), width=8, head_width=6)
    state_after = model.backbone.state_dict()
    assert state_before.keys() - state_after.keys() == {"net.model.cls_token"}
    assert not state_after.keys() - state_before.keys()
    for name in state_before.keys() & state_after.keys():
        want = state_before[name][:, 1:] if name.endswith("pos_embed") else state_before[name]
        assert torch.equal(state_after[name], want), name


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224"])
def test_other_backbones_are_refused(name):
    kwargs = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)} if "swin" in name else None
    with pytest.raises(UserError, match="plain ViT"):
        TaskPrompter(build_backbone(name, kwargs=kwargs), TASKS)


def test_patches_of_fourteen():
    model = make_model(name="vit_small_patch14_dinov2", kwargs=VIT, size=(42, 56)).eval()
    with torch.no_grad():
        output = model(make_image(1, 3, 50, 60))
    assert output.frame == (56, 70)
    assert output.features["final"]["depth"].shape == (1, 6, 16, 20)


# --- The published sizes

PASCAL = {"semseg": 21, "human_parts": 7, "sal": 2, "normals": 3, "edge": 1}
NYUD = {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}
# The published configs: parameters of the authors' code, counted by hand from its shapes.
LARGE = ("vit_large_patch16_384", PASCAL, (512, 512), {}, get_published_parameters("pascal_taskprompter_vit_large"))
SHORT = {"width": 780, "head_width": 1024, "windows": 4}
BASE = ("vit_base_patch16_384", PASCAL, (512, 512), SHORT, get_published_parameters("pascal_taskprompter_vit_base"))
WIDE = {"width": 768, "head_width": 768, "windows": 4, "cross_task": False}
ROOMS = ("vit_large_patch16_384", NYUD, (448, 576), WIDE, get_published_parameters("nyud_taskprompter_vit_large"))


def on_meta(name, tasks, size, options):
    with torch.device("meta"):
        return TaskPrompter(build_backbone(name), tasks, size=size, **options).eval()


@pytest.mark.parametrize(
    ("name", "tasks", "size", "options", "theirs"),
    [LARGE, pytest.param(*BASE, marks=pytest.mark.slow), pytest.param(*ROOMS, marks=pytest.mark.slow)],
    ids=["PASCAL, ViT-L", "PASCAL, ViT-B", "NYUD, ViT-L"],
)
def test_parameters_are_those_of_the_authors_code(name, tasks, size, options, theirs):
    model = on_meta(name, tasks, size, options)
    dim, pixels = model.prompts.shape[1], model.grid[0] * model.grid[1]
    unused = dim + pixels * dim + dim  # the class token's position; the last layer's way back to the prompts
    assert sum(p.numel() for p in model.parameters()) + unused == theirs


def test_published_cost():
    """497 G multiply-adds with ViT-L on PASCAL-Context, as reported for it; we know no public source to check."""
    assert count(on_meta(*LARGE[:-1]), (512, 512)).multiply_adds == pytest.approx(497e9, rel=0.002)


# --- Published checkpoints


def published_state(tasks, depth=4, cross=True):
    return random_state(published_shapes(tasks, NATIVE, 24, depth, heads=3, width=8, head_width=6, cross=cross))


@pytest.mark.parametrize("cross", [True, False])
def test_published_checkpoints_fit(cross):
    theirs = published_state(TASKS, cross=cross)
    method = taskprompter.METHOD
    ours, unused_keys = translate_state_dict(theirs, method, list(TASKS))
    config = method.config_overrides(theirs, NATIVE)
    options = config["decoder"]
    assert options == {"size": list(NATIVE), "width": 8, "head_width": 6, "cross_task": cross, "windows": 4}
    model = make_model(kwargs={**VIT, "mlp_ratio": 4.0}, **options)
    check_state_dict(ours, model.state_dict(), method.name)
    model.load_state_dict(ours)
    assert unused_keys == ["backbone.blocks.3.attn.token_trans1.weight", "backbone.blocks.3.attn.token_trans1.bias"]
    assert len(ours) + len(unused_keys) == len(theirs)
    assert torch.equal(model.prompts, theirs["backbone.task_prompts"])
    assert torch.equal(model.backbone.net.model.pos_embed, theirs["backbone.pos_embed"][:, 1:])
    assert torch.equal(model.levels[2].spatial["depth"].weight, theirs["backbone.fea_decode_spa.2.depth.0.weight"])
    assert torch.equal(model.heads["normals"][0].weight, theirs["heads.normals.mt_proj.0.weight"])


def test_windows_of_the_published_checkpoints():
    """They leave no trace in the weights; 1 is that of ViT-L (24 layers) on PASCAL-Context alone."""
    for depth, cross, windows in ((24, True, 1), (24, False, 4), (12, True, 4)):
        theirs = published_state({"depth": 1}, depth=depth, cross=cross)
        assert METHODS["taskprompter"].config_overrides(theirs, NATIVE)["decoder"]["windows"] == windows


# --- From the config

SHRUNKEN = ["decoder=taskprompter", "decoder.width=8", "decoder.head_width=8", "data.size=[32,64]"]
SHRUNKEN += ["backbone=vit_small", "++backbone.kwargs={embed_dim:24,depth:4,num_heads:2}", "regularizer=contrastive"]


def test_the_config_builds_it_for_the_pictures_it_trains_on():
    config = composed(*SHRUNKEN)
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False)
    assert isinstance(model, TaskPrompter)
    assert model.grid == (2, 4)
    regularizer = build_regularizer(config, tasks, model)
    assert regularizer is not None


@pytest.mark.slow
def test_it_trains_with_contrast(tmp_path):
    overrides = [*SHRUNKEN, "trainer.device=cpu", "debug=tiny", "data.augment.scale=[1.0,1.2]"]
    metrics = train(composed(*overrides), tmp_path)
    assert set(metrics) == set(build_tasks(composed(*overrides)))
