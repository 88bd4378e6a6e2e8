"""Read a run's ``log.jsonl``, which run_logger.py writes: one record per line, damaged lines kept apart.

A record is ``{"step": N, "kind": TEXT, ...}``. Of the kinds in :data:`NUMERIC` all other values are numbers or null.
Logs of before version 0.3 called the regulariser's loss "contrast"; their records are returned with today's names.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mtcl.errors import UserError
from mtcl.safe_files import open_regular, parse_json

NUMERIC = ("train", "labelled_images", "regularizer", "val")
MAX_LINE = 1 << 20  # bytes; a longer line is no record
MAX_STEP = 10**15

Record = dict[str, Any]


class Line(NamedTuple):
    """A line of a log with its bytes and its record, which is None if the line is damaged or truncated."""

    data: bytes
    record: Record | None

    @property
    def is_truncated(self) -> bool:
        """Return whether the file ends within this line."""
        return not self.data.endswith(b"\n") and len(self.data) < MAX_LINE


def parse_record(line: bytes, path: Path) -> Record:
    """Parse a line of the log ``path`` and return its record with today's names.

    Raises:
        UserError: the line is no record.
    """
    record = parse_json(line, path)
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise UserError(f"{path} has a line that is no record {{step: N, kind: TEXT}}")
    step = record.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MAX_STEP:
        raise UserError(f"{path} has a line with step={str(step)[:40]}, which must be a whole number >= 0")
    record = _rename(record)
    for key, value in record.items() if record["kind"] in NUMERIC else ():
        if key in ("step", "kind") or value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{path} has a line with {key}={str(value)[:40]}, which must be a number or null")
    return record


def _rename(record: Record) -> Record:
    """Return a record with today's names in place of those of before version 0.3."""
    if record["kind"] == "contrast":
        renamed = {key.replace("/norm_contrast", "/norm_regularizer"): value for key, value in record.items()}
        return renamed | {"kind": "regularizer"}
    if record["kind"] == "balancing":  # OBJECTIVE/quantity
        return {re.sub("^contrast/", "regularizer/", key): value for key, value in record.items()}
    if record["kind"] == "train" and "contrast" in record:
        return {"regularizer" if key == "contrast" else key: value for key, value in record.items()}
    return record


def read_line(line: bytes, path: Path) -> Line:
    """Return a line with its record, or None for the record."""
    try:
        return Line(line, parse_record(line, path) if line.endswith(b"\n") else None)
    except UserError:
        return Line(line, None)


def read_lines(path: Path, start: int = 0) -> Iterator[Line]:
    """Yield the lines of the log ``path`` from byte ``start`` on; none if the file does not exist.

    Raises:
        UserError: it can't be read, or is no regular file.
    """
    if not os.path.lexists(path):
        return
    with open_regular(path) as file:
        file.seek(start)
        while line := _read(file, path):
            yield read_line(line, path)


def read_tail(path: Path, length: int) -> tuple[list[Line], bool]:
    """Return the lines in the last ``length`` bytes of the log ``path``, and whether these are all of them."""
    if not os.path.lexists(path):
        return [], True
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(size - length, 0))
        if size > length:
            _read(file, path)  # skip the line whose beginning is missing
        lines = []
        while file.tell() < size and (line := _read(file, path)):
            lines.append(read_line(line, path))
    return lines, size <= length


def _read(file: Any, path: Path) -> bytes:
    try:
        return file.readline(MAX_LINE)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror or error})") from error
