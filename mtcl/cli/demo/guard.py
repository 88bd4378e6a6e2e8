"""Let only what the page itself asks for through to Gradio, which would serve far more, and bound what one asks for.

Gradio checks the paths of files only where it was started by its own ``launch``; mounted, as here, it takes any path.
"""

import asyncio
import json
import re
import stat
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mtcl.errors import UserError
from mtcl.safe_files import parse_json

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

PAGES = re.compile(
    r"/(config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static|svelte)/.+)?"
    r"|/gradio_api/(info/?|startup-events|app_id/?|heartbeat/[\w-]+|queue/data|upload_progress)"
)
FILE, UPLOAD, JOIN, RESET = (f"/gradio_api/{name}" for name in ("file=", "upload", "queue/join", "reset"))
UPLOADS = 8  # at once; more are refused
KEPT_SECONDS = 600  # of a file that was uploaded and never read
HEAD_SECONDS, SILENT_SECONDS, BODY_SECONDS = 10, 10, 120  # for a request's head; between two parts of a body; for all
CONNECTIONS = 256  # at once; more are closed
SMALL = 64 << 10  # bytes of a request that uploads nothing


class Refused(Exception):
    """A request that is answered with this status and nothing else."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Guard:
    """ASGI middleware: the page's own requests pass, others are refused.

    Args:
        folder: where Gradio puts uploads; no other file is served, read or removed.
        max_mb: of an uploaded file.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], folder: Path, max_mb: int):
        self.app, self.folder, self.max_bytes = app, folder, max_mb << 20
        self.uploads = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        path = scope["path"]
        body = Body(receive, self.max_bytes + SMALL if path == UPLOAD else SMALL)

        async def send_unless_cut(message: Message) -> None:
            if body.refused is None:
                await send(message)

        try:
            self.check(scope)
            if path == UPLOAD:
                await self.upload(scope, body, send_unless_cut)
            elif path == JOIN:
                content = self.checked_call(await body.read_all())
                scope["headers"] = [(key, value) for key, value in scope["headers"] if key != b"content-length"]
                scope["headers"].append((b"content-length", str(len(content)).encode()))
                await self.app(scope, replayed(content, receive), send)
            elif scope["method"] == "POST":
                await self.app(scope, body.receive, send_unless_cut)
            else:
                await self.app(scope, receive, send)
        except Refused as refused:
            body.refused = refused
        except Exception:
            if body.refused is None:
                raise
        if body.refused is not None:
            await answer(send, body.refused)

    def check(self, scope: Message) -> None:
        """Raise :class:`Refused` for a page of another server, and for what this page never asks for."""
        headers = {key.lower(): value.decode("latin-1") for key, value in scope["headers"]}
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != headers.get(b"host"):
            raise Refused(403, "this page is not for other pages")
        method, path = scope["method"], scope["path"]
        if method == "POST":
            allowed = path in (UPLOAD, JOIN, RESET)
        elif path.startswith(FILE):
            allowed = is_upload(self.folder, path.removeprefix(FILE))
        else:
            allowed = PAGES.fullmatch(path) is not None
        if not allowed or method not in ("GET", "HEAD", "POST"):
            raise Refused(403, "not served")

    def checked_call(self, content: bytes) -> bytes:
        """A request for a prediction with nothing in it but an uploaded file, or none; :class:`Refused` otherwise."""
        try:
            call = parse_json(content, "the request")
            data = []
            for file in call["data"][:1]:  # none for the example
                path = file and file["path"]
                if not (path is None or (isinstance(path, str) and is_upload(self.folder, path))):
                    raise Refused(403, "no file that was uploaded here")
                data.append(path and {"path": path, "meta": {"_type": "gradio.FileData"}})
            kept = {key: call.get(key) for key in ("fn_index", "session_hash", "trigger_id")}
            return json.dumps({"data": data, **kept}).encode()
        except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(400, "no request of this page") from error

    async def upload(self, scope: Message, body: "Body", send: Send) -> None:
        if self.uploads >= UPLOADS:
            raise Refused(503, f"{UPLOADS} images are being uploaded already; try again")
        self.uploads += 1
        try:
            make_room(self.folder, UPLOADS * self.max_bytes)
            await self.app(scope, body.receive, send)
        finally:
            self.uploads -= 1
            if not self.uploads:  # what lies there without a folder of its own was cut off
                for path in self.folder.iterdir():
                    if path.is_file():
                        path.unlink(missing_ok=True)


class Body:
    """A request's body as it comes in, of bounded size and time. ``refused`` says why it was cut off."""

    def __init__(self, receive: Receive, max_bytes: int):
        self.next, self.left, self.until = receive, max_bytes, time.monotonic() + BODY_SECONDS
        self.refused: Refused | None = None
        self.is_complete = False

    async def receive(self) -> Message:
        if self.is_complete:  # what comes now is the end of the connection, whenever that is
            return await self.next()
        try:
            seconds = min(SILENT_SECONDS, self.until - time.monotonic())
            message = await asyncio.wait_for(self.next(), max(0.0, seconds))
        except TimeoutError:
            self.refused = Refused(408, "the upload is too slow")
            return {"type": "http.disconnect"}
        self.left -= len(message.get("body", b""))
        self.is_complete = not message.get("more_body", False)
        if self.left < 0:
            self.refused = Refused(413, "the upload exceeds the maximum allowed size")
            return {"type": "http.disconnect"}
        return message

    async def read_all(self) -> bytes:
        content = b""
        while not self.is_complete:
            message = await self.receive()
            if self.refused:
                raise self.refused
            content += message.get("body", b"")
        return content


def is_upload(folder: Path, name: str) -> bool:
    """Tell whether ``name``, links resolved, is a regular file below ``folder``, or would be one if it were there."""
    try:
        path = Path(name).resolve()
        if not path.is_relative_to(folder.resolve()):
            return False
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return True
    except (OSError, ValueError, RuntimeError):
        return False


def make_room(folder: Path, max_bytes: int) -> None:
    """Remove uploads that nobody read in time, and the oldest while all together have more than ``max_bytes``."""
    files = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            state = path.lstat()
            if stat.S_ISREG(state.st_mode):
                files.append((state.st_mtime, state.st_size, path))
    total = sum(size for _, size, _ in files)
    for modified, size, path in sorted(files):
        if total <= max_bytes and time.time() - modified < KEPT_SECONDS:
            continue
        path.unlink(missing_ok=True)
        total -= size
    for path in folder.iterdir():
        with suppress(OSError):  # of a folder that holds something
            path.rmdir()


def replayed(content: bytes, receive: Receive) -> Receive:
    """``content`` as the whole body of a request; what follows comes from ``receive``."""
    parts = [content]

    async def receive_replayed() -> Message:
        return {"type": "http.request", "body": parts.pop(), "more_body": False} if parts else await receive()

    return receive_replayed


async def answer(send: Send, refused: Refused) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{refused}\n".encode()})


def patient_protocol() -> type:
    """uvicorn's HTTP/1.1 with a limit on connections, and on the time that the head of a request may take."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > CONNECTIONS:
                transport.abort()
            else:
                self.await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.stop_waiting()

        def await_head(self) -> None:
            """Close the connection in a while, unless a request has begun by then."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.stop_waiting()
            elif self.deadline is None:
                self.deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

        def stop_waiting(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

    return Protocol
