"""Pseudo-labels (regularizer=pseudo_labels): the loss against a slow reference, what it leaves alone, refusals."""

import math

import numpy as np
import pytest
import torch
from helpers.common import TINY, composed
from helpers.contrast_reference import make_label, make_tasks

from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_regularizer, build_training_run
from mtcl.data.sample import SampleMeta
from mtcl.errors import UserError
from mtcl.models.base import DenseOutput
from mtcl.regularizers import PseudoLabels
from mtcl.regularizers.task_loss import TaskLossOptions
from mtcl.tasks import build_task

NAMES = ("semseg", "depth", "normals", "edge", "sal")
ONE_LABEL = [[name] for name in NAMES[:3]] + [[]]  # images that have the labels of these tasks
CONFIDENCE = 0.6


def make_case(labelled=ONE_LABEL, intermediate=True, **options):
    """A regulariser, an output in a graph, partial labels, and a teacher whose last column is padding."""
    generator, rng, size = torch.Generator().manual_seed(0), np.random.default_rng(0), (5, 6)
    tasks = make_tasks(NAMES)

    def make_maps():
        shape = {name: (len(labelled), task.channels, *size) for name, task in tasks.items()}
        return {name: 2 * torch.randn(s, generator=generator).double() for name, s in shape.items()}

    labels = {}
    for name in NAMES:
        kinds = ["random" if name in names else "void" for names in labelled]
        labels[name] = make_label("semseg" if name == "sal" else name, kinds, size, rng)
    labels["sal"] = torch.where(labels["sal"] == 2, 1, labels["sal"])
    predictions, between, teacher = make_maps(), make_maps(), make_maps()
    for maps in teacher.values():
        maps[..., -1] = math.nan
    leaves = [*predictions.values(), *between.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    output = DenseOutput(predictions, {}, [between] if intermediate else [], size)
    regularizer = PseudoLabels(tasks, **{"confidence": CONFIDENCE, **options}).double()
    regularizer.task_loss = TaskLossOptions(intermediate_weight=0.5)
    return regularizer, output, labels, teacher, leaves


def reference(regularizer, output, labels, teacher):
    """The mean over the pixels of images without the label, one pixel after the other: task -> (loss, share)."""
    results = {}
    for name, task in regularizer.tasks.items():
        images = [b for b in range(len(teacher[name])) if not task.valid(labels[name][b : b + 1]).any()]
        pixels = [(b, i, j) for b in images for i in range(5) for j in range(5)]  # the sixth column is padding
        targets = {
            p: target for p in pixels if (target := ref_target(task, teacher[name][p[0], :, p[1], p[2]])) is not None
        }
        losses = []
        for weight, maps in [(1.0, output.predictions), *((0.5, maps) for maps in output.intermediate)]:
            negatives = sum(target == 0 for target in targets.values()) if name == "sal" else 0
            share = negatives / max(len(targets), 1)
            for p, target in targets.items():
                losses.append(weight * ref_loss(task, maps[name][p[0], :, p[1], p[2]], target, share))
        results[name] = (task.weight * sum(losses) / max(len(pixels), 1), len(targets) / max(len(pixels), 1))
    return results


def ref_target(task, raw):
    """Return the label that a teacher's raw prediction of a pixel says; None: none."""
    if task.name in ("semseg", "sal"):
        probability = raw.exp() / raw.exp().sum()
        best = max(range(len(raw)), key=lambda c: probability[c].item())
        return best if probability[best] >= CONFIDENCE else None
    if task.name == "depth":
        return raw.item() if raw > 0 else None
    if task.name == "normals":
        return raw / raw.norm()
    odds = raw.exp() / 19  # 0.95 / 0.05: edges count 19 times in the loss
    return (odds / (1 + odds)).item()


def ref_loss(task, raw, target, share_of_zeros):
    if task.name == "semseg":
        return raw.exp().sum().log() - raw[target]
    if task.name == "sal":
        return (share_of_zeros if target else 1 - share_of_zeros) * (raw.exp().sum().log() - raw[target])
    if task.name == "depth":
        return (raw[0] - target).abs()
    if task.name == "normals":
        return (raw / raw.norm() - target).abs().sum()
    probability = 1 / (1 + (-raw[0]).exp())
    return -0.95 * target * probability.log() - 0.05 * (1 - target) * (1 - probability).log()


def test_loss_gradients_and_log_against_the_reference():
    regularizer, output, labels, teacher, leaves = make_case()
    result = regularizer.compute_loss(output, labels, regularizer.sample(0, "abcd"), teacher)
    expected = reference(regularizer, output, labels, teacher)
    for name, (loss, _) in expected.items():
        assert result.losses[name].item() == pytest.approx(loss.item(), rel=1e-5), name
    total = sum(loss for loss, _ in expected.values())
    gradients, ref_gradients = (torch.autograd.grad(x, leaves) for x in (result.loss, total))
    torch.testing.assert_close(gradients, ref_gradients, rtol=1e-4, atol=1e-7)
    summary = regularizer.summary()
    assert summary == pytest.approx(
        {
            f"{n}/{k}": float(torch.as_tensor(x).detach())
            for n, row in expected.items()
            for k, x in zip(("loss", "share"), row)
        },
        rel=1e-5,
    )
    assert 0 < summary["semseg/share"] < 1
    assert regularizer.summary() == {}


@pytest.mark.parametrize("without", ["images", "teacher", "confidence"])
def test_nothing_to_learn_from_is_a_zero_with_its_graph(without):
    labelled = [NAMES] * 4 if without == "images" else ONE_LABEL
    regularizer, output, labels, teacher, leaves = make_case(labelled, confidence=1.0)
    if without == "confidence":
        labels = {name: labels[name] for name in ("semseg", "sal")}
        regularizer.tasks = {name: regularizer.tasks[name] for name in labels}
        regularizer.sums = regularizer.sums[:2]
    result = regularizer.compute_loss(
        output, labels, regularizer.sample(0, "abcd"), None if without == "teacher" else teacher
    )
    assert result.loss == 0
    gradients = torch.autograd.grad(result.loss, leaves, allow_unused=True)
    assert sum(gradient is not None for gradient in gradients) == 2 * len(regularizer.tasks)
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("name", ["depth", "normals", "edge"])
def test_agreeing_with_the_teacher_is_a_minimum(name):
    """A value is learned as it is; edges, too, although their loss counts them 19 times."""
    regularizer, output, labels, teacher, _ = make_case([[]], intermediate=False)
    prediction = teacher[name].nan_to_num(1.0).abs().requires_grad_()
    output = output._replace(predictions=output.predictions | {name: prediction})
    teacher = teacher | {name: prediction.detach()}
    loss = regularizer.compute_loss(output, labels, regularizer.sample(0, "a"), teacher).losses[name]
    gradient = torch.autograd.grad(loss, prediction)[0]
    if name == "edge":
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)
        for change in (-0.5, 0.5):
            moved = output._replace(predictions=output.predictions | {name: prediction + change})
            assert regularizer.compute_loss(moved, labels, regularizer.sample(0, "a"), teacher).losses[name] > loss
    else:
        assert loss.item() == pytest.approx(0, abs=1e-5)


def test_draws_nothing_and_has_no_parameters():
    regularizer, output, labels, teacher, _ = make_case()
    state = torch.get_rng_state()
    draw = regularizer.sample(3, "abcd")
    regularizer.compute_loss(output, labels, draw, teacher)
    assert torch.equal(state, torch.get_rng_state())
    assert (draw.sources.numel(), draw.pixels.numel()) == (0, 0)
    assert list(regularizer.parameters()) == []
    assert regularizer.state_dict() == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"regularizer=pseudo_labels has the running mean .*set trainer\.ema=0\.999"),
        (["trainer.ema=0.9", "regularizer.options.confidence=1.5"], r"confidence=1\.5 must be"),
    ],
)
def test_refusals(overrides, message):
    config = composed(*TINY, "backbone.name=test_resnet", "regularizer=pseudo_labels", *overrides)
    tasks = build_tasks(config)
    with pytest.raises(UserError, match=message):
        build_regularizer(config, tasks, build_model(config, tasks, pretrained=False))


def make_trainer(folder, *overrides):
    options = [*TINY, "backbone.name=test_resnet", "trainer.ema=0.5", "data.label_assignment=one"]
    options += ["data.augment.scale=[0.5,0.5]", "trainer.num_panels=0"]
    start = [] if "regularizer=none" in overrides else ["regularizer.start_fraction=0"]
    config = composed(*options, *start, *overrides)
    torch.manual_seed(0)
    trainer = build_training_run(config, build_tasks(config), folder, torch.device("cpu")).trainer
    trainer.model.train()
    return trainer


def test_weight_zero_is_bit_equal_to_none_and_others_learn(tmp_path):
    states, batch = [], None
    for overrides in (["=none"], ["=pseudo_labels", "regularizer.weight=0"], ["=pseudo_labels"]):
        trainer = make_trainer(tmp_path, f"regularizer{overrides[0]}", *overrides[1:])
        batch = next(iter(trainer.batches)) if batch is None else batch
        trainer.train_step(batch)
        states.append(trainer.model.state_dict())
    none, zero, trained = states
    assert all(torch.equal(none[name], zero[name]) for name in none)
    assert any(not torch.equal(none[name], trained[name]) for name in none)
    assert zero.keys() == trained.keys()


def test_the_teacher_predicts_nothing_in_padding(tmp_path):
    trainer = make_trainer(tmp_path, "regularizer=pseudo_labels")
    batch = next(iter(trainer.batches))
    (row, column), (height, width) = batch["meta"][0].offset, batch["meta"][0].native_size
    frame = batch["image"].shape[-2:]
    assert height < frame[0]
    image = torch.zeros(len(batch["meta"]), 3, *frame)
    predictions = trainer._predict_by_teacher(image, batch["meta"]).predictions
    for prediction in predictions.values():
        inside = prediction[0, :, row : row + height, column : column + width]
        assert inside.isfinite().all()
        assert prediction[0].isnan().sum() == prediction[0].numel() - inside.numel()
    unpadded = [SampleMeta("a", tuple(frame), (0, 0))] * len(image)
    assert all(maps.isfinite().all() for maps in trainer._predict_by_teacher(image, unpadded).predictions.values())


def test_classes_of_every_pixel_count_without_a_threshold():
    task = build_task("human_parts")
    label = task.predict_label(torch.zeros(1, task.channels, 2, 2), 0.0)
    assert task.valid(label).all()
