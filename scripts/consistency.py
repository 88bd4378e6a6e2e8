"""Draw the consistency figure (Fig. 1 of the paper): do features separate what each task's labels separate?

    python scripts/consistency.py RUN/checkpoints/last.pt [--compare OTHER/checkpoints/last.pt]
        [--target semseg|...|all] [--frames 64] [--output FOLDER] [key=value ...]

On evenly spaced validation frames, all pairs of 256 pixels a frame are positive or negative by each task's labels, as
in the regulariser, and their distances are measured between the raw features that the regulariser uses, between the
same without their mean, and between projected ones. Written into FOLDER (outputs/consistency/TIME):

consistency_TARGET.png  the distributions of distances anchor-positive and anchor-negative, by each task's labels
separation.png          for each target and each task's labels the chance that a negative is farther than a positive;
                        with --compare, e.g. the run without contrast, of both, and the difference
consistency.json        all numbers

Everything is rebuilt from the checkpoint; the other arguments override its config as with evaluate.py, e.g.
data.root=PATH.
"""

import sys
import time
from pathlib import Path

from mtcl.cli.consistency import measure_consistency, parse_args
from mtcl.cli.script import run


def main() -> None:
    """Parse the command line, measure, and report where the files are."""
    options, overrides = parse_args(sys.argv[1:], __doc__, time.strftime("%Y-%m-%d_%H-%M-%S"))
    content = measure_consistency(options, overrides, Path(__file__).resolve().parents[1] / "configs")
    for variant in content["arms"]:
        if not variant["projected"]:
            print(f"{variant['checkpoint']} ({variant['name']}) has no trained projectors: raw features only")
    print(f"the figures and consistency.json are in {options.output}")


if __name__ == "__main__":
    run(main)
