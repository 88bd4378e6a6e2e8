"""Task saliencies (regularizer=rep_mtl): both terms against a slow reference, second derivatives, partial labels."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.common import TINY, composed
from helpers.shrunken import DECODERS

from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_regularizer
from mtcl.errors import UserError
from mtcl.models.base import DenseOutput
from mtcl.regularizers import TaskSaliency
from mtcl.regularizers.task_loss import TaskLossOptions
from mtcl.tasks import build_task

WEIGHTS = {"one": 1.0, "two": 5.0, "three": 0.5}
UNLABELLED = {
    ("two", 0),
    ("one", 1),
    ("two", 1),
    ("three", 1),
    ("one", 2),
    ("three", 2),
}  # images with 2, 0, 1, 3, 3 tasks


class SquaredError(SimpleNamespace):
    """A task whose saliency at the input of a 1x1 convolution can be written down: NaN is void."""

    def valid(self, label):
        return label.isfinite().all(dim=1)

    def loss(self, prediction, label):
        error = (prediction - label.nan_to_num()) * label.isfinite()
        return error.square().sum() / label.isfinite().sum().clamp(min=1)


def make_case(views=1, batch=5, unlabelled=UNLABELLED, **options):
    """A shared map, a linear head per task, and labels that are missing for some (task, image)."""
    g = torch.Generator().manual_seed(0)
    tasks = {name: SquaredError(weight=weight) for name, weight in WEIGHTS.items()}
    z = torch.randn(batch, 4, 3, 5, generator=g, dtype=torch.float64).requires_grad_()
    heads = {n: torch.randn(2, 4, generator=g, dtype=torch.float64).requires_grad_() for n in tasks}
    labels = {n: torch.randn(batch, 2, 3, 5, generator=g, dtype=torch.float64) for n in tasks}
    for name, image in unlabelled:
        labels[name][image] = math.nan
    predictions = {n: torch.einsum("dc,bchw->bdhw", w, z) for n, w in heads.items()}
    regularizer = TaskSaliency(tasks, **{"temperature": 0.3, **options})
    regularizer.task_loss = TaskLossOptions(views_per_step=views)
    return regularizer, DenseOutput(predictions, {"trunk": dict.fromkeys(tasks, z)}, [], (3, 5)), labels, z, heads


def cosine(a, b):
    return (a * b).sum() / a.norm() / b.norm()


def reference_terms(labels, z, heads, temperature, views=1):
    """Equations 3 to 9 of the paper, image by image, cell by cell, with the matrices (C, C)."""
    batch, names = len(z), list(heads)
    labelled = [[n for n in names if labels[n][b].isfinite().all()] for b in range(batch)]
    saliency = {}
    for n in names:
        count = sum(labels[n][b].numel() for b in range(batch) if n in labelled[b])
        for b in range(batch):
            error = torch.einsum("dc,chw->dhw", heads[n], z[b]) - labels[n][b]
            saliency[n, b] = WEIGHTS[n] * 2 / max(count, 1) * torch.einsum("dhw,dc->chw", error, heads[n]).flatten(1)

    entropies = []
    for b in range(batch):
        for cell in range(15 if len(labelled[b]) > 1 else 0):
            size = torch.stack([saliency[n, b][:, cell].mean().abs() for n in labelled[b]])
            p = size / size.sum()
            entropies.append(-(p * p.log()).sum())

    anchors = {}
    for b in range(batch):
        if labelled[b]:
            a = torch.stack([saliency[n, b].mean(dim=1) for n in labelled[b]], dim=1)  # (C, T)
            anchors[b] = a @ a.T
    losses = []
    for b, anchor in anchors.items():
        others = [cosine(anchor, anchors[k]) for k in anchors if k % (batch // views) != b % (batch // views)]
        if others:
            denominator = sum((other / temperature).exp() for other in others)
            terms = [cosine(anchor, saliency[n, b] @ saliency[n, b].T) / temperature for n in labelled[b]]
            losses.append(sum(-(term.exp() / denominator).log() for term in terms) / len(terms))
    zero = 0.0 * z.sum()
    return sum(entropies, zero) / max(len(entropies), 1), sum(losses, zero) / max(len(losses), 1)


@pytest.mark.parametrize(
    "options",
    [
        {"unlabelled": ()},
        {},
        {"views": 2, "batch": 4, "unlabelled": {("two", 0), ("two", 2)}},
        {"unlabelled": {(n, b) for n in WEIGHTS for b in range(4)}},  # a single image with labels: no negatives
    ],
    ids=["all labels", "partial", "two views", "one image"],
)
def test_loss_and_second_derivatives_against_the_equations(options):
    regularizer, output, labels, z, heads = make_case(tsr_weight=0.7, csa_weight=1.3, **options)
    result = regularizer.compute_loss(output, labels, regularizer.sample(0, "abcde"))
    specific, alignment = reference_terms(labels, z, heads, 0.3, options.get("views", 1))
    torch.testing.assert_close(result.losses["specific"], specific)
    torch.testing.assert_close(result.losses["alignment"], alignment)
    torch.testing.assert_close(result.loss, 0.7 * specific + 1.3 * alignment)
    assert specific > 0
    leaves = [z, *heads.values()]
    want = torch.autograd.grad(0.7 * specific + 1.3 * alignment, leaves)
    for leaf, one, two in zip(leaves, torch.autograd.grad(result.loss, leaves), want):
        torch.testing.assert_close(one, two)
        assert leaf.grad is None
    assert regularizer.summary() == pytest.approx(
        {"specific": specific.item(), "alignment": alignment.item()}, rel=1e-5
    )
    assert regularizer.summary() == {}


def test_saliencies_are_of_the_views_that_have_losses():
    """With the losses on first views alone, the terms are those of a batch of these."""
    regularizer, output, labels, z, heads = make_case(views=2, batch=6, unlabelled={("two", 0), ("two", 5)})
    regularizer.task_loss = replace(regularizer.task_loss, views="first")
    result = regularizer.compute_loss(output, labels, regularizer.sample(0, "abcabc"))
    specific, alignment = reference_terms({n: label[:3] for n, label in labels.items()}, z[:3], heads, 0.3)
    torch.testing.assert_close(result.losses["specific"], specific)
    torch.testing.assert_close(result.losses["alignment"], alignment)


def test_without_a_gradient_the_values_are_the_same():
    """As where lambda is 0."""
    regularizer, output, labels, *_ = make_case()
    want = regularizer.compute_loss(output, labels, regularizer.sample(0, "abcde"))
    with torch.no_grad():
        result = regularizer.compute_loss(output, labels, regularizer.sample(0, "abcde"))
    assert not result.loss.requires_grad
    assert torch.equal(result.loss, want.loss)


def test_the_length_of_saliencies_does_not_matter():
    """Losses of large maps have gradients of 1e-9 and less."""
    losses = []
    for factor in (1.0, 1e-12):
        regularizer, output, labels, *_ = make_case()
        for task in regularizer.tasks.values():
            task.weight *= factor
        output = output._replace(predictions={n: x.float() for n, x in output.predictions.items()})
        losses.append(regularizer.compute_loss(output, labels, regularizer.sample(0, "abcde")).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_nothing_labelled_is_zero_with_a_graph():
    regularizer, output, labels, z, heads = make_case(unlabelled={(n, b) for n in WEIGHTS for b in range(5)})
    result = regularizer.compute_loss(output, labels, regularizer.sample(0, "abcde"))
    assert result.loss == 0
    result.loss.backward()
    for leaf in (z, *heads.values()):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def make_model(*overrides):
    chosen = TINY
    if any(override.startswith("decoder=") for override in overrides):
        chosen = [override for override in TINY if "decoder." not in override]
    if "decoder=deeplab" in overrides:
        chosen += DECODERS["deeplab"]
    config = composed(*chosen, "backbone.name=test_resnet", "regularizer=rep_mtl", *overrides)
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False).train()
    return tasks, model, build_regularizer(config, tasks, model)


@pytest.mark.parametrize(
    ("precision", "decoder"),
    [(torch.float32, []), (torch.bfloat16, []), (torch.float32, ["decoder=deeplab"])],
    ids=["fp32", "bf16", "deeplab"],
)
def test_every_weight_of_heads_and_backbone_has_a_gradient(precision, decoder):
    """Of the regulariser's loss alone, through real heads and losses. (The bias of a last layer may have none.)"""
    tasks, model, regularizer = make_model("tasks.names=[semseg,depth,normals,edge]", *decoder)
    g = torch.Generator().manual_seed(0)
    labels = {
        "semseg": torch.randint(0, 3, (3, 32, 64), generator=g),
        "depth": torch.rand(3, 1, 32, 64, generator=g) + 1,
        "normals": torch.nn.functional.normalize(torch.randn(3, 3, 32, 64, generator=g), dim=1),
        "edge": torch.rand(3, 1, 32, 64, generator=g).round(),
    }
    with torch.autocast("cpu", dtype=precision, enabled=precision is torch.bfloat16):
        output = model(torch.randn(3, 3, 32, 64, generator=g))
        task_loss = sum(task.loss(output.predictions[name], labels[name]) for name, task in tasks.items())
        loss = regularizer.compute_loss(output, labels, regularizer.sample(0, "abc")).loss
    assert loss.dtype == torch.float32
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim == 4}
    of_tasks = torch.autograd.grad(task_loss, weights.values(), retain_graph=True)
    gradients = torch.autograd.grad(loss, weights.values())
    for name, gradient, expected in zip(weights, gradients, of_tasks):
        assert gradient.isfinite().all(), name
        assert gradient.any() or not expected.any(), name
    for name in tasks:
        assert any(gradient.any() for weight, gradient in zip(weights, gradients) if f"heads.{name}." in weight)


def test_what_a_user_may_get_wrong():
    with pytest.raises(UserError, match="at least two tasks"):
        TaskSaliency({"depth": build_task("depth")})
    regularizer, output, labels, z, _ = make_case()
    separate = output._replace(features={"trunk": {name: z.clone() for name in WEIGHTS}})
    with pytest.raises(UserError, match=r"map that all tasks share.*its own feature trunk"):
        regularizer.compute_loss(separate, labels, regularizer.sample(0, "abcde"))


def test_a_map_that_nothing_trained_makes_is_refused():
    regularizer, output, labels, z, _ = make_case()
    frozen = output._replace(features={"trunk": dict.fromkeys(WEIGHTS, z.detach())})
    with pytest.raises(UserError, match=r"nothing that is trained comes before the feature trunk"):
        regularizer.compute_loss(frozen, labels, regularizer.sample(0, "abcde"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.compile=true", r"regularizer=rep_mtl .*trainer\.compile=false"),
        ("trainer.parallel=fsdp", r"regularizer=rep_mtl .*trainer\.parallel=ddp"),
        ("data.batch_size=1", r"regularizer=rep_mtl .*data\.batch_size of 2"),
        ("regularizer.options.feature=final", r"regularizer\.options\.feature=final .*options\.feature=trunk"),
        ("decoder=linear", r"regularizer=rep_mtl .*this decoder lacks; choose decoder=multi_head"),
    ],
)
def test_what_cannot_be_built_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        make_model("tasks.names=[semseg,depth]", override)
