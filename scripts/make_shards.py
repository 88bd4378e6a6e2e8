"""Write the training images of a dataset into tar files (shards) with an index, for data.shards.

python scripts/make_shards.py --out FOLDER --shards N [--seed 0] [--workers N] [group=choice ...] [key=value ...]

Overrides are those of train.py, e.g. data=nyud data.root=PATH. A second run continues where the first was stopped.
"""

import shlex
from pathlib import Path

from mtcl.cli.arguments import CommandParser, add_workers_option, non_negative_int, output_path, positive_int
from mtcl.cli.script import run
from mtcl.config.build_data import build_labeled_dataset, build_tasks, describe_samples
from mtcl.config.compose import compose_config
from mtcl.data.shards.write import write_shards
from mtcl.errors import UserError


def main() -> None:
    """Parse the command line, write the shards and print how large they are."""
    parser = CommandParser(__doc__)
    parser.add_argument("--out", type=output_path, required=True, metavar="FOLDER", help="the folder to write")
    parser.add_argument(
        "--shards",
        type=positive_int,
        required=True,
        metavar="N",
        help="number of tar files, best a multiple of GPUs x data.workers",
    )
    parser.add_argument(
        "--seed", type=non_negative_int, default=0, metavar="N", help="of what goes into which; default: %(default)s"
    )
    add_workers_option(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config of train.py")
    args = parser.parse_intermixed_args()
    config = compose_config(args.overrides, Path(__file__).resolve().parents[1] / "configs")
    if config.data.shards is not None:
        raise UserError(f"data.shards={config.data.shards} is for train.py; leave it out to make shards")
    tasks = build_tasks(config)
    dataset = build_labeled_dataset(config, "train", tasks)
    result = write_shards(
        dataset, list(tasks), describe_samples(config, tasks), args.out, args.shards, args.seed, args.workers
    )
    size, mean = result.num_bytes / 1e6, result.num_bytes / result.num_samples / 1e3
    print(
        f"{result.num_samples} samples of {', '.join(tasks)} in {args.shards} shards: {size:.1f} MB, {mean:.1f} kB each"
    )
    print(f"Next: python train.py {shlex.join([*args.overrides, f'data.shards={result.pattern}'])}")


if __name__ == "__main__":
    run(main)
