"""Compute and format a study's results: means over seeds, paired differences, the smallest visible effect.

The tables come from the records alone, so that those under docs/results/ give the same Markdown as the runs did.
"""

import json
import math
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mtcl.atomic import write_text
from mtcl.config.renamed import upgrade_flat_config, upgrade_override
from mtcl.config.schema import LEGACY_VALUES, flatten, role_of
from mtcl.errors import UserError, escape_control_characters
from mtcl.launch.overrides import is_file_path, is_machine_key, make_portable
from mtcl.launch.study_file import NAME, Study, Variant
from mtcl.metrics.delta import delta_mtl
from mtcl.results.columns import Column
from mtcl.results.comparability import (
    check_same_data,
    check_same_scoring,
    describe_provenance,
    join_some,
    note_missing_values,
)
from mtcl.results.compare import (
    Comparison,
    add_delta_column,
    add_delta_p_column,
    holm_p_values,
    make_baseline_row,
    paired_differences,
)
from mtcl.results.rows import Row, choose_columns, fill_row, is_primary
from mtcl.results.run_files import (
    NON_NEGATIVE_INT,
    TEXT,
    TEXT_LIST,
    TEXT_MAPPING,
    check_record,
    check_types,
    parse_metrics,
    read_config,
    read_json_object,
    read_record,
)
from mtcl.results.runs import Run
from mtcl.results.statistics import MIN_PAIRS, PairedDifference, minimum_detectable_effect, paired_difference
from mtcl.results.tables import (
    ALPHA,
    NO_VALUE,
    TOO_FEW,
    Grid,
    align_columns,
    better_or_worse,
    column_heading,
    difference_unit,
    escape_markdown,
    footnotes,
    format_cell,
    format_interval,
    format_value,
    markdown_code,
    markdown_table,
    render,
)
from mtcl.run_folder import RunFolder

DELTA = Column("", "Delta_on/off", True, "%")  # against the first reference of a variant; in the table of means
OTHER_DELTA = Column("", "Delta", True, "%")  # against its others
OMITTED_FACTS = ("command", "overrides")  # of run.json: they may name folders of one machine
CONTAINS = "contains 0"
UNDECIDED = "not below 0.05"  # of a corrected p-value

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class PairedEffect:
    """A paired difference, and the smallest one that as many pairs would have shown."""

    paired: PairedDifference
    smallest: float
    adjusted: float | None = None  # p-value by Holm's method, where asked for

    def side(self, column: Column) -> str:
        """Say where the interval lies: wholly better, wholly worse, contains 0; too few pairs; "-" without one.

        With Holm's p-values: better, worse, not below 0.05.
        """
        if math.isnan(self.paired.low):
            return NO_VALUE
        if not self.paired.has_enough_pairs:
            return TOO_FEW
        if self.adjusted is not None:
            return UNDECIDED if self.adjusted >= ALPHA else better_or_worse(column, self.paired.mean)
        if not self.paired.excludes_zero:
            return CONTAINS
        return f"wholly {better_or_worse(column, self.paired.mean)}"


@dataclass(frozen=True, eq=False)
class VariantEffects:
    """``row`` minus ``reference``, column by column."""

    row: Row
    reference: Row
    columns: dict[Column, PairedEffect]


@dataclass(frozen=True, eq=False)
class Report:
    """The content of a study's tables; notes are sentences below them."""

    study: Study
    columns: list[Column]
    rows: list[Row]
    effects: list[VariantEffects]
    missing: list[str]
    notes: list[str]


# Records


def make_record(study: Study, variant: Variant, seed: int, overrides: Sequence[str], folder: Path) -> Record:
    """Return the record of a finished run, without single classes, paths or other traces of the machine."""
    run = RunFolder(folder)
    facts = {key: value for key, value in read_record(run.record).items() if key not in OMITTED_FACTS}
    metrics = read_json_object(run.metrics)
    parse_metrics(run.metrics, metrics)  # its errors name the file
    return {
        "study": study.name,
        "arm": variant.name,
        "seed": seed,
        "overrides": make_portable(overrides),
        "metrics": {task: without_classes(values) for task, values in metrics.items()},
        "config": portable_config(run.config),
        "run": facts,
    }


def without_classes(values: Any) -> Any:
    """Return a task's metrics without those of single classes."""
    return {m: v for m, v in values.items() if not m.startswith("IoU/")} if isinstance(values, dict) else values


def portable_config(path: Path) -> dict[str, Any]:
    """Return a run's resolved config, dotted key -> value, without the keys of its machine; empty without a file."""
    content = read_config(path) if path.is_file() else {}
    return {
        key: Path(value).name if isinstance(value, str) and is_file_path(key, value) else value
        for key, value in content.items()
        if not is_machine_key(key)
    }


def write_results(folder: Path, study: Study, records: Sequence[Record], command: str) -> None:
    """Write ``study.json`` and a file per record; remove the study's files of other runs."""
    definition = {
        "name": study.name,
        "command": command,
        "overrides": make_portable(study.overrides),
        "environment": dict(study.environment),
        "arms": [
            {
                "name": variant.name,
                "label": variant.label,
                "note": variant.note,
                "overrides": make_portable(variant.overrides),
                "seeds": list(variant.seeds),
                "against": list(variant.against),
                "task": variant.task,
            }
            for variant in study.variants
        ],
    }
    files = {"study.json": definition, **{name_result(record): record for record in records}}
    if (folder / "study.json").is_file():
        check_same_study(folder, read_json_object(folder / "study.json").get("name"), study.name)
    for path in folder.glob("*_seed*.json"):
        if path.name not in files and read_json_object(path).get("study") == study.name:
            path.unlink()
    for name, content in files.items():
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        write_text(folder / name, text)


def name_result(record: Record) -> str:
    """Return the file name of a run's record."""
    return f"{record['arm']}_seed{record['seed']}.json"


def check_same_study(folder: Path, other: Any, name: str) -> None:
    """Raise ``UserError`` where ``folder`` has the results of another study."""
    if other != name:
        raise UserError(f"{folder} holds the results of the study {other}, not of {name}; choose another folder.")


def read_results(folder: Path) -> tuple[Study, list[Record], str]:
    """Read the study, its records and its command from the files of :func:`write_results`."""
    path = folder / "study.json"
    definition = read_json_object(path)
    check_types(path, definition, STUDY_CHECKS)
    try:
        variants = tuple(read_variant(path, variant) for variant in definition["arms"])
        study = Study(
            definition["name"],
            tuple(map(upgrade_override, definition["overrides"])),
            variants,
            environment=definition["environment"],
        )
        files = [folder / f"{variant.name}_seed{seed}.json" for variant in variants for seed in variant.seeds]
        return study, [read_result(file, study) for file in files if file.is_file()], definition["command"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not of scripts/study.py: {error!r} is missing or wrong.") from error


STUDY_CHECKS = {
    "name": TEXT,
    "command": TEXT,
    "overrides": TEXT_LIST,
    "environment": TEXT_MAPPING,
    "arms": ("a list of mappings", lambda v: isinstance(v, list) and all(isinstance(variant, dict) for variant in v)),
}
VARIANT_CHECKS = {
    "name": ("the name of a file", lambda v: isinstance(v, str) and bool(NAME.fullmatch(v))),
    "overrides": TEXT_LIST,
    "seeds": ("a list of whole numbers >= 0", lambda v: isinstance(v, list) and all(map(NON_NEGATIVE_INT[1], v))),
    "against": TEXT_LIST,
    **dict.fromkeys(("label", "note", "task"), TEXT),
}
RESULT_CHECKS = {
    "arm": TEXT,
    "seed": NON_NEGATIVE_INT,
    "metrics": ("a mapping {task: {metric: value}}", lambda v: isinstance(v, dict)),
    **dict.fromkeys(("run", "config"), ("a mapping {key: value}", lambda v: isinstance(v, dict))),
}


def read_variant(path: Path, variant: Mapping[str, Any]) -> Variant:
    """Read a variant of ``study.json``."""
    check_types(path, variant, VARIANT_CHECKS)
    return Variant(
        variant["name"],
        tuple(map(upgrade_override, variant["overrides"])),
        tuple(variant["seeds"]),
        tuple(variant["against"]),
        variant["label"],
        variant["note"],
        variant["task"],
    )


def read_result(path: Path, study: Study) -> Record:
    """Read one run's record, of a variant of ``study``."""
    content = read_json_object(path)
    check_types(path, content, RESULT_CHECKS)
    absent = [key for key in ("arm", "seed", "metrics", "run") if content.get(key) is None]
    if absent or content["arm"] not in [variant.name for variant in study.variants]:
        raise UserError(
            f"{path} is not of scripts/study.py: {absent[0] if absent else content['arm']} is missing or wrong."
        )
    config = {} if content.get("config") is None else {"config": upgrade_flat_config(content["config"])}
    return content | {"run": check_record(path, content["run"])} | config


# Numbers


def build_report(
    study: Study, records: Sequence[Record], holm: bool = False, metrics: Mapping[str, str] = MappingProxyType({})
) -> Report:
    """Compute the content of the tables.

    Args:
        study: The study.
        records: Those of its finished runs.
        holm: Base verdicts on p-values corrected for the number of intervals (Holm).
        metrics: Task -> the metric that represents it, in Deltas too, in place of its primary metric.

    Raises:
        UserError: The runs can't be compared, or have no such metric.
    """
    runs: dict[str, dict[int, Run]] = {variant.name: {} for variant in study.variants}
    for record in records:
        path = Path(record["arm"]) / f"seed_{record['seed']}"
        facts = {"seed": record["seed"], **record["run"]}
        scoring = flatten({"evaluation": facts["evaluation"]}) if isinstance(facts.get("evaluation"), dict) else ()
        runs[record["arm"]][record["seed"]] = Run(path, parse_metrics(path, record["metrics"]), facts, dict(scoring))
    missing = [f"{a.name} seed {seed}" for a in study.variants for seed in a.seeds if seed not in runs[a.name]]
    all_runs = [run for variant_runs in runs.values() for run in variant_runs.values()]
    notes = check_same_data(all_runs) + check_same_scoring(all_runs) + check_same_settings(study, records)
    columns = choose_columns(all_runs, False, notes, metrics)
    tasks = [column for column in columns if is_primary(column, columns)]
    rows: dict[str, Row] = {}
    for variant in study.variants:
        if runs[variant.name] and not variant.task:
            rows[variant.name] = Row(
                variant.label, tuple(runs[variant.name][seed] for seed in sorted(runs[variant.name]))
            )
            fill_row(rows[variant.name], columns)
    effects = []
    for variant in study.variants:
        for i, other in enumerate(variant.against):
            if variant.name in rows and other in rows:
                effects += paired_effects(rows[variant.name], rows[other], tasks, OTHER_DELTA if i else DELTA, notes)
    effects = apply_holm(effects) if holm else effects
    if any(DELTA in row.values for row in rows.values()):
        columns.append(DELTA)
    single_task = [run for variant in study.variants if variant.task for run in runs[variant.name].values()]
    table_rows = list(rows.values())
    if single_task:
        base = make_baseline_row(single_task, tasks)
        add_delta_mtl(table_rows, base, tasks, columns, notes)
        table_rows = [base, *table_rows]
    notes += note_missing_values(table_rows, columns)
    return Report(
        study,
        columns,
        table_rows,
        effects,
        missing,
        [*map(escape_control_characters, [*describe_runs(all_runs), *notes])],
    )


def apply_holm(effects: Sequence[VariantEffects]) -> list[VariantEffects]:
    """Add Holm's p-values, over all intervals that may have a verdict."""
    values = holm_p_values([{column: effect.paired for column, effect in one.columns.items()} for one in effects])
    return [
        replace(one, columns={c: replace(effect, adjusted=of_one.get(c)) for c, effect in one.columns.items()})
        for one, of_one in zip(effects, values)
    ]


def check_same_settings(study: Study, records: Sequence[Record]) -> list[str]:
    """Return warnings for variants whose runs have different settings: a default was changed in between."""
    notes = []
    for variant in study.variants:
        of_variant = [one["config"] for one in records if one["arm"] == variant.name and one.get("config")]
        configs = [LEGACY_VALUES | config for config in of_variant]  # what runs did that knew fewer keys
        keys = sorted({key for config in configs for key in config if role_of(key) == "result"})
        differing = [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]
        if differing:
            notes.append(
                f"warning: the runs of {variant.name} were made by different settings: {join_some(differing)}."
            )
    return notes


def paired_effects(
    row: Row, reference: Row, tasks: Sequence[Column], delta: Column, notes: list[str]
) -> list[VariantEffects]:
    """Compare ``row`` with ``reference`` and add the column ``delta`` to the row; [] without common seeds."""
    differences = paired_differences(row, reference, tasks, notes)
    if differences is None:
        return []
    effects = {
        column: PairedEffect(paired, minimum_detectable_effect(row.values[column], reference.values[column]))
        for column, paired in differences.columns.items()
    }
    deltas = delta_by_pairs(row, reference, list(effects), notes)
    if deltas:
        row.values[delta] = deltas
        zeros = dict.fromkeys(deltas, 0.0)
        effects[delta] = PairedEffect(paired_difference(deltas, zeros), minimum_detectable_effect(deltas, zeros))
    return [VariantEffects(row, reference, effects)]


def delta_by_pairs(row: Row, reference: Row, tasks: Sequence[Column], notes: list[str]) -> dict[Hashable, float]:
    """Return seed -> Delta of the row's run against the reference's run of the same seed, in percent."""
    seeds = [run.seed for run in row.runs if run.seed in {other.seed for other in reference.runs}]
    direction = {column.task: column.higher_is_better for column in tasks}
    deltas: dict[Hashable, float] = {}
    for seed in seeds if tasks else ():
        values, base = ({c.task: r.values[c].get(seed, math.nan) for c in tasks} for r in (row, reference))
        if any(value <= 0 for value in base.values()):
            notes.append(f"warning: no Delta of {row.label}: a metric of {reference.label} is 0.")
            return {}
        deltas[seed] = delta_mtl(values, base, direction)
    return deltas


def add_delta_mtl(
    rows: Sequence[Row], base: Row, tasks: Sequence[Column], columns: list[Column], notes: list[str]
) -> None:
    """Add Delta_MTL of the rows against the means of the single-task runs; a note where some are missing."""
    used = [column for column in tasks if any(column in row.values for row in rows)]
    absent = [c.task for c in used if math.isnan(base.summarize(c).mean)]
    zero = [c.task for c in used if base.summarize(c).mean <= 0]
    if absent:
        notes.append(f"warning: no Delta_MTL: there is no single-task run of {join_some(absent)}.")
    elif zero:
        notes.append(f"warning: no Delta_MTL: the single-task value of {join_some(zero)} is 0.")
    else:
        add_delta_column(rows, base, used, "Delta_MTL", columns, notes)
        add_delta_p_column(rows, base, columns, notes)


def describe_runs(runs: Sequence[Run]) -> list[str]:
    """Return notes on where the numbers come from: data, machine, commit; steps and versions."""

    def values(fact: str) -> list[str]:
        return list(dict.fromkeys(str(run.record[fact]) for run in runs if run.record.get(fact) is not None))

    versions = [run.record["versions"]["torch"] for run in runs if "torch" in run.record.get("versions", {})]
    parts = [f"{join_some(values('step'))} steps"] if values("step") else []
    parts += [f"torch {join_some(versions)}"] if versions else []
    return [
        describe_provenance(runs),
        *([f"{', '.join(parts)}; numbers of the last state of each run."] if parts else []),
    ]


# Formatting


def effect_grid(one: VariantEffects) -> Grid:
    """Return a line per metric: difference, interval, its side, pairs, smallest visible effect."""
    lines = []
    for column, effect in one.columns.items():
        paired, unit = effect.paired, difference_unit(column)
        arrow = "↑" if column.higher_is_better else "↓"
        name = f"{column.task} {column.metric} {arrow}".strip() + (f" ({unit if column.task else '%'})" if unit else "")
        difference = format_value(column, paired.mean, signed=True)
        smallest = format_value(column, effect.smallest).lstrip("+")
        if effect.adjusted is not None:
            smallest += f" (p {effect.adjusted:.3g})"
        lines.append(
            [name, difference, format_interval(column, paired), effect.side(column), str(paired.pairs), smallest]
        )
    return lines


EFFECT_HEAD = ["difference in", "mean", "95 % interval", "verdict", "pairs", "smallest visible"]


VERDICTS = {
    "wholly better": "is wholly better for",
    "wholly worse": "is wholly worse for",
    "better": "with Holm's correction is better for",
    "worse": "with Holm's correction is worse for",
    CONTAINS: f"{CONTAINS} for",
    UNDECIDED: "with Holm's correction decides nothing for",
    TOO_FEW: f"is of fewer than {MIN_PAIRS} pairs, which decide nothing, for",
    NO_VALUE: "is not known for",
}


def format_verdicts(one: VariantEffects) -> str:
    """Return one sentence on the sides of the intervals of one variant."""
    sides: dict[str, list[str]] = {side: [] for side in VERDICTS}
    for column, effect in one.columns.items():
        sides[effect.side(column)].append(column.task or column.metric)
    texts = [f"{VERDICTS[side]} {', '.join(names)}" for side, names in sides.items() if names]
    return f"{one.row.label} against {one.reference.label}: the interval {'; '.join(texts)}."


def list_notes(report: Report) -> list[str]:
    """Return notes on how the numbers are computed, and on missing runs."""
    lines = []
    if report.effects:
        names = [f"{c.task} {c.metric}" for c in report.effects[0].columns if c.task]
        if DELTA in report.columns:
            lines.append(
                f"Delta_on/off = (100/T) sum_t s_t (M_t - B_t) / B_t over {', '.join(names)}; M: a run of the variant, "
                "B: the run of the same seed of the (first) variant it is compared with."
            )
        count = sum(not math.isnan(e.paired.low) for one in report.effects for e in one.columns.values())
        tested = sum(e.adjusted is not None for one in report.effects for e in one.columns.values())
        correction = "not corrected for their number"
        if tested:
            correction += f"; verdicts and p by Holm's method for the {tested} of {MIN_PAIRS} pairs or more"
        lines.append(f"Intervals are Student's t over pairs of equal seeds, {count} in all, {correction}.")
        lines.append(
            "Smallest visible: the true difference that a paired t test (two-sided, 5 %) of as many pairs with this "
            "spread detects with a power of 80 %, (t_0.975 + t_0.80) s / sqrt(n)."
        )
    if report.missing:
        count = len(report.missing)
        lines.append(f"warning: {count} run{'s' * (count > 1)} missing: {join_some(report.missing, 12)}.")
    return [*lines, *report.notes]


def variant_notes(study: Study) -> list[str]:
    """Return the notes of the study's file."""
    return [f"{variant.label}: {variant.note}" for variant in study.variants if variant.note]


def format_text(report: Report) -> str:
    """Format the report for a terminal."""
    table = render(Comparison(report.columns, report.rows, [], []), "text")
    blocks = [table.rstrip("\n")]
    for one in report.effects:
        head = [["", *EFFECT_HEAD[1:]]]
        blocks.append(
            f"{one.row.label} minus {one.reference.label}\n" + align_columns(head, effect_grid(one), num_left=1)
        )
    lines = [*map(format_verdicts, report.effects), *list_notes(report), *variant_notes(report.study)]
    notes = [textwrap.fill(line, 120, subsequent_indent="  ") for line in lines]
    return "\n\n".join([*blocks, "\n".join(notes)]) + "\n"


def format_markdown(report: Report, command: str) -> str:
    """Format the report as Markdown: two tables, their verdicts, and how to repeat them."""
    blocks = [format_means(report)]
    if report.effects:
        lines: Grid = []
        for one in report.effects:
            name = f"{markdown_code(one.row.label)} minus {markdown_code(one.reference.label)}"
            for i, line in enumerate(effect_grid(one)):
                lines.append(["" if i else name, *map(escape_markdown, line)])
        blocks.append(markdown_table(["variants", *EFFECT_HEAD], lines, num_left=2))
    spread = footnotes(Comparison(report.columns, report.rows, [], []))
    sentences = [*map(format_verdicts, report.effects), *spread, *list_notes(report)]
    blocks.append("\n".join(f"- {sentence}" for sentence in sentences))
    blocks.append("\n".join(format_settings(report.study)))
    blocks.append(f"```sh\n{command}\n```")
    return "\n\n".join(blocks) + "\n"


def format_differences(report: Report) -> str:
    """Format a line per comparison: mean differences with their intervals, as Markdown; bold ones decide.

    An interval decides if it has enough pairs and excludes 0; with Holm's correction, if p is below 0.05.
    """
    tasks = [column for column in report.columns if column.task]
    names = [f"{c.task} {c.metric} {'↑' if c.higher_is_better else '↓'}" for c in tasks]
    units = [difference_unit(column) for column in tasks]
    headings = [f"{name} ({unit})" if unit else name for name, unit in zip(names, units)]
    lines: Grid = []
    for one in report.effects:
        delta = DELTA if DELTA in one.columns else OTHER_DELTA
        pairs = max(effect.paired.pairs for effect in one.columns.values())
        name = f"{markdown_code(one.row.label)} minus {markdown_code(one.reference.label)}"
        lines.append([name, str(pairs), *(format_difference(one, column) for column in [*tasks, delta])])
    return markdown_table(["variants", "pairs", *headings, "Delta ↑ (%)"], lines, num_left=1)


def format_difference(one: VariantEffects, column: Column) -> str:
    """Format a mean difference with its interval, in bold if it decides; "-" without one."""
    if column not in one.columns:
        return NO_VALUE
    effect = one.columns[column]
    text = f"{format_value(column, effect.paired.mean, signed=True)} {format_interval(column, effect.paired)}"
    return f"**{text}**" if effect.side(column).endswith(("better", "worse")) else text


def format_means(report: Report) -> str:
    """Format each variant's mean and standard deviation over its seeds, as Markdown."""
    head = ["variant", "n", *(escape_markdown(f"{c.task} {column_heading(c)}".strip()) for c in report.columns)]
    body = [
        [markdown_code(row.label), str(row.num_seeds), *(format_cell(c, row) for c in report.columns)]
        for row in report.rows
    ]
    return markdown_table(head, body, num_left=1)


def format_settings(study: Study) -> list[str]:
    """Format the overrides of all runs and of each variant, as Markdown."""
    common = " ".join(make_portable(study.overrides)) or "the defaults"
    environment = " ".join(f"{key}={value}" for key, value in study.environment.items())
    lines = [f"Every run: `{common}`" + (f", with `{environment}`" if environment else "") + ".", ""]
    for variant in study.variants:
        overrides = " ".join(make_portable(variant.overrides))
        seeds = ", ".join(map(str, variant.seeds))
        note = f" {variant.note}" if variant.note else ""
        settings = f"`{overrides}`" if overrides else "nothing more"
        lines.append(f"- {markdown_code(variant.label)}: {settings}, seeds {seeds}.{note}")
    return lines


def to_json(report: Report) -> Mapping[str, Any]:
    """Return the numbers in full: fractions, metres, degrees; Deltas in percent."""
    return {
        "study": report.study.name,
        "rows": {
            row.label: {
                column.key: {
                    **row.summarize(column)._asdict(),
                    "values": {str(k): v for k, v in row.values[column].items()},
                }
                for column in report.columns
                if column in row.values
            }
            for row in report.rows
        },
        "differences": [
            {
                "arm": one.row.label,
                "against": one.reference.label,
                "metrics": {
                    column.key: {
                        **effect.paired._asdict(),
                        "smallest_effect": effect.smallest,
                        "interval": effect.side(column),
                        **({} if effect.adjusted is None else {"p_holm": effect.adjusted}),
                    }
                    for column, effect in one.columns.items()
                },
            }
            for one in report.effects
        ],
        "missing": report.missing,
        "notes": report.notes,
    }
