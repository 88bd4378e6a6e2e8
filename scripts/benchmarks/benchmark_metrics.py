"""Time mtcl.metrics against the loops that published code scores with, on the same arrays in turns.

    python scripts/benchmarks/benchmark_metrics.py [--images 654] [--batch 4] [--run N] [--json OUT]

Both sides take raw predictions of NYUD-v2's whole test set (654 images of 425x560, 40 classes). Seconds are CPU time of
one thread, so that a busy machine does not count. One random batch is generated and scored again and again, so memory
stays small and disks do not matter; predictions are better than chance, labels have 15 % void. --run N scores N images
(default 32) and extrapolates to --images; --run 0 scores them all. Ours computes every number of mtcl.metrics, the
reference loops the one or two that they print:
  semseg, human_parts   channels last and max, then three masks and sums per class (as InvPT/evaluation/eval_semseg.py)
  depth                 masks and selections (as InvPT/evaluation/eval_depth.py): rmse and log_rmse
  normals               norms and arc tangent in float32 (as InvPT/evaluation/eval_normals.py): mErr
  sal                   per image and threshold (as SAK/evaluation/eval_sal.py): maxF and mIoU
Numbers that both compute are compared, so that neither side is fast by being wrong. Edges are not included: published
code scores them in MATLAB.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtcl.cli.arguments import CommandParser, non_negative_int, positive_int
from mtcl.cli.script import run
from mtcl.errors import UserError
from mtcl.tasks import build_metric

HEIGHT, WIDTH, VOID = 425, 560, 255
CLASSES = {"semseg": 40, "human_parts": 7, "sal": 2}
NYUD = ("semseg", "depth", "normals")
TASKS = (*NYUD, "human_parts", "sal")


class Row(NamedTuple):
    """Seconds per image and the scores of both sides."""

    ours: float
    reference: float
    scores: dict[str, float]
    reference_scores: dict[str, float]


def random_batch(task: str, batch: int) -> tuple[Tensor, Tensor]:
    """Generate the raw prediction and the label of a batch; 15 % of the pixels are void."""
    random = torch.Generator().manual_seed(0)
    void = torch.rand(batch, HEIGHT, WIDTH, generator=random) < 0.15
    if task in CLASSES:
        classes = CLASSES[task]
        label = torch.randint(0, classes, (batch, HEIGHT, WIDTH), generator=random)
        logits = torch.randn(batch, classes, HEIGHT, WIDTH, generator=random)
        logits.scatter_add_(1, label.unsqueeze(1), torch.full((batch, 1, HEIGHT, WIDTH), 2.5))
        return logits, label.masked_fill(void, VOID)
    channels = 1 if task == "depth" else 3
    noise = torch.randn(batch, channels, HEIGHT, WIDTH, generator=random)
    if task == "depth":
        metres = 0.7 + 9 * torch.rand(batch, 1, HEIGHT, WIDTH, generator=random)
        return metres + 0.5 * noise, metres.masked_fill(void.unsqueeze(1), 0)
    normals = F.normalize(torch.randn(batch, 3, HEIGHT, WIDTH, generator=random), dim=1)
    return normals + 0.3 * noise, normals.masked_fill(void.unsqueeze(1), 0)


class ClassLoop:
    """Segmentation: true and false positives and false negatives, class by class."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.tp, self.fp, self.fn = [0.0] * classes, [0.0] * classes, [0.0] * classes

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add a batch."""
        _, guess = torch.max(prediction.permute(0, 2, 3, 1), dim=3)
        valid = label != VOID
        for index in range(self.classes):
            target, predicted = label == index, guess == index
            self.tp[index] += torch.sum(target & predicted & valid).item()
            self.fp[index] += torch.sum(~target & predicted & valid).item()
            self.fn[index] += torch.sum(target & ~predicted & valid).item()

    def scores(self) -> dict[str, float]:
        """Return the scores of all batches."""
        iou = [tp / max(tp + fp + fn, 1e-8) for tp, fp, fn in zip(self.tp, self.fp, self.fn)]
        return {"mIoU": sum(iou) / len(iou)}


class DepthLoop:
    """Depth: squared errors of metres and of their logarithms over the selected pixels."""

    def __init__(self) -> None:
        self.squared, self.squared_log, self.pixels = 0.0, 0.0, 0

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add a batch."""
        prediction = prediction.clone()
        prediction[prediction <= 0] = 1e-9
        valid = label != 0
        self.pixels += int(valid.sum().item())
        depth, target = torch.masked_select(prediction, valid), torch.masked_select(label, valid)
        self.squared_log += torch.sum((torch.log(target) - torch.log(depth)) ** 2).item()
        self.squared += torch.sum((target - depth) ** 2).item()

    def scores(self) -> dict[str, float]:
        """Return the scores of all batches."""
        return {
            "rmse": math.sqrt(self.squared / self.pixels),
            "log_rmse": math.sqrt(self.squared_log / self.pixels),
        }


class NormalsLoop:
    """Surface normals: 2 atan2(|p - g|, |p + g|) of unit vectors over the selected pixels."""

    def __init__(self) -> None:
        self.degrees, self.pixels = 0.0, 0

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add a batch."""
        valid = (label != 0).any(dim=1)
        normal, target = F.normalize(prediction, p=2, dim=1), F.normalize(label, p=2, dim=1)
        angle = 2 * torch.atan2(torch.norm(normal - target, dim=1), torch.norm(normal + target, dim=1))
        angle = torch.rad2deg(torch.masked_select(angle, valid))
        self.degrees += torch.sum(angle).item()
        self.pixels += angle.numel()

    def scores(self) -> dict[str, float]:
        """Return the scores of all batches."""
        return {"mErr": self.degrees / self.pixels}


class SaliencyLoop:
    """Saliency: image by image and threshold by threshold."""

    def __init__(self) -> None:
        self.thresholds = [k / 20 for k in range(1, 20)]
        self.tp, self.predicted, self.positives = ([0.0] * 19 for _ in range(3))
        self.iou: list[list[float]] = []

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add a batch."""
        probability = torch.softmax(prediction, dim=1)[:, 1]
        for image, target in zip(probability, label):
            valid = target != VOID
            iou = []
            for index, threshold in enumerate(self.thresholds):
                predicted = torch.masked_select((image >= threshold).long(), valid)
                positive = torch.masked_select(target, valid)
                self.tp[index] += torch.sum(predicted * positive).item()
                self.predicted[index] += torch.sum(predicted).item()
                self.positives[index] += torch.sum(positive).item()
                iou.append(torch.sum(predicted & positive).item() / torch.sum(predicted | positive).item())
            self.iou.append(iou)

    def scores(self) -> dict[str, float]:
        """Return the scores of all batches."""
        counts = zip(self.tp, self.predicted, self.positives)
        f = [1.3 * tp / (0.3 * positives + predicted) for tp, predicted, positives in counts]
        return {"maxF": max(f), "mIoU": max(sum(column) / len(self.iou) for column in zip(*self.iou))}


def build_loop(task: str) -> ClassLoop | DepthLoop | NormalsLoop | SaliencyLoop:
    """Return the reference loop of a task."""
    if task == "sal":
        return SaliencyLoop()
    if task in CLASSES:
        return ClassLoop(CLASSES[task])
    return DepthLoop() if task == "depth" else NormalsLoop()


def measure_time(work: Callable[[], object]) -> float:
    """Return the CPU seconds of this thread that ``work()`` takes."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def measure(task: str, num_images: int, batch: int) -> Row:
    """Time both sides in turns, batch by batch, after one batch to warm up that is not timed."""
    prediction, label = random_batch(task, batch)
    options = {"num_classes": CLASSES[task]} if task in CLASSES and task != "sal" else {}
    metric, loop = build_metric(task, **options), build_loop(task)
    metric.update(prediction, label)
    loop.update(prediction, label)
    ours = reference = 0.0
    rounds = -(-num_images // batch)
    for _ in range(rounds):
        ours += measure_time(lambda: metric.update(prediction, label))
        reference += measure_time(lambda: loop.update(prediction, label))
    scores = {name: float(value) for name, value in metric.compute().items()}
    return Row(ours / rounds / batch, reference / rounds / batch, scores, loop.scores())


def find_disagreements(row: Row) -> list[str]:
    """Return the names of scores that differ by more than the float32 of the loops explains."""
    return [
        name for name, value in row.reference_scores.items() if not math.isclose(value, row.scores[name], rel_tol=1e-4)
    ]


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(__doc__)
    parser.add_argument("--images", type=positive_int, default=654, help="images that the printed seconds are for")
    parser.add_argument("--run", type=non_negative_int, default=32, help="how many of them to score; 0: all")
    parser.add_argument("--batch", type=positive_int, default=4, help="images per update")
    parser.add_argument("--json", type=Path, help="also write the seconds per image to this file")
    return parser.parse_args()


def main() -> None:
    """Print a table of seconds, and write it as JSON if asked."""
    args = parse_args()
    torch.set_num_threads(1)
    num_images = min(args.run or args.images, args.images)
    rows = {}
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    scope = "all scored" if num_images == args.images else f"{num_images} scored, the rest extrapolated"
    print(f"{args.images} images of {HEIGHT}x{WIDTH}, batches of {args.batch}; {scope}")
    print(f"{'':24}{'ours s':>9}{'reference s':>13}{'ratio':>8}")
    for task in TASKS:
        rows[task] = measure(task, num_images, args.batch)
        disagreeing = find_disagreements(rows[task])
        if disagreeing:
            raise UserError(f"{task}: {', '.join(disagreeing)} of the two sides differ, so their times mean nothing.")
        show(task, args.images, rows[task].ours, rows[task].reference)
    for name, tasks in (("NYUD-v2, these three", NYUD), ("all five", TASKS)):
        show(name, args.images, sum(rows[t].ours for t in tasks), sum(rows[t].reference for t in tasks))
    if args.json:
        seconds = {task: {"ours": row.ours, "reference": row.reference} for task, row in rows.items()}
        args.json.write_text(json.dumps(seconds, indent=2) + "\n", "utf-8")


def show(name: str, images: int, ours: float, reference: float) -> None:
    """Print a row of the table."""
    print(f"{name:24}{ours * images:9.2f}{reference * images:13.2f}{reference / ours:7.1f}x", flush=True)


if __name__ == "__main__":
    run(main)
