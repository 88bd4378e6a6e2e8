"""Write a report as one HTML file.

Everything that was read from a run goes through :func:`escape` or :func:`embed_json`, never into markup as it is.
"""

import base64
import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from mtcl.config.schema import flatten, role_of
from mtcl.results.columns import Column
from mtcl.results.comparability import DATA_KEYS, join_some
from mtcl.results.compare import Comparison
from mtcl.results.html import charts
from mtcl.results.html.collect import ReportData, ReportFolder, ReportRow
from mtcl.results.html.images import build_image_grid
from mtcl.results.row_labels import format_setting
from mtcl.results.rows import Row
from mtcl.results.runs import Run, differing_keys
from mtcl.results.tables import (
    NO_VALUE,
    TOO_FEW,
    column_heading,
    difference_unit,
    footnotes,
    format_interval,
    format_mean,
    format_value,
    verdict,
)
from mtcl.run_folder import CONFIG, RECORD
from mtcl.version import __version__

MAX_UNSCROLLED_ROWS = 25  # of a table; longer ones scroll
MAX_SETTINGS_ROWS = 200  # of the table of settings that differ
MAX_SETTINGS_COLUMNS = 16
MAX_VALUES = 6  # of a setting, in the list of all settings
# Keys of run.json that differ by run, and those that are listed among the settings.
PER_RUN = (
    *("command", "overrides", "seed", "step", "seconds", "checkpoint", "predictions", "evaluation."),
    *("best_step", "validations_without_improvement"),
)


def render_page(report: ReportData, title: str) -> str:
    """Return the HTML page, which needs no network: its content security policy forbids all requests."""
    data, log_problems = charts.chart_data(report)
    grid, image_problems = build_image_grid(report.rows)
    data["wall"] = grid.content
    problems = {
        folder.path: [
            *folder.problems,
            *log_problems.get(folder.path, ()),
            *image_problems.get(folder.path, ()),
        ]
        for folder in report.folders
    }
    style, script = asset("page.css"), asset("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{digest(style)}'; script-src '{digest(script)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
    parts = [
        section("results", "Results", results(report)),
        section("sweeps", "Sweeps", sweeps(data["swept"])),
        section("curves", "Curves", curves(report.rows, data["curves"])),
        section("images", "Images", images(grid.content, grid.notes)),
        section("settings", "Settings", settings(report.rows, report.folders)),
        section("runs", "Runs", runs(report, problems)),
        section("environment", "Environment", environment(report.folders)),
    ]
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#results">Skip to the results</a>
<header>
<div class="top"><h1>{escape(title)}</h1><button type="button" id="theme" hidden></button></div>
<p class="lead">{escape(count_runs(report))}</p>
<nav aria-label="Sections"><ul>
{"".join(f'<li><a href="#{name}">{name.capitalize()}</a></li>' for name in SECTIONS)}
</ul></nav>
</header>
<noscript><p class="banner">Without JavaScript there are tables here, but no curves and no images.</p></noscript>
<main>
{"".join(parts)}
</main>
<footer><p>mtcl {escape(__version__)}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. One file, no network.</p></footer>
<dialog id="viewer" aria-labelledby="viewer-title"></dialog>
<script type="application/json" id="data">{embed_json(data)}</script>
<script>{script}</script>
</body>
</html>
"""
    return text.encode("utf-8", "replace").decode()  # file names may be invalid text


SECTIONS = ("results", "sweeps", "curves", "images", "settings", "runs", "environment")


def asset(name: str) -> str:
    """Read a file beside this module."""
    return files("mtcl.results.html").joinpath(name).read_text("utf-8")


def digest(text: str) -> str:
    """Return the hash by which a Content-Security-Policy allows a text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def escape(value: Any) -> str:
    """Return a value as HTML text."""
    return html.escape(str(value))


def embed_json(content: Any) -> str:
    """Return JSON that may be put into a script element: ASCII without <, > and &."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def format_name(text: str) -> str:
    """Return a user's name as markup: isolated in its text direction, breakable between its parts."""
    breakable = re.sub("([,/_=])", r"\1<wbr>", escape(text))
    return f'<bdi class="name">{breakable}</bdi>'


def breakable(heading: str) -> str:
    """Return a column's heading as markup that breaks at spaces and underscores only."""
    return re.sub("(_+)", r"\1<wbr>", escape(heading))


def section(anchor: str, title: str, body: str) -> str:
    """Return a section with its heading."""
    head = f'<h2 id="{anchor}-title">{title}</h2>'
    return f'<section id="{anchor}" aria-labelledby="{anchor}-title">{head}\n{body}</section>\n'


def table(caption: str, head: Sequence[str], body: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table of cells that are markup already; the first of a line is its heading."""
    body = list(body)
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>\n'
        for first, *rest in body
    )
    return scrollable(
        caption,
        f'<table class="{kind}"><caption class="hidden">{escape(caption)}</caption><thead><tr>{top}</tr></thead>\n'
        f"<tbody>{lines}</tbody></table>",
        len(body) if kind != "keys" else 0,
    )


def scrollable(label: str, inner: str, rows: int = 0) -> str:
    """Wrap wide content, or a table of many rows, so that it scrolls by itself, by keyboard as well."""
    kind = "scroll tall" if rows > MAX_UNSCROLLED_ROWS else "scroll"
    return f'<div class="{kind}" role="region" tabindex="0" aria-label="{escape(label)}">{inner}</div>\n'


def bullets(sentences: Sequence[str], kind: str = "notes") -> str:
    """Return the distinct sentences as a list; "" without sentences."""
    items = "".join(f"<li{mark(s)}>{escape(s)}</li>" for s in dict.fromkeys(sentences))
    return f'<ul class="{kind}">{items}</ul>\n' if items else ""


def mark(sentence: str) -> str:
    """Return the attribute that highlights a warning."""
    return ' class="warning"' if sentence.startswith("warning:") else ""


def plural(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count} {noun}{'s' * (count != 1)}"


def count_runs(report: ReportData) -> str:
    """Return the numbers of runs, rows and states, and the tasks."""
    states = Counter(folder.state for folder in report.folders)
    parts = [plural(len(report.folders), "run")]
    if report.comparison:
        parts.append(plural(len(report.comparison.rows), "row"))
    parts += [f"{states[state]} {state}" for state in ("running", "unfinished", "broken") if states[state]]
    tasks = dict.fromkeys(c.task for c in (report.comparison.columns if report.comparison else ()) if c.task)
    return ", ".join(parts) + (f". Tasks: {', '.join(tasks)}." if tasks else ".")


# Results


def results(report: ReportData) -> str:
    """Return the section of the table and the differences."""
    comparison = report.comparison
    if comparison is None:
        return '<p class="banner">No run has finished yet, so there is no table.</p>'
    banner = ""
    if report.unranked_reason:
        banner = f'<p class="banner" id="unranked"><strong>Not ranked.</strong> {escape(report.unranked_reason)}</p>\n'
    parts = [banner, main_table(comparison, not report.unranked_reason), bullets(footnotes(comparison))]
    if comparison.differences:
        parts += ["<h3>Differences, paired over seeds</h3>\n", difference_table(comparison)]
    return "".join(parts)


def main_table(comparison: Comparison, ranked: bool) -> str:
    """Return the table of metrics; ``ranked``: mark the best rows."""
    best = charts.find_all_best(comparison.columns, comparison.rows, ranked)
    heads = ['<th scope="col" aria-sort="none"><button type="button" class="sort">row</button></th>']
    for column in comparison.columns:
        lines = [column.task, column_heading(column)] if column.task else [column_heading(column)]
        text = "<br>".join(map(breakable, lines))
        heads.append(f'<th scope="col" aria-sort="none"><button type="button" class="sort">{text}</button></th>')
    heads.append('<th scope="col" aria-sort="none"><button type="button" class="sort">seeds</button></th>')
    scored = [", ".join(dict.fromkeys(map(scored_on, row.runs))) for row in comparison.rows]
    heads += ['<th scope="col">scored on</th>'] * (len(set(scored)) > 1)
    body = []
    for i, row in enumerate(comparison.rows):
        cells = [main_cell(column, row, best[column][i]) for column in comparison.columns]
        count = f'<td data-value="{row.num_seeds}">{row.num_seeds}</td>'
        kind = ' class="baseline"' if row.is_baseline else ""
        data = f"<td>{escape(scored[i])}</td>" if len(set(scored)) > 1 else ""
        body.append(f'<tr{kind}><th scope="row">{format_name(row.label)}</th>{"".join(cells)}{count}{data}</tr>\n')
    legend = "Bold: the best mean of a column. " if any(map(any, best.values())) else ""
    legend += f"{len(body)} rows: the table scrolls. " if len(body) > MAX_UNSCROLLED_ROWS else ""
    return (
        scrollable(
            "Results",
            '<table class="numbers" id="table"><caption class="hidden">Metrics of each row, mean and deviation over '
            f"seeds</caption><thead><tr>{''.join(heads)}</tr></thead>\n<tbody>{''.join(body)}</tbody></table>",
            len(body),
        )
        + f'<p class="hint">{legend}↑ higher is better, ↓ lower is better. A heading sorts.</p>\n'
    )


def scored_on(run: Run) -> str:
    """Return a run's validation data in brief; "" if it is unknown."""
    templates = ("{}", "{} images", "data {}")
    return ", ".join(
        template.format(run.record[key])
        for template, key in zip(templates, DATA_KEYS)
        if run.record.get(key) is not None
    )


def main_cell(column: Column, row: Row, is_best: bool) -> str:
    """Return the cell of a metric: mean and deviation, with the mean as its sort value."""
    summary = row.summarize(column)
    text = format_mean(column, row)
    value = "" if text == NO_VALUE else f"{0.0 if text == '0.00' else summary.mean:.9g}"
    std = format_value(column, summary.std).lstrip("+")
    spread = "" if std == NO_VALUE else f"± {std}"
    inner = f'<b>{text}</b><span class="hidden"> (best)</span>' if is_best else text
    kind = ' class="best"' if is_best else ""
    return f'<td{kind} data-value="{value}">{inner} <span class="spread">{spread}</span></td>'


def difference_table(comparison: Comparison) -> str:
    """Return the table of paired differences."""
    columns = [c for c in comparison.columns if any(c in one.columns for one in comparison.differences)]
    references = dict.fromkeys(one.reference.label for one in comparison.differences)
    has_one_reference = len(references) == 1
    head = ["row", *(f"{breakable(c.task)}<br>{breakable(unit_heading(c))}" for c in columns), "pairs"]
    body = []
    for one in comparison.differences:
        cells = []
        for column in columns:
            pair = one.columns.get(column)
            if pair is None:
                cells.append(NO_VALUE)
                continue
            side = verdict(column, pair, (one.adjusted_p_values or {}).get(column))
            decision = {"yes, better": "better", "yes, worse": "worse", TOO_FEW: TOO_FEW}.get(side, "")
            mean = format_value(column, pair.mean, signed=True)
            span = format_interval(column, pair)
            cells.append(
                f'{mean}<br><span class="spread">{"" if span == NO_VALUE else span}</span>'
                + (
                    f'<br><span class="verdict {"" if decision == TOO_FEW else decision}">{decision}</span>'
                    if decision
                    else ""
                )
            )
        pairs = sorted({pair.pairs for pair in one.columns.values()})
        rows = format_name(one.row.label) + ("" if has_one_reference else f" minus {format_name(one.reference.label)}")
        body.append([rows, *cells, join_some([str(p) for p in pairs])])
    intro = f"<p>Each row minus {format_name(next(iter(references)))}.</p>\n" if has_one_reference else ""
    decided = "the interval excludes zero"
    if any(one.adjusted_p_values is not None for one in comparison.differences):
        decided = "the p-value, corrected for the number of intervals by Holm's method, is below 0.05"
    hint = f"Mean and 95 % interval; “better” and “worse” where {decided}, of three pairs or more."
    return intro + table("Differences, paired over seeds", head, body, "numbers") + f'<p class="hint">{hint}</p>\n'


def unit_heading(column: Column) -> str:
    """Return metric, direction and the unit of a difference."""
    unit = difference_unit(column)
    return f"{column.metric} {'↑' if column.higher_is_better else '↓'}" + (f" ({unit})" if unit else "")


# What page.js draws


def sweeps(swept: Mapping[str, Any]) -> str:
    """Return the section of metrics over swept settings, which page.js fills."""
    if not swept:
        return '<p class="empty">No numeric setting differs between the rows.</p>'
    lines = (
        '<div class="bar"><label>setting <select id="sweep-key"></select></label></div>\n'
        '<div class="charts" id="sweep-charts"></div>\n'
        '<p class="hint">Bars: standard deviation over seeds. Rows that differ in this setting only are joined.</p>\n'
    )
    if len(swept) < 2:
        return lines
    return lines + (
        "<h3>All swept settings together</h3>\n"
        '<div class="bar"><label>colour by <select id="parallel-by"></select></label>'
        '<span id="parallel-scale" class="scale"></span></div>\n'
        '<div class="scroll" role="region" tabindex="0" aria-label="Parallel coordinates" id="parallel"></div>\n'
        '<p class="hint">A line per row; on the axes of metrics, up is better. Point at a line, or step through the '
        "rows with the arrow keys.</p>\n"
    )


def curves(rows: Sequence[ReportRow], drawn: Mapping[str, Any]) -> str:
    """Return the section of curves, which page.js fills."""
    if not drawn["charts"]:
        return '<p class="empty">No run has a log with curves in it.</p>'
    notes = []
    if len(rows) > charts.MAX_CURVES:
        notes.append(f"The first {charts.MAX_CURVES} of {len(rows)} rows are shown, to keep file and curves legible.")
    if drawn["width"] > 1:
        notes.append(f"Losses are means over {drawn['width']} steps.")
    notes.append("Several seeds: their mean, and the band from the lowest to the highest.")
    return (
        '<div id="legend" class="legend"></div>\n<div id="curve-charts"></div>\n'
        '<p class="hint">Point at a curve for its values, or choose a chart and use the arrow keys.</p>\n'
        + bullets(notes)
    )


def images(content: Sequence[Any], notes: Sequence[str]) -> str:
    """Return the section of the image grid, which page.js fills."""
    if not content:
        return '<p class="empty">No run has images.</p>' + bullets(notes)
    return (
        '<div class="bar" id="wall-bar"></div>\n<div id="wall"></div>\n'
        + bullets(notes)
        + "<h3>Two side by side</h3>\n"
        '<div id="slider"></div>\n'
    )


# Settings, runs, environment


def settings(rows: Sequence[ReportRow], folders: Sequence[ReportFolder]) -> str:
    """Return the section of the settings: those that differ, then all."""
    configs = [folder.config for folder in folders if folder.config]
    if not configs:
        return f'<p class="empty">No run has a {CONFIG}.</p>'
    keys = [key for key in differing_keys(configs) if role_of(key) not in ("seed", "record")]
    parts = []
    if not keys:
        parts.append("<p>The runs differ in nothing but seed and name.</p>\n" if len(configs) > 1 else "")
    else:
        displayed = keys[:MAX_SETTINGS_COLUMNS]
        body = [
            [format_name(row.label), *(escape(format_values(row, key)) for key in displayed)]
            for row in rows[:MAX_SETTINGS_ROWS]
            if any(folder.config for folder in row.folders)
        ]
        parts.append("<h3>What differs</h3>\n")
        parts.append(
            table("Settings that differ", ["row", *(breakable_key(key) for key in displayed)], body, "settings")
        )
        notes = [f"{len(keys) - len(displayed)} more settings differ; they are marked below."] * (
            len(keys) > len(displayed)
        )
        if len(rows) > MAX_SETTINGS_ROWS:
            notes.append(f"The first {MAX_SETTINGS_ROWS} of {len(rows)} rows are shown.")
        parts.append(bullets(notes))
    parts.append(list_values("All settings", configs, is_open=False))
    return "".join(parts)


def format_values(row: ReportRow, key: str) -> str:
    """Return the values of a setting in a row's runs."""
    values = dict.fromkeys(format_setting(folder.config.get(key)) for folder in row.folders if folder.config)
    return join_some(list(values))


def breakable_key(key: str) -> str:
    """Return a dotted key as markup that breaks after its dots."""
    return escape(key).replace(".", ".<wbr>")


def list_values(title: str, settings: Sequence[Mapping[str, Any]], is_open: bool) -> str:
    """Return a foldable table of every key with its value or, marked, its values and how many runs have each."""
    body = []
    num_different = 0
    for key in dict.fromkeys(key for one in settings for key in one):
        counts = Counter(format_setting(one[key]) if key in one else "(missing)" for one in settings)
        if len(counts) == 1:
            body.append([f"<code>{breakable_key(key)}</code>", f"<span>{escape(next(iter(counts)))}</span>"])
            continue
        num_different += 1
        values = [f"{escape(value)} <small>({count})</small>" for value, count in counts.most_common(MAX_VALUES)]
        values += [f"and {len(counts) - MAX_VALUES} more values"] * (len(counts) > MAX_VALUES)
        body.append([f"<code>{breakable_key(key)}</code>", f"<mark>differs</mark> {'; '.join(values)}"])
    summary = f"{title} ({len(body)}" + (f", {num_different} differ" if num_different else "") + ")"
    inner = table(title, ["key", "value"], body, "keys")
    return f"<details{' open' * is_open}><summary>{escape(summary)}</summary>{inner}</details>\n"


def runs(report: ReportData, problems: Mapping[Path, Sequence[str]]) -> str:
    """Return the section of the run folders and of what they lack."""
    row_labels = {folder.path.resolve(): row.label for row in report.rows for folder in row.folders}
    body, incomplete = [], []
    for folder in report.folders:
        step = NO_VALUE if folder.step is None else f"{folder.step}"
        step += f" / {folder.max_steps}" if folder.max_steps is not None else ""
        seconds = folder.record.get("seconds")
        time = format_duration(seconds) if isinstance(seconds, int | float) else NO_VALUE
        body.append(
            [
                format_name(folder.name),
                format_name(row_labels.get(folder.path.resolve(), "baseline")),
                escape(NO_VALUE if folder.seed is None else folder.seed),
                f'<span class="state {folder.state}">{folder.state}</span>',
                step,
                time,
                folder.last_modified,
            ]
        )
        if problems[folder.path]:
            sentences = " ".join(dict.fromkeys(problems[folder.path]))
            incomplete.append(f"<li>{format_name(folder.name)}: {escape(sentences)}</li>")
    head = ["folder", "row", "seed", "state", "step", "time", "last written"]
    listing = table("Runs", head, body, "plain")
    if len(body) > 30:
        listing = f"<details><summary>All {len(body)} runs</summary>{listing}</details>\n"
    if not incomplete:
        return listing
    missing = f'<ul class="notes">{"".join(incomplete)}</ul>'
    if len(incomplete) > 12:
        missing = f"<details><summary>{len(incomplete)} runs lack something</summary>{missing}</details>"
    return listing + "<h3>What is missing</h3>\n" + missing


def format_duration(seconds: float) -> str:
    """Format a duration as hours and minutes, or minutes and seconds."""
    if not 0 <= seconds < 1e9:
        return NO_VALUE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def environment(folders: Sequence[ReportFolder]) -> str:
    """Return the section of machines, versions and commands."""
    records = [
        {key: value for key, value in flatten(folder.record) if not key.startswith(PER_RUN)}
        for folder in folders
        if folder.record
    ]
    if not records:
        return f'<p class="empty">No run has a {RECORD}, so machines and versions are unknown.</p>'
    commands = [folder.record.get("command") for folder in folders if isinstance(folder.record.get("command"), str)]
    items = "".join(f"<li><code>{escape(command)}</code></li>" for command in dict.fromkeys(commands[:20]))
    more = f"<li>and {len(commands) - 20} more</li>" if len(commands) > 20 else ""
    listing = f"<details><summary>Commands</summary><ul class='notes'>{items}{more}</ul></details>\n" if items else ""
    return list_values(f"{RECORD} of all runs", records, is_open=len(folders) < 30) + listing
