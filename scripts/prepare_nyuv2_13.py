"""Convert NYU Depth v2's official files to the folder that data=nyuv2_13 reads, MTAN's layout.

python scripts/prepare_nyuv2_13.py --labeled nyu_depth_v2_labeled.mat --splits splits.mat --classes classMapping40.mat
    --out data/nyuv2 [--workers N]
"""

import os
from pathlib import Path

from mtcl.cli.arguments import CommandParser, non_negative_int
from mtcl.cli.prepared import format_prepared
from mtcl.cli.script import run
from mtcl.data.prepare.nyuv2_13 import prepare_nyuv2_13

OPTIONS = {
    "--labeled": "nyu_depth_v2_labeled.mat, the labelled dataset (2.8 GB)",
    "--splits": "splits.mat, the official training and test frames",
    "--classes": "classMapping40.mat, the 40 classes of the 894 labels",
    "--out": "the folder to write; a second run continues where the first was stopped",
}


def main() -> None:
    """Parse the command line, convert, and print a summary."""
    parser = CommandParser(__doc__)
    for option, help_text in OPTIONS.items():
        parser.add_argument(option, type=Path, metavar="PATH", required=True, help=help_text)
    parser.add_argument(
        "--workers",
        type=non_negative_int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes; 0: none besides this one (default: %(default)s, the machine's cores)",
    )
    print(format_prepared(prepare_nyuv2_13(**vars(parser.parse_args()))))


if __name__ == "__main__":
    run(main)
