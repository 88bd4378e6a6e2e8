"""ATRC: its contexts against slow loops, its genotypes, its wiring, and what a decoder promises."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.common import composed
from helpers.published import get_published_parameters
from torch import nn

from mtcl import UserError
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.resolve import plain
from mtcl.models.decoders import ATRC
from mtcl.models.decoders.atrc import KINDS, PUBLISHED, build_label_space, directions, log_bins, read_genotype
from mtcl.models.decoders.relational import GlobalContext, LabelContext, LocalContext, prototypes

TASKS = {"semseg": 5, "depth": 1, "normals": 3, "edge": 1}
BINS = {"depth": {"kind": "log_bins", "count": 6, "low": 0.7, "high": 10.0},
        "normals": {"kind": "directions", "count": 7}}  # fmt: skip
CHANNELS, STRIDES = [6, 8, 10, 12], [4, 8, 16, 32]
MIXED = {
    "semseg": {"semseg": "t_label", "depth": "s_label", "normals": "global", "edge": "local"},
    "depth": {"semseg": "t_label", "depth": "none", "normals": "local", "edge": "s_label"},
    "normals": dict.fromkeys(TASKS, "none"),
    "edge": {"semseg": "s_label", "depth": "s_label", "normals": "none", "edge": "global"},
}

QUARTET = {"depth": {"depth": "t_label", "edge": "s_label"}, "edge": {"depth": "global", "edge": "local"}}


def make(tasks=TASKS, genotype=MIXED, seed=0, awake=True, channels=CHANNELS, **options):
    """``awake``: past the start of training, when the contexts' zero normalisation has moved."""
    torch.manual_seed(seed)
    decoder = ATRC(channels, STRIDES, tasks, genotype=genotype, **{"kinds": BINS, "dropout": 0.0, **options})
    for module in decoder.modules():
        if awake and isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.4)
    return decoder


def make_features(size=(44, 53), batch=2, seed=0, channels=CHANNELS):
    generator = torch.Generator().manual_seed(seed)
    sides = [(-(-size[0] // s), -(-size[1] // s)) for s in STRIDES]
    return [torch.randn(batch, c, *side, generator=generator) for c, side in zip(channels, sides)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- The contexts


def test_global_context_is_a_ratio_of_sums_over_all_pixels():
    torch.manual_seed(0)
    context = GlobalContext(6, 3).eval()
    target, source = randn(2, 6, 3, 4), randn(2, 6, 3, 4, seed=1)
    query, key, value = context.query(target), context.key(source), context.value(source)
    assert (key > 0).all()
    want = torch.zeros_like(value)
    for b in range(2):
        for y in range(3):
            for x in range(4):
                total = 0.0
                for j in range(3):
                    for i in range(4):
                        weight = query[b, :, y, x] @ key[b, :, j, i]
                        want[b, :, y, x] += weight * value[b, :, j, i]
                        total += weight
                want[b, :, y, x] /= total
    torch.testing.assert_close(context(target, source), want)


@pytest.mark.parametrize(("size", "window", "tile"), [((5, 7), 3, 2), ((4, 4), 5, 3), ((2, 9), 9, 8), ((2, 1), 1, 3)])
def test_local_context_is_attention_in_a_window(size, window, tile):
    torch.manual_seed(0)
    context = LocalContext(6, 3, window, tile).eval()
    target, source = randn(1, 6, *size), randn(1, 6, *size, seed=1)
    query, key, value = context.query(target), context.key(source), context.value(source)
    want, radius = torch.zeros_like(value), window // 2
    for y in range(size[0]):
        for x in range(size[1]):
            scores, values = [], []
            for j in range(y - radius, y + radius + 1):
                for i in range(x - radius, x + radius + 1):
                    inside = 0 <= j < size[0] and 0 <= i < size[1]
                    k, v = (key[0, :, j, i], value[0, :, j, i]) if inside else (torch.zeros(3), torch.zeros(3))
                    scores.append(query[0, :, y, x] @ k / math.sqrt(3))
                    values.append(v)
            want[0, :, y, x] = torch.stack(scores).softmax(dim=0) @ torch.stack(values)
    torch.testing.assert_close(context(target, source), want)


def test_label_context_is_attention_to_prototypes():
    torch.manual_seed(0)
    context = LabelContext(6, 3).eval()
    logits, target, source = randn(2, 4, 3, 5), randn(2, 6, 3, 5, seed=1), randn(2, 6, 3, 5, seed=2)
    pooled = prototypes(logits, source)
    assert pooled.shape == (2, 6, 4)
    query = context.query(target)
    want = torch.zeros(2, 3, 3, 5)
    for b in range(2):
        means = []
        for k in range(4):
            weights = logits[b, k].exp() / logits[b, k].exp().sum()
            means.append(torch.stack([(weights * source[b, c]).sum() for c in range(6)]))
            torch.testing.assert_close(pooled[b, :, k], means[k])
        keys, values = (
            part(torch.stack(means, 1)[None, :, :, None])[0, :, :, 0] for part in (context.key, context.value)
        )
        for y in range(3):
            for x in range(5):
                scores = torch.stack([query[b, :, y, x] @ keys[:, k] / math.sqrt(3) for k in range(4)])
                want[b, :, y, x] = sum(weight * values[:, k] for k, weight in enumerate(scores.softmax(dim=0)))
    torch.testing.assert_close(context(target, pooled), want)


# --- Genotypes


def test_a_published_file_loads(tmp_path):
    data = {t: {s: (i + 2 * j) % 5 for j, s in enumerate(TASKS)} for i, t in enumerate(TASKS)}
    path = tmp_path / "genotype.json"
    path.write_text(json.dumps({"data": data, "step": 40000}))
    want = {t: {s: KINDS[code] for s, code in row.items()} for t, row in data.items()}
    assert read_genotype(str(path), TASKS) == read_genotype(data, TASKS) == read_genotype(want, TASKS) == want
    path.write_text(json.dumps(data))
    assert read_genotype(str(path), ["edge", "semseg"]) == {
        t: {s: want[t][s] for s in ("edge", "semseg")} for t in ("edge", "semseg")
    }


def test_named_genotypes():
    assert read_genotype("all_local", ["a", "b"]) == {
        "a": {"a": "local", "b": "local"},
        "b": {"a": "local", "b": "local"},
    }
    for name, (names, _) in PUBLISHED.items():
        table = read_genotype(name, names.split())
        assert all(set(row) == set(table) for row in table.values())
    assert read_genotype("nyud_hrnet18", TASKS)["edge"] == {
        "semseg": "t_label", "depth": "t_label", "normals": "global", "edge": "t_label"}  # fmt: skip
    assert read_genotype("pascal_hrnet18", ["semseg", "normals"])["semseg"] == {"semseg": "t_label", "normals": "none"}


@pytest.mark.parametrize(
    ("genotype", "message"),
    [
        ("all_of_them", "neither a file nor one of all_none, .*pascal_hrnet18"),
        ("nyud_hrnet18", "which context sal takes from sal"),
        ({"sal": {"edge": 3}, "edge": {}}, "which context sal takes from sal"),
        ({"sal": {"edge": 3, "sal": 5}}, "gives 5 for sal from sal, which is none of none \\(0\\), global \\(1\\)"),
        ({"sal": {"edge": 3, "sal": True}}, "gives True for sal from sal"),
        ({"sal": {"edge": 3, "sal": ["local"]}}, "gives \\['local'\\] for sal from sal"),
        ({"sal": "all_local"}, "which context sal takes from sal"),
        ([1], "is no mapping"),
    ],
)
def test_bad_genotypes(genotype, message):
    with pytest.raises(UserError, match=f"genotype.*{message}") as error:
        read_genotype(genotype, ["sal", "edge"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b"3", b'{"data": 3}', b"{}", b'{"data": {}}']
)
def test_bad_genotype_files(content, tmp_path):
    path = tmp_path / "genotype.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_genotype(str(path), TASKS)
    assert f"genotype={path} " in str(error.value)
    assert "\n" not in str(error.value)


# --- Label spaces


def test_label_spaces():
    values = log_bins(40, 0.7, 10.0)
    # the authors' code: bin of a depth = floor(40 log(d / 0.7) / log(10 / 0.7))
    assert (40 * (values / 0.7).log() / math.log(10 / 0.7)).floor().flatten().tolist() == list(range(40))
    vectors = directions(40)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(40))
    assert vectors[:, 2].min() > 0
    apart = (vectors @ vectors.T).fill_diagonal_(-1).amax(dim=1).clamp(-1, 1).acos().rad2deg()
    assert 15 < apart.min() < apart.max() < 30  # evenly spread
    count, decode = build_label_space("depth", 1, BINS["depth"])
    logits = torch.full((1, count, 1, 2), -30.0)
    logits[0, 2, 0, 0] = logits[0, 2, 0, 1] = logits[0, 3, 0, 1] = 30
    bins = log_bins(6, 0.7, 10.0).flatten()
    torch.testing.assert_close(decode(logits).flatten(), torch.stack([bins[2], (bins[2] + bins[3]) / 2]))
    count, decode = build_label_space("edge", 1, None)
    logits = randn(2, count, 3, 3)
    torch.testing.assert_close(decode(logits).sigmoid()[:, 0], logits.softmax(dim=1)[:, 1])
    assert build_label_space("semseg", 21, None)[0] == 21


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "means"}, "kind=means is not known; choose log_bins or directions"),
        (3, "=3 must be a mapping"),
        ({"kind": "log_bins", "count": 40}, "takes count, high, low"),
        ({"kind": "directions", "count": 40, "low": 1}, "takes count$"),
        ({"kind": "directions", "count": 1}, "count=1 must be"),
        ({"kind": "log_bins", "count": 4, "low": 0, "high": 1}, "0 < low < high"),
        ({"kind": "log_bins", "count": 4, "low": "near", "high": 1}, "0 < low < high"),
        ({"kind": "directions", "count": 40}, "3 channels, depth has 1"),
    ],
)
def test_bad_label_spaces(options, message):
    with pytest.raises(UserError, match=f"kinds.depth.*{message}"):
        build_label_space("depth", 1, options)


def test_a_window_has_a_centre():
    with pytest.raises(UserError, match="must be odd"):
        make(window=8)


# --- The whole


def test_wiring():
    """One target's refined features, put together by hand."""
    decoder = make().eval()
    features, size = make_features(), (44, 53)
    output = decoder(features, size)
    side = (11, 14)
    stacked = torch.cat([F.interpolate(f, side, mode="bilinear", align_corners=False) for f in features], dim=1)
    initial = {t: decoder.initial[t](stacked) for t in TASKS}
    labels = {t: decoder.labels[t](decoder.auxiliary[t](stacked)) for t in ("semseg", "depth", "edge")}
    assert list(decoder.auxiliary) == ["semseg", "depth", "edge"]  # nobody asks for the labels of normals
    context = decoder.refine["depth"].contexts
    assert set(context) == {"semseg", "normals", "edge"}
    gathered = [
        context["semseg"](initial["depth"], prototypes(labels["depth"], initial["semseg"])),
        context["normals"](initial["depth"], initial["normals"]),
        context["edge"](initial["depth"], prototypes(labels["edge"], initial["edge"])),
    ]
    merged = decoder.refine["depth"].merge(torch.cat(gathered, dim=1))
    final = decoder.refine["depth"].mix(torch.cat([initial["depth"], merged], dim=1))
    torch.testing.assert_close(output.features["final"]["depth"], final)
    torch.testing.assert_close(output.features["initial"]["depth"], initial["depth"])
    logits = decoder.logits["depth"](final)
    want = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(output.predictions["depth"], want)
    torch.testing.assert_close(output.features["final"]["normals"], decoder.refine["normals"].mix(initial["normals"]))
    for task, x in labels.items():
        want = F.interpolate(decoder.decode[task](x), size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(output.intermediate[0][task], want)


@pytest.mark.parametrize("genotype", [*(f"all_{kind}" for kind in KINDS), "nyud_hrnet18"])
@pytest.mark.parametrize("tasks", [("semseg",), ("depth",), ("normals", "edge"), tuple(TASKS)])
def test_shapes(tasks, genotype):
    tasks = {t: TASKS[t] for t in tasks}
    decoder = make(tasks, genotype)
    for training, size in ((True, (31, 37)), (False, (33, 50))):
        features = make_features(size, batch=1)
        with torch.no_grad():
            output = decoder.train(training)(features, size)
            predictions = decoder.predict(features, size)
        assert {t: tuple(p.shape) for t, p in output.predictions.items()} == {
            t: (1, c, *size) for t, c in tasks.items()
        }
        assert all(torch.equal(predictions[t], p) and p.isfinite().all() for t, p in output.predictions.items())
        side = (-(-size[0] // 4), -(-size[1] // 4))
        assert {tap: {t: tuple(x.shape) for t, x in maps.items()} for tap, maps in output.features.items()} == {
            tap: {t: (1, c, *side) for t, c in of.items()} for tap, of in decoder.feature_channels.items()
        }
        assert len(output.intermediate) == (genotype not in ("all_none", "all_global", "all_local"))
        for maps in output.intermediate:
            assert all(x.shape == predictions[t].shape and x.isfinite().all() for t, x in maps.items())


def test_wide_concatenations_are_projected():
    decoder = make(widest=20).eval()
    assert decoder.feature_channels["final"]["depth"] == 20 // 4
    assert decoder(make_features(), (44, 53)).predictions["edge"].shape == (2, 1, 44, 53)
    assert make(widest=36).fusion is None
    maps = [randn(1, c, 3, 4) for c in CHANNELS]  # a ViT's: one stride
    with torch.no_grad():
        assert decoder(maps, (48, 64)).features["final"]["edge"].shape == (1, 5, 12, 16)


def test_training_starts_without_the_contexts():
    decoder, other = make(awake=False).eval(), make(awake=False).eval()
    for refine in other.refine.values():
        for parameter in refine.contexts.parameters():
            nn.init.normal_(parameter)
    with torch.no_grad():
        one, two = (d.predict(make_features(), (44, 53)) for d in (decoder, other))
    assert all(torch.equal(one[t], two[t]) for t in TASKS)


def test_gradients_reach_every_parameter():
    decoder = make(widest=30)
    output = decoder(make_features(), (44, 53))
    maps = [*output.predictions.values(), *output.intermediate[0].values()]
    sum((x * randn(*x.shape, seed=i)).sum() for i, x in enumerate(maps)).backward()
    idle = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle


def test_auxiliary_heads_teach_only_themselves():
    decoder = make()
    features = [f.requires_grad_() for f in make_features()]
    decoder(features, (44, 53)).intermediate[0]["semseg"].square().mean().backward()
    reached = {
        name.split(".")[0] + "." + name.split(".")[1] for name, p in decoder.named_parameters() if p.grad is not None
    }
    assert reached == {"auxiliary.semseg", "labels.semseg"}
    assert all(f.grad is None for f in features)


@pytest.mark.parametrize("genotype", [MIXED, "all_s_label", "all_t_label", "all_none"])
def test_shared_parameters_are_those_that_several_tasks_train(genotype):
    decoder = make(genotype=genotype, widest=30)
    output = decoder(make_features(), (44, 53))
    taught = {name: set() for name, _ in decoder.named_parameters()}
    for task in TASKS:
        decoder.zero_grad(set_to_none=True)
        maps = [output.predictions[task], *(m[task] for m in output.intermediate if task in m)]
        sum(x.square().mean() for x in maps).backward(retain_graph=True)
        for name, parameter in decoder.named_parameters():
            if parameter.grad is not None:
                taught[name].add(task)
    shared = [id(p) for p in decoder.shared_parameters()]
    assert len(shared) == len(set(shared))
    assert {n for n, p in decoder.named_parameters() if id(p) in set(shared)} == {
        n for n, t in taught.items() if len(t) > 1
    }


@pytest.mark.slow
def test_compiles_as_one_graph():
    decoder = make({t: TASKS[t] for t in QUARTET}, QUARTET).eval()
    torch._dynamo.reset()
    features = make_features()
    with torch.no_grad():
        want = decoder(features, (44, 53))
        got = torch.compile(decoder, fullgraph=True, backend="eager")(features, (44, 53))
    for t in QUARTET:
        torch.testing.assert_close(got.predictions[t], want.predictions[t])
        torch.testing.assert_close(got.intermediate[0][t], want.intermediate[0][t])
    torch._dynamo.reset()


def test_bf16():
    decoder = make()
    with torch.no_grad():
        want = decoder.eval().predict(make_features(), (44, 53))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = decoder.predict(make_features(), (44, 53))
    for t in TASKS:
        assert got[t].dtype == torch.float32
        assert (got[t] - want[t]).abs().max() < 0.05 * want[t].abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = decoder.train()(make_features(), (44, 53))
        loss = sum(x.square().mean() for x in (*output.predictions.values(), *output.intermediate[0].values()))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


# Counted in the authors' public code; with the 3.861 M of their HRNet-W18-small, 5.06 M for the first.
SIZES = {("nyud_hrnet18", 18): 1_200_274, ("nyud_hrnet48", 48): 7_153_827, ("pascal_hrnet18", 18): 1_522_422,
         ("all_none", 18): 673_328, ("all_global", 18): 873_452, ("all_local", 18): 873_452,
         ("all_t_label", 18): 1_200_274, ("all_s_label", 18): 1_200_274}  # fmt: skip


@pytest.mark.parametrize(("genotype", "width"), SIZES)
def test_published_size(genotype, width):
    pascal = {"semseg": 21, "human_parts": 7, "sal": 2, "normals": 3, "edge": 1}
    nyud = {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}
    options = plain(composed("decoder=atrc").decoder)
    del options["_target_"]
    options["genotype"] = genotype
    tasks = pascal if genotype.startswith("pascal") else nyud
    with torch.device("meta"):
        decoder = ATRC([width, 2 * width, 4 * width, 8 * width], STRIDES, tasks, **options)
    assert sum(p.numel() for p in decoder.parameters()) == SIZES[genotype, width]


@pytest.mark.parametrize("data", ["nyud", "pascal"])
def test_published_sizes_hold_the_backbone(data):
    assert get_published_parameters(f"{data}_atrc_hrnet18") == SIZES[f"{data}_hrnet18", 18] + 3_860_720


def test_from_its_config():
    overrides = ["decoder=atrc", "data=rooms", "backbone=resnet18", "decoder.kinds.depth.count=5", "decoder.widest=40"]
    config = composed(*overrides, "decoder.genotype={semseg:{semseg:local,edge:4},edge:{semseg:1,edge:none}}",
                      "tasks.names=[edge,semseg]")  # fmt: skip
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False)
    assert model.decoder.genotype["semseg"] == {"semseg": "local", "edge": "s_label"}
    output = model(torch.randn(2, 3, 40, 50))
    assert output.predictions["semseg"].shape == (2, tasks["semseg"].channels, 40, 50)
    assert [list(maps) for maps in output.intermediate] == [["edge"]]
