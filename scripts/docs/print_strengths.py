"""Print how strong the regulariser of runs was: the length of its gradient as a part of that of the tasks' losses.

    python scripts/docs/print_strengths.py RUN [RUN ...]

Runs of one folder, as the seeds of a study's variant, are one row. Lengths are those at the feature that the log
compares gradients at (regularizer.options.feature), per target: the sum over all logged steps where the regulariser has
a gradient, divided by the same sum for the task's loss. A target that it never reached is -.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from mtcl.cli.arguments import CommandParser
from mtcl.cli.script import run
from mtcl.errors import UserError
from mtcl.results.tables import align_columns
from mtcl.run_folder import LOG
from mtcl.run_log import read_lines
from mtcl.tasks import TASK_NAMES


def measure_strengths(folders: Iterable[Path]) -> dict[str, float]:
    """Return task -> length of the regulariser's gradients divided by that of the task's, over the logs of runs.

    Raises:
        UserError: a folder has no log.
    """
    lengths: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for folder in folders:
        if not (folder / LOG).is_file():
            raise UserError(f"{folder} has no {LOG}; give the folder of a run")
        for line in read_lines(folder / LOG):
            record = line.record or {}
            if record.get("kind") != "regularizer":
                continue
            for task in TASK_NAMES:
                norms = (record.get(f"gradient/{task}/norm_{part}") for part in ("regularizer", "task"))
                length, task_length = norms
                if length and task_length and math.isfinite(length + task_length):
                    lengths[task][0] += length
                    lengths[task][1] += task_length
    return {task: length / task_length for task, (length, task_length) in lengths.items()}


def main() -> None:
    """Print one row for the runs of each folder."""
    parser = CommandParser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    args = parser.parse_args()
    groups: dict[Path, list[Path]] = defaultdict(list)
    for folder in args.runs:
        groups[folder.resolve().parent].append(folder)
    strengths = {parent.name: measure_strengths(folders) for parent, folders in groups.items()}
    tasks = [task for task in TASK_NAMES if any(task in row for row in strengths.values())]
    if not tasks:
        raise UserError("no run has logged a gradient of a regulariser; did all train with regularizer=none?")
    body = [
        [name, str(len(folders)), *(f"{row[task]:.2f}" if task in row else "-" for task in tasks)]
        for (name, row), folders in zip(strengths.items(), groups.values())
    ]
    print(align_columns([["runs in", "n", *tasks]], body, num_left=1))


if __name__ == "__main__":
    run(main)
