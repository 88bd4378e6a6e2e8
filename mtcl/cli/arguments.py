"""Parser and argument types shared by the ``mtcl`` commands and the scripts."""

import argparse
import math
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from mtcl.errors import UserError, find_similar

BACKBONE_WEIGHTS_HELP = "of a frozen backbone that the checkpoint leaves out"
OUTDATED = "options are written --name VALUE; key=value is for train.py and evaluate.py"


class CommandParser(argparse.ArgumentParser):
    """Parser whose errors are one sentence, raised as ``UserError``, in place of the usage text and exit code 2.

    Args:
        description: the help text, mostly the module's docstring.
        prog: the command's name; None: the script's file name.
    """

    def __init__(self, description: str | None, prog: str | None = None):
        super().__init__(
            prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        self._typed: list[str] = []

    def error(self, message: str) -> NoReturn:
        """Raise ``UserError``, with a hint where an option is misspelled or written ``key=value``."""
        head, _, rest = message.partition("unrecognized arguments: ")
        hint = f"{self.prog} --help lists the options"
        if not head and rest:
            first = rest.split()[0]
            if similar := self._find_similar_option(first):
                hint = f"did you mean {similar}?"
            elif "=" in first and not first.startswith("-"):
                hint = OUTDATED
        elif "arguments are required: " in message:  # for its option may be misspelled
            for option in filter(None, map(self._find_similar_option, self._typed)):
                if option in message:
                    hint = f"did you mean {option}?"
        elif choice := re.search(r"invalid choice: (.+) \(choose from (.+)\)$", message):
            typed, *choices = (text.strip("'\"") for text in (choice[1], *choice[2].split(", ")))
            hint = f"did you mean {matches[0]}?" if (matches := find_similar(typed, choices)) else hint
        raise UserError(f"{message}; {hint}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and keep what was typed for :meth:`error`."""
        self._typed = self._typed or list(sys.argv[1:] if args is None else args)  # intermixed: called twice
        return super().parse_known_args(args, namespace)

    def _find_similar_option(self, typed: str) -> str | None:
        """Return the option that a misspelt one may mean; the option itself may follow a ``--``, and is none."""
        option = typed.partition("=")[0]
        similar = find_similar(option, self._option_string_actions) if option.startswith("-") else []
        return similar[0] if similar and option not in self._option_string_actions else None


def output_path(text: str) -> Path:
    """Parse a path that is to be written; an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("give a path")
    return Path(text).expanduser()


def add_workers_option(parser: argparse.ArgumentParser, most: int | None = None) -> None:
    """Add ``--workers``, the number of processes, by default the machine's cores.

    Args:
        parser: gets the option.
        most: the default is at most this; None: no limit.
    """
    cores = os.cpu_count() or 1
    limit = "" if most is None else f" up to {most}"
    parser.add_argument(
        "--workers",
        type=non_negative_int,
        default=cores if most is None else min(cores, most),
        metavar="N",
        help=f"processes; 0: none besides this one (default: %(default)s, the machine's cores{limit})",
    )


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def non_negative_int(text: str) -> int:
    """Parse a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def name_list(text: str) -> list[str]:
    """Parse names separated by commas.

    >>> name_list("semseg,depth"), name_list("[depth]")
    (['semseg', 'depth'], ['depth'])
    """
    return [part.strip() for part in text.strip("[]").split(",") if part.strip()]


def number_list(text: str) -> list[float]:
    """Parse numbers separated by commas."""
    try:
        return [float(part) for part in name_list(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} are not numbers, such as 0.75,1,1.25") from None


def require_extra(purpose: str, extra: str, *packages: str) -> None:
    """Raise ``UserError`` where a package of an optional extra is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"{purpose} needs the package {package}; pip install 'mtcl[{extra}]'")
