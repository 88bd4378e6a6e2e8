"""Check a dataset folder in full: lists, files, sizes, values, and whether labels lie on their pictures.

python scripts/verify_data.py ROOT [--dataset nyud|nyud_small|pascal] [--workers N] [--limit N] [--sheet FILE.png]

Prints a table and writes a contact sheet. Exits with 1 if anything is damaged; deviations from the official data are
named and are not errors. --frequencies prints the classes' pixel shares in the training list instead.
"""

import argparse
import os
from pathlib import Path

from mtcl import UserError
from mtcl.cli.script import run
from mtcl.data.verify import FACTS, find_dataset, format_report, verify, write_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path, help="folder of the dataset, or the one that holds it")
    parser.add_argument("--dataset", choices=list(FACTS), help="default: seen from what is there")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes; 0: this one")
    parser.add_argument("--limit", type=int, help="measure only the first N pictures of each list")
    parser.add_argument("--sheet", type=Path, help="contact sheet; default: verify_<dataset>.png in this folder")
    parser.add_argument("--frequencies", action="store_true", help="print the semseg classes' shares and nothing else")
    given = parser.parse_args()

    dataset, root = find_dataset(given.root, given.dataset)
    sheet = given.sheet or Path(f"verify_{dataset}.png")
    if sheet.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{sheet} lies in the dataset {root}; give a place outside, --sheet FILE.png.")
    result = verify(given.root, dataset, given.workers, given.limit)
    if given.frequencies:
        print(*(f"{share:.5f}" for share in result.shares), sep=", ")
        return
    print(format_report(result))
    try:
        write_sheet(sheet, result.parts, result.tasks, f"{FACTS[dataset].title}: {root.name}")
        print(f"contact sheet: {sheet}")
    except OSError as error:  # the checks are done, and count
        reason = error.strerror or error
        print(f"no contact sheet: {sheet} can't be written ({reason}); give another place, --sheet FILE.png")
    if result.damages:
        first = result.damages[0]
        told = first.details[0] if first.details else f"{first.check}: {first.found}, expected {first.expected}."
        count = f"{len(result.damages)} problem{'' if len(result.damages) == 1 else 's'}"
        raise UserError(f"{count} in {root}, the first: {told}")


if __name__ == "__main__":
    run(main)
