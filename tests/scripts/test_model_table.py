"""What a model costs, against counts by hand, and the script that makes a table of it."""

import json
import runpy

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.common import ROOT, assert_fails, choices, composed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mtcl.config.build_data import build_tasks, get_image_size
from mtcl.config.build_model import build_model
from mtcl.models import DenseModel, build_backbone
from mtcl.profiling.flops import Count, count

SCRIPT = "scripts/benchmarks/model_table.py"
KEYS = {"experiment", "decoder", "backbone", "network", "tasks", "size", "parameters", "flops", "peak_memory_mib",
        "latency_ms", "device", "precision"}  # fmt: skip


class Bare(DenseModel):
    """A network as a model: ``predict`` is what it gives."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, image):
        raise AssertionError("the training path is not to be counted")

    def predict(self, image):
        return {"net": self.net(image)}

    def backbone_parameters(self):
        return self.parameters()

    shared_parameters = backbone_parameters


def counted(net, size):
    return count(Bare(net), size)


def from_config(*overrides, device="meta"):
    config = composed(*overrides)
    with torch.device(device):
        return build_model(config, build_tasks(config), pretrained=False), get_image_size(config)


# --- By hand


def test_a_convolution():
    assert counted(nn.Conv2d(3, 8, 5, stride=2, padding=2), (20, 32)) == Count(8 * 3 * 25 + 8, 10 * 16 * 8 * 3 * 25)
    assert counted(nn.Conv2d(3, 6, 3, groups=3), (9, 7)).multiply_adds == 7 * 5 * 6 * 9


class Products(nn.Module):
    """Every way to write a product of matrices, on tokens (B, N, 3)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, image):
        x = image.flatten(2).transpose(1, 2)
        maps = self.linear(x)  # N x 3 x 4
        maps = maps + torch.einsum("bnc,dc->bnd", maps, torch.ones(4, 4))  # N x 4 x 4
        affinity = torch.baddbmm(torch.zeros(1, 1, 1), maps, maps.transpose(1, 2))  # N x 4 x N
        maps = affinity @ maps  # N x N x 4
        return torch.addmm(torch.zeros(5), maps[0], torch.ones(4, 5))  # N x 4 x 5


def test_products_of_matrices():
    n = 6 * 5
    want = n * 3 * 4 + n * 4 * 4 + 2 * n * n * 4 + n * 4 * 5
    assert counted(Products(), (6, 5)) == Count(16, want)


class Attention(nn.Module):
    def forward(self, image):
        queries = image.flatten(2).transpose(1, 2).unflatten(2, (3, 1)).transpose(1, 2)  # three heads, one wide
        return F.scaled_dot_product_attention(queries, queries[:, :, :7], queries[:, :, :7])


def test_attention():
    assert counted(Attention(), (4, 6)).multiply_adds == 3 * (2 * 24 * 7)


def test_a_vit():
    depth, dim, tokens = 4, 48, 3 * 5 + 1
    kwargs = {"depth": depth, "embed_dim": dim, "num_heads": 3}
    backbone = build_backbone("vit_tiny_patch16_224", kwargs=kwargs)
    block = 12 * tokens * dim**2 + 2 * tokens**2 * dim  # qkv, projection, MLP; affinities and their use
    assert counted(backbone, (48, 80)).multiply_adds == 15 * 3 * 16 * 16 * dim + depth * block


def bottlenecks(size, inputs, width, blocks, stride):
    """(multiply-adds, side of the output) of a stage of ResNet-50."""
    total = 0
    for _ in range(blocks):
        out = size // stride
        total += size**2 * inputs * width + out**2 * width * width * 9 + out**2 * width * 4 * width
        total += out**2 * inputs * 4 * width if inputs != 4 * width else 0
        size, inputs, stride = out, 4 * width, 1
    return total, size


def test_resnet50():
    """4.09 G at 224x224, 25.56 M parameters, as everybody prints."""
    want, size, inputs = 112**2 * 64 * 3 * 49, 56, 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        stage, size = bottlenecks(size, inputs, width, blocks, stride)
        want, inputs = want + stage, 4 * width
    with torch.device("meta"):
        backbone, network = build_backbone("resnet50"), timm.create_model("resnet50")
    assert counted(backbone, (224, 224)).multiply_adds == want
    assert counted(network, (224, 224)) == Count(25_557_032, want + 2048 * 1000)
    assert want + 2048 * 1000 == pytest.approx(4.09e9, rel=0.001)


def test_invpt_as_published():
    """423 M parameters, 669 G multiply-adds with ViT-L on PASCAL-Context."""
    parameters, multiply_adds = count(*from_config("decoder=invpt", "backbone=vit_large", "data=pascal"))
    assert parameters == pytest.approx(423e6, rel=0.002)
    assert multiply_adds == pytest.approx(669e9, rel=0.002)


# --- Wherever the model is


@pytest.mark.parametrize(
    "overrides",
    [
        ["backbone=resnet18"],
        ["backbone=swin_tiny", "++backbone.kwargs={embed_dim:12,depths:[1,1,1,1],num_heads:[1,2,2,4]}"],
        ["backbone=vit_small", "++backbone.kwargs={embed_dim:24,depth:4,num_heads:2}", "decoder=taskprompter"],
    ],
    ids=["resnet", "swin", "taskprompter"],
)
def test_a_count_is_that_of_a_real_pass(overrides):
    overrides = [*overrides, "data.size=[40,72]", "decoder.width=8", "decoder.head_width=8"]
    model, size = from_config(*overrides, device="cpu")
    state_before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost = count(model, size)
    assert cost == count(*from_config(*overrides))
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.predict(torch.zeros(1, 3, *size))
    assert 2 * cost.multiply_adds == counter.get_total_flops()
    state_after = model.state_dict()
    assert all(
        type(state_after[name]) is torch.Tensor and torch.equal(state_after[name], t)
        for name, t in state_before.items()
    )


# --- The table

SMALL = ["data.size=[32,64]", "decoder.width=8", "decoder.head_width=8", "backbone.weights=hub"]  # never fetched


def test_experiments(cli, tmp_path):
    out = tmp_path / "new" / "out.json"
    arguments = [
        "--experiment",
        "rooms",
        "rooms_pascal",
        *SMALL,
        "--json",
        str(out),
        "--device",
        "cpu",
        "--repeats",
        "1",
    ]
    result = cli(SCRIPT, *arguments)
    assert result.code == 0, result.err
    rows = json.loads(out.read_text())
    assert [row["experiment"] for row in rows] == ["rooms", "rooms_pascal"]
    for row in rows:
        assert row.keys() == KEYS
        model, size = from_config(f"experiment={row['experiment']}", *SMALL)
        assert (row["parameters"], row["flops"]) == count(model, size)
        assert (row["decoder"], row["backbone"], row["network"]) == ("multi_head", "mobilenetv2", "mobilenetv2_100")
        assert row["size"] == [32, 64]
        assert row["tasks"] == list(model.feature_channels["final"])
        assert row["latency_ms"] > 0
        weights = 4 * row["parameters"] / 2**20
        assert weights < row["peak_memory_mib"] < weights + 20
        assert row["device"].startswith("cpu")
        assert row["precision"] == "float32"
    lines = result.out.splitlines()
    assert "multiply-adds" in lines[0]
    assert [line.split()[0] for line in lines[3:]] == ["experiment", "rooms", "rooms_pascal"]
    assert f"{rows[0]['parameters'] / 1e6:.2f} M" in lines[4]
    assert f"{rows[0]['flops'] / 1e9:.2f} G" in lines[4]


def test_published_sizes_stand_beside_ours(cli, tmp_path):
    path = tmp_path / "sizes.yaml"
    path.write_text("rooms: {parameters: 200_000_000, source: a paper}\n")
    config = f"--published={path}", *SMALL, "--no-measure"
    (line,) = cli(SCRIPT, *config).out.splitlines()[3:]
    model, size = from_config("experiment=rooms", *SMALL)
    ours = count(model, size)
    difference = 100 * (ours.parameters / 200_000_000 - 1)
    cells = [f"{ours.parameters / 1e6:.2f}", "M", "200.00", "M", f"{difference:+.2f}", "%"]
    cells += [f"{ours.multiply_adds / 1e9:.2f}", "G", "-", "-", "a", "paper"]
    assert line.split() == ["rooms", "32x64", *cells]
    path.write_text(f"rooms: {{parameters: {ours.parameters}, flops: {ours.multiply_adds * 1.00001}, source: counted}}")
    lines = cli(SCRIPT, *config, "--experiment", "rooms", "rooms_pascal").out.splitlines()
    assert lines[3].split()[6] == "0"
    assert "< 0.01 %" in lines[3]
    assert lines[4].split()[-1] == "-", "no published size"


@pytest.mark.parametrize(
    "content", ["", "rooms: 5", "rooms: {source: a}", "rooms: {flops: 1.0e9, source: a}", "rooms: {flops: 1}", "a: [",
                "rooms: {flops: 1, source: a, size: 3}", "rooms: {parameters: 0, source: a}"]
)  # fmt: skip
def test_published_sizes_of_another_form_are_refused(cli, tmp_path, content):
    (tmp_path / "sizes.yaml").write_text(content)
    assert_fails(cli(SCRIPT, f"--published={tmp_path}/sizes.yaml"), "sizes.yaml")


def test_the_shipped_sizes_are_those_of_experiments():
    sizes = runpy.run_path(str(ROOT / SCRIPT))["read_published_sizes"](ROOT / "docs" / "published_sizes.yaml")
    assert set(sizes) <= set(choices("experiment"))


def test_a_grid_names_what_does_not_fit(cli, tmp_path):
    arguments = ["decoder=taskprompter", "backbone=resnet18,vit_small", *SMALL, "--no-measure", "--markdown"]
    result = cli(SCRIPT, *arguments, "--json", str(tmp_path / "out.json"))
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(row["decoder"], row["backbone"]) for row in rows] == [("taskprompter", "vit_small")]
    assert rows[0]["tasks"] == ["semseg", "depth", "normals", "edge"]
    assert [rows[0][key] for key in ("experiment", "peak_memory_mib", "latency_ms", "device")] == [None] * 4
    lines = result.out.splitlines()
    assert lines[2:4] == [
        "| decoder | backbone | size | parameters | flops | tasks |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    assert lines[4].startswith("| taskprompter | vit_small | 32x64 |")
    assert lines[6] == "left out: taskprompter with resnet18"
    assert "plain ViT" in lines[7]


def test_the_grid_is_of_all_decoders_and_backbones():
    script = runpy.run_path(str(ROOT / SCRIPT), run_name="model_table")
    entries = script["grid_entries"](["data=pascal"])
    names = [f"{decoder} with {backbone}" for decoder in choices("decoder") for backbone in choices("backbone")]
    assert [entry.label for entry in entries] == names
    config = entries[-1].compose()
    assert (config.decoder, config.backbone) == (choices("decoder")[-1], choices("backbone")[-1])
    assert get_image_size(config.config) == (512, 512)


def test_too_little_memory_is_told(cli, monkeypatch):
    original = build_model

    def on_meta_only(*args, **options):
        if torch.get_default_device().type != "meta":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args, **options)

    monkeypatch.setattr("mtcl.config.build_model.build_model", on_meta_only)
    result = cli(SCRIPT, "--experiment", "rooms", *SMALL, "--device", "cpu")
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == "not measured, for lack of memory: rooms"


def test_a_failure_does_not_end_the_table(cli, monkeypatch):
    original = build_model

    def picky(config, *args, **options):
        if config.name == "rooms":
            raise ValueError("no rooms today")
        return original(config, *args, **options)

    monkeypatch.setattr("mtcl.config.build_model.build_model", picky)
    result = cli(SCRIPT, "--experiment", "rooms", "rooms_pascal", *SMALL, "--no-measure")
    assert result.code == 1
    assert result.out.splitlines()[3].startswith("rooms_pascal")
    assert result.out.splitlines()[5:] == ["left out: rooms", "  ValueError: no rooms today"]
    assert result.err == "error: 1 of 2 rows failed; the table of one alone shows where\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--experiment", "rooms", "rums"], "experiment=rums is not known (did you mean rooms?); choose one of cit"),
        (["--experiment"], "--experiment"),
        (["--experiment", "data.size=[32,64]"], "--experiment names none; choose among cityscapes_"),
        (["rooms"], "rooms is not an override key=value; give --experiment NAME"),
        (["decoder=invtp"], "decoder=invtp is not known (did you mean invpt?); choose among atrc"),
        (["decoder=multi_head", "backbone=resnet18", "data.sise=[32,64]"], "there is no config key data.sise"),
        (["decoder=taskprompter", "backbone=resnet18"], "TaskPrompter puts its prompts"),
        (["--repeats", "0"], "--repeats: 0 is not a whole number of at least 1"),
    ],
)
def test_mistakes_are_one_sentence(cli, arguments, sentence):
    result = cli(SCRIPT, *arguments)
    assert result.code != 0
    assert sentence in result.err
    assert "Traceback" not in result.err
    assert not result.out
