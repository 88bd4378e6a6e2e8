"""The demo serves only what its page requests, and bounds uploads."""

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

import mtcl.cli.demo.guard as guard_module
from mtcl.cli.demo.guard import Guard, is_upload


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
    expected = {"path": file["path"], "meta": {"_type": "gradio.FileData"}}
    assert json.loads(guard.passed) == {"data": [expected], "fn_index": 0, "session_hash": "s", "trigger_id": None}


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
