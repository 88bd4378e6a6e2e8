"""``mtcl demo``: its arguments, and the page in a browser."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from helpers.browser import Browser, chromium
from helpers.common import ROOT, TINY, assert_fails, composed
from helpers.images import picture

import mtcl.cli.demo as demo_module
from mtcl import UserError, load
from mtcl.config.build_data import build_tasks
from mtcl.config.build_model import build_model
from mtcl.config.resolve import plain
from mtcl.config.stored_config import describe_tasks
from mtcl.training.checkpoint_file import write_checkpoint_file

GRADIO_SAYS = "Method not implemented."  # a warning of its own, whenever a stream ends


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
    for host, number, message in (
        ("127.0.0.1", 70000, "up to 65535"),
        ("192.0.2.1", 0, "--host 192.0.2.1"),
        ("no host", 0, "no IPv4 address"),
    ):
        with pytest.raises(UserError, match=message):
            demo_module.bind_socket(host, number)


def test_models_without_a_common_task_are_told(monkeypatch):
    class One:
        def __init__(self, *tasks):
            self.tasks = dict.fromkeys(tasks)

    loaded = {"a.pt": One("depth", "edge"), "b.pt": One("semseg"), "c.pt": One("edge", "semseg")}
    monkeypatch.setattr(demo_module, "load_models", lambda sources, _: [loaded[source] for source in sources])
    monkeypatch.setattr(demo_module, "build_predictor", lambda one, tasks: tasks)
    with pytest.raises(UserError, match=r"no task in common \(a.pt: depth, edge; b.pt: semseg\)"):
        demo_module.load(["a.pt", "b.pt"], {})
    assert demo_module.load(["a.pt", "c.pt"], {}) == [("a.pt", ["edge"]), ("c.pt", ["edge"])]


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
        if value := browser.js(expression):
            return value
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
    node_id = browser.ask("DOM.querySelector", nodeId=root, selector="#drop input[type=file]")["nodeId"]
    browser.ask("DOM.setFileInputFiles", nodeId=node_id, files=[str(path)])


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
    arguments = [str(folder / "a.pt"), f"--compare={folder / 'b.pt'}", f"--port={port}", "--device=cpu", "--max-mb=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts/demo.py"), *arguments], env=environment, stdout=log, stderr=log
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
    predictions = [load(folder / f"{name}.pt", device="cpu")(tmp_path / "room.png") for name in ("a", "b")]
    number = alts.index(f"depth, predicted by {folder / 'a.pt'}")
    for x, y in ((0.26, 0.35), (0.74, 0.62)):
        row, column = int(y * 30), int(x * 40)
        texts = tell(browser, number, x, y)
        for offset, maps in enumerate(predictions):
            metres = float(maps["depth"][row, column])
            expected = f"{max(1, round(1000 * metres)) / 1000:.2f} m"
            text = texts[number + offset]
            assert text == expected or abs(float(text.split()[0]) - metres) < 0.011  # a half may be rounded either way
            assert texts[1 + offset] == load_classes(folder)[maps["semseg"][row, column]]
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
        message = wait(browser, "(document.querySelector('#found .fault') || {}).textContent")
        assert message.startswith(f"{name} is damaged, or not an image")
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
    remaining = [
        path for path in (folder / "tmp").rglob("*") if path.suffix in (".png", ".jpg") or path.name.startswith("tmp")
    ]
    assert remaining == []
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, 130)
    assert list((folder / "tmp").glob("mtcl_demo_*")) == []
    assert "Traceback" not in (folder / "log").read_text()


def load_classes(folder: Path) -> list[str]:
    return torch.load(folder / "a.pt", weights_only=True)["meta"]["tasks"]["semseg"]["classes"]
