"""The consistency picture: its maths against loops, its files end to end."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.common import TINY, Result, composed
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from mtcl import UserError
from mtcl.cli.consistency import NEARNESS, choose_targets, parse_args, sample_positions, take_evenly_spaced
from mtcl.cli.train import train
from mtcl.config.build_data import build_dataset, build_eval_loader, build_tasks
from mtcl.config.build_model import build_model, saved_config
from mtcl.config.build_training import build_regularizer
from mtcl.config.stored_config import describe_tasks
from mtcl.data.device_batch import prepare_batch
from mtcl.data.sample import SampleMeta
from mtcl.evaluation.feature_consistency import (
    BINS,
    anchor_auc,
    build_histograms,
    compute_pair_statistics,
    label_pairs,
    squared_distances,
    summarize_pairs,
)
from mtcl.regularizers.sampling import sample_features, sample_labels
from mtcl.tasks import build_task
from mtcl.training.checkpoint_file import read_checkpoint_file, write_checkpoint_file

NAMES = ["semseg", "depth", "normals"]

# --- The maths, against Python loops in float64.


def ref_distance(a, b):
    a, b = a.tolist(), b.tolist()
    norm = math.hypot(*a) * math.hypot(*b)
    return 2 - 2 * (sum(x * y for x, y in zip(a, b)) / norm if norm else 0.0)


def ref_anchors(distance, label, valid, near, far):
    """(AUC, mean d_ap, mean d_an, positives, negatives) of each anchor of one image; ``label``: numbers on a line."""
    statistics = []
    for i in range(len(label)):
        others = [j for j in range(len(label)) if j != i and valid[i] and valid[j]]
        ap = [distance[i][j] for j in others if abs(label[i] - label[j]) <= near]
        an = [distance[i][j] for j in others if abs(label[i] - label[j]) >= far]
        if ap and an:
            won = sum(1.0 if n > p else 0.5 if n == p else 0.0 for p in ap for n in an)
            statistics.append((won / len(ap) / len(an), np.mean(ap), np.mean(an), len(ap), len(an)))
    return statistics


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 9),
    classes=st.integers(1, 4),
    levels=st.integers(1, 5),
    far=st.sampled_from([1, 2]),
)
def test_sums_are_those_of_loops_over_anchors_and_pairs(seed, count, classes, levels, far):
    """With many ties (few levels), void pixels, pictures of one class, pairs that are neither (far = 2)."""
    rng = np.random.default_rng(seed)
    distance = torch.from_numpy(rng.integers(0, levels, (2, count, count)) * 0.7)
    label, valid = rng.integers(0, classes, (2, count)), rng.random((2, count)) < 0.8
    apart = torch.from_numpy(np.abs(label[:, :, None] - label[:, None, :])).float()
    pairs = label_pairs(apart, torch.from_numpy(valid), 0, far)
    summary = summarize_pairs(compute_pair_statistics(distance, *pairs))
    reference = [a for b in range(2) for a in ref_anchors(distance[b].tolist(), label[b], valid[b], 0, far)]
    assert summary["anchors"] == len(reference)
    if not reference:
        assert all(math.isnan(summary[key]) for key in ("auc", "gap", "d_ap", "d_an"))
        return
    auc, d_ap, d_an, positives, negatives = np.array(reference).T
    assert summary["auc"] == pytest.approx(auc.mean(), abs=1e-12)
    assert summary["d_ap"] == pytest.approx(d_ap.mean(), abs=1e-12)
    assert summary["d_an"] == pytest.approx(d_an.mean(), abs=1e-12)
    assert summary["gap"] == pytest.approx((d_an - d_ap).mean(), abs=1e-12)
    assert (summary["positives"], summary["negatives"]) == (positives.sum(), negatives.sum())


def test_distances_are_two_minus_two_cosines():
    features = torch.randn(2, 7, 5)
    features[0, 3] = 0  # dead
    features[1, 4] = 3 * features[1, 2]  # one direction
    features[1, 5] = -features[1, 2]
    squared = squared_distances(features)
    for b, i, j in np.ndindex(2, 7, 7):
        assert squared[b, i, j].item() == pytest.approx(
            ref_distance(features[b, i].double(), features[b, j].double()), abs=1e-6
        )
    assert squared[0, 3].tolist() == [2.0] * 7
    assert squared[1, 4, 2] == 0
    assert squared[1, 5, 2] == 4


def test_equal_features_separate_nothing():
    distance = squared_distances(torch.randn(1, 1, 33).expand(1, 12, 33) * torch.rand(1, 12, 1))
    label = torch.arange(12)[None] % 3
    pairs = label_pairs((label[:, :, None] != label[:, None]).float(), torch.ones(1, 12, dtype=torch.bool), 0, 1)
    assert (anchor_auc(distance, *pairs) == 0.5).all()


def test_perfect_and_reversed_features():
    label = torch.tensor([[0, 0, 1, 1]])
    features = torch.nn.functional.one_hot(label).float()
    differ = (label[:, :, None] != label[:, None]).float()
    pairs = label_pairs(differ, torch.ones(1, 4, dtype=torch.bool), 0, 1)
    assert summarize_pairs(compute_pair_statistics(squared_distances(features), *pairs)) == {
        "auc": 1.0, "gap": 2.0, "d_ap": 0.0, "d_an": 2.0, "anchors": 4, "positives": 4, "negatives": 8
    }  # fmt: skip
    positive, negative = pairs
    assert summarize_pairs(compute_pair_statistics(squared_distances(features), negative, positive))["auc"] == 0


def test_pairs_are_those_of_the_tasks_distance():
    depth = build_task("depth")
    label = torch.tensor([[[1.0], [1.04], [1.1], [1.5], [0.0]]])
    valid = torch.tensor([[True, True, True, True, False]])
    positive, negative = label_pairs(
        depth.distance(label, label), valid, depth.positive_threshold, depth.negative_threshold
    )
    assert positive[0].nonzero().tolist() == [[0, 1], [1, 0]]  # 1.1 is neither, 0 m void
    assert negative[0].nonzero().tolist() == [[0, 3], [1, 3], [2, 3], [3, 0], [3, 1], [3, 2]]


def test_histograms_hold_every_anchor_once():
    rng = np.random.default_rng(0)
    distance = torch.from_numpy(rng.random((3, 20, 20)))
    label = torch.from_numpy(rng.integers(0, 3, (3, 20)))
    pairs = label_pairs((label[:, :, None] != label[:, None]).float(), torch.ones(3, 20, dtype=torch.bool), 0, 1)
    statistics = compute_pair_statistics(distance, *pairs)
    middles = (torch.arange(BINS) + 0.5) * 4 / BINS
    for histogram, total in ((statistics.histogram_ap, statistics.d_ap), (statistics.histogram_an, statistics.d_an)):
        assert histogram.sum().item() == pytest.approx(int(statistics.anchors))
        assert (histogram * middles).sum().item() == pytest.approx(total.item(), abs=int(statistics.anchors) * 4 / BINS)
    halves = [compute_pair_statistics(distance[rows], *(p[rows] for p in pairs)) for rows in (slice(1), slice(1, 3))]
    for together, summed in zip(statistics, halves[0] + halves[1]):
        torch.testing.assert_close(together, summed)


def test_shared_histograms_zoom_on_what_there_is():
    nothing = compute_pair_statistics(torch.zeros(1, 2, 2), *[torch.zeros(1, 2, 2, dtype=torch.bool)] * 2)
    empty = build_histograms([nothing], max_bins=8)
    assert empty.ap == empty.an == [[0.0] * 8]
    near, far = torch.zeros(BINS).double(), torch.zeros(BINS).double()
    near[0], near[BINS // 4], far[BINS // 2 - 1] = 3, 1, 4  # distances 0, 1, just below 2
    histograms = build_histograms([nothing._replace(histogram_ap=near, histogram_an=far)], max_bins=8)
    assert histograms.width == 0.25
    assert histograms.ap == [[0.75, 0, 0, 0, 0.25, 0, 0, 0]]
    assert histograms.an == [[0, 0, 0, 0, 0, 0, 0, 1.0]]


# --- Its places, words and frames.


def test_places_are_pixels_of_the_picture_and_depend_on_its_id_alone():
    meta = [SampleMeta("a", (40, 50), (4, 7)), SampleMeta("b", (48, 64), (0, 0))]
    batch = {"image": torch.zeros(2, 3, 48, 64), "labels": {}, "meta": meta}
    in_frame, in_picture = sample_positions(batch)
    alone, _ = sample_positions({**batch, "image": torch.zeros(1, 3, 48, 64), "meta": meta[:1]})
    assert torch.equal(in_frame[:1], alone)
    row, column = (in_frame[0] * torch.tensor([48.0, 64.0])).long().T
    assert ((row >= 4) & (row < 44) & (column >= 7) & (column < 57)).all()
    assert len({*zip(row.tolist(), column.tolist())}) == len(row)  # no pixel twice
    diagonal = math.hypot(40, 50)
    assert torch.allclose(in_picture[0], torch.stack([row - 3.5, column - 6.5], dim=1).double() / diagonal)


def test_frames_are_spread_over_the_list():
    class MultiTaskDataset:
        ids = tuple("abcdefghi")
        summary = fingerprint = None

        def read(self, index, tasks=None):
            return self.ids[index]

    chosen = take_evenly_spaced(MultiTaskDataset(), 3)
    assert list(chosen.ids) == ["a", "e", "i"]
    assert chosen.read(1) == "e"
    assert take_evenly_spaced(MultiTaskDataset(), 100).ids == [*MultiTaskDataset.ids]
    assert take_evenly_spaced(MultiTaskDataset(), 1).ids == ["a"]


def test_words():
    options, others = parse_args(["a.pt", "data.split=tune", "--frames", "8", "--target", "all"], "", "now")
    assert (str(options.checkpoint), options.compare, options.target, options.frames) == ("a.pt", None, "all", 8)
    assert str(options.output) == "outputs/consistency/now"
    assert others == ["data.split=tune"]
    for arguments, message in (
        ([], "CHECKPOINT"),
        (["a", "--frames=0"], "frames: 0"),
        (["a", "--frames=x"], "x"),
        (["checkpoint=a"], "CHECKPOINT alone"),
        (["a", "frames=8"], "--name VALUE"),
    ):
        with pytest.raises(UserError, match=message):
            parse_args(arguments, "", "now")
    assert choose_targets(None, ["depth", "semseg"]) == ["semseg"]
    assert choose_targets(None, ["depth", "edge"]) == ["depth"]
    assert choose_targets("all", ["depth", "edge"]) == ["depth", "edge"]
    with pytest.raises(UserError, match="sal"):
        choose_targets("sal", ["depth", "edge"])


# --- End to end.


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints of a tiny run with contrast, and of models that nobody trained: without, of another width, of other
    tasks."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = [*TINY, f"tasks.names=[{','.join(NAMES)}]", "trainer.val_interval=null", "trainer.max_steps=4"]
    overrides += ["trainer.validate_first=false", "trainer.num_panels=0"]
    train(composed(*overrides), folder)
    variants = {"without": [], "wide": ["decoder.head_width=12"], "other": ["tasks.names=[depth]"]}
    paths = {"with": folder / "checkpoints" / "last.pt"}
    for name, more in variants.items():
        config = composed(*overrides, "regularizer=none", *more)
        tasks = build_tasks(config)
        model = build_model(config, tasks, pretrained=False)
        paths[name] = folder / f"{name}.pt"
        content = {
            "model": model.state_dict(),
            "regularizer": None,
            "step": 0,
            "meta": {"tasks": describe_tasks(tasks)},
        }
        write_checkpoint_file(paths[name], {**content, "config": saved_config(config, model)})
    return paths


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing takes a second a picture."""
    for name in ("draw_distances", "draw_separation"):
        monkeypatch.setattr(f"mtcl.cli.consistency.{name}", lambda *args: None)


def call(cli, *arguments) -> Result:
    return cli("scripts/consistency.py", *arguments, "trainer.device=cpu")


@pytest.mark.slow
def test_two_arms_give_pictures_and_numbers(cli, runs, tmp_path):
    arguments = [runs["with"], f"--compare={runs['without']}", "--target=all", "--frames=3"]
    result = call(cli, *arguments, f"--output={tmp_path}/a")
    assert result.code == 0, result.err
    assert str(tmp_path / "a") in result.out
    for name in (*(f"consistency_{task}" for task in NAMES), "separation"):
        assert Image.open(tmp_path / "a" / f"{name}.png").size[0] >= 1200
    content = json.loads((tmp_path / "a" / "consistency.json").read_text())
    assert content["run"]["num_images"] == len(content["run"]["frames"]) == 3
    assert content["thresholds"] == {"semseg": [0.0, 1.0], "depth": [0.05, 0.2], "normals": [15.0, 40.0]}
    with_, without = content["arms"]
    assert "no regulariser) has no trained projectors" in result.out
    assert (with_["name"], without["name"]) == ("contrastive, weight 0.3", "no regulariser")
    assert with_["step"] == 4
    assert set(content[NEARNESS]) == set(NAMES)
    assert without["projected"] == {}
    for arm in (with_, without):
        for kind in ("raw", "centred"):
            assert list(arm[kind]) == NAMES
            for target in NAMES:
                for source in NAMES:
                    cell = arm[kind][target][source]
                    assert 0 <= cell["auc"] <= 1
                    assert cell["gap"] == pytest.approx(cell["d_an"] - cell["d_ap"])
                    assert sum(cell["histogram_ap"]) == pytest.approx(1, abs=0.011)  # the last half percent may be cut
                    # The pairs are the labels' alone.
                    assert cell["anchors"] == content[NEARNESS][source]["anchors"] > 0
    for target in with_["projected"]:
        own_cell = with_["projected"][target][target]
        assert own_cell["projectors"]  # of the other sources: it was never a source itself
        assert target not in own_cell["projectors"]
    assert with_["projected"]


def test_batches_change_no_pair(cli, runs, tmp_path, undrawn):
    contents = []
    for size in (1, 4):
        arguments = [runs["with"], f"data.eval_batch_size={size}", "--frames=3", f"--output={tmp_path}/{size}"]
        assert call(cli, *arguments).code == 0
        contents.append(json.loads((tmp_path / str(size) / "consistency.json").read_text()))
    one, four = (content["arms"][0]["raw"]["depth"]["semseg"] for content in contents)
    assert one["auc"] == pytest.approx(four["auc"], abs=1e-4)  # features of another batch, up to rounding
    assert one["positives"] == four["positives"]


def test_the_numbers_are_those_of_the_features(cli, runs, tmp_path, undrawn):
    """Raw features of one frame, with everything rebuilt by hand and AUC by loops."""
    result = call(cli, runs["with"], "--target=depth", "--frames=1", f"--output={tmp_path}/a")
    assert result.code == 0, result.err
    setting = json.loads((tmp_path / "a" / "consistency.json").read_text())["arms"][0]
    state = read_checkpoint_file(runs["with"])
    config = OmegaConf.create(state["config"])
    tasks = build_tasks(config)
    model = build_model(config, tasks, pretrained=False).eval()
    model.load_state_dict(state["model"])
    regularizer = build_regularizer(config, tasks, model)
    regularizer.load_state_dict(state["regularizer"])
    reader = build_dataset(config, "val", tasks, limit=1)
    batch = next(iter(build_eval_loader(config, reader, tasks, torch.device("cpu"))))
    pixels, _ = sample_positions(batch)
    with torch.no_grad():
        output = model(prepare_batch(batch, model.mean, model.std, "cpu")[0])
        feature = sample_features(output.features["final"]["depth"], pixels, (32, 64), output.frame)
        projected = regularizer.projectors["depth"](feature, torch.tensor([NAMES.index("semseg")]))
    label = sample_labels(batch["labels"]["semseg"], pixels)[0, :, 0].tolist()
    valid = [value != 255 for value in label]
    number = [list(dict.fromkeys(label)).index(value) for value in label]
    for kind, z in (("raw", feature), ("projected", projected)):
        distance = squared_distances(z)[0].tolist()
        reference = ref_anchors(distance, number, valid, 0, 1)
        cell = setting[kind]["depth"]["semseg"]
        assert cell["anchors"] == len(reference)
        assert cell["auc"] == pytest.approx(np.mean([a[0] for a in reference]), abs=1e-6)
        assert cell["d_ap"] == pytest.approx(np.mean([a[1] for a in reference]), abs=1e-6)
        assert cell["d_an"] == pytest.approx(np.mean([a[2] for a in reference]), abs=1e-6)
    # Another source goes through its own projector.
    normals = batch["labels"]["normals"]
    label, valid = sample_labels(normals, pixels), sample_labels(tasks["normals"].valid(normals), pixels)
    with torch.no_grad():
        z = regularizer.projectors["depth"](feature, torch.tensor([NAMES.index("normals")]))
    pairs = label_pairs(tasks["normals"].distance(label, label), valid[..., 0], 15, 40)
    expected = summarize_pairs(compute_pair_statistics(squared_distances(z), *pairs))
    assert setting["projected"]["depth"]["normals"]["auc"] == pytest.approx(expected["auc"], abs=1e-6)
    assert setting["projected"]["depth"]["normals"]["d_ap"] == pytest.approx(expected["d_ap"], abs=1e-6)


def test_a_run_without_projectors_and_one_of_a_single_task(cli, runs, tmp_path):
    for name, target in (("without", "semseg"), ("other", "depth")):
        result = call(cli, runs[name], "--frames=1", f"--output={tmp_path}/{name}")
        assert result.code == 0, result.err
        assert "no trained projectors" in result.out
        assert (tmp_path / name / f"consistency_{target}.png").is_file()
        assert (tmp_path / name / "separation.png").is_file()


def test_labels_without_pairs_are_null_and_drawn_nevertheless(cli, runs, tmp_path, monkeypatch):
    depth = type(build_task("depth"))
    monkeypatch.setattr(depth, "valid", lambda self, label: torch.zeros_like(label[:, 0], dtype=torch.bool))
    result = call(cli, runs["with"], "--frames=1", f"--output={tmp_path}/a")
    assert result.code == 0, result.err
    cell = json.loads((tmp_path / "a" / "consistency.json").read_text())["arms"][0]["raw"]["semseg"]["depth"]
    assert (cell["auc"], cell["d_ap"], cell["anchors"]) == (None, None, 0)


def test_says_what_is_wrong(cli, runs, tmp_path):
    good = runs["with"]
    broken = read_checkpoint_file(runs["with"])
    broken["regularizer"].popitem()
    write_checkpoint_file(tmp_path / "broken.pt", broken)
    wrong = [
        ([f"{tmp_path}/none.pt"], ["none.pt", "does not exist"]),
        ([good, f"--compare={tmp_path}/none.pt"], ["none.pt", "does not exist"]),
        ([f"{tmp_path}/broken.pt"], ["broken.pt", "do not fit"]),
        ([good, "--target=edge"], ["--target edge", "semseg, depth, normals"]),
        ([good, "--frames=-1"], ["frames: -1"]),
        ([good, f"--compare={runs['wide']}"], ["same decoder", str(runs["wide"])]),
        ([good, f"--compare={runs['other']}"], ["tasks", str(runs["other"])]),
        ([good, "data.spilt=tune"], ["data.spilt", "data.split"]),
        ([good, "decoder.width=8"], ["decoder.width"]),
        ([good, "regularizer.weight=1"], ["regularizer.weight=1"]),
        ([], ["CHECKPOINT"]),
    ]
    for arguments, fragments in wrong:
        result = call(cli, *arguments, f"--output={tmp_path}/out")
        assert result.code == 1, (arguments, result)
        (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in result.err
        assert all(name in line for name in fragments), line
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "consistency.json").write_text("{}")
    assert "exists already" in call(cli, good, f"--output={tmp_path}/out").err


def test_help(cli):
    assert "--compare" in cli("scripts/consistency.py", "--help").out
