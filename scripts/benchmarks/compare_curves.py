"""Do two ways of training learn alike? Their loss curves, seed by seed, against how far seeds lie apart.

    python scripts/benchmarks/compare_curves.py ARM ARM [--first STEP]

ARM is a folder of runs (seed_0, seed_1, ...; as scripts/study.py leaves them), with the same seeds in both. Per loss,
over all steps logged: ``apart``, the mean over steps of the distance between the arms' means over seeds; ``seeds``, the
first arm's standard deviation over seeds, mean over steps; ``expected``, the distance that two arms of so many
seeds would have by chance alone: seeds * sqrt(2 / n) * sqrt(2 / pi), as of independent normal draws. Equal arms of
equal seeds share pictures and draws, so ``apart`` is then rather below ``expected``.
"""

import argparse
import math
from pathlib import Path

import numpy as np

from mtcl.cli.script import run
from mtcl.errors import UserError
from mtcl.run_log import read_lines


def curves(arm: Path, first: int) -> dict[str, dict[str, dict[int, float]]]:
    """loss -> run -> step -> value."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for path in sorted(arm.glob("*/log.jsonl")):
        for record in (line.record for line in read_lines(path) if line.record is not None):
            if record["kind"] == "train" and record["step"] >= first:
                for name, value in record.items():
                    if name not in ("step", "kind", "lr") and value is not None:
                        found.setdefault(name, {}).setdefault(path.parent.name, {})[record["step"]] = value
    if not found:
        raise UserError(f"{arm} has no run with losses in a log.jsonl; give a folder of runs")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs=2, type=Path, metavar="ARM")
    parser.add_argument("--first", type=int, default=0, metavar="STEP", help="leave out the steps before it")
    given = parser.parse_args()
    one, two = (curves(arm, given.first) for arm in given.arms)
    print("loss       steps  seeds   last mean, both   apart   seeds   expected  apart/expected")
    for name in (name for name in one if name in two):
        if one[name].keys() != two[name].keys():
            raise UserError(f"the arms have other runs: {', '.join(one[name])} and {', '.join(two[name])}")
        both = [*one[name].values(), *two[name].values()]
        steps = sorted(set(both[0]).intersection(*both[1:]))
        a, b = (np.array([[run[s] for s in steps] for run in arm[name].values()]) for arm in (one, two))
        if len(a) < 2 or not steps:
            raise UserError(f"{name}: {len(a)} runs with {len(steps)} steps in common; two seeds at least are needed")
        apart, seeds = np.abs(a.mean(0) - b.mean(0)).mean(), a.std(0, ddof=1).mean()
        expected = seeds * math.sqrt(2 / len(a)) * math.sqrt(2 / math.pi)
        print(f"{name:9} {len(steps):6} {len(a):6}   {a[:, -1].mean():7.4f} {b[:, -1].mean():7.4f}  "
              f"{apart:6.4f}  {seeds:6.4f}    {expected:6.4f}  {apart / expected:14.2f}")  # fmt: skip


if __name__ == "__main__":
    run(main)
