"""Check whether runs may be compared, and write the notes that stand below their table."""

from collections.abc import Sequence

from mtcl.config.schema import LEGACY_VALUES, role_of
from mtcl.errors import UserError
from mtcl.results.columns import NOT_FINITE, Column
from mtcl.results.rows import Row
from mtcl.results.runs import REGULARIZER, Run, differing_keys, is_regularizer_off, result_settings
from mtcl.run_folder import RECORD

DATA_KEYS = ("split", "num_images", "data_fingerprint")  # of run.json: equal in all runs of one table
DIFFERENT_SCORING = "were scored in different ways"


def join_some(items: Sequence[str], max_items: int = 3) -> str:
    """Join the distinct items by commas, with "and N more" in place of those beyond ``max_items``."""
    items = list(dict.fromkeys(items))
    more = f" and {len(items) - max_items} more" if len(items) > max_items else ""
    return ", ".join(items[:max_items]) + more


def check_same_data(runs: Sequence[Run]) -> list[str]:
    """Raise ``UserError`` if two runs were scored on different validation data; return notes if that is unknown."""
    for key in DATA_KEYS:
        recorded = [run for run in runs if run.record.get(key) is not None]
        for run in recorded:
            if run.record[key] != recorded[0].record[key]:
                raise UserError(
                    f"{recorded[0].path} and {run.path} were scored on different validation data ({key} "
                    f"{recorded[0].record[key]} and {run.record[key]}); compare runs on the same data."
                )
    unknown = [str(run.path) for run in runs if any(run.record.get(key) is None for key in DATA_KEYS)]
    if unknown and len(runs) > 1:
        return [f"warning: the validation data of {join_some(unknown)} is unknown, because {RECORD} does not give it."]
    return []


def check_same_scoring(runs: Sequence[Run]) -> list[str]:
    """Return a note if two runs were evaluated with different settings."""
    settings = [
        {k: v for k, v in config.items() if k.startswith("evaluation.") and role_of(k) == "result"}
        for config in ({**LEGACY_VALUES, **run.config} for run in runs if run.config)
    ]
    keys = differing_keys(settings or [{}])
    if not keys:
        return []
    return [f"warning: the runs {DIFFERENT_SCORING} ({', '.join(keys)}): their numbers do not compare."]


def check_backbone(rows: Sequence[Row], single_task_runs: Sequence[Run]) -> None:
    """Raise ``UserError`` if a single-task run has another backbone than a row."""
    for run in (run for row in rows for run in row.runs):
        for single in single_task_runs:
            backbone, baseline_backbone = (r.config.get("backbone.name") for r in (run, single))
            if None not in (backbone, baseline_backbone) and backbone != baseline_backbone:
                raise UserError(
                    f"Delta_MTL needs baselines of the same backbone, but {single.path} has "
                    f"backbone.name={baseline_backbone} and {run.path} has {backbone}."
                )


def note_zero_weight(rows: Sequence[Row]) -> list[str]:
    """Return a note if a row of weight 0 represents the regulariser off."""
    zero = [
        row.label for row in rows if is_regularizer_off(row.runs[0]) and row.runs[0].config[REGULARIZER] is not None
    ]
    if not zero or len(rows) < 2:
        return []
    return [f"{join_some(zero)}: the regulariser is off; a weight of 0 trains bit for bit as regularizer=none does."]


def note_different_tasks(rows: Sequence[Row]) -> list[str]:
    """Return a note if rows have different tasks, so that no single number ranks them."""
    sets = list(dict.fromkeys(" ".join(run.metrics) for row in rows for run in row.runs))
    if len(sets) < 2:
        return []
    names = join_some(sets)
    return [f"warning: the rows have different tasks ({names}): compare them metric by metric, nothing ranks them."]


def note_different_baselines(rows: Sequence[Row], single_task_runs: Sequence[Run]) -> list[str]:
    """Return a note on the settings, besides tasks and regulariser, in which baselines and rows differ."""
    runs = [*single_task_runs, *(run for row in rows for run in row.runs)]
    unknown = [str(run.path) for run in runs if "backbone.name" not in run.config]
    if unknown:
        return [f"warning: the backbone of {join_some(unknown)} is unknown; Delta_MTL assumes that it is the same."]
    keys = [
        k
        for k in differing_keys([result_settings(run) for run in runs])
        if k.split(".")[0] not in ("tasks", "regularizer")
    ]
    return [f"warning: rows and single-task baselines differ in {join_some(keys)}, too."] if keys else []


def note_missing_values(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Return notes on metrics that runs of a row lack, and on pixels without a finite prediction."""
    notes = []
    for row in rows:
        for run in row.runs:
            counts = {
                task: int(n) for task, values in run.metrics.items() if (n := values.get(NOT_FINITE, 0)) and n > 0
            }
            text = ", ".join(f"{task} {count}" for task, count in counts.items())
            notes += [f"warning: pixels without a finite prediction in {run.path}: {text}."] if text else []
        for column in (c for c in columns if c.task and c in row.values):
            num, num_runs = row.summarize(column).num, len(row.values[column])
            if num < num_runs:
                notes.append(f"warning: {row.label} has {column.key} in {num} of its {num_runs} runs only.")
    return notes


def describe_provenance(runs: Sequence[Run]) -> str:
    """Return one line on the data, devices and commits that the numbers come from."""

    def values(key: str) -> list[str]:
        return list(dict.fromkeys(str(run.record[key]) for run in runs if run.record.get(key) is not None))

    count = len({run.path for run in runs})
    parts = [f"{count} run{'s' * (count != 1)}"]
    if values("num_images"):
        parts.append(f"{values('num_images')[0]} images of split {join_some(values('split'))}")
    parts += [f"data {fingerprint}" for fingerprint in values("data_fingerprint")]
    if devices := values("device"):
        parts.append(f"on {join_some(devices)}")
    if commits := [commit[:10] for commit in values("commit")]:
        parts.append(f"commit{'s' * (len(commits) > 1)} {join_some(commits)}")
    if num_changed := sum(run.record.get("clean") is False for run in runs):
        parts.append(f"{num_changed} with uncommitted changes")
    return ", ".join(parts) + "."
