"""Compute the boundary F-measure of saved edge maps without MATLAB: odsF, oisF, ap.

python scripts/benchmarks/evaluate_edges.py --pred DIR --gt DIR --max-dist 0.011 [--thresholds 99]
    [--nms [sak|invpt|none]] [--preset bsds|default|sak|invpt] [--workers N] --json OUT

Predictions are 8-bit PNG of one channel (value / 255), ground truths PNG (every nonzero pixel) or .mat
(groundTruth{k}.Boundaries, one or several annotators) of the same names. Without a preset: the official benchmark of
BSDS500. --nms and --thresholds replace the preset's. --max-dist is a fraction of the diagonal: NYUD 0.011, PASCAL
0.0075.
"""

import argparse
import functools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import scipy.io

from mtcl import UserError
from mtcl.atomic import write_atomically
from mtcl.cli.arguments import CommandParser, non_negative_int, positive_int
from mtcl.cli.script import run
from mtcl.data.image_io import read_label_image
from mtcl.data.worker_pool import run_jobs
from mtcl.metrics.boundaries import NMS, PRESETS, Preset, best_image_counts, compute_scores, get_preset


def find_pairs(predictions: Path, truths: Path) -> list[tuple[Path, Path]]:
    """Pair the files of the two folders by their names, in order.

    Raises:
        UserError: a folder has no files, or a name is in one folder only.
    """
    files_by_name: list[dict[str, Path]] = []
    for folder, suffixes in ((predictions, (".png",)), (truths, (".png", ".mat"))):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give the folder of the maps.")
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
        if not files:
            raise UserError(f"{folder} has no {' or '.join(suffixes)} files; give the folder of the maps.")
        names = {p.stem: p for p in files}
        if len(names) < len(files):
            double = next(p for p in files if names[p.stem] != p)
            raise UserError(f"{folder} has both {double.name} and {names[double.stem].name}; keep one of them.")
        files_by_name.append(names)
    predicted, true = files_by_name
    for kind, lacking, folder in (
        ("no prediction", true.keys() - predicted.keys(), predictions),
        ("no ground truth", predicted.keys() - true.keys(), truths),
    ):
        if lacking:
            first = ", ".join(sorted(lacking)[:3]) + (", ..." if len(lacking) > 3 else "")
            raise UserError(f"{folder} has {kind} of {len(lacking)} maps ({first}); both folders need the same names.")
    return [(predicted[name], true[name]) for name in sorted(predicted)]


def read_truths(path: Path) -> list[np.ndarray]:
    """Read the label (H, W) of each annotator."""
    if path.suffix.lower() == ".png":
        return [read_label_image(path)]
    try:
        cell = scipy.io.loadmat(path, variable_names=["groundTruth"])["groundTruth"]
        truths = [np.asarray(entry["Boundaries"][0, 0]) for entry in cell.ravel()]
    except (KeyError, ValueError, IndexError, TypeError, NotImplementedError, OSError) as error:
        raise UserError(
            f"{path} holds no groundTruth{{k}}.Boundaries that can be read; save it again with -v7."
        ) from error
    if not truths:
        raise UserError(f"{path} holds no annotator; drop it and its prediction.")
    return truths


def count_matches(pair: tuple[Path, Path], preset: Preset, max_distance: float) -> np.ndarray:
    """Count the matches of one image at every threshold: int64 (K, 4).

    Raises:
        UserError: a file is no 8-bit map of one channel, or the sizes differ.
    """
    prediction, truths = read_label_image(pair[0]), read_truths(pair[1])
    for truth in truths:
        if truth.shape != prediction.shape:
            sizes = ["x".join(map(str, a.shape)) for a in (prediction, truth)]
            raise UserError(
                f"{pair[0]} is {sizes[0]} but {pair[1]} is {sizes[1]} (height x width); save it at that size."
            )
    return preset.counts(prediction, truths, max_distance)


def parse_args() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = CommandParser(__doc__)
    parser.add_argument("--pred", type=Path, required=True, help="folder of the predicted maps, PNG")
    parser.add_argument("--gt", type=Path, required=True, help="folder of the ground truth, PNG or .mat")
    parser.add_argument("--max-dist", type=float, required=True, help="of the diagonal: NYUD 0.011, PASCAL 0.0075")
    parser.add_argument(
        "--thresholds", type=positive_int, help="even thresholds k/(N+1); default: the preset's, mostly 99"
    )
    parser.add_argument(
        "--nms",
        nargs="?",
        const="sak",
        choices=list(NMS),
        help="non-maximum suppression (without a name: sak); default: the preset's, which is none for bsds",
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="bsds", help="toolchain; default: %(default)s")
    parser.add_argument(
        "--workers", type=non_negative_int, default=min(os.cpu_count() or 1, 8), help="processes; 0: this one"
    )
    parser.add_argument("--json", type=Path, required=True, help="file for the scores, in 0..1")
    args = parser.parse_args()
    if not 0 < args.max_dist < 1:
        raise UserError(f"--max-dist {args.max_dist} is not a fraction of the diagonal in 0..1; NYUD takes 0.011.")
    return args


def main() -> None:
    """Score the maps, print the scores and write them as JSON."""
    args = parse_args()
    preset = get_preset(args.preset, args.thresholds)
    if args.nms is not None:
        preset = replace(preset, suppression=NMS[args.nms], rounded=args.nms == "sak")
    pairs = find_pairs(args.pred, args.gt)
    work = functools.partial(count_matches, preset=preset, max_distance=args.max_dist)
    counts = run_jobs(work, pairs, min(args.workers, len(pairs)), "edges")
    best = np.sum([best_image_counts(c) for c in counts], axis=0)
    result = compute_scores(np.sum(counts, axis=0), best, np.array(preset.thresholds), preset.interpolate)._asdict()
    values = {name: None if np.isnan(value) else value for name, value in result.items()}
    write_atomically(args.json, lambda path: path.write_text(json.dumps(values, indent=2) + "\n", "utf-8"))
    print(f"{len(pairs)} images, preset {args.preset}, {len(preset.thresholds)} thresholds, max-dist {args.max_dist}")
    for name, value in result.items():
        print(f"{name:>10}  {value:.4f}")


if __name__ == "__main__":
    run(main)
