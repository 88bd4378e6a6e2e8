"""The models that come with mtcl load by their names, and are what their configs and cards say."""

import json
import re

import numpy as np
import pytest
from helpers.common import composed

import mtcl
from mtcl import UserError
from mtcl.config.load import load_model
from mtcl.config.resolve import plain
from mtcl.data.datasets.rooms import Rooms
from mtcl.inference.model_files import CARD_FILE, METADATA_FILE, SHIPPED_MODELS, WEIGHTS_FILE

ROOMS = SHIPPED_MODELS["rooms"]


@pytest.fixture(scope="module")
def predictor():
    return mtcl.load("rooms", device="cpu")


def test_rooms_predicts_all_tasks_of_an_image_of_any_size(predictor):
    image = np.random.default_rng(0).integers(0, 255, (150, 110, 3), np.uint8)
    maps = predictor(image)
    assert maps.keys() == {"semseg", "human_parts", "sal", "depth", "normals", "edge"}
    assert all(array.shape[:2] == (150, 110) and np.isfinite(array).all() for array in maps.values())


def test_rooms_knows_its_rooms(predictor):
    """Weights that were exchanged or scaled would not."""
    dataset = Rooms("val", ("semseg", "depth"), split="tune", length=(1, 4))
    agreement, errors = [], []
    for index in range(4):
        sample = dataset.read(index)
        maps = predictor(sample.image)
        valid = sample.labels["semseg"] != 255
        agreement.append((maps["semseg"] == sample.labels["semseg"])[valid].mean())
        errors.append(np.abs(maps["depth"] - sample.labels["depth"]).mean())
    assert np.mean(agreement) > 0.8
    assert np.mean(errors) < 0.5


def test_rooms_is_that_of_its_experiment_and_small():
    saved, config = json.loads((ROOMS / METADATA_FILE).read_text()), plain(composed("experiment=rooms_small"))
    assert saved["config"]["decoder"] == config["decoder"]
    assert saved["config"]["backbone"]["name"] == config["backbone"]["name"]
    for key in ("_target_", "weight", "weighting"):
        assert saved["config"]["regularizer"][key] == config["regularizer"][key]
    assert saved["step"] == config["trainer"]["max_steps"]
    assert sum(path.stat().st_size for path in ROOMS.iterdir()) < 5e6
    assert {path.name for path in ROOMS.iterdir()} == {WEIGHTS_FILE, METADATA_FILE, CARD_FILE}


def test_the_card_has_scores_and_a_licence():
    card = (ROOMS / CARD_FILE).read_text()
    assert re.search(r"\| semseg \| mIoU \| \d+\.\d+ % \|", card)
    assert "license: mit" in card
    assert "To be filled in" not in card


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_model("rooms").saved.path == ROOMS
    (tmp_path / "rooms").mkdir()
    with pytest.raises(UserError, match="rooms holds neither"):
        load_model("rooms")
