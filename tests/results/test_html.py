"""scripts/report.py: what the page says, that it is safe and small, and that it does what is clicked in a browser."""

import json
import math
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.browser import Browser, chromium
from omegaconf import OmegaConf
from PIL import Image

from mtcl import UserError
from mtcl.atomic import write_json
from mtcl.errors import escape_control_characters
from mtcl.evaluation.evaluator import VisualSample
from mtcl.results.html import collect, render_page
from mtcl.results.html import images as images_module
from mtcl.results.html.charts import MAX_POINTS, average_points, swept_keys
from mtcl.results.html.images import build_image_grid, cut_tiles
from mtcl.tasks import VOC21, build_task
from mtcl.training.run_logger import RunLogger, write_panels
from mtcl.visualization.panel_format import LAYOUT_KEY
from mtcl.visualization.panels import CORRECT_COLOUR, WRONG_COLOUR, draw_error, error_map, panel_layout

SEMSEG = {"class_names": VOC21}
TASKS = {
    name: build_task(name, **(SEMSEG if name == "semseg" else {})) for name in ("semseg", "depth", "normals", "edge")
}
ON = "mtcl.regularizers.Contrastive"
HOSTILE = "</script><script>alert(1)</script>\u2028<img src=http://x.invalid onerror=alert(2)>\"'&amp;\u202e"

# Made-up runs, through the recorder's own functions


def shown(id: str, seed: int, height: int = 48, width: int = 64) -> VisualSample:
    """A picture with its labels, and predictions that are wrong in places that ``seed`` decides."""
    about, rng = np.random.default_rng(sum(map(ord, id))), np.random.default_rng(seed)

    def smooth(generator: np.random.Generator, channels: int = 1) -> np.ndarray:
        coarse = generator.random((6, 8, channels), np.float32)
        return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)

    classes, depth, facing = smooth(about)[..., 0], smooth(about)[..., 0], smooth(about, 3) - 0.5
    off = 0.3 * (smooth(rng) - 0.5)
    unit = [v / np.linalg.norm(v, axis=-1, keepdims=True).clip(1e-6) for v in (facing, facing + off)]
    semseg = [(v * 8).clip(0, 20).astype(np.uint8) for v in (classes, classes + off[..., 0])]
    semseg[0][:4] = 255
    edge = (np.abs(np.diff(semseg[0].astype(int), axis=0, prepend=0)) > 0).astype(np.uint8)
    labels = {"semseg": semseg[0], "depth": 1 + 5 * depth.clip(0), "normals": unit[0].astype(np.float32), "edge": edge}
    predictions = {"semseg": semseg[1], "depth": (1 + 5 * depth + 4 * off[..., 0]).clip(0).astype(np.float32)}
    predictions |= {
        "normals": unit[1].astype(np.float32),
        "edge": (edge * 0.6 + 0.3 * off[..., 0].clip(0)).astype(np.float32),
    }
    image = (smooth(about, 3).clip(0, 1) * 255).astype(np.uint8)
    return VisualSample(id, image, labels, predictions)


def write_run(
    folder: Path, seed=0, config=None, facts=None, tasks=tuple(TASKS), log=True, panels=2, finished=True, better=0.0
) -> Path:
    """A run folder; ``better`` moves its numbers. ``config``: dotted keys, ``facts``: of run.json."""
    rng = np.random.default_rng([seed, int(1000 * better) + 1000])
    folder.mkdir(parents=True)
    full = {"name": "made_up", "seed": seed, "data.name": "nyud", "tasks.names": list(tasks)}
    full |= {"backbone.name": "resnet18", "regularizer._target_": ON, "regularizer.weight": 0.1}
    full |= {"optimizer.lr": 0.001, "trainer.max_steps": 400}
    nested = OmegaConf.create()
    for key, value in (full | (config or {})).items():
        OmegaConf.update(nested, key, value)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(nested))
    final = {
        "semseg": {"mIoU": 0.4},
        "depth": {"rmse": 0.6},
        "normals": {"mErr": 20.0},
        "edge": {"odsF": 0.7, "loss": 0.05},
    }
    sign = {"rmse": -1, "mErr": -1, "loss": -1}
    noise = 1 + 0.02 * rng.standard_normal()
    metrics = {t: {m: v * noise * (1 + sign.get(m, 1) * better) for m, v in final[t].items()} for t in tasks}
    recorder = RunLogger(folder)
    if log:
        for step in range(0, 400 if finished else 200, 20):
            losses = {t: 2 * math.exp(-step / 150) + 0.1 * rng.random() for t in tasks}
            recorder.log_scalars(step, "train", {**losses, "regularizer": 0.4 + 0.1 * rng.random(), "lr": 1e-3})
            if step % 100 == 0 or step == 380:
                values = {
                    f"{t}/{m}": v * (0.5 + step / 800) for t in tasks for m, v in metrics[t].items() if m != "odsF"
                }
                recorder.log_scalars(step, "val", values)
    if panels:
        samples = [shown(f"room {i}", seed + int(100 * better) + 100) for i in range(panels)]
        write_panels(folder / "panels", samples, {t: TASKS[t] for t in tasks})
    recorder.close()
    if finished:
        record = {"seed": seed, "split": "standard", "num_images": 500, "data_fingerprint": "8d9e", "step": 400,
                  "commit": "e51845271362f65d", "clean": True, "device": "cpu", "seconds": 75.0, "overrides": [],
                  "command": "train.py", "versions": {"torch": "2.15", "numpy": "2.4"}}  # fmt: skip
        write_json(folder / "run.json", record | (facts or {}))
        write_json(folder / "metrics.json", metrics)
    return folder


def sweep(folder: Path, weights=(0.0, 0.1, 0.3), seeds=(0, 1), **options) -> Path:
    for weight in weights:
        for seed in seeds:
            write_run(
                folder / f"w{weight}_s{seed}", seed, {"regularizer.weight": weight}, better=weight / 10, **options
            )
    return folder


def page_of(*sources: Path, **options) -> str:
    return render_page(collect(sources, **options), "made up")


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


class MultiTaskDataset(HTMLParser):
    """The page as a browser reads it: its tags with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


# What it says


def test_the_table_is_that_of_compare_with_the_best_marked(tmp_path):
    page = page_of(sweep(tmp_path / "sweep", panels=0, log=False))
    comparison = collect([tmp_path / "sweep"]).comparison
    rows = re.findall(r'<tr><th scope="row">(.*?)</tr>', page[page.index('id="table"') :])[:3]
    assert ["regularizer.weight=<wbr>0.3" in row for row in rows] == [False, False, True]
    assert [column.metric for column in comparison.columns if not column.task] == ["Delta_on/off"]
    for row, line in zip(rows, comparison.rows):
        for column in (column for column in comparison.columns if column.task):
            scale = 100 if column.unit == "%" else 1
            digits = 4 if column.unit == "m" else 2
            assert f"{line.summarize(column).mean * scale:.{digits}f}" in row
            assert f"± {line.summarize(column).std * scale:.{digits}f}" in row
    assert [row.count("(best)") for row in rows] == [0, 0, 5]
    assert data_of(page)["cells"][0][0][0] == pytest.approx(
        comparison.rows[0].summarize(comparison.columns[0]).mean, rel=1e-4
    )


def test_with_against_the_paired_differences_are_there(tmp_path):
    sweep(tmp_path / "sweep", panels=0, log=False)
    page = page_of(tmp_path / "sweep", against="regularizer.weight=0.1")
    assert "Differences, paired over seeds" in page
    assert "Delta vs. regularizer.weight=0.1" in page


def test_curves_hold_the_recorded_numbers_of_each_seed(tmp_path):
    run = write_run(tmp_path / "a", 3)
    curves = data_of(page_of(run))["curves"]
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    titles = [chart["title"] for chart in curves["charts"]]
    assert titles[:2] == ["semseg mIoU ↑ (%)", "depth rmse ↓ (m)"]
    assert titles[3:5] == ["edge loss ↓", "semseg loss"]  # odsF is no curve, the loss stands in
    steps, values = curves["lines"][0]["1"][0]
    expected = [(r["step"], r["depth/rmse"]) for r in records if r["kind"] == "val"]
    assert steps == [step for step, _ in expected]
    assert values == pytest.approx([value for _, value in expected], rel=1e-3)
    steps, values = curves["lines"][0][str(titles.index("semseg loss"))][0]
    assert values == pytest.approx([r["semseg"] for r in records if r["kind"] == "train"], rel=1e-3)


def test_long_curves_are_means_over_stretches():
    points = [(step, float(step % 2)) for step in range(3000)]
    width = math.ceil(3000 / MAX_POINTS)
    averaged = average_points(points, width)
    assert len(averaged) == MAX_POINTS
    assert {value for _, value in averaged} == {0.5}


def test_the_weight_is_swept_from_the_run_without_a_regulariser_on(tmp_path):
    write_run(tmp_path / "s" / "off", 0, {"regularizer._target_": None, "regularizer.weight": 0.0}, panels=0, log=False)
    for weight in (0.1, 1.0):
        write_run(tmp_path / "s" / f"on{weight}", 0, {"regularizer.weight": weight}, panels=0, log=False)
    swept = data_of(page_of(tmp_path / "s"))["swept"]
    assert swept == {"regularizer.weight": {"values": [0.0, 0.1, 1.0], "series": ["", "", ""]}}


def test_flags_and_words_are_not_swept_and_two_keys_make_parallel_coordinates(tmp_path):
    for i, (weight, rate) in enumerate([(0.1, 1e-3), (0.2, 1e-4), (0.1, 1e-4)]):
        config = {"regularizer.weight": weight, "optimizer.lr": rate, "trainer.ema": bool(i % 2), "loss.kind": f"k{i}"}
        write_run(tmp_path / "s" / str(i), 0, config, panels=0, log=False)
    collected = collect([tmp_path / "s"])
    assert list(swept_keys(collected.comparison.rows)) == ["regularizer.weight", "optimizer.lr"]
    page = render_page(collected, "x")
    assert 'id="parallel"' in page
    assert 'id="parallel"' not in page_of(tmp_path / "s" / "0", tmp_path / "s" / "2")


def test_settings_that_differ_are_marked_and_equal_ones_told_once(tmp_path):
    page = page_of(sweep(tmp_path / "s", panels=0, log=False))
    assert re.search(r"<code>regularizer\.<wbr>weight</code>.*?<mark>differs</mark> 0 <small>\(2\)</small>", page)
    assert re.search(r"<code>optimizer\.<wbr>lr</code></th><td><span>0\.001</span>", page)
    assert "<code>versions.<wbr>torch</code></th><td><span>2.15</span>" in page


# Pictures


def test_tiles_are_cut_as_they_were_drawn(tmp_path):
    sample = shown("a/b", 1)
    write_panels(tmp_path, [sample], TASKS)
    layout, tiles = cut_tiles(tmp_path / "a_b.png")
    assert layout["id"] == "a/b"
    assert (tiles["image"] == sample.image).all()
    for name, task in TASKS.items():
        assert (tiles[f"{name}/label"] == task.draw(sample.labels[name])).all(), name
        assert (tiles[f"{name}/prediction"] == task.draw(sample.predictions[name])).all(), name
        error = draw_error(error_map(task, sample.labels[name], sample.predictions[name]))
        assert (tiles[f"{name}/error"] == error).all(), name


def test_error_maps_are_as_far_off_as_the_regulariser_would_say():
    semseg, depth, normals, edge = (TASKS[name] for name in ("semseg", "depth", "normals", "edge"))
    labels, guesses = np.array([[1, 2, 255]], np.uint8), np.array([[1, 20, 3]], np.uint8)
    np.testing.assert_array_equal(error_map(semseg, labels, guesses), [[0, 1, np.nan]])
    metres = np.array([[2, 2, 2, 0, 2]], np.float32)
    guess = np.array([[2, 2 * math.exp(0.1), 2 * math.exp(-0.3), 1, np.nan]], np.float32)
    np.testing.assert_allclose(error_map(depth, metres, guess), [[0, 0.5, 1, np.nan, 1]], atol=1e-5)
    angles = np.radians([0, 20, 40, 90])
    ahead = np.tile(np.array([0, 0, 1], np.float32), (1, 4, 1))
    turned = np.stack([np.sin(angles), 0 * angles, np.cos(angles)], axis=-1)[None].astype(np.float32)
    chord = math.sin(math.radians(10)) / math.sin(math.radians(20))
    np.testing.assert_allclose(error_map(normals, ahead, turned), [[0, chord, 1, 1]], atol=1e-5)
    lines, probabilities = np.array([[0, 1, 1, 255]], np.uint8), np.array([[0.25, 1, 0.5, 0.5]], np.float32)
    np.testing.assert_allclose(error_map(edge, lines, probabilities), [[0.25, 0, 0.5, np.nan]])
    colours = draw_error(np.array([[0, 1, np.nan]], np.float32))[0]
    assert [tuple(map(int, c)) for c in colours] == [CORRECT_COLOUR, WRONG_COLOUR, (24, 24, 24)]


def test_the_wall_is_the_same_pictures_down_the_rows_and_keeps_its_budget(tmp_path, monkeypatch):
    sweep(tmp_path / "s", log=False)
    collected = collect([tmp_path / "s"])
    wall, notes = build_image_grid(collected.rows)
    assert [entry["id"] for entry in wall.content] == ["room 0", "room 1"]
    assert all(set(entry["lines"]) == {0, 1, 2} for entry in wall.content)
    assert not notes
    assert wall.size == sum(len(uri) for uri in re.findall(r"data:image/webp[^\"]*", json.dumps(wall.content)))
    monkeypatch.setattr(images_module, "MAX_CHARACTERS", wall.size - 1)
    smaller, _ = build_image_grid(collected.rows)
    assert len(smaller.content) == 1
    assert any("1 of 2 images are shown" in note for note in smaller.notes)


def test_the_legend_of_a_task_has_the_classes_of_all_rows_and_the_void_last(tmp_path):
    """A class that one row alone predicts is in it, too."""
    for i, value in enumerate((1, 2)):
        run = write_run(tmp_path / "s" / str(i), 0, {"optimizer.lr": i / 10}, panels=0, log=False)
        sample = shown("room", 0)
        sample.labels["semseg"][:] = 255
        sample.predictions["semseg"][:] = value
        write_panels(run / "panels", [sample], TASKS)
    wall, _ = build_image_grid(collect([tmp_path / "s"]).rows)
    names = [text for text, _ in wall.content[0]["tasks"]["semseg"]["legend"]]
    assert [name for name in names if not name.startswith("error")] == [VOC21[1], VOC21[2], "void"]
    assert names[-2:] == ["error: none", f"error: {TASKS['semseg'].error_label}"]


def test_below_three_pairs_there_is_no_verdict_and_holm_is_named(tmp_path):
    page = page_of(sweep(tmp_path / "two", panels=0, log=False))
    assert "too few pairs" in page
    assert not re.search('class="verdict (better|worse)"', page)
    sweep(tmp_path / "three", weights=(0.0, 0.3, 3.0), seeds=range(3), panels=0, log=False)
    page = page_of(tmp_path / "three")
    assert "too few pairs" not in page
    assert 'class="verdict better"' in page
    assert "Holm's method" not in page
    assert "by Holm's method, is below 0.05" in page_of(tmp_path / "three", holm=True)


def test_another_picture_of_the_same_name_is_left_out_and_told(tmp_path):
    sweep(tmp_path / "s", weights=(0.0, 0.1), seeds=(0,), log=False)
    other = shown("room 0", 0)._replace(image=np.zeros((48, 64, 3), np.uint8))
    write_panels(tmp_path / "s/w0.1_s0/panels", [other], TASKS)
    wall, _ = build_image_grid(collect([tmp_path / "s"]).rows)
    assert set(wall.content[0]["lines"]) == {0}
    assert any("shows another image" in note for note in wall.notes)


# What is missing, broken, hostile


def test_broken_and_unfinished_runs_are_told_and_the_others_compared(tmp_path):
    folder = sweep(tmp_path / "s", seeds=(0,))
    write_run(folder / "going", 1, finished=False, panels=0)
    write_run(folder / "nolog", 2, {"regularizer.weight": 2.0}, log=False, panels=0)
    broken = write_run(folder / "broken", 3, panels=0)
    (broken / "metrics.json").write_text("{")
    with (folder / "w0.0_s0/log.jsonl").open("a") as file:
        file.write('{"step": 400, "ki\n[]\n')
    (folder / "w0.1_s0/panels/room_0.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "w0.1_s0/panels/old.png")
    nan = write_run(folder / "nan", 4, {"regularizer.weight": 3.0}, panels=0)
    metrics = json.loads((nan / "metrics.json").read_text())
    metrics["depth"]["rmse"] = None
    write_json(nan / "metrics.json", metrics)
    page = page_of(folder)
    text = MultiTaskDataset(page).text
    assert "7 runs" in text
    assert "1 unfinished, 1 broken" in text
    for phrase in (
        "It has no metrics.json: it was interrupted",
        "metrics.json is not a readable JSON file",
        "It has no log.jsonl, so it has no curves",
        "2 lines of its log.jsonl can't be read",
        "room_0.png can't be read",
        "has depth/rmse in 0 of its 1 runs only",
        "It has no panels/",
    ):
        assert phrase in text, phrase
    data = data_of(page)
    assert [row["label"] for row in data["rows"]][-2:] == ["broken (broken)", "going (unfinished)"]
    assert data["curves"]["lines"][-1]["0"][0][0] == [0, 100]
    assert len(data["cells"]) == 5


def test_a_log_alone_is_a_run_and_no_run_at_all_is_one_sentence(tmp_path):
    going = write_run(tmp_path / "a", finished=False, panels=0)
    (going / "config.yaml").write_text(": [")
    assert "No run has finished yet" in page_of(tmp_path)
    assert "config.yaml is not a readable YAML file" in page_of(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"There is no run in .*empty"):
        collect([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("facts", "tasks", "phrase"),
    [
        ({"data_fingerprint": "other"}, tuple(TASKS), "scored on different validation data"),
        ({"split": "tune"}, tuple(TASKS), "scored on different validation data"),
        ({}, ("depth", "edge"), "The runs were trained on different sets of tasks"),
        ({"evaluation": {"options": {"depth": {"protocol": "astmt"}}}}, tuple(TASKS), "scored in different ways"),
    ],
)
def test_what_does_not_compare_is_not_ranked_and_the_page_says_why(tmp_path, facts, tasks, phrase):
    write_run(tmp_path / "s/a", 0, panels=0, facts={"evaluation": {"options": {"depth": {"protocol": "standard"}}}})
    write_run(tmp_path / "s/b", 1, {"optimizer.lr": 0.1}, facts, tasks, panels=0, better=0.1)
    page = page_of(tmp_path / "s")
    assert "Not ranked." in page
    assert phrase in MultiTaskDataset(page).text
    assert "(best)" not in page
    table = page[page.index('id="table"') : page.index("</table>")]
    assert table.count("<tr>") == 3
    assert ("standard, 500 images, data 8d9e" in table) == ("validation data" in phrase)
    same = page_of(
        write_run(tmp_path / "t/a", 0, panels=0), write_run(tmp_path / "t/b", 0, {"x.y": 1}, better=0.1, panels=0)
    )
    assert "Not ranked." not in same
    assert "(best)" in same


def test_hostile_names_settings_and_files_are_text(tmp_path):
    sample = shown(HOSTILE, 0)
    hostile = HOSTILE.replace("/", "|")
    run = write_run(tmp_path / "s" / hostile, 0, {"loss.kind": HOSTILE}, {"device": HOSTILE, "command": HOSTILE})
    write_panels(run / "panels", [sample], TASKS)
    write_run(tmp_path / "s" / "b", 0, {"loss.kind": "plain", "optimizer.lr": 0.2}, panels=0)
    write_run(tmp_path / "s" / "c<b>", 0, finished=False, panels=0)
    going = write_run(tmp_path / "s" / "d", 1, finished=False, panels=0)
    going.rename(tmp_path / "s" / os.fsdecode(b"no text \xff"))
    page = render_page(collect([tmp_path / "s"]), HOSTILE)
    page.encode()  # a folder's name need not be UTF-8
    reader = MultiTaskDataset(page)
    assert [tag for tag, _ in reader.tags].count("script") == 2
    assert not [tag for tag, _ in reader.tags if tag in ("img", "iframe", "link", "object")]
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    assert "\u2028" not in page[page.index('id="data"') :]
    assert any(escape_control_characters(HOSTILE) in row["label"] for row in data_of(page)["rows"])
    policy = next(a["content"] for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"size": [1]}',
        '{"size": [8, 8], "zoom": 0, "tiles": {}}',
        "[1]",
        '{"size": [8, 8], "zoom": 1, "id": 1, "tiles": {"image": [-9, -9]}}',
        '{"size": [8, 8], "zoom": 1, "id": 1, "tiles": {"image": [7, 0]}}',
    ],
)
def test_a_forged_layout_leaves_the_pictures_out(tmp_path, text):
    from PIL.PngImagePlugin import PngInfo

    run = write_run(tmp_path / "a", panels=0)
    (run / "panels").mkdir()
    info = PngInfo()
    info.add_text(LAYOUT_KEY, text)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(run / "panels/x.png", pnginfo=info)
    page = page_of(run)
    assert "No run has images." in page
    assert "x.png can&#x27;t be read" in page


def test_a_panel_of_before_has_no_layout_and_the_page_says_so(tmp_path):
    run = write_run(tmp_path / "a", panels=0)
    (run / "panels").mkdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(run / "panels/x.png")
    assert "drawn by an earlier version" in page_of(run)


def test_the_layout_says_where_the_panel_has_what():
    layout = panel_layout(shown("a", 0), TASKS)
    assert json.loads(json.dumps(layout))["size"] == [192, 256]
    assert ("error: 40 deg off", WRONG_COLOUR) in layout["legends"]["normals"]


def test_the_command_writes_the_file_or_says_why_not(tmp_path, cli):
    sweep(tmp_path / "s", weights=(0.0,), log=False)
    result = cli("scripts/report.py", str(tmp_path / "s"), "--output", str(tmp_path / "out/page.html"))
    assert result.code == 0
    assert re.fullmatch(r".*page\.html: 2 runs, 1 rows, 0\.\d MB\n", result.out)
    assert "<h1>s</h1>" in (tmp_path / "out/page.html").read_text()
    (tmp_path / "none").mkdir()
    for arguments in ([str(tmp_path / "none")], [str(tmp_path / "s"), "--by", "nothing"], [str(tmp_path / "nowhere")]):
        result = cli("scripts/report.py", *arguments, "--output", str(tmp_path / "other.html"))
        assert result.code == 1
        assert re.fullmatch(r"error: [^\n]+\n", result.err)
        assert not (tmp_path / "other.html").exists()


def test_a_thousand_runs_take_seconds(tmp_path):
    """Copies of one run's files with other settings, without pictures."""
    run = write_run(tmp_path / "one", panels=0)
    texts = {name: (run / name).read_text() for name in ("metrics.json", "run.json", "config.yaml", "log.jsonl")}
    for i in range(1000):
        folder = tmp_path / "s" / str(i)
        folder.mkdir(parents=True)
        config = texts["config.yaml"].replace("lr: 0.001", f"lr: {0.001 + i * 1e-6:.6f}")
        config = config.replace("weight: 0.1", f"weight: {0.1 + i % 7:.1f}")
        for name, text in (texts | {"config.yaml": config}).items():
            (folder / name).write_text(text)
    began = time.perf_counter()
    page = page_of(tmp_path / "s")
    assert time.perf_counter() - began < 30
    assert len(data_of(page)["cells"]) == 1000
    assert "The first 60 of 1000 rows are shown" in page
    assert len(page) < 15e6


# In a browser

CONTRAST = r"""(() => {
  const part = (v) => ((v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\d.]+/g).map(Number);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const below = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/, 0\)$/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  let worst = [99, ""];
  for (const e of document.querySelectorAll("body *")) {
    const words = [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!words || !e.checkVisibility() || e.closest(".hidden, .slider, script")) continue;
    const style = getComputedStyle(e), ink = e.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [a, b] = [light(ink), light(below(e))].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, e.outerHTML.slice(0, 120)];
  }
  return worst;
})()"""
CROSSED = """[...document.querySelectorAll("figure svg[role=img]")].flatMap((chart) => {
  const boxes = [...chart.querySelectorAll("text")].map((text) => [text.getBoundingClientRect(), text.textContent]);
  const cross = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
  const name = chart.getAttribute("aria-label");
  const told = ([a, x], i) => boxes.slice(i + 1).filter(([b]) => cross(a, b)).map(([, y]) => `${name}: ${x} / ${y}`);
  return boxes.flatMap(told);
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium() is None:
        pytest.skip("there is no Chromium here (Debian: apt install chromium)")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep over two keys, three runs of it without a partner, one still without numbers; as a page."""
    folder = tmp_path_factory.mktemp("swept")
    sweep(folder / "s")
    write_run(folder / "s/rate", 0, {"optimizer.lr": 0.01}, better=-0.05)
    write_run(folder / "s/near", 0, {"regularizer.weight": 0.105})
    write_run(folder / "s/going", 5, finished=False)
    (folder / "page.html").write_text(page_of(folder / "s", against=str(folder / "s/w0.0_s0")), "utf-8")
    return folder / "page.html"


def first_column(browser: Browser) -> list[str]:
    return browser.js("[...document.querySelectorAll('#table tbody th')].map(e => e.textContent)")


def quiet(browser: Browser) -> None:
    """Nothing was asked for but the page and what it holds, and nothing was complained about."""
    assert browser.complaints == []
    outside = [url for url in browser.requests if not url.startswith("data:")]
    assert len(outside) == 1
    assert outside[0].startswith("file:")


def test_a_heading_sorts_by_click_and_by_key(browser, swept):
    browser.open(swept)
    column_before = first_column(browser)
    browser.click("#table .sort", 1)
    column_after = first_column(browser)
    assert sorted(column_after) == sorted(column_before)
    means = browser.js("[...document.querySelectorAll('#table tbody tr')].map(e => +e.cells[1].dataset.value)")
    assert means == sorted(means, reverse=True)
    assert browser.js("document.querySelectorAll('#table thead th')[1].getAttribute('aria-sort')") == "descending"
    browser.key("Enter")
    assert first_column(browser) == column_after[::-1]
    browser.key("Enter")
    assert first_column(browser) == column_after
    browser.click("#table .sort", 2)  # of depth less is better
    assert browser.js("document.querySelectorAll('#table thead th')[2].getAttribute('aria-sort')") == "ascending"
    quiet(browser)


@pytest.mark.slow
def test_a_name_switches_its_curve(browser, swept):
    browser.open(swept)
    drawn = "document.querySelectorAll('#curve-charts figure')[0].querySelectorAll('svg path[stroke-width]').length"
    toggles_before = browser.js(drawn)
    assert toggles_before == browser.js("document.querySelectorAll('.toggle').length") == 6
    browser.click(".toggle", 1)
    assert browser.js(drawn) == toggles_before - 1
    assert browser.js("document.querySelectorAll('.toggle')[1].getAttribute('aria-pressed')") == "false"
    browser.click("#legend .bar button", 1)
    assert "no row chosen" in browser.js("document.querySelector('#curve-charts svg').textContent")
    browser.click("#legend .bar button", 0)
    assert browser.js(drawn) == toggles_before
    quiet(browser)


@pytest.mark.slow
def test_pointing_at_a_chart_and_its_arrow_keys_tell_values(browser, swept):
    browser.open(swept)
    tip = "document.querySelector('#curve-charts .tip')"
    browser.move(*browser.where("#curve-charts svg", x=0.97))
    browser.settle()
    assert browser.js(f"{tip}.hidden") is False
    last = browser.js(f"{tip}.textContent")
    assert last.startswith("step 380")
    assert "regularizer.weight=0.3" in last
    assert re.search(r"weight=0\.3[^%]*\d\d\.\d\d %", last)
    browser.js("document.querySelector('#curve-charts svg').focus()")
    browser.key("End")
    browser.key("ArrowLeft")
    assert browser.js(f"{tip}.textContent").startswith("step 300")
    browser.key("Escape")
    assert browser.js(f"{tip}.hidden") is True
    browser.click("#sweep-charts summary")
    cells = browser.js("[...document.querySelectorAll('#sweep-charts details td')].map(e => e.textContent)")
    assert "40." in cells[1] or "39." in cells[1]
    browser.move(*browser.where("#parallel svg", x=0.3, y=0.6))
    browser.settle()
    assert browser.js("document.querySelectorAll('#parallel .lit').length") == 1
    quiet(browser)


@pytest.mark.slow
def test_a_tile_opens_large_and_keys_walk_and_close_it(browser, swept):
    browser.open(swept)
    browser.click("#wall .tile")
    title = "document.querySelector('#viewer h2').textContent"
    assert browser.js("document.querySelector('#viewer').open") is True
    first = browser.js(title)
    assert first.startswith("semseg: ")
    assert browser.js("document.querySelectorAll('#viewer img').length") == 4
    browser.key("ArrowRight")
    assert browser.js(title).startswith("depth: ")
    browser.key("ArrowDown")
    assert browser.js(title).removeprefix("depth: ") != first.removeprefix("semseg: ")
    for _ in range(3):
        browser.key("ArrowRight")
    browser.key("ArrowUp")
    assert browser.js(title) == first
    browser.key("Escape")
    assert browser.js("document.querySelector('#viewer').open") is False
    assert browser.js("document.activeElement === document.querySelector('#wall .tile')") is True
    browser.key("Enter")
    assert browser.js("document.querySelector('#viewer').open") is True
    browser.click("#viewer .arrows button", 4)
    assert browser.js("document.querySelector('#viewer').open") is False
    quiet(browser)


@pytest.mark.slow
def test_the_slider_moves_by_key_and_by_click_and_takes_other_sides(browser, swept):
    browser.open(swept)
    cut_at = "getComputedStyle(document.querySelector('.slider .over')).clipPath"
    assert browser.js(cut_at) == "inset(0px 50% 0px 0px)"
    browser.click(".slider input", x=0.25)
    part = float(re.search(r"0px ([\d.]+)%", browser.js(cut_at))[1])
    assert part == pytest.approx(75, abs=3)
    browser.key("ArrowRight")
    assert float(re.search(r"0px ([\d.]+)%", browser.js(cut_at))[1]) == part - 1
    source_before = browser.js("document.querySelector('.slider > img').src")
    choice = "document.querySelectorAll('#slider select')[2]"
    browser.js(f"{choice}.value = 'label'; {choice}.dispatchEvent(new Event('change'))")
    assert browser.js("document.querySelector('.slider > img').src") != source_before
    assert browser.js("document.querySelector('.slider > img').alt") == "right: semseg, label"
    quiet(browser)


@pytest.mark.slow
def test_colours_follow_the_system_and_the_button(browser, swept):
    paper = "getComputedStyle(document.body).backgroundColor"
    browser.open(swept)
    light = browser.js(paper)
    browser.prefer(dark=True)
    dark = browser.js(paper)
    assert light != dark
    browser.click("#theme")
    assert browser.js(paper) == light
    browser.click("#theme")
    assert browser.js(paper) == dark
    browser.prefer(dark=False)
    browser.js("localStorage.clear()")
    quiet(browser)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_every_text_has_enough_contrast(browser, swept, dark):
    """WCAG's 4.5 : 1 of all text that is shown, against the paper that lies below it."""
    browser.open(swept, dark=dark)
    worst = browser.js(CONTRAST)
    assert worst[0] >= 4.5, worst


BROKEN = """[...document.querySelectorAll("thead th")].flatMap((head) => {
  const texts = document.createTreeWalker(head, NodeFilter.SHOW_TEXT), broken = [];
  while (texts.nextNode()) {
    for (const word of texts.currentNode.data.matchAll(/[^\\s_]+_*/g)) {
      const range = document.createRange();
      range.setStart(texts.currentNode, word.index);
      range.setEnd(texts.currentNode, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size > 1) broken.push(word[0]);
    }
  }
  return broken;
})"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 320])
def test_headings_break_between_words_only_and_the_pictures_have_a_legend(browser, tmp_path, width):
    """With six tasks in the table, as many as there are."""
    sweep(tmp_path / "s")
    for path in tmp_path.glob("s/*/metrics.json"):
        metrics = json.loads(path.read_text())
        write_json(path, metrics | {"human_parts": {"mIoU": 0.5}, "sal": {"maxF": 0.8}})
    (tmp_path / "page.html").write_text(page_of(tmp_path / "s"), "utf-8")
    browser.open(tmp_path / "page.html", width=width)
    assert browser.js(BROKEN) == []
    legend = browser.js("[...document.querySelectorAll('#wall .legends > div')].map(e => e.textContent)")
    assert [text.startswith(task) for text, task in zip(legend, TASKS)] == [True] * len(TASKS)
    assert VOC21[1] in legend[0]
    assert "error" not in "".join(legend)
    assert VOC21[1] in browser.js("document.querySelector('#slider .legends').textContent")
    assert browser.js("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_a_phone_needs_no_sideways_scrolling_and_all_has_names(browser, swept):
    browser.open(swept, width=320, height=640)
    assert browser.js("document.documentElement.scrollWidth") == 320
    assert browser.js("[...document.images].filter(i => !i.alt).length") == 0
    assert browser.js("[...document.images].every(i => i.complete && i.naturalWidth > 0)") is True
    assert (
        browser.js("[...document.querySelectorAll('svg[role=img]')].every(s => s.getAttribute('aria-label'))") is True
    )
    small = "[...document.querySelectorAll('button, select, summary')].filter(e => e.checkVisibility())"
    assert browser.js(f"{small}.filter(e => e.getBoundingClientRect().height < 24).map(e => e.outerHTML)") == []
    quiet(browser)


@pytest.mark.slow
def test_the_tab_key_reaches_things_and_shows_where_it_is(browser, swept):
    browser.open(swept)
    tags = set()
    for _ in range(24):
        browser.key("Tab")
        tags.add(browser.js("document.activeElement.tagName"))
        outline = browser.js("getComputedStyle(document.activeElement).outline")
        assert "solid 3px" in outline, browser.js("document.activeElement.outerHTML")
    assert {"A", "BUTTON", "svg"} <= tags


@pytest.mark.slow
def test_overlapping_labels_of_axes_do_not_occur(browser, swept):
    for width in (320, 1280):
        browser.open(swept, width=width)
        crossed = browser.js(CROSSED)
        assert crossed == []


@pytest.mark.slow
def test_hostile_runs_do_nothing_in_a_browser(browser, tmp_path):
    folder = tmp_path / "s"
    for i in range(2):
        name = HOSTILE.replace("/", "|") + str(i)
        config = {"loss.kind": HOSTILE + str(i), "optimizer.lr": 0.1 + i}
        run = write_run(folder / name, 0, config, {"device": HOSTILE, "command": HOSTILE})
        write_panels(run / "panels", [shown(HOSTILE, 0)], TASKS)
    page = tmp_path / "page.html"
    page.write_text(render_page(collect([folder]), HOSTILE), "utf-8")
    browser.open(page, width=320)
    browser.click("#wall .tile")
    assert browser.js("document.querySelectorAll('img').length") > 4
    assert browser.js("[...document.images].every(i => i.src.startsWith('data:'))") is True
    assert HOSTILE in browser.js("document.querySelector('h1').textContent")
    assert browser.js("document.documentElement.scrollWidth") == 320
    quiet(browser)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_few_runs_make_a_page_without_empty_promises(browser, tmp_path, count):
    for i in range(count):
        write_run(tmp_path / "s" / str(i), i, panels=1)
    page = tmp_path / "page.html"
    page.write_text(page_of(tmp_path / "s"), "utf-8")
    browser.open(page)
    text = browser.js("document.body.innerText")
    assert "No numeric setting differs between the rows." in text
    assert f"{count} run{'s' * (count > 1)}, 1 row" in text
    assert browser.js("document.querySelectorAll('#wall .tile').length") == 4
    assert page.stat().st_size < 1e6
    quiet(browser)


@pytest.mark.slow
def test_sixty_runs_of_a_search_stay_small_and_quick(browser, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(60):
        config = {
            "regularizer.weight": float(10 ** rng.uniform(-2, 0)),
            "optimizer.lr": float(10 ** rng.uniform(-4, -2)),
        }
        write_run(tmp_path / "s" / str(i), 0, config, panels=3, better=rng.uniform(-0.1, 0.1))
    page = tmp_path / "page.html"
    page.write_text(page_of(tmp_path / "s"), "utf-8")
    assert page.stat().st_size < 15e6
    browser.open(page)
    assert browser.js("performance.timing.domComplete - performance.timing.domInteractive") < 5000
    assert browser.js("document.querySelectorAll('#wall .tile').length") == images_module.MAX_ROWS * 4
    assert "The first 24 of 60 rows are shown" in browser.js("document.body.innerText")
    browser.click("#legend .bar button", 0)
    assert browser.js("document.querySelectorAll('.toggle[aria-pressed=true]').length") == 60
    quiet(browser)
