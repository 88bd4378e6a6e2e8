"""Twenty training steps per decoder give the losses that were written down, to the bit.

Rewrite ``fixtures/golden_losses.json`` (``python tests/integration/test_golden.py``) only when a change of the numbers
is meant, and say in the changelog why. Bits depend on the processor and on the version of torch: elsewhere the first
losses must be close; training magnifies rounding to some percent in twenty steps.
"""

import hashlib
import json
import math
import os
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


def list_overrides(decoder: str, folder: Path) -> list[str]:
    """Return the overrides of a training of 20 steps."""
    backbone = BACKBONES[decoder]
    overrides = ["debug=tiny", "trainer.device=cpu", "data.size=[64,64]"]
    overrides += [f"backbone={backbone}", f"decoder={decoder}", *shrunk(decoder, backbone), "trainer.max_steps=20"]
    overrides += ["regularizer=contrastive", "trainer.validate_first=false", "trainer.val_interval=null"]
    overrides += ["evaluation.score_boundaries=false"]
    return [*overrides, "trainer.checkpoint_interval=null", f"hydra.run.dir={folder}"]


def read_losses(folder: Path) -> list[dict[str, float]]:
    """Return the losses of each step of a run."""
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
def test_losses_of_twenty_steps(decoder, tmp_path, cli):
    golden = json.loads(GOLDEN.read_text())
    result = cli("train.py", *list_overrides(decoder, tmp_path))
    assert result.code == 0, result.err
    losses = read_losses(tmp_path)
    assert len(losses) == 20
    if golden["machine"] == machine():
        assert losses == golden["losses"][decoder]
    else:
        for step, expected in zip(*(fill_missing(rows[:4]) for rows in (losses, golden["losses"][decoder]))):
            assert step == pytest.approx(expected, rel=5e-2, abs=1e-3, nan_ok=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses = {}
        for decoder in BACKBONES:
            command = [sys.executable, "train.py", *list_overrides(decoder, Path(folder) / decoder)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
            losses[decoder] = read_losses(Path(folder) / decoder)
    GOLDEN.write_text(json.dumps({"machine": machine(), "losses": losses}, indent=1) + "\n")
