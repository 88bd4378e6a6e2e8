"""How fast predictions are scored: this code against the loops the field scores with, on the same arrays in turns.

python scripts/benchmarks/benchmark_metrics.py [--images 654] [--batch 4] [--run N] [--json OUT]

Raw predictions of NYUD-v2's whole test set (654 pictures of 425x560, 40 classes) go in on both sides. Seconds are of
one core, the thread's own CPU time, so that a busy machine does not count. One random batch is made up and scored
again and again, so memory stays small and disks do not matter; predictions are better than chance, labels have 15 %
void. --run N scores N pictures (default 32) and extrapolates to --images; --run 0 scores them all. Ours gives every
number of mtcl.metrics, the field's loops the one or two that they print:
  semseg, human_parts   channels last and max, then three masks and sums per class (as InvPT/evaluation/eval_semseg.py)
  depth                 masks and selections (as InvPT/evaluation/eval_depth.py): rmse and log_rmse
  normals               norms and arc tangent in float32 (as InvPT/evaluation/eval_normals.py): mErr
  sal                   per picture and threshold (as SAK/evaluation/eval_sal.py): maxF and mIoU
Numbers that both give are compared, so that neither side is fast by being wrong. Edges are not here: the field scores
them in MATLAB.
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

from mtcl.cli.script import run
from mtcl.errors import UserError
from mtcl.tasks import build_metric

HEIGHT, WIDTH, VOID = 425, 560, 255
CLASSES = {"semseg": 40, "human_parts": 7, "sal": 2}
NYUD = ("semseg", "depth", "normals")
TASKS = (*NYUD, "human_parts", "sal")


class Row(NamedTuple):
    """Seconds per picture, and the numbers that came out."""

    ours: float
    field: float
    scores: dict[str, float]
    scores_of_field: dict[str, float]


def made_up(task: str, batch: int) -> tuple[Tensor, Tensor]:
    """Raw prediction and label of a batch as the loader gives them; 15 % of the pixels are void."""
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
    """True and false positives and false negatives, class by class."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.tp, self.fp, self.fn = [0.0] * classes, [0.0] * classes, [0.0] * classes

    def update(self, prediction: Tensor, label: Tensor) -> None:
        _, guess = torch.max(prediction.permute(0, 2, 3, 1), dim=3)
        valid = label != VOID
        for index in range(self.classes):
            there, found = label == index, guess == index
            self.tp[index] += torch.sum(there & found & valid).item()
            self.fp[index] += torch.sum(~there & found & valid).item()
            self.fn[index] += torch.sum(there & ~found & valid).item()

    def scores(self) -> dict[str, float]:
        iou = [tp / max(tp + fp + fn, 1e-8) for tp, fp, fn in zip(self.tp, self.fp, self.fn)]
        return {"mIoU": sum(iou) / len(iou)}


class DepthLoop:
    """Squared errors of metres and of their logarithms over the selected pixels."""

    def __init__(self) -> None:
        self.squared, self.squared_log, self.pixels = 0.0, 0.0, 0

    def update(self, prediction: Tensor, label: Tensor) -> None:
        prediction = prediction.clone()
        prediction[prediction <= 0] = 1e-9
        valid = label != 0
        self.pixels += int(valid.sum().item())
        found, there = torch.masked_select(prediction, valid), torch.masked_select(label, valid)
        self.squared_log += torch.sum((torch.log(there) - torch.log(found)) ** 2).item()
        self.squared += torch.sum((there - found) ** 2).item()

    def scores(self) -> dict[str, float]:
        return {
            "rmse": math.sqrt(self.squared / self.pixels),
            "log_rmse": math.sqrt(self.squared_log / self.pixels),
        }


class NormalsLoop:
    """2 atan2(|p - g|, |p + g|) of unit vectors over the selected pixels."""

    def __init__(self) -> None:
        self.degrees, self.pixels = 0.0, 0

    def update(self, prediction: Tensor, label: Tensor) -> None:
        valid = (label != 0).any(dim=1)
        found, there = F.normalize(prediction, p=2, dim=1), F.normalize(label, p=2, dim=1)
        angle = 2 * torch.atan2(torch.norm(found - there, dim=1), torch.norm(found + there, dim=1))
        angle = torch.rad2deg(torch.masked_select(angle, valid))
        self.degrees += torch.sum(angle).item()
        self.pixels += angle.numel()

    def scores(self) -> dict[str, float]:
        return {"mErr": self.degrees / self.pixels}


class SaliencyLoop:
    """Picture by picture and threshold by threshold."""

    def __init__(self) -> None:
        self.thresholds = [k / 20 for k in range(1, 20)]
        self.tp, self.predicted, self.positives = ([0.0] * 19 for _ in range(3))
        self.iou: list[list[float]] = []

    def update(self, prediction: Tensor, label: Tensor) -> None:
        probability = torch.softmax(prediction, dim=1)[:, 1]
        for one, target in zip(probability, label):
            valid = target != VOID
            iou = []
            for index, threshold in enumerate(self.thresholds):
                found = torch.masked_select((one >= threshold).long(), valid)
                there = torch.masked_select(target, valid)
                self.tp[index] += torch.sum(found * there).item()
                self.predicted[index] += torch.sum(found).item()
                self.positives[index] += torch.sum(there).item()
                iou.append(torch.sum(found & there).item() / torch.sum(found | there).item())
            self.iou.append(iou)

    def scores(self) -> dict[str, float]:
        f = [1.3 * tp / (0.3 * there + found) for tp, found, there in zip(self.tp, self.predicted, self.positives)]
        return {"maxF": max(f), "mIoU": max(sum(column) / len(self.iou) for column in zip(*self.iou))}


def loop(task: str) -> ClassLoop | DepthLoop | NormalsLoop | SaliencyLoop:
    if task == "sal":
        return SaliencyLoop()
    if task in CLASSES:
        return ClassLoop(CLASSES[task])
    return DepthLoop() if task == "depth" else NormalsLoop()


def timed(work: Callable[[], object]) -> float:
    """CPU seconds of this thread."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def measured(task: str, pictures: int, batch: int) -> Row:
    """Both sides in turns, batch by batch, after one batch to warm up that is not timed."""
    prediction, label = made_up(task, batch)
    options = {"num_classes": CLASSES[task]} if task in CLASSES and task != "sal" else {}
    metric, field = build_metric(task, **options), loop(task)
    metric.update(prediction, label)
    field.update(prediction, label)
    ours = theirs = 0.0
    rounds = -(-pictures // batch)
    for _ in range(rounds):
        ours += timed(lambda: metric.update(prediction, label))
        theirs += timed(lambda: field.update(prediction, label))
    scores = {name: float(value) for name, value in metric.compute().items()}
    return Row(ours / rounds / batch, theirs / rounds / batch, scores, field.scores())


def different(row: Row) -> list[str]:
    """The numbers of both sides that disagree by more than the field's float32 explains."""
    return [
        name for name, value in row.scores_of_field.items() if not math.isclose(value, row.scores[name], rel_tol=1e-4)
    ]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=654, help="pictures that the printed seconds are for")
    parser.add_argument("--run", type=int, default=32, help="how many of them to score; 0: all")
    parser.add_argument("--batch", type=int, default=4, help="pictures per update")
    parser.add_argument("--json", type=Path, help="write the seconds per picture there, too")
    return parser.parse_args()


def main() -> None:
    words = parsed()
    if min(words.images, words.batch) < 1 or words.run < 0:
        raise UserError("--images and --batch are to be at least 1, --run at least 0.")
    torch.set_num_threads(1)
    pictures = min(words.run or words.images, words.images)
    rows = {}
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    told = "all scored" if pictures == words.images else f"{pictures} scored, the rest extrapolated"
    print(f"{words.images} pictures of {HEIGHT}x{WIDTH}, batches of {words.batch}; {told}")
    print(f"{'':24}{'ours s':>9}{'field s':>9}{'ratio':>8}")
    for task in TASKS:
        rows[task] = measured(task, pictures, words.batch)
        wrong = different(rows[task])
        if wrong:
            raise UserError(f"{task}: {', '.join(wrong)} of the two sides differ, so their times mean nothing.")
        show(task, words.images, rows[task].ours, rows[task].field)
    for name, tasks in (("NYUD-v2, these three", NYUD), ("all five", TASKS)):
        show(name, words.images, sum(rows[t].ours for t in tasks), sum(rows[t].field for t in tasks))
    if words.json:
        found = {task: {"ours": row.ours, "field": row.field} for task, row in rows.items()}
        words.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


def show(name: str, images: int, ours: float, field: float) -> None:
    print(f"{name:24}{ours * images:9.2f}{field * images:9.2f}{field / ours:7.1f}x", flush=True)


if __name__ == "__main__":
    run(main)
