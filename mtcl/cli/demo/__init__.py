"""A trained model as a local web page: drop a picture, see all tasks. Gradio carries it.

``answer`` makes of a picture what the page shows; ``demo.css`` and ``demo.js`` go into the page as they are.
"""

import errno
import ipaddress
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mtcl.cli import arguments as read
from mtcl.cli.demo.answer import Named, answer, answer_image, esc, example_image, image
from mtcl.cli.demo.guard import Guard, is_upload, patient_protocol
from mtcl.config.load import build_predictor, load_model
from mtcl.errors import UserError
from mtcl.inference.predictor import MODES

KEYS: dict[str, Any] = {
    "checkpoint": str,
    "compare": str,
    "host": str,
    "port": read.whole,
    "device": read.choice("auto", "cpu", "cuda"),
    "mode": read.choice(*MODES),
    "max_pixels": read.whole,
    "max_mb": read.whole,
}
WAITING = 8  # pictures that may wait for the one in work; more are refused
SECONDS_TO_END = 2  # for pages still open when it ends


def demo(words: Sequence[str]) -> None:
    """What ``scripts/demo.py`` does with its words."""
    given = read.parse(words, KEYS)
    if not given.get("checkpoint"):
        raise UserError("demo.py needs checkpoint=; python scripts/demo.py --help says more")
    need_gradio()
    door = opened(given.get("host", "127.0.0.1"), given.get("port", 7860))
    with door:
        options: dict[str, Any] = {key: given[key] for key in ("device", "mode", "max_pixels") if key in given}
        sources = [given[key] for key in ("checkpoint", "compare") if given.get(key)]
        models = load(sources, options)
        serve(models, door, given.get("max_mb", 25))


def need_gradio() -> None:
    """Told at once; it is imported later, where its settings are known."""
    if find_spec("gradio") is None:
        raise UserError("scripts/demo.py needs Gradio; pip install 'mtcl[demo]' (gradio>=6)")


def opened(host: str, port: int) -> socket.socket:
    """Listening; bound before a model is loaded, so that a mistake is told at once."""
    if port > 65535:  # the C library would take its last 16 bits
        raise UserError(f"port={port}: a port is a number up to 65535")
    try:
        address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4]
        return socket.create_server(address)
    except socket.gaierror as error:
        raise UserError(f"host={host} is no IPv4 address, or a name that is not known here") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port={port} is in use on {host}; give another, such as port={port + 1}") from error
        raise UserError(f"host={host} port={port}: {error.strerror}; give another") from error


def load(sources: Sequence[str], options: dict[str, Any]) -> list[Named]:
    """One or two models, with the tasks that they have in common."""
    loaded = [load_model(source) for source in sources]
    common = [name for name in loaded[0].tasks if all(name in other.tasks for other in loaded)]
    if not common:
        lists = "; ".join(f"{s}: {', '.join(one.tasks)}" for s, one in zip(sources, loaded))
        raise UserError(f"the two models have no task in common ({lists})")
    return [Named(s, build_predictor(one, tasks=common, **options)) for s, one in zip(sources, loaded)]


def serve(models: Sequence[Named], door: socket.socket, max_mb: int) -> None:
    """Until Ctrl-C. Uploads lie in a folder of its own that goes with it; each goes as soon as it is read."""
    folder = tempfile.mkdtemp(prefix="mtcl_demo_")
    # What Gradio reads when it is imported: where uploads lie, and that it asks and keeps nothing.
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the folder goes then, too
    try:
        import uvicorn

        host, port = door.getsockname()[:2]
        app = application(models, host, port, max_mb, Path(folder))
        if not ipaddress.ip_address(host).is_loopback:
            print(f"host={host}: whoever reaches this machine over its network can open this page and use the model.")
        print(f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}   (Ctrl-C ends it)", flush=True)
        # Pages still open when it ends are cut off, which uvicorn would tell as errors, with traces.
        config = uvicorn.Config(
            app, http=patient_protocol(), log_level="critical", timeout_graceful_shutdown=SECONDS_TO_END
        )
        uvicorn.Server(config).run(sockets=[door])
    except KeyboardInterrupt:
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def application(models: Sequence[Named], host: str, port: int, max_mb: int, folder: Path) -> Any:
    """The page as an ASGI application; ``folder`` is where Gradio puts uploads."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    def shown(path: str | None) -> Any:
        if path is None:
            return gr.skip(), gr.skip()
        if not is_upload(folder, path):  # the guard lets no other through; but the file is removed here
            raise ValueError("no file that was uploaded here")
        return None, answer(models, Path(path))

    example = example_image(models[0].predictor.size)
    limits = f"up to {max_mb} MB and {models[0].predictor.max_pixels / 1e6:.3g} million pixels"
    names = " and ".join(f"<b>{esc(model.name)}</b>" for model in models)
    lead = f"Predicted by {names} on {models[0].predictor.device} of this machine. Nothing is kept or sent elsewhere."
    # What was read goes at once (answer), what never was after a while.
    with gr.Blocks(title="mtcl: all tasks of a picture", analytics_enabled=False, delete_cache=(60, 600)) as blocks:
        gr.HTML(f"<h1>All tasks of a picture</h1><p>{lead}</p>", js_on_load=None, elem_id="head")
        with gr.Row(equal_height=True):
            picture: Any = gr.Image(
                type="filepath",
                sources=["upload", "clipboard"],
                height=170,
                scale=4,
                show_label=False,
                buttons=[],
                placeholder=f"Drop a picture here, or click to choose one\n({limits})",
                elem_id="drop",
            )
            with gr.Column(scale=1, min_width=200, elem_id="example"):
                gr.HTML(image(example, "a rendered room", ".jpg", "image/jpeg"), js_on_load=None, padding=False)
                button = gr.Button("Try this example", size="sm")
        # The file as it was uploaded: what is no picture is told by us. No subclass: Gradio writes a .pyi for each.
        picture.preprocess = lambda payload: payload.path if payload else None
        found = gr.HTML("", js_on_load=asset("demo.js"), elem_id="found", apply_default_css=False)
        button.click(
            lambda: answer_image(models, example, "Example, a rendered room"),
            outputs=found,
            show_progress_on=found,
            concurrency_id="model",
            api_visibility="private",
        )
        picture.upload(
            shown, picture, [picture, found], show_progress_on=found, concurrency_id="model", api_visibility="private"
        )
    blocks.queue(default_concurrency_limit=1, max_size=WAITING, api_open=False)
    app = FastAPI(openapi_url=None)
    app.add_middleware(Guard, folder=folder, max_mb=max_mb)
    if ipaddress.ip_address(host).is_loopback:  # a foreign page whose name leads here has no say
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", host])
    system = ["system-ui", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif"]
    theme = gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"])
    options = {"theme": theme, "css": asset("demo.css"), "footer_links": [], "show_error": False}
    return gr.mount_gradio_app(app, blocks, "/", host, port, max_file_size=f"{max_mb}mb", ssr_mode=False, **options)


def asset(name: str) -> str:
    return files("mtcl.cli.demo").joinpath(name).read_text("utf-8")
