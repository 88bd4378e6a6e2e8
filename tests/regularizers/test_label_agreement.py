"""The agreement of labels against a slow reference, and on labels whose agreement is known."""

import numpy as np
import pytest
import torch
from helpers.contrast_reference import NAMES, make_label, make_tasks, ref_distance, ref_label, ref_places

from mtcl.regularizers.label_agreement import measure_agreement
from mtcl.regularizers.pairs import choose_thresholds
from mtcl.regularizers.sampling import draw_pixels

SIZE, K, IDS = (7, 8), 12, ["a", "b", "c"]


def make_labels(seed):
    rng = np.random.default_rng(seed)
    return {name: make_label(name, ["random"] * 3, SIZE, rng) for name in NAMES}


def reference_share(kind, target, source, labels, thresholds, pixels):
    """Share of triplets in the right order: each anchor with the first positive and negative after it, in a circle."""
    right = total = 0
    for image, at in enumerate(pixels):
        places = ref_places(at, SIZE)
        donor = (image - 1) % len(pixels) if kind == "other_image" else image
        source_values = [
            at[i].tolist() if kind == "distance" else ref_label(source, labels[source], donor, p)
            for i, p in enumerate(places)
        ]
        near, far = (0.15, 0.3) if kind == "distance" else thresholds[source]

        def apart(i, j, source_values=source_values):
            return (
                np.hypot(*np.subtract(source_values[i], source_values[j]))
                if kind == "distance"
                else ref_distance(source, source_values[i], source_values[j])
            )

        target_values = [ref_label(target, labels[target], image, p) for p in places]
        for a in range(K):
            others = [
                j % K for j in range(a + 1, a + K) if places[j % K] != places[a] and source_values[j % K] is not None
            ]
            if source_values[a] is None:
                continue
            positive = next((j for j in others if apart(a, j) <= near), None)
            negative = next((j for j in others if apart(a, j) >= far), None)
            if (
                positive is None
                or negative is None
                or None in (target_values[a], target_values[positive], target_values[negative])
            ):
                continue
            d_ap, d_an = (ref_distance(target, target_values[a], target_values[j]) for j in (positive, negative))
            total += 1
            right += 0.5 if abs(d_ap - d_an) < 1e-6 else d_ap < d_an
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
