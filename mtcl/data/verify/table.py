"""Rows of results, and their table as text."""

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "deviation", "damage"]
COLUMNS = (24, 46, 31, 9)  # widths; 119 characters with what stands between
HEADS = ("check", "found", "expected", "verdict")


@dataclass(frozen=True)
class Row:
    """One check. ``details`` are full sentences, for what the table has no room for."""

    check: str
    value: str  # as measured
    expected: str
    verdict: Verdict = "ok"
    details: tuple[str, ...] = ()


def worst_verdict(*verdicts: Verdict) -> Verdict:
    """Return the gravest of the verdicts; ok if there are none."""
    order: tuple[Verdict, ...] = ("ok", "deviation", "damage")
    return max(verdicts, key=order.index, default="ok")


def format_table(rows: Sequence[Row]) -> str:
    """Format the rows as text of at most 120 columns; long cells continue in the next line."""
    lines = [_line(HEADS), "-+-".join("-" * width for width in COLUMNS)]
    for row in rows:
        cells = (row.check, row.value, row.expected, row.verdict)
        wrapped = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, COLUMNS)]
        lines += [_line(cells) for cells in itertools.zip_longest(*wrapped, fillvalue="")]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    """Format one line of the table."""
    return " | ".join(cell.ljust(width) for cell, width in zip(cells, COLUMNS)).rstrip()
