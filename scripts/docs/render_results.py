"""Render the tables of docs/results.md from the runs under docs/results/, or check that they are up to date.

    python scripts/docs/render_results.py [--check] [--add TABLE LABEL COMMAND RUN] [--add-output TABLE COMMAND FILE]

Each ``docs/results/TABLE.json`` contains rows: a label, the command that made the row, ``metrics`` (a run's
metrics.json) and ``run`` (its run.json). ``--add`` adds the metrics of the run folder RUN, replacing an earlier row of
that label. ``--add-output`` stores the output of a command, from FILE, to be rendered unchanged. A folder
``docs/results/TABLE/`` contains a study instead, a file per run (``scripts/study.py --results docs/results/TABLE``). A
table is rendered between ``<!-- table: TABLE -->`` and ``<!-- end -->``, in docs/results.md, docs/metrics.md,
docs/models.md, docs/foundation_backbones.md, docs/balancing.md and README.md. Options after TABLE choose what of a
study is rendered: ``means`` or ``differences`` alone, without notes and settings; ``holm`` and
``metrics=TASK/METRIC,...`` are options of ``study.py``.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtcl.cli.arguments import CommandParser
from mtcl.cli.script import run
from mtcl.config.renamed import upgrade_override
from mtcl.errors import UserError
from mtcl.launch.study_tables import build_report, format_differences, format_markdown, format_means, read_results
from mtcl.results.rows import parse_metrics_option
from mtcl.results.run_files import parse_metrics, read_json_object, read_record
from mtcl.run_folder import RunFolder
from mtcl.tasks.names import SCORES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
DOCUMENTS = (
    *(ROOT / "docs" / f"{name}.md" for name in ("results", "metrics", "models", "foundation_backbones", "balancing")),
    ROOT / "README.md",
)
BLOCK = re.compile(r"<!-- table: (?P<name>[\w-]+)(?P<options>( [\w=/,-]+)*) -->\n.*?<!-- end -->", re.DOTALL)
SHARED_KEYS = ("num_images", "split", "step", "device")  # of run.json: equal in all rows of one table


def render_rows(content: dict[str, Any]) -> str:
    """Return a Markdown table with a column per task that the rows have, followed by data, machine and commands."""
    rows = content["rows"]
    for key in SHARED_KEYS:
        values = {row["run"][key] for row in rows}
        if len(values) > 1:
            raise UserError(f"the rows of a table differ in {key}: {', '.join(map(str, values))}; make two tables")
    tasks = [task for task in SCORES if any(task in row["metrics"] for row in rows)]
    headings, metrics = [], {}
    for task in tasks:
        names = [set(row["metrics"][task]) for row in rows if task in row["metrics"]]
        metric, higher_is_better = SCORES[task].choose_metric(set.intersection(*names))
        metrics[task] = metric
        unit = SCORES[task].units.get(metric, "%")
        name = f"{task} {metric} {'↑' if higher_is_better else '↓'}"
        headings.append(f"{name} ({unit})" if unit else name)
    lines = ["| run | " + " | ".join(headings) + " |", "|---|" + "---|" * len(headings)]
    for row in rows:
        cells = [
            format_cell(SCORES[task].units.get(metrics[task], "%"), row["metrics"].get(task, {}).get(metrics[task]))
            for task in tasks
        ]
        lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    run = rows[0]["run"]
    seeds = sorted({row["run"]["seed"] for row in rows})
    commits = sorted({row["run"]["commit"][:10] for row in rows})
    lines += [
        "",
        f"{run['num_images']} images of split `{run['split']}`, seed {', '.join(map(str, seeds))}, "
        f"{run['step']} steps, on {run['device']}, torch {run['versions']['torch']}, commit {', '.join(commits)}. "
        "Commands:",
        "",
        "```sh",
        *(current_command(row["command"]) for row in rows),
        "```",
    ]
    return "\n".join(lines)


def current_command(command: str) -> str:
    """Return a recorded command as one types it today: with the present places of scripts and names of keys."""
    command = re.sub(
        r"scripts/(benchmark_\w+|compare_curves|evaluate_edges|model_table)\.py", r"scripts/benchmarks/\1.py", command
    )
    return re.sub(r"(?<=[ '\"])[a-z_.]+=[^ '\"]+", lambda match: upgrade_override(match[0]), command)


def render_output(content: dict[str, Any]) -> str:
    """Return a command and its output as Markdown."""
    return "\n".join(["```sh", current_command(content["command"]), "```", "```text", *content["printed"], "```"])


def format_cell(unit: str, value: float | None) -> str:
    """Format one metric: percent and degrees with two decimals, metres and losses with four; "" if it is missing."""
    if value is None:
        return ""
    return f"{value * 100:.2f}" if unit == "%" else f"{value:.2f}" if unit == "deg" else f"{value:.4f}"


def render_tables(text: str) -> str:
    """Return a document with its tables rendered anew."""

    def block(match: re.Match[str]) -> str:
        name, options = match["name"], match["options"]
        return f"<!-- table: {name}{options} -->\n{render_table(name, options.split())}\n<!-- end -->"

    return BLOCK.sub(block, text)


def render_table(name: str, options: Sequence[str] = ()) -> str:
    """Return the Markdown of ``docs/results/NAME.json``, or of the study in ``docs/results/NAME/``."""
    path, folder = RESULTS / f"{name}.json", RESULTS / name
    if path.is_file() and folder.is_dir():
        raise UserError(f"{path.relative_to(ROOT)} and a folder of that name both exist; keep one")
    if path.is_file():
        content = json.loads(path.read_text("utf-8"))
        return render_output(content) if "printed" in content else render_rows(content)
    if not (folder / "study.json").is_file():
        raise UserError(
            f"a document asks for the table {name}, but there is no {path.relative_to(ROOT)} and no folder of that name"
        )
    try:
        return render_study(folder, options)
    except UserError as error:
        raise UserError(f"the study {name} can't be rendered: {error}") from error


def render_study(folder: Path, options: Sequence[str]) -> str:
    """Return the Markdown of a study; for the options see the top of this file."""
    chosen = next((option.removeprefix("metrics=") for option in options if option.startswith("metrics=")), "")
    unknown = [o for o in options if o not in ("means", "differences", "holm") and not o.startswith("metrics=")]
    if unknown:
        raise UserError(f"{unknown[0]} is not one of means, differences, holm, metrics=TASK/METRIC,...")
    study, records, command = read_results(folder)
    metrics = parse_metrics_option(chosen) if chosen else {}
    results = build_report(study, records, holm="holm" in options, metrics=metrics)
    command = current_command(command) + " --holm" * ("holm" in options) + (f" --metrics {chosen}" if chosen else "")
    if "means" in options:
        return f"{format_means(results)}\n\n```sh\n{command}\n```"
    if "differences" in options:
        return f"{format_differences(results)}\n\n```sh\n{command}\n```"
    return format_markdown(results, command).rstrip("\n")


def add(name: str, label: str, command: str, run: Path) -> None:
    """Add a run's metrics to a table's JSON, replacing an earlier row of that label."""
    path = RESULTS / f"{name}.json"
    content = json.loads(path.read_text("utf-8")) if path.is_file() else {"rows": []}
    files = RunFolder(run)
    record = read_record(files.record)
    for key in ("command", "overrides"):  # they may name folders of one machine; ``command`` is general
        record.pop(key, None)
    metrics = read_json_object(files.metrics)
    parse_metrics(files.metrics, metrics)  # raises for malformed files
    row = {"label": label, "command": command, "metrics": metrics, "run": record}
    rows = [row if old["label"] == label else old for old in content["rows"]]
    content["rows"] = rows if row in rows else [*rows, row]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def add_output(name: str, command: str, file: Path) -> None:
    """Store the output of a command as a table's JSON."""
    content = {"command": command, "printed": file.read_text("utf-8").rstrip("\n").split("\n")}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def main() -> None:
    """Render or check the documents."""
    parser = CommandParser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is out of date")
    parser.add_argument("--add", nargs=4, metavar=("TABLE", "LABEL", "COMMAND", "RUN"), help="add a run first")
    parser.add_argument("--add-output", nargs=3, metavar=("TABLE", "COMMAND", "FILE"), help="add an output first")
    args = parser.parse_args()
    if args.add:
        table_name, label, command, folder = args.add
        add(table_name, label, command, Path(folder))
    if args.add_output:
        table_name, command, file = args.add_output
        add_output(table_name, command, Path(file))
    stale = []
    for document in DOCUMENTS:
        if not document.is_file():
            continue
        text = document.read_text("utf-8")
        new = render_tables(text)
        if new != text:
            stale.append(str(document.relative_to(ROOT)))
            if not args.check:
                document.write_text(new, "utf-8")
    if args.check and stale:
        raise UserError(f"out of date: {', '.join(stale)}; run python scripts/docs/render_results.py")


if __name__ == "__main__":
    run(main)
