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
    held: int  # bytes
    step: int  # bytes, of a step that measures gradients where there are such
    weighing: float  # seconds per step, on average, for measuring the gradients of contrast and task


def built(config: DictConfig) -> Trainer:
    """The trainer that train.py would build, with random weights, in the middle of its schedule; it writes nothing."""
    seed_everything(config.seed)
    device = choose_device(config.trainer.device, "trainer.device")
    trainer = build_training_run(config, build_tasks(config), Path("unused"), device).trainer
    trainer.model.train()
    trainer.step = trainer.options.max_steps // 2
    return trainer


def one_step(trainer: Trainer, batch: Batch) -> None:
    trainer.train_step(batch)
    trainer.step += 1
    synchronize(trainer.device)


def held(trainer: Trainer) -> int:
    """Bytes of what stays from step to step."""
    modules = [m for m in (trainer.model, trainer.regularizer) if m is not None]
    optimizers = [o.optimizer for o in (trainer.optimizer, trainer.regularizer_optimizer) if o is not None]
    kept = [*(m.state_dict(keep_vars=True) for m in modules), *(list(o.state.values()) for o in optimizers)]
    return sum(t.nbytes for t in tree_leaves(kept) if isinstance(t, Tensor))


def measure(trainers: dict[str, Trainer], batches: Sequence[Batch], steps: int) -> dict[str, Variant]:
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    turn = list(trainers)
    for step, batch in enumerate(islice(cycle(batches), WARMUP + steps)):
        for name in turn:
            took = measure_time(partial(one_step, trainers[name], batch), trainers[name].device)
            if step >= WARMUP:
                seconds[name].append(took)
        turn.reverse()
    found = {}
    for name, trainer in trainers.items():
        weighing = weighing_seconds(trainer, batches[0])
        to_weighing_step(trainer)
        most = measure_peak_memory(partial(one_step, trainer, batches[0]), trainer.device)
        clock, cpu = (list(values) for values in zip(*seconds[name]))
        found[name] = Variant(clock, cpu, held(trainer), most, weighing)
    return found


def to_weighing_step(trainer: Trainer) -> None:
    """On to a step at which the gradients of contrast and task are measured (``regularizer.weighting=gradient_norm``)."""
    if trainer.lambda_.gradient_norm_weight is not None:
        trainer.step += -trainer.step % trainer.lambda_.gradient_norm_weight.every


def weighing_seconds(trainer: Trainer, batch: Batch, repeats: int = 3) -> float:
    """What measuring those gradients takes, spread over the steps it serves."""
    if trainer.lambda_.gradient_norm_weight is None:
        return 0.0
    extra = []
    for _ in range(repeats):
        to_weighing_step(trainer)
        with_it, without = (measure_time(partial(one_step, trainer, batch), trainer.device)[0] for _ in range(2))
        extra.append(with_it - without)
    return statistics.median(extra) / trainer.lambda_.gradient_norm_weight.every


def added(off: Sequence[float], on: Sequence[float]) -> list[float]:
    """Percent, pair by pair, in order of size."""
    return sorted(100 * (b / a - 1) for a, b in zip(off, on))


def report(variants: dict[str, Variant], batch: int, device: torch.device) -> dict[str, Any]:
    print("regularizer   median ms   fastest ms   images/s   held MiB   step MiB")
    for name, found in variants.items():
        median, best = statistics.median(found.seconds), min(found.seconds)
        memory = f"{found.held / MIB:9.1f}  {found.step / MIB:9.1f}"
        print(f"{name:11}  {median * 1e3:10.1f}  {best * 1e3:11.1f}  {batch / median:9.2f}  {memory}")
    off, on = variants.values()
    pairs = added(off.seconds, on.seconds)
    low, high = pairs[len(pairs) // 4], pairs[-1 - len(pairs) // 4]
    percent = {"step": statistics.median(pairs)}
    percent["weighing"] = 100 * on.weighing / statistics.median(off.seconds)
    percent["memory"] = 100 * ((on.held + on.step) / (off.held + off.step) - 1)
    text = (
        f"the regulariser adds {percent['step']:.1f} % to a step (median of pairs, half of them {low:.1f} to {high:.1f}"
    )
    if device.type == "cpu":
        percent["cpu"] = statistics.median(added(off.cpu_seconds, on.cpu_seconds))
        text += f"; of CPU time {percent['cpu']:.1f} %"
    print(f"{text}), {percent['memory']:.2f} % to its peak memory")
    if on.weighing:
        print(f"beside that, every few steps it measures gradients: {percent['weighing']:.1f} % of a step on average")
    return {"percent added": percent, **{name: found._asdict() for name, found in variants.items()}}


# The regulariser alone


class Made(NamedTuple):
    """A tensor with memory of its own, as an operation left it."""

    bytes: int
    floating: bool
    what: str  # operation, shape, type


class Watch(TorchDispatchMode):
    """Notes, of the operations inside it, each tensor they make and each one whose result the host waits for.

    Views and what is changed in place are not made. Values that Python asks for (``item``, ``if``), shapes that depend
    on values (``nonzero``, a boolean index) and copies from a device to the host are waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Made] = []
        self.waits: Counter[str] = Counter()

    @property
    def largest(self) -> Made:
        return max(self.made)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given, found = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        known = {x.untyped_storage().data_ptr() for x in given}
        for x in found:
            if x.untyped_storage().data_ptr() not in known:
                what = f"{func} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
                self.made.append(Made(x.untyped_storage().nbytes(), x.is_floating_point(), what))
        from_device = any(x.device.type != "cpu" for x in given)
        if _depends_on_values(func, args) or (from_device and any(x.device.type == "cpu" for x in found)):
            self.waits[str(func)] += 1
        return result


def _depends_on_values(func: Any, args: tuple[Any, ...]) -> bool:
    if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags


class Calls:
    """Seconds in each function of the packages, by the path of calls that leads there; a context manager."""

    def __init__(self, device: torch.device, *packages: Any) -> None:
        self.device = device
        self.folders = tuple(str(Path(package.__file__).parent) for package in packages)
        self.seconds: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self._path: list[tuple[str, float]] = []

    def __enter__(self) -> "Calls":
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: FrameType, kind: str, argument: Any) -> None:
        code = frame.f_code
        if kind not in ("call", "return") or code.co_name[0] == "<" or not code.co_filename.startswith(self.folders):
            return
        synchronize(self.device)
        if kind == "call":
            self._path.append((code.co_qualname, time.perf_counter()))
        elif self._path:
            self.seconds[tuple(name for name, _ in self._path)] += time.perf_counter() - self._path.pop()[1]


class Given(NamedTuple):
    """What the regulariser gets in a step, and the gradient that the tasks' losses bring to the same features."""

    output: DenseOutput
    labels: dict[str, Tensor]
    draw: Draw
    leaf_features: list[Tensor]  # those of the output's tap, each once, with a graph behind them
    own: list[Tensor]


class Alone:
    """The regulariser's share of a step, part by part, without the model."""

    def __init__(self, trainer: Trainer, batch: Batch) -> None:
        assert trainer.regularizer is not None
        self.trainer, self.device = trainer, trainer.device
        self.regularizer: Regularizer = trainer.regularizer
        self.ids = [meta.id for meta in batch["meta"]]
        image, self.labels = prepare_batch(batch, trainer.model.mean, trainer.model.std, self.device)
        with torch.no_grad(), autocast(self.device, trainer.options.precision):
            self.output = trainer.model(image)
        self.tap = self.output.features[self.regularizer.feature]
        self.step = trainer.step

    def draw(self) -> Draw:
        self.step += 1
        return self.regularizer.sample(self.step, self.ids).to(self.device)

    def given(self) -> Given:
        leaves = {id(x): x.detach().requires_grad_() for x in self.tap.values()}  # one map may serve every task
        leaf_features = {key: leaf.view_as(leaf) for key, leaf in leaves.items()}
        features = {
            **self.output.features,
            self.regularizer.feature: {name: leaf_features[id(x)] for name, x in self.tap.items()},
        }
        own = [torch.ones_like(x) for x in leaves.values()]
        return Given(
            self.output._replace(features=features), self.labels, self.draw(), list(leaf_features.values()), own
        )

    def compute_loss(self, given: Given) -> Tensor:
        return self.regularizer.compute_loss(given.output, given.labels, given.draw).loss

    def backward(self, given: Given, loss: Tensor) -> None:
        """To the features, where the gradient is added to the tasks' own, and to the regulariser's parameters."""
        torch.autograd.backward([loss, *given.leaf_features], [None, *given.own])

    def optimise(self) -> None:
        if self.trainer.regularizer_optimizer is not None:
            self.trainer.regularizer_optimizer.step(self.step)
            self.trainer.regularizer_optimizer.zero_grad()

    def once(self) -> dict[str, float]:
        """Seconds of each part."""
        found = {"draw": measure_time(self.draw, self.device)[0]}
        given, losses = self.given(), []
        found["forward"] = measure_time(lambda: losses.append(self.compute_loss(given)), self.device)[0]
        found["backward"] = measure_time(lambda: self.backward(given, losses[0]), self.device)[0]
        found["optimiser"] = measure_time(self.optimise, self.device)[0]
        return found


def show(rows: Sequence[tuple[str, float]], whole: float) -> None:
    """Rows of (name, seconds) beside the seconds of a step."""
    for name, seconds in rows:
        print(f"{name:<56} {seconds * 1e3:8.2f}  {100 * seconds / whole:6.2f}")


def fastest(found: Sequence[dict[K, float]]) -> dict[K, float]:
    """Of each key the smallest: these times are short, and what disturbs them only adds."""
    return {key: min(each[key] for each in found) for key in found[0]}


def functions(alone: Alone, repeats: int) -> list[tuple[str, float]]:
    """The forward pass by function, indented by depth; some extra time goes into watching."""
    found = []
    for _ in range(repeats):
        given = alone.given()
        with Calls(alone.device, mtcl.regularizers, mtcl.tasks) as calls:
            alone.compute_loss(given)
        found.append(calls.seconds)
    paths = fastest(found)
    most = max(paths.values())
    # Every path behind the one it continues, the slowest first.
    order = sorted(paths, key=lambda path: [(-paths[path[:n]], path[n - 1]) for n in range(1, len(path) + 1)])
    return [("  " * len(path) + path[-1], paths[path]) for path in order if paths[path] >= 0.02 * most]


def operations(alone: Alone, repeats: int) -> list[tuple[str, float]]:
    """The backward pass by operation, each without those inside it."""
    cuda = alone.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    spent: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        given = alone.given()
        loss = alone.compute_loss(given)
        with torch.profiler.profile(activities=activities) as profiled:
            alone.backward(given, loss)
            synchronize(alone.device)
        alone.optimise()
        for event in profiled.key_averages():
            us = event.self_device_time_total if cuda else event.self_cpu_time_total
            spent[f"  {event.key}, {event.count} x"].append(us / 1e6)
    rows = [(name, min(values)) for name, values in spent.items()]
    return sorted(rows, key=lambda row: -row[1])[:8]


def waits(alone: Alone) -> str:
    """What the host waits for, in words. On CUDA, PyTorch's own watch over synchronising calls is on as well."""
    given = alone.given()
    if alone.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with Watch() as watch:
            alone.backward(given, alone.compute_loss(given))
            alone.optimise()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error).splitlines()[0]
    finally:
        if alone.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return ", ".join(f"{name} ({count} times)" for name, count in watch.waits.items()) or "none"


def graphs(alone: Alone) -> str:
    """Of the forward pass under torch.compile, over four draws."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(alone.regularizer.compute_loss, fullgraph=True, backend="eager")
    try:
        for _ in range(4):
            given = alone.given()
            compiled(given.output, given.labels, given.draw)
    except torch._dynamo.exc.Unsupported as error:
        return f"breaks: {str(error).splitlines()[0]}"
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return f"no break, {count} graph{'s' if count > 1 else ''} for 4 draws"


def profile(trainer: Trainer, batch: Batch, step: float, repeats: int) -> dict[str, Any]:
    """Print where the regulariser's time and memory go; ``step``: seconds of the fastest step without it."""
    alone = Alone(trainer, batch)
    parts = fastest([alone.once() for _ in range(repeats + WARMUP)][WARMUP:])
    inside = {"forward": functions(alone, repeats), "backward": operations(alone, repeats)}
    print(f"the regulariser alone, fastest of {repeats}{'':24}ms  % of the fastest step without it")
    for name, seconds in parts.items():
        show([(name, seconds), *inside.get(name, [])], step)
    show([("sum", sum(parts.values()))], step)
    given = alone.given()
    largest = max(given.leaf_features, key=lambda x: x.nbytes)
    with Watch() as forward:
        loss = alone.compute_loss(given)
    with Watch() as backward:
        alone.backward(given, loss)
    print(f"a feature map: {largest.nbytes / MIB:.2f} MiB {tuple(largest.shape)}")
    maps = {}
    for name, watch in {"forward": forward, "backward": backward}.items():
        made = watch.largest
        maps[name] = made.bytes / largest.nbytes
        print(f"largest tensor made, {name}: {made.bytes / MIB:.2f} MiB = {maps[name]:.3f} of it, {made.what}")
    given = alone.given()
    both = measure_peak_memory(lambda: alone.compute_loss(given).backward(), alone.device)
    alone.optimise()
    print(
        f"peak of both passes: {both / MIB:.2f} MiB = {both / largest.nbytes:.2f} of it, for {len(alone.tap)} targets"
    )
    found = {"waits": waits(alone), "graph": graphs(alone)}
    print(f"waits of the host: {found['waits']}\ngraph: {found['graph']}")
    return {"seconds": parts, "largest tensor, in maps": maps, "peak, in maps": both / largest.nbytes, **found}


# The command


def settings(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Name -> overrides of train.py."""
    if overrides:
        return {"as given": list(overrides)}
    batch = f"data.batch_size={8 if torch.cuda.is_available() else 2}"
    return {name: [f"backbone={name}", *SETTING, batch] for name in BACKBONES}


def benchmark(overrides: Sequence[str], steps: int | None, profiled: bool) -> dict[str, Any]:
    """Measure and print one setting."""
    chosen = [word for word in overrides if word.startswith("regularizer=")] or ["regularizer=contrastive"]
    words = [*(word for word in overrides if not word.startswith("regularizer=")), "data.workers=0"]
    configs = Path(__file__).resolve().parents[2] / "configs"
    config, other = (compose_config([*words, choice], configs) for choice in ("regularizer=none", chosen[-1]))
    trainers = {"none": built(config), chosen[-1].removeprefix("regularizer="): built(other)}
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
    found = report(variants, config.data.batch_size, on.device)
    own = sum(p.numel() for p in on.regularizer.parameters())
    model, without = (sum(p.numel() for p in t.model.parameters()) for t in (on, trainers["none"]))
    print(
        f"inference: the model has {model:,} parameters, {without:,} without; the regulariser's {own:,} are not in it"
    )
    if profiled:
        found["profile"] = profile(on, batches[0], min(variants["none"].seconds), 20)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--profile", action="store_true", help="also look at the regulariser alone")
    parser.add_argument("--steps", type=int, help="pairs of steps timed; default 20 on CUDA, 6 on a CPU")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    parser.add_argument("overrides", nargs="*", help="of train.py; by default NYUD-v2's setting for three backbones")
    words = parser.parse_args()
    if words.steps is not None and words.steps < 1:
        raise UserError(f"--steps {words.steps} must be at least 1")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {where}, torch {torch.__version__}")
    found: dict[str, Any] = {}
    for name, overrides in settings(words.overrides).items():
        if found:
            print()
        found[name] = benchmark(overrides, words.steps, words.profile)
    if words.json:
        words.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    run(main)
