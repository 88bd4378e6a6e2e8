"""A published checkpoint of another codebase as one of ours, to be scored by evaluate.py.

    python scripts/import_checkpoint.py METHOD FILE OUTPUT.pt [key=value ...]
    python scripts/import_checkpoint.py invpt InvPT_pascal_vitLp16.pth.tar invpt.pt \
        data=pascal backbone=vit_large decoder=invpt
    python evaluate.py checkpoint=invpt.pt data.root=PATH

METHOD: --help lists them. FILE: what the authors' own training code saved, DDP's prefix and all. The other words are
those of train.py and describe the published run: dataset, backbone, decoder, the size it was trained at (data.size).
Every key of the file is accounted for and every tensor of the model filled, or nothing is written.
"""

import argparse
from pathlib import Path

from mtcl.cli.import_checkpoint import import_checkpoint
from mtcl.cli.script import run
from mtcl.models.published import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("method", help=f"whose checkpoint it is: {', '.join(METHODS)}")
    parser.add_argument("file", type=Path, help="the published checkpoint")
    parser.add_argument("output", type=Path, help="where to write ours")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="the published run, in train.py's words")
    given = parser.parse_args()

    configs = Path(__file__).resolve().parents[1] / "configs"
    done = import_checkpoint(given.method, given.file, given.output, given.overrides, configs)
    print(f"{given.output}: {done.tensors} tensors, each filled from {given.file}")
    if done.unused_keys:
        print(
            f"left out, as the published network never uses them: {len(done.unused_keys)} ({', '.join(done.unused_keys[:4])}, ...)"
        )
    print("set in its config, as the published network asks:", *(f"{k}={v}" for k, v in done.settings.items()))


if __name__ == "__main__":
    run(main)
