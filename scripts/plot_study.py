"""Draw the differences of a study as a forest plot, for a light and a dark page.

    python scripts/plot_study.py RESULTS --output FIGURE.png [--reference VARIANT] [--only VARIANT ...]
        [--title TEXT]

RESULTS is the folder that scripts/study.py --results has written, as those under docs/results/. Each variant has a
line, Delta and each task a plot: the mean change against the reference in percent, and its 95 % interval over pairs of
equal seeds. Two files are written: FIGURE.png, and FIGURE_dark.png for a page with a dark background.
"""

from pathlib import Path

from mtcl.cli.arguments import CommandParser
from mtcl.cli.script import run
from mtcl.errors import UserError
from mtcl.launch.study_plot import plot_study


def main() -> None:
    """Draw both figures and print their paths."""
    parser = CommandParser(__doc__)
    parser.add_argument("results", metavar="RESULTS", type=Path, help="the folder of study.py --results")
    parser.add_argument("--output", required=True, metavar="FIGURE.png", type=Path, help="of the light figure")
    parser.add_argument("--reference", metavar="VARIANT", help="default: the one that most are compared with")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="draw these only; default: all")
    parser.add_argument("--title", metavar="TEXT", help="default: the names of the study and of the reference")
    args = parser.parse_args()
    if args.output.suffix != ".png":
        raise UserError(f"--output {args.output}: the figure is a PNG, give a name that ends with .png")
    for path in plot_study(args.results, args.output, args.reference, args.only, args.title):
        print(path)


if __name__ == "__main__":
    run(main)
