"""Draw the figures of :mod:`mtcl.cli.consistency` from the content of its consistency.json."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mtcl.atomic import write_atomically

# Blue and vermillion of Okabe and Ito, distinct for all kinds of colour vision.
STYLES: tuple[tuple[str, str, Literal["-", "--"], str], ...] = (
    ("ap", "#0072B2", "-", "alike: anchor to positive (vertical line: mean)"),
    ("an", "#D55E00", "--", "different: anchor to negative (vertical line: mean)"),
)
KINDS = {
    "raw": "raw features F_t",
    "centred": "F_t without its mean",
    "projected": "projected features P(F_t)",
}
EXPLANATION = (
    "d = 2 - 2 cos of two pixels' features: 0 same direction, 2 orthogonal, 4 opposite. Every anchor (a pixel with at "
    "least one positive and one negative in its image) weighs the same. AUC: the chance that a random negative lies "
    "farther from its anchor than a random positive; 0.5 = no separation. "
)
CENTRED_NOTE = (
    "Features that come out of a ReLU are at most orthogonal (d up to 2); without their mean over all frames they can "
    "be opposite. "
)
STAR_NOTE = "*: no projector was trained for this pair; the mean over those of the target's other sources. "
SEPARATION_NOTE = (
    "AUC: the chance that, of an anchor's pairs in its image, a random negative lies farther away in d = 2 - 2 cos "
    "than a random positive; 1 = always, 0.5 = no separation (white). (nearness): the same with the distance in the "
    "image instead of the features', which any smooth map would show. "
)
DPI = 150


def draw_distances(path: Path, variant: Mapping[str, Any], target: str, title: str) -> None:
    """Draw the distributions of distances to positives and negatives for the features of one target.

    Args:
        path: of the PNG.
        variant: an entry of the JSON's "arms".
        target: the task of the features. Rows are kinds of features, columns the tasks whose labels define the pairs.
        title: of the data.
    """
    kinds = [kind for kind in KINDS if target in variant[kind]]
    sources = list(variant["raw"])
    notes = EXPLANATION + CENTRED_NOTE + (STAR_NOTE if is_starred(variant, [target]) else "")
    notes += "" if "projected" in kinds else "This run has no projectors. "
    figure = Figure(figsize=(max(3.0 * len(sources), 8), 2.35 * len(kinds) + 2.3))
    figure.suptitle(
        f"Features of {target}: are pixels that are alike by a task's labels nearer than pixels that differ?\n"
        f"{title}; {variant['name']}, step {variant['step']}",
        fontsize=13,
    )
    grid = figure.add_gridspec(len(kinds) + 1, len(sources), height_ratios=[0.1] + [1.0] * len(kinds))
    axes = np.array([[figure.add_subplot(grid[i + 1, j]) for j in range(len(sources))] for i in range(len(kinds))])
    for row, kind in zip(axes, kinds):
        highest = 0.0
        for plot, source in zip(row, sources):
            cell = variant[kind][target][source]
            highest = max([highest, *draw_histograms(plot, cell)])
            mark = "*" if uses_other_projectors(variant, kind, target, source) else ""
            plot.set_title(f"labels of {source}{mark}\nAUC {format_number(cell['auc'])}", fontsize=11)
        for plot in row:
            plot.set_ylim(0, 1.08 * highest or 1)
            plot.set_yticks([])
            plot.spines[["top", "right", "left"]].set_visible(False)
        row[0].set_ylabel(textwrap.fill(KINDS[kind], 15) + "\n\nshare of triplets", fontsize=11)
    for plot in axes[-1]:
        plot.set_xlabel("distance d to the anchor", fontsize=11)
    handles = [Line2D([], [], color=colour, linestyle=line, label=label) for _, colour, line, label in STYLES]
    strip = figure.add_subplot(grid[0, :])
    strip.set_axis_off()
    strip.legend(handles=handles, loc="center", ncols=2, fontsize=11, frameon=False)
    save_figure(figure, path, notes)


def draw_histograms(plot: Axes, cell: Mapping[str, Any]) -> list[float]:
    """Draw two histograms with their means, or "no such pairs"; return the heights of the bars."""
    edges = cell["bin_width"] * np.arange(len(cell["histogram_ap"]) + 1)
    plot.set_xlim(0, edges[-1])
    if not cell["anchors"]:
        plot.text(0.5, 0.5, "no such pairs", ha="center", va="center", transform=plot.transAxes)
        return []
    for which, colour, line, _ in STYLES:
        shares = cell[f"histogram_{which}"]
        plot.stairs(shares, edges, fill=True, color=colour, alpha=0.3)
        plot.stairs(shares, edges, color=colour, linestyle=line, linewidth=1.6)
        plot.axvline(cell[f"d_{which}"], color=colour, linestyle=line, linewidth=1.2)
    return [*cell["histogram_ap"], *cell["histogram_an"]]


def draw_separation(path: Path, variants: Sequence[Mapping[str, Any]], nearness: Mapping[str, Any], title: str) -> None:
    """Draw matrices of AUC, target x source, a row per kind of features.

    Args:
        path: of the PNG.
        variants: the JSON's "arms". Of two, the compared one, the first one and their difference are side by side.
        nearness: the JSON's "nearness".
        title: of the data.
    """
    # Centring hardly changes the order of distances; its numbers are in the JSON.
    kinds = [kind for kind in ("raw", "projected") if any(variant[kind] for variant in variants)]
    tasks = list(variants[0]["raw"])
    tables = {(i, kind): auc_matrix(variant, kind, tasks) for i, variant in enumerate(variants) for kind in kinds}
    differences = {kind: tables[0, kind] - tables[len(variants) - 1, kind] for kind in kinds}
    bottom = auc_row(nearness, tasks)
    scale = max(0.05, *(largest_absolute(table - 0.5) for table in [bottom, *tables.values()]))
    change = max(0.02, *map(largest_absolute, differences.values()))
    compared = len(variants) == 2
    rows, columns = (len(kinds), 3) if compared else (1, len(kinds))
    side = 0.62 * len(tasks) + 2.0
    figure = Figure(figsize=(max(columns * (side + 0.5), 9), rows * side + 1.7))
    suffix = "" if compared else f"; {describe_variant(variants[0], variants)}"
    question = "Do a target's features separate what each task's labels separate? (AUC)"
    figure.suptitle(f"{question}\n{title}{suffix}", fontsize=13)
    axes = figure.subplots(rows, columns, squeeze=False)
    for index, kind in enumerate(kinds):
        row = axes[index] if compared else axes[0, index:]
        for plot, i in zip(row, (1, 0) if compared else (0,)):
            name = f"{KINDS[kind]}\n{describe_variant(variants[i], variants)}" if compared else KINDS[kind]
            if variants[i][kind]:
                marks = [[uses_other_projectors(variants[i], kind, t, s) for s in tasks] for t in tasks]
                draw_auc(plot, tables[i, kind], bottom, marks, tasks, scale, name)
            else:
                draw_message(plot, f"{describe_variant(variants[i], variants)}:\nhas no projectors")
        if compared and np.isfinite(differences[kind]).any():
            limits = (-change, change)
            draw_matrix(row[2], differences[kind], tasks, tasks, limits, "BrBG", None, "+.3f")
            row[2].set_title(f"{KINDS[kind]}\ndifference (middle - left)", fontsize=11)
        elif compared:
            draw_message(row[2], "")
    save_figure(
        figure, path, SEPARATION_NOTE + (STAR_NOTE if any(is_starred(variant, tasks) for variant in variants) else "")
    )


def describe_variant(variant: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> str:
    """Return how a variant was trained and, if another one was trained alike, its file."""
    text = f"{variant['name']}, step {variant['step']}"
    alike = sum((other["name"], other["step"]) == (variant["name"], variant["step"]) for other in variants) > 1
    return f"{text}\n{'/'.join(Path(variant['checkpoint']).parts[-3:])}" if alike else text


def draw_auc(
    plot: Axes,
    table: np.ndarray,
    bottom: np.ndarray,
    marks: list[list[bool]],
    tasks: Sequence[str],
    scale: float,
    title: str,
) -> None:
    """Draw a matrix of AUC with the reference as a row below it."""
    starred = np.array([*marks, [False] * len(tasks)])
    limits = (0.5 - scale, 0.5 + scale)
    draw_matrix(plot, np.vstack([table, bottom]), [*tasks, "(nearness)"], tasks, limits, "PuOr_r", starred, ".3f")
    plot.axhline(len(tasks) - 0.5, color="black", linewidth=1.5)
    plot.set_title(title, fontsize=11)


def draw_matrix(
    plot: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    limits: tuple[float, float],
    colours: str,
    starred: np.ndarray | None,
    form: str,
) -> None:
    """Draw a matrix of numbers, coloured between ``limits``; NaN is a dash."""
    plot.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1])
    plot.set_xticks(range(len(columns)), columns, fontsize=10, rotation=30, ha="right", rotation_mode="anchor")
    plot.set_yticks(range(len(rows)), rows, fontsize=10)
    plot.tick_params(length=0)
    plot.set_xlabel("pairs by the labels of", fontsize=11)
    plot.set_ylabel("features of", fontsize=11)
    for (i, j), value in np.ndenumerate(values):
        strong = abs(value - sum(limits) / 2) > 0.35 * (limits[1] - limits[0])
        text = format_number(value, form) + ("*" if starred is not None and starred[i, j] else "")
        plot.text(j, i, text, ha="center", va="center", fontsize=10, color="white" if strong else "black")


def draw_message(plot: Axes, text: str) -> None:
    """Draw text in the middle of axes without ticks and frame."""
    plot.text(0.5, 0.5, text, ha="center", va="center", transform=plot.transAxes, fontsize=11)
    plot.set_xticks([])
    plot.set_yticks([])
    plot.spines[:].set_visible(False)


def auc_matrix(variant: Mapping[str, Any], kind: str, tasks: Sequence[str]) -> np.ndarray:
    """Return the AUC, target x source; NaN where it is undefined."""
    return np.array(
        [[variant[kind].get(target, {}).get(source, {}).get("auc", math.nan) for source in tasks] for target in tasks]
    )


def largest_absolute(values: np.ndarray) -> float:
    """Return the largest finite absolute value, 0 if there is none."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0))


def auc_row(nearness: Mapping[str, Any], tasks: Sequence[str]) -> np.ndarray:
    """Return the AUC of the distance in the image by each task's labels."""
    return np.array([nearness[source]["auc"] for source in tasks])


def uses_other_projectors(variant: Mapping[str, Any], kind: str, target: str, source: str) -> bool:
    """Return whether the numbers of a pair come from projectors of other pairs."""
    return variant[kind].get(target, {}).get(source, {}).get("projectors", [source]) != [source]


def is_starred(variant: Mapping[str, Any], targets: Sequence[str]) -> bool:
    """Return whether any number of these targets comes from projectors of other pairs."""
    return any(
        uses_other_projectors(variant, "projected", t, s) for t in targets for s in variant["projected"].get(t, {})
    )


def format_number(value: float, form: str = ".2f") -> str:
    """Format a number; NaN is a dash."""
    return "-" if math.isnan(value) else format(value, form)


def save_figure(figure: Figure, path: Path, notes: str) -> None:
    """Write a figure as PNG with ``notes`` below it, as wide as the figure."""
    text = textwrap.fill(notes, int(figure.get_figwidth() * 13))
    figure.set_layout_engine("constrained", rect=(0.005, 0.012, 0.99, 0.98))  # room for the lowest line's descenders
    figure.supxlabel(text, x=0.02, ha="left", fontsize=9.5, color="#333333")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=DPI, format="png"))
