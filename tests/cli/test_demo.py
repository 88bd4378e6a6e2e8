"""``mtcl demo``: what the page is made of, its refusals, and the page itself in a browser."""

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import cv2
import numpy as np
import pytest
import torch
from helpers.browser import Browser, chromium
from helpers.common import ROOT, TINY, assert_fails, composed
from PIL import Image

import mtcl.cli.demo as demo_module
import mtcl.cli.demo.guard as guard_module
from mtcl import UserError, load
from mtcl.cli.demo.guard import Guard, is_upload
from mtcl.cli.demo.tiles import (
    MAX_TILE_SIDE,
    NamedPredictor,
    encode_values,
    render_example,
    render_file_prediction,
    render_prediction,
    render_task,
)
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.resolve import plain
from mtcl.config.stored_config import describe_tasks
from mtcl.inference import Predictor
from mtcl.tasks import NYUD40, build_task
from mtcl.tasks.palette import VOID_COLOUR
from mtcl.training.checkpoint_file import write_checkpoint_file

NAMES = ("semseg", "depth", "normals", "edge")
HOSTILE = "<img src=x onerror=alert(1)>\"'"
GRADIO_SAYS = "Method not implemented."  # a warning of its own, whenever a stream ends


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


def picture(path: Path, height: int = 30, width: int = 40) -> Path:
    colours = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(colours).save(path)
    return path


def unpacked(values: dict) -> np.ndarray:
    data = zlib.decompress(base64.b64decode(values["data"]))
    return np.frombuffer(data, "<u2" if values["bytes"] == 2 else np.uint8)


# What the page is made of


def test_a_picture_becomes_a_tile_per_task_with_its_legend_and_its_values(tmp_path):
    path = picture(tmp_path / "room.png")
    text = render_file_prediction([NamedPredictor("a", Made())], path)
    page = Page(text)
    alts = [image["alt"] for image in page.all("img")]
    assert alts == ["the image", *(f"{n}, predicted" for n in ("classes", "depth", "surface normals", "edges"))]
    assert "room.png, 40 x 30 pixels" in page.text
    for word in (NYUD40[0], NYUD40[9], "10 m", "to the viewer", "no edge"):
        assert word in page.text
    found = {v["kind"]: v for f in page.all("figure") if "data-values" in f for v in [json.loads(f["data-values"])]}
    assert set(found) == {"class", "metres", "direction", "percent"}
    depth = unpacked(found["metres"]).reshape(30, 40)
    assert found["metres"]["size"] == [40, 30]
    assert np.array_equal(depth[:, 0], np.round(1000 + 1000 * np.arange(30) / 30))
    assert np.array_equal(unpacked(found["direction"]).reshape(30, 40, 3)[0, 0], [40, 100, 180])
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
    ("content", "said"),
    [(b"hello", "damaged, or not an image"), (b"\x89PNG\r\n\x1a\n123", "damaged"), (None, "limit of 1,000,000")],
)
def test_a_file_that_is_no_picture_or_too_large_is_told_without_the_path(tmp_path, content, said):
    path = tmp_path / f"bad {HOSTILE.replace('/', '')}.png"
    if content is None:
        Image.new("1", (20000, 20000)).save(path)
    else:
        path.write_bytes(content)
    text = render_file_prediction([NamedPredictor("a", Made())], path)
    page = Page(text)
    assert page.text.startswith(path.name)
    assert said in page.text
    assert str(tmp_path) not in page.text
    assert [tag for tag, _ in page.tags] == ["p"]
    assert page.all("p")[0]["role"] == "alert"
    assert not path.exists()


@pytest.mark.parametrize(
    ("trouble", "said"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "too many pixels for the memory"), (ValueError("x"), "terminal")],
)
def test_trouble_in_the_model_is_a_sentence(tmp_path, trouble, said):
    path = picture(tmp_path / "a.png")
    assert said in Page(render_file_prediction([NamedPredictor("a", Made(trouble))], path)).text
    assert not path.exists()


def test_the_example_is_a_rendered_room_of_about_the_training_frame():
    image = render_example((96, 128))
    assert image.shape == (96, 128, 3)
    assert image.dtype == np.uint8
    assert image.std() > 20
    text = render_prediction([NamedPredictor("a", Made())], image, "the example")
    assert len(Page(text).all("figure")) == 1 + len(NAMES)


# Refusals, before a model is loaded


def test_words_that_do_not_fit_are_told(cli):
    assert_fails(cli("scripts/demo.py", "--port=7860"), "required: CHECKPOINT")
    assert_fails(cli("scripts/demo.py", "a.pt", "--prot=1"), "did you mean --port?")
    assert_fails(cli("scripts/demo.py", "a.pt", "--port=x"), "--port: x is not a whole number")


def test_without_gradio_the_package_to_install_is_told(cli, monkeypatch):
    monkeypatch.setattr("mtcl.cli.arguments.find_spec", lambda name: None)
    assert_fails(cli("scripts/demo.py", "a.pt"), "pip install 'mtcl[demo]'")


def test_a_port_in_use_or_impossible_and_a_foreign_host_are_told():
    with demo_module.bind_socket("127.0.0.1", 0) as door:
        port = door.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} is in use on 127.0.0.1; give another"):
            demo_module.bind_socket("127.0.0.1", port)
    for host, number, said in (
        ("127.0.0.1", 70000, "up to 65535"),
        ("192.0.2.1", 0, "--host 192.0.2.1"),
        ("no host", 0, "no IPv4 address"),
    ):
        with pytest.raises(UserError, match=said):
            demo_module.bind_socket(host, number)


def test_models_without_a_common_task_are_told(monkeypatch):
    class One:
        def __init__(self, *tasks):
            self.tasks = dict.fromkeys(tasks)

    loaded = {"a.pt": One("depth", "edge"), "b.pt": One("semseg"), "c.pt": One("edge", "semseg")}
    monkeypatch.setattr(demo_module, "load_model", loaded.get)
    monkeypatch.setattr(demo_module, "build_predictor", lambda one, tasks: tasks)
    with pytest.raises(UserError, match=r"no task in common \(a.pt: depth, edge; b.pt: semseg\)"):
        demo_module.load(["a.pt", "b.pt"], {})
    assert demo_module.load(["a.pt", "c.pt"], {}) == [("a.pt", ["edge"]), ("c.pt", ["edge"])]


# What other pages and programs ask of it


def asked(guard: Guard, method: str, path: str, body: bytes = b"", **headers: str) -> int:
    """The status that a request is answered with; 200 is the application's behind the guard."""
    sent: list[dict] = []
    parts = [{"type": "http.request", "body": body, "more_body": False}]
    names = {"host": "127.0.0.1:7860", **headers}
    scope = {"type": "http", "method": method, "path": path}
    scope["headers"] = [(key.encode(), value.encode()) for key, value in names.items()]

    async def receive():
        if parts:
            return parts.pop()
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    assert [m["type"] for m in sent] == ["http.response.start", "http.response.body"]
    return sent[0]["status"]


@pytest.fixture
def guard(tmp_path):
    """In front of an application that reads the request and takes everything; ``guard.passed``: what it was sent."""
    folder = tmp_path / "uploads"
    (folder / "0a").mkdir(parents=True)
    (folder / "0a" / "room.png").write_bytes(b"image")
    (tmp_path / "secret.png").write_bytes(b"image")
    (folder / "0a" / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "0a" / "pipe.png")

    async def app(scope, receive, send):
        more = scope["method"] == "POST"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                (folder / "tmp1").write_bytes(b"half")
                raise ConnectionError
            guard.passed += message["body"]
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    guard = Guard(app, folder, max_mb=1)
    guard.passed = b""
    return guard


@pytest.mark.parametrize("meta", [{}, {"_type": "gradio.FileData"}])
def test_only_a_file_that_was_uploaded_is_read_and_removed(guard, tmp_path, meta):
    folder = guard.folder
    for path in (
        *(
            tmp_path / "secret.png",
            folder / ".." / "secret.png",
            folder / "0a" / "link.png",
            folder / "0a" / "pipe.png",
        ),
        *(folder, "/dev/zero", "http://127.0.0.1:9/x.png", "a\0b", "", ["x"], 5),
    ):
        file = {"path": str(path) if isinstance(path, Path) else path, "meta": meta}
        call = json.dumps({"data": [file], "fn_index": 0, "session_hash": "s"}).encode()
        assert asked(guard, "POST", "/gradio_api/queue/join", call) in (400, 403), path
        assert not is_upload(folder, path) if isinstance(path, str | Path) else True
    for content in (b"{}", b"[" * 50_000, b"9" * 500, b'{"data": [1, 2]}', b'{"data": {}}', b"\xff"):
        assert asked(guard, "POST", "/gradio_api/queue/join", content) == 400
    assert guard.passed == b""
    # What is passed on names the file and nothing else: no address to fetch.
    file = {"path": str(folder / "0a" / "room.png"), "url": "http://127.0.0.1:9/", "is_stream": True, "meta": meta}
    call = json.dumps({"data": [file], "fn_index": 0, "session_hash": "s", "event_data": {"a": 1}}).encode()
    assert asked(guard, "POST", "/gradio_api/queue/join", call) == 200
    wanted = {"path": file["path"], "meta": {"_type": "gradio.FileData"}}
    assert json.loads(guard.passed) == {"data": [wanted], "fn_index": 0, "session_hash": "s", "trigger_id": None}


def test_only_what_the_page_itself_asks_for_is_served(guard, tmp_path):
    room = guard.folder / "0a" / "room.png"
    for path in ("/", "/config", "/assets/index.js", "/gradio_api/heartbeat/ab1", f"/gradio_api/file={room}"):
        assert asked(guard, "GET", path) == 200
        assert asked(guard, "GET", path, origin="http://127.0.0.1:7860") == 200
        for origin in ("http://elsewhere.example", "null", "http://127.0.0.1"):
            assert asked(guard, "GET", path, origin=origin) == 403
    for path in (
        *(
            f"/gradio_api/file={tmp_path}/secret.png",
            "/gradio_api/file=http://127.0.0.1/",
            "/gradio_api/proxy=http://x/",
        ),
        *(f"/gradio_api/file={guard.folder}/0a/pipe.png", "/gradio_api/file//etc/passwd", "//etc/passwd", "/docs"),
    ):
        assert asked(guard, "GET", path) == 403
    for path in ("/gradio_api/run/predict", "/gradio_api/component_server", "/gradio_api/process_recording", "/"):
        assert asked(guard, "POST", path) == 403
    assert asked(guard, "DELETE", "/") == 403


def test_uploads_are_bounded_in_size_time_and_number(guard, monkeypatch):
    upload = "/gradio_api/upload"
    assert asked(guard, "POST", upload, bytes(2**20)) == 200
    assert asked(guard, "POST", upload, bytes(2**21)) == 413
    assert not (guard.folder / "tmp1").exists()  # what was cut off is gone
    monkeypatch.setattr(guard_module, "SILENT_SECONDS", 0)
    assert asked(guard, "POST", upload) == 408
    guard.uploads = guard_module.MAX_UPLOADS
    assert asked(guard, "POST", upload) == 503


def test_uploads_that_nobody_reads_make_room(tmp_path):
    for number, (age, size) in enumerate([(700, 1), (60, 400), (30, 400), (1, 400)]):
        path = tmp_path / f"{number}" / "a.png"
        path.parent.mkdir()
        path.write_bytes(bytes(size))
        os.utime(path, (time.time() - age,) * 2)
    guard_module.delete_old_uploads(tmp_path, 800)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


# In a browser


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        return door.getsockname()[1]


def checkpoint(path: Path, seed: int) -> None:
    """Of a tiny model with random weights."""
    torch.manual_seed(seed)
    config = composed("data=rooms", *TINY)
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False)
    content = {"model": model.state_dict(), "config": plain(config), "step": 1}
    write_checkpoint_file(path, {**content, "meta": {"tasks": describe_tasks(tasks)}})


def wait(browser: Browser, expression: str, seconds: float = 120):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := browser.js(expression):
            return found
        time.sleep(0.1)
    raise AssertionError(f"never came true: {expression}\n{browser.js('document.body.innerText')}")


def visit(browser: Browser, url: str, ready: str, width: int = 1280, dark: bool = False) -> None:
    browser.size(width)
    browser.prefer(dark)
    browser.requests.clear()
    browser.complaints.clear()
    browser.ask("Page.navigate", url=url)
    wait(browser, ready)


def upload(browser: Browser, path: Path) -> None:
    """As if chosen in the file dialogue; what was found before is taken off the page first."""
    browser.js("document.querySelectorAll('#found .about, #found .tiles, #found .fault').forEach(e => e.remove())")
    root = browser.ask("DOM.getDocument")["root"]["nodeId"]
    found = browser.ask("DOM.querySelector", nodeId=root, selector="#drop input[type=file]")["nodeId"]
    browser.ask("DOM.setFileInputFiles", nodeId=found, files=[str(path)])


def tell(browser: Browser, number: int, x: float, y: float) -> list[str]:
    """What every tile tells of the place of tile ``number`` that the mouse is moved to."""
    browser.move(*browser.where("#found .frame", number, x=x, y=y))
    wait(browser, "[...document.querySelectorAll('#found .tile output')].slice(1).every(o => o.textContent)")
    return browser.js("[...document.querySelectorAll('#found .tile output')].map(o => o.textContent)")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(url, the folder that holds its uploads, checkpoint, process) of a page of two tiny models."""
    if find_spec("gradio") is None:
        pytest.skip("Gradio is not installed (pip install 'mtcl[demo]')")
    if chromium() is None:
        pytest.skip("there is no Chromium here (Debian: apt install chromium)")
    folder = tmp_path_factory.mktemp("demo")
    for name in ("a", "b"):
        checkpoint(folder / f"{name}.pt", seed=ord(name))
    (folder / "tmp").mkdir()
    port = free_port()
    words = [str(folder / "a.pt"), f"--compare={folder / 'b.pt'}", f"--port={port}", "--device=cpu", "--max-mb=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts/demo.py"), *words], env=environment, stdout=log, stderr=log
        )
    until = time.monotonic() + 300
    while f"http://127.0.0.1:{port}" not in (folder / "log").read_text():
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < until
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/", folder, process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory, served):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.slow
def test_a_picture_on_the_page_in_a_browser(browser, served, tmp_path):
    """One walk through the page: starting it takes most of the time."""
    url, folder, process = served
    tiles = "document.querySelectorAll('#found .tile').length"
    visit(browser, url, "!!document.querySelector('#drop input[type=file]')")
    assert wait(browser, "document.querySelector('#example img').naturalWidth") == 64  # of the training frame's size
    browser.click("#example button")
    wait(browser, tiles)
    assert browser.js("document.querySelector('#found .about').textContent").startswith("Example, a rendered room")
    upload(browser, picture(tmp_path / "room.png", 30, 40))
    wait(browser, tiles)
    names = browser.js("[...document.querySelectorAll('#found .model')].map(e => e.textContent)")
    assert names == [str(folder / "a.pt"), str(folder / "b.pt")]
    alts = browser.js("[...document.querySelectorAll('#found img')].map(i => i.alt)")
    assert f"depth, predicted by {folder / 'a.pt'}" in alts
    assert browser.js("[...document.querySelectorAll('#found img')].every(i => i.complete && i.naturalWidth === 40)")

    # Hovering tells what the model predicts at that place, of both models.
    known = [load(folder / f"{name}.pt", device="cpu")(tmp_path / "room.png") for name in ("a", "b")]
    number = alts.index(f"depth, predicted by {folder / 'a.pt'}")
    for x, y in ((0.26, 0.35), (0.74, 0.62)):
        row, column = int(y * 30), int(x * 40)
        told = tell(browser, number, x, y)
        for offset, maps in enumerate(known):
            metres = float(maps["depth"][row, column])
            wanted = f"{max(1, round(1000 * metres)) / 1000:.2f} m"
            said = told[number + offset]
            assert said == wanted or abs(float(said.split()[0]) - metres) < 0.011  # a half may be rounded either way
            assert told[1 + offset] == load_classes(folder)[maps["semseg"][row, column]]
    browser.move(2, 2)
    wait(browser, "[...document.querySelectorAll('#found output')].every(o => !o.textContent)")
    browser.js("document.querySelector('#found .frame').focus()")
    browser.key("ArrowRight")
    wait(browser, "!!document.querySelectorAll('#found output')[1].textContent")

    for width in (320, 1280):
        browser.size(width)
        browser.settle()
        assert browser.js("document.documentElement.scrollWidth") <= width

    # What is no picture, and what is too much of one, is told; then the next one works.
    for name, content in (("text.jpg", b"hello"), ("broken.png", (tmp_path / "room.png").read_bytes()[:200])):
        (tmp_path / name).write_bytes(content)
        upload(browser, tmp_path / name)
        said = wait(browser, "(document.querySelector('#found .fault') || {}).textContent")
        assert said.startswith(f"{name} is damaged, or not an image")
    assert [c for c in browser.complaints if GRADIO_SAYS not in c] == []
    (tmp_path / "big.png").write_bytes((tmp_path / "room.png").read_bytes() + bytes(2**21))
    upload(browser, tmp_path / "big.png")
    wait(browser, "document.body.innerText.includes('maximum allowed size')")
    browser.requests, asked = [], browser.requests
    upload(browser, picture(tmp_path / "next.png", 1, 1))
    wait(browser, tiles)

    # A page elsewhere, under a name that leads here or not, gets nothing; no file but an upload is read or removed.
    with pytest.raises(HTTPError, match="400"):
        urlopen(Request(url, headers={"Host": "elsewhere.example"}))
    with pytest.raises(HTTPError, match="403"):
        urlopen(Request(url, headers={"Origin": "http://elsewhere.example"}))
    for path, meta in ((tmp_path / "room.png", {}), (tmp_path / "room.png", {"_type": "gradio.FileData"})):
        call = {"data": [{"path": str(path), "meta": meta}], "fn_index": 0, "session_hash": "s"}
        headers = {"Content-Type": "application/json"}
        with pytest.raises(HTTPError, match="403"):
            urlopen(Request(f"{url}gradio_api/queue/join", json.dumps(call).encode(), headers))
        assert path.exists()
    outside = [u for u in asked + browser.requests if not u.startswith((url, "data:", "blob:"))]
    assert outside == []
    kept = [
        path for path in (folder / "tmp").rglob("*") if path.suffix in (".png", ".jpg") or path.name.startswith("tmp")
    ]
    assert kept == []
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, 130)
    assert list((folder / "tmp").glob("mtcl_demo_*")) == []
    assert "Traceback" not in (folder / "log").read_text()


def load_classes(folder: Path) -> list[str]:
    return torch.load(folder / "a.pt", weights_only=True)["meta"]["tasks"]["semseg"]["classes"]
