"""Draw a study's differences as a forest plot, for pages with a light and with a dark background."""

import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from mtcl.errors import UserError
from mtcl.launch.study_tables import (
    DELTA,
    OTHER_DELTA,
    Report,
    VariantEffects,
    build_report,
    delta_by_pairs,
    read_results,
)
from mtcl.results.columns import Column
from mtcl.results.statistics import MIN_PAIRS, PairedDifference, paired_difference
from mtcl.visualization.forest_plot import DARK, LIGHT, Interval, draw_forest


def plot_study(
    results: Path, output: Path, reference: str | None = None, only: Collection[str] = (), title: str | None = None
) -> list[Path]:
    """Draw the differences from one variant, with their intervals, a light and a dark figure.

    Args:
        results: the folder that ``scripts/study.py --results`` has written.
        output: of the light PNG; the dark one's name ends with ``_dark.png``.
        reference: the variant to compare with. None: the one that most variants of the study are compared with.
        only: the variants to draw. Empty: all that are compared with ``reference``.
        title: of the figures. None: the names of the study and of the reference.

    Returns:
        The paths of the two figures.

    Raises:
        UserError: the folder has no results, nothing is compared with ``reference``, or a variant of ``only`` is not.
    """
    study, records, _ = read_results(results)
    report = build_report(study, records)
    name = reference or choose_reference(report)
    labels = {variant.name: variant.label for variant in study.variants}
    if name not in labels:
        raise UserError(f"--reference {name}: {results} has the variants {', '.join(labels)}")
    effects = [one for one in report.effects if one.reference.label == labels[name]]
    if not effects:
        raise UserError(f"--reference {name}: no variant of {results} is compared with it")
    if unknown := [one for one in only if labels.get(one) not in {effect.row.label for effect in effects}]:
        raise UserError(f"--only {unknown[0]}: {results} has no such variant that is compared with {name}")
    effects = [one for one in effects if not only or one.row.label in {labels[variant] for variant in only}]
    columns = [c for c in effects[0].columns if c not in (DELTA, OTHER_DELTA)]
    rows = {
        one.row.label: [delta_interval(one), *(relative_change(one, column) for column in columns)] for one in effects
    }
    pairs = {effect.paired.pairs for one in effects for effect in one.columns.values()}
    count = str(min(pairs)) if len(pairs) == 1 else f"{min(pairs)} to {max(pairs)}"
    without_line = f"; without a line: fewer than {MIN_PAIRS} pairs" if min(pairs) < MIN_PAIRS else ""
    notes = (
        "Change in percent of the reference, mean and 95 % interval of Student's t over "
        f"{count} pairs of equal seeds{without_line}, not corrected for the number of intervals. Filled, blue for "
        "better and orange for worse: the interval excludes 0. Delta is the mean of the tasks. Each plot has its scale."
    )
    title = title or f"{study.name}: change against {labels[name]}"
    headings = ["Delta", *(f"{column.task} {column.metric}" for column in columns)]
    paths = [output, output.with_name(f"{output.stem}_dark{output.suffix}")]
    for path, palette in zip(paths, (LIGHT, DARK)):
        draw_forest(path, title, headings, rows, notes, palette)
    return paths


def choose_reference(report: Report) -> str:
    """Return the name of the variant that most others are compared with."""
    counts = Counter(other for variant in report.study.variants for other in variant.against)
    if not counts:
        raise UserError(f"{report.study.name} compares no variants: add `against:` to one of them")
    return counts.most_common(1)[0][0]


def delta_interval(one: VariantEffects) -> Interval | None:
    """Return the interval of Delta; None if there is no Delta."""
    effect = one.columns.get(DELTA) or one.columns.get(OTHER_DELTA)
    return make_interval(effect.paired) if effect else None


def relative_change(one: VariantEffects, column: Column) -> Interval | None:
    """Return the interval of s (M - B) / B in percent over pairs of seeds, s = 1 where higher is better, else -1."""
    if column not in one.columns:
        return None
    changes = delta_by_pairs(one.row, one.reference, [column], [])
    return make_interval(paired_difference(changes, dict.fromkeys(changes, 0.0)))


def make_interval(paired: PairedDifference) -> Interval | None:
    """Return the interval that a verdict may rest on: without ends for too few pairs, None without any."""
    if math.isnan(paired.mean):
        return None
    return Interval(*paired[:3]) if paired.has_enough_pairs else Interval(paired.mean, math.nan, math.nan)
