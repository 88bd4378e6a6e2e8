"""Labels and maps that can be read, but hardly mean what they should: said by name, and never of sound ones."""

import functools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.common import TINY, assert_fails, composed, tiny_nyud
from helpers.pascal_miniature import write_archive
from helpers.saved_maps import Listed, write_png

from mtcl import UserError
from mtcl.cli.train import check_dataset_labels, find_unlabeled_images
from mtcl.data import NYUD, PascalContext, Rooms, apply_label_assignment
from mtcl.data.partial_labels import draw_label_assignment, write_label_assignment
from mtcl.evaluation.plausibility import check_labels, check_maps, find_unlabeled_tasks, report_problems
from mtcl.evaluation.saved_predictions import SavedPredictions
from mtcl.tasks import NYUD40, build_task

DEPTH, NORMALS, EDGE, SAL = (build_task(name) for name in ("depth", "normals", "edge", "sal"))
SEMSEG = build_task("semseg", class_names=NYUD40)
RNG = np.random.default_rng(0)
UNITS = RNG.normal(size=(20, 30, 3))
UNITS = (UNITS / np.linalg.norm(UNITS, axis=2, keepdims=True)).astype(np.float32)
CODES = np.rint((UNITS + 1) * 127.5).astype(np.uint8)
METRES = RNG.uniform(0.5, 9, (20, 30)).astype(np.float32)
NYUD_TASKS = ("semseg", "depth", "normals", "edge")
WALL = np.zeros((20, 30, 3), np.float32) + np.float32([0, 0, 1])


@pytest.mark.parametrize(
    ("task", "array", "says"),
    [
        (DEPTH, METRES, None),
        (DEPTH, METRES * 8, None),  # outdoors
        (DEPTH, METRES * 1000, "millimetres"),
        (DEPTH, np.where(METRES > 3, METRES * 1000, 0), "millimetres"),
        (DEPTH, np.zeros((20, 30), np.float32), None),
        (NORMALS, UNITS, None),
        (NORMALS, CODES, None),
        (NORMALS, WALL, None),
        (NORMALS, np.zeros((20, 30, 3), np.uint8), None),
        (NORMALS, (UNITS + 1) / 2, r"\(n \+ 1\) / 2"),
        (NORMALS, np.rint((UNITS + 3) * 63.75).astype(np.uint8), r"\(n \+ 1\) / 2"),  # coded twice
    ],
)
def test_units_of_depth_and_codes_of_normals_are_told(task, array, says) -> None:
    reader = Listed({id: {task.name: array} for id in "abc"})
    problems = check_labels(reader, {task.name: task}, "validation")
    if says is None:
        assert problems == []
        return
    with pytest.raises(
        UserError, match=f"^strict=true .*: the labels of {task.name} of the validation images .*{says}"
    ):
        report_problems(problems, strict=True)
    assert report_problems(problems, strict=False) == problems


def sound_lists(tmp_path: Path):
    for part in ("train", "val"):
        yield Rooms, Rooms(part, list(Rooms.task_options()), size=(48, 64), length=(16, 16))
        write_archive(tmp_path / part)
        yield PascalContext, PascalContext(tmp_path / part, part, list(PascalContext.task_options()))
        yield NYUD, NYUD(tiny_nyud(tmp_path / f"n{part}"), part, list(NYUD.task_options()))


def test_sound_labels_raise_no_doubt(tmp_path: Path) -> None:
    for kind, reader in sound_lists(tmp_path):
        tasks = {name: build_task(name, **options) for name, options in kind.task_options().items()}
        assert check_labels(reader, tasks, "training") == []
        if kind is not Rooms:  # a few rooms may have no person
            assert find_unlabeled_tasks(reader, tasks) == []


def maps_of(folder: Path, task, maps: list[np.ndarray], labels: list[np.ndarray]) -> list[str]:
    for id, values in zip("abc", maps):
        if values.dtype == np.uint8:
            write_png(folder / task.name / f"{id}.png", values)
        else:
            (folder / task.name).mkdir(parents=True, exist_ok=True)
            np.save(folder / task.name / f"{id}.npy", values)
    reader = Listed({id: {task.name: label} for id, label in zip("abc", labels)})
    tasks = {task.name: task}
    return check_maps(SavedPredictions(folder, tasks, reader), reader, tasks)


def test_maps_of_others_are_looked_at_beside_their_labels(tmp_path: Path) -> None:
    classes = [RNG.integers(0, 38, (20, 30)).astype(np.uint8) for _ in range(3)]
    half = [np.where(RNG.random((20, 30)) < 0.5, c, 3).astype(np.uint8) for c in classes]
    assert maps_of(tmp_path / "good", SEMSEG, half, classes) == []
    assert maps_of(tmp_path / "poor", SEMSEG, classes[::-1], classes) == []
    (text,) = maps_of(tmp_path / "larger", SEMSEG, [c + np.uint8(1) for c in half], classes)
    assert text.startswith("the maps of semseg look one larger than the classes of the labels")
    assert maps_of(tmp_path / "metres", DEPTH, [METRES] * 3, [METRES] * 3) == []
    (text,) = maps_of(tmp_path / "millimetres", DEPTH, [METRES * 1000] * 3, [METRES] * 3)
    assert "millimetres" in text
    (text,) = maps_of(tmp_path / "codes", NORMALS, [(UNITS + 1) / 2] * 3, [UNITS] * 3)
    assert "(n + 1) / 2" in text


@pytest.mark.parametrize("task", [EDGE, SAL])
def test_a_folder_of_zeros_and_ones_is_read_as_such(tmp_path: Path, task) -> None:
    ones = [np.eye(20, 30, k, dtype=np.uint8) for k in range(3)]
    (text,) = maps_of(tmp_path / "ones", task, ones, ones)
    assert "hold 0 and 1 only" in text
    assert maps_of(tmp_path / "codes", task, [255 * one for one in ones], ones) == []
    assert maps_of(tmp_path / "nothing", task, [0 * one for one in ones], ones) == []
    faint = [ones[0], 2 * ones[1], ones[2]]  # one map of 8 bits: 1 is 1 / 255
    assert maps_of(tmp_path / "faint", task, faint, ones) == []
    reader = Listed({id: {task.name: label} for id, label in zip("abc", ones)})
    same = [
        SavedPredictions(tmp_path / folder, {task.name: task}, reader).formats[task.name].load(path)
        for folder in ("ones", "codes")
        for path in [tmp_path / folder / task.name / "b.png"]
    ]
    assert np.array_equal(*same)


def without(root: Path, folder: str) -> None:
    for path in (root / folder).glob("*.png"):
        cv2.imwrite(str(path), np.zeros((64, 96), np.uint8))


OVERRIDES = [
    "data=nyud",
    *TINY,
    "data.size=[64,96]",
    "data.cache=null",
    "trainer.validate_first=false",
    "trainer.num_panels=0",
]
OVERRIDES += ["trainer.max_steps=1", "evaluation.score_boundaries=false"]


def test_a_task_without_any_label_is_a_warning_and_alone_an_error(cli, tmp_path: Path) -> None:
    root = tiny_nyud(tmp_path / "NYUDv2")
    without(root, "segmentation")
    for path in (root / "depth").glob("*.npy"):
        np.save(path, 1000 * np.load(path))
    sentence = "no training image had a valid label of semseg: its head was not trained"
    overrides = [*OVERRIDES, f"data.root={root}", "tasks.names=[semseg,depth]"]
    result = cli("train.py", *overrides, f"hydra.run.dir={tmp_path}/run")
    assert result.code == 0, result.err
    warnings = json.loads((tmp_path / "run" / "run.json").read_text())["warnings"]
    assert warnings[0] == sentence
    assert [("depth" in text, "millimetres" in text) for text in warnings[1:]] == [(True, True)] * 2  # both lists
    assert result.out.count(sentence) == 2  # at the start and at the end
    strict = ["data.strict=true", f"hydra.run.dir={tmp_path}/strict"]
    assert_fails(cli("train.py", *overrides, *strict), sentence, "data.strict")
    assert not list((tmp_path / "strict").glob("checkpoints/*.pt"))
    reader = NYUD(root, "train", ["semseg"])
    with pytest.raises(UserError, match="no training image has a valid label of semseg, so there is nothing to train"):
        find_unlabeled_tasks(reader, {"semseg": SEMSEG})
    scored = [f"checkpoint={tmp_path}/run/checkpoints/last.pt", "data.strict=true", f"hydra.run.dir={tmp_path}/scores"]
    assert_fails(cli("evaluate.py", *scored), "depth", "millimetres")


def test_images_that_a_label_file_gives_no_label_are_counted(tmp_path: Path, caplog) -> None:
    reader, options = Rooms("train", list(NYUD_TASKS), size=(48, 64), length=(12, 1)), Rooms.task_options()
    tasks = {name: build_task(name, **options[name]) for name in NYUD_TASKS[:3]}
    file = tmp_path / "four.json"
    drawn = draw_label_assignment(reader.ids, NYUD_TASKS, "one", seed=0)
    write_label_assignment(file, drawn, reader.ids, NYUD_TASKS)
    read = functools.partial(apply_label_assignment, reader, tasks, str(file), 0)
    problems = check_dataset_labels(composed("data=rooms"), tasks, read(), reader)
    assert problems[0].startswith("four.json gives 3 of 12 training images no label of semseg, depth, normals, ")
    assert caplog.messages == problems
    with pytest.raises(UserError, match=r"data\.strict=true .* four\.json gives 3 of 12"):
        check_dataset_labels(composed("data=rooms", "data.strict=true"), tasks, read(), reader)
    for dataset in (reader, read(label_tasks=NYUD_TASKS), apply_label_assignment(reader, tasks, "one", 0)):
        assert find_unlabeled_images(dataset) == []


def test_maps_scored_without_a_model_are_looked_at_too(cli, tmp_path: Path) -> None:
    root = tiny_nyud(tmp_path / "NYUDv2")
    for id in "abcd":
        edge = cv2.imread(str(root / "edge" / f"{id}.png"), cv2.IMREAD_UNCHANGED)
        write_png(tmp_path / "maps" / "edge" / f"{id}.png", (edge > 127).astype(np.uint8))
    overrides = ["data=nyud", f"data.root={root}", "data.cache=null", "data.workers=0", f"predictions={tmp_path}/maps"]
    overrides += ["trainer.device=cpu", "evaluation.score_boundaries=false"]
    result = cli("evaluate.py", *overrides, f"hydra.run.dir={tmp_path}/scores")
    assert result.code == 0, result.err
    (text,) = json.loads((tmp_path / "scores" / "run.json").read_text())["warnings"]
    assert "the maps of edge" in text
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert metrics["edge"]["loss"] < 1e-4  # perfect ones
    assert_fails(
        cli("evaluate.py", *overrides, "data.strict=true", f"hydra.run.dir={tmp_path}/strict"), "hold 0 and 1 only"
    )
