"""Runs, newest first: state, steps done, the main metric of each task as it was last scored, age, folder.

    python scripts/runs.py [FOLDER ...] [--state STATE ...] [--format text|csv|json]

FOLDER: runs or folders of runs, default: outputs. Metrics: fractions as percent, metres, degrees (in CSV and JSON
fractions). In a terminal, long folder names are shortened to its width. States: running (a process holds the folder),
finished, interrupted (ended before its last step: resume=auto continues it), pruned and failed (by a search), not
started (no step is logged), evaluation, broken (says why).
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from mtcl.cli.script import run
from mtcl.results.list_runs import STATES, format_runs, list_runs, to_records
from mtcl.results.tables import format_csv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("outputs")], metavar="FOLDER")
    parser.add_argument("--state", action="append", choices=STATES, help="only these; may be given several times")
    parser.add_argument("--format", choices=("text", "csv", "json"), default="text")
    given = parser.parse_args()

    runs = [one for one in list_runs(given.folders) if given.state is None or one.state in given.state]
    if given.format == "text":
        width = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else None
        print(format_runs(runs, width) if runs else "no runs", end="" if runs else "\n")
        return
    records = to_records(runs)
    if given.format == "json":
        print(json.dumps(records, indent=1))
        return
    keys = list(dict.fromkeys(key for record in records for key in record))
    print(format_csv([keys, *([record.get(key) for key in keys] for record in records)]), end="")


if __name__ == "__main__":
    run(main)
