"""Render the tables of docs/results.md from the runs under docs/results/, or check that they are up to date.

    python scripts/docs/render_results.py [--check] [--add TABLE LABEL COMMAND RUN] [--add-output TABLE COMMAND FILE]

Each ``docs/results/TABLE.json`` holds rows: a label, the command that made the row, ``metrics`` (a run's
metrics.json) and ``run`` (its run.json). ``--add`` puts the figures of the run folder RUN in, in place of an earlier
row of that label. ``--add-output`` keeps what a command printed, from FILE, to be shown as it is. A folder
``docs/results/TABLE/`` holds a study instead, a file per run (``scripts/study.py --results docs/results/TABLE``). A
table is rendered between ``<!-- table: TABLE -->`` and ``<!-- end -->``, in docs/results.md, docs/metrics.md,
docs/models.md and README.md.
A study as ``<!-- table: TABLE means -->`` is without its differences, notes and settings.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from mtcl.errors import UserError
from mtcl.launch.study_tables import format_markdown, format_means, read_results, report
from mtcl.results.run_files import parse_metrics, read_json_object, read_record
from mtcl.tasks import NYUD40, TASK_NAMES, Task, build_task

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
DOCUMENTS = (*(ROOT / "docs" / f"{name}.md" for name in ("results", "metrics", "models")), ROOT / "README.md")
BLOCK = re.compile(r"<!-- table: (?P<name>[\w-]+)(?P<part> means)? -->\n.*?<!-- end -->", re.DOTALL)


SHARED = ("num_images", "split", "step", "device")  # what the rows of one table must have in common


def table(content: dict[str, Any]) -> str:
    """A Markdown table with a column per task that the rows have, and the facts of its runs below."""
    rows = content["rows"]
    for fact in SHARED:
        values = {row["run"][fact] for row in rows}
        if len(values) > 1:
            raise SystemExit(f"the rows of a table differ in {fact}: {', '.join(map(str, values))}; make two tables")
    tasks = [task for task in known_tasks() if any(task.name in row["metrics"] for row in rows)]
    headings, chosen = [], {}
    for task in tasks:
        found = [set(row["metrics"][task.name]) for row in rows if task.name in row["metrics"]]
        metric, higher_is_better = task.choose_metric(set.intersection(*found))
        chosen[task.name] = metric
        unit = task.units.get(metric, "%")
        name = f"{task.name} {metric} {'↑' if higher_is_better else '↓'}"
        headings.append(f"{name} ({unit})" if unit else name)
    lines = ["| run | " + " | ".join(headings) + " |", "|---|" + "---|" * len(headings)]
    for row in rows:
        cells = [cell(task, chosen[task.name], row["metrics"].get(task.name, {})) for task in tasks]
        lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    run = rows[0]["run"]
    seeds = sorted({row["run"]["seed"] for row in rows})
    commits = sorted({row["run"]["commit"][:10] for row in rows})
    lines += [
        "",
        f"{run['num_images']} pictures of split `{run['split']}`, seed {', '.join(map(str, seeds))}, "
        f"{run['step']} steps, on {run['device']}, torch {run['versions']['torch']}, commit {', '.join(commits)}. "
        "Commands:",
        "",
        "```sh",
        *(current_command(row["command"]) for row in rows),
        "```",
    ]
    return "\n".join(lines)


def current_command(command: str) -> str:
    """Return a recorded command as it has to be typed today: some scripts have moved since."""
    return re.sub(
        r"scripts/(benchmark_\w+|compare_curves|evaluate_edges|model_table)\.py", r"scripts/benchmarks/\1.py", command
    )


def output(content: dict[str, Any]) -> str:
    """A command and what it printed."""
    return "\n".join(["```sh", current_command(content["command"]), "```", "```text", *content["printed"], "```"])


def known_tasks() -> list[Task]:
    """All of them; how a metric is written does not depend on the classes."""
    options: dict[str, dict[str, Any]] = {"semseg": {"class_names": NYUD40}}
    return [build_task(name, **options.get(name, {})) for name in TASK_NAMES]


def cell(task: Task, metric: str, metrics: dict[str, float | None]) -> str:
    """One metric: percent with two decimals, degrees with two, metres and losses with four."""
    value = metrics.get(metric)
    if value is None:
        return ""
    unit = task.units.get(metric, "%")
    return f"{value * 100:.2f}" if unit == "%" else f"{value:.2f}" if unit == "deg" else f"{value:.4f}"


def render_tables(text: str) -> str:
    def block(found: re.Match[str]) -> str:
        name, part = found["name"], found["part"] or ""
        return f"<!-- table: {name}{part} -->\n{shown(name, bool(part))}\n<!-- end -->"

    return BLOCK.sub(block, text)


def shown(name: str, means_only: bool = False) -> str:
    """The Markdown of ``docs/results/NAME.json``, or of the study in ``docs/results/NAME/``."""
    path, folder = RESULTS / f"{name}.json", RESULTS / name
    if path.is_file() and folder.is_dir():
        raise SystemExit(f"{path.relative_to(ROOT)} and a folder of that name both exist; keep one")
    if path.is_file():
        content = json.loads(path.read_text("utf-8"))
        return output(content) if "printed" in content else table(content)
    if not (folder / "study.json").is_file():
        raise SystemExit(
            f"a document asks for the table {name}, but there is no {path.relative_to(ROOT)} and no folder of that name"
        )
    try:
        return study_markdown(folder, means_only)
    except UserError as error:
        raise SystemExit(f"the study {name} can't be shown: {error}") from error


def study_markdown(folder: Path, means_only: bool) -> str:
    study, records, command = read_results(folder)
    found = report(study, records)
    if means_only:
        return f"{format_means(found)}\n\n```sh\n{current_command(command)}\n```"
    return format_markdown(found, current_command(command)).rstrip("\n")


def add(name: str, label: str, command: str, run: Path) -> None:
    """Put a run's figures into a table's JSON, in place of an earlier row of that label."""
    path = RESULTS / f"{name}.json"
    content = json.loads(path.read_text("utf-8")) if path.is_file() else {"rows": []}
    facts = read_record(run / "run.json")
    for key in ("command", "overrides"):  # they may name folders of one machine; ``command`` says it in general
        facts.pop(key, None)
    scores = read_json_object(run / "metrics.json")
    parse_metrics(run / "metrics.json", scores)
    row = {"label": label, "command": command, "metrics": scores, "run": facts}
    rows = [row if old["label"] == label else old for old in content["rows"]]
    content["rows"] = rows if row in rows else [*rows, row]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def add_output(name: str, command: str, file: Path) -> None:
    """Keep what a command printed as a table's JSON."""
    content = {"command": command, "printed": file.read_text("utf-8").rstrip("\n").split("\n")}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is out of date")
    parser.add_argument("--add", nargs=4, metavar=("TABLE", "LABEL", "COMMAND", "RUN"), help="first put in a run")
    parser.add_argument("--add-output", nargs=3, metavar=("TABLE", "COMMAND", "FILE"), help="first put in an output")
    arguments = parser.parse_args()
    if arguments.add:
        table_name, label, command, run = arguments.add
        add(table_name, label, command, Path(run))
    if arguments.add_output:
        table_name, command, file = arguments.add_output
        add_output(table_name, command, Path(file))
    stale = []
    for document in DOCUMENTS:
        if not document.is_file():
            continue
        text = document.read_text("utf-8")
        new = render_tables(text)
        if new != text:
            stale.append(str(document.relative_to(ROOT)))
            if not arguments.check:
                document.write_text(new, "utf-8")
    if arguments.check and stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/docs/render_results.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
