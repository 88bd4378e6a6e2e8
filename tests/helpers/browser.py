"""A headless Chromium driven through its own debugging pipe: real clicks, real keys, screenshots; no package needed."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
KEYS = {
    "Escape": 27,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Tab": 9,
    "Enter": 13,
    "End": 35,
}


def chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. ``requests``: what was asked for, ``complaints``: console errors, exceptions, broken policies."""

    def __init__(self, profile: Path):
        ours, theirs = os.pipe(), os.pipe()  # commands go through the first, answers come through the second
        command = [chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--no-first-run", "--disable-extensions", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        # The browser expects the pipe's ends as descriptors 3 and 4.
        shell = f'exec 8<&{ours[0]} 9>&{theirs[1]}; exec 3<&8 4>&9 8<&- 9>&-; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command, "about:blank"],
            pass_fds=(ours[0], theirs[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.into, self.out, self.buffer, self.number = ours[1], theirs[0], b"", 0
        self.session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.loaded = False
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        try:
            self.session = None
            self.ask("Browser.close")
            self.process.wait(10)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.into)
        os.close(self.out)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.into, data) :]
        while (answer := self.read()).get("id") != self.number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def read(self, seconds: float = 60) -> dict[str, Any]:
        """The next message; what a page must not do is written down on the way."""
        until = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.out], [], [], max(0, until - time.monotonic()))
            part = os.read(self.out, 2**20) if ready else b""
            if not part:
                raise TimeoutError("the browser says nothing")
            self.buffer += part
        data, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(data)
        about = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])
            case "Page.loadEventFired":
                self.loaded = True
            case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(about["args"]))
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(about["exceptionDetails"])[:500])
            case "Log.entryAdded":
                self.complaints.append(about["entry"]["text"])
        return message

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.size(width, height)
        self.prefer(dark)
        self.requests.clear()
        self.complaints.clear()
        self.loaded = False
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self.read()
        self.settle()

    def size(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)

    def prefer(self, dark: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[feature])

    def js(self, expression: str) -> Any:
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def settle(self) -> None:
        """Two frames later."""
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def where(self, selector: str, number: int = 0, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
        """Scroll an element into view and give a point of it, once it stands still there with nothing on top."""
        find = (
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{number}]; if (!e) return null;"
            " e.scrollIntoView({block: 'center', behavior: 'instant'}); const b = e.getBoundingClientRect();"
            f" const p = [b.x + b.width * {x}, b.y + b.height * {y}], t = document.elementFromPoint(...p);"
            " return [...p, !!t && (e === t || e.contains(t) || t.contains(e))]; })()"
        )
        deadline = time.monotonic() + 20  # a busy machine draws parts of a page late
        spot, previous = self.js(find), None
        while time.monotonic() < deadline and not (spot and spot[2] and spot == previous):
            self.settle()
            spot, previous = self.js(find), spot
        assert spot is not None, f"there is no {selector} number {number}"
        assert spot[2], f"{selector} number {number} is covered"
        return spot[0], spot[1]

    def move(self, x: float, y: float) -> None:
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str, number: int = 0, **at: float) -> None:
        x, y = self.where(selector, number, **at)
        self.move(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def key(self, name: str) -> None:
        about: dict[str, Any] = {"key": name, "code": name, "windowsVirtualKeyCode": KEYS[name]}
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, **about, **({"text": "\r"} if name == "Enter" else {}))
        self.settle()

    def screenshot(self, path: Path, full_page: bool = False) -> None:
        """What is seen; ``whole``: all of the page."""
        content = self.ask(
            "Page.captureScreenshot", format="png", captureBeyondViewport=full_page, **self._clip(full_page)
        )
        path.write_bytes(base64.b64decode(content["data"]))

    def _clip(self, full_page: bool) -> dict[str, Any]:
        if not full_page:
            return {}
        box = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": box["width"], "height": box["height"], "scale": 1}}
