"""Convert NYU Depth v2's official files to the folder that data=nyuv2_13 reads, MTAN's layout.

python scripts/prepare_nyuv2_13.py --labeled nyu_depth_v2_labeled.mat --splits splits.mat --classes classMapping40.mat
    --out data/nyuv2 [--workers N]
"""

from mtcl.cli.arguments import CommandParser
from mtcl.cli.prepared import add_nyud_options, format_prepared
from mtcl.cli.script import run
from mtcl.data.prepare.nyuv2_13 import prepare_nyuv2_13


def main() -> None:
    """Parse the command line, convert, and print a summary."""
    parser = CommandParser(__doc__)
    add_nyud_options(parser)
    print(format_prepared(prepare_nyuv2_13(**vars(parser.parse_args()))))


if __name__ == "__main__":
    run(main)
