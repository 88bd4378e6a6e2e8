"""Images weigh in the losses as the formulas say."""

import pytest
import torch

from mtcl.tasks import build_task
from mtcl.tasks.image_weights import weigh_images

TASKS = {name: build_task(name) for name in ("edge", "depth", "normals")}
# Of four images the first has all labels, the second two, the third one, the fourth none.
LABELLED = {"edge": [1, 0, 0, 0], "depth": [1, 1, 0, 0], "normals": [1, 1, 1, 0]}


def make_labels():
    void = {
        "edge": torch.full((4, 1, 2, 3), 255.0),
        "depth": torch.zeros(4, 1, 2, 3),
        "normals": torch.zeros(4, 3, 2, 3),
    }
    for name, flags in LABELLED.items():
        for image, flag in enumerate(flags):
            if flag:
                void[name][image, ..., 0, 0] = 1  # a single valid pixel makes a label
    return void


@pytest.mark.parametrize(
    ("weighting", "weigh"),
    [
        ("images", lambda name, image: 1 / sum(LABELLED[name])),
        ("tasks_per_label", lambda name, image: 3 / sum(LABELLED[task][image] for task in TASKS) / 3),
    ],
)
def test_weights_are_those_of_the_formula(weighting, weigh):
    weights = weigh_images(TASKS, make_labels(), weighting)
    for name in TASKS:
        want = [weigh(name, image) if flag else 0.0 for image, flag in enumerate(LABELLED[name])]
        assert weights[name].tolist() == pytest.approx(want)


def test_pixels_need_no_weights():
    assert weigh_images(TASKS, make_labels(), "pixels") == dict.fromkeys(TASKS)


@pytest.mark.parametrize("weighting", ["images", "tasks_per_label"])
def test_a_batch_without_labels_has_no_weights(weighting):
    labels = {
        name: torch.where(torch.ones_like(x, dtype=bool), TASKS[name].void, x) for name, x in make_labels().items()
    }
    assert all(not weight.any() for weight in weigh_images(TASKS, labels, weighting).values())
