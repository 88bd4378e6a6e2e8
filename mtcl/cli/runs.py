"""List runs, newest first: state, steps done, age, the primary metric of each task at its last evaluation, folder.

    mtcl runs [FOLDER ...] [--state STATE ...] [--format text|csv|json]

FOLDER is a run or a folder of runs, by default outputs. Metrics are in percent, metres and degrees; in CSV and JSON
fractions stay fractions. In a terminal, long folder names are shortened to its width. States: running (a process writes
into the folder), finished, interrupted (ended before its last step; resume=auto continues it), pruned and failed (in a
search), not started (no step is logged), evaluation, broken (with the reason).
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from mtcl.results.list_runs import STATES, format_runs, list_runs, to_records
from mtcl.results.tables import format_csv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mtcl runs``."""
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("outputs")], metavar="FOLDER")
    parser.add_argument("--state", action="append", choices=STATES, help="only these; may be given several times")
    parser.add_argument("--format", choices=("text", "csv", "json"), default="text")
    parser.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")


def run(args: argparse.Namespace) -> None:
    """Print the list."""
    runs = [run for run in list_runs(args.folders) if args.state is None or run.state in args.state]
    if args.format == "text":
        width = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else None
        print(format_runs(runs, width) if runs else "no runs", end="" if runs else "\n")
        return
    records = to_records(runs)
    if args.format == "json":
        print(json.dumps(records, indent=1))
        return
    keys = list(dict.fromkeys(key for record in records for key in record))
    print(format_csv([keys, *([record.get(key) for key in keys] for record in records)]), end="")
