"""Time and memory of a training step, without and with the regulariser, side by side in one process.

    python scripts/benchmarks/benchmark_step.py [--profile] [--steps N] [--json OUT] [group=choice ...] [key=value ...]

Without overrides it measures NYUD-v2's setting, pictures of 448x576 with the tasks semseg, depth, normals and edge
(made up from rooms: nothing to download), random weights, the baseline decoder, for a small CNN, a large one and a ViT:
mobilenetv2, resnet50, vit_base; batches of 8 on CUDA, of 2 on a CPU (minutes). With overrides it measures that one
setting of train.py instead, e.g. ``data.size=[448,576] backbone=swin_tiny tasks=nyud data.batch_size=4``;
``regularizer=NAME`` names another regulariser than ``contrastive``.

The two variants take turns step by step, on the same batches, so that a drifting machine is fair to both; batches are
made beforehand. Steps start in the middle of the schedule, where lambda is past its warm-up. On a CPU the process's CPU
time is compared, too: other work on the machine does not count there.

``held``: parameters, buffers and the optimisers' moments. ``step``: what a step takes at its peak beyond what was
allocated before it: by the CUDA allocator's count, or on a CPU by the profiler's record of every tensor allocated and
freed in one untimed step (activations, gradients and temporaries; not the scratch memory inside oneDNN or BLAS).

``--profile`` looks at the regulariser alone, on the model's real features: time of its parts, of each function of
mtcl.regularizers and mtcl.tasks that it calls, of the operations of its backward pass; the largest tensor it makes,
beside a feature map (B, C, h, w) (its backward makes one of that size for each target: the gradient itself, which joins
the task's own); operations whose result the host waits for; and breaks of the graph under torch.compile.
"""

import argparse
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

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's chatter; both are read when torch is loaded
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mtcl.regularizers
import mtcl.tasks
from mtcl.cli.script import run
from mtcl.config.build_data import build_tasks
from mtcl.config.build_training import build_training_run
from mtcl.config.compose import compose_config
from mtcl.data import Batch, prepare_batch
from mtcl.errors import UserError
from mtcl.models import DenseOutput
from mtcl.profiling.timing import measure_peak_memory, measure_time, synchronize
from mtcl.regularizers import Regularizer
from mtcl.regularizers.sampling import Draw
from mtcl.runtime import autocast, choose_device, seed_everything
from mtcl.training.trainer import Trainer

BACKBONES = ("mobilenetv2", "resnet50", "vit_base")
SETTING = ("tasks=nyud", "data.size=[448,576]")
WARMUP, BATCHES = 2, 4
MIB = 2**20

K = TypeVar("K")


class Variant(NamedTuple):
    """What was measured of one of the two, step by step or at its peak."""

    seconds: list[float]
    cpu_seconds: list[float]
    resident_bytes: int  # bytes
    step: int  # bytes, of a step that measures gradients where there are such
    weighing: float  # seconds per step, on average, for measuring the gradients of contrast and task


def build_trainer(config: DictConfig) -> Trainer:
    """Build the trainer as train.py does, with random weights, in the middle of its schedule; it writes nothing."""
    seed_everything(config.seed)
    device = choose_device(config.trainer.device, "trainer.device")
    trainer = build_training_run(config, build_tasks(config), Path("unused"), device).trainer
    trainer.model.train()
    trainer.step = trainer.options.max_steps // 2
    return trainer


def run_step(trainer: Trainer, batch: Batch) -> None:
    """Run a training step and wait for the device."""
    trainer.train_step(batch)
    trainer.step += 1
    synchronize(trainer.device)


def resident_bytes(trainer: Trainer) -> int:
    """Return the bytes of weights, buffers and moments, which stay from step to step."""
    modules = [m for m in (trainer.model, trainer.regularizer) if m is not None]
    optimizers = [o.optimizer for o in (trainer.optimizer, trainer.regularizer_optimizer) if o is not None]
    tensors = [*(m.state_dict(keep_vars=True) for m in modules), *(list(o.state.values()) for o in optimizers)]
    return sum(t.nbytes for t in tree_leaves(tensors) if isinstance(t, Tensor))


def measure(trainers: dict[str, Trainer], batches: Sequence[Batch], steps: int) -> dict[str, Variant]:
    """Time the trainers' steps in turns, then measure their memory."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    turn = list(trainers)
    for step, batch in enumerate(islice(cycle(batches), WARMUP + steps)):
        for name in turn:
            took = measure_time(partial(run_step, trainers[name], batch), trainers[name].device)
            if step >= WARMUP:
                seconds[name].append(took)
        turn.reverse()
    results = {}
    for name, trainer in trainers.items():
        weighing = measure_weighting(trainer, batches[0])
        advance_to_weighting_step(trainer)
        most = measure_peak_memory(partial(run_step, trainer, batches[0]), trainer.device)
        clock, cpu = (list(values) for values in zip(*seconds[name]))
        results[name] = Variant(clock, cpu, resident_bytes(trainer), most, weighing)
    return results


def advance_to_weighting_step(trainer: Trainer) -> None:
    """Advance to a step at which the gradients of contrast and task are measured (``weighting=gradient_norm``)."""
    if trainer.lambda_.gradient_norm_weight is not None:
        trainer.step += -trainer.step % trainer.lambda_.gradient_norm_weight.every


def measure_weighting(trainer: Trainer, batch: Batch, repeats: int = 3) -> float:
    """Return the seconds that measuring those gradients takes, divided among the steps it serves."""
    if trainer.lambda_.gradient_norm_weight is None:
        return 0.0
    extra = []
    for _ in range(repeats):
        advance_to_weighting_step(trainer)
        with_it, without = (measure_time(partial(run_step, trainer, batch), trainer.device)[0] for _ in range(2))
        extra.append(with_it - without)
    return statistics.median(extra) / trainer.lambda_.gradient_norm_weight.every


def relative_increase(off: Sequence[float], on: Sequence[float]) -> list[float]:
    """Return the increase of each pair in percent, sorted."""
    return sorted(100 * (b / a - 1) for a, b in zip(off, on))


def report(variants: dict[str, Variant], batch: int, device: torch.device) -> dict[str, Any]:
    """Print the times and memory of both variants, and return them as plain values."""
    print("regularizer   median ms   fastest ms   images/s   held MiB   step MiB")
    for name, results in variants.items():
        median, best = statistics.median(results.seconds), min(results.seconds)
        memory = f"{results.resident_bytes / MIB:9.1f}  {results.step / MIB:9.1f}"
        print(f"{name:11}  {median * 1e3:10.1f}  {best * 1e3:11.1f}  {batch / median:9.2f}  {memory}")
    off, on = variants.values()
    pairs = relative_increase(off.seconds, on.seconds)
    low, high = pairs[len(pairs) // 4], pairs[-1 - len(pairs) // 4]
    percent = {"step": statistics.median(pairs)}
    percent["weighing"] = 100 * on.weighing / statistics.median(off.seconds)
    percent["memory"] = 100 * ((on.resident_bytes + on.step) / (off.resident_bytes + off.step) - 1)
    text = (
        f"the regulariser adds {percent['step']:.1f} % to a step (median of pairs, half of them {low:.1f} to {high:.1f}"
    )
    if device.type == "cpu":
        percent["cpu"] = statistics.median(relative_increase(off.cpu_seconds, on.cpu_seconds))
        text += f"; of CPU time {percent['cpu']:.1f} %"
    print(f"{text}), {percent['memory']:.2f} % to its peak memory")
    if on.weighing:
        print(f"beside that, every few steps it measures gradients: {percent['weighing']:.1f} % of a step on average")
    return {"percent added": percent, **{name: results._asdict() for name, results in variants.items()}}


# The regulariser alone


class NewTensor(NamedTuple):
    """A tensor that an operation allocated."""

    bytes: int
    floating: bool
    description: str  # operation, shape, type


class TensorRecorder(TorchDispatchMode):
    """Record each tensor that operations allocate, and each operation whose result the host waits for.

    Views and in-place changes allocate nothing. Values that Python asks for (``item``, ``if``), shapes that depend
    on values (``nonzero``, a boolean index) and copies from a device to the host are waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[NewTensor] = []
        self.waits: Counter[str] = Counter()

    @property
    def largest(self) -> NewTensor:
        """Return the largest allocated tensor."""
        return max(self.made)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        input_storages = {x.untyped_storage().data_ptr() for x in inputs}
        for x in outputs:
            if x.untyped_storage().data_ptr() not in input_storages:
                description = f"{func} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
                self.made.append(NewTensor(x.untyped_storage().nbytes(), x.is_floating_point(), description))
        from_device = any(x.device.type != "cpu" for x in inputs)
        if _depends_on_values(func, args) or (from_device and any(x.device.type == "cpu" for x in outputs)):
            self.waits[str(func)] += 1
        return result


def _depends_on_values(func: Any, args: tuple[Any, ...]) -> bool:
    if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags


class FunctionTimer:
    """Time each function of the packages, by the path of calls that leads to it; a context manager."""

    def __init__(self, device: torch.device, *packages: Any) -> None:
        self.device = device
        self.folders = tuple(str(Path(package.__file__).parent) for package in packages)
        self.seconds: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self._path: list[tuple[str, float]] = []

    def __enter__(self) -> "FunctionTimer":
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: FrameType, kind: str, _: Any) -> None:
        code = frame.f_code
        if kind not in ("call", "return") or code.co_name[0] == "<" or not code.co_filename.startswith(self.folders):
            return
        synchronize(self.device)
        if kind == "call":
            self._path.append((code.co_qualname, time.perf_counter()))
        elif self._path:
            self.seconds[tuple(name for name, _ in self._path)] += time.perf_counter() - self._path.pop()[1]


class RegularizerInput(NamedTuple):
    """The regulariser's inputs in a step, and the tasks' gradient at the same features."""

    output: DenseOutput
    labels: dict[str, Tensor]
    draw: Draw
    leaf_features: list[Tensor]  # the output's features, each once, with a graph behind them
    task_gradients: list[Tensor]


class RegularizerProfile:
    """Run the regulariser's part of a step, piece by piece, without the model."""

    def __init__(self, trainer: Trainer, batch: Batch) -> None:
        assert trainer.regularizer is not None
        self.trainer, self.device = trainer, trainer.device
        self.regularizer: Regularizer = trainer.regularizer
        self.ids = [meta.id for meta in batch["meta"]]
        image, self.labels = prepare_batch(batch, trainer.model.mean, trainer.model.std, self.device)
        with torch.no_grad(), autocast(self.device, trainer.options.precision):
            self.output = trainer.model(image)
        self.feature_maps = self.output.features[self.regularizer.feature]
        self.step = trainer.step

    def draw(self) -> Draw:
        """Draw sources and pixels of the next step."""
        self.step += 1
        return self.regularizer.sample(self.step, self.ids).to(self.device)

    def inputs(self) -> RegularizerInput:
        """Prepare leaf features, labels and a new draw."""
        leaves = {
            id(x): x.detach().requires_grad_() for x in self.feature_maps.values()
        }  # one map may serve every task
        leaf_features = {key: leaf.view_as(leaf) for key, leaf in leaves.items()}
        features = {
            **self.output.features,
            self.regularizer.feature: {name: leaf_features[id(x)] for name, x in self.feature_maps.items()},
        }
        task_gradients = [torch.ones_like(x) for x in leaves.values()]
        return RegularizerInput(
            self.output._replace(features=features),
            self.labels,
            self.draw(),
            list(leaf_features.values()),
            task_gradients,
        )

    def compute_loss(self, inputs: RegularizerInput) -> Tensor:
        """Compute the regulariser's loss."""
        return self.regularizer.compute_loss(inputs.output, inputs.labels, inputs.draw).loss

    def backward(self, inputs: RegularizerInput, loss: Tensor) -> None:
        """Backpropagate to the features, where the tasks' gradient is added, and to the projectors."""
        torch.autograd.backward([loss, *inputs.leaf_features], [None, *inputs.task_gradients])

    def optimise(self) -> None:
        """Step the regulariser's optimizer."""
        if self.trainer.regularizer_optimizer is not None:
            self.trainer.regularizer_optimizer.step(self.step)
            self.trainer.regularizer_optimizer.zero_grad()

    def once(self) -> dict[str, float]:
        """Return the seconds of each part."""
        results = {"draw": measure_time(self.draw, self.device)[0]}
        inputs, losses = self.inputs(), []
        results["forward"] = measure_time(lambda: losses.append(self.compute_loss(inputs)), self.device)[0]
        results["backward"] = measure_time(lambda: self.backward(inputs, losses[0]), self.device)[0]
        results["optimiser"] = measure_time(self.optimise, self.device)[0]
        return results


def print_rows(rows: Sequence[tuple[str, float]], step_seconds: float) -> None:
    """Print rows of (name, seconds), and as percent of the seconds of a step."""
    for name, seconds in rows:
        print(f"{name:<56} {seconds * 1e3:8.2f}  {100 * seconds / step_seconds:6.2f}")


def take_fastest(results: Sequence[dict[K, float]]) -> dict[K, float]:
    """Return the smallest value of each key: disturbances only add to short times."""
    return {key: min(each[key] for each in results) for key in results[0]}


def time_functions(regularizer_profile: RegularizerProfile, repeats: int) -> list[tuple[str, float]]:
    """Time the forward pass by function, indented by depth; the timing itself adds some."""
    results = []
    for _ in range(repeats):
        inputs = regularizer_profile.inputs()
        with FunctionTimer(regularizer_profile.device, mtcl.regularizers, mtcl.tasks) as calls:
            regularizer_profile.compute_loss(inputs)
        results.append(calls.seconds)
    paths = take_fastest(results)
    most = max(paths.values())
    # Every path behind the one it continues, the slowest first.
    order = sorted(paths, key=lambda path: [(-paths[path[:n]], path[n - 1]) for n in range(1, len(path) + 1)])
    return [("  " * len(path) + path[-1], paths[path]) for path in order if paths[path] >= 0.02 * most]


def time_operations(regularizer_profile: RegularizerProfile, repeats: int) -> list[tuple[str, float]]:
    """Time the backward pass by operation, each without those inside it."""
    cuda = regularizer_profile.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    spent: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        inputs = regularizer_profile.inputs()
        loss = regularizer_profile.compute_loss(inputs)
        with torch.profiler.profile(activities=activities) as profiled:
            regularizer_profile.backward(inputs, loss)
            synchronize(regularizer_profile.device)
        regularizer_profile.optimise()
        for event in profiled.key_averages():
            us = event.self_device_time_total if cuda else event.self_cpu_time_total
            spent[f"  {event.key}, {event.count} x"].append(us / 1e6)
    rows = [(name, min(values)) for name, values in spent.items()]
    return sorted(rows, key=lambda row: -row[1])[:8]


def find_waits(regularizer_profile: RegularizerProfile) -> str:
    """Name the operations that the host waits for. On CUDA, PyTorch's check of synchronising calls is on as well."""
    inputs = regularizer_profile.inputs()
    if regularizer_profile.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with TensorRecorder() as watch:
            regularizer_profile.backward(inputs, regularizer_profile.compute_loss(inputs))
            regularizer_profile.optimise()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error).splitlines()[0]
    finally:
        if regularizer_profile.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return ", ".join(f"{name} ({count} times)" for name, count in watch.waits.items()) or "none"


def count_graphs(regularizer_profile: RegularizerProfile) -> str:
    """Count the graphs of the forward pass under torch.compile, over four draws."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(regularizer_profile.regularizer.compute_loss, fullgraph=True, backend="eager")
    try:
        for _ in range(4):
            inputs = regularizer_profile.inputs()
            compiled(inputs.output, inputs.labels, inputs.draw)
    except torch._dynamo.exc.Unsupported as error:
        return f"breaks: {str(error).splitlines()[0]}"
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return f"no break, {count} graph{'s' if count > 1 else ''} for 4 draws"


def profile(trainer: Trainer, batch: Batch, step: float, repeats: int) -> dict[str, Any]:
    """Print where the regulariser's time and memory go; ``step``: seconds of the fastest step without it."""
    regularizer_profile = RegularizerProfile(trainer, batch)
    parts = take_fastest([regularizer_profile.once() for _ in range(repeats + WARMUP)][WARMUP:])
    inside = {
        "forward": time_functions(regularizer_profile, repeats),
        "backward": time_operations(regularizer_profile, repeats),
    }
    print(f"the regulariser alone, fastest of {repeats}{'':24}ms  % of the fastest step without it")
    for name, seconds in parts.items():
        print_rows([(name, seconds), *inside.get(name, [])], step)
    print_rows([("sum", sum(parts.values()))], step)
    inputs = regularizer_profile.inputs()
    largest = max(inputs.leaf_features, key=lambda x: x.nbytes)
    with TensorRecorder() as forward:
        loss = regularizer_profile.compute_loss(inputs)
    with TensorRecorder() as backward:
        regularizer_profile.backward(inputs, loss)
    print(f"a feature map: {largest.nbytes / MIB:.2f} MiB {tuple(largest.shape)}")
    maps = {}
    for name, watch in {"forward": forward, "backward": backward}.items():
        made = watch.largest
        maps[name] = made.bytes / largest.nbytes
        print(
            f"largest tensor allocated, {name}: {made.bytes / MIB:.2f} MiB = {maps[name]:.3f} of it, {made.description}"
        )
    inputs = regularizer_profile.inputs()
    both = measure_peak_memory(lambda: regularizer_profile.compute_loss(inputs).backward(), regularizer_profile.device)
    regularizer_profile.optimise()
    print(
        f"peak of both passes: {both / MIB:.2f} MiB = {both / largest.nbytes:.2f} of it, for "
        f"{len(regularizer_profile.feature_maps)} targets"
    )
    results = {"waits": find_waits(regularizer_profile), "graph": count_graphs(regularizer_profile)}
    print(f"waits of the host: {results['find_waits']}\ngraph: {results['graph']}")
    return {"seconds": parts, "largest tensor, in maps": maps, "peak, in maps": both / largest.nbytes, **results}


# The command


def choose_settings(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return name -> overrides of train.py."""
    if overrides:
        return {"as given": list(overrides)}
    batch = f"data.batch_size={8 if torch.cuda.is_available() else 2}"
    return {name: [f"backbone={name}", *SETTING, batch] for name in BACKBONES}


def benchmark(overrides: Sequence[str], steps: int | None, profiled: bool) -> dict[str, Any]:
    """Measure and print one setting."""
    chosen = [override for override in overrides if override.startswith("regularizer=")] or ["regularizer=contrastive"]
    shared_overrides = [
        *(override for override in overrides if not override.startswith("regularizer=")),
        "data.workers=0",
    ]
    configs = Path(__file__).resolve().parents[2] / "configs"
    config, other = (
        compose_config([*shared_overrides, choice], configs) for choice in ("regularizer=none", chosen[-1])
    )
    trainers = {"none": build_trainer(config), chosen[-1].removeprefix("regularizer="): build_trainer(other)}
    on = list(trainers.values())[-1]
    if len(trainers) < 2 or on.regularizer is None:
        raise UserError("there is no regulariser in this setting; give at least two tasks and a regularizer")
    if on.lambda_(on.step) <= 0:
        raise UserError(f"regularizer.weight is 0 at step {on.step}, so there would be nothing to measure")
    batches = list(islice(on.batches, BATCHES))
    steps = steps or (20 if on.device.type == "cuda" else 6)
    height, width = config.data.size
    print(
        f"{config.backbone.name}, {height}x{width}, batch {config.data.batch_size}, tasks {', '.join(on.tasks)}, "
        f"{steps} steps in turns",
        flush=True,
    )
    variants = measure(trainers, batches, steps)
    results = report(variants, config.data.batch_size, on.device)
    num_projector_parameters = sum(p.numel() for p in on.regularizer.parameters())
    model, without = (sum(p.numel() for p in t.model.parameters()) for t in (on, trainers["none"]))
    print(
        f"inference: the model has {model:,} parameters, {without:,} without; "
        f"the regulariser's {num_projector_parameters:,} are not in it"
    )
    if profiled:
        results["profile"] = profile(on, batches[0], min(variants["none"].seconds), 20)
    return results


def main() -> None:
    """Parse the command line, measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--profile", action="store_true", help="also look at the regulariser alone")
    parser.add_argument("--steps", type=int, help="pairs of steps timed; default 20 on CUDA, 6 on a CPU")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    parser.add_argument("overrides", nargs="*", help="of train.py; by default NYUD-v2's setting for three backbones")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps} must be at least 1")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {where}, torch {torch.__version__}")
    results: dict[str, Any] = {}
    for name, overrides in choose_settings(args.overrides).items():
        if results:
            print()
        results[name] = benchmark(overrides, args.steps, args.profile)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    run(main)
