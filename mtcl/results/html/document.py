"""The HTML file. What was read from a run goes through :func:`escape` or :func:`embed_json`, never into markup as it is."""

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

from mtcl.config.schema import flatten
from mtcl.results.columns import Column
from mtcl.results.comparability import DATA_KEYS, join_some
from mtcl.results.compare import Comparison
from mtcl.results.html import figures
from mtcl.results.html.collect import ReportData, ReportRow, ReportRun
from mtcl.results.html.images import build_image_grid
from mtcl.results.row_labels import format_setting
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
from mtcl.version import __version__

MOST_AT_ONCE = 25  # rows of a table that is shown whole
MOST_DIFFERENT = 200  # rows of the table of settings that differ
MOST_COLUMNS = 16  # of it
MOST_VALUES = 6  # of a setting, in the list of all
# Facts of a run alone, and those that stand among its settings.
PER_RUN = ("command", "overrides", "seed", "step", "seconds", "checkpoint", "predictions", "evaluation.")


def document(collection: ReportData, title: str) -> str:
    """The page. Nothing in it asks the network for anything, and its policy forbids that."""
    data, told = figures.data(collection)
    wall, without = build_image_grid(collection.lines)
    data["wall"] = wall.content
    problems = {
        folder.path: [*folder.problems, *told.get(folder.path, ()), *without.get(folder.path, ())]
        for folder in collection.folders
    }
    style, script = asset("page.css"), asset("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{digest(style)}'; script-src '{digest(script)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
    parts = [
        section("results", "Results", results(collection)),
        section("sweeps", "Sweeps", sweeps(data["swept"])),
        section("curves", "Curves", curves(collection.lines, data["curves"])),
        section("pictures", "Pictures", pictures(wall.content, wall.notes)),
        section("settings", "Settings", settings(collection.lines, collection.folders)),
        section("runs", "Runs", runs(collection, problems)),
        section("environment", "Environment", environment(collection.folders)),
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
<p class="lead">{escape(counted(collection))}</p>
<nav aria-label="Sections"><ul>
{"".join(f'<li><a href="#{name}">{name.capitalize()}</a></li>' for name in SECTIONS)}
</ul></nav>
</header>
<noscript><p class="banner">Without JavaScript there are tables here, but no curves and no pictures.</p></noscript>
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
    return text.encode("utf-8", "replace").decode()  # a file's name need not be text


SECTIONS = ("results", "sweeps", "curves", "pictures", "settings", "runs", "environment")


def asset(name: str) -> str:
    return files("mtcl.results.html").joinpath(name).read_text("utf-8")


def digest(text: str) -> str:
    """As a Content-Security-Policy names what it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def escape(value: Any) -> str:
    return html.escape(str(value))


def embed_json(content: Any) -> str:
    """JSON that can stand within a script element: ASCII, and nothing that markup begins with."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def name(text: str) -> str:
    """Words of a user: their direction is their own, and they may be broken where their parts end."""
    breakable = re.sub("([,/_=])", r"\1<wbr>", escape(text))
    return f'<bdi class="name">{breakable}</bdi>'


def breakable(column_heading: str) -> str:
    """A column's heading as markup; it breaks at spaces and underscores only, never inside a word."""
    return re.sub("(_+)", r"\1<wbr>", escape(column_heading))


def section(anchor: str, title: str, body: str) -> str:
    head = f'<h2 id="{anchor}-title">{title}</h2>'
    return f'<section id="{anchor}" aria-labelledby="{anchor}-title">{head}\n{body}</section>\n'


def table(caption: str, head: Sequence[str], body: Iterable[Sequence[str]], kind: str = "") -> str:
    """Of cells that are markup already; each line's first heads it."""
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


def scrollable(what: str, inner: str, rows: int = 0) -> str:
    """Wide things, and tables of many rows, scroll by themselves, by keys as well."""
    kind = "scroll tall" if rows > MOST_AT_ONCE else "scroll"
    return f'<div class="{kind}" role="region" tabindex="0" aria-label="{escape(what)}">{inner}</div>\n'


def bullets(sentences: Sequence[str], kind: str = "notes") -> str:
    items = "".join(f"<li{mark(s)}>{escape(s)}</li>" for s in dict.fromkeys(sentences))
    return f'<ul class="{kind}">{items}</ul>\n' if items else ""


def mark(sentence: str) -> str:
    return ' class="warning"' if sentence.startswith("warning:") else ""


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def counted(collection: ReportData) -> str:
    states = Counter(folder.state for folder in collection.folders)
    parts = [plural(len(collection.folders), "run")]
    if collection.comparison:
        parts.append(plural(len(collection.comparison.rows), "row"))
    parts += [f"{states[state]} {state}" for state in ("running", "unfinished", "broken") if states[state]]
    tasks = dict.fromkeys(c.task for c in (collection.comparison.columns if collection.comparison else ()) if c.task)
    return ", ".join(parts) + (f". Tasks: {', '.join(tasks)}." if tasks else ".")


# Results


def results(collection: ReportData) -> str:
    found = collection.comparison
    if found is None:
        return '<p class="banner">No run has finished yet, so there is no table.</p>'
    banner = ""
    if collection.unranked:
        banner = f'<p class="banner" id="unranked"><strong>Not ranked.</strong> {escape(collection.unranked)}</p>\n'
    parts = [banner, main_table(found, not collection.unranked), bullets(footnotes(found))]
    if found.differences:
        parts += ["<h3>Differences, paired over seeds</h3>\n", difference_table(found)]
    return "".join(parts)


def main_table(found: Comparison, ranked: bool) -> str:
    best = figures.find_all_best(found.columns, found.rows, ranked)
    heads = ['<th scope="col" aria-sort="none"><button type="button" class="sort">row</button></th>']
    for column in found.columns:
        lines = [column.task, column_heading(column)] if column.task else [column_heading(column)]
        text = "<br>".join(map(breakable, lines))
        heads.append(f'<th scope="col" aria-sort="none"><button type="button" class="sort">{text}</button></th>')
    heads.append('<th scope="col" aria-sort="none"><button type="button" class="sort">seeds</button></th>')
    scored = [", ".join(dict.fromkeys(map(scored_on, row.runs))) for row in found.rows]
    heads += ['<th scope="col">scored on</th>'] * (len(set(scored)) > 1)
    body = []
    for i, row in enumerate(found.rows):
        cells = [main_cell(column, row, best[column][i]) for column in found.columns]
        count = f'<td data-value="{row.num_seeds}">{row.num_seeds}</td>'
        kind = ' class="baseline"' if row.is_baseline else ""
        data = f"<td>{escape(scored[i])}</td>" if len(set(scored)) > 1 else ""
        body.append(f'<tr{kind}><th scope="row">{name(row.label)}</th>{"".join(cells)}{count}{data}</tr>\n')
    legend = "Bold: the best mean of a column. " if any(map(any, best.values())) else ""
    legend += f"{len(body)} rows: the table scrolls. " if len(body) > MOST_AT_ONCE else ""
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
    """Its validation data in a few words, "" where nothing is known of it."""
    words = ("{}", "{} pictures", "data {}")
    return ", ".join(
        word.format(run.record[key]) for word, key in zip(words, DATA_KEYS) if run.record.get(key) is not None
    )


def main_cell(column: Column, row: Any, is_best: bool) -> str:
    found = row.summarize(column)
    text = format_mean(column, row)
    value = "" if text == NO_VALUE else f"{0.0 if text == '0.00' else found.mean:.9g}"
    std = format_value(column, found.std).lstrip("+")
    spread = "" if std == NO_VALUE else f"± {std}"
    inner = f'<b>{text}</b><span class="hidden"> (best)</span>' if is_best else text
    kind = ' class="best"' if is_best else ""
    return f'<td{kind} data-value="{value}">{inner} <span class="spread">{spread}</span></td>'


def difference_table(found: Comparison) -> str:
    columns = [c for c in found.columns if any(c in one.columns for one in found.differences)]
    references = dict.fromkeys(one.reference.label for one in found.differences)
    of_one = len(references) == 1
    head = ["row", *(f"{breakable(c.task)}<br>{breakable(unit_heading(c))}" for c in columns), "pairs"]
    body = []
    for one in found.differences:
        cells = []
        for column in columns:
            pair = one.columns.get(column)
            if pair is None:
                cells.append(NO_VALUE)
                continue
            side = verdict(column, pair, (one.adjusted_p_values or {}).get(column))
            word = {"yes, better": "better", "yes, worse": "worse", TOO_FEW: TOO_FEW}.get(side, "")
            mean = format_value(column, pair.mean, signed=True)
            span = format_interval(column, pair)
            cells.append(
                f'{mean}<br><span class="spread">{"" if span == NO_VALUE else span}</span>'
                + (f'<br><span class="verdict {"" if word == TOO_FEW else word}">{word}</span>' if word else "")
            )
        pairs = sorted({pair.pairs for pair in one.columns.values()})
        rows = name(one.row.label) + ("" if of_one else f" minus {name(one.reference.label)}")
        body.append([rows, *cells, join_some([str(p) for p in pairs])])
    told = f"<p>Each row minus {name(next(iter(references)))}.</p>\n" if of_one else ""
    decided = "the interval excludes zero"
    if any(one.adjusted_p_values is not None for one in found.differences):
        decided = "the p-value, corrected for the number of intervals by Holm's method, is below 0.05"
    hint = f"Mean and 95 % interval; “better” and “worse” where {decided}, of three pairs or more."
    return told + table("Differences, paired over seeds", head, body, "numbers") + f'<p class="hint">{hint}</p>\n'


def unit_heading(column: Column) -> str:
    unit = difference_unit(column)
    return f"{column.metric} {'↑' if column.higher_is_better else '↓'}" + (f" ({unit})" if unit else "")


# What page.js draws


def sweeps(swept: Mapping[str, Any]) -> str:
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


def curves(lines: Sequence[ReportRow], drawn: Mapping[str, Any]) -> str:
    if not drawn["charts"]:
        return '<p class="empty">No run has a log with curves in it.</p>'
    notes = []
    if len(lines) > figures.MOST_CURVES:
        notes.append(f"The first {figures.MOST_CURVES} of {len(lines)} rows are here, to keep file and curves legible.")
    if drawn["width"] > 1:
        notes.append(f"Losses are means over {drawn['width']} steps.")
    notes.append("Several seeds: their mean, and the band from the lowest to the highest.")
    return (
        '<div id="legend" class="legend"></div>\n<div id="curve-charts"></div>\n'
        '<p class="hint">Point at a curve for its values, or choose a chart and use the arrow keys.</p>\n'
        + bullets(notes)
    )


def pictures(content: Sequence[Any], notes: Sequence[str]) -> str:
    if not content:
        return '<p class="empty">No run has pictures.</p>' + bullets(notes)
    return (
        '<div class="bar" id="wall-bar"></div>\n<div id="wall"></div>\n'
        + bullets(notes)
        + "<h3>Two side by side</h3>\n"
        '<div id="slider"></div>\n'
    )


# Settings, runs, environment


def settings(lines: Sequence[ReportRow], folders: Sequence[ReportRun]) -> str:
    known = [folder.config for folder in folders if folder.config]
    if not known:
        return '<p class="empty">No run has a config.yaml.</p>'
    keys = [key for key in differing_keys(known) if key not in ("seed", "name", "resume")]
    parts = []
    if not keys:
        parts.append("<p>The runs differ in nothing but seed and name.</p>\n" if len(known) > 1 else "")
    else:
        most = keys[:MOST_COLUMNS]
        body = [
            [name(line.label), *(escape(values_in(line, key)) for key in most)]
            for line in lines[:MOST_DIFFERENT]
            if any(folder.config for folder in line.folders)
        ]
        parts.append("<h3>What differs</h3>\n")
        parts.append(table("Settings that differ", ["row", *(breakable_key(key) for key in most)], body, "settings"))
        left = [f"{len(keys) - len(most)} more settings differ; they are marked below."] * (len(keys) > len(most))
        if len(lines) > MOST_DIFFERENT:
            left.append(f"The first {MOST_DIFFERENT} of {len(lines)} rows are here.")
        parts.append(bullets(left))
    parts.append(all_values("All settings", known, open_=False))
    return "".join(parts)


def values_in(line: ReportRow, key: str) -> str:
    values = dict.fromkeys(format_setting(folder.config.get(key)) for folder in line.folders if folder.config)
    return join_some(list(values))


def breakable_key(key: str) -> str:
    """A dotted key that may be broken after its dots."""
    return escape(key).replace(".", ".<wbr>")


def all_values(title: str, known: Sequence[Mapping[str, Any]], open_: bool) -> str:
    """Every key once, with its value or, marked, its values and how many runs have each."""
    body = []
    different = 0
    for key in dict.fromkeys(key for one in known for key in one):
        counts = Counter(format_setting(one[key]) if key in one else "(not there)" for one in known)
        if len(counts) == 1:
            body.append([f"<code>{breakable_key(key)}</code>", f"<span>{escape(next(iter(counts)))}</span>"])
            continue
        different += 1
        told = [f"{escape(value)} <small>({count})</small>" for value, count in counts.most_common(MOST_VALUES)]
        told += [f"and {len(counts) - MOST_VALUES} more values"] * (len(counts) > MOST_VALUES)
        body.append([f"<code>{breakable_key(key)}</code>", f"<mark>differs</mark> {'; '.join(told)}"])
    told_of = f"{title} ({len(body)}" + (f", {different} differ" if different else "") + ")"
    inner = table(title, ["key", "value"], body, "keys")
    return f"<details{' open' * open_}><summary>{escape(told_of)}</summary>{inner}</details>\n"


def runs(collection: ReportData, problems: Mapping[Path, Sequence[str]]) -> str:
    place = {folder.path.resolve(): line.label for line in collection.lines for folder in line.folders}
    body, troubled = [], []
    for folder in collection.folders:
        step = NO_VALUE if folder.step is None else f"{folder.step}"
        step += f" / {folder.max_steps}" if folder.max_steps is not None else ""
        seconds = folder.record.get("seconds")
        took = duration(seconds) if isinstance(seconds, int | float) else NO_VALUE
        body.append(
            [
                name(folder.name),
                name(place.get(folder.path.resolve(), "baseline")),
                escape(NO_VALUE if folder.seed is None else folder.seed),
                f'<span class="state {folder.state}">{folder.state}</span>',
                step,
                took,
                folder.last_modified,
            ]
        )
        if problems[folder.path]:
            sentences = " ".join(dict.fromkeys(problems[folder.path]))
            troubled.append(f"<li>{name(folder.name)}: {escape(sentences)}</li>")
    head = ["folder", "row", "seed", "state", "step", "took", "last written"]
    listing = table("Runs", head, body, "plain")
    if len(body) > 30:
        listing = f"<details><summary>All {len(body)} runs</summary>{listing}</details>\n"
    if not troubled:
        return listing
    missing = f'<ul class="notes">{"".join(troubled)}</ul>'
    if len(troubled) > 12:
        missing = f"<details><summary>{len(troubled)} runs lack something</summary>{missing}</details>"
    return listing + "<h3>What is missing</h3>\n" + missing


def duration(seconds: float) -> str:
    if not 0 <= seconds < 1e9:
        return NO_VALUE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def environment(folders: Sequence[ReportRun]) -> str:
    known = [
        {key: value for key, value in flatten(folder.record) if not key.startswith(PER_RUN)}
        for folder in folders
        if folder.record
    ]
    if not known:
        return '<p class="empty">No run has a run.json, so nothing is known of machines and versions.</p>'
    commands = [folder.record.get("command") for folder in folders if isinstance(folder.record.get("command"), str)]
    shown = "".join(f"<li><code>{escape(command)}</code></li>" for command in dict.fromkeys(commands[:20]))
    more = f"<li>and {len(commands) - 20} more</li>" if len(commands) > 20 else ""
    told = f"<details><summary>Commands</summary><ul class='notes'>{shown}{more}</ul></details>\n" if shown else ""
    return all_values("run.json of all runs", known, open_=len(folders) < 30) + told
