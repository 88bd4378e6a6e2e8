"""Time and memory of a piece of work, on either device."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_time(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds on the clock, and of this process's CPU time."""
    synchronize(device)
    began, began_cpu = time.perf_counter(), time.process_time()
    work()
    synchronize(device)
    return time.perf_counter() - began, time.process_time() - began_cpu


def measure_peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors at the peak of ``work()`` beyond what was allocated before it.

    By the CUDA allocator's count, or on a CPU by the profiler's record of every tensor allocated and freed (not the
    scratch memory inside oneDNN or BLAS).
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text("utf-8"))["traceEvents"] if e.get("name") == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        most = max(most, alive)
    return most
