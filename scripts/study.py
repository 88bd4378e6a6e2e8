"""A study: a grid of runs of train.py from one YAML file, several at once, resumable; then its table.

    python scripts/study.py STUDY.yaml --output FOLDER [--jobs N] [--results docs/results/NAME] [--only VARIANT ...]
        [--table-only] [--holm] [--metrics TASK/METRIC,...] [--time-limit SECONDS]
        [--launcher slurm [--batch-file FILE]] [overrides ...]

The overrides go to every run; they are the place for what belongs to a machine (data.root=..., backbone.weights=...;
paths are relative to the repository). A run's folder is FOLDER/VARIANT/seed_S, its output FOLDER/VARIANT/seed_S.log.
The same command continues a study that was interrupted and tries failed runs again; finished runs stay as they are. The
table is of what has finished: FOLDER/study.md and study.json. With --results, each finished run is a small JSON file
there, too; runs that have theirs are not run again, so a study can go on where only these files were kept.
scripts/studies/ has studies to copy from. With --time-limit, the runs save their state and end after so many seconds
(at the latest half a minute later); the exit code is then 75, and the same command goes on. With --launcher slurm the
runs are submitted as an array of jobs (docs/slurm.md) and the command returns; --table-only then makes the table.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from mtcl.cli.arguments import CommandParser, non_negative_int, positive_float, positive_int
from mtcl.cli.script import run
from mtcl.errors import UserError
from mtcl.launch.processes import EXIT_REQUEUE
from mtcl.launch.study import TimeLimitReached, compose_task_names, format_failures, run_study
from mtcl.launch.study_slurm import become_run, submit_study
from mtcl.results.rows import parse_metrics_option

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the command."""
    parser = CommandParser(__doc__)
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="of the runs and the table")
    parser.add_argument("--jobs", type=positive_int, metavar="N", help="runs at once; default: 1, on Slurm no limit")
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="a small JSON per run there; those are not run again"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="VARIANT", help="run these only (single_task: all those)"
    )
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    parser.add_argument("--holm", action="store_true", help="correct p-values for the number of comparisons (Holm)")
    parser.add_argument(
        "--metrics",
        type=parse_metrics_option,
        default={},
        metavar="TASK/METRIC,...",
        help="what represents these tasks in the printed table, in Delta too, such as semseg/pixel_accuracy",
    )
    parser.add_argument("--time-limit", type=positive_float, metavar="SECONDS", help="end the runs, to be continued")
    parser.add_argument("--launcher", choices=["processes", "slurm"], default="processes", help="default: %(default)s")
    parser.add_argument(
        "--batch-file", type=Path, default=ROOT / "scripts/slurm/study.sh", metavar="FILE", help="what sbatch runs"
    )
    parser.add_argument("--run", type=non_negative_int, metavar="N", help="be run N, as an element of an array is")
    parser.add_argument("overrides", nargs="*", help="of every run, as for train.py")
    args = parser.parse_intermixed_args()
    only = [text for text in args.only if "=" not in text]
    overrides = [*args.overrides, *(text for text in args.only if "=" in text)]  # --only takes all that follows it
    command = [sys.executable, "train.py"]
    if args.run is not None:
        become_run(args.study, args.output, overrides, args.run, command=command, root=ROOT, list_tasks=list_tasks)
        return
    if args.launcher == "slurm" and not args.table_only:
        submit_study(
            args.study,
            args.output,
            overrides,
            batch_file=args.batch_file,
            root=ROOT,
            list_tasks=list_tasks,
            num_parallel=args.jobs,
            only=only,
            results=args.results,
        )
        return
    try:
        failures = run_study(
            args.study,
            args.output,
            overrides,
            command=command,
            root=ROOT,
            list_tasks=list_tasks,
            num_parallel=args.jobs or 1,
            only=only,
            results=args.results,
            table_only=args.table_only,
            holm=args.holm,
            metrics=args.metrics,
            time_limit=args.time_limit,
            say=lambda text: print(text, flush=True),
        )
    except TimeLimitReached as reached:
        print(reached, file=sys.stderr)
        sys.exit(EXIT_REQUEUE)
    if failures:
        raise UserError(format_failures(failures))


def list_tasks(overrides: Sequence[str]) -> list[str]:
    """Return the tasks of train.py with these overrides."""
    return compose_task_names(overrides, ROOT / "configs")


if __name__ == "__main__":
    run(main)
