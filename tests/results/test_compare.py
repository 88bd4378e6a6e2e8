"""Comparisons of runs and their tables: against obvious references and golden strings."""

import csv
import io
import itertools
import json
import statistics
from pathlib import Path

import pytest
from helpers.common import Result
from helpers.published import HIGHER, NYUD, PUBLISHED, SINGLE
from helpers.run_folders import ON, VALUES, write_run

from mtcl import UserError
from mtcl.config.schema import RULES, role_of
from mtcl.results.comparability import check_same_scoring
from mtcl.results.compare import compare, compares_on_off
from mtcl.results.runs import Run, natural_key, read_run
from mtcl.results.tables import FORMATS, render

# Made-up runs


TWO = [(0.400, 0.60), (0.410, 0.62)]
TWO_ON = [(0.420, 0.59), (0.434, 0.608)]


def two_tasks(semseg, depth):
    return {"semseg": {"mIoU": semseg, "pixel_accuracy": 0.5}, "depth": {"rmse": depth}}


@pytest.fixture
def arms(tmp_path):
    """A sweep: two seeds off, two seeds on, of two tasks."""
    for i, (arm, seed) in enumerate(itertools.product((0, 1), (0, 1))):
        values = (TWO, TWO_ON)[arm][seed]
        write_run(tmp_path / "sweep" / str(i), seed, two_tasks(*values), ON if arm else None)
    return tmp_path / "sweep"


@pytest.fixture
def singles(tmp_path):
    """Single-task runs: two seeds of semseg (mean 0.4), one of depth (0.45)."""
    for seed, value in enumerate((0.39, 0.41)):
        write_run(tmp_path / "single" / f"semseg{seed}", seed, {"semseg": {"mIoU": value}})
    write_run(tmp_path / "single" / "depth", 0, {"depth": {"rmse": 0.45}})
    return tmp_path / "single"


def lines(comparison, format="text"):
    return render(comparison, format).splitlines()


# Rows


def test_runs_that_differ_in_the_seed_only_are_a_row_named_by_what_differs(arms):
    comparison = compare([arms])
    assert [row.label for row in comparison.rows] == ["regularizer=none", "regularizer=contrastive"]
    assert [[run.seed for run in row.runs] for row in comparison.rows] == [[0, 1], [0, 1]]
    assert comparison.rows[1].summarize(comparison.columns[0]) == pytest.approx(
        (0.427, statistics.stdev([0.42, 0.434]), 2)
    )


def test_names_are_the_choices_that_were_typed_and_keys_only_where_these_do_not_tell(tmp_path):
    arms = [("off", {}, "none"), ("a", ON, "mine"), ("b", ON | {"regularizer.weight": 0.1}, "mine")]
    paths = [write_run(tmp_path / n, 0, config=c, overrides=[f"regularizer={word}"]) for n, c, word in arms]
    assert [row.label for row in compare(paths).rows] == [
        "regularizer=none",
        "regularizer=mine, regularizer.weight=0.5",
        "regularizer=mine, regularizer.weight=0.1",
    ]


def test_a_step_that_is_not_the_last_and_tasks_make_rows_but_machines_do_not(tmp_path):
    paths = [
        write_run(tmp_path / "a", 0),
        write_run(tmp_path / "b", 1, config={"trainer.num_panels": 0, "data.root": "/elsewhere", "name": "x"}),
        write_run(tmp_path / "c", 2, facts={"step": 300}),
        write_run(tmp_path / "d", 3, {"depth": {"rmse": 0.5}}),
    ]
    labels = [row.label for row in compare(paths).rows]
    assert len(labels) == 3
    assert labels[1].endswith("step=300")
    assert "tasks.names=[depth]" in labels[2]


def test_many_differing_keys_are_cut_to_those_that_tell_the_rows_apart_and_a_note_says_so(tmp_path):
    keys = ["data.a", "data.b", "loss.c", "schedule.d"]
    paths = [write_run(tmp_path / str(i), 0, config=dict.fromkeys(keys, i)) for i in range(2)]
    comparison = compare(paths)
    assert [row.label for row in comparison.rows] == ["data.a=0", "data.a=1"]
    assert any("differ in more than their names say" in note for note in comparison.notes)


def test_the_order_is_the_given_one_and_ten_comes_after_nine(tmp_path):
    for i in range(11):
        write_run(tmp_path / "s" / str(i), 0, config={"optimizer.lr": i / 1000})
    rates = [row.label for row in compare([tmp_path / "s" / "5", tmp_path / "s"]).rows]
    assert rates == [f"optimizer.lr={i / 1000:g}" for i in (5, 0, 1, 2, 3, 4, 6, 7, 8, 9, 10)]
    assert natural_key(Path("a/9/x")) < natural_key(Path("a/10/x"))


def test_four_runs_of_one_method_are_one_row_whatever_their_machines(tmp_path, cli):
    """They differ in the seed and in every key whose role is not ``result``."""
    keys = [key for key in RULES if role_of(key) not in ("result", "seed")]
    assert {"trainer.keep_checkpoint_interval", "trainer.compile", "trainer.parallel", "data.root"} <= set(keys)
    for seed in range(4):
        config = {key: f"value {seed}" for key in keys if not key.endswith("*")}
        write_run(tmp_path / f"seed_{seed}", seed, config=ON | config)
    (row,) = compare([tmp_path]).rows
    assert row.num_seeds == 4
    assert "differ" not in cli("scripts/compare.py", str(tmp_path)).out


def test_runs_that_differ_in_how_they_ran_and_what_they_wrote_are_one_row(tmp_path):
    """Each key alone, against a run without it."""
    keys = {
        "trainer.keep_checkpoint_interval": 10,
        "trainer.compile": True,
        "trainer.parallel": "fsdp",
        "data.workers": 7,
    }
    keys |= {"trainer.async_checkpoints": False, "trainer.on_unreadable": "skip", "trainer.max_nonfinite_steps": 3}
    keys |= {"trainer.num_panels": 0, "trainer.device": "cuda", "trainer.grad_checkpointing": True, "data.root": "/y"}
    keys |= {"optimizer.eps": 1e-8}  # younger than the others, and what they did
    write_run(tmp_path / "s" / "0", 0)
    for seed, (key, value) in enumerate(keys.items(), start=1):
        write_run(tmp_path / "s" / str(seed), seed, config={key: value})
    (row,) = compare([tmp_path / "s"]).rows
    assert row.num_seeds == len(keys) + 1
    for key, value in {
        "data.batch_size": 4,
        "trainer.accumulate_grad_batches": 2,
        "trainer.precision": "bf16",
        "new.key": 1,
    }.items():
        write_run(tmp_path / key, 0, config={key: value})
        assert len(compare([tmp_path / "s", tmp_path / key]).rows) == 2, key


def weights_sweep(folder, weights=(0.1, 0.5, 0.0, 1.0), seeds=range(3), gains=None):
    """A sweep of the README: runs of a weight and a seed, in the order in which the command names them."""
    for number, (weight, seed) in enumerate(itertools.product(weights, seeds)):
        gain = (gains or {}).get(weight, weight / 10)
        metrics = two_tasks(0.4 + gain + seed / 100 + gain * seed / 50, 0.6)
        write_run(folder / str(number), seed, metrics, ON | {"regularizer.weight": weight})
    return folder


def test_weight_zero_is_off_and_the_reference_of_all_rows_which_stand_in_the_order_of_their_weights(tmp_path):
    comparison = compare([weights_sweep(tmp_path / "s")])
    labels = [f"regularizer.weight={weight}" for weight in ("0", "0.1", "0.5", "1")]
    assert [row.label for row in comparison.rows] == labels
    assert [(one.row.label, one.reference.label) for one in comparison.differences] == [
        (n, labels[0]) for n in labels[1:]
    ]
    assert comparison.columns[-1].metric == "Delta_on/off"
    assert any(f"{labels[0]}: the regulariser is off" in note for note in comparison.notes)


def test_none_and_weight_zero_are_one_row_and_a_seed_in_both_counts_once(tmp_path):
    weights_sweep(tmp_path / "s", (0.0, 0.5), (0, 1))
    other = write_run(
        tmp_path / "s" / "other", 0, two_tasks(0.4, 0.6), ON | {"regularizer.weight": 0, "regularizer.x": 1}
    )
    none = write_run(tmp_path / "s" / "z", 2, two_tasks(0.4, 0.6))
    comparison = compare([tmp_path / "s"])
    assert [len(row.runs) for row in comparison.rows] == [3, 2]
    assert none in [run.path for run in comparison.rows[0].runs]
    assert any(note.startswith(f"warning: {other} is left out: its regulariser is off") for note in comparison.notes)
    balanced = {"balancing.regularizer_as_objective": True, "balancing.method": "dwa"}
    counted = write_run(tmp_path / "dwa", 0, config=ON | {"regularizer.weight": 0} | balanced)
    assert len(compare([counted, write_run(tmp_path / "none", 1, config=balanced)]).rows) == 2


def test_two_pairs_get_no_verdict_and_three_do(tmp_path):
    two = compare([weights_sweep(tmp_path / "two", (0.0, 0.1), (0, 1), {0.1: -0.05})])
    (one,) = two.differences
    assert one.columns[two.columns[0]].excludes_zero
    text = render(two, "text")
    assert "worse" not in text
    assert "No verdict below 3 pairs" in text
    assert next(line.split()[-3:] for line in text.splitlines() if "points" in line) == ["too", "few", "pairs"]
    three = render(compare([weights_sweep(tmp_path / "three", (0.0, 0.1), range(3), {0.1: -0.05})]), "text")
    assert "yes, worse" in three
    assert "No verdict below" not in three


def test_holm_takes_verdicts_back_and_says_so(tmp_path):
    """Four differences of semseg; the first would be clear alone, and is not among four."""
    weights = (0.0, 0.1, 0.2, 0.3, 0.4)
    spread = {0: -0.006, 1: 0.0, 2: 0.006}
    for number, (weight, seed) in enumerate(itertools.product(weights, range(3))):
        value = 0.4 + (weight > 0) * (0.018 + spread[seed] * (1 + weight))
        write_run(tmp_path / "s" / str(number), seed, two_tasks(value, 0.6), ON | {"regularizer.weight": weight})
    plain, holm = compare([tmp_path / "s"]), compare([tmp_path / "s"], holm=True)
    semseg = plain.columns[0]
    values = [one.columns[semseg].p_value for one in plain.differences]
    assert values[0] < 0.05
    assert "yes, better" in render(plain, "text")
    text = render(holm, "text")
    assert "yes, better" not in text
    assert "p (Holm)" in text
    assert "corrected for their number (12) by Holm's method: none is below 0.05" in text
    assert all(one.adjusted_p_values[semseg] >= value for one, value in zip(holm.differences, values))
    head, *lines = csv.reader(io.StringIO(render(holm, "csv")))
    assert float(dict(zip(head, lines[1]))["semseg/mIoU p (Holm)"]) == holm.differences[0].adjusted_p_values[semseg]


def test_rows_without_a_metric_in_common_are_not_paired_and_that_is_said(tmp_path):
    paths = [write_run(tmp_path / "a", 0, two_tasks(0.4, None)), write_run(tmp_path / "b", 0, two_tasks(None, 0.6), ON)]
    comparison = compare(paths)
    assert comparison.differences == []
    assert any("no metric with values in both" in note for note in comparison.notes)
    assert all(render(comparison, format) for format in FORMATS)


@pytest.mark.parametrize("value", [5e-324, 1e-300, 1e12, -1e12, 0.0])
def test_numbers_at_the_ends_of_what_a_file_may_hold_give_a_table(tmp_path, value):
    for seed in range(3):
        write_run(tmp_path / f"a{seed}", seed, {"depth": {"rmse": value}, "normals": {"mErr": 1.0}})
        write_run(tmp_path / f"b{seed}", seed, {"depth": {"rmse": 1e12}, "normals": {"mErr": value}}, ON)
    assert all(render(compare([tmp_path], holm=True), format) for format in FORMATS)


def test_by_makes_rows_of_one_key_and_tells_what_else_differs(tmp_path):
    paths = [
        write_run(tmp_path / str(i), i, config={"optimizer.lr": lr, "loss.w": i})
        for i, lr in enumerate((0.1, 0.1, 0.2))
    ]
    comparison = compare(paths, by=["optimizer.lr"])
    assert [(row.label, len(row.runs)) for row in comparison.rows] == [("optimizer.lr=0.1", 2), ("optimizer.lr=0.2", 1)]
    assert any("optimizer.lr=0.1 differ in loss.w" in note for note in comparison.notes)
    assert [row.label for row in compare(paths[:2], by=["optimizer"]).rows] == ["optimizer.lr=0.1"]
    assert [row.label for row in compare(paths, by=["commit"]).rows] == ["commit=e51845271362f65d"]


def test_an_evaluation_takes_the_config_of_its_checkpoints_run(tmp_path, arms):
    evaluated = tmp_path / "evaluated"
    write_run(
        evaluated,
        0,
        two_tasks(0.5, 0.5),
        facts={"checkpoint": str(arms / "2" / "checkpoints" / "best.pt"), "step": 200},
    )
    (evaluated / "config.yaml").unlink()
    assert read_run(evaluated).config["regularizer.weight"] == 0.5
    labels = [row.label for row in compare([arms / "2", evaluated]).rows]
    assert labels == ["checkpoint=last.pt", "checkpoint=best.pt"]


def test_runs_scored_in_different_ways_are_rows_of_their_own_with_a_warning(tmp_path):
    """Of one checkpoint; how each was scored is told by its own run.json, not by the training run's config."""
    config = {"evaluation.options.sal.protocol": "standard"}
    runs = []
    for name in ("standard", "invpt"):
        facts = {"evaluation": {"workers": len(name), "options": {"sal": {"protocol": name}}}}
        runs.append(write_run(tmp_path / name, config=config, facts=facts))
    comparison = compare(runs)
    assert len(comparison.rows) == 2
    assert any("scored in different ways (evaluation.options.sal.protocol)" in note for note in comparison.notes)
    assert "Delta_on/off" not in render(comparison, "text")
    assert not any("different ways" in note for note in compare(runs[:1]).notes)


def test_scored_predictions_are_named_by_their_folder_and_pixels_left_out_are_told(tmp_path, arms):
    metrics = two_tasks(0.5, 0.5)
    metrics["depth"]["not_finite"] = 12.0
    maps = write_run(tmp_path / "2026", 0, metrics, facts={"predictions": "/maps/invpt", "seed": None})
    (maps / "config.yaml").unlink()
    comparison = compare([maps, arms])
    assert comparison.rows[0].label == "invpt"
    assert f"warning: pixels without a finite prediction in {maps}: depth 12." in comparison.notes


# What is counted


def test_edges_are_shown_by_odsf_where_all_have_it_and_else_by_the_loss_with_a_note(tmp_path):
    with_odsf = write_run(tmp_path / "a", 0, {"edge": {"loss": 0.05, "odsF": 0.7}})
    without = write_run(tmp_path / "b", 1, {"edge": {"loss": 0.06}})
    assert [c.key for c in compare([with_odsf]).columns] == ["edge/odsF"]
    comparison = compare([with_odsf, without])
    assert [(c.key, c.higher_is_better) for c in comparison.columns] == [("edge/loss", False)]
    assert any("b has no odsF" in note for note in comparison.notes)


def test_delta_mtl_over_seeds_is_against_the_mean_of_the_single_task_runs(arms, singles):
    comparison = compare([arms], [singles])
    delta = comparison.columns[-1]
    assert delta.metric == "Delta_MTL"
    assert [row.label for row in comparison.rows] == ["single-task", "regularizer=none", "regularizer=contrastive"]
    per_seed = [100 / 2 * ((s - 0.4) / 0.4 - (d - 0.45) / 0.45) for s, d in TWO_ON]
    assert comparison.rows[2].summarize(delta) == pytest.approx(
        (statistics.mean(per_seed), statistics.stdev(per_seed), 2)
    )
    assert [c.metric for c in comparison.columns].count("Delta_on/off") == 0


def test_a_json_file_of_values_is_a_baseline_too_in_both_layouts(tmp_path, arms):
    deltas = []
    for content in ({"semseg": 0.4, "depth": 0.5}, {"semseg": {"mIoU": 0.4}, "depth": {"rmse": 0.5}}):
        (tmp_path / "single.json").write_text(json.dumps(content))
        comparison = compare([arms], [tmp_path / "single.json"])
        deltas.append(comparison.rows[1].summarize(comparison.columns[-1]).mean)
        assert any("the backbone of" in note for note in comparison.notes)
    assert (
        deltas[0]
        == deltas[1]
        == pytest.approx(statistics.mean(50 * ((s - 0.4) / 0.4 - (d - 0.5) / 0.5) for s, d in TWO))
    )


MTAN = {f"evaluation.options.{task}.protocol": "mtan" for task in ("semseg", "depth")}


def test_delta_p_is_a_column_where_all_runs_were_scored_by_mtan(tmp_path):
    def scores(*values):
        names = (("semseg", "mIoU"), ("semseg", "pixel_accuracy"), ("depth", "abs_err"), ("depth", "rel_err"))
        metrics = {"semseg": {}, "depth": {}}
        for (task, name), value in zip(names, values):
            metrics[task][name] = value
        return metrics

    multi = [write_run(tmp_path / f"m{s}", s, scores(0.44, 0.6, 0.45, 0.2 + s), MTAN) for s in (0, 1)]
    singles = []
    for seed, base in enumerate((scores(0.39, 0.5, 0.5, 0.1), scores(0.41, 0.7, 0.5, 0.3))):
        for task, metrics in base.items():
            singles.append(write_run(tmp_path / f"s{task}{seed}", seed, {task: metrics}, MTAN))
    comparison = compare(multi, singles)
    assert [c.key for c in comparison.columns] == ["semseg/mIoU", "depth/abs_err", "Delta_MTL", "Delta_p"]
    assert (comparison.columns[1].unit, comparison.columns[1].higher_is_better) == ("", False)
    # Means of the single-task runs: 0.4, 0.6, 0.5, 0.2.
    expected = {0: 50 * ((0.1 + 0) / 2 + (0.1 + 0) / 2), 1: 50 * ((0.1 + 0) / 2 + (0.1 - 5) / 2)}
    assert comparison.rows[1].values[comparison.columns[-1]] == pytest.approx(expected)
    other = write_run(tmp_path / "standard", 2, scores(0.44, 0.6, 0.45, 0.2), {**MTAN, next(iter(MTAN)): "standard"})
    assert "Delta_p" not in [c.key for c in compare([multi[0], other], singles).columns]


def test_published_rows_as_files_give_the_published_delta_in_the_table(tmp_path, cli):
    def write(name, values):
        scaled = {t: v / 100 if HIGHER[t] else v for t, v in zip(NYUD, values)}
        (tmp_path / f"{name}.json").write_text(json.dumps(scaled))
        return str(tmp_path / f"{name}.json")

    rows = [write(method, values) for method, tasks, values, _ in PUBLISHED if tasks == NYUD]
    result = cli("scripts/compare.py", *rows, "--baseline", write("st", SINGLE[NYUD]))
    assert result.code == 0, result.err
    deltas = [
        line.split()[-2] for line in result.out.splitlines() if line.startswith(("MTL b", "InvPT", "Task", "SAK"))
    ]
    assert deltas == ["-1.72", "+2.47", "+2.49", "+11.11"]


def test_the_difference_of_two_multi_task_rows_is_delta_on_off_never_delta_mtl(arms):
    for comparison in (compare([arms]), compare([arms], [arms / "0"]), compare([arms / "2", arms / "3"], [arms / "0"])):
        assert [c.metric for c in comparison.columns if not c.task] == ["Delta_on/off"]
        text = render(comparison, "text")
        assert "Delta_MTL" not in text
        (one,) = comparison.differences
        assert (one.row.label, one.reference.label) == ("regularizer=contrastive", "regularizer=none")


def test_a_difference_that_is_not_the_regularisers_alone_is_named_after_its_reference(tmp_path):
    paths = [write_run(tmp_path / str(i), 0, config={"optimizer.lr": lr}) for i, lr in enumerate((0.1, 0.2, 0.3))]
    comparison = compare(paths, against="0.2")
    assert comparison.columns[-1].metric == "Delta vs. optimizer.lr=0.2"
    assert len(comparison.differences) == 2
    assert not any(compares_on_off(row, comparison.rows) for row in comparison.rows)
    assert "Delta" not in render(compare(paths), "text").replace("--against LABEL", "")
    both = [write_run(tmp_path / "on", 0, config=ON | {"optimizer.lr": 0.2}), paths[0]]
    assert compare(both, against=str(paths[0])).columns[-1].metric.startswith("Delta vs. regularizer=none")


def test_paired_differences_leave_out_seeds_without_a_partner(tmp_path, arms):
    write_run(tmp_path / "sweep" / "4", 7, two_tasks(0.9, 0.1), ON)
    comparison = compare([arms])
    (one,) = comparison.differences
    semseg = one.columns[comparison.columns[0]]
    assert semseg.pairs == 2
    assert semseg.mean == pytest.approx(statistics.mean([0.42 - 0.40, 0.434 - 0.41]))
    assert "Seed 7 of regularizer=contrastive has no partner in regularizer=none." in comparison.notes


def test_rows_without_a_common_seed_are_not_paired_and_that_is_said(tmp_path):
    paths = [write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1, config=ON)]
    comparison = compare(paths)
    assert comparison.differences == []
    assert any("no seed in common" in note for note in comparison.notes)


def test_the_paired_difference_of_delta_on_off_is_its_value_in_the_table_when_all_seeds_are_paired(arms):
    comparison = compare([arms])
    delta = comparison.columns[-1]
    assert comparison.rows[0].summarize(delta).mean == pytest.approx(0, abs=1e-12)
    assert comparison.differences[0].columns[delta].mean == pytest.approx(comparison.rows[1].summarize(delta).mean)


def test_a_missing_value_is_a_dash_its_row_has_no_delta_and_the_mean_says_over_how_many(tmp_path):
    rows = [(0, two_tasks(0.4, 0.6), {}), (1, two_tasks(0.4, None), {}), (0, two_tasks(0.4, None), ON)]
    paths = [write_run(tmp_path / str(i), seed, metrics, config) for i, (seed, metrics, config) in enumerate(rows)]
    comparison = compare(paths)
    table = lines(comparison)
    assert table[3].split() == ["regularizer=none", "40.00", "±", "0.00", "0.6000", "0.00", "2"]
    assert table[4].split() == ["regularizer=contrastive", "40.00", "-", "-", "1"]
    assert any("regularizer=none has depth/rmse in 1 of its 2 runs only" in note for note in comparison.notes)


def test_single_task_runs_stand_in_rows_of_their_own_with_dashes(singles):
    comparison = compare([singles])
    assert [row.label for row in comparison.rows] == ["tasks.names=[depth]", "tasks.names=[semseg]"]
    assert "-" in lines(comparison)[3].split()
    assert comparison.differences == []
    assert any("different tasks (depth, semseg): compare them metric by metric" in note for note in comparison.notes)


# Formats

TEXT = """\
                                semseg             depth   Delta_on/off
                            mIoU ↑ (%)        rmse ↓ (m)          ↑ (%)   seeds
-------------------------------------------------------------------------------
regularizer=none          40.50 ± 0.71   0.6100 ± 0.0141    0.00 ± 0.29       2
regularizer=contrastive   42.70 ± 0.99   0.5990 ± 0.0127   +3.62 ± 0.18       2

regularizer=contrastive minus regularizer=none, paired over seeds
                          difference        95 % interval   pairs   excludes zero
---------------------------------------------------------------------------------
semseg mIoU ↑ (points)         +2.20       [-0.34, +4.74]       2   too few pairs
depth rmse ↓ (m)             -0.0110   [-0.0237, +0.0017]       2   too few pairs
Delta_on/off ↑ (points)        +3.62       [-0.56, +7.80]       2   too few pairs

Mean ± standard deviation (n - 1) over seeds.
No verdict below 3 pairs: of two, one outlier makes any interval.
3 intervals of Student's t, not corrected for their number (--holm does).
4 runs, 500 images of split standard, data 8d9e, on cpu, commit e518452713.
Delta_on/off = (100/T) sum_t s_t (M_t - B_t) / B_t over semseg mIoU, depth rmse; B: mean of regularizer=none.
"""

MARKDOWN = """\
| run | semseg mIoU ↑ (%) | depth rmse ↓ (m) | Delta_on/off ↑ (%) | seeds |
| --- | ---: | ---: | ---: | ---: |
| `regularizer=none` | 40.50 ± 0.71 | 0.6100 ± 0.0141 | 0.00 ± 0.29 | 2 |
| `regularizer=contrastive` | **42.70** ± 0.99 | **0.5990** ± 0.0127 | **+3.62** ± 0.18 | 2 |

`regularizer=contrastive` minus `regularizer=none`, paired over seeds:
"""

LATEX = r"""% needs \usepackage{booktabs}
\begin{tabular}{lcccc}
\toprule
 & semseg & depth &  &  \\
 & mIoU $\uparrow$ (\%) & rmse $\downarrow$ (m) & $\Delta_{\mathrm{MTL}}$ $\uparrow$ (\%) & seeds \\
\midrule
single-task & 40.00 $\pm$ 1.41 & 0.4500 & 0.00 & 1 \\
\midrule
regularizer=none & 40.50 $\pm$ 0.71 & 0.6100 $\pm$ 0.0141 & $-$17.15 $\pm$ 0.69 & 2 \\
regularizer=contrastive & \textbf{42.70} $\pm$ 0.99 & \textbf{0.5990} $\pm$ 0.0127 & \textbf{$-$13.18} $\pm$ 0.18 & 2 \\
\bottomrule
\end{tabular}
"""


def test_the_text_is_this(arms):
    assert render(compare([arms]), "text") == TEXT


def test_markdown_begins_with_this(arms):
    assert render(compare([arms]), "markdown").startswith(MARKDOWN)


def test_latex_begins_with_this(arms, singles):
    text = render(compare([arms], [singles]), "latex")
    assert text.startswith(LATEX)
    assert text.count("{") == text.count("}")
    assert "semseg mIoU $\\uparrow$ (points) & +2.20 & [$-$0.34, +4.74] & 2 & too few pairs \\\\" in text


def test_latex_escapes_what_names_may_hold(tmp_path):
    paths = [write_run(tmp_path / n, 0, config={"loss.of_a": v}) for n, v in (("x", "50%_&"), ("y", "#{1}$"))]
    text = render(compare(paths), "latex")
    assert r"loss.of\_a=50\%\_\& &" in text
    assert r"loss.of\_a=\#\{1\}\$ &" in text


def test_csv_has_a_line_per_row_in_full_precision_as_fractions(arms):
    head, off, on = csv.reader(io.StringIO(render(compare([arms]), "csv")))
    assert head[:6] == ["run", "seeds", "semseg/mIoU", "semseg/mIoU std", "depth/rmse", "depth/rmse std"]
    on_cells, off_cells = dict(zip(head, on)), dict(zip(head, off))
    assert float(on_cells["semseg/mIoU"]) == statistics.mean([0.42, 0.434])
    assert on_cells["against"] == "regularizer=none"
    assert float(on_cells["depth/rmse difference"]) == pytest.approx(-0.011)
    assert on_cells["depth/rmse pairs"] == "2"
    assert off_cells["against"] == off_cells["depth/rmse low"] == ""


def test_texts_that_a_spreadsheet_would_compute_are_marked_and_control_characters_escaped(tmp_path):
    names = ("=1+1", "@x", "+a", "-a", "x\x1b[31m")
    paths = [write_run(tmp_path / str(i), facts={"predictions": name}) for i, name in enumerate(names)]
    for path in paths:
        (path / "config.yaml").unlink()
    comparison = compare(paths)
    lines = list(csv.reader(io.StringIO(render(comparison, "csv"))))[1:]
    assert [line[0] for line in lines] == ["'=1+1", "'@x", "'+a", "'-a", r"x\x1b[31m"]
    assert "\x1b" not in "".join(render(comparison, format) for format in FORMATS)


def test_all_metrics_turn_the_table_and_leave_delta_to_the_primary_ones(arms):
    table = lines(compare([arms], all_metrics=True))
    assert table[0].split() == ["task", "metric", "regularizer=none", "regularizer=contrastive"]
    assert any(line.split()[:3] == ["semseg", "pixel_accuracy", "↑"] for line in table)
    assert any(line.startswith("Delta_on/off = ") and "pixel_accuracy" not in line for line in table)
    markdown = render(compare([arms], all_metrics=True), "markdown")
    assert "| semseg | mIoU ↑ (%) | 40.50 ± 0.71 | **42.70** ± 0.99 |" in markdown
    assert "semseg & mIoU" in render(compare([arms], all_metrics=True), "latex")


def test_equal_means_as_shown_are_both_best_and_one_row_has_no_best(tmp_path):
    paths = [
        write_run(tmp_path / str(i), 0, two_tasks(0.4 + i * 1e-6, 0.5 + i / 10), {"optimizer.lr": i + 1})
        for i in range(2)
    ]
    assert render(compare(paths), "markdown").count("**40.00**") == 2
    assert render(compare(paths), "markdown").count("**0.6000**") == 0
    assert "**" not in render(compare(paths[:1]), "markdown")


def test_text_of_two_arms_and_five_tasks_fits_into_120_columns(tmp_path):
    metrics = {**VALUES, "human_parts": {"mIoU": 0.6}, "sal": {"maxF": 0.8}}
    del metrics["depth"]
    for i, (arm, seed) in enumerate(itertools.product((0, 1), range(3))):
        values = {t: {m: v * (1 + seed / 50) for m, v in values_of.items()} for t, values_of in metrics.items()}
        write_run(tmp_path / "s" / str(i), seed, values, ON if arm else None)
    assert max(map(len, lines(compare([tmp_path / "s"])))) <= 120
    assert max(map(len, lines(compare([tmp_path / "s"], all_metrics=True)))) <= 120


def test_text_that_would_be_wider_has_a_line_per_metric_and_three_rows_across(tmp_path):
    metrics = {**VALUES, "human_parts": {"mIoU": 0.6}, "sal": {"maxF": 0.8}}
    for i, seed in itertools.product(range(4), range(2)):
        values = {t: {m: v * (1 + seed / 50) for m, v in values_of.items()} for t, values_of in metrics.items()}
        write_run(tmp_path / f"{i}{seed}", seed, values, {"optimizer.lr": i / 10})
    table = lines(compare([tmp_path], against="0.1"))
    assert table[0].split() == ["task", "metric", *(f"optimizer.lr={rate}" for rate in ("0", "0.1", "0.2"))]
    assert table[11].split() == ["task", "metric", "optimizer.lr=0.3"]
    assert max(map(len, table)) <= 120


# Complaints


def refused(match, *arguments, **options):
    with pytest.raises(UserError, match=match) as caught:
        compare(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_folders_without_a_finished_run_are_refused_and_sweeps_tell_which_are_unfinished(tmp_path, arms):
    refused("nowhere does not exist", [tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    refused("no run in .*empty", [tmp_path / "empty"])
    (arms / "9").mkdir()
    (arms / "9" / "config.yaml").touch()
    refused("9 is an unfinished run", [arms / "9"])
    assert any("unfinished runs, left out here (no metrics.json): 9." in note for note in compare([arms]).notes)


@pytest.mark.parametrize(("fact", "value"), [("split", "tune"), ("num_images", 10), ("data_fingerprint", "ffff")])
def test_runs_on_other_validation_data_do_not_share_a_table(tmp_path, fact, value):
    paths = [write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1, facts={fact: value})]
    refused(f"a and .*b were scored on different validation data .{fact} .* and {value}", paths)
    single = write_run(tmp_path / "c", 0, {"depth": {"rmse": 0.5}}, facts={fact: value})
    refused(fact, paths[:1], [single])
    (paths[1] / "run.json").unlink()
    assert any("the validation data of" in note for note in compare(paths).notes)


def test_the_same_seed_twice_in_a_row_is_refused(tmp_path):
    paths = [write_run(tmp_path / "a", 3), write_run(tmp_path / "b", 3)]
    refused("a and .*b are both .* with seed 3", paths)


def test_unfitting_baselines_are_refused(tmp_path, arms, singles):
    refused("none of depth; train it with tasks=single_depth", [arms], [singles / "semseg0"])
    refused("semseg0 has one task and .*0 has 2", [arms], [singles / "semseg0", arms / "0"])
    refused("Give either --against or", [arms], [arms / "0"], against="none")
    refused("are 2 rows", [arms], [arms])
    other = write_run(tmp_path / "lr", 5, {"depth": {"rmse": 0.5}}, {"optimizer.lr": 0.3})
    refused("both baselines of depth, but differ in optimizer.lr", [arms], [singles, other])
    twice = write_run(tmp_path / "twice", 0, {"depth": {"rmse": 0.5}})
    refused("the baseline of depth with seed 0", [arms], [singles, twice])


def test_a_baseline_of_another_backbone_is_refused_and_other_differences_are_told(tmp_path, arms, singles):
    runs = [
        write_run(tmp_path / task, 0, metrics, {"backbone.name": "vit"})
        for task, metrics in (("s", {"semseg": {"mIoU": 0.4}}), ("d", {"depth": {"rmse": 0.5}}))
    ]
    refused("same backbone, but .*s has backbone.name=vit and .* has resnet18", [arms], runs)
    other = write_run(tmp_path / "x" / "d", 0, {"depth": {"rmse": 0.5}}, {"trainer.max_steps": 800}, {"step": 800})
    comparison = compare([arms], [singles / "semseg0", other])
    assert "warning: rows and single-task baselines differ in trainer.max_steps, too." in comparison.notes


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not a readable JSON"),
        ("[]", "JSON object, not a list"),
        ("{}", "contains no task"),
        ('{"odsF": 0.7}', "'odsF' in place of a task"),
        ('{"semseg": {"mIoU": "high"}}', "'high' for semseg/mIoU"),
        ('{"semseg": {"mIoU": true}}', "True for semseg/mIoU"),
        ('{"semseg": 51.15}', "fractions, for percent write 0.5115"),
    ],
)
def test_damaged_metrics_are_refused_with_file_and_value(tmp_path, text, match):
    path = write_run(tmp_path / "a")
    (path / "metrics.json").write_text(text)
    refused(f"metrics.json.*{match}", [path])


def test_unknown_keys_and_labels_are_refused(tmp_path, arms):
    refused("--by optimizr.lr: .*did you mean optimizer.lr", [arms], by=["optimizr.lr"])
    refused("--against foo is neither a row nor a run; choose one of: regularizer=none; reg", [arms], against="foo")
    refused("--against regularizer fits several", [arms], against="regularizer")
    (arms / "0" / "config.yaml").write_text("a: [")
    refused("config.yaml is not a readable YAML", [arms / "0"])
    assert any("left out: " in note and "config.yaml is not a readable YAML" in note for note in compare([arms]).notes)


# The command


def run(cli, *arguments) -> Result:
    return cli("scripts/compare.py", *map(str, arguments))


def test_the_command_prints_the_table(cli, arms):
    result = run(cli, arms)
    assert (result.code, result.out, result.err) == (0, TEXT, "")


def test_the_command_writes_a_file_in_the_format_of_its_ending(cli, arms, tmp_path):
    for name, start in (("t.md", "| run |"), ("t.tex", "% needs"), ("t.csv", "run,seeds"), ("t.txt", " ")):
        result = run(cli, arms, "--output", tmp_path / name)
        assert result.code == 0, result.err
        assert (tmp_path / name).read_text().startswith(start)
        assert str(tmp_path / name) in result.out
    result = run(cli, arms, "--output", tmp_path / "t.txt", "--format", "csv")
    assert (tmp_path / "t.txt").read_text().startswith("run,seeds")


def test_the_command_fails_with_one_sentence_and_warns_beside_csv(cli, arms, tmp_path):
    result = run(cli, tmp_path / "nowhere")
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert run(cli, arms, "--output", tmp_path).code == 1
    (arms / "9").mkdir()
    (arms / "9" / "config.yaml").touch()
    result = run(cli, arms, "--format", "csv")
    assert result.out.startswith("run,seeds")
    assert result.err.startswith("warning: ")
    assert result.err.endswith("\n")


def test_a_run_older_than_a_protocol_was_scored_by_the_standard_one():
    key = "evaluation.options.semseg.protocol"
    old, standard, mtan = (Run(Path(), {}, {}, config) for config in ({"seed": 0}, {key: "standard"}, {key: "mtan"}))
    assert check_same_scoring([old, standard]) == []
    assert key in check_same_scoring([old, mtan])[0]
