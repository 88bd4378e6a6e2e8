"""Measure the time and memory of a piece of work, on CPU or CUDA."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity

T = TypeVar("T")


def synchronize(device: torch.device) -> None:
    """Wait for the work that is queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


def measure_time(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the wall-clock seconds of ``work()``, and the seconds of this process's CPU time."""
    synchronize(device)
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    synchronize(device)
    return time.perf_counter() - start, time.process_time() - start_cpu


def measure_in_turns(
    works: Mapping[str, Callable[[T], object]], inputs: Iterable[T], device: torch.device, warmup: int = 0
) -> dict[str, list[tuple[float, float]]]:
    """Measure several pieces of work in turn, so that a machine that becomes slower affects all of them.

    Every other turn has the reverse order.

    Args:
        works: name -> what is measured, a function of the turn's input.
        inputs: one for each turn.
        device: that the work runs on.
        warmup: how many of the first turns are not measured.

    Returns:
        name -> for each turn after those, what :func:`measure_time` returns.
    """
    durations: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    order = list(works)
    for turn, value in enumerate(inputs):
        for name in order:
            duration = measure_time(partial(works[name], value), device)
            if turn >= warmup:
                durations[name].append(duration)
        order.reverse()
    return durations


def measure_peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Return the bytes of tensors at the peak of ``work()`` beyond those allocated before it.

    Measured by the CUDA allocator, or on a CPU by the profiler's record of every tensor allocated and freed (without
    the scratch memory inside oneDNN or BLAS).
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        baseline = torch.cuda.memory_allocated(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - baseline
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text("utf-8"))["traceEvents"] if e.get("name") == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak
