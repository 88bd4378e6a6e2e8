"""Label discovery (regularizer=label_discovery): both terms against a slow reference, the door, refusals."""

import numpy as np
import pytest
import torch
from helpers.common import TINY, composed
from helpers.contrast_reference import make_label, make_tasks

from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_regularizer
from mtcl.errors import UserError
from mtcl.models.base import DenseOutput
from mtcl.regularizers import LabelDiscovery

NAMES = ("semseg", "depth", "normals")
LABELLED = [{"semseg"}, {"depth"}, {"normals", "depth"}]  # the tasks that each image has labels of


def make_case(**options):
    """A regulariser, an output in a graph with the teacher's features, partial labels, and the teacher's predictions.

    The frame is 8x8, the image 6x8; a cell of the feature maps has 2x2 pixels.
    """
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    tasks = make_tasks(NAMES)
    labels = {
        name: make_label(name, ["random" if name in names else "void" for names in LABELLED], (6, 8), rng)
        for name in NAMES
    }

    def draw(channels, *size):
        return {n: torch.randn(3, c, *size, generator=generator).double() for n, c in channels.items()}

    counts = {name: task.channels for name, task in tasks.items()}
    predictions, final = draw(counts, 6, 8), draw(dict.fromkeys(NAMES, 5), 4, 4)
    teacher_features = {
        "teacher_final": draw(dict.fromkeys(NAMES, 5), 4, 4),
        "teacher_relevance": draw(dict.fromkeys(NAMES, 1), 4, 4),
        "teacher_labels": draw({**counts, "depth": 3, "normals": 4}, 4, 4),
    }
    leaves = [*predictions.values(), *final.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    output = DenseOutput(predictions, {"final": final, **teacher_features}, [], (8, 8))
    regularizer = LabelDiscovery(tasks, **{"confidence": 0.4, "value_confidence": 0.8, **options}).double()
    return regularizer, output, labels, draw(counts, 6, 8), leaves


def reference(regularizer, output, labels, teacher, weights, thresholds):
    """The losses image by image and task by task, as the authors' code sums them."""
    total, tasks = 0.0, regularizer.tasks
    for b, names in enumerate(LABELLED):
        for name, task in tasks.items():
            difference = (output.features["final"][name][b] - output.features["teacher_final"][name][b]).square()
            if name in names:
                total = total + weights[1] * difference.mean()
                continue
            relevance = output.features["teacher_relevance"][name][b].sigmoid()
            total = total + weights[1] * (difference * relevance).mean()
            target = task.predict_label(teacher[name][b : b + 1].float(), thresholds[name]).to(labels[name])
            if name != "semseg":
                scores = output.features["teacher_labels"][name][b : b + 1]
                sure = (5 * scores).softmax(dim=1).max(dim=1, keepdim=True).values
                sure = torch.nn.functional.interpolate(sure, (8, 8), mode="bilinear")[:, :, :6]
                target = torch.where(sure >= thresholds[name], target, torch.zeros_like(target))
            valid = task.valid(target)
            assert 0 < valid.sum() < valid.numel()
            loss = task.loss(output.predictions[name][b : b + 1], target) * valid.float().mean()
            total = total + weights[0] * task.weight * loss
    return total * len(tasks) / len(LABELLED)


@pytest.mark.parametrize(
    ("weights", "task_confidences"), [((1.0, 1.0), None), ((2.0, 0.5), {"semseg": 0.5, "depth": None, "normals": 0.7})]
)
def test_loss_and_gradients_against_the_reference(weights, task_confidences):
    regularizer, output, labels, teacher, leaves = make_case(
        prediction_weight=weights[0], feature_weight=weights[1], task_confidences=task_confidences
    )
    result = regularizer.compute_loss(output, labels, regularizer.sample(0, "abc"), teacher)
    thresholds = {"semseg": 0.4, "depth": 0.8, "normals": 0.8}
    if task_confidences:
        thresholds |= {"semseg": 0.5, "normals": 0.7}
    expected = reference(regularizer, output, labels, teacher, weights, thresholds)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients, ref_gradients = (torch.autograd.grad(x, leaves) for x in (result.loss, expected))
    torch.testing.assert_close(gradients, ref_gradients, rtol=1e-4, atol=1e-7)


def test_without_a_teacher_it_is_a_zero_with_its_graph():
    regularizer, output, labels, _, leaves = make_case()
    output = output._replace(features={"final": output.features["final"]})
    loss = regularizer.compute_loss(output, labels, regularizer.sample(0, "abc")).loss
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, leaves))


def test_other_decoders_lack_relevance_and_labels_alone():
    regularizer, output, labels, teacher, _ = make_case()
    features = {name: output.features[name] for name in ("final", "teacher_final")}
    losses = regularizer.compute_loss(output._replace(features=features), labels, None, teacher).losses
    with_all = regularizer.compute_loss(output, labels, None, teacher).losses
    assert all(losses[name] > with_all[name] > 0 for name in NAMES)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"regularizer=label_discovery has the running mean .*set trainer\.ema=0\.999 trainer\.ema_warmup=true"),
        (["trainer.ema=0.9", "regularizer.options.value_confidence=1.5"], r"value_confidence=1\.5 must be"),
    ],
)
def test_refusals(overrides, message):
    config = composed(*TINY, "backbone.name=test_resnet", "regularizer=label_discovery", *overrides)
    tasks = build_tasks(config)
    with pytest.raises(UserError, match=message):
        build_regularizer(config, tasks, build_model(config, tasks, pretrained=False))
