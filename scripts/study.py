"""A study: a grid of runs of train.py from one YAML file, several at once, resumable; then its table.

    python scripts/study.py STUDY.yaml --output FOLDER [--jobs N] [--results docs/results/NAME] [--only ARM ...]
        [--table-only] [--holm] [overrides ...]

The overrides go to every run; they are the place for what belongs to a machine (data.root=..., backbone.weights=...;
paths are relative to the repository). Each run lies in FOLDER/ARM/seed_S, its output in FOLDER/ARM/seed_S.log. The same
command continues a study that was interrupted and tries failed runs again; finished runs stay as they are. The table is
of what has finished: FOLDER/study.md and study.json. scripts/studies/ has studies to copy from.
"""

import argparse
import sys
from pathlib import Path

from mtcl.cli.script import run
from mtcl.errors import UserError
from mtcl.launch.study import compose_task_names, format_failures, run_study

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="of the runs and the table")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once; default: %(default)s")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write a small JSON per run there, for the docs")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="run these arms only (singles: all those)")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    parser.add_argument("--holm", action="store_true", help="correct p-values for the number of comparisons (Holm)")
    parser.add_argument("overrides", nargs="*", help="of every run, as for train.py")
    given = parser.parse_intermixed_args()
    if given.jobs < 1:
        raise UserError(f"--jobs {given.jobs}: at least one run at once.")
    only = [word for word in given.only if "=" not in word]
    overrides = [*given.overrides, *(word for word in given.only if "=" in word)]  # --only takes all that follows it
    failures = run_study(
        given.study,
        given.output,
        overrides,
        command=[sys.executable, "train.py"],
        root=ROOT,
        tasks_of=lambda words: compose_task_names(words, ROOT / "configs"),
        num_parallel=given.jobs,
        only=only,
        results=given.results,
        table_only=given.table_only,
        holm=given.holm,
        say=lambda text: print(text, flush=True),
    )
    if failures:
        raise UserError(format_failures(failures))


if __name__ == "__main__":
    run(main)
