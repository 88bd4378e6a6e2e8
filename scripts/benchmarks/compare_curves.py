"""Compare the loss curves of two variants, seed by seed, with the distance between seeds.

    python scripts/benchmarks/compare_curves.py VARIANT VARIANT [--first-step STEP]

VARIANT is a folder of runs (seed_0, seed_1, ...; as scripts/study.py writes them), with the same seeds in both. Per
loss, over all logged steps: ``distance`` is the mean over steps of the distance between the variants' means over seeds;
``std`` the first variant's standard deviation over seeds, mean over steps; ``expected`` the distance that two variants
of so many seeds would have by chance alone: std * sqrt(2 / n) * sqrt(2 / pi), for independent normal draws. Equal
variants with equal seeds share images and random draws, so that ``distance`` is then rather below ``expected``.
"""

import math
from pathlib import Path

import numpy as np

from mtcl.cli.arguments import CommandParser
from mtcl.cli.script import run
from mtcl.errors import UserError
from mtcl.run_folder import LOG
from mtcl.run_log import read_lines


def read_curves(variant: Path, first_step: int) -> dict[str, dict[str, dict[int, float]]]:
    """Read the losses of a variant's runs as loss -> run -> step -> value."""
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for path in sorted(variant.glob(f"*/{LOG}")):
        for record in (line.record for line in read_lines(path) if line.record is not None):
            if record["kind"] == "train" and record["step"] >= first_step:
                for name, value in record.items():
                    if name not in ("step", "kind", "lr") and value is not None:
                        curves.setdefault(name, {}).setdefault(path.parent.name, {})[record["step"]] = value
    if not curves:
        raise UserError(f"{variant} has no run with losses in a {LOG}; give a folder of runs")
    return curves


def main() -> None:
    """Print a line per loss."""
    parser = CommandParser(__doc__)
    parser.add_argument("variants", nargs=2, type=Path, metavar="VARIANT")
    parser.add_argument("--first-step", type=int, default=0, metavar="STEP", help="leave out earlier steps")
    args = parser.parse_args()
    one, two = (read_curves(variant, args.first_step) for variant in args.variants)
    print("loss         steps  seeds   last mean, both  distance     std   expected  distance/expected")
    for name in (name for name in one if name in two):
        if one[name].keys() != two[name].keys():
            raise UserError(f"the variants have different runs: {', '.join(one[name])} and {', '.join(two[name])}")
        all_curves = [*one[name].values(), *two[name].values()]
        steps = sorted(set(all_curves[0]).intersection(*all_curves[1:]))
        a, b = (np.array([[curve[s] for s in steps] for curve in variant[name].values()]) for variant in (one, two))
        if len(a) < 2 or not steps:
            raise UserError(f"{name}: {len(a)} runs with {len(steps)} steps in common; at least two seeds are needed")
        distance, std = np.abs(a.mean(0) - b.mean(0)).mean(), a.std(0, ddof=1).mean()
        expected = std * math.sqrt(2 / len(a)) * math.sqrt(2 / math.pi)
        print(f"{name:11} {len(steps):6} {len(a):6}   {a[:, -1].mean():7.4f} {b[:, -1].mean():7.4f}  "
              f"{distance:8.4f}  {std:6.4f}    {expected:6.4f}  {distance / expected:17.2f}")  # fmt: skip


if __name__ == "__main__":
    run(main)
