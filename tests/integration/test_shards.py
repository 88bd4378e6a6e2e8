"""Whole runs on shards: several processes and workers, resumed in mid-epoch."""

from pathlib import Path

import pytest
import torch
from helpers.common import TINY
from helpers.processes import TORCHRUN, check_exit_code, started

OVERRIDES = [
    *TINY,
    "data=rooms",
    "data.options.length=[22,2]",
    "data.limit=null",
    "data.batch_size=4",
    "data.eval_batch_size=2",
]
OVERRIDES += ["trainer.num_panels=0", "optimizer.lr=1e-3", "schedule=constant", "trainer.val_interval=null"]
OVERRIDES += ["trainer.validate_first=false", "evaluation.score_boundaries=false"]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["model"]


@pytest.mark.slow
def test_a_run_on_shards_is_resumed_in_mid_epoch_bit_for_bit(tmp_path, cli):
    pytest.importorskip("webdataset")
    data = ["data=rooms", "data.options.length=[22,2]", "data.size=[32,64]"]
    written = cli("scripts/make_shards.py", "--out", tmp_path / "shards", "--shards", 5, "--workers", 0, *data)
    assert written.code == 0, written.err
    assert "22 samples of " in written.out
    pattern = f"data.shards={tmp_path}/shards/train-{{000000..000004}}.tar"
    assert pattern in written.out

    def run(name: str, *overrides: str) -> str:
        command = [*OVERRIDES, pattern, "data.shuffle_buffer=3", "data.workers=2", *overrides]
        process = started(*TORCHRUN, "train.py", *command, f"hydra.run.dir={tmp_path / name}")
        check_exit_code(process)
        return process.stdout

    # Each of 2 x 2 workers reads one of the five shards, of which the smallest have four samples: 4 steps per epoch.
    assert "4 workers in all read 1 of 5 shards each per epoch, which shows 16 of 22 images" in run(
        "whole", "trainer.max_steps=7"
    )
    run("cut", "trainer.max_steps=3")
    assert "another order" not in run("cut", "trainer.max_steps=7", "resume=auto")
    uncut, cut = read_weights(tmp_path / "whole"), read_weights(tmp_path / "cut")
    assert all(torch.equal(value, cut[name]) for name, value in uncut.items())
    assert "each reading other shards than the rest: images come in another order from here on" in run(
        "cut", "trainer.max_steps=8", "resume=auto", "data.workers=1"
    )
