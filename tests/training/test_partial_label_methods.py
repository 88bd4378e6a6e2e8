"""Check what every method for partial labels promises, built from its overrides, with one label per image.

The contrast keeps the same promises in integration/test_promises.py and test_promises_decoders.py.
"""

import copy
import math
import re
from collections.abc import Iterator
from itertools import chain
from statistics import mean, median

import pytest
import torch
from helpers.common import TINY, composed
from helpers.shrunken import shrunk
from omegaconf import OmegaConf

from mtcl.cli.train import find_unused_settings, log_setup
from mtcl.config.build_data import build_tasks
from mtcl.config.build_training import build_training_run
from mtcl.data import Batch
from mtcl.errors import UserError
from mtcl.evaluation.model_input import prepare_input
from mtcl.regularizers import CrossTaskConsistency, JointTaskRegularization, PseudoLabels
from mtcl.tasks import build_task
from mtcl.training.checkpoint import Checkpoint
from mtcl.training.train_step import CompiledModule
from mtcl.training.trainer import Trainer

TASKS = ("semseg", "depth", "normals")
COMMON = [override for override in TINY if not override.startswith(("decoder.", "regularizer="))]
COMMON += [f"tasks.names=[{','.join(TASKS)}]", "data.label_assignment=one", "trainer.val_interval=null"]
HEADS = ["decoder.width=8", "decoder.head_width=8"]
TWO_VIEWS = ["data.views_per_step=2", "loss.views=first"]
TEACHER = ["trainer.ema=0.5", "regularizer.start_fraction=0", "regularizer.options.confidence=0.1"]
DIFFUSION = ["decoder=diffusion_mtl", *shrunk("diffusion_mtl", "test_resnet"), "decoder.blocks=1", "regularizer=none"]
METHODS = {
    "pseudo_labels": ["regularizer=pseudo_labels", *TEACHER, *HEADS],
    "mtpsl": ["regularizer=mtpsl", *TWO_VIEWS, *HEADS],
    "jtr": ["regularizer=jtr", "regularizer.options.widths=[4]", *TWO_VIEWS, *HEADS],
    "rep_mtl": ["regularizer=rep_mtl", *HEADS],
    "diffusion of features": DIFFUSION,
    "diffusion of predictions": [*DIFFUSION, "decoder.denoise=predictions"],
    "task tokens": [
        *("decoder=task_tokens", *shrunk("task_tokens", "test_resnet")),
        *("regularizer=label_discovery", *TEACHER, "regularizer.options.value_confidence=0.01"),
    ],
}


def make_trainer(folder, method: str, start_step: int = 0, **settings) -> Trainer:
    """Build a trainer in training mode; ``settings`` are keys of the config with ``__`` for the dot."""
    config = composed(*COMMON, *METHODS[method])  # composing takes as long as building, so it is done once a method
    for key, value in settings.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    torch.manual_seed(start_step)
    run = build_training_run(config, build_tasks(config), folder, torch.device("cpu"), start_step=start_step)
    run.trainer.model.train()
    return run.trainer


def take_steps(trainer: Trainer, batches: Iterator[list[Batch]], count: int) -> list[dict[str, float]]:
    """Take training steps on the next batches and return their losses."""
    losses = []
    for _ in range(count):
        losses.append({name: value.item() for name, value in trainer.train_step(*next(batches)).items()})
        trainer.step += 1
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_bf16_and_resuming(method, tmp_path):
    """Losses and gradients are finite; a resumed run ends bit for bit as the uncut one; the model has no part of the
    regulariser."""
    options = {"trainer__precision": "bf16", "trainer__max_steps": 4}
    uncut = make_trainer(tmp_path, method, **options)
    batches = uncut.batches_per_step()
    losses = take_steps(uncut, batches, 1)
    checkpoint = Checkpoint.from_dict(copy.deepcopy(uncut.checkpoint().to_dict()))
    losses += take_steps(uncut, batches, 1)
    assert all(math.isfinite(value) for values in losses for value in values.values())
    assert not uncut.nonfinite_guard.flush(), "a gradient was not finite"
    if uncut.regularizer is None:
        assert method.startswith("diffusion")
    else:
        assert all(values["regularizer"] != 0 for values in losses)
        views = (2, "first") if method in ("mtpsl", "jtr") else (1, "all")
        assert (uncut.regularizer.task_loss.views_per_step, uncut.regularizer.task_loss.views) == views
        state = uncut.regularizer.state_dict()
        assert not state or any(not torch.equal(checkpoint.regularizer[name], state[name]) for name in state)
        in_model = {id(x) for x in chain(uncut.model.modules(), uncut.model.parameters(), uncut.model.buffers())}
        regularizer = uncut.regularizer
        parts = chain(regularizer.modules(), regularizer.parameters(), regularizer.buffers())
        assert in_model.isdisjoint(map(id, parts))

    resumed = make_trainer(tmp_path, method, start_step=1, **options)
    resumed.restore(checkpoint)
    assert take_steps(resumed, resumed.batches_per_step(), 1) == losses[1:]
    one, two = uncut.checkpoint().to_dict(), resumed.checkpoint().to_dict()
    for part in ("model", "regularizer", "ema", "optimizer"):
        torch.testing.assert_close(two[part], one[part], rtol=0, atol=0)


# Tracing takes seconds, most of them for backward passes, which is left out for the largest decoder. The losses of
# pseudo_labels are part of those of task tokens; the other diffusion differs by a layer; rep_mtl refuses compiling.
BACKENDS = {"mtpsl": "aot_eager", "jtr": "aot_eager", "diffusion of predictions": "aot_eager", "task tokens": "eager"}


@pytest.mark.slow
@pytest.mark.parametrize("method", BACKENDS)
def test_compiled_steps_are_the_eager_ones(method, tmp_path, caplog, monkeypatch):
    """Losses and gradients, teacher and noise included, behind a backbone that has run."""
    monkeypatch.setattr(CompiledModule, "backend", BACKENDS[method])

    def encode(batch, model, device):
        image, labels = prepare_input(batch, model, device)
        with torch.no_grad():
            return model.encode(image), labels

    monkeypatch.setattr("mtcl.training.trainer.prepare_input", encode)
    results = []
    for is_compiled in (False, True):
        torch._dynamo.reset()
        trainer = make_trainer(tmp_path, method, trainer__compile=is_compiled, tasks__names=["semseg", "depth"])
        batch = next(iter(trainer.batches))
        torch.manual_seed(5)
        losses = trainer.accumulate_gradients(batch, 1, {}, with_diagnostics=False)
        gradients = {n: p.grad for n, p in trainer.eager_step.named_parameters() if p.grad is not None}
        results.append((losses, gradients))
    torch._dynamo.reset()
    assert "continues without it" not in caplog.text
    (losses, gradients), (compiled_losses, compiled_gradients) = results
    torch.testing.assert_close(compiled_losses, losses, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == compiled_gradients.keys()
    for name, gradient in gradients.items():
        assert (compiled_gradients[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method != "diffusion of features"])
def test_every_method_overfits_a_batch(method, tmp_path):
    """Two images with a label of each task, seen 30 times. Decoders alone: integration/test_promises_decoders.py."""
    options = {"data__batch_size": 6, "data__limit": 6, "trainer__max_steps": 30, "schedule__name": "constant"}
    trainer = make_trainer(tmp_path, method, optimizer__lr=4e-3 if method == "task tokens" else 1e-2, **options)
    batch = next(iter(trainer.batches))
    assert all(trainer.tasks[name].valid(batch["labels"][name]).any() for name in TASKS)
    history = take_steps(trainer, iter([[batch]] * 30), 30)
    part = mean(median(losses[name] for losses in history[-5:]) / history[0][name] for name in TASKS)
    assert part < 0.75  # between 0.2 and 0.7; Rep-MTL's terms draw against the tasks' losses, and one alone may rise


@pytest.mark.parametrize("method", ["mtpsl", "jtr", "rep_mtl", "label_discovery"])
def test_methods_of_several_tasks_refuse_one(method, tmp_path):
    """... before the labels that each image keeps are chosen, which one task alone can't be."""
    config = composed(*COMMON, f"regularizer={method}", "tasks.names=[depth]", *HEADS)
    with pytest.raises(UserError, match=rf"regularizer={method} needs 2 tasks .*\[depth\] has 1; set regularizer=none"):
        build_training_run(config, build_tasks(config), tmp_path, torch.device("cpu"))


def test_pseudo_labels_train_a_single_task(tmp_path, caplog):
    """Check also the sentence that they have nothing to do where all images keep the label."""
    config = composed(*COMMON, *METHODS["pseudo_labels"])
    OmegaConf.update(config, "tasks.names", ["depth"])
    OmegaConf.update(config, "data.label_assignment", "full")
    OmegaConf.update(config, "data.label_fractions", {"depth": 0.5})
    torch.manual_seed(0)
    run = build_training_run(config, build_tasks(config), tmp_path, torch.device("cpu"))
    batches = run.trainer.batches_per_step()
    run.trainer.model.train()
    values = take_steps(run.trainer, batches, 2)
    assert any(losses["regularizer"] > 0 for losses in values)
    log_setup(config, run.trainer, run.train_dataset, run.val_dataset, is_fresh=False)
    assert "pseudo-labels" not in caplog.text
    log_setup(config, run.trainer, run.train_dataset.dataset, run.val_dataset, is_fresh=False)
    assert caplog.text.count("the pseudo-labels of regularizer=pseudo_labels are for images that lack") == 1


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("none", ["loss.views=first", "data.views_per_step=2"], "computes the second views of the images for nothing"),
        ("pseudo_labels", ["loss.views=first"], r"from second views only where labels are missing; loss\.views=all"),
        ("jtr", ["data.views=2"], r"data\.views=2 is .*data\.views_per_step=2 loss\.views=first"),
        ("none", ["data.label_tasks=[depth,edge]", "data.label_assignment=full"], r"data\.label_tasks has no effect"),
        ("mtpsl", TWO_VIEWS, None),
    ],
)
def test_settings_without_a_use_are_named(method, overrides, message):
    classes = {"pseudo_labels": PseudoLabels, "jtr": JointTaskRegularization, "mtpsl": CrossTaskConsistency}
    tasks = {name: build_task(name) for name in ("depth", "edge")}
    regularizer = classes[method](tasks, dict.fromkeys(tasks, 4)) if method in classes else None
    problems = find_unused_settings(composed(*COMMON, f"regularizer={method}", *overrides), regularizer)
    assert len(problems) == (message is not None)
    assert all(re.search(message, problem) for problem in problems)


def reduce_by_hand(task, prediction, label, rule, num_labels):
    """Average the losses of single images by the rule; ``num_labels``: of each image."""
    images = [i for i in range(len(label)) if task.valid(label[i : i + 1]).any()]
    losses = torch.stack([task.loss(prediction[i : i + 1], label[i : i + 1]) for i in images])
    if rule == "pixels":
        weights = torch.stack([task.valid(label[i : i + 1]).sum() for i in images]).float()
        return (weights * losses).sum() / weights.sum()
    if rule == "images":
        return losses.mean()
    return sum(len(TASKS) / num_labels[i] * loss for i, loss in zip(images, losses)) / sum(n > 0 for n in num_labels)


@pytest.mark.parametrize("rule", ["pixels", "images", "tasks_per_label"])
def test_images_count_by_the_rule_of_the_config(rule, tmp_path):
    """The losses of a step and the saliencies of rep_mtl, which are of the same losses, against sums by hand."""
    trainer = make_trainer(
        tmp_path, "rep_mtl", loss__image_weighting=rule, data__batch_size=4, data__label_assignment="full"
    )
    batch = next(iter(trainer.batches))
    labels = {name: label.clone() for name, label in batch["labels"].items()}
    for name, image in [("semseg", 1), ("normals", 1), ("depth", 2), *((name, 3) for name in TASKS)]:
        labels[name][image] = trainer.tasks[name].void
    for name, label in labels.items():
        label[0, ..., 10:] = trainer.tasks[name].void  # most columns
    outputs = []
    hook = trainer.model.register_forward_hook(lambda model, args, output: outputs.append(output))
    output = trainer.model(prepare_input(batch, trainer.model, trainer.device)[0])
    saliencies = trainer.regularizer.measure_saliencies(output, labels)
    for (name, task), saliency in zip(trainer.tasks.items(), saliencies, strict=True):
        loss = task.weight * reduce_by_hand(task, output.predictions[name], labels[name], rule, [3, 1, 2, 0])
        (gradient,) = torch.autograd.grad(loss, output.features["trunk"][name], retain_graph=True)
        torch.testing.assert_close(saliency, gradient.flatten(2))
    values = trainer.train_step({**batch, "labels": labels})
    hook.remove()
    for name, task in trainer.tasks.items():
        expected = reduce_by_hand(task, outputs[-1].predictions[name], labels[name], rule, [3, 1, 2, 0])
        torch.testing.assert_close(values[name], expected.detach())


def test_a_decoders_own_errors_count_as_the_task_does(tmp_path):
    """Use three images: the first has all labels, the second that of depth alone, the third lacks it."""
    settings = {"loss__image_weighting": "tasks_per_label", "data__label_assignment": "full", "data__batch_size": 3}
    trainer = make_trainer(tmp_path, "task tokens", **settings)
    batch = next(iter(trainer.batches))
    labels = {name: label.clone() for name, label in batch["labels"].items()}
    for name, image in [("semseg", 1), ("normals", 1), ("depth", 2)]:
        labels[name][image] = trainer.tasks[name].void
    labels["depth"][0, ..., 10:] = trainer.tasks["depth"].void  # pixels do not count, images do
    output = trainer.model(prepare_input(batch, trainer.model, trainer.device)[0])
    errors, is_valid = trainer.model.compute_task_errors(output, labels)["depth"]
    means = [errors[i][is_valid[i]].mean() for i in range(2)]
    num_labels = [3, 1, 2]
    expected = reduce_by_hand(
        trainer.tasks["depth"], output.predictions["depth"], labels["depth"], "tasks_per_label", num_labels
    )
    expected = expected + (3 / 3 * means[0] + 3 / 1 * means[1]) / 3
    losses = trainer.task_losses(output, labels)
    torch.testing.assert_close(losses["depth"], expected)
    labels["depth"][:] = trainer.tasks["depth"].void
    nothing = trainer.task_losses(output, labels)["depth"]
    assert (nothing.item(), nothing.requires_grad) == (0, True)
