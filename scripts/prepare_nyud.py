"""Convert NYU Depth v2's official files to the folder that data=nyud reads, or with --size that of data=nyud_small.

python scripts/prepare_nyud.py --labeled nyu_depth_v2_labeled.mat --splits splits.mat --classes classMapping40.mat
    --out data/NYUDv2 [--size WIDTHxHEIGHT] [--workers N]
"""

from mtcl.cli.arguments import CommandParser
from mtcl.cli.prepared import add_nyud_options, format_prepared
from mtcl.cli.script import run
from mtcl.data.prepare.nyud import prepare_nyud


def main() -> None:
    """Parse the command line, convert, and print a summary."""
    parser = CommandParser(__doc__)
    add_nyud_options(parser)
    parser.add_argument(
        "--size", metavar="WIDTHxHEIGHT", help="of a small edition, 4:3, e.g. 256x192 (default: the standard 560x425)"
    )
    print(format_prepared(prepare_nyud(**vars(parser.parse_args()))))


if __name__ == "__main__":
    run(main)
