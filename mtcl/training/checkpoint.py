"""Checkpoints: a dict of tensors and plain containers, written whole or not at all, read without unpickling code."""

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from mtcl.atomic import write_atomically
from mtcl.errors import UserError

FORMAT = 1


def claim(folder: Path) -> IO[str]:
    """Hold ``folder`` for this process until the file returned is closed or the process ends, however it ends.

    UserError where another process holds it. On systems without ``fcntl`` nothing is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError as error:
        lock.close()
        raise UserError(f"another run is writing into {folder}; choose another hydra.run.dir") from error
    return lock


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` (tensors and plain containers only) as a checkpoint of the current format."""
    write_atomically(path, lambda temporary: torch.save({"format": FORMAT, **content}, temporary))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint's dict on the CPU. Never runs code from the file (``weights_only=True``)."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist; give the path of a run's checkpoints/last.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"checkpoint {path} can't be read ({type(error).__name__}: {reason}); is it whole, and mtcl's?"
        ) from error
    if not isinstance(content, dict) or "model" not in content or "config" not in content:
        raise UserError(f"{path} is not a checkpoint of mtcl: it has no model and config")
    if content.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {content.get('format')}, this version of mtcl reads format {FORMAT}"
        )
    return content
