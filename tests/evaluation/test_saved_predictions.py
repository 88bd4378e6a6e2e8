"""Saved maps: what is written is read back, anyone's are scored, and each mistake is told."""

import json
import math
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
import torch
from helpers.common import TINY, assert_fails, composed, tiny_nyud
from helpers.saved_maps import Listed, write_png
from PIL import Image

from mtcl import UserError
from mtcl.cli.train import train
from mtcl.data import NYUD, SampleMeta, eval_loader
from mtcl.evaluation.evaluator import Evaluator
from mtcl.evaluation.saved_predictions import FORMATS, PredictionWriter, SavedPredictions, find_map_folder
from mtcl.tasks import NYUD40, TASK_NAMES, build_task
from mtcl.tasks.base import Task

SIZE = (5, 7)
TASKS = {name: build_task(name, **({"class_names": NYUD40} if name == "semseg" else {})) for name in TASK_NAMES}
CODES = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)


def label_of(task: Task, seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if task.name == "normals":
        return rng.integers(1, 256, (*size, 3), dtype=np.uint8)
    if task.name == "depth":
        return rng.uniform(1, 5, size).astype(np.float32)
    return rng.integers(0, len(getattr(task, "classes", "01")), size, dtype=np.uint8)


def raw_of(task: Task, seed: int = 0, size: tuple[int, int] = SIZE) -> torch.Tensor:
    raw = torch.randn(task.channels, *size, generator=torch.Generator().manual_seed(seed))
    return raw + 0.5 if task.name == "depth" else raw


def saved(folder: Path, names: list[str], ids: str = "ab", size: tuple[int, int] = SIZE, **options) -> SavedPredictions:
    tasks = {name: TASKS[name] for name in names}
    reader = Listed({id: {name: label_of(task, size=size) for name, task in tasks.items()} for id in ids})
    return SavedPredictions(folder, tasks, reader, **options)


def read_back(folder: Path, name: str) -> torch.Tensor:
    """The raw prediction (C, H, W) of the only map "a" of a task, of whatever size it must have."""
    batch = {"image": torch.zeros(1, 3, *SIZE), "labels": {}, "meta": [SampleMeta("a", SIZE, (0, 0))]}
    return saved(folder, [name], "a").predict(batch)[name][0]


def complaint(folder: Path, name: str) -> str:
    with pytest.raises(UserError) as error:
        read_back(folder, name)
    return str(error.value)


def test_every_task_has_a_format():
    assert tuple(FORMATS) == TASK_NAMES


def test_all_codes_of_an_edge_map_come_back_from_the_logits():
    logits = FORMATS["edge"](TASKS["edge"]).to_raw(CODES)
    assert logits.shape == (1, 1, 16, 16)
    assert logits.isfinite().all()
    for dtype in (torch.float32, torch.float64):
        assert torch.equal((logits[:, 0].to(dtype).sigmoid() * 255).to(torch.uint8), CODES)
    assert np.array_equal(FORMATS["edge"](TASKS["edge"]).from_raw(logits[0]), CODES[0])


def test_all_codes_of_a_saliency_map_come_back_and_reach_the_thresholds_they_reach_as_fractions():
    logits = FORMATS["sal"](TASKS["sal"]).to_raw(CODES)
    assert logits.shape == (1, 2, 16, 16)
    assert logits.isfinite().all()
    for dtype in (torch.float32, torch.float64):
        probability = logits.to(dtype).softmax(1)[:, 1]
        assert (probability - CODES / 255).abs().max() < 1e-5
        assert torch.equal((probability * 255).to(torch.uint8), CODES)
        for k in range(1, 20):
            assert torch.equal(probability >= k / 20, CODES.int() * 20 >= 255 * k), k
    assert np.array_equal(FORMATS["sal"](TASKS["sal"]).from_raw(logits[0]), CODES[0])


@pytest.mark.parametrize("name", TASK_NAMES)
def test_what_is_written_is_read_back_in_frames_as_the_field_reads_it(tmp_path, name):
    """Two pictures of other sizes in one padded frame, by a slow reading of the written files."""
    task, sizes = TASKS[name], {"a": (5, 7), "b": (6, 4)}
    raw = {id: raw_of(task, seed, size) for seed, (id, size) in enumerate(sizes.items())}
    writer = PredictionWriter(tmp_path / "maps", {name: task}, None)
    for id, prediction in raw.items():
        writer.write(id, {name: prediction})
    labels = {id: {name: label_of(task, size=size)} for id, size in sizes.items()}
    reader = Listed(labels)
    maps = SavedPredictions(tmp_path / "maps", {name: task}, reader)
    batch = next(iter(eval_loader(reader, {name: task}, (8, 8), batch_size=2, workers=0)))
    predictions = maps.predict(batch)[name]
    assert predictions.shape == (2, task.channels, *batch["image"].shape[-2:])
    assert predictions.dtype == torch.float32
    for row, sample in enumerate(batch["meta"]):
        (top, left_edge), (height, width) = sample.offset, sample.native_size
        inside = predictions[row, :, top : top + height, left_edge : left_edge + width]
        path = next((tmp_path / "maps" / name).glob(f"{sample.id}.*"))
        expected = raw[sample.id]
        if name in ("semseg", "human_parts"):
            assert np.array_equal(np.array(Image.open(path)), expected.argmax(0))
            assert torch.equal(inside.argmax(0), expected.argmax(0))
            assert torch.equal(inside.sum(0), torch.ones(height, width))
        elif name == "depth":
            assert np.load(path).dtype == np.float32
            assert torch.equal(inside, expected.clamp(min=0))
            assert (expected < 0).any()
        elif name == "normals":
            unit = expected / expected.norm(dim=0)
            field = 2 * cv2.imread(str(path))[..., ::-1].astype(np.float32) / 255 - 1
            assert np.allclose(inside, field.transpose(2, 0, 1), atol=1e-6)
            assert (inside - unit).abs().max() < 0.5 / 127.5 + 1e-6
        else:
            exact = expected[0].sigmoid() if name == "edge" else expected.softmax(0)[1]
            codes = np.array(Image.open(path))
            assert np.array_equal(codes, np.floor(255 * exact.numpy()).astype(np.uint8))
            again = inside[0].sigmoid() if name == "edge" else inside.softmax(0)[1]
            assert np.array_equal(np.floor(255 * again.numpy()), codes)


def test_the_metrics_of_written_maps_are_those_of_the_predictions(tmp_path):
    """Classes and depth to the last digit, the others as precisely as 8 bits are."""
    ids = [f"{n:04d}" for n in range(4)]
    reader = Listed({id: {name: label_of(task, i) for name, task in TASKS.items()} for i, id in enumerate(ids)})
    raw = {id: {name: raw_of(task, 9 + i) for name, task in TASKS.items()} for i, id in enumerate(ids)}
    loader = eval_loader(reader, TASKS, (8, 8), batch_size=3, workers=0)
    evaluator = Evaluator(TASKS, loader, torch.device("cpu"))

    def predict(batch):
        height, width = batch["image"].shape[-2:]
        framed = {}
        for name, task in TASKS.items():
            framed[name] = torch.full((len(batch["meta"]), task.channels, height, width), 7.0)
            for row, sample in enumerate(batch["meta"]):
                (top, left_edge), (h, w) = sample.offset, sample.native_size
                framed[name][row, :, top : top + h, left_edge : left_edge + w] = raw[sample.id][name]
        return framed

    writer = PredictionWriter(tmp_path / "maps", TASKS, None)
    direct = evaluator.score(predict, on_prediction=writer.write)
    maps = SavedPredictions(tmp_path / "maps", TASKS, reader)
    again = evaluator.score(maps.predict)
    assert (again.num_images, [s.id for s in again.visual_samples]) == (4, [])
    assert_close(again.metrics, direct.metrics)


def assert_close(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for task in ("semseg", "human_parts"):
        assert actual[task] == expected[task]
    assert actual["depth"] == pytest.approx(expected["depth"], rel=1e-12)  # the order of a sum
    for task in expected.keys() - {"semseg", "human_parts", "depth"}:
        assert actual[task].keys() == expected[task].keys()
    assert actual["normals"]["mErr"] == pytest.approx(expected["normals"]["mErr"], abs=0.3)
    assert actual["sal"]["maxF"] == pytest.approx(expected["sal"]["maxF"], abs=0.01)


def test_others_forms_of_depth_and_normals_are_read(tmp_path):
    metres, vectors = label_of(TASKS["depth"]), np.random.default_rng(0).normal(size=(*SIZE, 3))
    for folder, array in {
        "npy": metres.astype(np.float16),
        "thin": metres[..., None],
        "double": metres.astype(float),
    }.items():
        (tmp_path / folder / "depth").mkdir(parents=True)
        np.save(tmp_path / folder / "depth" / "a.npy", array)
        assert torch.equal(read_back(tmp_path / folder, "depth")[0], torch.tensor(array).float().reshape(SIZE))
    for folder, array in {"mat": metres, "thin_mat": metres[..., None]}.items():
        (tmp_path / folder / "depth").mkdir(parents=True)
        scipy.io.savemat(tmp_path / folder / "depth" / "a.mat", {"depth": array})
        assert torch.equal(read_back(tmp_path / folder, "depth")[0], torch.tensor(metres))
    (tmp_path / "npy" / "normals").mkdir()
    np.save(tmp_path / "npy" / "normals" / "a.npy", vectors)
    assert torch.equal(read_back(tmp_path / "npy", "normals"), torch.tensor(vectors).float().permute(2, 0, 1))


def test_what_is_not_finite_in_a_depth_map_is_left_to_the_metric(tmp_path):
    metres = label_of(TASKS["depth"])
    metres[0, 0], metres[1, 1] = np.nan, np.inf
    (tmp_path / "depth").mkdir()
    np.save(tmp_path / "depth" / "a.npy", metres)
    depth = read_back(tmp_path, "depth")[0]
    assert depth[0, 0].isnan()
    assert depth[1, 1].isinf()
    writer = PredictionWriter(tmp_path / "maps", {"depth": TASKS["depth"]}, None)
    writer.write("a", {"depth": depth[None]})
    assert read_back(tmp_path / "maps", "depth")[0, 0, 0].isnan()


def test_classes_of_a_palette_are_its_indices(tmp_path):
    (tmp_path / "semseg").mkdir()
    values = label_of(TASKS["semseg"])
    picture = Image.fromarray(values, "P")
    picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    picture.save(tmp_path / "semseg" / "a.png")
    assert np.array_equal(read_back(tmp_path, "semseg").argmax(0), values)


BAD_MAPS = {
    "16 bits": ("sal", np.zeros(SIZE, np.uint16), ["sal/a.png", "16 bits", "8-bit", "1 channel"]),
    "classes of 16 bits": ("semseg", np.zeros(SIZE, np.uint16), ["16 bits", "8-bit"]),
    "normals of 16 bits": ("normals", np.zeros((*SIZE, 3), np.uint16), ["16 bits", "3 channels"]),
    "colours for classes": ("semseg", np.zeros((*SIZE, 3), np.uint8), ["semseg/a.png", "3 channels", "1 channel"]),
    "colours for edges": ("edge", np.zeros((*SIZE, 3), np.uint8), ["edge/a.png", "3 channels", "1 channel"]),
    "grey normals": ("normals", np.zeros(SIZE, np.uint8), ["normals/a.png", "1 channel", "3 channels"]),
    "a class too many": ("semseg", np.full(SIZE, 40, np.uint8), ["semseg/a.png", "class 40", "0 to 39"]),
    "void": ("human_parts", np.full(SIZE, 255, np.uint8), ["class 255", "0 to 6"]),
    "another size": ("semseg", np.zeros((8, 7), np.uint8), ["semseg/a.png", "8x7", "5x7"]),
    "turned": ("edge", np.zeros(SIZE[::-1], np.uint8), ["edge/a.png", "7x5", "5x7"]),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_a_wrong_picture_is_told(tmp_path, case):
    name, values, fragments = BAD_MAPS[case]
    write_png(tmp_path / name / "a.png", values)
    message = complaint(tmp_path, name)
    assert all(word in message for word in fragments), message


BAD_ARRAYS = {
    "whole numbers": ("depth", np.zeros(SIZE, np.uint16), ["depth/a.npy", "uint16", "metres"]),
    "three channels": ("depth", np.zeros((*SIZE, 3)), ["depth/a.npy", "(5, 7, 3)"]),
    "another size": ("depth", np.zeros((4, 4)), ["depth/a.npy", "4x4", "5x7"]),
    "channels first": ("normals", np.zeros((3, *SIZE)), ["normals/a.npy", "(3, 5, 7)"]),
    "codes": ("normals", np.zeros((*SIZE, 3), np.uint8), ["normals/a.npy", "uint8"]),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_a_wrong_array_is_told(tmp_path, case):
    name, values, fragments = BAD_ARRAYS[case]
    (tmp_path / name).mkdir()
    np.save(tmp_path / name / "a.npy", values)
    message = complaint(tmp_path, name)
    assert all(word in message for word in fragments), message


def test_a_palette_is_no_probability(tmp_path):
    (tmp_path / "sal").mkdir()
    Image.fromarray(np.zeros(SIZE, np.uint8), "L").convert("P").save(tmp_path / "sal" / "a.png")
    assert "palette" in complaint(tmp_path, "sal")


def test_damaged_files_and_a_mat_without_depth_are_told(tmp_path):
    write_png(tmp_path / "edge" / "a.png", np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8))
    content = (tmp_path / "edge" / "a.png").read_bytes()
    for data, word in [
        (content[:45], "truncated"),
        (content[:20], "not a PNG"),
        (b"text", "not a PNG"),
        (b"", "not a PNG"),
    ]:
        (tmp_path / "edge" / "a.png").write_bytes(data)
        assert f"{tmp_path}/edge/a.png" in complaint(tmp_path, "edge")
        assert word in complaint(tmp_path, "edge")
    (tmp_path / "depth").mkdir()
    scipy.io.savemat(tmp_path / "depth" / "a.mat", {"deep": np.zeros(SIZE)})
    assert "no variable depth" in complaint(tmp_path, "depth")


def describe_refusal(folder: Path, *args, **options) -> str:
    with pytest.raises(UserError) as error:
        saved(folder, *args, **options)
    return str(error.value)


def test_missing_extra_and_double_maps_are_told(tmp_path):
    for id in "bcdefg":
        write_png(tmp_path / "edge" / f"{id}.png", np.zeros(SIZE, np.uint8))
    message = describe_refusal(tmp_path, ["edge"], "bcxyzvw")
    assert "4 maps of images" in message
    assert "d, e, f ..." in message
    message = describe_refusal(tmp_path, ["edge"], "bcxyzvw", allow_extra_maps=True)
    assert "5 of the 7" in message
    assert "among them x, y, z;" in message
    message = describe_refusal(tmp_path, ["edge"], "bcdefgx")
    assert "1 of the 7" in message
    assert "among them x;" in message
    assert "1 map of images" in describe_refusal(tmp_path, ["edge"], "bcdef")
    assert "sal is missing" in describe_refusal(tmp_path, ["edge", "sal"], "bcdefg")
    for name in ("a.npy", "a.png"):
        (tmp_path / "normals").mkdir(exist_ok=True)
        (tmp_path / "normals" / name).touch()
    message = describe_refusal(tmp_path, ["normals"], "a")
    assert "a.npy" in message
    assert "a.png" in message


def test_maps_of_other_endings_are_named(tmp_path):
    for id in "ab":
        write_png(tmp_path / "maps" / "edge" / f"{id}.png", np.zeros(SIZE, np.uint8))
        (tmp_path / "maps" / "edge" / f"{id}.png").rename(tmp_path / "maps" / "edge" / f"{id}.PNG")
    (tmp_path / "maps" / "edge" / "a.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"has no map \(\.png\) of 2 .* \(of them there are 2 \.PNG, 1 \.npz, which"):
        saved(tmp_path / "maps", ["edge"])
    root = tiny_nyud(tmp_path / "NYUDv2")
    (root / "edge" / "b.png").rename(root / "edge" / "b.PNG")
    with pytest.raises(UserError, match=r"first edge/b\.png \(of them there are 1 \.PNG, which are not read\)"):
        NYUD(root, "train", ["edge"])


def test_other_files_beside_the_maps_are_left_alone(tmp_path):
    for name in ("a.png", "b.png"):
        write_png(tmp_path / "edge" / name, np.zeros(SIZE, np.uint8))
    for name in (".a.png", "edge.json", "a.txt"):
        (tmp_path / "edge" / name).touch()
    saved(tmp_path, ["edge"], "ab")


@pytest.mark.parametrize("name", ["human_parts", "normals", "depth", "sal"])
def test_a_picture_without_any_label_needs_no_map(tmp_path, name):
    """As the field's code writes none of it; human parts: the label of a picture without a person is all background."""
    task = TASKS[name]
    void = np.full_like(label_of(task), 0 if name == "human_parts" else task.void)
    reader = Listed({"a": {name: label_of(task)}, "b": {name: void}})
    writer = PredictionWriter(tmp_path, {name: task}, None)
    writer.write("a", {name: raw_of(task)})
    loader = eval_loader(reader, {name: task}, None, batch_size=2, workers=0)
    evaluator = Evaluator({name: task}, loader, torch.device("cpu"), num_visual_samples=2)
    missing = evaluator.score(SavedPredictions(tmp_path, {name: task}, reader).predict)
    writer.write("b", {name: raw_of(task, 1)})
    complete = evaluator.score(SavedPredictions(tmp_path, {name: task}, reader).predict)
    assert missing.metrics == complete.metrics
    assert not math.isnan(complete.metrics[name][task.primary_metric])


def test_a_fingerprint_tells_the_content_of_the_maps_and_their_ids(tmp_path):
    readings = set()
    for number, (id, value) in enumerate([("a", 0), ("a", 1), ("b", 0)]):
        folder = tmp_path / str(number)
        write_png(folder / "edge" / f"{id}.png", np.full(SIZE, value, np.uint8))
        maps = saved(folder, ["edge"], id)
        batch = {"image": torch.zeros(1, 3, *SIZE), "labels": {}, "meta": [SampleMeta(id, SIZE, (0, 0))]}
        maps.predict(batch)
        once = maps.fingerprint()
        maps.predict(batch)
        assert maps.fingerprint() == once
        assert len(once) == 16
        readings.add(once)
    assert len(readings) == 3


def test_folders_of_the_fields_code_are_found(tmp_path):
    (tmp_path / "results" / "edge").mkdir(parents=True)
    (tmp_path / "results" / "depth").mkdir()
    (tmp_path / "results" / "sal").mkdir()
    assert find_map_folder(tmp_path, ["depth", "edge", "semseg"]) == (tmp_path / "results", ["depth", "edge"])
    assert find_map_folder(tmp_path / "results", ["edge"]) == (tmp_path / "results", ["edge"])
    for folder, fragments in [(tmp_path / "no", ["no is not a folder"]), (tmp_path, ["semseg", "normals"])]:
        with pytest.raises(UserError) as error:
            find_map_folder(folder, ["semseg", "normals"])
        assert all(word in str(error.value) for word in fragments)


def test_a_writer_refuses_nan_where_it_would_be_lost_and_folders_that_are_not_its_own(tmp_path):
    raw = raw_of(TASKS["edge"])
    raw[0, 2, 3] = torch.nan
    writer = PredictionWriter(tmp_path / "new", {"edge": TASKS["edge"]}, None)
    with pytest.raises(UserError, match="edge for a holds NaN"):
        writer.write("a", {"edge": raw})
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    PredictionWriter(tmp_path / "empty", TASKS, tmp_path / "data")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for folder, word in [("full", "not empty"), ("full/mine", "is a file"), ("data/maps", "lies in the dataset")]:
        with pytest.raises(UserError, match=word):
            PredictionWriter(tmp_path / folder, TASKS, tmp_path / "data")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(composed(*TINY), folder)
    return folder / "checkpoints" / "last.pt"


ROOMS = [
    "data=rooms",
    "trainer.device=cpu",
    "data.size=[32,64]",
    "data.workers=0",
    "data.limit=4",
    "trainer.num_panels=1",
]


def test_maps_saved_from_a_checkpoint_score_as_it_does(cli, trained, tmp_path, monkeypatch):
    maps = tmp_path / "maps"
    result = cli("evaluate.py", f"checkpoint={trained}", f"save_predictions={maps}", f"hydra.run.dir={tmp_path}/a")
    assert result.code == 0, result.err
    assert f"predictions={maps}" in result.out
    assert {path.name for path in maps.iterdir()} == set(TASK_NAMES)
    assert {len(list(path.iterdir())) for path in maps.iterdir()} == {4}
    expected = json.loads((tmp_path / "a" / "metrics.json").read_text())

    def no_model(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr("mtcl.config.build_model.build_model", no_model)
    result = cli("evaluate.py", f"predictions={maps}", *ROOMS, f"hydra.run.dir={tmp_path}/b")
    assert result.code == 0, result.err
    assert_close(json.loads((tmp_path / "b" / "metrics.json").read_text()), expected)
    assert "mIoU" in result.out
    assert len(list((tmp_path / "b" / "panels").glob("*.png"))) == 1
    facts = json.loads((tmp_path / "b" / "run.json").read_text())
    assert facts["predictions"] == str(maps)
    assert len(facts["predictions_fingerprint"]) == 16
    assert facts["num_images"] == 4
    assert not {"checkpoint", "step", "seed", "precision"} & facts.keys()
    # Frames and batches are nothing to saved maps; a task without a folder is not scored, nor are maps beyond a limit.
    shutil.rmtree(maps / "sal")
    overrides = ["data.limit=null", "data.options.length=[1,4]", "data.eval_batch_size=3"]
    result = cli("evaluate.py", f"predictions={maps}", *ROOMS, *overrides, f"hydra.run.dir={tmp_path}/c")
    assert result.code == 0, result.err
    assert "no folder of sal" in result.out
    scores = json.loads((tmp_path / "c" / "metrics.json").read_text())
    assert list(scores) == [name for name in TASK_NAMES if name != "sal"]
    overrides = ["data.limit=2", "tasks.names=[depth,semseg]"]
    result = cli("evaluate.py", f"predictions={maps}", *ROOMS, *overrides, f"hydra.run.dir={tmp_path}/d")
    assert result.code == 0, result.err
    assert list(json.loads((tmp_path / "d" / "metrics.json").read_text())) == ["semseg", "depth"]
    cases = [
        (["data.limit=null", "data.options.length=[1,2]"], ["2 maps", "rooms-0-val-00002, rooms-0-val-00003;"]),
        (["data.limit=null", "data.options.length=[1,5]"], ["1 of the 5", "rooms-0-val-00004"]),
        (["data.split=tune"], ["4 of the 4", "tune-val-00000"]),
        (["tasks.names=[sal]"], ["sal", "missing"]),
        (["data.size=[64,64]"], ["32x64", "64x64"]),
        ([f"save_predictions={tmp_path}/e"], ["save_predictions"]),
        ([f"checkpoint={trained}"], ["checkpoint", "predictions", "not both"]),
        ([f"hydra.run.dir={tmp_path}/b"], ["metrics.json"]),
        (["predictions=no/such"], ["no/such"]),
    ]
    for number, (overrides, fragments) in enumerate(cases):
        predictions = [] if "predictions=no/such" in overrides else [f"predictions={maps}"]
        run_dir = [] if "hydra.run.dir" in overrides[0] else [f"hydra.run.dir={tmp_path}/bad{number}"]
        assert_fails(cli("evaluate.py", *predictions, *ROOMS, *overrides, *run_dir), *fragments)


def test_save_predictions_refuses_before_anything_is_evaluated(cli, trained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    result = cli(
        "evaluate.py", f"checkpoint={trained}", f"save_predictions={tmp_path}/full", f"hydra.run.dir={tmp_path}/a"
    )
    assert_fails(result, f"save_predictions={tmp_path}/full", "not empty")
    assert not (tmp_path / "a" / "metrics.json").exists()
    assert_fails(cli("evaluate.py", f"hydra.run.dir={tmp_path}/a"), "checkpoint", "predictions", "neither")


def test_a_perfect_nyud_folder_scores_perfectly(cli, tmp_path):
    """Labels as predictions in the field's numbering and forms, on an archive whose files are numbered otherwise."""
    root, maps = tiny_nyud(tmp_path / "data"), tmp_path / "maps"
    for id in "abcd":
        classes = cv2.imread(str(root / "segmentation" / f"{id}.png"), cv2.IMREAD_UNCHANGED)
        write_png(maps / "semseg" / f"{id}.png", np.where(classes == 0, 0, classes - 1).astype(np.uint8))
        write_png(maps / "normals" / f"{id}.png", cv2.imread(str(root / "normals" / f"{id}.png"))[..., ::-1])
        (maps / "depth").mkdir(exist_ok=True)
        scipy.io.savemat(maps / "depth" / f"{id}.mat", {"depth": np.load(root / "depth" / f"{id}.npy")})
    overrides = [f"predictions={maps}", "data=nyud", f"data.root={root}", "data.cache=null", "data.workers=0"]
    overrides += ["trainer.device=cpu", f"hydra.run.dir={tmp_path}/a"]
    result = cli("evaluate.py", *overrides)
    assert result.code == 0, result.err
    scores = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert scores["semseg"]["mIoU"] == 1
    assert scores["depth"]["rmse"] == 0
    assert scores["normals"]["mErr"] < 0.01
    kept_overrides = [word for word in overrides if not word.startswith("hydra")]
    result = cli(
        "evaluate.py",
        *kept_overrides,
        f"data.root={tmp_path}/data",
        "tasks.names=[edge]",
        f"hydra.run.dir={tmp_path}/b",
    )
    assert_fails(result, "edge", "missing")
    path = tmp_path / "maps" / "semseg" / "a.png"
    write_png(path, cv2.imread(str(path), cv2.IMREAD_UNCHANGED) + 1)
    assert_fails(cli("evaluate.py", *kept_overrides, f"hydra.run.dir={tmp_path}/b"), str(path), "class 40", "0 to 39")
