"""Import a published checkpoint of another codebase, so that evaluate.py can score it.

    python scripts/import_checkpoint.py METHOD FILE OUTPUT.pt [key=value ...]
    python scripts/import_checkpoint.py invpt InvPT_pascal_vitLp16.pth.tar invpt.pt \
        data=pascal backbone=vit_large decoder=invpt
    python evaluate.py checkpoint=invpt.pt data.root=PATH

METHOD: --help lists them. FILE: as the authors' training code saved it, with or without DDP's prefix. The overrides are
those of train.py and describe the published run: dataset, backbone, decoder, the size it was trained at (data.size).
Every key of the file must be accounted for and every tensor of the model filled, or nothing is written.
"""

from pathlib import Path

from mtcl.cli.arguments import CommandParser
from mtcl.cli.import_checkpoint import import_checkpoint
from mtcl.cli.script import run
from mtcl.models.published import METHODS


def main() -> None:
    """Parse the command line and import the checkpoint."""
    parser = CommandParser(__doc__)
    parser.add_argument("method", help=f"whose checkpoint it is: {', '.join(METHODS)}")
    parser.add_argument("file", type=Path, help="the published checkpoint")
    parser.add_argument("output", type=Path, help="where to write ours")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of train.py that describe the run")
    args = parser.parse_intermixed_args()

    configs = Path(__file__).resolve().parents[1] / "configs"
    result = import_checkpoint(args.method, args.file, args.output, args.overrides, configs)
    print(f"{args.output}: {result.num_tensors} tensors, each filled from {args.file}")
    if result.num_regularizer_tensors:
        print(f"and {result.num_regularizer_tensors} of its aligners, which the second stage starts from")
    if result.unused_keys:
        first = ", ".join(result.unused_keys[:4]) + (", ..." if len(result.unused_keys) > 4 else "")
        print(f"left out, as no prediction of the published network uses them: {len(result.unused_keys)} ({first})")
    print(
        "set in its config, as the published network needs:", *(f"{k}={v}" for k, v in result.config_overrides.items())
    )


if __name__ == "__main__":
    run(main)
