"""Find the images of an input folder."""

import os
from pathlib import Path

from mtcl.cli.predict.output import OUTPUT_FOLDERS, RECORD_FILE
from mtcl.errors import UserError
from mtcl.inference.image_reading import SUFFIXES


def find_images(source: Path, output: Path) -> tuple[list[Path], dict[Path, str]]:
    """Find the images of a folder and all below it; a file is returned whatever its name.

    Hidden files, the output folder and other folders that this command wrote, and linked folders are not searched.

    Args:
        source: A folder or a file.
        output: The folder that predictions are written to.

    Returns:
        Sorted paths, and for each unreadable folder the reason.

    Raises:
        UserError: There is no image, or the maps would be written among the images.
    """
    if not os.path.exists(source):
        raise UserError(f"INPUT {source} does not exist; give an image, a folder, a video or a camera's number")
    inside, target = source.resolve(), output.resolve()
    if inside == target or any(f.parent == target and f.name in OUTPUT_FOLDERS for f in (inside, *inside.parents)):
        raise UserError(f"INPUT {source} lies where --output {output} has its maps; choose another --output")
    if not source.is_dir():
        return [source], {}
    files: list[Path] = []
    unreadable: dict[Path, str] = {}

    def note(error: OSError) -> None:
        unreadable[Path(error.filename)] = f"{error.filename} can't be read ({error.strerror})"

    for name, folders, names in os.walk(source, onerror=note):
        folder = Path(name)
        folders[:] = [f for f in folders if not f.startswith(".") and (folder / f).resolve() != target]
        if RECORD_FILE in names and folder != source:
            folders.clear()
            continue
        paths = (folder / n for n in names if not n.startswith("."))
        # A broken link fails when it is read; a FIFO or device is not opened.
        files += [path for path in paths if path.suffix.lower() in SUFFIXES and (path.is_file() or path.is_symlink())]
    if not files and not unreadable:
        raise UserError(f"INPUT {source} holds no image ({', '.join(SUFFIXES)})")
    return sorted(files), unreadable
