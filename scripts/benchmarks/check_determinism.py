"""Train the same setting twice with one seed and trainer.deterministic=true: are all losses and weights bit-equal?

    python scripts/benchmarks/check_determinism.py [--experiment NAME ...] [--steps N] [--json OUT] [key=value ...]

Each training is a process of its own, with the contrast, on images of 448x576 rendered from rooms (nothing to
download), with random weights. Compared are the logged numbers of each step and the weights of model and regulariser
after the last one. The exit code is 1 if any differ, or if a training failed. Overrides are those of train.py and apply
to all.
"""

import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mtcl.atomic import write_json
from mtcl.cli.arguments import CommandParser, positive_int
from mtcl.cli.script import run
from mtcl.errors import UserError
from mtcl.launch.processes import explain_exit, start_process
from mtcl.run_folder import RunFolder
from mtcl.run_log import Record, read_lines
from mtcl.training.checkpoint_file import read_checkpoint_file

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS: dict[str, list[str]] = {  # with overrides of their own
    "nyud_multi_head_hrnet18": [],
    "nyud_deeplab_resnet18": [],
    "nyud_taskprompter_vit_base": [],
    "nyud_invpt_vit_base": [
        "backbone.trainable=frozen"
    ],  # resizing its position embedding has no deterministic gradient
}
SHARED = ["data=rooms", "tasks=nyud", "data.size=[448,576]", "data.batch_size=4", "data.options.length=[32,2]"]
SHARED += ["trainer.deterministic=true", "trainer.log_interval=1", "trainer.val_interval=null", "trainer.num_panels=0"]
SHARED += ["trainer.validate_first=false", "trainer.checkpoint_interval=null", "evaluation.score_boundaries=false"]
LOSSES = ("train", "regularizer")  # kinds of records in a run's log


def train(folder: Path, overrides: Sequence[str]) -> None:
    """Run train.py into ``folder``; raise ``UserError`` with its last line if it fails."""
    log = folder.with_suffix(".log")
    command = [sys.executable, "train.py", "regularizer=contrastive", *overrides, f"hydra.run.dir={folder}"]
    code = start_process(command, log, os.environ, ROOT).wait()
    if code != 0:
        raise UserError(explain_exit(log, code))


def read_losses(folder: Path) -> list[Record]:
    """Return what a run logged of its losses, step by step."""
    records = [line.record for line in read_lines(RunFolder(folder).log) if line.record is not None]
    return [record for record in records if record["kind"] in LOSSES]


def count_different_weights(first: Mapping[str, Any], second: Mapping[str, Any]) -> int:
    """Count the tensors of two checkpoints' model and regulariser that are not bit-equal."""
    count = 0
    for part in ("model", "regularizer"):
        a, b = first.get(part) or {}, second.get(part) or {}
        count += sum(key not in a or key not in b or not torch.equal(a[key], b[key]) for key in {**a, **b})
    return count


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """Compare the logs and the last checkpoints of two run folders."""
    logs = read_losses(first), read_losses(second)
    different = [a["step"] for a, b in zip(*logs) if a != b]
    weights = [read_checkpoint_file(RunFolder(folder).last_checkpoint) for folder in (first, second)]
    return {
        "records": len(logs[0]),
        "losses_equal": bool(logs[0]) and logs[0] == logs[1],
        "first_different_step": min(different, default=None),
        "different_weights": count_different_weights(*weights),
    }


def check_experiment(name: str, overrides: Sequence[str], steps: int) -> dict[str, Any]:
    """Train an experiment twice, print whether the runs are equal, and return the comparison, or the error."""
    shared = [f"experiment={name}", *SHARED, f"trainer.max_steps={steps}", *EXPERIMENTS.get(name, []), *overrides]
    with tempfile.TemporaryDirectory(prefix="determinism-") as scratch:
        folders = [Path(scratch) / run_name for run_name in ("first", "second")]
        try:
            for folder in folders:
                train(folder, shared)
            result = compare_runs(*folders)
        except UserError as error:
            result = {"error": str(error)}
    equal = is_equal(result)
    print(f"{name}: {'bit-equal' if equal else f'NOT equal, {result}'}, {steps} steps", flush=True)
    return {"steps": steps, "equal": equal, **result}


def is_equal(result: Mapping[str, Any]) -> bool:
    """Tell whether a comparison saw no difference."""
    return "error" not in result and result["losses_equal"] and result["different_weights"] == 0


def main() -> None:
    """Parse the command line and check each experiment."""
    parser = CommandParser(__doc__)
    parser.add_argument("--experiment", nargs="+", default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--steps", type=positive_int, default=10, help="of each training; default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the comparisons to this file")
    parser.add_argument("overrides", nargs="*", help="of train.py")
    args = parser.parse_intermixed_args()
    overrides = [*args.overrides, *(text for text in args.experiment if "=" in text)]
    experiments = [text for text in args.experiment if "=" not in text]
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {processor}, torch {torch.__version__}")
    results: dict[str, Any] = {}
    for name in experiments:
        results[name] = check_experiment(name, overrides, args.steps)
        if args.json:
            write_json(args.json, results)
    different = [name for name, result in results.items() if not result["equal"]]
    if different:
        raise UserError(f"two trainings with one seed are not bit-equal: {', '.join(different)}")


if __name__ == "__main__":
    run(main)
