"""Cityscapes in MTAN's layout, and the task of inverse depth."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.common import TINY, composed
from helpers.mtan_miniature import make_arrays, write_release

from mtcl import UserError
from mtcl.cli.train import train
from mtcl.config.build_data import build_dataset, build_tasks
from mtcl.config.build_evaluator import construct_metric
from mtcl.config.resolve import plain
from mtcl.config.schema import check_config
from mtcl.data import CityscapesMTL
from mtcl.inference.map_files import describe_values, write_map
from mtcl.tasks import CITYSCAPES7, CITYSCAPES19, build_task

DEPTH = build_task("depth", inverse=True)


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    return write_release(tmp_path / "cityscapes2", num_classes=7, inverse=True)


def test_labels_have_their_stored_values(cityscapes):
    config = composed("data=cityscapes_mtl", f"data.root={cityscapes.parent}", "data.cache=null", "evaluation=mtan")
    check_config(plain(config))
    tasks = build_tasks(config)
    assert tasks["semseg"].classes == CITYSCAPES7
    for subset, start in (("train", 0), ("val", 1000)):
        sample = build_dataset(config, subset, tasks).read(1)
        stored = make_arrays(start + 1, 7, (6, 8), inverse=True)
        assert set(sample.labels) == {"semseg", "depth"}
        np.testing.assert_array_equal(sample.image, np.round(255 * stored["image"]))
        np.testing.assert_array_equal(sample.labels["semseg"], np.where(stored["label"] < 0, 255, stored["label"]))
        np.testing.assert_array_equal(sample.labels["depth"], stored["depth"][..., 0])


def test_nineteen_classes_are_in_a_folder_of_their_number_or_in_label(cityscapes):
    classes = np.arange(48).reshape(6, 8) % 19
    for number in range(3):
        path = cityscapes / "train" / "label_19" / f"{number}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, classes)
    of_19 = CityscapesMTL(cityscapes, "train", ["semseg"], num_classes=19)
    np.testing.assert_array_equal(of_19.read(0).labels["semseg"], classes)
    assert CityscapesMTL.task_options(num_classes=19)["semseg"]["class_names"] == CITYSCAPES19
    np.save(cityscapes / "train" / "label" / "0.npy", classes)
    with pytest.raises(UserError, match=r"label/0\.npy holds the class 18, but 7 classes .*set num_classes"):
        CityscapesMTL(cityscapes, "train", ["semseg"], num_classes=7).read(0)
    with pytest.raises(UserError, match="num_classes=8 is not possible; Cityscapes in MTAN's layout has 7 or 19"):
        CityscapesMTL(cityscapes, "train", ["semseg"], num_classes=8)


def test_its_depth_is_scored_by_mtan_only():
    with pytest.raises(UserError, match=r"evaluation\.options\.depth\.protocol=standard .*inverse depth; choose mtan"):
        construct_metric(DEPTH, {"protocol": "standard"})
    assert set(DEPTH.units.values()) == {""}
    metric = DEPTH.metric(protocol="mtan")
    metric.update(torch.tensor([[[[0.1, 0.3, 0.9]]]]), torch.tensor([[[[0.2, 0.2, 0.0]]]]))
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(
        {"abs_err": 0.1, "rel_err": 0.5, "not_finite": 0}
    )


def test_its_loss_is_the_mean_absolute_error_of_valid_pixels():
    """LibMTL/examples/nyu/utils.py, ``DepthLoss``."""
    rng = np.random.default_rng(0)
    label = np.where(rng.random((2, 1, 4, 5)) < 0.3, 0, rng.uniform(0, 0.5, (2, 1, 4, 5)))
    prediction = rng.normal(size=label.shape)
    expected = np.abs(prediction - label)[label != 0].sum() / (label != 0).sum()
    assert DEPTH.loss(torch.from_numpy(prediction), torch.from_numpy(label)).item() == pytest.approx(expected, rel=1e-6)


def test_inverse_depth_grows_when_an_image_is_enlarged():
    label = np.array([[0.1, 0.0]], np.float32)
    np.testing.assert_allclose(DEPTH.scale_label(label, 2), [[0.2, 0]])
    assert DEPTH.unscale_prediction(torch.tensor([0.2]), 2).item() == pytest.approx(0.1)
    bins = DEPTH.sampling_bin(torch.tensor([[0.001], [0.01], [0.1], [0.0]]))
    assert bins.tolist() == [11, 23, 34, 0]


def test_it_is_drawn_and_written_as_what_it_is(tmp_path):
    metres = build_task("depth")
    near, far = DEPTH.draw(np.array([[0.5, 0.01]], np.float32))[0].astype(int)
    near_metres, far_metres = metres.draw(np.array([[0.01, 9.8]], np.float32))[0].astype(int)
    assert np.abs(near - near_metres).max() < 8
    assert np.abs(far - far_metres).max() < 8
    assert not any(" m" in text for text, _ in DEPTH.legend([]))
    write_map(tmp_path / "map.png", DEPTH, np.array([[0.0, 0.25, 1.0]], np.float32))
    from PIL import Image

    assert np.array(Image.open(tmp_path / "map.png")).tolist() == [[0, 16384, 65535]]
    assert describe_values(DEPTH) == {"inverse_depth_per_step": 1 / 65535}
    assert DEPTH.check_values([np.full((2, 2), 0.3, np.float32)]) == []
    assert "from 0 to 1" in DEPTH.check_values([np.full((2, 2), 3e4, np.float32)])[0]


@pytest.mark.slow
def test_a_tiny_model_is_trained_and_scored_by_mtan(cityscapes, tmp_path):
    overrides = ["data=cityscapes_mtl", f"data.root={cityscapes}", "data.cache=null", "data.size=[6,8]"]
    with pytest.raises(UserError, match="choose mtan"):
        train(composed(*TINY, *overrides), tmp_path / "refused")
    metrics = train(composed(*TINY, *overrides, "evaluation=mtan", "trainer.max_steps=1"), tmp_path / "run")
    assert set(metrics) == {"semseg", "depth"}
    assert set(metrics["depth"]) == {"abs_err", "rel_err", "not_finite"}
