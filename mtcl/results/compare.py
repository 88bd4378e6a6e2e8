"""Runs side by side: reads run folders, makes rows of what differs in the seed only, and computes what a table shows.

Rendering is :mod:`mtcl.results.tables`'s, arithmetic :mod:`mtcl.results.statistics`'s.
"""

import difflib
import itertools
import json
import math
import os
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from mtcl.config.schema import LEGACY_VALUES, flatten, role_of
from mtcl.errors import UserError, escape_control_characters
from mtcl.metrics.delta import delta_mtl
from mtcl.results.columns import NOT_FINITE, UNRANKED_METRICS, Column, make_column, primary_metrics
from mtcl.results.run_files import CONFIG, METRICS, RECORD, read_config, read_metrics, read_record
from mtcl.results.statistics import PairedDifference, Summary, adjust_by_holm, paired_difference, summarize_values
from mtcl.tasks import TASK_NAMES

SAME_DATA = ("split", "num_images", "data_fingerprint")  # what the runs of one table must have in common
REGULARIZER = "regularizer._target_"  # null where the regulariser is off
WEIGHT = "regularizer.weight"  # 0 is off, too
SINGLE_TASK = "single-task"  # the label of the baselines' row
MOST_KEYS = 3  # in a row's name


@dataclass(frozen=True, eq=False)
class Run:
    """One run's numbers and where they come from. ``metrics``: fractions, metres, degrees; NaN where the file has null.

    ``facts``: its run.json, ``config``: dotted key -> value of its config.yaml, or of that beside the checkpoint it
    evaluates; both empty where there is none.
    """

    path: Path
    metrics: Mapping[str, Mapping[str, float]]
    record: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int | None:
        return self.record.get("seed", self.config.get("seed"))

    @property
    def name(self) -> str:
        """Of the predictions it scores, if it does, else of its folder or file."""
        if "predictions" in self.record:
            path = PurePath(self.record["predictions"])
            return (path.stem if path.suffix == ".json" else path.name) or str(path)
        return self.path.stem if self.path.suffix == ".json" else self.path.resolve().name


@dataclass(frozen=True, eq=False)
class Row:
    """Runs that differ in nothing but the seed. ``values``: column -> seed -> value; a column may be absent."""

    label: str
    runs: tuple[Run, ...]
    values: dict[Column, dict[Hashable, float]] = field(default_factory=dict)
    is_baseline: bool = False  # the single-task runs, each of another task

    def summarize(self, column: Column) -> Summary:
        return summarize_values(self.values.get(column, {}).values())

    @property
    def num_seeds(self) -> int:
        """The fewest of any column that has a value."""
        counts = [count for column in self.values if (count := self.summarize(column).num)]
        return min(counts, default=0) if self.is_baseline else len(self.runs)


@dataclass(frozen=True, eq=False)
class Difference:
    """``row`` minus ``reference`` over the seeds of both, column by column.

    ``adjusted``: Holm's p-values over all intervals of the comparison; None where they are not asked for.
    """

    row: Row
    reference: Row
    columns: dict[Column, PairedDifference]
    adjusted_p_values: Mapping[Column, float] | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a table shows. ``notes``: whole sentences for below the table; those to heed begin with "warning:"."""

    columns: list[Column]
    rows: list[Row]
    differences: list[Difference]
    notes: list[str]


def compare(
    sources: Sequence[Path],
    baseline: Sequence[Path] = (),
    against: str | None = None,
    by: Sequence[str] = (),
    all_metrics: bool = False,
    holm: bool = False,
) -> Comparison:
    """The table of all runs in ``sources``; ``UserError`` where they cannot stand in one.

    ``baseline``: single-task runs or a file of their values, for Delta_MTL; or one multi-task row, which is the same as
    ``against``: a run, a folder of runs that form one row, or a row's label. ``by``: config keys that alone make rows.
    ``holm``: verdicts by p-values corrected for the number of intervals.
    """
    runs, notes = find_runs(sources)
    return compare_runs(runs, baseline, against, by, all_metrics, notes, holm)


def compare_runs(
    runs: Sequence[Run],
    baseline: Sequence[Path] = (),
    against: str | None = None,
    by: Sequence[str] = (),
    all_metrics: bool = False,
    notes: Sequence[str] = (),
    holm: bool = False,
) -> Comparison:
    """As :func:`compare`, of runs that are read already; ``notes`` on what was left out."""
    notes = list(notes)
    single_task_runs, reference_runs = split_baseline(baseline, notes)
    if against is not None:
        if reference_runs:
            raise UserError("Give either --against or a multi-task run as --baseline, not both.")
        if os.path.exists(against):
            reference_runs = find_runs([Path(against)])[0]
    known = {run.path.resolve() for run in runs}
    runs = [*(run for run in reference_runs if run.path.resolve() not in known), *runs]
    notes += check_same_data([*runs, *single_task_runs]) + check_same_scoring([*runs, *single_task_runs])
    rows = make_rows(runs, by, notes)
    notes += note_different_tasks(rows)
    if single_task_runs:
        check_backbone(rows, single_task_runs)
    columns = choose_columns([*runs, *single_task_runs], all_metrics, notes)
    for row in rows:
        fill_row(row, columns)
    primary = [column for column in columns if is_primary(column, columns)]
    if single_task_runs:
        base = make_baseline_row(single_task_runs, columns)
        notes += note_different_baselines(rows, single_task_runs)
        add_delta_column(rows, base, primary, "Delta_MTL", columns, notes)
        rows = [base, *rows]
    reference = choose_reference(rows, reference_runs, against, notes)
    differences = []
    if reference is not None:
        if not single_task_runs or reference_runs or against is not None:  # beside Delta_MTL only if asked for
            add_delta_column(rows, reference, primary, delta_name(reference, rows), columns, notes)
        others = [row for row in rows if row is not reference and not row.is_baseline]
        differences = [d for row in others if (d := paired_differences(row, reference, columns, notes)) is not None]
    notes += note_missing_values(rows, columns)
    if holm:
        differences = correct_by_holm(differences)
    notes = [describe_provenance([*runs, *single_task_runs]), *note_zero_weight(rows), *notes]
    return Comparison(columns, rows, differences, [*map(escape_control_characters, notes)])


def correct_by_holm(differences: Sequence[Difference]) -> list[Difference]:
    """The same differences with Holm's p-values of all intervals that may have a verdict."""
    values = holm_p_values([one.columns for one in differences])
    return [replace(one, adjusted_p_values=of_one) for one, of_one in zip(differences, values)]


def holm_p_values(blocks: Sequence[Mapping[Column, PairedDifference]]) -> list[dict[Column, float]]:
    """Holm's p-values over all blocks together, of the differences with pairs enough for a verdict."""
    tested = [(i, column) for i, block in enumerate(blocks) for column, pair in block.items() if pair.has_enough_pairs]
    values = adjust_by_holm([blocks[i][column].p_value for i, column in tested])
    adjusted_p_values: list[dict[Column, float]] = [{} for _ in blocks]
    for (i, column), value in zip(tested, values):
        adjusted_p_values[i][column] = value
    return adjusted_p_values


def note_zero_weight(rows: Sequence[Row]) -> list[str]:
    """A note where a row of weight 0 stands for the regulariser off."""
    zero = [
        row.label for row in rows if is_regularizer_off(row.runs[0]) and row.runs[0].config[REGULARIZER] is not None
    ]
    if not zero or len(rows) < 2:
        return []
    return [f"{join_some(zero)}: the regulariser is off; a weight of 0 trains bit for bit as regularizer=none does."]


# Reading


def find_runs(sources: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read every run at or below ``sources``, each once; return them and notes on what was left out.

    The sources keep their order; runs of one source come in the order of the settings in which they differ.

    Raises:
        UserError: there is no run in a source, or none that can be read, or the only source is such a run.
    """
    paths: set[Path] = set()
    runs: list[Run] = []
    notes: list[str] = []
    errors: list[UserError] = []
    for source in sources:
        is_run, folders = find_run_folders(source, notes)
        found = []
        for path in folders:
            resolved = path.resolve()
            if resolved in paths:
                continue
            paths.add(resolved)
            try:
                found.append(read_run(path))
            except UserError as error:
                if is_run and len(sources) == 1:
                    raise
                errors.append(error)
        runs += sort_by_settings(found)
    if errors and not runs:
        raise errors[0]
    return runs, [*notes, *(f"warning: left out: {error}" for error in errors)]


def find_run_folders(source: Path, notes: list[str]) -> tuple[bool, list[Path]]:
    """Return whether ``source`` itself is a run, and the runs at or below it; add a note on unfinished ones."""
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist; give run folders (with a metrics.json) or folders of runs.")
    if source.is_file():
        return True, [source.parent if source.name == METRICS else source]
    if (source / METRICS).is_file():
        return True, [source]
    folders = sorted((path.parent for path in source.rglob(METRICS)), key=natural_key)
    configs = sorted((path.parent for path in source.rglob(CONFIG)), key=natural_key)
    unfinished = [folder for folder in configs if not os.path.lexists(folder / METRICS)]
    if unfinished and not folders:
        raise UserError(
            f"{unfinished[0]} is an unfinished run: it has a config.yaml, but no metrics.json; "
            "continue it with resume=auto or leave it out."
        )
    if not folders:
        raise UserError(f"There is no run in {source}: no metrics.json in it or below it.")
    if unfinished:
        names = ", ".join(str(folder.relative_to(source)) for folder in unfinished)
        notes.append(f"warning: {source} holds unfinished runs, left out here (no metrics.json): {names}.")
    return folders == [source], folders


def natural_key(path: PurePath | str) -> list[tuple[int, int | str]]:
    """A key that sorts 10 after 9: Hydra counts the runs of a sweep."""
    parts = re.split(r"(\d+|/)", str(path))
    return [(0, int(part)) if part.isdecimal() and len(part) < 20 else (1, part) for part in parts]


def sort_by_settings(runs: Sequence[Run]) -> list[Run]:
    """Sort runs by the settings in which they differ: off first, numbers by size, text with 10 after 9."""
    settings = {id(run): result_settings(run) for run in runs}
    keys = differing_keys([known for known in settings.values() if known] or [{}])

    def key(run: Run) -> tuple[Any, ...]:
        off = is_regularizer_off(run)
        values = [(0,) if off and k.startswith("regularizer.") else _rank(settings[id(run)].get(k)) for k in keys]
        return not settings[id(run)], values, natural_key(run.path)

    return sorted(runs, key=key)


def _rank(value: Any) -> tuple[Any, ...]:
    """A sort key for a config value of any type: null, then numbers, text, lists, the rest."""
    if value is None:
        return (0,)
    if isinstance(value, int | float):
        return 1, value
    if isinstance(value, str):
        return 2, natural_key(value)
    return (3, len(value), natural_key(json.dumps(value))) if isinstance(value, list) else (4, json.dumps(value))


def read_run(path: Path) -> Run:
    """A run folder, or a single JSON file of metrics, about whose origin nothing is known."""
    if path.is_file():
        return Run(path, read_metrics(path))
    facts = read_record(path / RECORD) if os.path.lexists(path / RECORD) else {}
    config = path / CONFIG
    if not os.path.lexists(config) and "checkpoint" in facts:  # an evaluation: as its run was trained
        config = find_training_config(facts["checkpoint"]) or config
    known = read_config(config) if os.path.lexists(config) else {}
    if "evaluation" in facts:  # how it was scored, whatever the training run would have done
        known = {key: value for key, value in known.items() if not key.startswith("evaluation.")}
        known |= flatten({"evaluation": facts["evaluation"]})
    return Run(path, read_metrics(path / METRICS), facts, known)


def find_training_config(text: str) -> Path | None:
    """The config.yaml of the run that a checkpoint lies in, ``RUN/checkpoints/NAME.pt``; None where there is none."""
    checkpoint = Path(text)
    config = checkpoint.parent.parent / CONFIG
    return config if checkpoint.parent.name == "checkpoints" and os.path.isfile(config) else None


# What is shown of a task


def choose_columns(runs: Sequence[Run], all_metrics: bool, notes: list[str]) -> list[Column]:
    """A column per task for its primary metric, and with ``every_metric`` one for each other metric of any run."""
    columns = []
    for task in (task for task in TASK_NAMES if any(task in run.metrics for run in runs)):
        of_task = [run for run in runs if task in run.metrics]
        primary = choose_primary_metric(task, of_task, notes)
        others = [
            m
            for run in of_task
            for m, value in run.metrics[task].items()
            if m not in (primary, *UNRANKED_METRICS) and (m != NOT_FINITE or value)
        ]
        shown = [primary, *dict.fromkeys(others)] if all_metrics else [primary]
        columns += [make_column(task, metric) for metric in shown]
    return columns


def choose_primary_metric(task: str, runs: Sequence[Run], notes: list[str]) -> str:
    """The best metric that all ``runs`` have; the best that any has where there is none."""
    names = primary_metrics(task)
    common = [name for name in names if all(name in run.metrics[task] for run in runs)]
    chosen = common[0] if common else next((n for n in names if any(n in run.metrics[task] for run in runs)), names[0])
    if task == "edge" and chosen == "loss":
        lacking = next(run for run in runs if "odsF" not in run.metrics[task])
        notes.append(f"edge stands here with its loss, as {lacking.path} has no odsF; no paper's number compares.")
    return chosen


def is_primary(column: Column, columns: Sequence[Column]) -> bool:
    return next(c for c in columns if c.task == column.task) == column


def fill_row(row: Row, columns: Iterable[Column]) -> None:
    """Put the runs' values into the row; runs without a known seed are told apart by their folder."""
    for column in columns:
        values: dict[Hashable, float] = {
            str(run.path) if run.seed is None else run.seed: run.metrics[column.task].get(column.metric, math.nan)
            for run in row.runs
            if column.task in run.metrics
        }
        if values:
            row.values[column] = values


# Rows


def make_rows(runs: Sequence[Run], by: Sequence[str], notes: list[str]) -> list[Row]:
    """Runs that differ in nothing but the seed make a row, named by what tells it from the others.

    With ``by``, these keys alone count. A run about whose config nothing is known is a row of its own. Runs with the
    regulariser off are alike whatever its settings are.
    """
    identities = [select_keys(run, by, runs) if by else result_settings(run) for run in runs]
    groups: dict[str, list[int]] = {}
    for index, known in enumerate(identities):
        decisive = known if by else distinguishing_settings(runs[index])
        key = json.dumps(decisive, sort_keys=True, default=str) if known else str(runs[index].path.resolve())
        groups.setdefault(key, []).append(index)
    first = [members[0] for members in groups.values()]
    named = [index for index in first if identities[index]]
    texts = make_labels([identities[i] for i in named], [typed_choices(runs[i]) for i in named], bool(by), notes)
    told = dict(zip(named, texts))
    names = {index: escape_control_characters(told.get(index) or unique_name(runs[index], runs)) for index in first}
    rows = [Row(names[members[0]], tuple(runs[i] for i in members)) for members in groups.values()]
    if not by:
        rows = [drop_repeats(row, notes) for row in rows]
    for row in rows:
        check_unique_seeds(row)
        if by and (differing := differing_keys([result_settings(run) for run in row.runs])):
            notes.append(f"warning: the runs of {row.label} differ in {', '.join(differing)}, too.")
    return rows


def is_regularizer_off(run: Run) -> bool:
    """Is the regulariser off: none, or of weight 0, which trains bit for bit the same?

    A method of balancing that counts the contrast among its objectives does so with a weight of 0, too.
    """
    if REGULARIZER not in run.config:
        return False
    counted = (
        run.config.get("balancing.contrast_as_objective") is True and run.config.get("balancing.method") != "fixed"
    )
    return run.config[REGULARIZER] is None or (run.config.get(WEIGHT) == 0 and not counted)


def distinguishing_settings(run: Run) -> dict[str, Any]:
    """A run's :func:`result_settings`, without the regulariser's settings where it is off."""
    off = is_regularizer_off(run)
    return {key: value for key, value in result_settings(run).items() if not (off and key.startswith("regularizer."))}


def drop_repeats(row: Row, notes: list[str]) -> Row:
    """Leave out runs with the regulariser off that repeat another's seed with other settings of the regulariser."""
    kept: list[Run] = []
    for run in row.runs:
        same = next((one for one in kept if run.seed is not None and one.seed == run.seed), None)
        if same is None or result_settings(same) == result_settings(run):
            kept.append(run)
            continue
        notes.append(
            f"warning: {run.path} is left out: its regulariser is off, as that of {same.path} with the same seed."
        )
    return Row(row.label, tuple(kept))


def result_settings(run: Run) -> dict[str, Any]:
    """What, besides the seed, decides a run's numbers; empty where nothing is known."""
    known = {key: value for key, value in run.config.items() if role_of(key) == "result"}
    if known:
        known = LEGACY_VALUES | known
        known["tasks.names"] = list(run.metrics)  # what "auto" stood for
        step, checkpoint = run.record.get("step"), PurePath(run.record.get("checkpoint", "last.pt")).name
        finished = checkpoint != "last.pt" or step in (None, run.config.get("trainer.max_steps"))
        known |= {"checkpoint": checkpoint, "step": "last" if finished else step}
    return known


def select_keys(run: Run, by: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    """The values of the keys (or of the groups of keys) ``by``, from the config or else from run.json."""
    values: dict[str, Any] = {}
    for key in by:
        known = {**{k: v for k, v in run.record.items() if not isinstance(v, dict | list)}, **run.config}
        found = {k: v for k, v in known.items() if k == key or k.startswith(f"{key}.")}
        if not found and not any(k == key or k.startswith(f"{key}.") for r in runs for k in (*r.record, *r.config)):
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise UserError(f"--by {key}: no config.yaml or run.json of the given runs has that key{hint}")
        values |= found or {key: None}
    return values


def check_unique_seeds(row: Row) -> None:
    seen: dict[int, Run] = {}
    for run in row.runs:
        if run.seed is not None and run.seed in seen:
            raise UserError(
                f"{seen[run.seed].path} and {run.path} are both {row.label} with seed {run.seed}; leave one of them "
                "out, or tell them apart with --by KEY."
            )
        if run.seed is not None:
            seen[run.seed] = run


def typed_choices(run: Run) -> dict[str, str]:
    """``group=choice`` words of the run's command, as group -> choice."""
    pairs = [str(word).partition("=")[::2] for word in run.record.get("overrides", ())]
    return {key: value for key, value in pairs if any(k.startswith(f"{key}.") for k in run.config)}


def differing_keys(identities: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for known in identities for key in known)
    return [key for key in keys if any(known.get(key) != identities[0].get(key) for known in identities)]


def make_labels(
    identities: Sequence[Mapping[str, Any]], chosen: Sequence[Mapping[str, str]], forced: bool, notes: list[str]
) -> list[str]:
    """A name per row out of the keys in which they differ, or of all keys if ``forced``; "" where there is nothing.

    Keys of a group come after the group's choice (``regularizer=none``), and only where that does not tell all.
    """
    keys = differing_keys(identities)
    if forced and not keys:
        keys = list(identities[0]) if identities else []
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.partition(".")[0], []).append(key)
    parts: list[list[str]] = []
    for group, members in groups.items():
        parts += group_parts(group, members, identities, chosen)
    if len(parts) > MOST_KEYS and len(kept := drop_redundant(sorted(parts, key=names_single_key))) < len(parts):
        left = [f"{group}.*" if group not in members else group for group, members in groups.items()]
        notes.append(f"The rows differ in more than their names say, in keys of {', '.join(left)}.")
        parts = kept
    return [", ".join(text for part in parts if (text := part[i])) for i in range(len(identities))]


def group_parts(
    group: str, members: Sequence[str], identities: Sequence[Mapping[str, Any]], chosen: Sequence[Mapping[str, str]]
) -> list[list[str]]:
    """What the names say of one config group: a text per row in each part, "" where it adds nothing."""
    lead, spoken = group_choice(group, members, identities, chosen)
    parts = [[f"{group}={text}" for text in lead]] if lead else []
    for key in (member for member in members if member != spoken):
        part = []
        for i, known in enumerate(identities):
            distinguishing_settings = [other for j, other in enumerate(identities) if not lead or lead[j] == lead[i]]
            tells = not lead or len({format_setting(other.get(key)) for other in distinguishing_settings}) > 1
            part.append(f"{key}={format_setting(known.get(key))}" if tells else "")
        if any(part):
            parts.append(part)
    return parts


def group_choice(
    group: str, members: Sequence[str], identities: Sequence[Mapping[str, Any]], chosen: Sequence[Mapping[str, str]]
) -> tuple[list[str], str]:
    """The choice of a group in each row, and the key it speaks for: as typed, else its class or its name."""
    typed = [words.get(group, "") for words in chosen]
    if group not in members and all(typed) and (len(set(typed)) > 1 or len(typed) == 1):
        return typed, ""
    for key in (f"{group}._target_", f"{group}.name"):
        if key in members:
            return [to_snake_case(known.get(key)) for known in identities], key
    return [], ""


def to_snake_case(target: Any) -> str:
    """``mtcl.models.decoders.MultiHead`` as ``multi_head``; any other name as it is."""
    text = "none" if target is None else str(target)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text.rpartition(".")[2]).lower() if text.startswith("mtcl.") else text


def format_setting(value: Any) -> str:
    """A config value as one types it."""
    if isinstance(value, list):
        return f"[{','.join(map(format_setting, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def names_single_key(part: Sequence[str]) -> bool:
    """Does this part of the names tell a single key, not the choice of a group?"""
    return any("." in text.partition("=")[0] for text in part)


def drop_redundant(parts: Sequence[list[str]]) -> list[list[str]]:
    """The first parts, each of which tells rows apart that those before it did not."""
    kept: list[list[str]] = []
    for part in parts:
        if len(set(zip(*kept, part))) > (len(set(zip(*kept))) if kept else 1):
            kept.append(part)
    return kept


def unique_name(run: Run, runs: Sequence[Run]) -> str:
    """The name of a run's folder or file, its path where others are named alike."""
    return run.name if sum(other.name == run.name for other in runs) == 1 else str(run.path)


# What may stand beside what


def check_same_data(runs: Sequence[Run]) -> list[str]:
    """``UserError`` for two runs that were scored on different validation data; notes where that is not known."""
    for fact in SAME_DATA:
        known = [run for run in runs if run.record.get(fact) is not None]
        for run in known:
            if run.record[fact] != known[0].record[fact]:
                raise UserError(
                    f"{known[0].path} and {run.path} were scored on different validation data ({fact} "
                    f"{known[0].record[fact]} and {run.record[fact]}); compare runs on the same data."
                )
    unknown = [str(run.path) for run in runs if any(run.record.get(fact) is None for fact in SAME_DATA)]
    if unknown and len(runs) > 1:
        return [
            f"warning: not known on which validation data {join_some(unknown)} was scored (run.json does not tell)."
        ]
    return []


def check_same_scoring(runs: Sequence[Run]) -> list[str]:
    """A note where the numbers of two runs are not the same numbers."""
    ways = [
        {k: v for k, v in run.config.items() if k.startswith("evaluation.") and role_of(k) == "result"} for run in runs
    ]
    keys = differing_keys([way for way in ways if way] or [{}])
    if not keys:
        return []
    return [f"warning: the runs were scored in different ways ({', '.join(keys)}): their numbers do not compare."]


def note_different_tasks(rows: Sequence[Row]) -> list[str]:
    """A note where rows have other tasks: no single number ranks them."""
    sets = list(dict.fromkeys(" ".join(run.metrics) for row in rows for run in row.runs))
    if len(sets) < 2:
        return []
    return [
        f"warning: the rows have different tasks ({join_some(sets)}): they compare metric by metric, nothing ranks them."
    ]


def check_backbone(rows: Sequence[Row], single_task_runs: Sequence[Run]) -> None:
    """``UserError`` where a single-task run has another backbone than a row."""
    for run in (run for row in rows for run in row.runs):
        for single in single_task_runs:
            ours, theirs = (r.config.get("backbone.name") for r in (run, single))
            if None not in (ours, theirs) and ours != theirs:
                raise UserError(
                    f"Delta_MTL needs baselines of the same backbone, but {single.path} has backbone.name={theirs} and "
                    f"{run.path} has {ours}."
                )


def note_different_baselines(rows: Sequence[Row], single_task_runs: Sequence[Run]) -> list[str]:
    """A note on what, besides tasks and regulariser, baselines and rows differ in; or that it is not known."""
    runs = [*single_task_runs, *(run for row in rows for run in row.runs)]
    unknown = [str(run.path) for run in runs if "backbone.name" not in run.config]
    if unknown:
        return [
            f"warning: not known of which backbone {join_some(unknown)} is; Delta_MTL supposes that it is the same."
        ]
    keys = [
        k
        for k in differing_keys([result_settings(run) for run in runs])
        if k.split(".")[0] not in ("tasks", "regularizer")
    ]
    return [f"warning: rows and single-task baselines differ in {join_some(keys)}, too."] if keys else []


def join_some(items: Sequence[str], most: int = 3) -> str:
    items = list(dict.fromkeys(items))
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def note_missing_values(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Notes on metrics that runs of a row lack, and on pixels that the numbers leave out."""
    notes = []
    for row in rows:
        for run in row.runs:
            bad = {task: int(n) for task, found in run.metrics.items() if (n := found.get(NOT_FINITE, 0)) and n > 0}
            told = ", ".join(f"{task} {count}" for task, count in bad.items())
            notes += [f"warning: pixels without a finite prediction in {run.path}: {told}."] if told else []
        for column in (c for c in columns if c.task and c in row.values):
            known, all_seeds = row.summarize(column).num, len(row.values[column])
            if known < all_seeds:
                notes.append(f"warning: {row.label} has {column.key} in {known} of its {all_seeds} runs only.")
    return notes


def describe_provenance(runs: Sequence[Run]) -> str:
    """Where the numbers come from, in one line."""

    def values(fact: str) -> list[str]:
        return list(dict.fromkeys(str(run.record[fact]) for run in runs if run.record.get(fact) is not None))

    count = len({run.path for run in runs})
    parts = [f"{count} run{'s' * (count != 1)}"]
    if values("num_images"):
        parts.append(f"{values('num_images')[0]} pictures of split {join_some(values('split'))}")
    parts += [f"data {fingerprint}" for fingerprint in values("data_fingerprint")]
    if devices := values("device"):
        parts.append(f"on {join_some(devices)}")
    if commits := [commit[:10] for commit in values("commit")]:
        parts.append(f"commit{'s' * (len(commits) > 1)} {join_some(commits)}")
    if changed := sum(run.record.get("clean") is False for run in runs):
        parts.append(f"{changed} with uncommitted changes")
    return ", ".join(parts) + "."


# Against what


def split_baseline(paths: Sequence[Path], notes: list[str]) -> tuple[list[Run], list[Run]]:
    """The runs of ``--baseline``: (single-task runs, []) or ([], multi-task runs that may form a row)."""
    if not paths:
        return [], []
    runs, told = find_runs(paths)
    notes += told
    if len(runs) == 1 and runs[0].path.is_file():
        values = runs[0].metrics  # a file of single-task values, as if of one run per task
        return [Run(runs[0].path, {task: values[task]}) for task in values], []
    single = [run for run in runs if len(run.metrics) == 1]
    if single and len(single) < len(runs):
        other = next(run for run in runs if run not in single)
        raise UserError(
            f"--baseline takes single-task runs or one multi-task run, but {single[0].path} has one task and "
            f"{other.path} has {len(other.metrics)}."
        )
    return (runs, []) if single else ([], runs)


def make_baseline_row(single_task_runs: Sequence[Run], columns: Sequence[Column]) -> Row:
    """One row of all single-task runs; those of one task may differ in the seed only."""
    for task in TASK_NAMES:
        of_task = [run for run in single_task_runs if task in run.metrics]
        for run in of_task[1:]:
            keys = differing_keys([distinguishing_settings(of_task[0]), distinguishing_settings(run)])
            if keys:
                raise UserError(
                    f"{of_task[0].path} and {run.path} are both baselines of {task}, but differ in {join_some(keys)}; "
                    "give runs that differ in the seed only."
                )
        check_unique_seeds(Row(f"the baseline of {task}", tuple(of_task)))
    row = Row(SINGLE_TASK, tuple(single_task_runs), is_baseline=True)
    fill_row(row, columns)
    return row


def choose_reference(rows: Sequence[Row], runs: Sequence[Run], against: str | None, notes: list[str]) -> Row | None:
    """The row that others are compared with: as asked for; else the only one that is off, or the first of two."""
    own = [row for row in rows if not row.is_baseline]
    if runs:
        paths = {run.path.resolve() for run in runs}
        found = [row for row in own if any(run.path.resolve() in paths for run in row.runs)]
        if len(found) > 1:
            raise UserError(
                f"{runs[0].path} and the other runs to compare with are {len(found)} rows ({found[0].label}; "
                f"{found[1].label}); name those of one, or give --against LABEL."
            )
        return found[0]
    if against is not None:
        exact = [row for row in own if row.label == against]
        found = exact or [row for row in own if against in row.label]
        if len(found) != 1:
            problem = "fits several rows" if found else "is neither a row nor a run"
            raise UserError(f"--against {against} {problem}; choose one of: {'; '.join(row.label for row in own)}.")
        return found[0]
    off = [row for row in own if is_regularizer_off(row.runs[0])]
    if len(own) > 1 and len(off) == 1:
        return off[0]
    if len(own) == 2 and set(own[0].values) & set(own[1].values):
        return own[0]
    if len(own) > 2 and any(set(a.values) & set(b.values) for a, b in itertools.combinations(own, 2)):
        notes.append("--against LABEL adds the differences from that row, paired over seeds.")
    return None


def compares_on_off(reference: Row, rows: Sequence[Row]) -> bool:
    """Is the regulariser off in ``reference`` and on in all other rows, which differ in nothing else?"""
    others = [row.runs[0] for row in rows if row is not reference and not row.is_baseline]
    if reference.is_baseline or not others or not is_regularizer_off(reference.runs[0]):
        return False
    keys = [differing_keys([result_settings(reference.runs[0]), result_settings(run)]) for run in others]
    only = all(key.startswith("regularizer.") for found in keys for key in found)
    return (
        only
        and not any(map(is_regularizer_off, others))
        and all(run.config.get(REGULARIZER) is not None for run in others)
    )


def delta_name(reference: Row, rows: Sequence[Row]) -> str:
    return "Delta_on/off" if compares_on_off(reference, rows) else f"Delta vs. {reference.label}"


def add_delta_column(
    rows: Sequence[Row], base: Row, primary: Sequence[Column], name: str, columns: list[Column], notes: list[str]
) -> None:
    """A further column: each run's Delta in percent against the means of ``base`` over its seeds."""
    of = {c.task: base.summarize(c).mean for c in primary if not math.isnan(base.summarize(c).mean)}
    absent = [c.task for c in primary if c.task not in of and any(c in row.values for row in rows)]
    if base.is_baseline and absent:
        raise UserError(
            f"Delta_MTL needs a single-task baseline of every task, and {base.runs[0].path} and the others given "
            f"have none of {', '.join(absent)}; train it with tasks=single_{absent[0]}."
        )
    wanted = [c for c in primary if c.task in of and any(c in row.values for row in rows if row is not base)]
    if not wanted:
        return
    if not base.is_baseline and any(of[c.task] <= 0 for c in wanted):
        notes.append(f"warning: no {name}: a metric of {base.label} is 0.")
        return
    direction = {c.task: c.higher_is_better for c in wanted}
    baseline = {c.task: of[c.task] for c in wanted}
    delta = Column("", name, True, "%")
    without = []
    for row in rows:
        if row.is_baseline or any(c not in row.values for c in wanted):
            without += [row.label] * (not row.is_baseline)
            continue
        row.values[delta] = {
            seed: delta_mtl({c.task: row.values[c].get(seed, math.nan) for c in wanted}, baseline, direction)
            for seed in dict.fromkeys(seed for c in wanted for seed in row.values[c])
        }
    columns.append(delta)
    told = ", ".join(f"{c.task} {c.metric}" for c in wanted)
    notes.append(f"{name} = (100/T) sum_t s_t (M_t - B_t) / B_t over {told}; B: mean of {base.label}.")
    if without:
        notes.append(f"warning: {join_some(without)} has no {name}: a task is missing.")


def paired_differences(row: Row, reference: Row, columns: Sequence[Column], notes: list[str]) -> Difference | None:
    """Column by column over common seeds; None where there are none, with a note if seeds are known."""
    mine, theirs = ([run.seed for run in r.runs if run.seed is not None] for r in (row, reference))
    common = [seed for seed in mine if seed in theirs]
    if not mine or not theirs:
        return None
    if not common:
        notes.append(f"{row.label} and {reference.label} have no seed in common, so nothing is paired.")
        return None
    for label, seeds in ((row.label, mine), (reference.label, theirs)):
        if alone := [str(seed) for seed in sorted(seeds) if seed not in common]:
            other = reference.label if label == row.label else row.label
            notes.append(f"Seed {join_some(alone, 10)} of {label} has no partner in {other}.")
    shared = [column for column in columns if column in row.values and column in reference.values]
    paired = {column: paired_difference(row.values[column], reference.values[column]) for column in shared}
    known = {column: found for column, found in paired.items() if found.pairs}
    if not known:
        notes.append(f"{row.label} and {reference.label} have no metric with values in both, so nothing is paired.")
    return Difference(row, reference, known) if known else None
