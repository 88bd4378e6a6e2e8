"""Training steps on a fake CUDA device: nothing stays on the CPU, and the host never waits."""

from contextlib import ExitStack
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.common import choices, composed
from helpers.distillation import STUDENT
from helpers.fake_cuda import CUDA, NO_DETERMINISTIC_KERNEL, Device, HostWaitError, fake_cuda, list_low_precision
from helpers.shrunken import shrunk
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError
from torch.utils._python_dispatch import _disable_current_modes

from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_regularizer, build_training_run
from mtcl.data import Sample
from mtcl.data.loader import collate
from mtcl.models.decoders.blocks import resize
from mtcl.models.teachers import build_teacher
from mtcl.training.trainer import Trainer

SIZE = (64, 64)
TINY = ["debug=tiny", "data.size=[64,64]", "tasks.names=[semseg,depth]", "trainer.precision=auto"]
TINY += ["regularizer=contrastive"]
BACKBONES = {
    "taskprompter": "vit_small",
    "sak": "vit_small",
    "linear": "vit_small",
    "dpt": "vit_small",
    "invpt": "vit_small",
}
BACKBONES |= {"mqtransformer": "swin_tiny", "mti_net": "hrnet_w18_small", "deeplab": "resnet18_dilated"}
SMALL = ["backbone=resnet18", "decoder.width=8", "decoder.head_width=8", *shrunk("", "resnet18")]


def make_trainer(device: Device, tmp_path, *overrides: str) -> tuple[Trainer, dict]:
    """Return a trainer on the device, and a batch on the host."""
    config = composed(*TINY, *overrides)
    tasks = build_tasks(config)

    def build(*arguments):
        return device.fake_module(build_model, *arguments)

    with device.may_wait(), mock.patch("mtcl.config.build_training.build_model", build):
        trainer = build_training_run(config, tasks, tmp_path, CUDA).trainer
    trainer.model.train()
    labels = {name: task.empty_label(*SIZE) for name, task in tasks.items()}
    with _disable_current_modes():
        batch = collate([Sample(i, np.zeros((*SIZE, 3), np.uint8), labels) for i in "ab"], tasks, None, 32)
    return trainer, device.fake(dict(batch))


def take_step(trainer: Trainer, batch: dict, *more: dict, with_diagnostics: bool = False) -> None:
    """Take a training step and check types and devices."""
    values = trainer.train_step(batch, *more, with_diagnostics=with_diagnostics)
    for name, value in values.items():
        assert (value.device, value.dtype, value.shape) == (CUDA, torch.float32, ()), name
    trainer.step += 1
    for module in (trainer.model, trainer.regularizer):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()) if module else ():
            assert tensor.device == CUDA, name
    for optimizer in (trainer.optimizer, trainer.regularizer_optimizer):
        for entry in optimizer.optimizer.state.values() if optimizer else ():
            assert {x.device for x in entry.values()} == {CUDA}


def check_output(trainer: Trainer, batch: dict) -> None:
    """Predictions and the layers that make them have single precision under autocast, which is on."""
    with torch.autocast("cuda", dtype=torch.bfloat16):
        image = batch["image"].to(CUDA, non_blocking=True).float()
        output = trainer.model(image)
        predictions = trainer.model.predict(image)
    for maps in (output.predictions, *output.intermediate, predictions):
        assert {name: x.dtype for name, x in maps.items()} == dict.fromkeys(trainer.tasks, torch.float32)
        assert [name for x in maps.values() for name in list_low_precision(x, up_to_layers=True)] == []


QUICK_DECODERS = ("linear", "multi_head", "pad_net")  # the others take seconds


@pytest.mark.parametrize(
    "decoder",
    [pytest.param(name, marks=() if name in QUICK_DECODERS else pytest.mark.slow) for name in choices("decoder")],
)
def test_a_step_of_each_decoder(decoder, tmp_path):
    """In the deterministic mode, where torch would refuse only the resampling of a ViT's position embedding."""
    backbone = BACKBONES.get(decoder, "resnet18")
    overrides = [f"decoder={decoder}", f"backbone={backbone}", *shrunk(decoder, backbone), "regularizer=none"]
    with fake_cuda() as device:
        trainer, batch = make_trainer(device, tmp_path, *overrides)
        check_output(trainer, batch)
        device.check.counts.clear()
        torch.use_deterministic_algorithms(True)
        try:
            take_step(trainer, batch)
        finally:
            torch.use_deterministic_algorithms(False)
        refused = (
            {"_upsample_bicubic2d_aa_backward"} if decoder in ("dpt", "invpt", "linear") else set()
        )  # docs/training.md
        assert NO_DETERMINISTIC_KERNEL & set(device.check.counts) == refused


OPTIONS = {
    "diagnostics": ["trainer.ema=0.99"],
    "weighting=fixed": ["regularizer.weighting=fixed", "balancing=dwa", "balancing.every=1"],
    "weighting=head_gradient_norm": ["regularizer.weighting=head_gradient_norm", "backbone.trainable=frozen"],
    "detach_trunk": ["regularizer.detach_trunk=true", "optimizer=adam", "regularizer.stop_fraction=0.1"],
    "auxiliary": ["regularizer=auxiliary", "balancing=uncertainty", "trainer.grad_checkpointing=true"],
    "mtpsl": [
        "regularizer=mtpsl",
        "balancing=avg_norm",
        "trainer.clip_norm=null",
        "trainer.channels_last=false",
        "optimizer=sgd",
    ],
    "jtr": ["regularizer=jtr", "balancing=famo"],
    "fp16": ["trainer.precision=fp16", "balancing=avg_norm"],
    "pseudo_labels": ["regularizer=pseudo_labels", "balancing=db_mtl", "trainer.ema=0.99"],
}


QUICK_OPTIONS = ("diagnostics", "mtpsl", "fp16")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK_OPTIONS else pytest.mark.slow) for name in OPTIONS]
)
def test_a_step_of_each_option(name, tmp_path):
    """Take one step, and with diagnostics another: what balancing does later is tested by itself (test_parts)."""
    with fake_cuda() as device:
        trainer, batch = make_trainer(device, tmp_path, *SMALL, *OPTIONS[name])
        take_step(trainer, batch, with_diagnostics=name == "diagnostics")
        if name == "diagnostics":
            take_step(trainer, batch, batch)
        trainer.balancer.summary()
        assert device.check.counts["_local_scalar_dense"] == 0


def fake_built(device: Device, build, *arguments, **options):
    return device.fake_module(partial(build, **options), *arguments)


@pytest.mark.slow
def test_a_step_of_distillation(tmp_path):
    """Its teachers see renormalised images; one of them is resized, the other has aligners."""
    overrides = ["decoder=sak", *STUDENT, "regularizer=distillation", "backbone.mean=[0.4,0.5,0.6]"]
    with fake_cuda() as device, ExitStack() as patches:
        for name, build in {
            "mtcl.config.build_training.build_regularizer": build_regularizer,
            "mtcl.regularizers.distillation.build_teacher": build_teacher,
        }.items():  # drawing truncated weights reads numbers
            patches.enter_context(mock.patch(name, partial(fake_built, device, build)))
        trainer, batch = make_trainer(device, tmp_path, *overrides)
        assert {p.device for teacher in trainer.regularizer.teachers.values() for p in teacher.parameters()} == {CUDA}
        take_step(trainer, batch)
        take_step(trainer, batch, with_diagnostics=True)


PLANTED = {
    "a branch on data": (lambda x, valid, _: x[valid].mean() if valid.any() else x.sum(), DataDependentOutputException),
    "a number read": (lambda x, valid, _: x.sum() / valid.sum().item(), DataDependentOutputException),
    "a tensor on the CPU": (lambda x, valid, _: (x * torch.ones(x.shape)).mean(), FakeTensorDeviceMismatchError),
    "a tensor copied": (lambda x, valid, _: (x * torch.ones(x.shape).to(x)).mean(), HostWaitError),
    "half precision": (lambda x, valid, _: x.bfloat16().mean(), AssertionError),
}
PLANTED_HEADS = {
    "resize_trained": lambda x, size: resize(x, size).bfloat16(),
    "predict_fp32": lambda head, x: head(x).float(),  # the prediction is fp32, the head is not
}


def test_mistakes_are_found(tmp_path, monkeypatch):
    """In a loss and in a head; no mistake, no error."""
    with fake_cuda() as device:
        trainer, batch = make_trainer(device, tmp_path, *SMALL, "regularizer=none")
        check_output(trainer, batch)
        for name, head in PLANTED_HEADS.items():
            with monkeypatch.context() as patch:
                patch.setattr(f"mtcl.models.decoders.blocks.{name}", head)
                with pytest.raises(AssertionError):
                    check_output(trainer, batch)
        for mistake, error in PLANTED.values():
            with monkeypatch.context() as patch:
                patch.setattr("mtcl.losses.depth.masked_mean", mistake)
                with pytest.raises(error):
                    take_step(trainer, batch)
        take_step(trainer, batch)


def test_a_buffer_that_stays_on_the_host_is_found(tmp_path):
    with fake_cuda() as device:
        trainer, batch = make_trainer(device, tmp_path, *SMALL)
        buffer = trainer.regularizer.source_thresholds
        with device.may_wait():
            trainer.regularizer.source_thresholds = buffer.cpu()
        with pytest.raises((RuntimeError, AssertionError)):
            take_step(trainer, batch)
