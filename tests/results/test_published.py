"""Rows of published tables beside runs: formats, Delta_p, marks, never ranked; bad files in one sentence."""

import csv
import io

import pytest
from helpers.common import ROOT
from helpers.run_folders import write_run

from mtcl import UserError
from mtcl.results.compare import compare
from mtcl.results.published import read_published
from mtcl.results.tables import find_best, render
from mtcl.tasks.names import SCORES

SHIPPED = sorted((ROOT / "docs" / "published").glob("*.yaml"))
MTAN = {f"evaluation.options.{task}.protocol": "mtan" for task in ("semseg", "depth")}
SETTINGS = {"data.name": "cityscapes_mtl", "backbone.name": "vgg16_bn", **MTAN}
ROWS = """
source: a paper
settings: {data.name: cityscapes_mtl}
rows:
  - {label: alone, single_task: true, semseg: {mIoU: 0.5, pixel_accuracy: 0.8}, depth: {abs_err: 0.02, rel_err: 20.0}}
  - {label: equal, seeds: 3, semseg: {mIoU: 0.55, pixel_accuracy: 0.8}, depth: {abs_err: 0.02, rel_err: 18.0}}
  - {label: printed, delta_p: -1.5, source: another, semseg: {mIoU: 0.9}}
  - {label: short, semseg: {mIoU: 0.4, pixel_accuracy: null}}
"""
TABLE = """label,source,single_task,seeds,delta_p,semseg/mIoU,semseg/pixel_accuracy,depth/abs_err,depth/rel_err
alone,a paper,true,,,0.5,0.8,0.02,20
equal,a paper,,3,,0.55,0.8,0.02,18
printed,another,false,,-1.5,0.9,,,

short,a paper,,,,0.4,,,
"""


def write_rows(tmp_path, text, name="rows.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def runs(tmp_path):
    """Two rows of one run each."""
    for i, value in enumerate((0.6, 0.7)):
        metrics = {"semseg": {"mIoU": value, "pixel_accuracy": 0.8}, "depth": {"abs_err": 0.01, "rel_err": 10.0}}
        write_run(tmp_path / "runs" / str(i), 0, metrics, SETTINGS | {"optimizer.lr": 0.1 * (i + 1)})
    return tmp_path / "runs"


@pytest.mark.parametrize(("text", "name"), [(ROWS, "rows.yaml"), (TABLE, "rows.csv")])
def test_rows_stand_below_those_of_the_runs_with_delta_p(tmp_path, runs, text, name):
    comparison = compare([runs], published=write_rows(tmp_path, text, name))
    labels = [
        "optimizer.lr=0.1",
        "optimizer.lr=0.2",
        *(f"{x} (published)" for x in ("alone", "equal", "printed", "short")),
    ]
    assert [row.label for row in comparison.rows] == labels
    delta = comparison.columns[-1]
    assert (delta.metric, [c.key for c in comparison.columns[:2]]) == ("Delta_p", ["semseg/mIoU", "depth/abs_err"])
    by_hand = 50 * ((0.1 + 0) / 2 + (0 + 0.1) / 2)
    values = {row.label.split()[0]: row.values.get(delta) for row in comparison.rows[2:]}
    expected = {
        "alone": None,
        "equal": {"published": pytest.approx(by_hand)},
        "printed": {"published": -1.5},
        "short": None,
    }
    assert values == expected
    notes = " ".join(comparison.notes)
    assert f"{name}; they are not ranked" in notes
    assert "alone, equal, short: source: a paper." in notes
    assert "printed: source: another." in notes
    assert "Delta_p of equal: computed against alone (published)" in notes
    assert "Delta_p of printed: as printed." in notes


def test_published_rows_are_ranked_with_nothing(tmp_path, runs):
    plain, comparison = compare([runs]), compare([runs], published=write_rows(tmp_path, ROWS))
    assert find_best(comparison.columns[0], comparison.rows) == [False, True, False, False, False, False]
    assert [one.reference.label for one in comparison.differences] == [one.reference.label for one in plain.differences]
    assert len(comparison.differences) == 1
    assert [row.label for row in comparison.rows[:2]] == [row.label for row in plain.rows]


def test_every_format_marks_the_rows_and_their_seeds(tmp_path, runs):
    comparison = compare([runs], published=write_rows(tmp_path, ROWS))
    texts = {form: render(comparison, form) for form in ("text", "markdown", "latex", "csv")}
    assert all("equal (published)" in text for text in texts.values())
    lines = {line[0]: line for line in csv.reader(io.StringIO(texts["csv"]))}
    assert (lines["equal (published)"][1], lines["alone (published)"][1]) == ("3", "")
    assert "**70.00**" in texts["markdown"]
    assert "**90.00**" not in texts["markdown"]
    line = next(line for line in texts["text"].splitlines() if line.startswith("alone"))
    assert line.split()[-1] == "-"
    assert texts["latex"].count("midrule") == 3, "one more in the heading's place, one in the differences'"


def test_a_run_of_other_data_gets_a_warning(tmp_path, runs):
    write_run(tmp_path / "other", 0, {"semseg": {"mIoU": 0.5}}, {"data.name": "nyud"})
    path = write_rows(tmp_path, ROWS)
    assert not any("compare with runs of" in note for note in compare([runs], published=path).notes)
    notes = compare([tmp_path / "other"], published=path).notes
    assert any(note.startswith("warning:") and "data.name=cityscapes_mtl" in note and "nyud." in note for note in notes)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_name_sources_of_every_row(path):
    table = read_published(path)
    assert {"data.name", "backbone.name"} <= set(table.settings)
    assert all(row.source and row.metrics for row in table.rows)
    assert sum(row.is_single_task for row in table.rows) == 1
    for row in table.rows:
        for task, metrics in row.metrics.items():
            fractions = [value for name, value in metrics.items() if SCORES[task].units.get(name, "%") == "%"]
            assert all(0 < value < 1 for value in fractions), (row.label, task)


def test_delta_p_of_a_shipped_row_is_the_one_printed_elsewhere(tmp_path, cli):
    """DB-MTL (arXiv 2308.12029) prints +8.16 for Aligned-MTL on SegNet, from these numbers."""
    metrics = {"semseg": {"mIoU": 0.4}, "depth": {"abs_err": 0.5}, "normals": {"mErr": 25.0}}
    run = write_run(tmp_path / "run", 0, metrics, {"data.name": "nyuv2_13"})
    path = ROOT / "docs" / "published" / "nyuv2_13_segnet_mtan.yaml"
    result = cli("scripts/compare.py", str(run), "--published", str(path))
    assert result.code == 0, result.err
    line = next(line for line in result.out.splitlines() if line.startswith("Aligned-MTL (published)"))
    assert line.split()[2:] == ["40.82", "0.5300", "25.19", "+8.16", "-"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("rows: [", "not a readable YAML"),
        ("[1]", "must hold a mapping with the key rows, not a list"),
        ("source: a", "has no rows; give at least one"),
        ("rows: []", r"has \[\] for rows; it must be a list of rows"),
        ("rows: [1]", "has no mapping in row 1"),
        ("row: []", "has the unknown key row; known are source, settings, rows"),
        ("rows: [{label: a, semseg: {mIoU: 0.5}, miou: 3}]", "unknown key miou in row 1; known are label"),
        ("rows: [{semseg: {mIoU: 0.5}}]", "has no label in row 1"),
        ("rows: [{label: a}]", "row 1 contains no task"),
        ("rows: [{label: a, semseg: {mIoU: 53.5}}]", "row 1 has 53.5 for semseg/mIoU; files contain fractions"),
        ("rows: [{label: a, semseg: {mIoU: high}}]", "row 1 has 'high' for semseg/mIoU; it must be a finite number"),
        ("rows: [{label: a, seeds: 0, semseg: {mIoU: 0.5}}]", "row 1 has 0 for seeds; it must be a whole number >= 1"),
        ("rows: [{label: a, delta_p: big, semseg: {mIoU: 0.5}}]", "row 1 has 'big' for delta_p; .* a finite number"),
        ("rows: [{label: a, depth: {abs_err: 1}}, {label: a, depth: {abs_err: 2}}]", "several rows with the label a"),
        (
            "rows: [{label: a, single_task: true, edge: {odsF: 1}}, {label: b, single_task: true, edge: {odsF: 1}}]",
            "several rows with single_task: true",
        ),
    ],
)
def test_bad_yaml_gets_one_sentence(tmp_path, text, match):
    with pytest.raises(UserError, match=match) as caught:
        read_published(write_rows(tmp_path, text))
    assert "rows.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "must begin with a line of column names, among them label"),
        ("name,semseg/mIoU\na,0.5\n", "must begin with a line of column names, among them label"),
        ("label,semseg/mIoU\na,0.5,0.6\n", "has 3 cells in row 1, and 2 column names"),
        ("label,miou\na,0.5\n", "unknown key miou in row 1"),
        ("label,semseg/mIoU\na,n/a\n", "row 1 has 'n/a' for semseg/mIoU"),
        ('label,semseg/mIoU\n"a,0.5\n', "is not a readable CSV"),
    ],
)
def test_bad_csv_gets_one_sentence(tmp_path, text, match):
    with pytest.raises(UserError, match=match) as caught:
        read_published(write_rows(tmp_path, text, "rows.csv"))
    assert "\n" not in str(caught.value)


def test_files_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"must be a \.yaml or \.csv file"):
        read_published(write_rows(tmp_path, "{}", "rows.json"))
    with pytest.raises(UserError, match=r"rows\.csv can't be read"):
        read_published(tmp_path / "rows.csv")
