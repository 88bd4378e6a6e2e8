"""Middleware that passes only the page's own requests to Gradio, which would serve far more, and bounds their size.

Gradio checks file paths only when started by its own ``launch``; mounted, as here, it accepts any path.
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

ALLOWED_PATHS = re.compile(
    r"/(config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static|svelte)/.+)?"
    r"|/gradio_api/(info/?|startup-events|app_id/?|heartbeat/[\w-]+|queue/data|upload_progress)"
)
FILE, UPLOAD, JOIN, RESET = (f"/gradio_api/{name}" for name in ("file=", "upload", "queue/join", "reset"))
MAX_UPLOADS = 8  # at the same time
UPLOAD_LIFETIME_SECONDS = 600  # of an uploaded file that is never read
HEAD_SECONDS, SILENT_SECONDS, BODY_SECONDS = (
    10,
    10,
    120,
)  # for a request's head; between two parts of a body; for the complete body
MAX_CONNECTIONS = 256  # at the same time
MAX_REQUEST_BYTES = 64 << 10  # of a request that is not an upload


class RefusedRequestError(Exception):
    """A request that is answered with a status and a reason only."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Guard:
    """ASGI middleware: the page's own requests pass, others are refused.

    Args:
        app: the application behind it.
        folder: of Gradio's uploads; no other file is served, read or deleted.
        max_mb: size limit of an uploaded file.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], folder: Path, max_mb: int):
        self.app, self.folder, self.max_bytes = app, folder, max_mb << 20
        self.uploads = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Check a request and pass it on, or refuse it."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        path = scope["path"]
        body = RequestBody(receive, self.max_bytes + MAX_REQUEST_BYTES if path == UPLOAD else MAX_REQUEST_BYTES)

        async def send_unless_cut(message: Message) -> None:
            if body.refused is None:
                await send(message)

        try:
            self.check(scope)
            if path == UPLOAD:
                await self.upload(scope, body, send_unless_cut)
            elif path == JOIN:
                content = self.sanitize_call(await body.read_all())
                scope["headers"] = [(key, value) for key, value in scope["headers"] if key != b"content-length"]
                scope["headers"].append((b"content-length", str(len(content)).encode()))
                await self.app(scope, replay_body(content, receive), send)
            elif scope["method"] == "POST":
                await self.app(scope, body.receive, send_unless_cut)
            else:
                await self.app(scope, receive, send)
        except RefusedRequestError as refused:
            body.refused = refused
        except Exception:
            if body.refused is None:
                raise
        if body.refused is not None:
            await send_refusal(send, body.refused)

    def check(self, scope: Message) -> None:
        """Raise :class:`RefusedRequestError` for requests of other pages, and for those that this page never makes."""
        headers = {key.lower(): value.decode("latin-1") for key, value in scope["headers"]}
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != headers.get(b"host"):
            raise RefusedRequestError(403, "requests from other pages are refused")
        method, path = scope["method"], scope["path"]
        if method == "POST":
            allowed = path in (UPLOAD, JOIN, RESET)
        elif path.startswith(FILE):
            allowed = is_upload(self.folder, path.removeprefix(FILE))
        else:
            allowed = ALLOWED_PATHS.fullmatch(path) is not None
        if not allowed or method not in ("GET", "HEAD", "POST"):
            raise RefusedRequestError(403, "not served")

    def sanitize_call(self, content: bytes) -> bytes:
        """Return a prediction request reduced to its uploaded file, if any; raise for any other content."""
        try:
            call = parse_json(content, "the request")
            data = []
            for file in call["data"][:1]:  # empty for the example
                path = file and file["path"]
                if not (path is None or (isinstance(path, str) and is_upload(self.folder, path))):
                    raise RefusedRequestError(403, "no file that was uploaded here")
                data.append(path and {"path": path, "meta": {"_type": "gradio.FileData"}})
            allowed_keys = {key: call.get(key) for key in ("fn_index", "session_hash", "trigger_id")}
            return json.dumps({"data": data, **allowed_keys}).encode()
        except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RefusedRequestError(400, "no request of this page") from error

    async def upload(self, scope: Message, body: "RequestBody", send: Send) -> None:
        """Pass an upload on, unless too many are in progress."""
        if self.uploads >= MAX_UPLOADS:
            raise RefusedRequestError(503, f"{MAX_UPLOADS} images are being uploaded already; try again")
        self.uploads += 1
        try:
            delete_old_uploads(self.folder, MAX_UPLOADS * self.max_bytes)
            await self.app(scope, body.receive, send)
        finally:
            self.uploads -= 1
            if not self.uploads:  # files outside a subfolder are of interrupted uploads
                for path in self.folder.iterdir():
                    if path.is_file():
                        path.unlink(missing_ok=True)


class RequestBody:
    """The body of a request, limited in size and time.

    Args:
        receive: of the request.
        max_bytes: size limit.

    Attributes:
        refused: why the request was cut off, or None.
        is_complete: whether all of the body has been received.
    """

    def __init__(self, receive: Receive, max_bytes: int):
        self.next, self.remaining, self.deadline = receive, max_bytes, time.monotonic() + BODY_SECONDS
        self.refused: RefusedRequestError | None = None
        self.is_complete = False

    async def receive(self) -> Message:
        """Return the next message, or a disconnect once a limit is exceeded."""
        if self.is_complete:  # only the end of the connection follows
            return await self.next()
        try:
            seconds = min(SILENT_SECONDS, self.deadline - time.monotonic())
            message = await asyncio.wait_for(self.next(), max(0.0, seconds))
        except TimeoutError:
            self.refused = RefusedRequestError(408, "the upload is too slow")
            return {"type": "http.disconnect"}
        self.remaining -= len(message.get("body", b""))
        self.is_complete = not message.get("more_body", False)
        if self.remaining < 0:
            self.refused = RefusedRequestError(413, "the upload exceeds the maximum allowed size")
            return {"type": "http.disconnect"}
        return message

    async def read_all(self) -> bytes:
        """Return the complete body; raise :class:`RefusedRequestError` if a limit is exceeded."""
        content = b""
        while not self.is_complete:
            message = await self.receive()
            if self.refused:
                raise self.refused
            content += message.get("body", b"")
        return content


def is_upload(folder: Path, name: str) -> bool:
    """Return whether ``name``, links resolved, is a regular file in ``folder``, or a missing one."""
    try:
        path = Path(name).resolve()
        if not path.is_relative_to(folder.resolve()):
            return False
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return True
    except (OSError, ValueError, RuntimeError):
        return False


def delete_old_uploads(folder: Path, max_bytes: int) -> None:
    """Delete uploads that were not read in time, and the oldest ones while the total exceeds ``max_bytes``."""
    files = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            state = path.lstat()
            if stat.S_ISREG(state.st_mode):
                files.append((state.st_mtime, state.st_size, path))
    total = sum(size for _, size, _ in files)
    for modified, size, path in sorted(files):
        if total <= max_bytes and time.time() - modified < UPLOAD_LIFETIME_SECONDS:
            continue
        path.unlink(missing_ok=True)
        total -= size
    for path in folder.iterdir():
        with suppress(OSError):  # the folder is not empty
            path.rmdir()


def replay_body(content: bytes, receive: Receive) -> Receive:
    """Return a receive function with ``content`` as the body of a request, followed by messages of ``receive``."""
    parts = [content]

    async def receive_replayed() -> Message:
        return {"type": "http.request", "body": parts.pop(), "more_body": False} if parts else await receive()

    return receive_replayed


async def send_refusal(send: Send, refused: RefusedRequestError) -> None:
    """Answer a refused request and close the connection."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{refused}\n".encode()})


def build_http_protocol() -> type:
    """Return uvicorn's HTTP/1.1 protocol with limits on connections and on the time for a request's head."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > MAX_CONNECTIONS:
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
            """Close the connection unless a request begins in time."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.stop_waiting()
            elif self.deadline is None:
                self.deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

        def stop_waiting(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

    return Protocol
