"""A search: Optuna proposes values for the keys of a YAML file, train.py tries them; resumable, parallel.

    python scripts/search.py SEARCH.yaml [--output FOLDER] [--trials N] [--jobs J] [--baseline RUN|FILE ...]
        [overrides ...]

The overrides go to every run; they are the place for what belongs to a machine (data.root=..., backbone.weights=...;
paths are relative to the repository). Values are chosen on data.split=tune. Each trial's run lies in FOLDER/trial_N,
its output in FOLDER/trial_N.log, what Optuna knows in FOLDER/search.db. The same command goes on after an interruption;
a second one, started meanwhile, helps. scripts/searches/ has files to copy from, docs/sweeps.md says what they hold.
"""

import os
import sys
from pathlib import Path

import torch

from mtcl.cli.arguments import CommandParser, positive_int
from mtcl.cli.script import run
from mtcl.launch.search import run_search
from mtcl.launch.study import compose_task_names

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the command."""
    parser = CommandParser(__doc__)
    parser.add_argument("search", type=Path, metavar="SEARCH.yaml")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: outputs/searches/<name of the file>")
    parser.add_argument("--trials", type=positive_int, metavar="N", help="in all, default: as the file says")
    parser.add_argument(
        "--jobs", type=positive_int, default=1, metavar="J", help="trials at once; default: %(default)s"
    )
    parser.add_argument(
        "--baseline", nargs="+", default=[], metavar="RUN|FILE", help="for a Delta, in place of runs made here"
    )
    parser.add_argument("overrides", nargs="*", help="of every run, as for train.py")
    args = parser.parse_intermixed_args()
    overrides = [
        *args.overrides,
        *(text for text in args.baseline if "=" in text),
    ]  # --baseline takes what follows it
    run_search(
        args.search,
        args.output or Path("outputs/searches") / args.search.stem,
        overrides,
        command=[sys.executable, "train.py"],
        root=ROOT,
        list_tasks=lambda overrides: compose_task_names(overrides, ROOT / "configs"),
        trials=args.trials,
        num_parallel=args.jobs,
        baseline=[Path(text) for text in args.baseline if "=" not in text],
        gpus=visible_gpus(),
        say=lambda text: print(text, flush=True),
    )


def visible_gpus() -> list[str]:
    """Return the numbers of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


if __name__ == "__main__":
    run(main)
