"""A folder of images without labels: which of them, in which list, at which size; and their augmentation."""

import numpy as np
import pytest
from helpers.distillation import write_images

from mtcl import UserError
from mtcl.data import Images, Sample, eval_loader, train_loader
from mtcl.data.datasets.images import cover
from mtcl.data.transforms import ResizedCrop


def make(root, subset="train", **options):
    return Images(subset, [], root, **{"size": (32, 48), "num_val": 2, **options})


def test_lists_are_disjoint_and_complete(tmp_path):
    root = write_images(tmp_path / "images")
    train, val = make(root), make(root, "val")
    assert val.ids == ["0.jpg", "5.jpg"], "evenly spaced: the first of each half"
    assert sorted([*train.ids, *val.ids]) == sorted([*(f"{i}.jpg" for i in range(8) if i != 1), "more/1.png"])
    assert make(root, limit=3).ids == train.ids[:3]
    assert train.fingerprint() != val.fingerprint()
    assert "6 for train" in train.summary()


def test_validation_images_are_cut_to_one_size_and_training_images_are_whole(tmp_path):
    root = write_images(tmp_path / "images")
    assert [make(root, "val").read(i).image.shape for i in range(2)] == [(32, 48, 3)] * 2
    assert make(root).read(make(root).ids.index("more/1.png")).image.shape == (48, 64, 3)
    image = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
    assert np.array_equal(cover(image, (4, 4)), image[:, 2:6])


def test_batches_have_images_alone(tmp_path):
    root = write_images(tmp_path / "images")
    loader = train_loader(make(root), {}, ResizedCrop((32, 48)), batch_size=2, seed=0, workers=0)
    first, second = next(iter(loader)), next(iter(loader))
    assert first["image"].shape == (2, 3, 32, 48)
    assert first["labels"] == {}
    assert (first["image"] == second["image"]).all(), "the same batch of the same stream"
    batch = next(iter(eval_loader(make(root, "val"), {}, (32, 48), batch_size=2, workers=0)))
    assert [meta.native_size for meta in batch["meta"]] == [(32, 48)] * 2


def test_windows_have_the_area_and_ratio_that_were_asked_for():
    crop = ResizedCrop((16, 16), area=(0.2, 0.5), ratio=(0.75, 1.5))
    rng = np.random.default_rng(0)
    windows = [crop.draw_window((300, 400), rng) for _ in range(300)]
    areas = np.array([w.height * w.width / 120_000 for w in windows])
    ratios = np.array([w.width / w.height for w in windows])
    assert areas.min() > 0.19
    assert areas.max() < 0.51
    assert 0.33 < areas.mean() < 0.37
    assert ratios.min() > 0.74
    assert ratios.max() < 1.52
    assert all(w.row >= 0 and w.row + w.height <= 300 and w.column + w.width <= 400 for w in windows)
    assert len({(w.row, w.column) for w in windows}) > 200


def test_a_narrow_image_gives_the_largest_part_in_its_middle():
    window = ResizedCrop((16, 16), area=(1.0, 1.0)).draw_window((300, 30), np.random.default_rng(0))
    assert window == (130, 0, 40, 30)
    window = ResizedCrop((16, 16), area=(1.0, 1.0)).draw_window((30, 300), np.random.default_rng(0))
    assert window == (0, 130, 30, 40)


def test_a_view_is_a_function_of_the_generator():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    views = [ResizedCrop((16, 24))(Sample("a", image, {}), {}, np.random.default_rng(s)).image for s in (0, 0, 1)]
    assert views[0].shape == (16, 24, 3)
    assert np.array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])
    uncut = ResizedCrop((40, 60), area=(1.0, 1.0), ratio=(1.5, 1.5), flip=1.0)
    assert np.array_equal(uncut(Sample("a", image, {}), {}, np.random.default_rng(0)).image, image[:, ::-1])


def test_refuses_what_it_cannot_read_or_draw(tmp_path):
    root = write_images(tmp_path / "images")
    with pytest.raises(UserError, match="has no labels of depth"):
        Images("train", ["depth"], root, (32, 48))
    with pytest.raises(UserError, match="split=tune does not exist"):
        make(root, split="tune")
    with pytest.raises(UserError, match="num_val=8 leaves nothing to train on"):
        make(root, num_val=8)
    (root / "0.jpg").write_text("damaged")
    with pytest.raises(UserError, match=r"0\.jpg"):
        make(root, "val").read(0)
    with pytest.raises(UserError, match=r"area=\(0.5, 0.2\) is no range"):
        ResizedCrop((16, 16), area=(0.5, 0.2))
    with pytest.raises(UserError, match="more than the image has"):
        ResizedCrop((16, 16), area=(0.5, 2.0))
