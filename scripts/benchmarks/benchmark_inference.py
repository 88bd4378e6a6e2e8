"""Latency of inference: eager, compiled and ONNX Runtime, per decoder; with and without the regulariser attached.

    python scripts/benchmarks/benchmark_inference.py [overrides ...] [--decoders NAME ...] [--size H W] [--batch N ...]
        [--backends NAME ...] [--repeats N] [--seconds N] [--device DEVICE] [--precision fp32|bf16] [--json OUT]

Each decoder is that of an experiment in configs/ on the backbone that it was published with (EXPERIMENTS below), with
the four tasks of NYUD-v2 and random weights; nothing is downloaded. Overrides are those of train.py and go to every
row, e.g. backbone=resnet18. Default: all decoders, 448 x 576, batches of 1 and 16, all backends.

A row is the median of some passes (--repeats, --seconds) of ``model.predict`` (ONNX Runtime's with normalisation
inside), after a first one; the backends take turns, pass by pass, so that a drifting machine is fair to all. In single
precision, unless --precision says otherwise (of ONNX it is always fp32, and on CUDA with the copies from and to the
host). Memory is what a pass holds at its peak beyond weights and input: the CUDA allocator's count, or on a CPU the
profiler's record of tensors.

``regulariser`` compares, pass by pass in turns, the model as it is trained with regularizer=none and with the
regulariser beside it, built from one seed: their outputs must be equal bit for bit, or the script ends with 1.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's chatter; both are read when torch is loaded
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtcl.atomic import write_json
from mtcl.cli.export import ONNX, export_model, smooth_random_images
from mtcl.cli.predict import is_out_of_memory
from mtcl.cli.script import run
from mtcl.config.build_data import build_tasks, get_image_size
from mtcl.config.build_model import build_model
from mtcl.config.build_training import build_regularizer
from mtcl.config.compose import compose_config
from mtcl.config.load import LoadedModel, SavedModel
from mtcl.config.resolve import plain
from mtcl.config.stored_config import describe_tasks
from mtcl.errors import UserError
from mtcl.profiling.timing import measure_peak_memory, measure_time
from mtcl.runtime import autocast, choose_device, seed_everything
from mtcl.training.train_step import TrainingStep

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXPERIMENTS = {
    "multi_head": "nyud_multi_head_hrnet18",
    "deeplab": "nyud_deeplab_resnet18",
    "pad_net": "nyud_pad_net_hrnet18",
    "mti_net": "nyud_mti_net_hrnet18",
    "atrc": "nyud_atrc_hrnet18",
    "invpt": "nyud_invpt_vit_base",
    "taskprompter": "nyud_taskprompter_vit_base",
    "mqtransformer": "pascal_mqtransformer_swin_tiny",
}
BACKENDS = ("eager", "compiled", "onnx")
MIB = 2**20

Pass = Callable[[], Any]
Backend = Callable[[Tensor], Pass]  # of a picture
Row = dict[str, Any]


def composed(decoder: str, size: Sequence[int], overrides: Sequence[str]) -> DictConfig:
    words = [f"experiment={EXPERIMENTS[decoder]}", "data=nyud", "tasks=nyud", f"data.size=[{size[0]},{size[1]}]"]
    return compose_config([*words, *overrides], CONFIGS)


def built(config: DictConfig, device: torch.device, regularised: bool) -> TrainingStep:
    """Model and regulariser, as a run of this config would begin, ready for inference."""
    seed_everything(0)
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False).to(device)
    normalise(model, pictures(2, get_image_size(config), device))
    regularizer = build_regularizer(config, tasks, model) if regularised else None
    return TrainingStep(model, regularizer.to(device) if regularizer is not None else None).eval()


def pictures(count: int, size: Sequence[int], device: torch.device) -> Tensor:
    """About as a model sees photographs."""
    return (
        torch.from_numpy(np.stack(smooth_random_images(count, *size))).permute(0, 3, 1, 2).float().to(device) - 120
    ) / 60


@torch.no_grad()
def normalise(model: nn.Module, image: Tensor) -> None:
    """Batch norms with the statistics of pictures, as trained ones have; else values grow from layer to layer until
    the last digits of single precision, which backends differ in, count.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    model.train()(image)


def in_turns(passes: Sequence[Pass], device: torch.device, words: argparse.Namespace) -> list[list[float]]:
    """Seconds of every pass; they take turns, so that a drifting machine is fair to all. Each was made once before."""
    found: list[list[float]] = [[] for _ in passes]
    began = time.perf_counter()
    for turn in range(words.repeats):
        order = list(enumerate(passes))
        for index, work in order if turn % 2 else order[::-1]:
            found[index].append(measure_time(work, device)[0])
        if time.perf_counter() - began > words.seconds:
            break
    return found


def onnx_session(config: DictConfig, step: TrainingStep, device: torch.device) -> Any:
    """The model as scripts/export.py exports it, for this size, under ONNX Runtime; None where it can't be here."""
    import onnxruntime

    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        print(f"onnx: left out, this onnxruntime has no {provider}; pip install onnxruntime-gpu")
        return None
    tasks = build_tasks(config)
    model = deepcopy(step.model).cpu()
    saved = SavedModel(Path("random"), model.state_dict(), plain(config), describe_tasks(tasks), 0)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        export_model(
            LoadedModel(model, tasks, get_image_size(config), saved), "onnx", Path(folder) / "model", fixed=True
        )
        session = onnxruntime.InferenceSession(Path(folder) / "model" / ONNX, options, providers=[provider])
    return session


def backend_passes(name: str, config: DictConfig, step: TrainingStep, device: torch.device) -> Backend | None:
    """None: it can't be here."""
    if name == "eager":
        return lambda image: partial(step.model.predict, image)
    if name == "compiled":
        torch._dynamo.reset()
        work = torch.compile(step.model.predict, dynamic=False)  # each size of batch by itself
        return lambda image: partial(work, image)
    try:
        session = onnx_session(config, step, device)
    except UserError as error:
        why = str(error)
        return lambda image: partial(refuse, why)
    if session is None:
        return None
    return lambda image: partial(session.run, None, {"image": (image.cpu() * 60 + 120).numpy()})  # 0..255


def refuse(why: str) -> None:
    raise RuntimeError(why)


def compare(
    step: TrainingStep, beside: TrainingStep, image: Tensor, device: torch.device, words: argparse.Namespace
) -> Row:
    """Without and with the regulariser: equal outputs, or UserError; times in turns."""
    if beside.regularizer is None:
        raise UserError("there is no regulariser in this setting; leave regularizer=none out")
    without, with_it = step.model.predict(image), beside.model.predict(image)
    for task in without:
        if not torch.equal(without[task], with_it[task]):
            raise UserError(f"{task} is not the same with the regulariser attached: this must not be")
    seconds = in_turns([lambda: step.model.predict(image), lambda: beside.model.predict(image)], device, words)
    off, on = (1e3 * statistics.median(values) for values in seconds)
    return {"batch": len(image), "off_ms": off, "on_ms": on, "identical": True}


def failure(backend: str, work: Pass) -> str | None:
    """Why a pass can't be made; the first one is also where a compiler works."""
    try:
        work()
    except Exception as error:  # of a compiler, of ONNX Runtime
        if is_out_of_memory(error):
            return "not enough memory"
        if backend == "eager":
            raise
        return str(error).strip().split("\n")[0][:120]
    return None


def rows_of(decoder: str, config: DictConfig, words: argparse.Namespace, device: torch.device) -> list[Row]:
    rows: list[Row] = []
    step, beside = (built(config, device, regularised=on) for on in (False, True))
    parameters = sum(p.numel() for p in step.model.parameters())
    compared: Row = {}
    made = {backend: backend_passes(backend, config, step, device) for backend in words.backends}
    works = {backend: work for backend, work in made.items() if work is not None}
    for batch in words.batch:
        image = pictures(batch, words.size, device)
        with torch.inference_mode(), autocast(device, words.precision):
            passes = {backend: work(image) for backend, work in works.items()}
            errors = {backend: failure(backend, work) for backend, work in passes.items()}
            passes = {backend: work for backend, work in passes.items() if errors[backend] is None}
            seconds = dict(zip(passes, in_turns(list(passes.values()), device, words)))
            for backend in works:
                row: Row = {"decoder": decoder, "backbone": config.backbone.name, "parameters": parameters}
                row |= {"size": list(words.size), "batch": batch, "backend": backend, "ms": None, "memory_mib": None}
                if backend in passes:
                    row["ms"] = 1e3 * statistics.median(seconds[backend])
                    row["repeats"] = len(seconds[backend])
                    row["images_per_s"] = 1e3 * batch / row["ms"]
                else:
                    row["error"] = errors[backend]
                if backend == "eager" and backend in passes:
                    row["memory_mib"] = measure_peak_memory(passes[backend], device) / MIB
                    compared = compared or compare(step, beside, image, device, words)
                rows.append(row)
                show(row)
    if compared:
        rows.append({"decoder": decoder, "backend": "regulariser", **compared})
        off, on, batch = compared["off_ms"], compared["on_ms"], compared["batch"]
        print(
            f"{decoder:13} {'regulariser':10} {batch:5}  off {off:.1f} ms, on {on:.1f} ms: outputs identical",
            flush=True,
        )
    return rows


def show(row: Row) -> None:
    start = f"{row['decoder']:13} {row['backend']:10} {row['batch']:5}"
    if row["ms"] is None:
        print(f"{start}  {row['error']}", flush=True)
        return
    memory = "-" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
    print(f"{start} {row['ms']:10.1f} {row['images_per_s']:9.2f} {memory:>8}  {row['backbone']}", flush=True)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--decoders", nargs="+", default=list(EXPERIMENTS), choices=list(EXPERIMENTS))
    parser.add_argument("--size", nargs=2, type=positive, default=[448, 576], metavar=("H", "W"))
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 16])
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--repeats", type=positive, help="passes timed; default 30 on CUDA, 5 on a CPU")
    parser.add_argument("--seconds", type=positive, default=30, help="no further passes with a batch after so many")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    parser.add_argument("overrides", nargs="*", help="of train.py, for every row")
    words = parser.parse_intermixed_args()  # and overrides before or between them
    for word in words.overrides:
        if "=" not in word:
            raise UserError(f"{word} is not an override key=value of train.py")
    device = choose_device(words.device, "--device")
    words.repeats = words.repeats or (30 if device.type == "cuda" else 5)
    configs = {name: composed(name, words.size, words.overrides) for name in words.decoders}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{platform.machine()}, {where}, torch {torch.__version__}, {words.size[0]} x {words.size[1]}")
    print(f"{'decoder':13} {'backend':10} {'batch':>5} {'ms':>10} {'images/s':>9} {'peak MiB':>8}  backbone")
    rows: list[Row] = []
    for decoder, config in configs.items():
        rows += rows_of(decoder, config, words, device)
        if words.json:
            facts = {"machine": platform.machine(), "device": where, "torch": torch.__version__}
            write_json(words.json, {**facts, "precision": words.precision, "rows": rows})


if __name__ == "__main__":
    run(main)
