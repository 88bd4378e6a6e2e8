"""The tiles of the demo's page: drawings, legends, values, errors."""

import base64
import json
import zlib
from html.parser import HTMLParser
from typing import ClassVar

import cv2
import numpy as np
import pytest
import torch
from helpers.images import picture
from PIL import Image

from mtcl.cli.demo.tiles import (
    MAX_TILE_SIDE,
    NamedPredictor,
    encode_values,
    render_example,
    render_file_prediction,
    render_prediction,
    render_task,
)
from mtcl.inference import Predictor
from mtcl.tasks import NYUD40, build_task
from mtcl.tasks.palette import VOID_COLOUR

NAMES = ("semseg", "depth", "normals", "edge")
HOSTILE = "<img src=x onerror=alert(1)>\"'"


class Made:
    """Stands for a Predictor: maps that are known."""

    tasks: ClassVar = {
        name: build_task(name, **({"class_names": NYUD40} if name == "semseg" else {})) for name in NAMES
    }
    device, max_pixels, read_image = torch.device("cpu"), 10**6, Predictor.read_image

    def __init__(self, trouble: Exception | None = None):
        self.trouble = trouble

    def __call__(self, picture: np.ndarray) -> dict[str, np.ndarray]:
        if self.trouble:
            raise self.trouble
        height, width = picture.shape[:2]
        rows, columns = np.mgrid[:height, :width].astype(np.float32)
        facing = np.zeros((height, width, 3), np.float32)
        facing[..., 0], facing[..., 2] = -0.6, 0.8
        classes = 9 * (columns > width / 2).astype(np.uint8)
        return {"semseg": classes, "depth": 1 + rows / height, "normals": facing, "edge": columns / width}


class Page(HTMLParser):
    """The tags with their attributes, and the text, as a browser reads them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def unpacked(values: dict) -> np.ndarray:
    data = zlib.decompress(base64.b64decode(values["data"]))
    return np.frombuffer(data, "<u2" if values["bytes"] == 2 else np.uint8)


def test_a_picture_becomes_a_tile_per_task_with_its_legend_and_its_values(tmp_path):
    path = picture(tmp_path / "room.png")
    text = render_file_prediction([NamedPredictor("a", Made())], path)
    page = Page(text)
    alts = [image["alt"] for image in page.all("img")]
    assert alts == ["the image", *(f"{n}, predicted" for n in ("classes", "depth", "surface normals", "edges"))]
    assert "room.png, 40 x 30 pixels" in page.text
    for word in (NYUD40[0], NYUD40[9], "10 m", "to the viewer", "no edge"):
        assert word in page.text
    values_of_kind = {
        v["kind"]: v for f in page.all("figure") if "data-values" in f for v in [json.loads(f["data-values"])]
    }
    assert set(values_of_kind) == {"class", "metres", "direction", "percent"}
    depth = unpacked(values_of_kind["metres"]).reshape(30, 40)
    assert values_of_kind["metres"]["size"] == [40, 30]
    assert np.array_equal(depth[:, 0], np.round(1000 + 1000 * np.arange(30) / 30))
    assert np.array_equal(unpacked(values_of_kind["direction"]).reshape(30, 40, 3)[0, 0], [40, 100, 180])
    assert not path.exists()  # nothing is kept


def test_what_is_seen_of_a_large_picture_is_what_is_read(tmp_path):
    page = Page(
        render_file_prediction([NamedPredictor("a", Made())], picture(tmp_path / "large.png", 500, 2 * MAX_TILE_SIDE))
    )
    figure = page.all("figure")[1]
    values = json.loads(figure["data-values"])
    data = base64.b64decode(page.all("img")[1]["src"].partition(",")[2])
    shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert shown.shape == (250, MAX_TILE_SIDE, 3)
    assert values["size"] == [MAX_TILE_SIDE, 250]
    assert set(unpacked(values)) == {0, 9}  # no class between two is made up
    assert np.array_equal(Made.tasks["semseg"].draw(unpacked(values).reshape(250, MAX_TILE_SIDE)), shown)


def test_a_depth_that_is_no_number_or_beyond_the_scale_is_told_as_such():
    array = np.array([[np.nan, np.inf, 0, 1.2345, 99]], np.float32)
    assert unpacked(encode_values(Made.tasks["depth"], array)).tolist() == [0, 0, 1, 1234, 65535]
    text = render_task(Made.tasks["depth"], array, "")
    assert "0 m or less" in Page(text).text
    data = base64.b64decode(Page(text).all("img")[0]["src"].partition(",")[2])
    shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[0, :, ::-1]
    assert (shown[2] != VOID_COLOUR).any()
    assert (shown[:2] == VOID_COLOUR).all()


def test_two_models_stand_beside_each_other(tmp_path):
    page = Page(
        render_file_prediction(
            [NamedPredictor("first.pt", Made()), NamedPredictor(HOSTILE, Made())], picture(tmp_path / "a.png")
        )
    )
    alts = [image["alt"] for image in page.all("img")]
    assert alts[1:4] == [
        "classes, predicted by first.pt",
        f"classes, predicted by {HOSTILE}",
        "depth, predicted by first.pt",
    ]
    assert len(alts) == 1 + 2 * len(NAMES)
    assert page.text.count("first.pt") == page.text.count(HOSTILE) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"hello", "damaged, or not an image"), (b"\x89PNG\r\n\x1a\n123", "damaged"), (None, "limit of 1,000,000")],
)
def test_a_file_that_is_no_picture_or_too_large_is_told_without_the_path(tmp_path, content, message):
    path = tmp_path / f"bad {HOSTILE.replace('/', '')}.png"
    if content is None:
        Image.new("1", (20000, 20000)).save(path)
    else:
        path.write_bytes(content)
    text = render_file_prediction([NamedPredictor("a", Made())], path)
    page = Page(text)
    assert page.text.startswith(path.name)
    assert message in page.text
    assert str(tmp_path) not in page.text
    assert [tag for tag, _ in page.tags] == ["p"]
    assert page.all("p")[0]["role"] == "alert"
    assert not path.exists()


@pytest.mark.parametrize(
    ("trouble", "message"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "too many pixels for the memory"), (ValueError("x"), "terminal")],
)
def test_trouble_in_the_model_is_a_sentence(tmp_path, trouble, message):
    path = picture(tmp_path / "a.png")
    assert message in Page(render_file_prediction([NamedPredictor("a", Made(trouble))], path)).text
    assert not path.exists()


def test_the_example_is_a_rendered_room_of_about_the_training_frame():
    image = render_example((96, 128))
    assert image.shape == (96, 128, 3)
    assert image.dtype == np.uint8
    assert image.std() > 20
    text = render_prediction([NamedPredictor("a", Made())], image, "the example")
    assert len(Page(text).all("figure")) == 1 + len(NAMES)
