"""Twenty training steps per decoder give the losses that were written down, to the bit.

Rewrite ``fixtures/golden_losses.json`` (``python tests/integration/test_golden.py``) only when a change of the numbers
is meant, and say in the changelog why. Bits depend on the processor and on the version of torch: elsewhere the first
losses must be close; training magnifies rounding to some percent in twenty steps.
"""

import hashlib
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.common import ROOT
from helpers.shrunken import shrunk

GOLDEN = ROOT / "tests/fixtures/golden_losses.json"
BACKBONES = {
    "multi_head": "resnet18",
    "deeplab": "resnet18_dilated",
    "pad_net": "hrnet_w18_small",
    "mti_net": "hrnet_w18_small",
    "atrc": "hrnet_w18_small",
    "invpt": "vit_small",
    "taskprompter": "vit_small",
    "mqtransformer": "swin_tiny",
    "linear": "vit_small",
    "dpt": "vit_small",
}


def machine() -> dict[str, str]:
    """Name what the bits depend on: torch, and the processor's model and instructions."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    names = ("model name", "cpu family", "model", "stepping")
    return {
        "torch": torch.__version__,
        "cpu": ", ".join(facts.get(name, "unknown") for name in names),
        "flags": hashlib.sha256(facts.get("flags", "").encode()).hexdigest()[:16],
    }


def train(decoder: str, folder: Path) -> list[dict[str, float]]:
    """Train 20 steps in a process of its own and return the losses of each step."""
    backbone = BACKBONES[decoder]
    command = [sys.executable, "train.py", "debug=tiny", "trainer.device=cpu", "data.size=[64,64]"]
    command += [f"backbone={backbone}", f"decoder={decoder}", *shrunk(decoder, backbone), "trainer.max_steps=20"]
    command += ["regularizer=contrastive", "trainer.validate_first=false", "trainer.val_interval=null"]
    command += ["evaluation.score_boundaries=false"]
    command += ["trainer.checkpoint_interval=null", f"hydra.run.dir={folder}"]
    code = "import sys, runpy, torch; torch.set_num_threads(1); sys.argv = sys.argv[1:]; "
    code += "runpy.run_path('train.py', run_name='__main__')"
    subprocess.run([sys.executable, "-c", code, *command[1:]], cwd=ROOT, check=True, capture_output=True)
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    keys = ("step", "total", "semseg", "human_parts", "sal", "depth", "normals", "edge", "regularizer")
    return [
        {key: value for key, value in record.items() if key.split("/")[-1] in keys and key != "kind"}
        for record in records
        if record["kind"] == "train"
    ]


def fill_missing(losses: list[dict[str, float | None]]) -> list[dict[str, float]]:
    """Put NaN in place of None, the loss of a task that a batch has no labels of."""
    return [{key: math.nan if value is None else value for key, value in step.items()} for step in losses]


@pytest.mark.slow
@pytest.mark.parametrize("decoder", BACKBONES)
def test_losses_of_twenty_steps(decoder, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    losses = train(decoder, tmp_path / "run")
    assert len(losses) == 20
    if golden["machine"] == machine():
        assert losses == golden["losses"][decoder]
    else:
        for step, expected in zip(*(fill_missing(rows[:4]) for rows in (losses, golden["losses"][decoder]))):
            assert step == pytest.approx(expected, rel=5e-2, abs=1e-3, nan_ok=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses = {decoder: train(decoder, Path(folder) / decoder) for decoder in BACKBONES}
    GOLDEN.write_text(json.dumps({"machine": machine(), "losses": losses}, indent=1) + "\n")
