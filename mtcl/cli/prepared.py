"""Declare the options that scripts share which prepare a dataset, and format their result as they print it."""

import argparse
import shlex
from pathlib import Path

from mtcl.cli.arguments import add_workers_option
from mtcl.data.prepare.jobs import Prepared

NYUD_PATHS = {
    "--labeled": "nyu_depth_v2_labeled.mat, the labelled dataset (2.8 GB)",
    "--splits": "splits.mat, the official training and test frames",
    "--classes": "classMapping40.mat, the 40 classes of the 894 labels",
    "--out": "the folder to write; a second run continues where the first was stopped",
}


def add_nyud_options(parser: argparse.ArgumentParser) -> None:
    """Add the official files of NYU Depth v2, the folder to write and the number of processes."""
    for option, help_text in NYUD_PATHS.items():
        parser.add_argument(option, type=Path, metavar="PATH", required=True, help=help_text)
    add_workers_option(parser)


def format_prepared(result: Prepared) -> str:
    """Return the summary of a prepared dataset, and the training command that reads it."""
    overrides = [f"data={result.group}", *(f"data.{key}={value}" for key, value in result.options.items())]
    if result.tasks is not None:
        overrides.append(f"tasks.names=[{','.join(result.tasks)}]")
    return f"{result.summary}\nNext: python train.py {shlex.join(overrides)}"
