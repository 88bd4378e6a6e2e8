"""Write an HTML report of runs: table, curves, sweeps, images and settings in one file that needs no network.

    mtcl report RUN|FOLDER ... --output FILE.html [--title TEXT]
        [--baseline RUN|FILE ...] [--against RUN|LABEL] [--by KEY] [--holm]

RUN is a run folder, FOLDER contains such folders (a sweep, a study). Unfinished runs are shown with their data so far.
--baseline, --against, --by and --holm are those of mtcl compare. The page contains paths, host names and configs;
review it before sharing.
"""

import argparse
from pathlib import Path

from mtcl.atomic import convert_disk_errors, write_atomically
from mtcl.cli.compare import add_comparison_arguments, check_output_file
from mtcl.results.html import collect, render_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mtcl report``."""
    add_comparison_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.html")
    parser.add_argument("--title", help="default: the folders' names")


def run(args: argparse.Namespace) -> None:
    """Write the page."""
    check_output_file(args.output)
    collection = collect(args.runs, args.baseline, args.against, args.by, args.holm)
    names = ", ".join(source.resolve().name for source in args.runs[:3])
    text = render_page(collection, args.title or names + (", ..." if len(args.runs) > 3 else ""))
    with convert_disk_errors(args.output):
        write_atomically(args.output, lambda temporary: temporary.write_text(text, "utf-8"))
    megabytes = len(text.encode()) / 1e6
    rows = len(collection.comparison.rows) if collection.comparison else 0
    print(f"{args.output}: {len(collection.folders)} runs, {rows} rows, {megabytes:.1f} MB")
