"""Partially annotated training: which image keeps which labels, and what the rest of a training step makes of it."""

import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl import UserError
from mtcl.data import Augment, Rooms, apply_label_assignment, train_loader
from mtcl.data.partial_labels import (
    DIFFUSION_PASCAL,
    draw_label_assignment,
    draw_label_fractions,
    read_label_assignment,
    write_label_assignment,
)
from mtcl.regularizers import Contrastive
from mtcl.tasks import TASK_NAMES, build_task

IDS = [f"2008_{number:06d}" for number in range(60)]
TASKS = ("semseg", "depth", "normals", "edge")


def rooms(tasks=TASK_NAMES, count: int = 24):
    reader = Rooms("train", tasks, size=(32, 40), length=(count, 1))
    offered = Rooms.task_options()
    return reader, {name: build_task(name, **offered[name]) for name in tasks}


def test_one_gives_every_picture_a_task_and_every_task_as_many_pictures() -> None:
    labelled = draw_label_assignment(IDS, TASKS, "one", seed=3)
    assert list(map(len, labelled.values())) == [1] * 60
    assert Counter(name for names in labelled.values() for name in names) == dict.fromkeys(TASKS, 15)


def test_random_gives_every_number_of_tasks_but_none_and_all_equally_often() -> None:
    ids = [str(number) for number in range(3000)]
    labelled = draw_label_assignment(ids, TASKS, "random", seed=3)
    sizes = Counter(map(len, labelled.values()))
    assert sorted(sizes) == [1, 2, 3]
    assert max(abs(count - 1000) for count in sizes.values()) < 130  # 5 standard deviations
    for name in TASKS:
        assert abs(sum(name in names for names in labelled.values()) - 1500) < 140


@given(st.permutations(IDS[:12]), st.sampled_from(["one", "random"]), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_the_seed_fixes_the_labels(order: list[str], choice: str, seed: int) -> None:
    first = draw_label_assignment(IDS[:12], TASKS, choice, seed)
    assert first == draw_label_assignment(IDS[:12], TASKS, choice, seed)
    if choice == "random":
        assert first == draw_label_assignment(order, TASKS, choice, seed)
    assert set(first) == set(IDS[:12])


@given(st.dictionaries(st.sampled_from(TASKS), st.floats(0.001, 1)), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_a_fraction_of_the_pictures_keeps_a_label(fractions: dict[str, float], seed: int) -> None:
    labelled = draw_label_fractions(IDS, TASKS, fractions, seed)
    assert labelled == draw_label_fractions(IDS, TASKS, fractions, seed)
    for name in TASKS:
        expected = max(1, round(fractions[name] * 60)) if name in fractions else 60
        assert sum(name in names for names in labelled.values()) == expected


def test_a_picture_outside_the_fraction_has_the_other_labels_only() -> None:
    reader, tasks = rooms(count=10)
    partial = apply_label_assignment(reader, tasks, "full", 0, {"semseg": 0.1})
    labelled = [bool((partial.read(i).labels["semseg"] != 255).any()) for i in range(10)]
    assert sum(labelled) == 1
    hidden = labelled.index(False)
    assert np.array_equal(partial.read(hidden).labels["depth"], reader.read(hidden).labels["depth"])
    assert "semseg 1, " in partial.summary()


@pytest.mark.parametrize(
    ("mode", "fractions", "message"),
    [
        ("one", {"semseg": 0.5}, "label_fractions needs label_assignment=full, not one"),
        ("full", {"parts": 0.5}, "label_fractions names parts, which is not in use; in use: semseg"),
        ("full", {"semseg": 0.0}, r"label_fractions.semseg=0.0 must be above 0"),
    ],
)
def test_wrong_fractions(mode: str, fractions: dict[str, float], message: str) -> None:
    reader, tasks = rooms(count=4)
    with pytest.raises(UserError, match=message):
        apply_label_assignment(reader, tasks, mode, 0, fractions)


def test_other_seeds_give_other_labels() -> None:
    for choice in ("one", "random"):
        assert draw_label_assignment(IDS, TASKS, choice, 0) != draw_label_assignment(IDS, TASKS, choice, 1)


@pytest.mark.parametrize("choice", ["one", "random"])
def test_labels_that_are_not_kept_are_void_and_the_others_untouched(choice: str) -> None:
    reader, tasks = rooms()
    partial = apply_label_assignment(reader, tasks, choice, seed=0)
    labelled = draw_label_assignment(reader.ids, list(tasks), choice, seed=0)
    for index, name in enumerate(partial.ids):
        complete, sample = reader.read(index), partial.read(index)
        np.testing.assert_array_equal(sample.image, complete.image)
        for task, label in sample.labels.items():
            assert label.dtype == complete.labels[task].dtype
            if task in labelled[name]:
                np.testing.assert_array_equal(label, complete.labels[task])
            else:
                assert (label == tasks[task].void).all()


def test_full_changes_nothing() -> None:
    reader, tasks = rooms()
    assert apply_label_assignment(reader, tasks, "full", seed=0) is reader


def test_summary_and_fingerprint_tell_the_choice() -> None:
    reader, tasks = rooms()
    one, other = (apply_label_assignment(reader, tasks, "one", seed) for seed in (0, 1))
    assert "semseg 4, human_parts 4" in one.summary()
    assert len({reader.fingerprint(), one.fingerprint(), other.fingerprint()}) == 3


def test_augmented_batches_keep_absent_labels_void() -> None:
    reader, tasks = rooms()
    partial = apply_label_assignment(reader, tasks, "random", seed=0)
    labelled = draw_label_assignment(reader.ids, list(tasks), "random", seed=0)
    batch = next(iter(train_loader(partial, tasks, Augment((24, 24)), 12, seed=0, workers=0)))
    for row, meta in enumerate(batch["meta"]):
        for name, task in tasks.items():
            valid = task.valid(batch["labels"][name])[row]
            assert name in labelled[meta.id] or not valid.any()


def test_both_views_of_an_image_keep_the_label_of_the_same_task() -> None:
    reader, tasks = rooms()
    partial = apply_label_assignment(reader, tasks, "one", seed=0)
    labelled = draw_label_assignment(reader.ids, list(tasks), "one", seed=0)
    augment = Augment((24, 24), scale=(1, 1))
    batch = next(iter(train_loader(partial, tasks, augment, 6, seed=0, workers=0, views_per_step=2)))
    for row, meta in enumerate(batch["meta"]):
        names = {name for name, task in tasks.items() if task.valid(batch["labels"][name])[row].any()}
        assert names == labelled[meta.id]
    assert [meta.view for meta in batch["meta"]] == [0] * 6 + [1] * 6


def test_each_picture_is_contrasted_with_a_source_it_has_labels_of() -> None:
    reader, tasks = rooms()
    partial = apply_label_assignment(reader, tasks, "one", seed=0)
    batch = next(iter(train_loader(partial, tasks, Augment((32, 40), scale=(1, 1)), 12, seed=0, workers=0)))
    ids = [meta.id for meta in batch["meta"]]
    regularizer = Contrastive(tasks, dict.fromkeys(tasks, 8), num_pixels=64)
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.randn(12, 8, 8, 10, generator=generator, requires_grad=True) for name in tasks}
    output = regularizer(features, batch["labels"], regularizer.sample(0, ids))
    output.loss.backward()
    assert output.loss.isfinite()
    labelled = draw_label_assignment(reader.ids, list(tasks), "one", seed=0)
    for target in tasks:
        (gradient,) = (features[target].grad,)
        for row, name in enumerate(ids):
            # The one task that the image has is its source, but never the target's own.
            if target in labelled[name]:
                assert not gradient[row].any()
    assert any(gradient.any() for gradient in (features[name].grad for name in tasks))


FLAGS = {name: [int(i % 5 == k) for k in range(5)] for i, name in enumerate(IDS)}
BY_TASK = {task: [name for name in IDS if FLAGS[name][k]] for k, task in enumerate(DIFFUSION_PASCAL)}
EXPECTED = {name: frozenset([DIFFUSION_PASCAL[i % 5]]) for i, name in enumerate(IDS)}


def test_the_published_forms_of_pascal_are_read(tmp_path: Path) -> None:
    as_published = {task: [np.str_(name) for name in names] for task, names in BY_TASK.items()}
    np.save(tmp_path / "onelabel.npy", np.array(as_published, dtype=object), allow_pickle=True)
    torch.save({np.str_(name): flags for name, flags in FLAGS.items()}, tmp_path / "new_onelabel.pth")
    (tmp_path / "own.json").write_text(json.dumps({name: sorted(names) for name, names in EXPECTED.items()}))
    for file in ("onelabel.npy", "new_onelabel.pth", "own.json"):
        assert read_label_assignment(tmp_path / file, IDS, DIFFUSION_PASCAL) == EXPECTED
        assert read_label_assignment(tmp_path / file, IDS[5:8], ["edge", "sal"]) == {
            name: EXPECTED[name] & {"edge", "sal"} for name in IDS[5:8]
        }


def test_the_published_form_of_nyud_is_read_by_row(tmp_path: Path) -> None:
    weights = torch.tensor([[1.0, 0, 0], [0, 1, 1]]).repeat(30, 1)
    torch.save({"labels_weights": weights}, tmp_path / "onelabel.pth")
    assignment = read_label_assignment(tmp_path / "onelabel.pth", IDS, ["semseg", "depth", "normals"])
    assert assignment[IDS[0]] == {"semseg"}
    assert assignment[IDS[59]] == {"depth", "normals"}
    torch.save({"labels_weights": weights[:, :2]}, tmp_path / "cityscapes.pth")
    assignment = read_label_assignment(tmp_path / "cityscapes.pth", IDS, ["semseg", "depth"])
    assert (assignment[IDS[0]], assignment[IDS[59]]) == ({"semseg"}, {"depth"})
    with pytest.raises(UserError, match=r"a table of 60 images of Cityscapes .*59 images; use it with that dataset"):
        read_label_assignment(tmp_path / "cityscapes.pth", IDS[:59], ["semseg"])
    with pytest.raises(UserError, match=r"a table of 60 images of NYU-v2 .*59 images"):
        read_label_assignment(tmp_path / "onelabel.pth", IDS[:59], ["semseg"])
    with pytest.raises(UserError, match="says nothing of edge"):
        read_label_assignment(tmp_path / "onelabel.pth", IDS, ["semseg", "edge"])


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


@pytest.mark.parametrize("form", ["npy", "pth", "json", "txt"])
def test_a_file_of_another_kind_is_refused_and_never_run(tmp_path: Path, monkeypatch, form: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"mapping.{form}"
    if form == "npy":
        np.save(path, np.array({"semseg": Evil()}, dtype=object), allow_pickle=True)
    elif form == "pth":
        torch.save({"labels_weights": Evil()}, path)
    else:
        path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(UserError, match=f"mapping.{form}"):
        read_label_assignment(path, IDS, TASKS)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        "{}",
        '{"a": 1}',
        '{"a": [0, 1]}',
        '{"a": [[1]]}',
        '{"a": [{}]}',
        '{"a": [1, 0, 0, 0, 2]}',
        '{"a": ["depht"]}',
    ],
)
def test_json_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "mapping.json").write_text(content)
    with pytest.raises(UserError, match=r"mapping\.json"):
        read_label_assignment(tmp_path / "mapping.json", IDS, TASKS)


def test_pictures_and_files_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.json does not exist"):
        read_label_assignment(tmp_path / "no.json", IDS, TASKS)
    reader, tasks = rooms()
    with pytest.raises(UserError, match=r"label_assignment=some is neither full, one, random or present, nor a file"):
        apply_label_assignment(reader, tasks, "some", seed=0)
    np.save(tmp_path / "other.npy", np.array({"depth": ["0001"], "edge": ["0002"]}, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=f"lacks 60 images.*{IDS[0]}"):
        read_label_assignment(tmp_path / "other.npy", IDS, ["depth", "edge"])
    (tmp_path / "few.json").write_text(json.dumps({IDS[0]: list(TASKS)}))
    with pytest.raises(UserError, match=f"lacks 59 images.*{IDS[1]}"):
        read_label_assignment(tmp_path / "few.json", IDS, TASKS)


def test_labels_that_are_not_kept_are_not_read() -> None:
    reader, tasks = rooms()
    asked = []
    read = reader.read
    reader.read = lambda index, tasks=None: asked.append(tasks) or read(index, tasks)  # type: ignore[method-assign]
    apply_label_assignment(reader, tasks, "one", seed=0).read(0)
    assert list(map(len, asked)) == [1]


def test_one_task_leaves_no_choice() -> None:
    with pytest.raises(UserError, match=r"label_tasks must list all tasks"):
        draw_label_assignment(IDS, ["depth"], "one", 0)


def test_a_task_alone_has_the_labels_that_it_has_among_all() -> None:
    """The images of other tasks' labels stay in the list, and their labels are not read."""
    reader, tasks = rooms()
    partial = apply_label_assignment(reader, tasks, "one", seed=0)
    asked = []
    read = reader.read
    reader.read = lambda index, tasks=None: asked.append(tasks) or read(index, tasks)  # type: ignore[method-assign]
    alone = apply_label_assignment(reader, {"depth": tasks["depth"]}, "one", seed=0, label_tasks=list(tasks))
    assert list(alone.ids) == list(partial.ids)
    assert (alone.num_unlabeled, alone.count_labels()) == (0, {"depth": 4})  # type: ignore[attr-defined]
    for index in range(len(reader.ids)):
        sample = alone.read(index)
        assert list(sample.labels) == ["depth"]
        np.testing.assert_array_equal(sample.labels["depth"], partial.read(index).labels["depth"])
    assert {name for names in asked[::2] for name in names} == {"depth"}


@pytest.mark.parametrize("ending", ["json", "npy", "pth"])
@pytest.mark.parametrize("tasks", [("semseg", "depth", "normals"), DIFFUSION_PASCAL])
def test_a_written_file_is_read_as_it_was_drawn(tmp_path: Path, ending: str, tasks: tuple[str, ...]) -> None:
    path = tmp_path / f"labels.{ending}"
    assignment = draw_label_assignment(IDS, tasks, "one", seed=1)
    write_label_assignment(path, assignment, IDS, tasks)
    assert read_label_assignment(path, IDS, tasks) == assignment
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_written_files_have_the_layout_of_the_published_ones(tmp_path: Path) -> None:
    nyud, pascal, listed = (tmp_path / name for name in ("nyud.pth", "pascal.pth", "pascal.npy"))
    write_label_assignment(
        nyud, {"a": frozenset(["normals"]), "b": frozenset(["semseg"])}, "ba", ("semseg", "depth", "normals")
    )
    assert torch.load(nyud)["labels_weights"].tolist() == [[1, 0, 0], [0, 0, 1]]
    assignment = {"a": frozenset(["sal"]), "b": frozenset(["edge"])}
    for path in (pascal, listed):
        write_label_assignment(path, assignment, "ab", DIFFUSION_PASCAL)
    assert torch.load(pascal) == {"a": [0, 0, 1, 0, 0], "b": [0, 0, 0, 0, 1]}
    members = np.load(listed, allow_pickle=True).item()
    assert members == {"semseg": [], "human_parts": [], "sal": ["a"], "normals": [], "edge": ["b"]}


@pytest.mark.parametrize(
    ("name", "message"), [("a.pth", "has a format for .*not for semseg, depth"), ("a.txt", "endings")]
)
def test_no_file_of_another_format_is_written(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_label_assignment(tmp_path / name, draw_label_assignment(IDS, TASKS, "one", 0), IDS, TASKS)
    assert not list(tmp_path.iterdir())
