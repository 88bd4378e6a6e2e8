"""The evaluator and the predictor on a fake CUDA device."""

import numpy as np
import torch
from helpers.fake_cuda import CUDA, fake_cuda
from helpers.small_models import make_model
from torch.utils._python_dispatch import _disable_current_modes

from mtcl.data import Sample
from mtcl.data.loader import collate
from mtcl.evaluation.evaluator import Evaluator
from mtcl.inference.predictor import Predictor
from mtcl.tasks import build_task

TASKS = ("depth", "normals")


def test_an_evaluation_does_not_wait_between_its_batches(monkeypatch):
    """Values are read at the end, where this test has none."""
    tasks = {name: build_task(name) for name in TASKS}
    labels = {name: task.empty_label(64, 64) for name, task in tasks.items()}
    batch = collate([Sample(i, np.zeros((64, 64, 3), np.uint8), labels) for i in "ab"], tasks, None, 32)
    classes = [type(task.metric()) for task in tasks.values()]
    monkeypatch.setattr(Evaluator, "score", torch.no_grad()(Evaluator.score.__wrapped__))  # fakes lack inference mode
    with fake_cuda() as device:
        model = device.fake_module(lambda: make_model(tasks={"depth": 1, "normals": 3}))
        with device.may_wait():
            model.to(CUDA)
        updates = []
        for metric_class in classes:
            monkeypatch.setattr(metric_class, "compute", lambda metric: {})
            update = metric_class.update
            monkeypatch.setattr(
                metric_class, "update", lambda m, p, y, update=update: (updates.append(p.dtype), update(m, p, y))
            )
        monkeypatch.setattr("mtcl.evaluation.evaluator.distributed.all_reduce_sum", lambda x: 2)
        evaluator = Evaluator(tasks, [device.fake(dict(batch))], CUDA)
        to, allowed = torch.nn.Module.to, torch.tensor

        def move(module, *arguments, **options):  # once, before the first batch
            with device.may_wait():
                return to(module, *arguments, **options)

        def make_tensor(values, **options):  # of the count, after the last batch, and of the normalisation
            with device.may_wait():
                return allowed(values, **options)

        monkeypatch.setattr(torch.nn.Module, "to", move)
        monkeypatch.setattr(torch, "tensor", make_tensor)
        assert evaluator.run(model).num_images == 2
    assert updates == [torch.float32] * 2


def test_a_predictor_keeps_its_maps_on_the_device(monkeypatch):
    """Enlarged and flipped, whole and window by window; the host reads the maps when they are decoded."""
    tasks, decoded = {"normals": build_task("normals")}, []
    monkeypatch.setattr(Predictor, "_warn_of_overflow", lambda *_: None)
    monkeypatch.setattr(
        type(tasks["normals"]), "decode", lambda _, x: (decoded.append((x.device, x.dtype)), np.zeros(x.shape[1:]))[1]
    )
    collate_on_host = collate
    with fake_cuda() as device:

        def collate_fake(*arguments):
            with _disable_current_modes():
                batch = collate_on_host(*arguments)
            return device.fake(dict(batch))

        monkeypatch.setattr("mtcl.inference.predictor.collate", collate_fake)
        model = device.fake_module(lambda: make_model(tasks={"normals": 3}))
        with device.may_wait():
            predictor = Predictor(model, tasks, (64, 64), CUDA, mode="sliding_window", flip=True, scales=(1.5,))
        small, large = predictor.predict_batch([np.zeros((64, 64, 3), np.uint8), np.zeros((64, 96, 3), np.uint8)])
    assert small["normals"].shape == (64, 64)
    assert large["normals"].shape == (64, 96)
    assert set(decoded) == {(CUDA, torch.float32)}
