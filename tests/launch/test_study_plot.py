"""The forest plot of a study shows the changes that its records have."""

import math

import pytest
from helpers.common import ROOT
from matplotlib.image import imread
from scipy import stats

from mtcl import UserError
from mtcl.launch import study_plot
from mtcl.launch.study_plot import plot_study
from mtcl.launch.study_tables import read_results
from mtcl.visualization.forest_plot import DARK, LIGHT

RESULTS = ROOT / "docs" / "results" / "nyud_small_cpu"


def test_intervals_are_those_of_changes_by_seed(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(study_plot, "draw_forest", lambda *args: drawn.append(args))
    paths = plot_study(RESULTS, tmp_path / "a.png")
    assert [path.name for path in paths] == ["a.png", "a_dark.png"]
    assert [args[5] for args in drawn] == [LIGHT, DARK]
    _, title, headings, rows, _, _ = drawn[0]
    assert title.endswith("change against off")
    assert headings == ["Delta", "semseg mIoU", "depth rmse", "normals mErr", "edge odsF"]
    _, records, _ = read_results(RESULTS)
    runs = {(one["arm"], one["seed"]): one["metrics"] for one in records}
    seeds = [seed for arm, seed in runs if arm == "on"]
    scores = [("semseg", "mIoU", 1), ("depth", "rmse", -1), ("normals", "mErr", -1), ("edge", "odsF", 1)]
    changes = [
        [100 * sign * (runs["on", seed][task][name] / runs["off", seed][task][name] - 1) for task, name, sign in scores]
        for seed in seeds
    ]
    for interval, values in zip(rows["on"], [[sum(row) / 4 for row in changes], *zip(*changes)]):
        test = stats.ttest_1samp(values, 0)
        assert interval.mean == pytest.approx(sum(values) / len(values))
        assert interval[1:] == pytest.approx(tuple(test.confidence_interval()))
    two_pairs = rows["MTPSL's consistency"]
    assert all(math.isnan(interval.low) and not math.isnan(interval.mean) for interval in two_pairs)
    assert "without a line: fewer than 3 pairs" in drawn[0][4]
    plot_study(RESULTS, tmp_path / "a.png", only=["on"], title="All labels")
    assert drawn[2][1] == "All labels"
    assert drawn[2][3] == {"on": rows["on"]}
    assert "without a line" not in drawn[2][4]


def test_both_figures_are_drawn_on_their_backgrounds(tmp_path):
    light, dark = (imread(path) for path in plot_study(RESULTS, tmp_path / "a.png", reference="on"))
    assert light.shape == dark.shape
    assert light[0, 0, :3].min() == 1
    assert dark[0, 0, :3].max() < 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", "has the variants off, on, shuffled"), ("mtpsl", "no variant of .* is compared with it")],
)
def test_a_reference_without_comparisons_is_refused(name, message, tmp_path):
    with pytest.raises(UserError, match=f"--reference {name}: .*{message}"):
        plot_study(RESULTS, tmp_path / "a.png", name)
    with pytest.raises(UserError, match=f"--only {name}: .* has no such variant that is compared with on"):
        plot_study(RESULTS, tmp_path / "a.png", "on", [name])
    assert not list(tmp_path.iterdir())
