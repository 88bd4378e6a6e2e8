"""Run a notebook from top to bottom and write it with its outputs.

    python scripts/docs/run_notebook.py docs/tutorial.ipynb [--output FILE]

Progress bars and warnings (the standard error) and times are left out of what is written, so that the file changes
only where its results do. Needs nbclient and ipykernel, which `make install` installs.
"""

import argparse
from pathlib import Path
from typing import Any

from mtcl.atomic import write_text
from mtcl.cli.arguments import CommandParser, output_path, require_extra
from mtcl.cli.script import run
from mtcl.errors import UserError, first_line

TIMEOUT = 1800  # seconds of a cell


def run_notebook(source: Path) -> Any:
    """Return the notebook with the outputs of its cells, without what they write to the standard error.

    Raises:
        UserError: it can't be read, or a cell raises.
    """
    import nbclient
    import nbformat

    try:
        notebook = nbformat.read(source, as_version=4)
        nbclient.NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", record_timing=False).execute()
    except (OSError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise UserError(f"{source} can't be read as a notebook: {first_line(error)}") from error
    except nbclient.exceptions.CellExecutionError as error:
        raise UserError(f"{source}: a cell raises {error.ename}: {error.evalue}") from error
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data.pop("image/jpeg", None)  # Pillow's images come in both
    notebook.metadata["language_info"] = {"name": "python"}  # without the version of this Python
    return notebook


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(__doc__)
    parser.add_argument("notebook", type=Path, metavar="FILE")
    parser.add_argument("--output", type=output_path, metavar="FILE", help="default: the notebook itself")
    return parser.parse_args()


def main() -> None:
    """Run the notebook and write it."""
    args = parse_args()
    require_extra("run_notebook.py", "dev", "nbclient", "ipykernel")
    notebook = run_notebook(args.notebook)
    import nbformat

    target = args.output or args.notebook
    write_text(target, nbformat.writes(notebook) + "\n")
    print(f"{target}: {len(notebook.cells)} cells")


if __name__ == "__main__":
    run(main)
