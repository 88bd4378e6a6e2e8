"""Print what the labels of each task say about those of the others, for any dataset, without a model.

    python scripts/label_agreement.py [--images 200] [--pixels 256] [--seed 0] [--subset train|val]
        [group=choice ...] [key=value ...]

For every target and source: the share of triplets by the source's labels whose order is right in the target's labels
(0.5: no information), then in brackets the same by the source's labels of another image at the same positions (the
layout that images share), and last by mere distance in the image. Then the differences to the shares in brackets, as
weights of the sources for train.py. Overrides are those of train.py, e.g. data=nyud_small data.root=PATH
data.split=tune.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mtcl import UserError
from mtcl.cli.arguments import CommandParser, non_negative_int, positive_int
from mtcl.cli.consistency import take_evenly_spaced
from mtcl.cli.script import run
from mtcl.config.build_data import build_dataset, build_eval_loader, build_tasks
from mtcl.config.build_training import choose_label_thresholds
from mtcl.config.compose import compose_config
from mtcl.regularizers.label_agreement import Agreement, measure_agreement


def main() -> None:
    """Parse the command line, measure and print the table."""
    parser = CommandParser(__doc__)
    parser.add_argument("--images", type=positive_int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument("--pixels", type=positive_int, default=256, metavar="K", help="per image; default: %(default)s")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the pixels; default: %(default)s")
    parser.add_argument("--subset", choices=["train", "val"], default="train", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config of train.py")
    args = parser.parse_intermixed_args()
    config = compose_config(args.overrides, Path(__file__).resolve().parents[1] / "configs")
    tasks = build_tasks(config)
    if len(tasks) < 2:
        raise UserError("one task has no other to agree with; give tasks= at least two")
    dataset = build_dataset(config, args.subset, tasks)
    dataset = take_evenly_spaced(dataset, args.images)
    loader = build_eval_loader(config, dataset, tasks, torch.device("cpu"))
    batches = (([sample.id for sample in batch["meta"]], batch["labels"]) for batch in loader)
    agreement = measure_agreement(batches, tasks, choose_label_thresholds(config, tasks), args.pixels, args.seed)
    print(
        f"{len(dataset.ids)} images of {args.subset}, {args.pixels} pixels each; by another image's labels in brackets"
    )
    print(*format_table(list(tasks), agreement), sep="\n")
    print(*format_overrides(list(tasks), agreement), sep="\n")


def format_table(names: list[str], agreement: Agreement) -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"{'target<-source':<16}" + "".join(f"{name:>14}" for name in names) + f"{'distance':>12}"
    for name, source, other, distance in zip(names, *agreement):
        cells = [f"{format_share(a)} ({format_share(b)})" for a, b in zip(source, other)]
        yield f"{name:<16}" + "".join(f"{cell:>14}" for cell in cells) + f"{format_share(distance):>12}"


def format_overrides(names: list[str], agreement: Agreement) -> Iterator[str]:
    """Yield the overrides that give sources the weights of their information, or a sentence why there are none."""
    weights = {
        target: {
            source: round(value, 3)
            for source, value in zip(names, row)
            if source != target and round(value, 3) > 0  # not NaN
        }
        for target, row in zip(names, agreement.information.tolist())
    }
    weights = {target: row for target, row in weights.items() if row}
    if not weights:
        yield "no weights of sources: no image has labels of two tasks that say more about each other than the layout"
        return
    rows = (
        f"{target}:{{{','.join(f'{source}:{x:.3f}' for source, x in row.items())}}}" for target, row in weights.items()
    )
    yield "regularizer=contrastive"
    yield shlex.quote(f"regularizer.options.source_weights={{{','.join(rows)}}}")
    if len(weights) < len(names):
        yield shlex.quote(f"regularizer.options.targets=[{','.join(weights)}]")


def format_share(share: Tensor) -> str:
    """Format a share with three decimals, a dash where nothing was measured."""
    return "-" if share.isnan() else f"{share.item():.3f}"


if __name__ == "__main__":
    run(main)
