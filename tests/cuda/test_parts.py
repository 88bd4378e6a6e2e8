"""Losses, metrics and the options of the regularisers on a fake CUDA device."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from helpers.fake_cuda import CUDA, NO_DETERMINISTIC_KERNEL, Device, fake_cuda, list_low_precision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from mtcl.data.device_batch import prepare_features
from mtcl.metrics.masked import PixelMetric
from mtcl.models import DenseOutput
from mtcl.regularizers import AuxiliaryHeads, Contrastive, CrossTaskConsistency
from mtcl.regularizers.criteria import CRITERIA
from mtcl.regularizers.null_labels import SOURCE_LABELS
from mtcl.tasks import TASK_NAMES, build_task
from mtcl.tasks.class_task import ClassTask
from mtcl.training.balancing_avg_norm import AverageNorm
from mtcl.training.balancing_db_mtl import DualBalancing
from mtcl.training.balancing_scalarizers import build_scalarization
from mtcl.training.balancing_torchjd import GradientAggregation
from mtcl.training.checkpoint_thread import copy_to_cpu

CLASSES = {"semseg": {"class_names": list("abcde")}}
TASKS = ("semseg", "depth", "normals")
LABELS = {"semihard": "other_image", "ranked": "random", "infonce": "distance"}  # one each saves tests
OPTIONS = [(Contrastive, {"criterion": name, "source_labels": LABELS.get(name, "true")}) for name in CRITERIA]
OPTIONS += [
    (Contrastive, {"class_balanced": True, "window": 0.2, "projector_sharing": "all", "hidden_dim": None}),
    (Contrastive, {"drop_conflicting_positives": True, "across_images": True, "projector_sharing": "target"}),
    (Contrastive, {"all_sources": True, "embed_dim": None, "source_tasks": "any"}),
    (AuxiliaryHeads, {"all_sources": True, "hidden_dim": None}),
    (CrossTaskConsistency, {"num_sources": 2, "source_rule": "any"}),
    (CrossTaskConsistency, {"stride": 1, "source_rule": "unlabelled"}),
]


def test_all_source_labels_are_covered():
    assert {options.get("source_labels", "true") for _, options in OPTIONS} == set(SOURCE_LABELS)


def make_tasks(names=TASKS):
    return {name: build_task(name, **CLASSES.get(name, {})) for name in names}


def make_label(task):
    shape = (2, 32, 32) if isinstance(task, ClassTask) or task.name == "sal" else (2, task.channels, 32, 32)
    return torch.zeros(shape, dtype=torch.long if len(shape) == 3 else torch.float32, device=CUDA)


@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def test_a_step_of_each_regulariser(case):
    """The loss is fp32 from features in bf16, and no operation lacks a deterministic version."""
    regularizer_class, options = case
    tasks, feature = make_tasks(), "trunk" if case[0] is CrossTaskConsistency else "final"
    with fake_cuda() as device:
        regularizer = device.fake_module(lambda: regularizer_class(tasks, dict.fromkeys(tasks, 8), **options))
        with device.may_wait():
            regularizer.to(CUDA)
        draw = device.fake(regularizer.sample(0, ["a", "b"])).to(CUDA)
        maps = {name: torch.ones(2, 8, 8, 8, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for name in tasks}
        predictions = {
            name: torch.ones(2, t.channels, 32, 32, device=CUDA, requires_grad=True) for name, t in tasks.items()
        }
        output = DenseOutput(predictions, {feature: maps}, [], (32, 32))
        labels = {name: make_label(task) for name, task in tasks.items()}
        result = regularizer.compute_loss(output, labels, draw)
        assert {x.dtype for x in (result.loss, *result.losses.values())} == {torch.float32}
        assert list_low_precision(result.loss) == []
        result.loss.backward()
        optimizer = regularizer.build_optimizer(1e-3, 1e-4)
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros((), device=CUDA)
        optimizer.step()
        assert not NO_DETERMINISTIC_KERNEL & set(device.check.counts)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_loss_and_metric_of_each_task(name):
    """In bf16 and fp32: losses are fp32, sums float64, counts int64; only the check of the labels waits."""
    (task,) = make_tasks([name]).values()
    for protocol in getattr(type(task.metric()), "PROTOCOLS", (None,)):
        with fake_cuda() as device:
            check_task(device, task, {} if protocol is None else {"protocol": protocol})


def check_task(device: Device, task, options) -> None:
    label = make_label(task)
    options |= {"score_boundaries": False} if task.name == "edge" else {}
    with device.may_wait():
        metric = task.metric(**options).to(CUDA)
    for dtype in (torch.bfloat16, torch.float32):
        prediction = torch.ones(2, task.channels, 32, 32, device=CUDA, dtype=dtype, requires_grad=True)
        loss = task.loss(prediction, label)
        assert (loss.dtype, loss.device) == (torch.float32, CUDA)
        assert list_low_precision(loss) == []
        loss.backward()
        assert prediction.grad.dtype == dtype
        metric.update(prediction.detach().float(), label)
    for state in metric._defaults:
        value = getattr(metric, state)
        is_list = isinstance(value, list)  # the angles by mtan, which are not summed
        for array in value if is_list else [value]:
            assert array.device == CUDA, state
            assert array.dtype in ((torch.float32,) if is_list else (torch.float64, torch.int64)), state
    with mock.patch.object(PixelMetric, "check_labels"):
        results = metric.compute()
    assert {(x.device, x.shape) for x in results.values()} == {(CUDA, ())}


def test_a_loss_that_rounds_is_found(monkeypatch):
    """Though its value is fp32."""
    monkeypatch.setattr("mtcl.losses.depth.masked_mean", lambda x, *_: x.bfloat16().mean().float())
    with fake_cuda() as device, pytest.raises(AssertionError):
        check_task(device, *make_tasks(["depth"]).values(), {})


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_prediction_is_turned_back_without_waiting(name):
    (task,) = make_tasks([name]).values()
    with fake_cuda():
        prediction = torch.ones(2, task.channels, 8, 8, device=CUDA)
        result = task.to_averageable(task.unscale_prediction(task.unflip_prediction(prediction), 1.5))
    assert (result.device, result.shape) == (CUDA, prediction.shape)


AGGREGATORS = {"Mean": {}, "Random": {}, "GradDrop": {}, "Constant": {"weights": [1.0, 2.0]}}


@pytest.mark.parametrize("name", AGGREGATORS)  # the others solve on the host, or branch on data
def test_an_aggregator_works_on_the_device(name, monkeypatch, caplog):
    """The host reads the norms once, when a step's gradients are complete."""
    pytest.importorskip("torchjd")
    monkeypatch.setattr("mtcl.training.balancing_torchjd.private_randomness", lambda *_: nullcontext())
    reads = mock.MagicMock(side_effect=lambda x: [1.0] * x.numel())
    with fake_cuda() as device, mock.patch.object(FakeTensor, "tolist", lambda x: reads(x)):
        with device.may_wait():
            balancer = GradientAggregation({"a": 1.0, "b": 2.0}, CUDA, name, AGGREGATORS[name])
        trunk, *heads = parameters = [nn.Parameter(torch.ones(4, device=CUDA)) for _ in range(3)]
        for _ in range(2):  # batches
            losses = {loss: (trunk * head).bfloat16().float().mean() for loss, head in zip("ab", heads)}
            balancer.backward(losses | {"c": trunk.mean()}, parameters)
        reads.assert_not_called()
        with device.may_wait():
            balancer.finish_step(0)
        reads.assert_called_once()
        for parameter in parameters:
            assert (parameter.grad.device, parameter.grad.shape) == (CUDA, parameter.shape)
        assert all(x.device == CUDA for x in balancer.summary().values() if isinstance(x, torch.Tensor))
    assert not caplog.records  # an aggregator that fails logs a warning


SCALARIZERS = {"COSMOS": {"lambda_": 1.0, "weights": [1.0, 2.0]}, "DWA": {}, "FAMO": {}, "GeometricMean": {}}
SCALARIZERS |= {
    "IMTLL": {},
    "Mean": {},
    "PBI": {"theta": 1.0, "weights": [1.0, 2.0]},
    "Random": {},
    "STCH": {"mu": 1.0},
}


@pytest.mark.parametrize("name", [*SCALARIZERS, "avg_norm", "db_mtl"])
def test_balancing_never_waits_for_the_device(name, monkeypatch):
    """In a step of two batches, of which the objective b has labels in one; a checkpoint may be loaded between them."""
    pytest.importorskip("torchjd")
    monkeypatch.setattr("mtcl.training.balancing_scalarizers.private_randomness", lambda *_: nullcontext())
    weights, schedule = {"a": 1.0, "b": 2.0}, lambda step: 1.0
    with fake_cuda() as device:
        trunk, *heads = parameters = [nn.Parameter(torch.ones(4, 2, device=CUDA)) for _ in range(3)]
        with device.may_wait():
            if name in SCALARIZERS:
                balancer = build_scalarization(weights, CUDA, name, schedule=schedule, options=SCALARIZERS[name])
            else:
                balancer = AverageNorm(weights, [trunk]) if name == "avg_norm" else DualBalancing(weights, CUDA)
        for step in range(3):
            for scale in (0.5, 0.0):
                losses = {loss: (trunk * head).bfloat16().float().mean() for loss, head in zip("ab", heads)}
                balancer.backward({"a": losses["a"] / 2, "b": scale * losses["b"], "c": trunk.mean()}, parameters, 2)
            balancer.finish_step(step)
            if balancer.measures_progress:
                balancer.observe_progress(losses)
            balancer.update(step, torch.zeros((), device=CUDA))
            balancer.load_state_dict(balancer.state_dict())
        assert {x.device for x in balancer.summary().values()} == {CUDA}
        assert {parameter.grad.device for parameter in parameters} == {CUDA}
        assert device.check.counts["_local_scalar_dense"] == 0


def test_features_are_copied_on_a_stream_of_their_own():
    with fake_cuda() as device:
        batch = {"features": [torch.ones(2, 4, 8, 8, dtype=torch.float16)], "labels": {"depth": torch.ones(2, 1, 8, 8)}}
        maps, labels = prepare_features(batch, CUDA)
        assert [x.dtype for x in maps] == [torch.float32]
        assert labels["depth"].device == CUDA
        names = [call[0] for call in device.calls.mock_calls]
    order = ["Stream", "current_stream", "stream", "stream().__enter__", "stream().__exit__"]
    assert [name for name in names if name in order] == order
    assert names.index("stream().__exit__") < names.index("current_stream().wait_stream")
    assert names.index("current_stream().wait_stream") < names.index("record_stream")
    assert names.count("record_stream") == 2


def test_a_checkpoint_is_copied_without_waiting_and_read_after_the_event():
    with fake_cuda() as device:
        copied, wait = copy_to_cpu({"a": torch.ones(3, device=CUDA)})
        assert copied["a"].device.type == "cpu"
        events = device.calls.current_stream.return_value.record_event
        events.assert_called_once_with()
        events.return_value.synchronize.assert_not_called()
        wait()
        events.return_value.synchronize.assert_called_once_with()
