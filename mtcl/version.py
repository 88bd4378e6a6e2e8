"""The version of mtcl, kept here and read by pyproject.toml, and the commit of a checkout."""

import subprocess
from pathlib import Path

__version__ = "0.2.0"


def read_commit() -> tuple[str | None, bool | None]:
    """Return the commit of mtcl's own checkout and whether it is clean; None if it is not a checkout."""

    def git(*args: str) -> str:
        process = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", check=True
        )
        return process.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), git("status", "--porcelain") == ""
    except (OSError, subprocess.CalledProcessError):
        return None, None
