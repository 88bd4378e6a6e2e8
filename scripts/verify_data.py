"""Check a dataset folder in full: lists, files, sizes, values, and whether labels lie on their images.

python scripts/verify_data.py ROOT [--dataset NAME] [--workers N] [--limit N] [--sheet FILE.png]

NAME: nyud, nyud_small, pascal, nyuv2_13, cityscapes_mtl.

Prints a table and writes a contact sheet. Exits with 1 if anything is damaged; deviations from the official data are
listed and are not errors. --frequencies prints the classes' pixel shares in the training list instead.
"""

import os
from pathlib import Path

from mtcl import UserError
from mtcl.cli.arguments import CommandParser, non_negative_int, positive_int
from mtcl.cli.script import run
from mtcl.data.verify import FACTS, find_dataset, format_report, verify, write_sheet


def main() -> None:
    """Parse the command line, check the folder, print the table and write the contact sheet."""
    parser = CommandParser(__doc__)
    parser.add_argument("root", type=Path, help="folder of the dataset, or its parent")
    parser.add_argument("--dataset", choices=list(FACTS), help="default: recognised by its files")
    parser.add_argument(
        "--workers", type=non_negative_int, default=min(os.cpu_count() or 1, 8), help="processes; 0: no others"
    )
    parser.add_argument("--limit", type=positive_int, help="measure only the first N images of each list")
    parser.add_argument("--sheet", type=Path, help="contact sheet; default: verify_<dataset>.png in this folder")
    parser.add_argument("--frequencies", action="store_true", help="print only the semseg classes' shares")
    args = parser.parse_args()

    name, root = find_dataset(args.root, args.dataset)
    sheet = args.sheet or Path(f"verify_{name}.png")
    if sheet.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{sheet} lies in the dataset {root}; choose a file outside with --sheet FILE.png.")
    result = verify(args.root, name, args.workers, args.limit)
    if args.frequencies:
        print(*(f"{share:.5f}" for share in result.shares), sep=", ")
        return
    print(format_report(result))
    try:
        write_sheet(sheet, result.lists, result.tasks, f"{FACTS[name].title}: {root.name}")
        print(f"contact sheet: {sheet}")
    except OSError as error:  # the results of the checks still count
        reason = error.strerror or error
        print(f"no contact sheet: {sheet} can't be written ({reason}); choose another file with --sheet FILE.png")
    if result.damages:
        first = result.damages[0]
        detail = first.details[0] if first.details else f"{first.check}: {first.value}, expected {first.expected}."
        count = f"{len(result.damages)} problem{'' if len(result.damages) == 1 else 's'}"
        raise UserError(f"{count} in {root}, the first: {detail}")


if __name__ == "__main__":
    run(main)
