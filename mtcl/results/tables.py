"""A comparison as a table: text for the terminal, Markdown, LaTeX (booktabs), CSV."""

import csv
import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence

from mtcl.errors import escape_control_characters
from mtcl.results.columns import Column
from mtcl.results.compare import Comparison, Difference, Row
from mtcl.results.statistics import CONFIDENCE_LEVEL, MIN_PAIRS, PairedDifference

FORMATS = ("text", "markdown", "latex", "csv")
WIDTH = 120  # of text
LABEL_WIDTH = 34  # of a row's name in text, before it goes on in the next line
DIGITS = {"%": 2, "deg": 2, "m": 4, "": 4, "pixels": 0}
HEAD_WIDTH = 20  # of a heading in text, likewise
ROWS_ACROSS = 3  # in text, where a row of the comparison is a column
NO_VALUE = "-"
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # begins a formula in a spreadsheet
TOO_FEW = "too few pairs"
ALPHA = 1 - CONFIDENCE_LEVEL
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
LATEX |= {"↑": r"$\uparrow$", "↓": r"$\downarrow$", **{c: f"\\{c}" for c in "&%$#_{}"}}

Grid = list[list[str]]


def render(comparison: Comparison, format: str) -> str:
    """The table in one of :data:`FORMATS`, with a newline at its end."""
    return {"text": render_text, "markdown": render_markdown, "latex": render_latex, "csv": render_csv}[format](
        comparison
    )


# Cells


def format_value(column: Column, value: float, signed: bool = False) -> str:
    """A value in its unit: percent and degrees with two decimals, metres with four; a Delta always with its sign."""
    if math.isnan(value):
        return NO_VALUE
    scale = 100 if column.unit == "%" and column.task else 1
    text = f"{value * scale:{'+' if signed or not column.task else ''}.{DIGITS.get(column.unit, 4)}f}"
    return text if re.search("[1-9]", text) else text.lstrip("+-")


def format_mean(column: Column, row: Row) -> str:
    """Only the mean. Delta_MTL of the baselines themselves is 0."""
    if row.is_baseline and column.metric == "Delta_MTL":
        return format_value(column, 0.0)
    return format_value(column, row.summarize(column).mean)


def format_cell(column: Column, row: Row) -> str:
    """``mean ± standard deviation``, of one seed its value."""
    std = row.summarize(column).std
    return format_mean(column, row) + ("" if math.isnan(std) else f" ± {format_value(column, std).lstrip('+')}")


def find_best(column: Column, rows: Sequence[Row]) -> list[bool]:
    """Which rows' means, as they are shown, are the best of at least two; the single-task baseline takes no part."""
    shown = [math.nan if row.is_baseline else row.summarize(column).mean for row in rows]
    known = [value for value in shown if not math.isnan(value)]
    if len(known) < 2:
        return [False] * len(rows)
    top = format_value(column, max(known) if column.higher_is_better else min(known))
    return [not math.isnan(value) and format_value(column, value) == top for value in shown]


def column_heading(column: Column) -> str:
    arrow = "↑" if column.higher_is_better else "↓"
    return f"{column.metric} {arrow}" + (f" ({column.unit})" if column.unit else "")


def is_transposed(columns: Sequence[Column]) -> bool:
    """More than its primary metric of some task: then a line per metric, a column per row."""
    tasks = [column.task for column in columns if column.task]
    return len(set(tasks)) < len(tasks)


def difference_unit(column: Column) -> str:
    return "points" if column.unit == "%" else column.unit


def format_interval(column: Column, found: PairedDifference) -> str:
    if math.isnan(found.low):
        return NO_VALUE
    return f"[{format_value(column, found.low, signed=True)}, {format_value(column, found.high, signed=True)}]"


def verdict(column: Column, found: PairedDifference, adjusted_p_values: float | None = None) -> str:
    """Tell whether the interval excludes zero, and on which side; none below three pairs.

    ``adjusted``: a corrected p-value, by which it is decided instead.
    """
    if math.isnan(found.low):
        return NO_VALUE
    if not found.has_enough_pairs:
        return TOO_FEW
    if not (found.excludes_zero if adjusted_p_values is None else adjusted_p_values < ALPHA):
        return "no"
    return f"yes, {better_or_worse(column, found.mean)}"


def better_or_worse(column: Column, difference: float) -> str:
    return "better" if (difference > 0) == column.higher_is_better else "worse"


def difference_grid(one: Difference) -> Grid:
    """Heading and lines of one block of paired differences."""
    grid = [["", "difference", "95 % interval", "pairs", "excludes zero"]]
    if one.adjusted_p_values is not None:
        grid = [["", "difference", "95 % interval", "pairs", "p (Holm)", "p < 0.05"]]
    for column, found in one.columns.items():
        unit = difference_unit(column)
        arrow = "↑" if column.higher_is_better else "↓"
        name = f"{column.task} {column.metric} {arrow}".strip() + (f" ({unit})" if unit else "")
        value = format_value(column, found.mean, signed=True)
        line = [name, value, format_interval(column, found), str(found.pairs)]
        adjusted_p_values = None if one.adjusted_p_values is None else one.adjusted_p_values.get(column)
        if one.adjusted_p_values is not None:
            line.append(NO_VALUE if adjusted_p_values is None else f"{adjusted_p_values:.3g}")
        grid.append([*line, verdict(column, found, adjusted_p_values)])
    return grid


def title(one: Difference) -> tuple[str, str]:
    """What is subtracted from what."""
    return one.row.label, one.reference.label


def footnotes(comparison: Comparison) -> list[str]:
    """What is to be known of standard deviations and intervals, then the comparison's notes."""
    lines = []
    if any(row.num_seeds > 1 for row in comparison.rows):
        lines.append("Mean ± standard deviation (n - 1) over seeds.")
    if any(found.pairs == 1 for one in comparison.differences for found in one.columns.values()):
        lines.append("A single pair gives no interval.")
    intervals = [
        (column, found) for one in comparison.differences for column, found in one.columns.items() if found.pairs > 1
    ]
    if any(not found.has_enough_pairs for _, found in intervals):
        lines.append(f"No verdict below {MIN_PAIRS} pairs: of two, one outlier makes any interval.")
    if intervals:
        lines.append(describe_intervals(comparison, len(intervals)))
    return [*lines, *comparison.notes]


def describe_intervals(comparison: Comparison, count: int) -> str:
    """Describe the intervals: whether they are corrected for their number, and which exclude zero."""
    sure = [
        f"{column.task} {column.metric}".strip()
        for one in comparison.differences
        for column, found in one.columns.items()
        if verdict(column, found, (one.adjusted_p_values or {}).get(column)).startswith("yes")
    ]
    names = ", ".join(dict.fromkeys(sure))
    text = f"{count} interval{'s' * (count > 1)} of Student's t"
    if any(one.adjusted_p_values is not None for one in comparison.differences):
        tested = sum(len(one.adjusted_p_values or {}) for one in comparison.differences)
        decided = f"below 0.05: {names}" if sure else "none is below 0.05"
        return f"{text}; their p-values are corrected for their number ({tested}) by Holm's method: {decided}."
    decided = f"excluding zero: {names}" if sure else "none excludes zero" if has_verdict(comparison) else ""
    return f"{text}, not corrected for their number (--holm does){'; ' * bool(decided)}{decided}."


def has_verdict(comparison: Comparison) -> bool:
    """Has any difference pairs enough for a verdict?"""
    return any(found.has_enough_pairs for one in comparison.differences for found in one.columns.values())


# Text


def render_text(comparison: Comparison) -> str:
    columns, rows = comparison.columns, comparison.rows
    blocks = [] if is_transposed(columns) else [short_block(columns, rows)]
    if not blocks or max(map(len, blocks[0].splitlines())) > WIDTH:  # then the metrics go down, not across
        blocks = [long_block(columns, rows[i : i + ROWS_ACROSS]) for i in range(0, len(rows), ROWS_ACROSS)]
    for one in comparison.differences:
        grid = difference_grid(one)
        blocks.append(
            "{} minus {}, paired over seeds\n".format(*title(one)) + align_columns(grid[:1], grid[1:], lefts=1)
        )
    notes = [textwrap.fill(note, WIDTH, subsequent_indent="  ") for note in footnotes(comparison)]
    return "\n\n".join([*blocks, "\n".join(notes)]) + "\n"


def short_block(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A line per row, a column per metric."""
    body = []
    for row in rows:
        first, *more = textwrap.wrap(row.label, LABEL_WIDTH, break_on_hyphens=False) or [""]
        body.append([first, *(format_cell(c, row) for c in columns), str(row.num_seeds)])
        body += [[f"  {text}", *[""] * (len(columns) + 1)] for text in more]
    return align_columns(stack_headings([[], *map(head_lines, columns), ["seeds"]]), body, lefts=1)


def long_block(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A line per metric, a column per row."""
    head = stack_headings([["task"], ["metric"], *(wrap_heading(row.label) for row in rows)])
    body = [[c.task, column_heading(c), *(format_cell(c, row) for row in rows)] for c in columns]
    return align_columns(head, [*body, ["", "seeds", *(str(row.num_seeds) for row in rows)]], lefts=2)


def head_lines(column: Column) -> list[str]:
    """The heading of a column in lines: the task above its metric, a Delta's name above its arrow."""
    if column.task:
        return [column.task, column_heading(column)]
    return [*wrap_heading(column.metric), column_heading(column).removeprefix(column.metric).strip()]


def wrap_heading(text: str) -> list[str]:
    return textwrap.wrap(text, HEAD_WIDTH, break_on_hyphens=False, break_long_words=False) or [""]


def stack_headings(heads: Sequence[list[str]]) -> Grid:
    """Headings of several lines, resting on the lowest, as lines of a grid."""
    height = max(map(len, heads))
    full = [[""] * (height - len(lines)) + lines for lines in heads]
    return [[lines[i] for lines in full] for i in range(height)]


def align_columns(head: Grid, body: Grid, lefts: int) -> str:
    """Columns of equal width, the first ``lefts`` flush left; "±" and the numbers before it stand below each other."""
    for i in range(lefts, len(head[0])):
        tail = max(len(row[i].partition(" ± ")[2]) for row in body)
        if tail:
            for row in body:
                row[i] += " " * (tail + 3 - (len(row[i]) - len(row[i].partition(" ± ")[0]))) if row[i] else ""
    widths = [max(len(row[i]) for row in [*head, *body]) for i in range(len(head[0]))]
    gap = 3 if sum(widths) + 3 * (len(widths) - 1) <= WIDTH else 2

    def line(row: list[str]) -> str:
        cells = [text.ljust(w) if i < lefts else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths))]
        return (" " * gap).join(cells).rstrip()

    rule = "-" * (sum(widths) + gap * (len(widths) - 1))
    return "\n".join([*map(line, head), rule, *map(line, body)])


# Markdown


def render_markdown(comparison: Comparison) -> str:
    columns, rows = comparison.columns, comparison.rows
    bold = {column: find_best(column, rows) for column in columns}

    def strong(column: Column, i: int) -> str:
        text = format_cell(column, rows[i])
        mean, _, std = text.partition(" ± ")
        return f"**{mean}**" + (f" ± {std}" if std else "") if bold[column][i] else text

    if is_transposed(columns):
        head = ["task", "metric", *(markdown_code(row.label) for row in rows)]
        body = [[c.task, column_heading(c), *(strong(c, i) for i in range(len(rows)))] for c in columns]
        body.append(["", "seeds", *(str(row.num_seeds) for row in rows)])
        blocks = [markdown_table(head, body, lefts=2)]
    else:
        head = ["run", *(escape_markdown(f"{c.task} {column_heading(c)}".strip()) for c in columns), "seeds"]
        body = [
            [markdown_code(row.label), *(strong(c, i) for c in columns), str(row.num_seeds)]
            for i, row in enumerate(rows)
        ]
        blocks = [markdown_table(head, body, lefts=1)]
    for one in comparison.differences:
        grid = difference_grid(one)
        body = [[escape_markdown(row[0]), *row[1:]] for row in grid[1:]]
        blocks.append("{} minus {}, paired over seeds:".format(*map(markdown_code, title(one))))
        blocks.append(markdown_table(grid[0], body, lefts=1))
    return "\n\n".join([*blocks, "\n".join(f"- {note}" for note in footnotes(comparison))]) + "\n"


def markdown_code(label: str) -> str:
    """A row's name, as code if it is made of config keys or a path."""
    return f"`{escape_markdown(label)}`" if re.search("[=/_*]", label) else escape_markdown(label)


def escape_markdown(text: str) -> str:
    return text.replace("|", r"\|")


def markdown_table(head: list[str], body: Grid, lefts: int) -> str:
    rule = ["---" if i < lefts else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


# LaTeX


def render_latex(comparison: Comparison) -> str:
    columns, rows = comparison.columns, comparison.rows
    bold = {column: find_best(column, rows) for column in columns}

    def strong(column: Column, i: int) -> str:
        mean, _, std = format_cell(column, rows[i]).partition(" ± ")
        text = rf"\textbf{{{mean.replace('-', '$-$')}}}" if bold[column][i] else latex_minus(mean)
        return text + (rf" $\pm$ {std}" if std else "")

    if is_transposed(columns):
        head = [["task", "metric", *(escape_latex(row.label) for row in rows)]]
        body = [[escape_latex(c.task), latex_heading(c), *(strong(c, i) for i in range(len(rows)))] for c in columns]
        body.append(["", "seeds", *(str(row.num_seeds) for row in rows)])
        lefts, rules = 2, {len(body) - 1}
    else:
        head = [["", *(escape_latex(c.task) for c in columns), ""], ["", *map(latex_heading, columns), "seeds"]]
        body = [
            [escape_latex(row.label), *(strong(c, i) for c in columns), str(row.num_seeds)]
            for i, row in enumerate(rows)
        ]
        lefts, rules = 1, {i + 1 for i, row in enumerate(rows) if row.is_baseline}
    blocks = ["% needs \\usepackage{booktabs}", latex_table(head, body, lefts, rules)]
    for one in comparison.differences:
        grid = difference_grid(one)
        body = [[latex_name(row[0]), *map(latex_minus, row[1:])] for row in grid[1:]]
        blocks.append("\n% {} minus {}, paired over seeds".format(*title(one)))
        blocks.append(latex_table([[escape_latex(text) for text in grid[0]]], body, lefts=1, rules=set()))
    return "\n".join([*blocks, "", *(f"% {note}" for note in footnotes(comparison))]) + "\n"


def escape_latex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(LATEX.get(character, character) for character in text)


def latex_heading(column: Column) -> str:
    return latex_name(column_heading(column))


def latex_name(text: str) -> str:
    """A heading with its Delta and its unit as they are set in papers."""
    text = escape_latex(text).replace("(deg)", r"($^\circ$)")
    for name in ("MTL", "on/off"):
        text = text.replace(rf"Delta\_{name}", rf"$\Delta_{{\mathrm{{{name}}}}}$")
    return text.replace("Delta vs.", r"$\Delta$ vs.")


def latex_minus(text: str) -> str:
    """Negative numbers with a minus sign; a lone dash stays one."""
    return re.sub(r"-(\d[\d.]*)", r"$-$\1", text)


def latex_table(head: Grid, body: Grid, lefts: int, rules: set[int]) -> str:
    """A booktabs table; ``rules``: before which lines of the body a rule stands."""
    columns = "l" * lefts + "c" * (len(head[0]) - lefts)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *(" & ".join(row) + r" \\" for row in head), r"\midrule"]
    for i, row in enumerate(body):
        lines += [r"\midrule"] * (i in rules and 0 < i < len(body)) + [" & ".join(row) + r" \\"]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


# CSV


def render_csv(comparison: Comparison) -> str:
    """A line per row, full precision, fractions as fractions, Deltas in percent; empty where there is nothing."""
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
        line: list[object] = [row.label, row.num_seeds]
        for column in columns:
            found = row.summarize(column)
            line += [found.mean, found.std]
        if differences:
            one = differences.get(id(row))
            line.append("" if one is None else one.reference.label)
            for column in columns:
                pair = None if one is None else one.columns.get(column)
                adjusted_p_values = (
                    None if one is None or one.adjusted_p_values is None else one.adjusted_p_values.get(column)
                )
                line += [None] * len(parts) if pair is None else [*pair, adjusted_p_values][: len(parts)]
        lines.append(line)
    return format_csv(lines)


def format_csv(lines: Iterable[Sequence[object]]) -> str:
    """Lines as CSV. Numbers stay numbers, None and NaN are empty; a text that a spreadsheet could take for a formula
    gets an apostrophe before it, control characters are escaped."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([map(format_csv_cell, line) for line in lines])
    return buffer.getvalue()


def format_csv_cell(value: object) -> object:
    """
    >>> csv_cell("=1+1"), csv_cell(-1.5), csv_cell("\\t@x"), csv_cell(float("nan"))
    ("'=1+1", -1.5, "'\\\\t@x", None)
    """
    if isinstance(value, float) and math.isnan(value):
        return None
    if not isinstance(value, str):
        return value
    return f"'{escape_control_characters(value)}" if value.startswith(FORMULA) else escape_control_characters(value)
