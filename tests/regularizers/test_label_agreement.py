"""The agreement of labels against a slow reference, and on labels whose agreement is known."""

import numpy as np
import pytest
import torch
from helpers.contrast_reference import NAMES, make_label, make_tasks, reference_right_orders

from mtcl.regularizers.label_agreement import measure_agreement
from mtcl.regularizers.pairs import choose_thresholds
from mtcl.regularizers.sampling import draw_pixels

SIZE, K, IDS = (7, 8), 12, ["a", "b", "c"]


def make_labels(seed):
    rng = np.random.default_rng(seed)
    return {name: make_label(name, ["random"] * 3, SIZE, rng) for name in NAMES}


def reference_share(*args):
    right, total = reference_right_orders(*args)
    return right / total


def test_agreement_is_that_of_the_reference():
    tasks, labels = make_tasks(), make_labels(0)
    thresholds = choose_thresholds(tasks, {})
    agreement = measure_agreement([(IDS, labels)], tasks, thresholds, K, seed=3)
    pixels = draw_pixels(3, 0, IDS, K)
    for t, target in enumerate(NAMES):
        assert agreement.distance[t].item() == pytest.approx(
            reference_share("distance", target, None, labels, thresholds, pixels), abs=0.03
        )
        for s, source in enumerate(NAMES):
            for kind, share in (("source", agreement.source), ("other_image", agreement.other_image)):
                expected = reference_share(kind, target, source, labels, thresholds, pixels)
                assert share[t, s].item() == pytest.approx(expected, abs=0.03), (kind, target, source)


def test_equal_labels_agree_wholly_and_missing_ones_are_no_number():
    tasks = make_tasks(("semseg", "edge"))
    label = (torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    thresholds = choose_thresholds(tasks, {})
    agreement = measure_agreement([(["a", "b"], {"semseg": label[:, 0].long(), "edge": label})], tasks, thresholds, 32)
    assert torch.equal(agreement.source, torch.ones(2, 2, dtype=torch.float64))
    assert (agreement.other_image < 0.7).all()
    void = torch.full_like(label, 255)
    agreement = measure_agreement([(["a", "b"], {"semseg": label[:, 0].long(), "edge": void})], tasks, thresholds, 32)
    assert agreement.source.isnan().tolist() == [[False, True], [True, True]]
