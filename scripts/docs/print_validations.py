"""Print the validations of runs by step, one column per metric: whether a training still improves, or overfits.

    python scripts/docs/print_validations.py RUN [RUN ...] [--metrics task/metric ...]

Values come from each run's log, in percent, metres or degrees as everywhere. A metric that a validation left out is -.
"""

import math
from pathlib import Path

from mtcl.cli.arguments import CommandParser
from mtcl.cli.script import run
from mtcl.errors import UserError
from mtcl.results.columns import make_column, primary_metrics
from mtcl.results.tables import align_columns, column_heading, format_value
from mtcl.run_folder import LOG
from mtcl.run_log import read_lines
from mtcl.tasks import TASK_NAMES


def read_validations(folder: Path) -> dict[int, dict[str, float]]:
    """Read step -> task/metric -> value of a run; the last one counts where a resumed run repeated a validation."""
    if not (folder / LOG).is_file():
        raise UserError(f"{folder} has no {LOG}; give the folder of a run")
    records = [line.record for line in read_lines(folder / LOG) if line.record is not None]
    return {r["step"]: {k: v for k, v in r.items() if v is not None} for r in records if r["kind"] == "val"}


def main() -> None:
    """Print a table per run."""
    parser = CommandParser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--metrics", nargs="+", default=[], metavar="task/metric", help="default: each task's main one")
    args = parser.parse_args()
    for folder in args.runs:
        validations = read_validations(folder)
        logged = {key for values in validations.values() for key in values}
        keys = args.metrics or [
            key for t in TASK_NAMES for metric in primary_metrics(t) if (key := f"{t}/{metric}") in logged
        ]
        if not set(keys) & logged:
            raise UserError(f"{folder} has logged no validation of {', '.join(keys) or 'any task'}")
        columns = [make_column(*key.split("/", 1)) for key in keys]
        body = [
            [str(step), *(format_value(column, values.get(column.key, math.nan)) for column in columns)]
            for step, values in sorted(validations.items())
        ]
        print(f"{folder.name}\n{align_columns([['step', *map(column_heading, columns)]], body, num_left=0)}\n")


if __name__ == "__main__":
    run(main)
