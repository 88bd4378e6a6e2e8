"""Render the tables of docs/results.md from the runs under docs/results/, or check that they are up to date.

    python scripts/render_results.py [--check]

Each ``docs/results/<table>.json`` is one table: a title, the command its rows share, and rows with a label, the
overrides that are theirs, ``metrics`` (as in a run's metrics.json) and ``run`` (as in its run.json). ``--add TABLE
LABEL RUN`` puts a run's figures in. The rendered block of a table stands in docs/results.md between ``<!-- table:
NAME -->`` and ``<!-- end -->``; the same markers in README.md are filled, too.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
DOCUMENTS = (ROOT / "docs" / "results.md", ROOT / "README.md")
# (task, metric): heading, factor, decimals, unit
COLUMNS = {
    ("semseg", "mIoU"): ("semseg mIoU ↑", 100, 2, "%"),
    ("human_parts", "mIoU"): ("human_parts mIoU ↑", 100, 2, "%"),
    ("sal", "maxF"): ("sal maxF ↑", 100, 2, "%"),
    ("depth", "rmse"): ("depth rmse ↓", 1, 4, "m"),
    ("normals", "mErr"): ("normals mErr ↓", 1, 2, "°"),
    ("edge", "loss"): ("edge loss ↓", 1, 4, ""),
}
BLOCK = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def table(content: dict[str, Any]) -> str:
    """A Markdown table with a column per task that the rows have, and the facts of its runs below."""
    rows = content["rows"]
    columns = [key for key in COLUMNS if any(key[1] in row["metrics"].get(key[0], {}) for row in rows)]
    lines = ["| run | " + " | ".join(f"{COLUMNS[c][0]} ({COLUMNS[c][3]})".replace(" ()", "") for c in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for row in rows:
        cells = []
        for task, metric in columns:
            _, factor, decimals, _ = COLUMNS[task, metric]
            value = row["metrics"].get(task, {}).get(metric)
            cells.append("" if value is None else f"{value * factor:.{decimals}f}")
        lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    run = rows[-1]["run"]
    steps = {row["run"]["step"] for row in rows if row["run"].get("step")}
    seeds = sorted({row["run"]["seed"] for row in rows})
    lines += [
        "",
        f"{run['num_images']} pictures of split `{run['split']}`, seed {', '.join(map(str, seeds))}, "
        f"{max(steps)} steps, on {run['device']}, torch {run['versions']['torch']}. Commands:",
        "",
        "```sh",
        *(row["command"] for row in rows),
        "```",
    ]
    return "\n".join(lines)


def rendered(text: str) -> str:
    def block(found: re.Match[str]) -> str:
        content = json.loads((RESULTS / f"{found['name']}.json").read_text())
        return f"<!-- table: {found['name']} -->\n{table(content)}\n<!-- end -->"

    return BLOCK.sub(block, text)


def add(name: str, label: str, command: str, run: Path) -> None:
    """Put a run's figures into a table's JSON, in place of an earlier row of that label."""
    path = RESULTS / f"{name}.json"
    content = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    facts = json.loads((run / "run.json").read_text())
    facts.pop("command")  # it may name folders of one machine; ``command`` says it in general
    row = {"label": label, "command": command, "metrics": json.loads((run / "metrics.json").read_text()), "run": facts}
    rows = [row if old["label"] == label else old for old in content["rows"]]
    content["rows"] = rows if row in rows else [*rows, row]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is out of date")
    parser.add_argument("--add", nargs=4, metavar=("TABLE", "LABEL", "COMMAND", "RUN"), help="first put in a run")
    arguments = parser.parse_args()
    if arguments.add:
        table_name, label, command, run = arguments.add
        add(table_name, label, command, Path(run))
    stale = []
    for document in DOCUMENTS:
        if not document.is_file():
            continue
        text = document.read_text()
        new = rendered(text)
        if new != text:
            stale.append(str(document.relative_to(ROOT)))
            if not arguments.check:
                document.write_text(new)
    if arguments.check and stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/render_results.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
