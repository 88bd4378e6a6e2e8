"""Check what commands and workers import: torch, timm and torchmetrics take seconds, for each process anew."""

import subprocess
import sys

import pytest
from helpers.common import ROOT

HEAVY = ("torch", "torchvision", "torchmetrics", "timm", "skimage", "scipy.stats", "matplotlib", "gradio")
COMMANDS = (
    "mtcl",
    "mtcl.cli.main",
    "mtcl.cli.runs",
    "mtcl.cli.compare",
    "mtcl.cli.report",
    "mtcl.launch.sweep",
    "train",
)
EDGE_WORKER = ("mtcl.metrics.boundaries", "mtcl.data.worker_pool", "mtcl.data.image_io")
DATA_WORKER = ("mtcl.data.loader", "mtcl.data.datasets.nyud", "mtcl.data.datasets.pascal_context", "mtcl.tasks.build")


@pytest.mark.parametrize(
    ("modules", "allowed"),
    [((*COMMANDS, *EDGE_WORKER), ()), (DATA_WORKER, ("torch",))],
    ids=["commands and edge workers", "data workers"],
)
def test_what_is_imported_before_any_work(modules, allowed):
    refused = [name for name in HEAVY if name not in allowed]
    code = f"import sys, {', '.join(modules)}\nprint(*[name for name in {refused} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.split() == []
