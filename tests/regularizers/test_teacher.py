"""A teacher's predictions as labels of sources: where they stand in, and what stays as without."""

import math

import pytest
import torch
from helpers.common import TINY, composed
from helpers.contrast_reference import NAMES, make_case

from mtcl import UserError
from mtcl.cli.train import train
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_regularizer
from mtcl.regularizers import AuxiliaryHeads
from mtcl.training.checkpoint_file import read_checkpoint_file

CHANNELS = {"semseg": 3, "depth": 1, "normals": 3, "edge": 1}
ONE_LABEL = {name: ["random" if i % 2 == k else "void" for k in range(2)] for i, name in enumerate(NAMES)}


def make_predictions(labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = next(iter(labels.values())).shape[-2:]
    raw = {name: torch.randn(2, c, *size, generator=generator) for name, c in CHANNELS.items()}
    return raw | {"depth": raw["depth"].exp()}


def fill(regularizer, labels, predictions):
    """Return label maps in which each image without a label of a task has the prediction's."""
    filled = {}
    for name, label in labels.items():
        task, raw = regularizer.tasks[name], predictions[name]
        predicted = task.to_label(raw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).reshape(label.shape)
        filled[name] = label.clone()
        for image in range(len(label)):
            if not task.valid(label[image : image + 1]).any():
                filled[name][image] = predicted[image].to(label)
    return filled


@pytest.mark.parametrize("options", [{}, {"criterion": "boundary"}, {"class_balanced": True}], ids=str)
def test_predictions_stand_in_where_an_image_has_no_label(options):
    with_teacher, features, labels, draw, frame = make_case(kinds=ONE_LABEL, pixels=16, teacher=True, **options)
    plain, *_ = make_case(kinds=ONE_LABEL, pixels=16, **options)
    predictions = make_predictions(labels)
    losses = with_teacher(features, labels, draw, frame, teacher=predictions).losses
    filled = fill(plain, labels, predictions)
    expected = plain(features, filled, draw, frame).losses
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    without = plain(features, labels, draw, frame).losses
    assert any(not torch.equal(losses[name], without[name]) for name in expected)
    assert with_teacher.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("method", ["contrast", "heads"])
def test_heads_have_the_labels_of_the_contrast_and_nothing_in_padding(method):
    contrast, features, labels, draw, frame = make_case(kinds=ONE_LABEL, pixels=40, teacher=True)
    channels = {name: maps.shape[1] for name, maps in features.items()}
    heads = AuxiliaryHeads(contrast.tasks, channels, num_pixels=40, teacher=True)
    predictions = make_predictions(labels)
    filled = fill(contrast, labels, predictions)
    for name in NAMES:
        predictions[name][..., -3:] = math.nan
        missing = ~contrast.tasks[name].valid(labels[name]).flatten(1).any(dim=1)
        filled[name][missing, ..., -3:] = contrast.tasks[name].void
    regularizer = contrast if method == "contrast" else heads
    assert regularizer.uses_teacher
    losses = regularizer(features, labels, draw, frame, teacher=predictions).losses
    expected = regularizer(features, filled, draw, frame).losses
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    without = regularizer(features, labels, draw, frame).losses
    assert any(not torch.equal(losses[name], without[name]) for name in expected)


def test_labels_of_the_target_and_of_the_image_come_first():
    regularizer, _, labels, draw, _ = make_case(kinds=ONE_LABEL, pixels=16, teacher=True)
    predictions, size = make_predictions(labels), labels["edge"].shape[-2:]
    read = regularizer.label_reader.read(labels, draw, regularizer.target, size, predictions)
    plain = regularizer.label_reader.read(labels, draw, regularizer.target, size)
    assert torch.equal(read.target_label.nan_to_num(9), plain.target_label.nan_to_num(9))
    assert torch.equal(read.source[..., 0], draw.sources[:, :1].expand(-1, 2))  # the one that was drawn
    same = read.source == plain.source
    assert 0 < same.sum() < same.numel()
    assert torch.equal((read.valid & same), (plain.valid & same))


def test_with_all_labels_nothing_changes():
    regularizer, features, labels, draw, frame = make_case(pixels=16, teacher=True)
    got = regularizer(features, labels, draw, frame, teacher=make_predictions(labels))
    expected = regularizer(features, labels, draw, frame)
    assert torch.equal(got.loss, expected.loss)
    assert got.loss > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"options\.teacher=true has the running mean .*set trainer\.ema=0\.999"),
        (
            ["trainer.ema=0.9", "regularizer.options.source_labels=distance"],
            r"options\.teacher=true needs source_labels",
        ),
    ],
)
def test_what_a_teacher_cannot_be_combined_with_is_refused(overrides, message):
    config = composed(*TINY, "backbone.name=test_resnet", "regularizer.options.teacher=true", *overrides)
    tasks = build_tasks(config)
    with pytest.raises(UserError, match=message):
        build_regularizer(config, tasks, build_model(config, tasks, pretrained=False))


@pytest.mark.slow
def test_training_with_a_teacher_continues_bit_exactly_and_changes_nothing_with_all_labels(tmp_path):
    options = [*TINY, "backbone.name=test_resnet", "schedule=constant", "trainer.validate_first=false", "data.limit=6"]
    options += ["trainer.num_panels=0", "trainer.val_interval=null", "trainer.checkpoint_interval=null"]
    options += ["trainer.ema=0.5", "trainer.max_steps=2", "regularizer.weighting=fixed"]
    options += ["tasks.names=[semseg,depth,normals]"]  # no image of rooms is void in all of these

    def run(name, *overrides):
        train(composed(*options, *overrides), tmp_path / name)
        return read_checkpoint_file(tmp_path / name / "checkpoints" / "last.pt")

    def equal(a, b):
        return all(torch.equal(a[part][key], b[part][key]) for part in ("model", "regularizer") for key in a[part])

    partial, teacher = "data.label_assignment=one", "regularizer.options.teacher=true"
    uncut, plain = run("uncut", partial, teacher), run("plain", partial)
    assert uncut["model"].keys() == plain["model"].keys()
    assert not equal(uncut, plain)
    run("cut", partial, teacher, "trainer.max_steps=1")
    assert equal(uncut, run("cut", partial, teacher, "resume=auto"))
    assert equal(run("all", teacher), run("all_plain"))
