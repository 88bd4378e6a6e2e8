"""Compare runs: a row per configuration (mean and deviation over seeds), Delta_MTL, paired differences.

    mtcl compare RUN|FOLDER ... [--baseline RUN|FILE ...] [--against RUN|LABEL] [--by KEY]
        [--published FILE] [--format text|markdown|latex|csv] [--metrics primary|all] [--holm] [--output FILE]

RUN is a folder with a metrics.json, FOLDER contains such folders (a sweep). Runs that differ in the seed only, and in
keys that change neither training nor evaluation, are one row, named by the keys in which the rows differ. The rows of
one folder are sorted by their values.

--baseline takes single-task runs (train.py -m tasks=single_semseg,single_depth), with any number of seeds, or a JSON
file {task: {metric: value}} or {task: value} of fractions, metres, degrees, and adds a column Delta_MTL. With one
multi-task run, or with --against, the column is Delta_on/off or "Delta vs. LABEL", and differences are paired over
seeds. Without either, the reference is the only row with the regulariser off (none, or weight 0), or the first of two
rows. A difference of fewer than three pairs gets no verdict; --holm corrects the p-values of all differences for their
number.

--published adds the rows of a file of published results (.yaml or .csv; docs/comparing.md has its format), marked as
such and ranked with nothing.
"""

import argparse
import sys
from pathlib import Path

from mtcl.atomic import convert_disk_errors, write_atomically
from mtcl.errors import UserError
from mtcl.results.compare import compare
from mtcl.results.tables import FORMATS, render

FORMAT_BY_SUFFIX = {".md": "markdown", ".tex": "latex", ".csv": "csv"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mtcl compare``."""
    add_comparison_arguments(parser)
    parser.add_argument("--published", type=Path, metavar="FILE", help="rows of published tables, .yaml or .csv")
    parser.add_argument("--format", choices=FORMATS, help="default: by the ending of --output, else text")
    parser.add_argument("--metrics", choices=("primary", "all"), default="primary")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there instead of printing it")


def add_comparison_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that choose runs and what they are compared with, as in ``mtcl report``."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN|FOLDER")
    parser.add_argument("--baseline", nargs="+", type=Path, default=[], metavar="RUN|FILE")
    parser.add_argument("--against", metavar="RUN|LABEL", help="the row to compare the others with")
    parser.add_argument(
        "--by", action="append", default=[], metavar="KEY", help="config key (or group) that distinguishes rows"
    )
    parser.add_argument("--holm", action="store_true", help="correct p-values for the number of comparisons (Holm)")


def run(args: argparse.Namespace) -> None:
    """Print the comparison, or write it to a file."""
    check_output_file(args.output)
    all_metrics = args.metrics == "all"
    comparison = compare(args.runs, args.baseline, args.against, args.by, all_metrics, args.holm, args.published)
    format = args.format or FORMAT_BY_SUFFIX.get(args.output.suffix if args.output else "", "text")
    text = render(comparison, format)
    if format == "csv":  # has no room for notes
        for note in comparison.notes:
            if note.startswith("warning:"):
                print(note, file=sys.stderr)
    if args.output is None:
        print(text, end="")
        return
    with convert_disk_errors(args.output):
        write_atomically(args.output, lambda temporary: temporary.write_text(text, "utf-8"))
    print(f"{args.output}: {len(comparison.rows)} rows ({format})")


def check_output_file(path: Path | None) -> None:
    """Raise ``UserError`` where the file to write is a folder."""
    if path is not None and path.is_dir():
        raise UserError(f"--output {path} is a folder; give a file.")
