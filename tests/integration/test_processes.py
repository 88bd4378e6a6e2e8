"""Several processes do what one would do with the whole batch (gloo, on a CPU)."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers.common import TINY, tiny_nyud
from helpers.distillation import STUDENT
from helpers.processes import (
    RANKS_OVERRIDES,
    TORCHRUN,
    VIT,
    check_exit_code,
    check_same,
    find_process_of_rank,
    run_cases,
    started,
    started_in_background,
    torchrun,
    wait_for_step,
    weights_of,
    worked,
)
from helpers.shrunken import shrunk

from mtcl import UserError
from mtcl.data.loader import EpochBatchSampler
from mtcl.training.checkpoint_file import read_checkpoint_file

# Its graphs are cut where DDP wants them. Adam would weigh up that it rounds otherwise.
COMPILED = ["trainer.compile=true", "compiler=aot_eager", "optimizer=sgd", "regularizer.lr=1e-4"]

TWO_VIEWS = ["data.views_per_step=2", "loss.views=first"]

# The guard is on: all spreads are below its bound.
MTPSL = ["regularizer=mtpsl", "regularizer.options.variance_weight=1", "regularizer.options.min_spread=0.9"]

# Its loss holds that of pseudo_labels. At first the teacher is the model, where the sign of an L1 loss is of rounding.
TEACHER = ["regularizer.start_fraction=0", "trainer.ema=0.5", "regularizer.options.confidence=0.1"]
TEACHER += ["tasks.names=[semseg,human_parts,sal,edge]"]

# The loss of the tokens' labels is a mean over the valid cells of all processes. Adam would weigh up the rounding of a
# key's bias, whose gradient is 0.
TOKENS = ["decoder=task_tokens", *shrunk("task_tokens", "resnet18"), "optimizer=sgd"]

# Each process draws for itself which paths are dropped, and the noise of routers.
SAK = ["decoder=sak", *STUDENT, "++backbone.kwargs.drop_path_rate=0", "decoder.noisy_gating=false"]
SAK += ["regularizer=distillation", "optimizer=sgd"]


# The noise of its training, which each process draws for itself, is left out.
DIFFUSION = ["decoder=diffusion_mtl", *shrunk("diffusion_mtl", "resnet18"), "noise=0"]

CASES = {
    "contrastive": ["data.label_assignment=random"],
    "mtpsl of two views": [*MTPSL, *TWO_VIEWS],
    "diffusion_mtl and auxiliary": [
        *DIFFUSION,
        "regularizer=auxiliary",
        "data.label_assignment=random",
        "loss.image_weighting=tasks_per_label",
    ],
    "jtr of two views": ["regularizer=jtr", *TWO_VIEWS, "data.label_assignment=random"],
    "rep_mtl": ["regularizer=rep_mtl", "data.label_assignment=random"],
    "task_tokens and label_discovery": [
        *TOKENS,
        "regularizer=label_discovery",
        *TEACHER,
        "data.label_assignment=random",
    ],
    "teachers of sak": [*SAK, "data.label_assignment=random"],
    "compiled": COMPILED,
}


@pytest.mark.slow
def test_two_processes_with_half_the_batch_are_one_with_the_whole(tmp_path):
    """Partial labels: the processes have different numbers of valid pixels, of anchors, of pictures without a label."""
    plain = {case: [word for word in overrides if "compile" not in word] for case, overrides in CASES.items()}
    one, two = run_cases(tmp_path / "one", None, plain), run_cases(tmp_path / "two", TORCHRUN, CASES)
    for case in CASES:
        check_same(one[case], two[case], case)


@pytest.mark.slow
def test_train_py_under_torchrun(tmp_path):
    """One folder, one writer, one table; resumed in the middle it ends at the same weights."""
    overrides = [*RANKS_OVERRIDES, "trainer.max_steps=4", "trainer.checkpoint_interval=2"]

    def run(folder: Path, *more: str) -> subprocess.CompletedProcess:
        return started(*TORCHRUN, "train.py", *overrides, f"hydra.run.dir={folder}", *more)

    process = run(tmp_path / "whole", "schedule=constant")
    check_exit_code(process)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["processes"] == 2
    assert process.stdout.count("validation images:\n") == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    check_exit_code(run(tmp_path / "cut", "trainer.max_steps=2", "schedule=constant"))
    check_exit_code(run(tmp_path / "cut", "schedule=constant", "resume=auto"))
    a, b = (torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert len(a["rng"]) == 2
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name


@pytest.mark.slow
def test_two_processes_stop_early_together(tmp_path):
    """Weights that stay as they are soon bring no better score; both processes end, and again when resumed."""
    overrides = [*RANKS_OVERRIDES, "backbone=test_resnet", "tasks.names=[depth,normals]", "optimizer.lr=0"]
    overrides += ["regularizer=none", "trainer.patience=2", "trainer.val_interval=1", "trainer.max_steps=40"]
    overrides += [f"hydra.run.dir={tmp_path / 'run'}"]
    records = []
    for resume in ("null", "auto"):
        process = started(*TORCHRUN, "train.py", *overrides, f"resume={resume}")
        check_exit_code(process)
        records.append(json.loads((tmp_path / "run" / "run.json").read_text()))
    assert "the run had already ended at step" in process.stdout + process.stderr
    for record in records:
        assert (record["stop_reason"], record["processes"]) == ("patience", 2)
        assert record["best_step"] + 2 == record["step"] == records[0]["step"] < 40


@pytest.mark.slow
def test_data_that_one_process_can_not_read_ends_all_with_one_sentence(tmp_path):
    root = tiny_nyud(tmp_path / "data")
    (root / "images" / "b.png").write_bytes(b"not a picture")
    overrides = [*TINY, "data=nyud", f"data.root={root}", "data.size=[64,96]", "trainer.validate_first=false"]
    start = time.monotonic()
    process = started(*torchrun(2, "--max-restarts=0"), "train.py", *overrides, f"hydra.run.dir={tmp_path / 'run'}")
    assert time.monotonic() - start < 60
    assert process.returncode == 1
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert "b.png" in line
    assert "RuntimeError" not in process.stderr, "torchrun's own report aside, the other process says a line or nothing"


@pytest.mark.slow
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(tmp_path):
    """torchrun starts all processes again; they go on, and end as a run that nobody disturbed."""
    overrides = [*RANKS_OVERRIDES, "trainer.max_steps=8", "trainer.checkpoint_interval=2", "trainer.val_interval=null"]
    overrides += ["trainer.log_interval=1", "trainer.validate_first=false"]

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return read_checkpoint_file(folder / "checkpoints" / "last.pt")["model"]

    process = started(*TORCHRUN, "train.py", *overrides, f"hydra.run.dir={tmp_path / 'whole'}")
    check_exit_code(process)
    for killed_rank in (0, 1):
        folder = tmp_path / f"killed_{killed_rank}"
        command = [*torchrun(2, "--max-restarts=1"), "train.py", *overrides, f"hydra.run.dir={folder}"]
        with started_in_background(*command, "resume=auto") as process:
            last_step = wait_for_step(folder, 4, process)
            os.kill(find_process_of_rank(process.pid, killed_rank), signal.SIGKILL)
            output = process.communicate(timeout=280)[0]
        assert process.returncode == 0, output[-3000:]
        (step,) = re.findall(r"resumed at step (\d+)", output)
        assert int(step) >= last_step - 3, "the last checkpoint may not have been written yet, the one before has"
        killed = weights(folder)
        assert all(torch.equal(value, killed[name]) for name, value in weights(tmp_path / "whole").items())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_four_processes_are_one_with_the_whole_batch(parallel, tmp_path):
    """A ViT has no batch norm, so only the order of sums differs. DDP's checkpoint goes on in two and in one."""
    overrides = [*VIT, "data.label_assignment=random", "trainer.max_steps=20", f"trainer.parallel={parallel}"]
    one = worked(tmp_path / "one", None, *overrides)
    four = worked(tmp_path / "four", torchrun(4), *overrides)
    check_same(one, four)
    for name, weight in weights_of(one[1]).items():
        torch.testing.assert_close(weights_of(four[1])[name], weight, rtol=0, atol=1e-5, msg=name)
    if parallel == "fsdp":  # what a state of shared-out weights goes on in is tested in training/test_sharding.py
        return
    state = f"from={tmp_path / 'four' / 'state.pt'}"
    want = worked(tmp_path / "four_one", None, *overrides, state)
    check_same(want, worked(tmp_path / "four_two", TORCHRUN, *overrides, state))


def test_parts_of_a_batch_are_the_batch():
    uncut = iter(EpochBatchSampler(20, 6, seed=1, start_step=2))
    parts = [iter(EpochBatchSampler(20, 6, seed=1, start_step=2, shard=(i, 3))) for i in range(3)]
    for _ in range(5):
        pieces = [next(shard) for shard in parts]
        assert sorted(key for piece in pieces for key in piece) == sorted(next(uncut))
        assert {len(piece) for piece in pieces} == {2}
    with pytest.raises(UserError, match="multiple of 4"):
        EpochBatchSampler(20, 6, seed=1, shard=(0, 4))
