"""Latency of inference: eager, compiled, ONNX Runtime and TensorRT, per decoder; also with the regularizer attached.

    python scripts/benchmarks/benchmark_inference.py [overrides ...] [--decoders NAME ...] [--size H W] [--batch N ...]
        [--backends NAME ...] [--repeats N] [--seconds N] [--device DEVICE] [--precision fp32|bf16] [--json OUT]

Each decoder is that of an experiment in configs/ on the backbone that it was published with (EXPERIMENTS below), with
the four tasks of NYUD-v2 and random weights; nothing is downloaded. Overrides are those of train.py and apply to every
row, e.g. backbone=resnet18. Default: all decoders, 448 x 576, batches of 1 and 16, all backends.

A row is the median of several passes (--repeats, --seconds) of ``model.predict`` (with ONNX Runtime including the
normalisation), after a first one; the backends take turns, pass by pass, so that drift of the machine affects all
equally. In single precision, unless --precision says otherwise (ONNX is always fp32, and on CUDA includes the copies
from and to the host). ``tensorrt`` is ONNX Runtime's provider of that name. A backend that is not installed, or has
nothing for the device, is left out; the JSON says why. Memory is the peak of a pass beyond weights and input: the CUDA
allocator's count, or on a CPU the profiler's record of tensors.

The row ``regulariser`` compares, pass by pass in turns, the model trained with regularizer=none and the model with the
regularizer attached, built from one seed: their outputs must be bit-equal, or the script exits with 1.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # less log output of the profiler; both are read when torch is imported
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtcl.atomic import write_json
from mtcl.cli.arguments import CommandParser, positive_int
from mtcl.cli.export import export_model
from mtcl.cli.script import run
from mtcl.config.build_data import build_tasks, get_image_size
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_regularizer
from mtcl.config.compose import compose_config
from mtcl.config.load import LoadedModel, SavedModel
from mtcl.config.resolve import plain
from mtcl.config.stored_config import describe_tasks
from mtcl.errors import UserError
from mtcl.inference.export import smooth_random_images
from mtcl.inference.model_files import ONNX_FILE
from mtcl.profiling.timing import measure_in_turns, measure_peak_memory
from mtcl.runtime import autocast, choose_device, is_out_of_memory, seed_everything
from mtcl.training.train_step import TrainingStep

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERIMENTS = {
    "multi_head": "nyud_multi_head_hrnet18",
    "deeplab": "nyud_deeplab_resnet18",
    "pad_net": "nyud_pad_net_hrnet18",
    "mti_net": "nyud_mti_net_hrnet18",
    "atrc": "nyud_atrc_hrnet18",
    "segnet": "nyuv2_13_segnet",
    "mtan": "nyuv2_13_mtan",
    "invpt": "nyud_invpt_vit_base",
    "invpt_plus_plus": "nyud_invpt_plus_plus_vit_base",
    "taskprompter": "nyud_taskprompter_vit_base",
    "mqtransformer": "pascal_mqtransformer_swin_tiny",
    "diffusion_mtl": "pascal_onelabel_diffusion_mtl_resnet18",
    "task_tokens": "nyud_onelabel_task_tokens_resnet18",
    "task_diffusion": "nyud_task_diffusion_vit_large",
    "task_expert": "nyud_task_expert_vit_large",
    "linear": "nyud_linear_dinov2_vit_base",
    "dpt": "nyud_dpt_dinov2_vit_base",
    "sak": "nyud_sak_vit_base",
}
BACKENDS = ("eager", "compiled", "onnx", "tensorrt")
PROVIDERS = {  # of ONNX Runtime, by backend and device
    "onnx": {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"},
    "tensorrt": {"cuda": "TensorrtExecutionProvider"},
}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MIB = 2**20

Pass = Callable[[], Any]
Backend = Callable[[Tensor], Pass]  # image -> pass
Row = dict[str, Any]


def compose_benchmark(decoder: str, size: Sequence[int], overrides: Sequence[str]) -> DictConfig:
    """Return the config of a decoder's experiment for this benchmark."""
    defaults = [f"experiment={EXPERIMENTS[decoder]}", "data=nyud", "tasks=nyud", f"data.size=[{size[0]},{size[1]}]"]
    return compose_config([*defaults, "regularizer=contrastive", *overrides], CONFIGS)


def build_step(config: DictConfig, device: torch.device, with_regularizer: bool) -> TrainingStep:
    """Build model and regularizer as at the start of a run, ready for inference."""
    seed_everything(0)
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False).to(device)
    calibrate_batch_norms(model, make_images(2, get_image_size(config), device))
    regularizer = build_regularizer(config, tasks, model) if with_regularizer else None
    return TrainingStep(model, regularizer.to(device) if regularizer is not None else None).eval()


def make_images(count: int, size: Sequence[int], device: torch.device) -> Tensor:
    """Return random images (count, 3, H, W) with about the statistics of normalised photographs."""
    return (
        torch.from_numpy(np.stack(smooth_random_images(count, *size))).permute(0, 3, 1, 2).float().to(device) - 120
    ) / 60


@torch.no_grad()
def calibrate_batch_norms(model: nn.Module, image: Tensor) -> None:
    """Set the running statistics of batch norms to those of ``image``, as after training.

    Otherwise values grow from layer to layer until rounding errors, in which backends differ, matter.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    model.train()(image)


def limit_turns(repeats: int, seconds: float) -> Iterator[int]:
    """Yield the numbers of turns, from 0, until there are ``repeats`` or ``seconds`` have passed; at least one."""
    began = time.perf_counter()
    for turn in range(repeats):
        yield turn
        if time.perf_counter() - began > seconds:
            return


def time_passes(passes: Mapping[str, Pass], device: torch.device, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of every pass: name -> one for each turn."""

    def take(name: str, _turn: int) -> None:
        passes[name]()

    works = {name: partial(take, name) for name in passes}
    durations = measure_in_turns(works, limit_turns(args.repeats, args.seconds), device)
    return {name: [clock for clock, _ in pairs] for name, pairs in durations.items()}


def explain_absence(backend: str, device: torch.device) -> str | None:
    """Return why a backend can't be measured on this device; None if it can."""
    if backend not in PROVIDERS:
        return None
    absent = [package for package in ONNX_PACKAGES if find_spec(package) is None]
    if absent:
        return f"needs {', '.join(absent)}; pip install 'mtcl[export]'"
    if device.type not in PROVIDERS[backend]:
        return f"has nothing for device={device.type}"
    import onnxruntime

    provider = PROVIDERS[backend][device.type]
    if provider not in onnxruntime.get_available_providers():
        return f"this onnxruntime has no {provider}; pip install onnxruntime-gpu"
    return None


def onnx_session(backend: str, config: DictConfig, step: TrainingStep, device: torch.device) -> Any:
    """Export the model for this size as ``mtcl export`` does; raise ``UserError`` if that or the provider fails."""
    import onnxruntime

    tasks = build_tasks(config)
    model = deepcopy(step.model).cpu()
    saved = SavedModel(Path("random"), model.state_dict(), plain(config), describe_tasks(tasks), 0)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    provider = PROVIDERS[backend][device.type]
    providers = list(dict.fromkeys([provider, PROVIDERS["onnx"][device.type]]))  # the second has all operations
    with tempfile.TemporaryDirectory() as folder:
        export_model(
            LoadedModel(model, tasks, get_image_size(config), saved), "onnx", Path(folder) / "model", fixed_size=True
        )
        session = onnxruntime.InferenceSession(Path(folder) / "model" / ONNX_FILE, options, providers=providers)
    if session.get_providers()[0] != provider:  # ONNX Runtime then goes on with another one
        raise UserError(f"ONNX Runtime can't load the libraries of {provider}")
    return session


def backend_passes(name: str, config: DictConfig, step: TrainingStep, device: torch.device) -> Backend:
    """Return the backend; one that could not be built raises in its first pass."""
    if name == "eager":
        return lambda image: partial(step.model.predict, image)
    if name == "compiled":
        torch._dynamo.reset()
        work = torch.compile(step.model.predict, dynamic=False)  # compiled for each batch size
        return lambda image: partial(work, image)
    try:
        session = onnx_session(name, config, step, device)
    except UserError as error:
        reason = str(error)
        return lambda _: partial(raise_reason, reason)
    return lambda image: partial(session.run, None, {"image": (image.cpu() * 60 + 120).numpy()})  # 0..255


def raise_reason(reason: str) -> None:
    """Raise ``RuntimeError``: the pass of a backend that could not be built."""
    raise RuntimeError(reason)


def compare_with_regularizer(
    step: TrainingStep, regularized: TrainingStep, image: Tensor, device: torch.device, args: argparse.Namespace
) -> Row:
    """Time the model without and with the regularizer; raise ``UserError`` if their outputs differ."""
    if regularized.regularizer is None:
        raise UserError("this config has no regularizer; remove regularizer=none")
    without, with_it = step.model.predict(image), regularized.model.predict(image)
    for task in without:
        if not torch.equal(without[task], with_it[task]):
            raise UserError(f"the predictions of {task} differ with the regularizer attached; this is a bug")
    passes = {"off": partial(step.model.predict, image), "on": partial(regularized.model.predict, image)}
    seconds = time_passes(passes, device, args)
    off, on = (1e3 * statistics.median(seconds[name]) for name in passes)
    return {"batch": len(image), "off_ms": off, "on_ms": on, "identical": True}


def try_pass(backend: str, work: Pass) -> str | None:
    """Run a first pass, in which compilers compile; return why it failed, or None."""
    try:
        work()
    except Exception as error:  # compilers and ONNX Runtime raise many kinds
        if is_out_of_memory(error):
            return "not enough memory"
        if backend == "eager":
            raise
        return str(error).strip().split("\n")[0][:120]
    return None


def compute_rows(decoder: str, config: DictConfig, args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Measure a decoder with all backends and batch sizes."""
    rows: list[Row] = []
    step, regularized = (build_step(config, device, with_regularizer=on) for on in (False, True))
    parameters = sum(p.numel() for p in step.model.parameters())
    compared: Row = {}
    works = {backend: backend_passes(backend, config, step, device) for backend in args.backends}
    for batch in args.batch:
        image = make_images(batch, args.size, device)
        with torch.inference_mode(), autocast(device, args.precision):
            passes = {backend: work(image) for backend, work in works.items()}
            errors = {backend: try_pass(backend, work) for backend, work in passes.items()}
            passes = {backend: work for backend, work in passes.items() if errors[backend] is None}
            seconds = time_passes(passes, device, args)
            for backend in works:
                row: Row = {"decoder": decoder, "backbone": config.backbone.name, "parameters": parameters}
                row |= {"size": list(args.size), "batch": batch, "backend": backend, "ms": None, "memory_mib": None}
                if backend in passes:
                    row["ms"] = 1e3 * statistics.median(seconds[backend])
                    row["repeats"] = len(seconds[backend])
                    row["images_per_s"] = 1e3 * batch / row["ms"]
                else:
                    row["error"] = errors[backend]
                if backend == "eager" and backend in passes:
                    row["memory_mib"] = measure_peak_memory(passes[backend], device) / MIB
                    compared = compared or compare_with_regularizer(step, regularized, image, device, args)
                rows.append(row)
                print_row(row)
    if compared:
        rows.append({"decoder": decoder, "backend": "regulariser", **compared})
        off, on, batch = compared["off_ms"], compared["on_ms"], compared["batch"]
        print(
            f"{decoder:13} {'regulariser':10} {batch:5}  off {off:.1f} ms, on {on:.1f} ms: outputs identical",
            flush=True,
        )
    return rows


def print_row(row: Row) -> None:
    """Print a row of the table."""
    start = f"{row['decoder']:13} {row['backend']:10} {row['batch']:5}"
    if row["ms"] is None:
        print(f"{start}  {row['error']}", flush=True)
        return
    memory = "-" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
    print(f"{start} {row['ms']:10.1f} {row['images_per_s']:9.2f} {memory:>8}  {row['backbone']}", flush=True)


def main() -> None:
    """Parse the command line and run the benchmark."""
    parser = CommandParser(__doc__)
    parser.add_argument("--decoders", nargs="+", default=list(EXPERIMENTS), choices=list(EXPERIMENTS))
    parser.add_argument("--size", nargs=2, type=positive_int, default=[448, 576], metavar=("H", "W"))
    parser.add_argument("--batch", nargs="+", type=positive_int, default=[1, 16])
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--repeats", type=positive_int, help="passes timed; default 30 on CUDA, 5 on a CPU")
    parser.add_argument("--seconds", type=positive_int, default=30, help="no further passes with a batch after so many")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    parser.add_argument("overrides", nargs="*", help="of train.py, for every row")
    args = parser.parse_intermixed_args()  # and overrides before or between them
    for override in args.overrides:
        if "=" not in override:
            raise UserError(f"{override} is not an override key=value of train.py")
    device = choose_device(args.device, "--device")
    args.repeats = args.repeats or (30 if device.type == "cuda" else 5)
    configs = {name: compose_benchmark(name, args.size, args.overrides) for name in args.decoders}
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{platform.machine()}, {device_name}, torch {torch.__version__}, {args.size[0]} x {args.size[1]}")
    omitted = {name: reason for name in args.backends if (reason := explain_absence(name, device)) is not None}
    args.backends = [name for name in args.backends if name not in omitted]
    for name, reason in omitted.items():
        print(f"{name}: left out, {reason}")
    print(f"{'decoder':13} {'backend':10} {'batch':>5} {'ms':>10} {'images/s':>9} {'peak MiB':>8}  backbone")
    rows: list[Row] = []
    for decoder, config in configs.items():
        rows += compute_rows(decoder, config, args, device)
        if args.json:
            metadata: dict[str, object] = {"machine": platform.machine(), "device": device_name}
            metadata |= {"torch": torch.__version__, "precision": args.precision, "left_out": omitted}
            write_json(args.json, {**metadata, "rows": rows})


if __name__ == "__main__":
    run(main)
