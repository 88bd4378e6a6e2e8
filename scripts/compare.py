"""Runs side by side: a row per configuration (mean and deviation over seeds), Delta_MTL, paired differences.

    python scripts/compare.py RUN|FOLDER ... [--baseline RUN|FILE ...] [--against RUN|LABEL] [--by KEY]
        [--format text|markdown|latex|csv] [--metrics primary|all] [--holm] [--output FILE]

RUN is a folder with a metrics.json, FOLDER holds such folders (a sweep). Runs that differ in nothing but the seed
(and in keys that change neither what is learned nor what is measured) are one row, named by the keys in which the rows
differ; rows of one folder stand in the order of their values.

--baseline takes single-task runs (train.py -m tasks=single_semseg,single_depth), with any number of seeds, or a JSON
file {task: {metric: value}} or {task: value} of fractions, metres, degrees: a column Delta_MTL. Given one multi-task
run, or with --against, the column is Delta_on/off or "Delta vs. LABEL", and differences are paired over seeds. Without
either, the one row with the regulariser off (none, or weight 0) is compared with, or the first of two. A difference of
fewer than three pairs gets no verdict; --holm corrects the p-values of all differences for their number.
"""

import argparse
import sys
from pathlib import Path

from mtcl.atomic import write_atomically
from mtcl.cli.script import run
from mtcl.errors import UserError
from mtcl.results.compare import compare
from mtcl.results.tables import FORMATS, render

SUFFIXES = {".md": "markdown", ".tex": "latex", ".csv": "csv"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN|FOLDER")
    parser.add_argument("--baseline", nargs="+", type=Path, default=[], metavar="RUN|FILE")
    parser.add_argument("--against", metavar="RUN|LABEL", help="the row that the others are compared with")
    parser.add_argument(
        "--by", action="append", default=[], metavar="KEY", help="config key (or group) that makes rows"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: by the ending of --output, else text")
    parser.add_argument("--metrics", choices=("primary", "all"), default="primary")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of printing")
    parser.add_argument("--holm", action="store_true", help="correct p-values for the number of comparisons (Holm)")
    given = parser.parse_args()

    comparison = compare(given.runs, given.baseline, given.against, given.by, given.metrics == "all", given.holm)
    format = given.format or SUFFIXES.get(given.output.suffix if given.output else "", "text")
    text = render(comparison, format)
    if format == "csv":  # has no room for them
        for note in comparison.notes:
            if note.startswith("warning:"):
                print(note, file=sys.stderr)
    if given.output is None:
        print(text, end="")
        return
    if given.output.is_dir():
        raise UserError(f"--output {given.output} is a folder; give a file.")
    write_atomically(given.output, lambda temporary: temporary.write_text(text, "utf-8"))
    print(f"{given.output}: {len(comparison.rows)} rows ({format})")


if __name__ == "__main__":
    run(main)
