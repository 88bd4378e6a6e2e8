"""Render a comparison as a table: text for the terminal, Markdown, LaTeX (booktabs), CSV."""

import csv
import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence

from mtcl.errors import escape_control_characters
from mtcl.results.columns import Column
from mtcl.results.compare import Comparison, Difference
from mtcl.results.rows import Row
from mtcl.results.statistics import CONFIDENCE_LEVEL, MIN_PAIRS, PairedDifference

FORMATS = ("text", "markdown", "latex", "csv")
WIDTH = 120  # of text
LABEL_WIDTH = 34  # of a row's name in text; longer names are wrapped
DIGITS = {"%": 2, "deg": 2, "m": 4, "": 4, "pixels": 0}
HEAD_WIDTH = 20  # of a heading in text; longer ones are wrapped
ROWS_ACROSS = 3  # in text, if a row of the comparison is a column
NO_VALUE = "-"
FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r")  # in a spreadsheet
TOO_FEW = "too few pairs"
ALPHA = 1 - CONFIDENCE_LEVEL
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
LATEX |= {"↑": r"$\uparrow$", "↓": r"$\downarrow$", **{c: f"\\{c}" for c in "&%$#_{}"}}

Grid = list[list[str]]


def render(comparison: Comparison, format: str) -> str:
    """Render the table in one of :data:`FORMATS`, with a newline at its end."""
    return {"text": render_text, "markdown": render_markdown, "latex": render_latex, "csv": render_csv}[format](
        comparison
    )


# Cells


def format_value(column: Column, value: float, signed: bool = False) -> str:
    """Format a value in its unit: percent and degrees with two decimals, metres with four, Deltas with their sign."""
    if math.isnan(value):
        return NO_VALUE
    scale = 100 if column.unit == "%" and column.task else 1
    text = f"{value * scale:{'+' if signed or not column.task else ''}.{DIGITS.get(column.unit, 4)}f}"
    return text if re.search("[1-9]", text) else text.lstrip("+-")


def format_mean(column: Column, row: Row) -> str:
    """Format the mean over seeds. Delta_MTL of the baselines themselves is 0."""
    if row.is_baseline and column.metric == "Delta_MTL":
        return format_value(column, 0.0)
    return format_value(column, row.summarize(column).mean)


def format_cell(column: Column, row: Row) -> str:
    """Format ``mean ± standard deviation`` over seeds; for a single seed its value."""
    std = row.summarize(column).std
    return format_mean(column, row) + ("" if math.isnan(std) else f" ± {format_value(column, std).lstrip('+')}")


def format_seeds(row: Row) -> str:
    """Format the number of seeds; a dash for a published row that does not say it."""
    return NO_VALUE if row.is_published and not row.num_seeds else str(row.num_seeds)


def find_best(column: Column, rows: Sequence[Row]) -> list[bool]:
    """Return for each row whether its mean, as displayed, is the best of at least two.

    Baselines and published rows are not eligible.
    """
    means = [math.nan if row.is_baseline or row.is_published else row.summarize(column).mean for row in rows]
    finite = [value for value in means if not math.isnan(value)]
    if len(finite) < 2:
        return [False] * len(rows)
    top = format_value(column, max(finite) if column.higher_is_better else min(finite))
    return [not math.isnan(value) and format_value(column, value) == top for value in means]


def column_heading(column: Column) -> str:
    """Return metric, direction and unit."""
    arrow = "↑" if column.higher_is_better else "↓"
    return f"{column.metric} {arrow}" + (f" ({column.unit})" if column.unit else "")


def is_transposed(columns: Sequence[Column]) -> bool:
    """Does a task have several metrics, so that the table has a line per metric and a column per row?"""
    tasks = [column.task for column in columns if column.task]
    return len(set(tasks)) < len(tasks)


def difference_unit(column: Column) -> str:
    """Return the unit of a difference; of percentages it is points."""
    return "points" if column.unit == "%" else column.unit


def format_interval(column: Column, pair: PairedDifference) -> str:
    """Format the interval of a difference as ``[low, high]``."""
    if math.isnan(pair.low):
        return NO_VALUE
    return f"[{format_value(column, pair.low, signed=True)}, {format_value(column, pair.high, signed=True)}]"


def verdict(column: Column, pair: PairedDifference, p_value: float | None = None) -> str:
    """Return whether the interval excludes zero, and on which side; no verdict below three pairs.

    ``p_value``: a corrected p-value, which decides instead of the interval.
    """
    if math.isnan(pair.low):
        return NO_VALUE
    if not pair.has_enough_pairs:
        return TOO_FEW
    if not (pair.excludes_zero if p_value is None else p_value < ALPHA):
        return "no"
    return f"yes, {better_or_worse(column, pair.mean)}"


def better_or_worse(column: Column, difference: float) -> str:
    """Return the direction of a difference."""
    return "better" if (difference > 0) == column.higher_is_better else "worse"


def difference_grid(one: Difference) -> Grid:
    """Return heading and lines of one block of paired differences."""
    grid = [["", "difference", "95 % interval", "pairs", "excludes zero"]]
    if one.adjusted_p_values is not None:
        grid = [["", "difference", "95 % interval", "pairs", "p (Holm)", "p < 0.05"]]
    for column, pair in one.columns.items():
        unit = difference_unit(column)
        arrow = "↑" if column.higher_is_better else "↓"
        name = f"{column.task} {column.metric} {arrow}".strip() + (f" ({unit})" if unit else "")
        value = format_value(column, pair.mean, signed=True)
        line = [name, value, format_interval(column, pair), str(pair.pairs)]
        p_value = None if one.adjusted_p_values is None else one.adjusted_p_values.get(column)
        if one.adjusted_p_values is not None:
            line.append(NO_VALUE if p_value is None else f"{p_value:.3g}")
        grid.append([*line, verdict(column, pair, p_value)])
    return grid


def operand_labels(one: Difference) -> tuple[str, str]:
    """Return the labels of minuend and subtrahend."""
    return one.row.label, one.reference.label


def footnotes(comparison: Comparison) -> list[str]:
    """Return notes on standard deviations and intervals, then the comparison's own notes."""
    lines = []
    if any(row.num_seeds > 1 and not row.is_published for row in comparison.rows):
        lines.append("Mean ± standard deviation (n - 1) over seeds.")
    if any(pair.pairs == 1 for one in comparison.differences for pair in one.columns.values()):
        lines.append("A single pair gives no interval.")
    intervals = [
        (column, pair) for one in comparison.differences for column, pair in one.columns.items() if pair.pairs > 1
    ]
    if any(not pair.has_enough_pairs for _, pair in intervals):
        lines.append(f"No verdict below {MIN_PAIRS} pairs: of two, one outlier makes any interval.")
    if intervals:
        lines.append(describe_intervals(comparison, len(intervals)))
    return [*lines, *comparison.notes]


def describe_intervals(comparison: Comparison, count: int) -> str:
    """Describe the intervals: whether they are corrected for their number, and which exclude zero."""
    decided_names = [
        f"{column.task} {column.metric}".strip()
        for one in comparison.differences
        for column, pair in one.columns.items()
        if verdict(column, pair, (one.adjusted_p_values or {}).get(column)).startswith("yes")
    ]
    names = ", ".join(dict.fromkeys(decided_names))
    text = f"{count} interval{'s' * (count > 1)} of Student's t"
    if any(one.adjusted_p_values is not None for one in comparison.differences):
        tested = sum(len(one.adjusted_p_values or {}) for one in comparison.differences)
        decided = f"below 0.05: {names}" if decided_names else "none is below 0.05"
        return f"{text}; their p-values are corrected for their number ({tested}) by Holm's method: {decided}."
    decided = f"excluding zero: {names}" if decided_names else "none excludes zero" if has_verdict(comparison) else ""
    return f"{text}, not corrected for their number (--holm does){'; ' * bool(decided)}{decided}."


def has_verdict(comparison: Comparison) -> bool:
    """Does any difference have enough pairs for a verdict?"""
    return any(pair.has_enough_pairs for one in comparison.differences for pair in one.columns.values())


# Text


def render_text(comparison: Comparison) -> str:
    """Render the table for a terminal of :data:`WIDTH` columns."""
    columns, rows = comparison.columns, comparison.rows
    blocks = [] if is_transposed(columns) else [short_block(columns, rows)]
    if not blocks or max(map(len, blocks[0].splitlines())) > WIDTH:  # then a line per metric
        blocks = [long_block(columns, rows[i : i + ROWS_ACROSS]) for i in range(0, len(rows), ROWS_ACROSS)]
    for one in comparison.differences:
        grid = difference_grid(one)
        blocks.append(
            "{} minus {}, paired over seeds\n".format(*operand_labels(one))
            + align_columns(grid[:1], grid[1:], num_left=1)
        )
    notes = [textwrap.fill(note, WIDTH, subsequent_indent="  ") for note in footnotes(comparison)]
    return "\n\n".join([*blocks, "\n".join(notes)]) + "\n"


def short_block(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Return a block with a line per row and a column per metric."""
    body = []
    for row in rows:
        first, *more = textwrap.wrap(row.label, LABEL_WIDTH, break_on_hyphens=False) or [""]
        body.append([first, *(format_cell(c, row) for c in columns), format_seeds(row)])
        body += [[f"  {text}", *[""] * (len(columns) + 1)] for text in more]
    return align_columns(stack_headings([[], *map(head_lines, columns), ["seeds"]]), body, num_left=1)


def long_block(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Return a block with a line per metric and a column per row."""
    head = stack_headings([["task"], ["metric"], *(wrap_heading(row.label) for row in rows)])
    body = [[c.task, column_heading(c), *(format_cell(c, row) for row in rows)] for c in columns]
    return align_columns(head, [*body, ["", "seeds", *(format_seeds(row) for row in rows)]], num_left=2)


def head_lines(column: Column) -> list[str]:
    """Return a column's heading in lines: the task above its metric, a Delta's name above its arrow."""
    if column.task:
        return [column.task, column_heading(column)]
    return [*wrap_heading(column.metric), column_heading(column).removeprefix(column.metric).strip()]


def wrap_heading(text: str) -> list[str]:
    """Break a heading into lines of :data:`HEAD_WIDTH` columns."""
    return textwrap.wrap(text, HEAD_WIDTH, break_on_hyphens=False, break_long_words=False) or [""]


def stack_headings(heads: Sequence[list[str]]) -> Grid:
    """Return headings of several lines, aligned at the bottom, as lines of a grid."""
    height = max(map(len, heads))
    full = [[""] * (height - len(lines)) + lines for lines in heads]
    return [[lines[i] for lines in full] for i in range(height)]


def align_columns(head: Grid, body: Grid, num_left: int) -> str:
    """Pad cells to columns, the first ``num_left`` flush left; the numbers before and after "±" are aligned."""
    for i in range(num_left, len(head[0])):
        tail = max(len(row[i].partition(" ± ")[2]) for row in body)
        if tail:
            for row in body:
                row[i] += " " * (tail + 3 - (len(row[i]) - len(row[i].partition(" ± ")[0]))) if row[i] else ""
    widths = [max(len(row[i]) for row in [*head, *body]) for i in range(len(head[0]))]
    gap = 3 if sum(widths) + 3 * (len(widths) - 1) <= WIDTH else 2

    def line(row: list[str]) -> str:
        cells = [text.ljust(w) if i < num_left else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths))]
        return (" " * gap).join(cells).rstrip()

    rule = "-" * (sum(widths) + gap * (len(widths) - 1))
    return "\n".join([*map(line, head), rule, *map(line, body)])


# Markdown


def render_markdown(comparison: Comparison) -> str:
    """Render the table as Markdown, the best means in bold."""
    columns, rows = comparison.columns, comparison.rows
    bold = {column: find_best(column, rows) for column in columns}

    def strong(column: Column, i: int) -> str:
        text = format_cell(column, rows[i])
        mean, _, std = text.partition(" ± ")
        return f"**{mean}**" + (f" ± {std}" if std else "") if bold[column][i] else text

    if is_transposed(columns):
        head = ["task", "metric", *(markdown_code(row.label) for row in rows)]
        body = [[c.task, column_heading(c), *(strong(c, i) for i in range(len(rows)))] for c in columns]
        body.append(["", "seeds", *(format_seeds(row) for row in rows)])
        blocks = [markdown_table(head, body, num_left=2)]
    else:
        head = ["run", *(escape_markdown(f"{c.task} {column_heading(c)}".strip()) for c in columns), "seeds"]
        body = [
            [markdown_code(row.label), *(strong(c, i) for c in columns), format_seeds(row)]
            for i, row in enumerate(rows)
        ]
        blocks = [markdown_table(head, body, num_left=1)]
    for one in comparison.differences:
        grid = difference_grid(one)
        body = [[escape_markdown(row[0]), *row[1:]] for row in grid[1:]]
        blocks.append("{} minus {}, paired over seeds:".format(*map(markdown_code, operand_labels(one))))
        blocks.append(markdown_table(grid[0], body, num_left=1))
    return "\n\n".join([*blocks, "\n".join(f"- {note}" for note in footnotes(comparison))]) + "\n"


def markdown_code(label: str) -> str:
    """Return a row's name, as code if it is made of config keys or a path."""
    return f"`{escape_markdown(label)}`" if re.search("[=/_*]", label) else escape_markdown(label)


def escape_markdown(text: str) -> str:
    """Escape the pipes of a table cell."""
    return text.replace("|", r"\|")


def markdown_table(head: list[str], body: Grid, num_left: int) -> str:
    """Return a Markdown table, the first ``num_left`` columns flush left."""
    rule = ["---" if i < num_left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


# LaTeX


def render_latex(comparison: Comparison) -> str:
    """Render the table as LaTeX with booktabs, the best means in bold."""
    columns, rows = comparison.columns, comparison.rows
    bold = {column: find_best(column, rows) for column in columns}

    def strong(column: Column, i: int) -> str:
        mean, _, std = format_cell(column, rows[i]).partition(" ± ")
        text = rf"\textbf{{{mean.replace('-', '$-$')}}}" if bold[column][i] else latex_minus(mean)
        return text + (rf" $\pm$ {std}" if std else "")

    if is_transposed(columns):
        head = [["task", "metric", *(escape_latex(row.label) for row in rows)]]
        body = [[escape_latex(c.task), latex_heading(c), *(strong(c, i) for i in range(len(rows)))] for c in columns]
        body.append(["", "seeds", *(format_seeds(row) for row in rows)])
        num_left, rules = 2, {len(body) - 1}
    else:
        head = [["", *(escape_latex(c.task) for c in columns), ""], ["", *map(latex_heading, columns), "seeds"]]
        body = [
            [escape_latex(row.label), *(strong(c, i) for c in columns), format_seeds(row)] for i, row in enumerate(rows)
        ]
        num_left, rules = 1, {i + 1 for i, row in enumerate(rows) if row.is_baseline}
        rules |= {i for i, row in enumerate(rows) if row.is_published and not rows[i - 1].is_published}
    blocks = ["% needs \\usepackage{booktabs}", latex_table(head, body, num_left, rules)]
    for one in comparison.differences:
        grid = difference_grid(one)
        body = [[latex_name(row[0]), *map(latex_minus, row[1:])] for row in grid[1:]]
        blocks.append("\n% {} minus {}, paired over seeds".format(*operand_labels(one)))
        blocks.append(latex_table([[escape_latex(text) for text in grid[0]]], body, num_left=1, rules=set()))
    return "\n".join([*blocks, "", *(f"% {note}" for note in footnotes(comparison))]) + "\n"


def escape_latex(text: str) -> str:
    """Escape LaTeX's special characters."""
    return "".join(LATEX.get(character, character) for character in text)


def latex_heading(column: Column) -> str:
    """Return a column's heading as LaTeX."""
    return latex_name(column_heading(column))


def latex_name(text: str) -> str:
    """Return a heading as LaTeX, with Delta and unit as they are typeset in papers."""
    text = escape_latex(text).replace("(deg)", r"($^\circ$)")
    for name in ("MTL", "on/off"):
        text = text.replace(rf"Delta\_{name}", rf"$\Delta_{{\mathrm{{{name}}}}}$")
    return text.replace("Delta vs.", r"$\Delta$ vs.")


def latex_minus(text: str) -> str:
    """Return negative numbers with a minus sign; a lone dash stays a dash."""
    return re.sub(r"-(\d[\d.]*)", r"$-$\1", text)


def latex_table(head: Grid, body: Grid, num_left: int, rules: set[int]) -> str:
    """Return a booktabs table; ``rules``: lines of the body that get a rule above."""
    columns = "l" * num_left + "c" * (len(head[0]) - num_left)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *(" & ".join(row) + r" \\" for row in head), r"\midrule"]
    for i, row in enumerate(body):
        lines += [r"\midrule"] * (i in rules and 0 < i < len(body)) + [" & ".join(row) + r" \\"]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


# CSV


def render_csv(comparison: Comparison) -> str:
    """Render a line per row in full precision: fractions as fractions, Deltas in percent, no value as empty."""
    differences = {id(one.row): one for one in comparison.differences}
    columns = comparison.columns
    parts = ["difference", "low", "high", "pairs"]
    parts += ["p (Holm)"] * any(one.adjusted_p_values is not None for one in comparison.differences)
    head = ["run", "seeds"]
    for column in columns:
        head += [column.key, f"{column.key} std"]
    if differences:
        head.append("against")
        head += [f"{column.key} {part}" for column in columns for part in parts]
    lines: list[list[object]] = [[*head]]
    for row in comparison.rows:
        line: list[object] = [row.label, None if row.is_published and not row.num_seeds else row.num_seeds]
        for column in columns:
            summary = row.summarize(column)
            line += [summary.mean, summary.std]
        if differences:
            one = differences.get(id(row))
            line.append("" if one is None else one.reference.label)
            for column in columns:
                pair = None if one is None else one.columns.get(column)
                p_values = None if one is None else one.adjusted_p_values
                p_value = None if p_values is None else p_values.get(column)
                line += [None] * len(parts) if pair is None else [*pair, p_value][: len(parts)]
        lines.append(line)
    return format_csv(lines)


def format_csv(lines: Iterable[Sequence[object]]) -> str:
    """Return lines as CSV. Numbers stay numbers; None and NaN are empty.

    Text that a spreadsheet could take for a formula gets an apostrophe in front; control characters are escaped.
    """
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([map(format_csv_cell, line) for line in lines])
    return buffer.getvalue()


def format_csv_cell(value: object) -> object:
    r"""Return a value as the csv module shall write it.

    >>> format_csv_cell("=1+1"), format_csv_cell(-1.5), format_csv_cell("\t@x"), format_csv_cell(float("nan"))
    ("'=1+1", -1.5, "'\\t@x", None)
    """
    if isinstance(value, float) and math.isnan(value):
        return None
    if not isinstance(value, str):
        return value
    text = escape_control_characters(value)
    return f"'{text}" if value.startswith(FORMULA_PREFIXES) else text
