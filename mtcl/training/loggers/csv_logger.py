"""Write a run's curves into a table, ``metrics.csv``."""

import contextlib
import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from mtcl.atomic import write_atomically
from mtcl.training.loggers.base import MetricLogger

FILE = "metrics.csv"


class CsvLogger(MetricLogger):
    """Writes ``metrics.csv``: a row per logged step, a column per curve, empty where a step has no point of it.

    The last row is on the disk, too, and is completed while records of its step arrive. A new curve adds a column, for
    which the file is written again; that happens at the first records of each kind.

    Args:
        folder: the run folder.
        start_step: the step from which the run is resumed; rows of the interrupted run from there on are dropped.
    """

    subject = f"rows of {FILE}"

    def __init__(self, folder: Path, start_step: int = 0):
        self.path, self.start_step = folder / FILE, start_step
        self.columns = ["step"]
        self.rows: list[dict[str, str]] = [{}]  # the last row, after those that the disk did not take yet
        self.end = 0  # of the rows in the file that are complete, in bytes

    def open(self) -> None:
        """Write the file with the earlier rows of a resumed run."""
        rows = []
        for row in self._read() if self.start_step and self.path.is_file() else ():
            with contextlib.suppress(KeyError, ValueError):  # a row that was cut
                if int(row["step"]) < self.start_step:
                    rows.append(row)
                elif int(row["step"]) == self.start_step:  # the validation of the state before that step's update
                    rows.append({k: v for k, v in row.items() if k == "step" or k.startswith("val/")})
        self.rows = [rows.pop()] if rows and rows[-1]["step"] == str(self.start_step) else [{}]
        self.columns += [
            name for name in dict.fromkeys(name for row in [*rows, *self.rows] for name in row) if name != "step"
        ]
        self._write_all(rows)

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add numbers to the row of their step."""
        if self.rows[-1].get("step") != str(step):
            self.rows.append({"step": str(step)})
        self.rows[-1] |= {name: repr(float(value)) for name, value in values.items()}
        if added := [name for name in values if name not in self.columns]:
            self._write_all(self._read(self.end), [*self.columns, *added])
        else:
            self._write_last()

    def restart(self) -> None:
        """Begin a new file."""
        self._write_all([])

    def close(self, is_finished: bool) -> None:  # noqa: ARG002
        """Write what the disk did not take before."""
        if len(self.rows) > 1:
            self._write_last()

    def describe(self) -> str:
        """Return the path of the file."""
        return str(self.path.relative_to(Path.cwd()) if self.path.is_relative_to(Path.cwd()) else self.path)

    def _read(self, end: int | None = None) -> list[dict[str, str]]:
        """Return the rows of the file, up to the byte ``end``; empty cells are left out."""
        text = self.path.read_bytes()[:end].decode("utf-8", "replace")
        rows = csv.DictReader(io.StringIO(text, newline=""))
        return [{k: v for k, v in row.items() if isinstance(k, str) and v} for row in rows]

    def _write_all(self, rows: Iterable[dict[str, str]], columns: list[str] | None = None) -> None:
        """Write the file with these rows, and then those that wait."""
        columns = columns or self.columns
        header = io.StringIO(newline="")
        csv.writer(header, lineterminator="\n").writerow(columns)
        data = (header.getvalue() + self._format(rows, columns)).encode()
        write_atomically(self.path, lambda temporary: temporary.write_bytes(data), durable=False)
        self.columns, self.end = columns, len(data)
        self._write_last()

    def _write_last(self) -> None:
        """Write the rows that wait; the last one is written again with the next record."""
        complete = self._format(self.rows[:-1], self.columns).encode()
        last = self._format(self.rows[-1:], self.columns).encode()
        with self.path.open("rb+") as file:
            file.seek(self.end)
            file.truncate()
            file.write(complete + last)
        self.rows, self.end = self.rows[-1:], self.end + len(complete)

    @staticmethod
    def _format(rows: Iterable[dict[str, str]], columns: list[str]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(row for row in rows if row)
        return text.getvalue()
