"""Show a trained model as a web page on this machine: drop an image, see all tasks, point at them to read metres.

    mtcl demo CHECKPOINT [--compare OTHER] [options]

CHECKPOINT: a .pt file, a run's folder, an exported folder, a name on the Hugging Face hub, or "rooms", the small model
of procedural rooms that comes with mtcl. OTHER: another one, shown beside it with the tasks that both have.

One image is predicted at a time. Images are not kept; nothing is sent elsewhere. Ctrl-C ends it. With --host, other
machines can open the page, too. Needs Gradio: pip install 'mtcl[demo]'.
"""

# tiles.py renders what the page shows of an image; demo.css and demo.js go into the page as they are.

import argparse
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
from pathlib import Path
from typing import Any

from mtcl.cli.arguments import BACKBONE_WEIGHTS_HELP, positive_int, require_extra
from mtcl.cli.demo.guard import Guard, build_http_protocol, is_upload
from mtcl.cli.demo.tiles import (
    NamedPredictor,
    embed_image,
    escape,
    render_example,
    render_file_prediction,
    render_prediction,
)
from mtcl.cli.terminal import announce_loading
from mtcl.config.load import build_predictor, load_models
from mtcl.errors import UserError
from mtcl.inference.predictor import MODES

MAX_WAITING = 8  # images that may wait while another is predicted
SHUTDOWN_SECONDS = 2  # for pages that are open when the server stops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mtcl demo``."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--compare", metavar="OTHER", help="a second model, shown beside it")
    parser.add_argument("--backbone-weights", metavar="FILE|hub", help=BACKBONE_WEIGHTS_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine only")
    parser.add_argument("--port", type=positive_int, default=7860, help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--mode", choices=MODES, help="how images much larger than the training frame are predicted")
    parser.add_argument("--max-pixels", type=positive_int, metavar="N", help="refuse images with more pixels")
    parser.add_argument("--max-mb", type=positive_int, default=25, help="refuse larger files; default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Load the models and serve the page until Ctrl-C."""
    require_extra("mtcl demo", "demo", "gradio")  # imported later, once its settings are known
    listener = bind_socket(args.host, args.port)
    with listener:
        options = {key: getattr(args, key) for key in ("device", "mode", "max_pixels")}
        sources = [source for source in (args.checkpoint, args.compare) if source]
        options = {key: value for key, value in options.items() if value is not None}
        models = load(sources, options, args.backbone_weights)
        serve(models, listener, args.max_mb)


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket; it is bound before a model is loaded, so that mistakes are reported early."""
    if port > 65535:  # the C library would use its last 16 bits
        raise UserError(f"--port {port}: a port is a number up to 65535")
    try:
        address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4]
        return socket.create_server(address)
    except socket.gaierror as error:
        raise UserError(f"--host {host} is no IPv4 address, or a name that is not known here") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port} is in use on {host}; give another, such as --port {port + 1}") from error
        raise UserError(f"--host {host} --port {port}: {error.strerror}; give another") from error


def load(sources: Sequence[str], options: dict[str, Any], backbone_weights: str | None = None) -> list[NamedPredictor]:
    """Load one or two models with the tasks that they have in common."""
    loaded = load_models(sources, backbone_weights)
    common = [name for name in loaded[0].tasks if all(name in other.tasks for other in loaded)]
    if not common:
        lists = "; ".join(f"{s}: {', '.join(one.tasks)}" for s, one in zip(sources, loaded))
        raise UserError(f"the two models have no task in common ({lists})")
    return [NamedPredictor(s, build_predictor(one, tasks=common, **options)) for s, one in zip(sources, loaded)]


def serve(models: Sequence[NamedPredictor], listener: socket.socket, max_mb: int) -> None:
    """Serve until Ctrl-C. Uploads go to a temporary folder and are deleted once read."""
    folder = tempfile.mkdtemp(prefix="mtcl_demo_")
    # Gradio reads these when imported: the folder of uploads, no analytics, no history.
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the folder is deleted then, too
    try:
        import uvicorn

        host, port = listener.getsockname()[:2]
        app = build_app(models, host, port, max_mb, Path(folder))
        if not ipaddress.ip_address(host).is_loopback:
            print(f"--host {host}: whoever reaches this machine over its network can open this page and use the model.")
        print(f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}   (Ctrl-C ends it)", flush=True)
        # Open pages are disconnected at the end, which uvicorn would log as errors with traces.
        config = uvicorn.Config(
            app, http=build_http_protocol(), log_level="critical", timeout_graceful_shutdown=SHUTDOWN_SECONDS
        )
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build_app(models: Sequence[NamedPredictor], host: str, port: int, max_mb: int, folder: Path) -> Any:
    """Build the page as an ASGI application; ``folder`` is for Gradio's uploads."""
    with announce_loading("Gradio"):
        import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    def predict_upload(path: str | None) -> Any:
        if path is None:
            return gr.skip(), gr.skip()
        if not is_upload(folder, path):  # the guard refuses others already, but the file is deleted here
            raise ValueError("no file that was uploaded here")
        return None, render_file_prediction(models, Path(path))

    example = render_example(models[0].predictor.size)
    limits = f"up to {max_mb} MB and {models[0].predictor.max_pixels / 1e6:.3g} million pixels"
    names = " and ".join(f"<b>{escape(model.name)}</b>" for model in models)
    lead = f"Predicted by {names} on {models[0].predictor.device} of this machine. Nothing is kept or sent elsewhere."
    # An upload is deleted once predicted; one that never is, after a while.
    with gr.Blocks(title="mtcl: all tasks of an image", analytics_enabled=False, delete_cache=(60, 600)) as blocks:
        gr.HTML(f"<h1>All tasks of an image</h1><p>{lead}</p>", js_on_load=None, elem_id="head")
        with gr.Row(equal_height=True):
            upload: Any = gr.Image(
                type="filepath",
                sources=["upload", "clipboard"],
                height=170,
                scale=4,
                show_label=False,
                buttons=[],
                placeholder=f"Drop an image here, or click to choose one\n({limits})",
                elem_id="drop",
            )
            with gr.Column(scale=1, min_width=200, elem_id="example"):
                gr.HTML(embed_image(example, "a rendered room", ".jpg", "image/jpeg"), js_on_load=None, padding=False)
                button = gr.Button("Try this example", size="sm")
        # Pass the uploaded file on: we report files that are no images. No subclass: Gradio writes a .pyi for each.
        upload.preprocess = lambda payload: payload.path if payload else None
        output = gr.HTML("", js_on_load=read_asset("demo.js"), elem_id="found", apply_default_css=False)
        button.click(
            lambda: render_prediction(models, example, "Example, a rendered room"),
            outputs=output,
            show_progress_on=output,
            concurrency_id="model",
            api_visibility="private",
        )
        upload.upload(
            predict_upload,
            upload,
            [upload, output],
            show_progress_on=output,
            concurrency_id="model",
            api_visibility="private",
        )
    blocks.queue(default_concurrency_limit=1, max_size=MAX_WAITING, api_open=False)
    app = FastAPI(openapi_url=None)
    app.add_middleware(Guard, folder=folder, max_mb=max_mb)
    if ipaddress.ip_address(host).is_loopback:  # against DNS rebinding by other pages
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", host])
    system = ["system-ui", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif"]
    theme = gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"])
    settings = {"theme": theme, "css": read_asset("demo.css"), "footer_links": [], "show_error": False}
    return gr.mount_gradio_app(app, blocks, "/", host, port, max_file_size=f"{max_mb}mb", ssr_mode=False, **settings)


def read_asset(name: str) -> str:
    """Return the text of a file of this package."""
    return files("mtcl.cli.demo").joinpath(name).read_text("utf-8")
