"""Draw a forest plot: for each variant of a study its change of each score, with the interval."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtcl.atomic import write_atomically

DPI = 150
LABEL_WIDTH = 28  # characters of a line of a variant's label
SHORTER_SIDE = 0.25  # length of the axis on one side of 0, at least, as a part of that on the other


class Interval(NamedTuple):
    """A mean change and its interval in percent; positive is better. ``low`` and ``high`` are NaN without one."""

    mean: float
    low: float
    high: float


class Palette(NamedTuple):
    """The colours of a figure."""

    background: str
    text: str
    grid: str
    better: str
    worse: str
    undecided: str


# Blue and vermillion of Okabe and Ito, distinct for all kinds of colour vision; lighter ones on a dark page.
LIGHT = Palette("#ffffff", "#1f2328", "#d1d9e0", "#0072B2", "#D55E00", "#59636e")
DARK = Palette("#0d1117", "#f0f6fc", "#3d444d", "#56B4E9", "#FF9A4D", "#9198a1")


def draw_forest(
    path: Path,
    title: str,
    headings: Sequence[str],
    rows: Mapping[str, Sequence[Interval | None]],
    notes: str,
    palette: Palette = LIGHT,
) -> None:
    """Draw a plot per heading side by side, with a line per row.

    A filled circle is an interval without 0, a hollow one contains 0 or has no interval.

    Args:
        path: of the PNG.
        title: says what is compared with what.
        headings: of the plots, such as "Delta" and the tasks.
        rows: label -> an interval per heading, or None where there is no value.
        notes: sentences below the plots.
        palette: of the page that shows the figure.
    """
    labels = [textwrap.fill(label, LABEL_WIDTH) for label in rows]
    height = sum(0.22 + 0.17 * (label.count("\n") + 1) for label in labels)
    figure = Figure(figsize=(1.55 * len(headings) + 2.6, height + 1.9), facecolor=palette.background)
    figure.suptitle(textwrap.fill(title, int(figure.get_figwidth() * 9)), fontsize=12, color=palette.text)
    axes = figure.subplots(1, len(headings), sharey=True, squeeze=False)[0]
    for index, (plot, heading) in enumerate(zip(axes, headings)):
        draw_column(plot, [row[index] for row in rows.values()], palette)
        plot.set_title(heading, fontsize=11, color=palette.text, fontweight="bold" if index == 0 else "normal")
        plot.set_xlabel("% (right: better)", fontsize=9, color=palette.text)
    axes[0].set_yticks(range(len(labels)), labels, fontsize=10, color=palette.text)
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    text = textwrap.fill(notes, int(figure.get_figwidth() * 13))
    figure.set_layout_engine("constrained", rect=(0.005, 0.012, 0.99, 0.98))  # room for the lowest line's descenders
    figure.supxlabel(text, x=0.02, ha="left", fontsize=9, color=palette.text)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=DPI, format="png"))


def draw_column(plot: Axes, intervals: Sequence[Interval | None], palette: Palette) -> None:
    """Draw the intervals of one score below each other, on an axis with room on both sides of 0."""
    plot.set_facecolor(palette.background)
    plot.axvline(0, color=palette.text, linewidth=1)
    plot.grid(axis="x", color=palette.grid, linewidth=0.6)
    plot.set_axisbelow(True)
    lowest, highest = -0.1, 0.1
    for y, interval in enumerate(intervals):
        if interval is None:
            continue
        low, high = (interval.mean if math.isnan(end) else end for end in (interval.low, interval.high))
        decided = low > 0 or high < 0
        has_interval = not math.isnan(interval.low)
        colour = palette.undecided
        if decided and has_interval:
            colour = palette.better if low > 0 else palette.worse
        plot.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        fill = colour if decided and has_interval else palette.background
        plot.plot([interval.mean], [y], "o", markersize=6, color=colour, markerfacecolor=fill, markeredgewidth=1.5)
        lowest, highest = min(lowest, low), max(highest, high)
    shorter = SHORTER_SIDE * max(-lowest, highest)
    plot.set_xlim(1.12 * min(lowest, -shorter), 1.12 * max(highest, shorter))
    plot.locator_params(axis="x", nbins=4)
    plot.tick_params(axis="x", labelsize=9, colors=palette.text)
    plot.tick_params(axis="y", length=0)
    plot.spines[["top", "left", "right"]].set_visible(False)
    plot.spines["bottom"].set_color(palette.grid)
