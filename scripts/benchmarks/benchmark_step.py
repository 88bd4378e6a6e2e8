"""Measure time and memory of a training step without and with the regulariser, side by side in one process.

    python scripts/benchmarks/benchmark_step.py [--profile] [--steps N] [--json OUT] [group=choice ...] [key=value ...]

Without overrides it measures NYUD-v2's setting, images of 448x576 with the tasks semseg, depth, normals and edge
(rendered rooms: nothing to download), random weights, the baseline decoder, for a small CNN, a large one and a ViT:
mobilenetv2, resnet50, vit_base; batches of 8 on CUDA, of 2 on a CPU (minutes). With overrides it measures that one
setting of train.py instead, e.g. ``data.size=[448,576] backbone=swin_tiny tasks=nyud data.batch_size=4``;
``regularizer=NAME`` measures another regulariser than ``contrastive``.

The two variants alternate step by step, on the same batches, so that a machine that becomes slower affects both. The
batches are loaded beforehand. Steps start in the middle of the schedule, where lambda is past its warm-up. On a CPU the
process's CPU time is compared too: other work on the machine does not count there.

``held``: parameters, buffers, the optimisers' moments and the running mean of the weights. ``step``: the peak memory of
a step beyond what was allocated at its start, by the CUDA allocator's count, or on a CPU by the profiler's record of
every tensor allocated and freed in one untimed step (activations, gradients and temporaries; not the scratch memory
inside oneDNN or BLAS).

``--profile`` measures the regulariser alone, on the model's real features: time of its parts, of each function of
mtcl.regularizers and mtcl.tasks that it calls, of the operations of its backward pass; the largest tensor it allocates,
relative to a feature map (B, C, h, w) (its backward pass allocates one of that size for each target: the gradient
itself, which is added to the task's); operations whose result the host waits for; and breaks of the graph under
torch.compile.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # less output of the profiler; torch reads both when it is imported
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mtcl.regularizers
import mtcl.tasks
from mtcl.cli.arguments import CommandParser, positive_int
from mtcl.cli.benchmark import (
    advance_to_weighting_step,
    build_run_at_half,
    count_state_bytes,
    measure_weighting,
    run_step,
)
from mtcl.cli.script import run
from mtcl.config.compose import compose_config
from mtcl.data import Batch, prepare_batch
from mtcl.errors import UserError
from mtcl.models import DenseOutput
from mtcl.profiling.timing import measure_in_turns, measure_peak_memory, measure_time, synchronize
from mtcl.regularizers import Regularizer
from mtcl.regularizers.sampling import Draw
from mtcl.runtime import autocast
from mtcl.training.trainer import Trainer

BACKBONES = ("mobilenetv2", "resnet50", "vit_base")
SETTING = ("tasks=nyud", "data.size=[448,576]")
WARMUP, BATCHES = 2, 4
MIB = 2**20

K = TypeVar("K")


class Variant(NamedTuple):
    """Measurements of one variant, per step or at its peak."""

    seconds: list[float]
    cpu_seconds: list[float]
    state_bytes: int
    step_bytes: int  # of a step that measures gradients, if any does
    weighting_seconds: float  # per step, on average, to measure the gradients of contrast and task

    def to_plain(self) -> dict[str, Any]:
        """Return the entry of the variant in the JSON."""
        sizes = {"held": self.state_bytes, "step": self.step_bytes, "weighing": self.weighting_seconds}
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, **sizes}


def measure_variants(trainers: dict[str, Trainer], batches: Sequence[Batch], steps: int) -> dict[str, Variant]:
    """Measure the variants, which alternate step by step."""
    works = {name: partial(run_step, trainer) for name, trainer in trainers.items()}
    device = next(iter(trainers.values())).device
    seconds = measure_in_turns(works, islice(cycle(batches), WARMUP + steps), device, WARMUP)
    variants = {}
    for name, trainer in trainers.items():
        weighting_seconds = measure_weighting(trainer, batches[0])
        advance_to_weighting_step(trainer)
        peak = measure_peak_memory(partial(run_step, trainer, batches[0]), trainer.device)
        clock, cpu = (list(values) for values in zip(*seconds[name]))
        variants[name] = Variant(clock, cpu, count_state_bytes(trainer), peak, weighting_seconds)
    return variants


def sort_increases(off: Sequence[float], on: Sequence[float]) -> list[float]:
    """Return the increase of each pair in percent, sorted."""
    return sorted(100 * (b / a - 1) for a, b in zip(off, on))


def report_variants(variants: dict[str, Variant], batch: int, device: torch.device) -> dict[str, Any]:
    """Print the measurements and the difference of the variants; return them as in the JSON."""
    print("regularizer   median ms   fastest ms   images/s   held MiB   step MiB")
    for name, variant in variants.items():
        median, best = statistics.median(variant.seconds), min(variant.seconds)
        memory = f"{variant.state_bytes / MIB:9.1f}  {variant.step_bytes / MIB:9.1f}"
        print(f"{name:11}  {median * 1e3:10.1f}  {best * 1e3:11.1f}  {batch / median:9.2f}  {memory}")
    off, on = variants.values()
    pairs = sort_increases(off.seconds, on.seconds)
    low, high = pairs[len(pairs) // 4], pairs[-1 - len(pairs) // 4]
    percent = {"step": statistics.median(pairs)}
    percent["weighing"] = 100 * on.weighting_seconds / statistics.median(off.seconds)
    percent["memory"] = 100 * ((on.state_bytes + on.step_bytes) / (off.state_bytes + off.step_bytes) - 1)
    text = (
        f"the regulariser adds {percent['step']:.1f} % to a step (median of pairs, half of them {low:.1f} to {high:.1f}"
    )
    if device.type == "cpu":
        percent["cpu"] = statistics.median(sort_increases(off.cpu_seconds, on.cpu_seconds))
        text += f"; of CPU time {percent['cpu']:.1f} %"
    print(f"{text}), {percent['memory']:.2f} % to its peak memory")
    if on.weighting_seconds:
        print(f"in addition, it measures gradients every few steps: {percent['weighing']:.1f} % of a step on average")
    return {"percent added": percent, **{name: variant.to_plain() for name, variant in variants.items()}}


# The regulariser alone


class NewTensor(NamedTuple):
    """A tensor for which an operation allocated memory."""

    bytes: int
    floating: bool
    description: str  # operation, shape, type


class OperationRecorder(TorchDispatchMode):
    """Records the tensors that operations inside it allocate, and the operations whose result the host waits for.

    Views and changes in place allocate nothing. The host waits for values that Python reads (``item``, ``if``), for
    shapes that depend on values (``nonzero``, a boolean index) and for copies from a device to the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[NewTensor] = []
        self.waits: Counter[str] = Counter()

    @property
    def largest(self) -> NewTensor:
        """Return the largest tensor that was allocated."""
        return max(self.allocated)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        storages = {x.untyped_storage().data_ptr() for x in inputs}
        for x in outputs:
            if x.untyped_storage().data_ptr() not in storages:
                description = f"{func} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
                self.allocated.append(NewTensor(x.untyped_storage().nbytes(), x.is_floating_point(), description))
        from_device = any(x.device.type != "cpu" for x in inputs)
        if _depends_on_values(func, args) or (from_device and any(x.device.type == "cpu" for x in outputs)):
            self.waits[str(func)] += 1
        return result


def _depends_on_values(func: Any, args: tuple[Any, ...]) -> bool:
    if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags


class CallTimer:
    """Sums the seconds in each function of some packages by chain of calls, as a context manager."""

    def __init__(self, device: torch.device, *packages: Any) -> None:
        self.device = device
        self.folders = tuple(str(Path(package.__file__).parent) for package in packages)
        self.seconds: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self._path: list[tuple[str, float]] = []

    def __enter__(self) -> "CallTimer":
        sys.setprofile(self._record_event)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _record_event(self, frame: FrameType, kind: str, _argument: Any) -> None:
        code = frame.f_code
        if kind not in ("call", "return") or code.co_name[0] == "<" or not code.co_filename.startswith(self.folders):
            return
        synchronize(self.device)
        if kind == "call":
            self._path.append((code.co_qualname, time.perf_counter()))
        elif self._path:
            self.seconds[tuple(name for name, _ in self._path)] += time.perf_counter() - self._path.pop()[1]


class StepInputs(NamedTuple):
    """The regulariser's inputs in a step, and the gradients of the task losses at the same features."""

    output: DenseOutput
    labels: dict[str, Tensor]
    draw: Draw
    leaf_features: list[Tensor]  # the feature maps that the regulariser uses, each once, as results of a graph
    task_gradients: list[Tensor]  # of those maps


class RegularizerRunner:
    """Runs the regulariser's part of a step without the model."""

    def __init__(self, trainer: Trainer, batch: Batch) -> None:
        assert trainer.regularizer is not None
        self.trainer, self.device = trainer, trainer.device
        self.regularizer: Regularizer = trainer.regularizer
        self.ids = [meta.id for meta in batch["meta"]]
        image, self.labels = prepare_batch(batch, trainer.model.mean, trainer.model.std, self.device)
        with torch.no_grad(), autocast(self.device, trainer.options.precision):
            self.output = trainer.model(image)
        self.features = self.output.features[self.regularizer.feature]
        self.step = trainer.step

    def draw(self) -> Draw:
        """Draw the pixels of the next step."""
        self.step += 1
        return self.regularizer.sample(self.step, self.ids).to(self.device)

    def prepare_inputs(self) -> StepInputs:
        """Prepare the inputs of the next step."""
        leaves = {id(x): x.detach().requires_grad_() for x in self.features.values()}  # one map may serve every task
        leaf_features = {key: leaf.view_as(leaf) for key, leaf in leaves.items()}
        features = {
            **self.output.features,
            self.regularizer.feature: {name: leaf_features[id(x)] for name, x in self.features.items()},
        }
        task_gradients = [torch.ones_like(x) for x in leaves.values()]
        output = self.output._replace(features=features)
        return StepInputs(output, self.labels, self.draw(), list(leaf_features.values()), task_gradients)

    def compute_loss(self, inputs: StepInputs) -> Tensor:
        """Compute the loss of the regulariser."""
        return self.regularizer.compute_loss(inputs.output, inputs.labels, inputs.draw).loss

    def backward(self, inputs: StepInputs, loss: Tensor) -> None:
        """Compute the parameters' gradients and add those of the features to the tasks' gradients."""
        torch.autograd.backward([loss, *inputs.leaf_features], [None, *inputs.task_gradients])

    def optimise(self) -> None:
        """Take a step of the regulariser's optimiser, if it has one."""
        if self.trainer.regularizer_optimizer is not None:
            self.trainer.regularizer_optimizer.step(self.step)
            self.trainer.regularizer_optimizer.zero_grad()

    def time_parts(self) -> dict[str, float]:
        """Run one step and return the seconds of each part."""
        seconds = {"draw": measure_time(self.draw, self.device)[0]}
        inputs, losses = self.prepare_inputs(), []
        seconds["forward"] = measure_time(lambda: losses.append(self.compute_loss(inputs)), self.device)[0]
        seconds["backward"] = measure_time(lambda: self.backward(inputs, losses[0]), self.device)[0]
        seconds["optimiser"] = measure_time(self.optimise, self.device)[0]
        return seconds


def print_rows(rows: Sequence[tuple[str, float]], step_seconds: float) -> None:
    """Print rows of (name, seconds) with their percentage of a step."""
    for name, seconds in rows:
        print(f"{name:<56} {seconds * 1e3:8.2f}  {100 * seconds / step_seconds:6.2f}")


def take_minimum(timings: Sequence[dict[K, float]]) -> dict[K, float]:
    """Return the smallest value of each key: the times are short, and disturbances only add to them."""
    return {key: min(timing[key] for timing in timings) for key in timings[0]}


def time_functions(runner: RegularizerRunner, repeats: int) -> list[tuple[str, float]]:
    """Return the seconds of the forward pass by function, indented by depth; they include some overhead."""
    timings = []
    for _ in range(repeats):
        inputs = runner.prepare_inputs()
        with CallTimer(runner.device, mtcl.regularizers, mtcl.tasks) as calls:
            runner.compute_loss(inputs)
        timings.append(calls.seconds)
    paths = take_minimum(timings)
    slowest = max(paths.values())
    # Each path follows the one it continues; the slowest come first.
    order = sorted(paths, key=lambda path: [(-paths[path[:n]], path[n - 1]) for n in range(1, len(path) + 1)])
    return [("  " * len(path) + path[-1], paths[path]) for path in order if paths[path] >= 0.02 * slowest]


def time_operations(runner: RegularizerRunner, repeats: int) -> list[tuple[str, float]]:
    """Return the seconds of the backward pass by operation, each without those that it calls."""
    cuda = runner.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        inputs = runner.prepare_inputs()
        loss = runner.compute_loss(inputs)
        with torch.profiler.profile(activities=activities) as profiled:
            runner.backward(inputs, loss)
            synchronize(runner.device)
        runner.optimise()
        for event in profiled.key_averages():
            us = event.self_device_time_total if cuda else event.self_cpu_time_total
            seconds[f"  {event.key}, {event.count} x"].append(us / 1e6)
    rows = [(name, min(values)) for name, values in seconds.items()]
    return sorted(rows, key=lambda row: -row[1])[:8]


def describe_waits(runner: RegularizerRunner) -> str:
    """Describe what the host waits for. On CUDA, PyTorch also reports the calls that synchronise."""
    inputs = runner.prepare_inputs()
    if runner.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with OperationRecorder() as recorder:
            runner.backward(inputs, runner.compute_loss(inputs))
            runner.optimise()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error).splitlines()[0]
    finally:
        if runner.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return ", ".join(f"{name} ({count} times)" for name, count in recorder.waits.items()) or "none"


def describe_graphs(runner: RegularizerRunner) -> str:
    """Describe the graphs of the forward pass under torch.compile, over four draws."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(runner.regularizer.compute_loss, fullgraph=True, backend="eager")
    try:
        for _ in range(4):
            inputs = runner.prepare_inputs()
            compiled(inputs.output, inputs.labels, inputs.draw)
    except torch._dynamo.exc.Unsupported as error:
        return f"breaks: {str(error).splitlines()[0]}"
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return f"no break, {count} graph{'s' if count > 1 else ''} for 4 draws"


def profile_regularizer(trainer: Trainer, batch: Batch, step_seconds: float, repeats: int) -> dict[str, Any]:
    """Print the time and memory of the regulariser's parts and return them.

    Args:
        trainer: with a regulariser.
        batch: to measure with.
        step_seconds: of the fastest step without the regulariser.
        repeats: how often each part is measured.
    """
    runner = RegularizerRunner(trainer, batch)
    parts = take_minimum([runner.time_parts() for _ in range(repeats + WARMUP)][WARMUP:])
    inside = {"forward": time_functions(runner, repeats), "backward": time_operations(runner, repeats)}
    print(f"the regulariser alone, fastest of {repeats}{'':24}ms  % of the fastest step without it")
    for name, seconds in parts.items():
        print_rows([(name, seconds), *inside.get(name, [])], step_seconds)
    print_rows([("sum", sum(parts.values()))], step_seconds)
    inputs = runner.prepare_inputs()
    largest = max(inputs.leaf_features, key=lambda x: x.nbytes)
    with OperationRecorder() as forward:
        loss = runner.compute_loss(inputs)
    with OperationRecorder() as backward:
        runner.backward(inputs, loss)
    print(f"a feature map: {largest.nbytes / MIB:.2f} MiB {tuple(largest.shape)}")
    maps = {}
    for name, recorder in {"forward": forward, "backward": backward}.items():
        tensor = recorder.largest
        maps[name] = tensor.bytes / largest.nbytes
        size = f"{tensor.bytes / MIB:.2f} MiB = {maps[name]:.3f} of it"
        print(f"largest tensor allocated, {name}: {size}, {tensor.description}")
    inputs = runner.prepare_inputs()
    peak = measure_peak_memory(lambda: runner.compute_loss(inputs).backward(), runner.device)
    runner.optimise()
    size = f"{peak / MIB:.2f} MiB = {peak / largest.nbytes:.2f} of it"
    print(f"peak of both passes: {size}, for {len(runner.features)} targets")
    texts = {"waits": describe_waits(runner), "graph": describe_graphs(runner)}
    print(f"waits of the host: {texts['waits']}\ngraph: {texts['graph']}")
    return {"seconds": parts, "largest tensor, in maps": maps, "peak, in maps": peak / largest.nbytes, **texts}


# The command


def list_settings(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return the settings to measure: name -> overrides of train.py."""
    if overrides:
        return {"as given": list(overrides)}
    batch = f"data.batch_size={8 if torch.cuda.is_available() else 2}"
    return {name: [f"backbone={name}", *SETTING, batch] for name in BACKBONES}


def benchmark(overrides: Sequence[str], steps: int | None, profiled: bool) -> dict[str, Any]:
    """Measure one setting, print the results and return them."""
    chosen = [item for item in overrides if item.startswith("regularizer=")] or ["regularizer=contrastive"]
    shared = [*(item for item in overrides if not item.startswith("regularizer=")), "data.workers=0"]
    configs = Path(__file__).resolve().parents[2] / "configs"
    config, other = (compose_config([*shared, choice], configs) for choice in ("regularizer=none", chosen[-1]))
    trainers = {
        "none": build_run_at_half(config).trainer,
        chosen[-1].removeprefix("regularizer="): build_run_at_half(other).trainer,
    }
    on = list(trainers.values())[-1]
    if len(trainers) < 2 or on.regularizer is None:
        raise UserError("this setting has no regulariser; choose at least two tasks and a regularizer")
    if on.lambda_(on.step) <= 0:
        raise UserError(f"regularizer.weight is 0 at step {on.step}, so there is nothing to measure")
    batches = list(islice(on.batches, BATCHES))
    steps = steps or (20 if on.device.type == "cuda" else 6)
    height, width = config.data.size
    print(
        f"{config.backbone.name}, {height}x{width}, batch {config.data.batch_size}, tasks {', '.join(on.tasks)}, "
        f"{steps} alternating steps",
        flush=True,
    )
    variants = measure_variants(trainers, batches, steps)
    results = report_variants(variants, config.data.batch_size, on.device)
    regularizer_size = sum(p.numel() for p in on.regularizer.parameters())
    model, without = (sum(p.numel() for p in t.model.parameters()) for t in (on, trainers["none"]))
    print(
        f"inference: the model has {model:,} parameters, {without:,} without; "
        f"the regulariser's {regularizer_size:,} are not in it"
    )
    if profiled:
        results["profile"] = profile_regularizer(on, batches[0], min(variants["none"].seconds), 20)
    return results


def main() -> None:
    """Parse the command line and measure each setting."""
    parser = CommandParser(__doc__)
    parser.add_argument("--profile", action="store_true", help="also measure the regulariser alone")
    parser.add_argument("--steps", type=positive_int, help="pairs of steps timed; default 20 on CUDA, 6 on a CPU")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("overrides", nargs="*", help="of train.py; by default NYUD-v2's setting for three backbones")
    args = parser.parse_intermixed_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {device}, torch {torch.__version__}")
    results: dict[str, Any] = {}
    for name, overrides in list_settings(args.overrides).items():
        if results:
            print()
        results[name] = benchmark(overrides, args.steps, args.profile)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    run(main)
