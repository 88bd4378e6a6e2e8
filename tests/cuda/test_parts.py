"""Losses, metrics and the options of the regularisers on a fake CUDA device, and the calls of torch.cuda."""

from unittest import mock

import pytest
import torch
from helpers.fake_cuda import CUDA, NO_DETERMINISTIC_KERNEL, Device, fake_cuda

from mtcl import distributed
from mtcl.data.device_batch import prepare_features
from mtcl.models import DenseOutput
from mtcl.regularizers import AuxiliaryHeads, Contrastive, CrossTaskConsistency
from mtcl.regularizers.criteria import CRITERIA
from mtcl.regularizers.null_labels import SOURCE_LABELS
from mtcl.tasks import TASK_NAMES, build_task
from mtcl.tasks.class_task import ClassTask
from mtcl.training.checkpoint_thread import copy_to_cpu

CLASSES = {"semseg": {"class_names": list("abcde")}}
TASKS = ("semseg", "depth", "normals")
OPTIONS = [(Contrastive, {"criterion": name}) for name in CRITERIA]
OPTIONS += [(Contrastive, {"source_labels": name}) for name in SOURCE_LABELS[1:]]
OPTIONS += [
    (Contrastive, {"class_balanced": True, "window": 0.2}),
    (Contrastive, {"drop_conflicting_positives": True, "across_images": True, "projector_sharing": "target"}),
    (Contrastive, {"all_sources": True, "embed_dim": None, "source_tasks": "any"}),
    (Contrastive, {"projector_sharing": "all", "hidden_dim": None, "source_tasks": "self"}),
    (AuxiliaryHeads, {}),
    (AuxiliaryHeads, {"all_sources": True, "hidden_dim": None}),
    (CrossTaskConsistency, {"num_sources": 2, "source_rule": "any"}),
    (CrossTaskConsistency, {"stride": 1, "source_rule": "unlabelled"}),
]


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
        result.loss.backward()
        optimizer = regularizer.build_optimizer(1e-3, 1e-4)
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros((), device=CUDA)
        optimizer.step()
        assert not NO_DETERMINISTIC_KERNEL & set(device.check.counts)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_loss_and_metric_of_each_task(name):
    """In bf16 and fp32; sums are float64 and counts int64, on the device, and an update does not wait."""
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
        loss.backward()
        assert prediction.grad.dtype == dtype
        metric.update(prediction.detach().float(), label)
    for state in metric._defaults:
        value = getattr(metric, state)
        assert (value.device, value.dtype in (torch.float64, torch.int64)) == (CUDA, True), state


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


def test_several_gpus_take_nccl_after_each_process_took_its_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    calls = mock.MagicMock()
    monkeypatch.setattr(torch.cuda, "set_device", calls.set_device)
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.init_process_group)
    distributed.init_process_group(torch.device("cuda", 2))
    assert calls.mock_calls == [mock.call.set_device(2), mock.call.init_process_group("cpu:gloo,cuda:nccl")]
