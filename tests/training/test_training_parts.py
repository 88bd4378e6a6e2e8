"""Optimisers, checkpoints, balancer, runtime, panels and the recorder, each on its own."""

import json
import os

import cv2
import numpy as np
import pytest
import timm
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.optim import param_groups_layer_decay
from torch import nn

from mtcl import UserError
from mtcl.atomic import write_atomically, write_json
from mtcl.evaluation.evaluator import Evaluator, VisualSample
from mtcl.models import DenseModel, DenseOutput, EncoderDecoder, build_backbone
from mtcl.models.decoders import MultiHead
from mtcl.runtime import rng_state, set_rng_state
from mtcl.schedules import build_schedule
from mtcl.tasks import VOC21, build_task
from mtcl.training import checkpoint_file as checkpoint_module
from mtcl.training.balancing import FixedWeights
from mtcl.training.checkpoint_file import read_checkpoint_file, write_checkpoint_file
from mtcl.training.optimizers import ELEMENTWISE, ScheduledOptimizer, build_optimizer
from mtcl.training.run_logger import RunLogger, flatten_metrics, write_panels
from mtcl.visualization.panels import GAP, LINE_HEIGHT, draw_panel

CPU = torch.device("cpu")

# --- Optimisers


def test_scheduled_optimizer_scales_every_groups_base_rate():
    a, b = (nn.Parameter(torch.zeros(1)) for _ in "ab")
    scheduled = ScheduledOptimizer(
        torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}]), build_schedule("poly", 4, power=1)
    )
    moved = []
    for step in range(4):
        (a + b).backward()
        values_before = a.item(), b.item()
        scheduled.step(step)
        moved.append((values_before[0] - a.item(), values_before[1] - b.item()))
        scheduled.zero_grad()
        assert a.grad is None
    assert np.array(moved) == pytest.approx(np.array([(f, 0.1 * f) for f in (1, 0.75, 0.5, 0.25)]))


class Tiny(DenseModel):
    """A backbone (convolution, norm) and a head (convolution), one frozen weight among them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def forward(self, image):
        return DenseOutput({"a": self.head(self.backbone(image))}, {}, [], image.shape[-2:])

    def predict(self, image):
        return self.forward(image).predictions

    def backbone_parameters(self):
        return self.backbone.parameters()

    def shared_parameters(self):
        return self.backbone.parameters()


def settings_of(optimizer, model):
    """Parameter name -> (lr, weight decay); every parameter may be there once only."""
    names = {id(p): name for name, p in model.named_parameters()}
    rows = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in optimizer.param_groups for p in g["params"]]
    assert len(rows) == len({name for name, _ in rows})
    return dict(rows)


@pytest.mark.parametrize("backbone_lr", [None, 0.001, 0.0])
def test_optimizer_groups(backbone_lr):
    model = Tiny()
    optimizer = build_optimizer(model, "adamw", lr=0.01, backbone_lr=backbone_lr, weight_decay=0.3)
    low = 0.01 if backbone_lr is None else backbone_lr
    assert settings_of(optimizer, model) == {
        "backbone.0.weight": (low, 0.3),
        "backbone.0.bias": (low, 0.0),
        "backbone.1.weight": (low, 0.0),
        "backbone.1.bias": (low, 0.0),
        "head.weight": (0.01, 0.3),
        "head.bias": (0.01, 0.0),
    }


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224"])
def test_layer_decay_is_timms(name):
    """The learning rates of all layers that the feature net shares with the complete model."""
    backbone = build_backbone(name)
    model = EncoderDecoder(backbone, MultiHead(backbone.channels, backbone.strides, {"depth": 1}, width=8))
    optimizer = build_optimizer(model, "adamw", 0.1, backbone_lr=0.01, weight_decay=0.3, layer_decay=0.5)
    rates = {key.removeprefix("backbone.net."): rate for key, rate in settings_of(optimizer, model).items()}
    complete = timm.create_model(name)
    names = {id(p): key for key, p in complete.named_parameters()}
    groups = param_groups_layer_decay(complete, weight_decay=0.3, layer_decay=0.5)
    scales = {names[id(p)].replace(".", "_"): group["lr_scale"] for group in groups for p in group["params"]}
    for key, parameter in backbone.net.named_parameters():
        scale = scales[key.removeprefix("model.").replace(".", "_")]
        assert rates[key] == (pytest.approx(0.01 * scale), 0.3 if parameter.ndim > 1 else 0.0), key
    assert {rate for key, (rate, _) in rates.items() if key.startswith("decoder.")} == {0.1}
    assert len({rate for rate, _ in rates.values()}) == {"v": 14, "r": 10, "s": 14}[name[0]]


def test_without_layer_decay_the_groups_are_as_ever():
    """Their order is that of the moments in checkpoints."""
    model = Tiny()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optimizer(model, "adamw", lr=0.01, backbone_lr=0.001).param_groups
    assert [[names[id(p)] for p in group["params"]] for group in groups] == [
        ["backbone.0.weight"],
        ["backbone.0.bias", "backbone.1.weight", "backbone.1.bias"],
        ["head.weight"],
        ["head.bias"],
    ]


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_optimizers_by_name(name, kind):
    model = Tiny()
    settings = {"momentum": 0.7, "nesterov": True, "betas": [0.5, 0.9], "eps": 1e-6}
    optimizer = build_optimizer(model, name, lr=0.01, backbone_lr=0.002, weight_decay=0.1, **settings)
    assert type(optimizer) is kind
    default, plain = kind([torch.zeros(1)], lr=0.01).defaults, build_optimizer(model, name, lr=0.01).defaults
    assert all(plain[key] == default[key] for key in ("eps", "betas") if key in default), "torch's, as it was"
    if name != "sgd":
        assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.5, 0.9), 1e-6)}
    assert len(settings_of(optimizer, model)) == 6
    if name == "sgd":
        assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(0.7, True)}
        assert not plain["nesterov"]
    values_before = {key: p.detach().clone() for key, p in model.named_parameters()}
    model(torch.randn(2, 3, 5, 5)).predictions["a"].square().sum().backward()
    optimizer.step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, values_before[key])}
    assert "frozen" not in moved
    assert {"backbone.0.weight", "head.weight", "head.bias"} <= moved


TIMM = dict.fromkeys(("momentum", "nesterov", "betas", "eps"))  # timm's values


def test_timms_optimizers_have_their_values_and_options():
    """The groups are those of AdamW; what an optimiser does not have is ignored."""
    model = Tiny()
    lion = build_optimizer(model, "lion", lr=0.01, backbone_lr=0.001, weight_decay=0.3, **TIMM)
    assert type(lion) is timm.optim.Lion
    assert {group["betas"] for group in lion.param_groups} == {(0.9, 0.99)}
    adamw = build_optimizer(model, "adamw", lr=0.01, backbone_lr=0.001, weight_decay=0.3)
    assert settings_of(lion, model) == settings_of(adamw, model)
    settings = {"momentum": 0.5, "betas": [0.7, 0.8], "eps": 1e-3, "nesterov": False}
    lion = build_optimizer(model, "lion", lr=0.01, **settings, options={"caution": True})
    assert {(group["betas"], group["caution"]) for group in lion.param_groups} == {((0.7, 0.8), True)}
    sgdw = build_optimizer(model, "sgdw", lr=0.01, **settings)
    assert {(group["momentum"], group["nesterov"]) for group in sgdw.param_groups} == {(0.5, False)}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("AdamWw", {}, r"name=AdamWw is not known \(did you mean adamw\?\); choose adamw, adam, sgd or another"),
        ("adahessian", {}, "name=adahessian needs second derivatives"),
        ("fusedlamb", {}, "name=fusedlamb can't be used here: "),
        ("adan", {}, r"betas=\[0.9, 0.999\] must be 3 numbers for adan, or null"),
        (
            "lion",
            {"options": {"cautious": True}},
            r"options.cautious is not an option of lion \(did you mean caution\?",
        ),
        ("adamw", {"options": {"lr": 1}}, "options.lr is not an option of adamw; it has amsgrad, maximize"),
        ("lamb", {"is_sharded": True}, "name=lamb needs whole weights, .* train with DDP, or choose one of adamw"),
        ("muon", {"options": {"algo": "x"}}, "name=muon can't be built with these settings: Invalid algo: x"),
    ],
)
def test_optimizers_that_are_refused(name, settings, message):
    with pytest.raises(UserError, match=f"^{message}"):
        build_optimizer(Tiny(), name, lr=0.1, **settings)


def train_tiny(model, optimizer, steps):
    """Steps on batches that are a function of their number."""
    for step in steps:
        batch = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        model(batch).predictions["a"].square().sum().backward()
        optimizer.step(step, torch.tensor(float(step == 1)))
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb", "adan", "adafactorbv", "lookahead_radam"])
def test_a_resumed_optimizer_goes_on_bit_for_bit(name, tmp_path):
    """Through a file, with a skipped step; some count their steps in their groups, one has moments in bf16."""

    def build():
        model = Tiny().to(memory_format=torch.channels_last)
        optimizer = build_optimizer(model, name, 0.02, backbone_lr=0.01, weight_decay=0.1, **TIMM)
        return model, ScheduledOptimizer(optimizer, build_schedule("poly", 20))

    model, optimizer = build()
    train_tiny(model, optimizer, range(1))
    values_before = {key: value.clone() for key, value in model.named_parameters()}
    train_tiny(model, optimizer, range(1, 2))
    assert all(torch.equal(value, values_before[key]) for key, value in model.named_parameters()), "it is skipped"
    train_tiny(model, optimizer, range(2, 5))
    content = {"model": model.state_dict(), "config": {}, "step": 5, "optimizer": optimizer.state_dict()}
    write_checkpoint_file(tmp_path / "last.pt", content)
    train_tiny(model, optimizer, range(5, 15))
    loaded = read_checkpoint_file(tmp_path / "last.pt")
    resumed, optimizer = build()
    resumed.load_state_dict(loaded["model"])
    optimizer.load(loaded["optimizer"])
    train_tiny(resumed, optimizer, range(5, 15))
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_work_on_parts_of_a_weight(name):
    """As FSDP needs it; lamb, whose steps have the norm of a weight, does not."""

    def train(num_parts, name=name):
        torch.manual_seed(0)
        parts = nn.ParameterList(torch.randn(8, 3).chunk(num_parts))
        parts.backbone_parameters = list
        optimizer = build_optimizer(parts, name, 0.02, weight_decay=0.1, **TIMM)
        for _ in range(3):
            for part, gradient in zip(parts, torch.randn(8, 3).chunk(num_parts)):
                part.grad = gradient.contiguous()
            optimizer.step()
        return torch.cat(list(parts)).detach()

    torch.testing.assert_close(train(2), train(1))
    if name == "adamw":
        assert not train(1, "lamb").allclose(train(2, "lamb"))


# --- Checkpoints


def some_content(value=1.0):
    return {"model": {"w": torch.full((2, 3), value)}, "config": {"seed": 3, "data": {"size": [4, 5]}}, "step": 7}


def test_checkpoint_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "last.pt"
    write_checkpoint_file(path, some_content())
    content = read_checkpoint_file(str(path))
    assert torch.equal(content.pop("model")["w"], torch.ones(2, 3))
    assert content == {"format": 1, "config": {"seed": 3, "data": {"size": [4, 5]}}, "step": 7}
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]
    write_checkpoint_file(path, some_content(2.0))
    assert read_checkpoint_file(path)["model"]["w"].unique().tolist() == [2]


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["while writing", "while flushing", "while renaming"])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, error, moment):
    path = tmp_path / "last.pt"
    write_checkpoint_file(path, some_content(1.0))
    old = path.read_bytes()

    def fail(*args, **kwargs):
        raise error("power failure")

    def write_half(content, file):
        file.write(old[: len(old) // 2])
        raise error("power failure")

    if moment == "while writing":
        monkeypatch.setattr(checkpoint_module.torch, "save", write_half)
    else:
        monkeypatch.setattr(f"os.{'fsync' if moment == 'while flushing' else 'replace'}", fail)
    with pytest.raises(error, match="power failure"):
        write_checkpoint_file(path, some_content(2.0))
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_readers_never_see_an_unfinished_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        assert temporary != path
        assert temporary.parent == path.parent  # a rename across file systems would be a copy
        temporary.write_text("half")
        assert path.read_text() == "old"
        temporary.write_text("new")

    write_atomically(path, write)
    assert path.read_text() == "new"


class Evil:
    """Would create a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    torch.save({"format": 1, **some_content(), "extra": Evil(tmp_path / "executed")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt names posix mkdir"):
        read_checkpoint_file(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)  # the trap itself works
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "does not exist"),
        (b"", "can't be read"),
        (b"not a checkpoint", "can't be read"),
        ("truncated", "can't be read"),
        ([1, 2], "not a checkpoint of mtcl"),
        ({"w": torch.ones(1)}, "not a checkpoint of mtcl"),
        ({"format": 1, "model": {}}, "not a checkpoint of mtcl"),
        ({**some_content(), "format": 2}, "has format 2, this version of mtcl reads format 1"),
        (some_content(), "has format None"),
    ],
    ids=["missing", "empty", "text", "truncated", "a list", "weights", "no config", "newer", "no format"],
)
def test_checkpoints_that_cannot_be_used(tmp_path, content, reason):
    path = tmp_path / "some.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "truncated":
        write_checkpoint_file(path, some_content())
        path.write_bytes(path.read_bytes()[:-200])
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=reason) as error:
        read_checkpoint_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


# --- Balancer


def test_fixed_weights_give_the_weighted_sum():
    x = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    y = nn.Parameter(torch.tensor(5.0))
    losses = {"a": x.square().sum(), "b": (x * torch.tensor([1.0, 10.0, 100.0])).sum(), "regularizer": 7 * y + x[0]}
    balancer = FixedWeights({"a": 0.5, "b": 2.0, "not in use": 100.0})
    assert balancer.total(losses).item() == 0.5 * 14 + 2 * 281 + 36
    balancer.backward(losses, [x])
    # d/dx: 0.5 * 2 x + 2 * (1, 10, 100), and the objective without a weight once
    assert x.grad.tolist() == [1 + 2 + 1, -2 + 20, 3 + 200]
    assert y.grad.item() == 7


def test_a_weight_of_zero_counts():
    x = nn.Parameter(torch.tensor(2.0))
    FixedWeights({"a": 0.0, "b": 1.0}).backward({"a": x**3, "b": x**2}, [x])
    assert x.grad.item() == 4


def test_generator_state_round_trip(tmp_path):
    torch.manual_seed(5)
    torch.rand(7)
    write_checkpoint_file(tmp_path / "a.pt", {**some_content(), "rng": rng_state(CPU)})
    want = torch.rand(4)
    torch.manual_seed(0)
    set_rng_state(read_checkpoint_file(tmp_path / "a.pt")["rng"], CPU)
    assert torch.equal(torch.rand(4), want)


# --- Panels

TASKS = {
    name: build_task(name, **({"class_names": VOC21} if name == "semseg" else {}))
    for name in ("semseg", "human_parts", "sal", "depth", "normals", "edge")
}


def make_shown(height, width, id="kitchen/0001", seed=0):
    rng = np.random.default_rng(seed)
    unit = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    unit[0, 0, 0] = 0  # void
    classes = {"semseg": 21, "human_parts": 7, "sal": 2}
    labels = {name: rng.integers(0, n, (height, width), np.uint8) for name, n in classes.items()}
    predictions = {name: rng.integers(0, n, (height, width), np.uint8) for name, n in classes.items()}
    for label in labels.values():
        label[0, :3] = 255
    labels |= {"depth": rng.random((height, width), np.float32) * 9, "normals": unit[0]}
    labels["depth"][0, 0] = 0
    labels["edge"] = rng.choice(np.array([0, 1, 255], np.uint8), (height, width))
    predictions |= {"depth": rng.random((height, width), np.float32) * 12, "normals": unit[1]}
    predictions["edge"] = rng.random((height, width), np.float32)
    return VisualSample(id, rng.integers(0, 256, (height, width, 3), np.uint8), labels, predictions)


@pytest.mark.parametrize(
    ("height", "width", "zoom"), [(20, 30, 10), (191, 60, 2), (192, 60, 1), (200, 64, 1), (96, 5, 2), (1, 3, 192)]
)
def test_panel_shows_every_task(height, width, zoom):
    sample = make_shown(height, width)
    panel = draw_panel(sample, TASKS)
    assert panel.dtype == np.uint8
    column = width * zoom + 2 * GAP
    assert panel.shape[1:] == (column * (1 + len(TASKS)), 3)

    def at(number, row):
        """What stands in that column below that row's caption."""
        top = GAP + LINE_HEIGHT + 4 + row * (height * zoom + LINE_HEIGHT + 4)
        left_edge = number * column + GAP
        return panel[top : top + height * zoom, left_edge : left_edge + width * zoom]

    def enlarged(picture):
        return np.kron(picture, np.ones((zoom, zoom, 1), np.uint8))

    assert (at(0, 0) == enlarged(sample.image)).all()
    for number, (name, task) in enumerate(TASKS.items(), start=1):
        assert (at(number, 0) == enlarged(task.draw(sample.labels[name]))).all(), name
        assert (at(number, 1) == enlarged(task.draw(sample.predictions[name]))).all(), name


def test_panel_explains_its_colours():
    sample = make_shown(48, 64)
    for name, task in TASKS.items():
        panel = draw_panel(sample, {name: task})
        pictures = 48 * 4 * 2 + 2 * (LINE_HEIGHT + 4)
        below = panel[GAP + pictures :, 64 * 4 + 2 * GAP :].reshape(-1, 3)
        for text, colour in task.legend([sample.labels[name], sample.predictions[name]]):
            assert (below == colour).all(axis=1).sum() >= 100, (name, text)


def test_panel_does_not_change_the_sample():
    sample, copy = make_shown(24, 24), make_shown(24, 24)
    draw_panel(sample, TASKS)
    assert (sample.image == copy.image).all()
    for name in TASKS:
        assert np.array_equal(sample.labels[name], copy.labels[name])
        assert np.array_equal(sample.predictions[name], copy.predictions[name])


def test_panels_are_written_in_the_right_colours(tmp_path):
    samples = [make_shown(24, 32, id="kitchen 1/0001:x"), make_shown(24, 32, id="b", seed=1)]
    panels = write_panels(tmp_path / "panels", samples, TASKS)
    assert sorted(p.name for p in (tmp_path / "panels").iterdir()) == ["b.png", "kitchen_1_0001_x.png"]
    for name, panel in zip(("kitchen_1_0001_x", "b"), panels):
        read = cv2.cvtColor(cv2.imread(str(tmp_path / "panels" / f"{name}.png")), cv2.COLOR_BGR2RGB)
        assert (read == panel).all()


# --- Recorder


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def read_tensorboard(folder, tag):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_recorder_continues_an_interrupted_run(tmp_path):
    """Losses of step s belong to the update after it, validation to the state before it: only that one is kept at 4."""
    first = RunLogger(tmp_path)
    for step in range(6):
        first.log_scalars(step, "val", {"depth/rmse": 100.0 + step})
        first.log_scalars(step, "train", {"depth": 10.0 + step})
        first.log_scalars(step, "regularizer", {"depth<-edge/active": 0.5})
    first.close()
    assert len(read_log(tmp_path)) == 18
    second = RunLogger(tmp_path, start_step=4)  # resumed from a checkpoint of step 4
    assert len(read_log(tmp_path)) == 18, "nothing is dropped before there is something new"
    second.log_scalars(4, "train", {"depth": 24.0})
    records = read_log(tmp_path)
    assert records.pop() == {"step": 4, "kind": "train", "depth": 24.0}
    assert [(r["step"], r["kind"]) for r in records] == [
        *((step, kind) for step in range(4) for kind in ("val", "train", "regularizer")),
        (4, "val"),
    ]
    assert [r["depth"] for r in records if r["kind"] == "train"] == [10, 11, 12, 13]
    for step in range(4, 8):
        if step > 4:
            second.log_scalars(step, "train", {"depth": 20.0 + step})
        second.log_scalars(step + 1, "val", {"depth/rmse": 200.0 + step + 1})
    second.close()
    log = read_log(tmp_path)
    assert [r["depth"] for r in log if r["kind"] == "train"] == [10, 11, 12, 13, 24, 25, 26, 27]
    validation = [100, 101, 102, 103, 104, 205, 206, 207, 208]
    assert [r["depth/rmse"] for r in log if r["kind"] == "val"] == validation
    assert read_tensorboard(tmp_path, "val/depth/rmse") == list(enumerate(validation))
    # TensorBoard can drop whole steps only: at 4 the interrupted run's losses stay beside the resumed run's.
    curve = read_tensorboard(tmp_path, "train/depth")
    assert [point for point in curve if point != (4, 14)] == [(s, 10 + s if s < 4 else 20 + s) for s in range(8)]
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_recorder_starts_afresh(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "kind": "train"}\n')
    run_logger = RunLogger(tmp_path)
    run_logger.log_scalars(0, "val", {"human_parts/mIoU": float("nan"), "depth/rmse": 1.5})
    run_logger.close()
    assert read_log(tmp_path) == [{"step": 0, "kind": "val", "human_parts/mIoU": None, "depth/rmse": 1.5}]


def test_recorder_survives_a_line_cut_short(tmp_path):
    """A run killed while writing leaves half a line; its resumption must not trip over it."""
    (tmp_path / "log.jsonl").write_text('{"step": 0, "kind": "train"}\n{"step": 1, "kind": "train", "dep')
    run_logger = RunLogger(tmp_path, start_step=3)
    run_logger.log_scalars(3, "train", {"depth": 1.0})
    run_logger.close()
    assert read_log(tmp_path) == [{"step": 0, "kind": "train"}, {"step": 3, "kind": "train", "depth": 1.0}]


def test_recorder_draws_panels(tmp_path):
    run_logger = RunLogger(tmp_path / "run")
    sample = make_shown(24, 32, id="a/b")
    run_logger.log_panels(5, [sample], TASKS)
    run_logger.log_scalars(5, "val", {"depth/rmse": 0.5})
    run_logger.close()
    assert (tmp_path / "run/panels/a_b.png").is_file()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    (image,) = events.Images("panel/a/b")
    assert (image.step, image.width) == (5, draw_panel(sample, TASKS).shape[1])
    assert events.Scalars("val/depth/rmse")[0].value == 0.5


def test_json_and_flat(tmp_path):
    metrics = {"depth": {"rmse": 0.5, "log": 0.1}, "edge": {"loss": 0.2}}
    write_json(tmp_path / "metrics.json", metrics)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert flatten_metrics(metrics) == {"depth/rmse": 0.5, "depth/log": 0.1, "edge/loss": 0.2}


def test_a_loaded_optimizer_keeps_its_own_settings():
    model = Tiny()
    old = ScheduledOptimizer(build_optimizer(model, "adamw", lr=1e-2, weight_decay=0.1), lambda step: 0.5)
    model(torch.ones(1, 3, 5, 5)).predictions["a"].sum().backward()
    old.step(0)
    new = ScheduledOptimizer(build_optimizer(model, "adamw", lr=1e-3, weight_decay=0.2), lambda step: 1.0)
    new.load(old.optimizer.state_dict())
    assert {group["lr"] for group in new.optimizer.param_groups} == {1e-3}
    assert {group["weight_decay"] for group in new.optimizer.param_groups} == {0.0, 0.2}
    assert len(new.optimizer.state) == len(old.optimizer.state) > 0


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_moments_of_another_memory_format_are_those_of_their_weights(name):
    """Channels first or last makes no difference to what is learnt after a resume."""
    values = []
    for resumed in (torch.contiguous_format, torch.channels_last):
        model = Tiny().to(memory_format=torch.contiguous_format)
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter)
        old = ScheduledOptimizer(build_optimizer(model, name, lr=0.1), lambda step: 1.0)
        image = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(1))
        model(image).predictions["a"].sum().backward()
        old.step(0)
        model.to(memory_format=resumed)
        new = ScheduledOptimizer(build_optimizer(model, name, lr=0.1), lambda step: 1.0)
        new.load(old.optimizer.state_dict())
        new.step(1)
        values.append([p.detach().clone() for p in model.parameters()])
    assert any(p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1 for p in values[0])
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b)


def test_quick_scores_of_edges_do_not_compete_with_whole_ones():
    quick = Evaluator({}, [], torch.device("cpu"), fast_options={"edge": {"thresholds": 5, "every": 2}})
    assert [quick.is_comparable(name) for name in ("edge/odsF", "edge/loss", "semseg/mIoU")] == [False, True, True]
    assert Evaluator({}, [], torch.device("cpu"), fast_options={"edge": {"score_boundaries": False}}).is_comparable(
        "edge/loss"
    )
