"""Runs as a page to look at: the table, curves, sweeps, pictures, settings, in one HTML file that needs no network.

    python scripts/report.py RUN|FOLDER ... --output FILE.html [--title TEXT]
        [--baseline RUN|FILE ...] [--against RUN|LABEL] [--by KEY] [--holm]

RUN is a run folder, FOLDER holds such folders (a sweep, a study). Runs that still go or broke off are shown with what
they have. --baseline, --against, --by and --holm are those of scripts/compare.py.
"""

import argparse
from pathlib import Path

from mtcl.atomic import convert_disk_errors, write_atomically
from mtcl.cli.script import run
from mtcl.errors import UserError
from mtcl.results.html import collect, render_page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN|FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.html")
    parser.add_argument("--title", help="default: the folders' names")
    parser.add_argument("--baseline", nargs="+", type=Path, default=[], metavar="RUN|FILE")
    parser.add_argument("--against", metavar="RUN|LABEL", help="the row that the others are compared with")
    parser.add_argument(
        "--by", action="append", default=[], metavar="KEY", help="config key (or group) that makes rows"
    )
    parser.add_argument("--holm", action="store_true", help="correct p-values for the number of comparisons (Holm)")
    given = parser.parse_args()
    if given.output.is_dir():
        raise UserError(f"--output {given.output} is a folder; give a file.")

    found = collect(given.runs, given.baseline, given.against, given.by, given.holm)
    names = ", ".join(source.resolve().name for source in given.runs[:3])
    title = given.title or names + (", ..." if len(given.runs) > 3 else "")
    text = render_page(found, title)
    with convert_disk_errors(given.output):
        write_atomically(given.output, lambda temporary: temporary.write_text(text, "utf-8"))
    megabytes = len(text.encode()) / 1e6
    rows = len(found.comparison.rows) if found.comparison else 0
    print(f"{given.output}: {len(found.folders)} runs, {rows} rows, {megabytes:.1f} MB")


if __name__ == "__main__":
    run(main)
