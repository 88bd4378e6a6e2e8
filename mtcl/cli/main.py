"""Trained models and finished runs, from the command line.

Every command is a module of this package: its docstring is the help text, ``add_arguments`` declares the arguments and
``run`` does the work. A module is imported only once its command is called. ``train`` and ``evaluate`` are Hydra's.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from mtcl.cli.arguments import CommandParser
from mtcl.cli.script import run
from mtcl.cli.terminal import announce_loading
from mtcl.errors import UserError, suggest
from mtcl.version import __version__

# Their arguments are overrides, key=value and group=choice.
HYDRA_COMMANDS = {
    "train": "train a model; -m trains every combination of values",
    "evaluate": "score a trained model, or saved maps of any code",
}
COMMANDS = {
    "predict": "predict all tasks for images, a video or a camera",
    "export": "write a trained model as safetensors, torch.export or ONNX; push to and pull from the Hugging Face hub",
    "demo": "show a trained model as a web page on this machine",
    "runs": "list runs with their state and main metrics",
    "compare": "compare runs in a table, with Delta_MTL and paired differences",
    "report": "write runs as one HTML page",
}


def main(command: str | None = None) -> None:
    """Run ``mtcl COMMAND ...`` with the arguments of this process; a user's mistake is one sentence and exit code 1.

    Args:
        command: The command, where the arguments do not begin with it (``scripts/predict.py``).
    """
    if command is None and sys.argv[1:2] and sys.argv[1] in HYDRA_COMMANDS:
        name = sys.argv[1]
        sys.argv[:2] = [f"mtcl {name}"]  # Hydra reads what follows, and the record of a run names the command
        with announce_loading(f"mtcl {name}"):
            commands = import_module("mtcl.cli.hydra_commands").COMMANDS
        commands[name]()
        return
    run(lambda: run_command([*([command] if command else []), *sys.argv[1:]]))


def run_command(arguments: Sequence[str]) -> None:
    """Parse ``COMMAND ...`` and run that command, one of :data:`COMMANDS`."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(format_help())
    elif name == "--version":
        print(f"mtcl {__version__}")
    elif name not in COMMANDS:
        commands = [*HYDRA_COMMANDS, *COMMANDS]
        hint = suggest(name, [*commands, "--help", "--version"])
        raise UserError(f"{name} is no command of mtcl{hint}; choose among {', '.join(commands)}")
    else:
        with announce_loading(f"mtcl {name}"):
            module = import_module(f"mtcl.cli.{name}")
        parser = CommandParser(module.__doc__, f"mtcl {name}")
        module.add_arguments(parser)
        module.run(parser.parse_intermixed_args(arguments[1:]))


def format_help() -> str:
    """List the commands."""
    lines = [f"  {name:<8} {text}" for name, text in {**HYDRA_COMMANDS, **COMMANDS}.items()]
    return "\n".join(
        ["usage: mtcl COMMAND ...", "", *lines, "", "mtcl COMMAND --help describes one; mtcl --version names this one"]
    )
