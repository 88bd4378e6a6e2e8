"""Write which training images are labelled for which tasks into a file for data.label_assignment.

python scripts/make_label_file.py --output FILE [--rule one] [--seed 0] [group=choice ...] [key=value ...]

Overrides are those of train.py, e.g. experiment=nyud_onelabel_resnet18 data.root=PATH; labels are distributed among
data.label_tasks, or else among the tasks in use, so take the overrides of the training. The ending of FILE chooses the
format: .json, .npy or .pth. The rules are those of data.label_assignment: with `one` each image is labelled
for one task, and every task has the same number of images, up to one.
"""

import hashlib
import shlex
from collections import Counter
from pathlib import Path

from mtcl.cli.arguments import CommandParser, non_negative_int, output_path
from mtcl.cli.script import run
from mtcl.config.build_data import build_labeled_dataset, build_tasks, choose_label_tasks
from mtcl.config.compose import compose_config
from mtcl.data.partial_labels import draw_label_assignment, write_label_assignment
from mtcl.errors import UserError


def main() -> None:
    """Parse the command line, write the file and print how many images have each label."""
    parser = CommandParser(__doc__)
    parser.add_argument("--output", type=output_path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--rule", choices=("one", "random"), default="one", help="default: %(default)s")
    parser.add_argument(
        "--seed", type=non_negative_int, default=0, metavar="N", help="of the draw; default: %(default)s"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config of train.py")
    args = parser.parse_intermixed_args()
    if args.output.exists():
        raise UserError(f"{args.output} exists; choose another path")
    config = compose_config(args.overrides, Path(__file__).resolve().parents[1] / "configs")
    tasks = choose_label_tasks(config, build_tasks(config))
    ids = build_labeled_dataset(config, "train", tasks).ids
    label_assignment = draw_label_assignment(ids, tasks, args.rule, args.seed)
    write_label_assignment(args.output, label_assignment, ids, tasks)
    counts = Counter(name for names in label_assignment.values() for name in names)
    listed = ", ".join(f"{name} {counts[name]}" for name in tasks)
    print(f"{len(ids)} images: {listed} (rule {args.rule}, seed {args.seed})")
    print(f"sha256 of {args.output.name}: {hashlib.sha256(args.output.read_bytes()).hexdigest()}")
    print(f"Next: python train.py {shlex.join([*args.overrides, f'data.label_assignment={args.output}'])}")


if __name__ == "__main__":
    run(main)
