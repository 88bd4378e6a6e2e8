"""What the regulariser costs: no map of its own, no wait of the host, one graph; and the script that measures it."""

import copy
import json
import runpy
from unittest import mock

import pytest
import torch
from helpers.common import ROOT, TINY

from mtcl.models import DenseOutput
from mtcl.regularizers import AuxiliaryHeads, Contrastive, contrastive, criteria
from mtcl.tasks import build_task

NAMES = ("semseg", "depth", "normals", "edge")
CHANNELS, MAP, SIZE, BATCH = 32, (96, 128), (384, 512), 2
MAP_BYTES = 4 * BATCH * CHANNELS * MAP[0] * MAP[1]
OPTIONS = [
    {},
    {"criterion": "semihard"},
    {"criterion": "ranked"},
    {"criterion": "infonce"},
    {"criterion": "boundary"},
    {"criterion": "boundary", "hidden_dim": None, "embed_dim": None},
    {"class_balanced": True, "drop_conflicting_positives": True, "window": 0.5},
    {"across_images": True, "source_tasks": "any"},
    {"source_labels": "other_image", "class_balanced": True},
    {"source_labels": "distance"},
    {"mispredicted_fraction": 0.5},
    {"criterion": "prototypes"},
]

script = runpy.run_path(str(ROOT / "scripts" / "benchmarks" / "benchmark_step.py"), run_name="benchmark_step")
OperationRecorder, measure_peak_memory = script["OperationRecorder"], script["measure_peak_memory"]


def make(size=SIZE, shape=MAP, layout=torch.contiguous_format, **options):
    """A regulariser, a model's output, and its labels with some void."""
    generator = torch.Generator().manual_seed(0)
    void = torch.rand(BATCH, 1, *size, generator=generator) < 0.1
    labels = {
        "semseg": torch.randint(0, 5, (BATCH, *size), generator=generator).masked_fill(void[:, 0], 255),
        "depth": (torch.rand(BATCH, 1, *size, generator=generator) * 5 + 1).masked_fill(void, 0),
        "normals": torch.nn.functional.normalize(torch.randn(BATCH, 3, *size, generator=generator)),
        "edge": (torch.rand(BATCH, 1, *size, generator=generator) < 0.3).float().masked_fill(void, 255),
    }
    features = {name: torch.randn(BATCH, CHANNELS, *shape, generator=generator) for name in NAMES}
    features = {name: feature.contiguous(memory_format=layout).requires_grad_() for name, feature in features.items()}
    tasks = {name: build_task(name, **({"class_names": tuple("abcde")} if name == "semseg" else {})) for name in NAMES}
    regularizer = Contrastive(
        tasks, dict.fromkeys(NAMES, CHANNELS), **{"num_pixels": 16, "embed_dim": 8, "hidden_dim": 8} | options
    )
    predictions = {}
    if options.get("mispredicted_fraction"):
        shapes = {name: (BATCH, task.channels, *size) for name, task in tasks.items()}
        predictions = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        predictions = {name: x.contiguous(memory_format=layout).requires_grad_() for name, x in predictions.items()}
    return regularizer, DenseOutput(predictions, {"final": features}, [], size), labels


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_map_is_made_and_nothing_is_waited_for(options, layout, monkeypatch):
    monkeypatch.setattr(contrastive, "find_labelled_groups", lambda pixels: None)  # as on a GPU
    regularizer, output, labels = make(layout=layout, **options)
    draw = regularizer.sample(0, ["a", "b"])
    if options.get("criterion") == "prototypes":
        regularizer.compute_loss(output, labels, draw)  # the bank is empty before
    with OperationRecorder() as forward:
        loss = regularizer.compute_loss(output, labels, draw).loss
    assert loss.item() > 0
    assert sum(tensor.floating for tensor in forward.allocated) > 10
    allowed = (
        4 * len(NAMES) * BATCH * 25 * 16 * CHANNELS if options.get("criterion") == "boundary" else MAP_BYTES / 20 - 1
    )
    assert forward.largest.bytes <= allowed, forward.largest  # what is read at 16 pixels: 1/770 of a map
    with OperationRecorder() as backward:
        loss.backward()
    assert backward.largest.bytes == MAP_BYTES, "the gradient of a target's features, and nothing above it"
    assert not forward.waits
    assert not backward.waits


@pytest.mark.parametrize("labelled", [("semseg", "edge"), ("depth",), ()])
@pytest.mark.parametrize("options", [{}, {"drop_conflicting_positives": True, "drop_conflicting_negatives": True}])
def test_groups_without_labels_are_left_out_on_a_cpu(options, labelled, monkeypatch):
    """Losses, gradients and diagnostics have the same bits as where all groups are compared; image i has a label."""
    results = []
    for leaves_out in (True, False):
        if not leaves_out:
            monkeypatch.setattr(contrastive, "find_labelled_groups", lambda pixels: None)
        options = {"criterion": "infonce", "all_sources": True, "num_pixels": 40} | options
        regularizer, output, labels = make(size=(48, 64), shape=(12, 16), **options)
        for name, label in labels.items():
            for image in range(BATCH):
                if labelled[image : image + 1] != (name,):
                    label[image] = {"semseg": 255, "depth": 0, "normals": 0, "edge": 255}[name]
        with mock.patch.object(criteria, "infonce", wraps=criteria.infonce) as spy:
            result = regularizer.compute_loss(output, labels, regularizer.sample(0, ["a", "b"]))
        result.loss.backward()
        groups = spy.call_args.args[0].shape[:2]
        assert groups == ((3 * len(labelled), 1) if leaves_out else (len(regularizer.comparisons), BATCH))
        gradients = [f.grad for f in output.features["final"].values()] + [p.grad for p in regularizer.parameters()]
        results.append((result.loss, *result.losses.values(), *gradients, str(regularizer.summary())))
    for a, b in zip(*results, strict=True):
        assert a == b if isinstance(a, str) else torch.equal(a, b)


def test_auxiliary_heads_make_no_map_and_wait_for_nothing():
    contrast, output, labels = make()
    regularizer = AuxiliaryHeads(contrast.tasks, dict.fromkeys(NAMES, CHANNELS), num_pixels=16, hidden_dim=8)
    draw = regularizer.sample(0, ["a", "b"])
    with OperationRecorder() as recorder:
        loss = regularizer.compute_loss(output, labels, draw).loss
    assert loss.item() > 0
    assert recorder.largest.bytes < MAP_BYTES / 20, recorder.largest
    with OperationRecorder() as backward:
        loss.backward()
    assert not recorder.waits
    assert not backward.waits


def test_an_optimiser_step_waits_for_nothing():
    regularizer, output, labels = make((32, 48), (8, 12))
    optimizer = regularizer.build_optimizer(lr=1e-3, weight_decay=1e-4)
    for step in range(2):
        regularizer.compute_loss(output, labels, regularizer.sample(step, ["a", "b"])).loss.backward()
        with OperationRecorder() as recorder:
            optimizer.step()
        assert recorder.allocated
        assert not recorder.waits


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_peak_memory_is_the_gradients_of_the_features(layout):
    regularizer, output, labels = make(layout=layout)
    draw = regularizer.sample(0, ["a", "b"])
    device, losses = torch.device("cpu"), []
    forward = measure_peak_memory(lambda: losses.append(regularizer.compute_loss(output, labels, draw).loss), device)
    assert 0 < forward < MAP_BYTES
    assert measure_peak_memory(losses[0].backward, device) < (len(NAMES) + 0.5) * MAP_BYTES
    for feature in output.features["final"].values():
        assert feature.grad.shape == feature.shape


@pytest.mark.parametrize("options", [{}, {"criterion": "prototypes"}, {"mispredicted_fraction": 0.5}], ids=str)
def test_one_graph_without_breaks_serves_every_draw(options):
    regularizer, output, labels = make((32, 48), (8, 12), **options)
    eager = copy.deepcopy(regularizer)  # a bank changes with each batch
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(regularizer.compute_loss, fullgraph=True, backend="eager")
    sources = set()
    for step in range(3):
        draw = regularizer.sample(step, [f"{step}", "b"])
        sources.add(tuple(draw.sources[:, 0].tolist()))
        got, want = compiled(output, labels, draw), eager.compute_loss(output, labels, draw)
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(got.losses, want.losses)
    assert len(sources) > 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


# --- The instruments themselves


def test_recorder_lists_allocated_tensors():
    x = torch.randn(4, 8)
    with OperationRecorder() as recorder:
        y = x.view(8, 4).t().expand(3, 4, 8).flatten(1, 1)[1:]
        x.add_(1)
    assert not recorder.allocated
    with OperationRecorder() as recorder:
        y.contiguous()
        x > 0  # noqa: B015
    assert [(tensor.bytes, tensor.floating) for tensor in recorder.allocated] == [(2 * 32 * 4, True), (32, False)]
    assert recorder.largest.description == "aten.clone.default (2, 4, 8) float32"


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.unique(x),
        lambda x: x.index_put((x > 0,), torch.zeros(1)),
    ],
)
def test_recorder_counts_waits(work):
    x = torch.tensor([1.0, -1.0, 2.0])
    with OperationRecorder() as recorder:
        work(x)
    assert recorder.waits
    with OperationRecorder() as recorder:
        x[torch.tensor([0, 1])], x.where(x > 0, 0.0), x.topk(2), x.masked_fill(x > 0, 1.0)
    assert not recorder.waits


def test_peak_counts_what_is_alive_at_once():
    def work():
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second + 1
        return third.sum()

    assert 8000 <= measure_peak_memory(work, torch.device("cpu")) < 8200


@pytest.mark.slow
def test_script_measures_and_profiles(cli, tmp_path):
    arguments = [*TINY, "data.limit=null", "tasks=nyud"]
    result = cli(
        "scripts/benchmarks/benchmark_step.py",
        "--profile",
        "--steps",
        "2",
        "--json",
        f"{tmp_path}/out.json",
        *arguments,
    )
    assert result.code == 0, result.err
    assert "waits of the host: none" in result.out
    assert "graph: no break, 1 graph for 4 draws" in result.out
    costs = json.loads((tmp_path / "out.json").read_text())["as given"]
    assert len(costs["none"]["seconds"]) == len(costs["contrastive"]["seconds"]) == 2
    assert costs["contrastive"]["held"] > costs["none"]["held"] > 0
    assert costs["contrastive"]["step"] > costs["none"]["step"] > 0
    assert costs["profile"]["seconds"].keys() == {"draw", "forward", "backward", "optimiser"}
    assert all(seconds > 0 for seconds in costs["profile"]["seconds"].values())


@pytest.mark.slow
def test_script_refuses_what_has_nothing_to_measure(cli):
    assert "at least two tasks" in cli("scripts/benchmarks/benchmark_step.py", *TINY, "tasks=single_depth").err
    assert "regularizer.weight is 0" in cli("scripts/benchmarks/benchmark_step.py", *TINY, "regularizer.weight=0").err
    assert "--steps: 0 is not" in cli("scripts/benchmarks/benchmark_step.py", "--steps", "0", *TINY).err
